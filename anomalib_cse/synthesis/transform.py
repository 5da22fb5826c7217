"""Synthetic defects: structural, textural and blur, inside Perlin noise masks (Section 3.1).

:meth:`AnomalySynthesis.sample` draws all that is random, :meth:`AnomalySynthesis.apply` only computes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
import torch
from kornia import enhance
from kornia.color import hsv_to_rgb, rgb_to_hsv
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from kornia.geometry.transform import rotate
from torch import Generator, Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from .perlin import perlin_masks

# Section 3.1; the masks' own are in perlin.py
KINDS = ("structural", "textural", "blur")  # equally likely
OPERATIONS_DRAWN = 3  # of those listed for structural and for textural defects
BRIGHTNESS = (0.8, 1.2)  # factor, of structural and textural defects
# Structural defects, after MemSeg
ROTATION = (-45.0, 45.0)  # degrees
HUE = (0.5, 1.5)  # factor
SATURATION = (0.5, 1.5)  # factor
GRID = 8  # cells a side
# Textural defects, after DRAEM
OFFSET = (-30 / 255, 30 / 255)  # added to the brightness
SHIFT = (-50 / 255, 50 / 255)  # added to hue and saturation, both in [0, 1]
GAMMA = (0.5, 2.0)  # exponent, per channel
SHARPNESS = (0.0, 3.0)  # 0 smooths, 1 leaves as is
SOLARISE = (32 / 255, 128 / 255)  # brighter values are inverted
BITS = (1, 8)  # per channel, that posterising leaves
# Blur
RADIUS = (2, 7)  # pixels beside the central one: odd widths of 5 to 15
SIGMA = 6.0  # pixels


@dataclass
class SynthesisParams:
    """What was drawn for B images, a row of every field each."""

    mask: Tensor  # (B, 1, H, W) bool, where the image is replaced
    kind: Tensor  # (B,) index into KINDS
    operations: Tensor  # (B, 9) bool, which of the kind's operations apply, in their listed order
    # structural defects
    flip: Tensor  # (B, 2) bool, left-right and up-down
    angle: Tensor  # (B,) degrees, counter-clockwise
    hue: Tensor  # (B,) factor
    saturation: Tensor  # (B,) factor
    cells: Tensor  # (B, 64), for every grid cell the one that is put there
    # structural and textural defects
    brightness: Tensor  # (B,) factor
    # textural defects
    texture: Tensor  # (B,) row of the textures
    offset: Tensor  # (B,) added to the brightness
    shift: Tensor  # (B, 2) added to hue and saturation, both in [0, 1]
    gamma: Tensor  # (B, 3) exponent per channel
    sharpness: Tensor  # (B,) factor: 0 smooths, 1 leaves as is
    solarise: Tensor  # (B,) value from which on it is inverted
    levels: Tensor  # (B,) values per channel that posterising leaves
    # blur
    kernel_size: Tensor  # (B,) odd width in pixels

    def to(self, device: torch.device) -> "SynthesisParams":
        """Return the same parameters on ``device``."""
        waits = device.type != "cpu"  # an accelerator runs in order; the CPU would read what has not arrived
        return SynthesisParams(*(getattr(self, f.name).to(device, non_blocking=waits) for f in fields(self)))

    def __getitem__(self, rows: Tensor | slice) -> "SynthesisParams":
        """Return the parameters of some of the images."""
        return SynthesisParams(*(getattr(self, f.name)[rows] for f in fields(self)))


def per_image(values: Tensor) -> Tensor:
    """View ``(B,)`` or ``(B, C)`` so that it broadcasts over ``(B, C, H, W)``."""
    return values.reshape(len(values), -1, 1, 1)


def flip(images: Tensor, params: SynthesisParams) -> Tensor:
    """Mirror left-right and up-down, as drawn."""
    images = torch.where(per_image(params.flip[:, 0]), images.flip(-1), images)
    return torch.where(per_image(params.flip[:, 1]), images.flip(-2), images)


def scale_hue(images: Tensor, params: SynthesisParams) -> Tensor:
    """Multiply the hue, an angle from red, by the drawn factors."""
    hue, saturation, value = rgb_to_hsv(images).unbind(1)
    return hsv_to_rgb(torch.stack([hue * params.hue[:, None, None], saturation, value], dim=1))


def shift_colour(images: Tensor, params: SynthesisParams) -> Tensor:
    """Add the drawn shifts to hue, which wraps around, and saturation, which is clipped."""
    hue, saturation, value = rgb_to_hsv(images).unbind(1)
    hue = hue + 2 * math.pi * params.shift[:, 0, None, None]  # kornia's is in radians
    saturation = (saturation + params.shift[:, 1, None, None]).clamp(0, 1)
    return hsv_to_rgb(torch.stack([hue, saturation, value], dim=1))


def posterise(images: Tensor, params: SynthesisParams) -> Tensor:
    """Round down to the drawn number of levels, on the values themselves: kornia rounds to 8 bits first."""
    levels = per_image(params.levels)
    return (images * levels).floor().clamp(max=levels - 1) / levels


def equalise(images: Tensor) -> Tensor:
    """Flatten the histogram of every channel, at 8 bits: kornia cuts the values to these, torchvision rounds them."""
    return TF.to_dtype(TF.equalize(TF.to_dtype(images, torch.uint8, scale=True)), images.dtype, scale=True)


def shuffle_cells(images: Tensor, order: Tensor) -> Tensor:
    """Cut images ``(B, C, H, W)`` into a square grid and put the cells into another order.

    ``order`` holds for every cell, row by row, the one that is put there, ``(B, grid * grid)``. Sides that the grid
    does not divide are padded for the cut.
    """
    b, c, height, width = images.shape
    grid = math.isqrt(order.shape[1])
    h, w = -(-height // grid), -(-width // grid)
    padded = F.pad(images, (0, grid * w - width, 0, grid * h - height), mode="replicate")
    cells = padded.view(b, c, grid, h, grid, w).permute(0, 2, 4, 1, 3, 5).reshape(b, grid * grid, -1)
    cells = cells.gather(1, order[:, :, None].expand_as(cells)).view(b, grid, grid, c, h, w)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(b, c, grid * h, grid * w)[:, :, :height, :width]


def gaussian_blur(images: Tensor, kernel_size: Tensor) -> Tensor:
    """Blur images ``(B, C, H, W)`` by a Gaussian cut at an odd width in pixels that differs per image, ``(B,)``."""
    radius = RADIUS[1]
    distance = torch.arange(-radius, radius + 1, device=images.device).abs()
    gaussian = get_gaussian_kernel1d(2 * radius + 1, SIGMA, device=images.device)  # (1, 15)
    kernels = gaussian * (distance <= kernel_size[:, None] // 2)  # (B, 15), as gaussian_blur2d takes one width only
    kernels = kernels / kernels.sum(1, keepdim=True)
    return filter2d_separable(images, kernels, kernels, border_type="replicate")


Operation = Callable[[Tensor, SynthesisParams], Tensor]

STRUCTURAL_OPERATIONS: dict[str, Operation] = {
    "flip": flip,
    "rotate": lambda images, p: rotate(images, p.angle, padding_mode="reflection", align_corners=False),
    "brightness": lambda images, p: enhance.adjust_brightness_accumulative(images, p.brightness),
    "saturation": lambda images, p: enhance.adjust_saturation(images, p.saturation),
    "hue": scale_hue,
}

TEXTURAL_OPERATIONS: dict[str, Operation] = {
    "gamma": lambda images, p: enhance.adjust_gamma(images, p.gamma),
    "brightness": lambda images, p: (images * per_image(p.brightness) + per_image(p.offset)).clamp(0, 1),
    # from torchvision's smoothed image; kornia sharpens none of 2 pixels a side
    "sharpen": lambda images, p: TF.adjust_sharpness(images, 0.0).lerp(images, per_image(p.sharpness)).clamp(0, 1),
    "hue_and_saturation": shift_colour,
    "solarise": lambda images, p: enhance.solarize(images, p.solarise),
    "posterise": posterise,
    "invert": lambda images, _: enhance.invert(images),
    "autocontrast": lambda images, _: TF.autocontrast(images),  # kornia turns a channel of one value black
    "equalise": lambda images, _: equalise(images),
}


def operate(images: Tensor, drawn: Tensor, params: SynthesisParams, operations: Mapping[str, Operation]) -> Tensor:
    """Apply to images ``(B, 3, H, W)`` in [0, 1] the operations drawn for each, in their listed order.

    ``drawn`` ``(B, 9)`` bool is on the CPU, so that choosing rows does not wait for a device.
    """
    images = images.clone()
    for column, operation in enumerate(operations.values()):
        rows = drawn[:, column].nonzero().flatten().to(images.device, non_blocking=True)
        if len(rows):
            images[rows] = operation(images[rows], params[rows])
    return images


class Stream(IntEnum):
    """What random numbers are drawn for: sets them apart from others of the same seed. Values stay as they are."""

    SPLIT = 0
    TRAINING_PAIRS = 1
    HELD_OUT_PAIRS = 2
    TEXTURES = 3
    ORDER = 4
    CLUSTERED = 5
    PAIRS_LIKE_HELD_OUT = 6
    DEFECTIVE_IMAGES = 10
    DEFECTS = 11
    SAMPLE = 13
    GAUSSIAN_TEXTURES = 14
    VARIED_IMAGES = 15
    VARIATIONS = 16
    KEPT_IMAGES = 17


def generator_for(*numbers: int) -> Generator:
    """Return a generator on the CPU that the numbers, 0 or more each, determine; others get independent streams."""
    # numpy takes zeros at the end for nothing, hence the count; torch takes 32 bits of a seed
    [seed] = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)
    return Generator().manual_seed(int(seed))


class AnomalySynthesis:
    """Paint synthetic defects into images, a whole batch at a time.

    Args:
        textures: What textural defects are taken from, ``(T, 3, h, w)`` uint8, on the device of the images.
        kinds: Some of :data:`KINDS`, all equally likely.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(self, textures: Tensor, *, kinds: Sequence[str] = KINDS) -> None:
        shape, dtype = tuple(getattr(textures, "shape", ())), getattr(textures, "dtype", type(textures))
        if dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape:
            msg = f"textures must be (T, 3, h, w) uint8, none of them 0, got {shape} {dtype}"
            raise ValueError(msg)
        if not (isinstance(kinds, Sequence) and kinds and all(kind in KINDS for kind in kinds)):
            msg = f"kinds must be some of {KINDS}, got {kinds!r}"
            raise ValueError(msg)
        self.textures = textures
        self.kinds = tuple(kinds)

    def to(self, device: torch.device) -> "AnomalySynthesis":
        """Return the same synthesis for images on ``device``."""
        return AnomalySynthesis(self.textures.to(device), kinds=self.kinds)

    def __call__(self, images: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw defects and paint them: return the corrupted images and the masks of the defects."""
        params = self.sample(images.shape, generator)
        return self.apply(images, params), params.mask.to(images.device)

    def sample(self, shape: Sequence[int], generator: Generator | None = None) -> SynthesisParams:
        """Draw the defects of a batch of shape ``(B, 3, H, W)``, on the generator's device.

        All randomness comes from the generator; ``None`` is torch's global one, on the CPU.
        """
        device = generator.device if generator else torch.device("cpu")
        b, _, height, width = shape

        def uniform(low: float, high: float, *columns: int) -> Tensor:
            return low + (high - low) * torch.rand(b, *columns, generator=generator, device=device)

        def integer(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (b,), generator=generator, device=device)

        weights = torch.tensor([float(kind in self.kinds) for kind in KINDS], device=device)
        kind = torch.multinomial(weights, b, replacement=True, generator=generator)
        listed = torch.tensor([len(STRUCTURAL_OPERATIONS), len(TEXTURAL_OPERATIONS), 1], device=device)[kind]
        ranks = uniform(0, 1, len(TEXTURAL_OPERATIONS))
        unlisted = torch.arange(ranks.shape[1], device=device) >= listed[:, None]
        uniform(0, 1)  # unused: without it a seed would give other defects than those of the published figures
        return SynthesisParams(  # drawn in this order: in another one a seed would give other defects
            mask=perlin_masks(b, (height, width), generator),
            kind=kind,
            operations=ranks.masked_fill(unlisted, 2.0).argsort(1).argsort(1) < OPERATIONS_DRAWN,
            texture=integer(0, len(self.textures) - 1),
            flip=uniform(0, 1, 2) < 0.5,
            angle=uniform(*ROTATION),
            cells=uniform(0, 1, GRID**2).argsort(1),
            brightness=uniform(*BRIGHTNESS),
            offset=uniform(*OFFSET),
            hue=uniform(*HUE),
            saturation=uniform(*SATURATION),
            shift=uniform(*SHIFT, 2),
            gamma=uniform(*GAMMA, 3),
            sharpness=uniform(*SHARPNESS),
            solarise=uniform(*SOLARISE),
            levels=2 ** integer(*BITS),
            kernel_size=2 * integer(*RADIUS) + 1,
        )

    def source(self, kind: str, images: Tensor, drawn: Tensor, params: SynthesisParams) -> Tensor:
        """Return what defects of one kind show; the other arguments are those of :func:`operate`."""
        if kind == "blur":
            return gaussian_blur(images, params.kernel_size)
        if kind == "structural":
            return shuffle_cells(operate(images, drawn, params, STRUCTURAL_OPERATIONS), params.cells)
        chosen = TF.to_dtype(self.textures[params.texture], torch.float32, scale=True)
        if chosen.shape != images.shape:
            chosen = F.interpolate(chosen, size=images.shape[-2:], mode="bilinear")
        return operate(chosen, drawn, params, TEXTURAL_OPERATIONS)

    def apply(self, images: Tensor, params: SynthesisParams) -> Tensor:
        """Paint the defects that were drawn.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            params: From :meth:`sample`.

        Returns:
            New images ``(B, 3, H, W)``, equal to the given ones outside ``params.mask``.

        Raises:
            TypeError: If the images are not floating point.
        """
        if not images.is_floating_point():
            msg = f"images must be floating point in [0, 1], got {images.dtype}"
            raise TypeError(msg)
        corrupted = images.clone()
        for index, kind in enumerate(KINDS):
            rows = (params.kind == index).nonzero().flatten()
            if len(rows):
                at = rows.to(images.device)
                drawn, chosen = params.operations[rows].cpu(), params[rows].to(images.device)
                source = self.source(kind, images[at].float(), drawn, chosen).to(images.dtype)
                corrupted[at] = torch.where(chosen.mask, source, images[at])
        return corrupted
