"""The foreign textures that textural defects are made of: photographs, or generated ones."""

import math
import shutil
import warnings
from pathlib import Path

import torch
from torch import Generator, Tensor
from torchvision.datasets import DTD
from torchvision.transforms.v2 import functional as TF

from ..image_files import left_out, oddities, oddities_of, opened

TEXTURES_KEPT = 512
TEXTURE_SIZE = 256  # pixels a side
TEXTURES_AT_ONCE = 32  # generating one takes many times the memory of keeping it
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def textures_from(dtd_dir: str | Path, generator: Generator, count: int = TEXTURES_KEPT) -> Tensor:
    """Return the textures that a model paints with, at most ``count``, ``(T, 3, 256, 256)`` uint8.

    ``dtd_dir`` is a folder of photographs, as for :func:`load_textures`, or ``"builtin"`` for generated ones.
    """
    if dtd_dir == "builtin":
        return builtin_textures(count, TEXTURE_SIZE, generator)
    return load_textures(dtd_dir, count, TEXTURE_SIZE, generator)


def download_textures(folder: str | Path) -> None:
    """Download the Describable Textures Dataset, 600 MB, unless the folder already holds something.

    The folder appears once everything is in it.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # torchvision would take half of the photographs for all
    DTD(unfinished, download=True)
    for archive in unfinished.rglob("*.tar.gz"):
        archive.unlink()  # torchvision keeps it: another 600 MB
    unfinished.rename(folder)


def load_textures(folder: str | Path, count: int, size: int, generator: Generator | None = None) -> Tensor:
    """Read at most ``count`` photographs of textures, drawn at random, as squares ``(T, 3, size, size)`` uint8.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no photograph, in subfolders of any depth.
        ValueError: If a photograph cannot be read.
    """
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        msg = f"dtd_dir: no photographs ({kinds}) below {folder}; links to other folders are not followed"
        raise FileNotFoundError(msg)
    chosen = [files[i] for i in torch.randperm(len(files), generator=generator)[:count].tolist()]
    odd, textures = {}, []
    for file in chosen:
        try:
            with opened(file) as image:
                odd[file], photograph = oddities_of(image), TF.pil_to_tensor(image.convert("RGB"))
        except ValueError as error:
            msg = f"dtd_dir: {error}"
            raise ValueError(msg) from error
        textures.append(TF.center_crop(TF.resize(photograph, [size], antialias=True), [size]))
    for found in (*oddities(odd), *left_out([Path(folder)], SUFFIXES)):
        warnings.warn(found, stacklevel=2)
    return torch.stack(textures)


def builtin_textures(count: int, size: int, generator: Generator | None = None) -> Tensor:
    """Generate textures of ``size`` pixels a side, ``(count, 3, size, size)`` uint8; see :func:`noise_textures`."""
    sizes = [min(TEXTURES_AT_ONCE, count - done) for done in range(0, count, TEXTURES_AT_ONCE)]
    return torch.cat([noise_textures(n, size, generator) for n in sizes])


def noise_textures(count: int, size: int, generator: Generator | None = None) -> Tensor:
    """Generate coloured noise of random grain, direction and contrast, ``(count, 3, size, size)`` uint8."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None, :]
    direction = uniform(0, math.pi, 1, 1)
    along, across = fx * direction.cos() + fy * direction.sin(), fy * direction.cos() - fx * direction.sin()
    radius = (along**2 + (across * uniform(1, 6, 1, 1)) ** 2).sqrt().clamp(min=1 / size)
    amplitude = radius ** -uniform(0.5, 2.5, 1, 1)  # from fine grain to smooth clouds
    amplitude[:, 0, 0] = 0  # the mean is set by the colours
    noise = torch.randn(count, 2, size, size, generator=generator)
    layers = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude[:, None], s=(size, size))
    layers = layers / layers.std(dim=(2, 3), keepdim=True)
    colours = uniform(-0.25, 0.25, 2, 1) + uniform(-0.1, 0.1, 2, 3)  # mostly grey, as surfaces are
    base = uniform(0.2, 0.8, 1) + uniform(-0.15, 0.15, 3)
    textures = base[:, :, None, None] + torch.einsum("tlhw,tlc->tchw", layers, colours)
    return (255 * textures.clamp(0, 1)).to(torch.uint8)
