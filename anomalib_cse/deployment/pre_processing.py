"""Resizing that survives export: the exported graph computes what ``engine.predict`` computes."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize, Transform

from ..checks import check_pixels, check_size
from ..features import resize

ROUNDING = 1e-3  # how far arithmetic may leave [0, 1]
EXPORTABLE = "export needs Resize((height, width)), bilinear and antialiased"
CONFIG, TRANSFORM = "anomalib_pre_processor_config", "pre_processor_transform"  # in checkpoints: anomalib's and our own


class ExactResize(nn.Module):
    """Antialiased bilinear resizing to a height and width that exports; equal to torchvision's ``Resize``.

    anomalib's own turns antialiasing off on export, which changes the score of every image that is really reduced
    (its issues 2448, 2672, 2686, 2747, 3726).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Resize ``(B, C, H, W)`` to ``(B, C, *size)``."""
        return resize(images, self.size)


def exports_exactly(transform: Transform) -> bool:
    """Whether every ``Resize`` in a transform is one that :class:`ExactResize` equals."""
    if isinstance(transform, Compose):
        return all(map(exports_exactly, transform.transforms))
    if not isinstance(transform, Resize):
        return True
    bilinear = InterpolationMode(transform.interpolation) == InterpolationMode.BILINEAR  # newer torchvisions: a str
    return len(transform.size) == 2 and bilinear and bool(transform.antialias)


def exact(transform: nn.Module) -> nn.Module:
    """Return a transform with ``Resize`` and ``CenterCrop`` in forms that export, if they can, and compute the same."""
    if isinstance(transform, Compose):
        return nn.Sequential(*map(exact, transform.transforms))
    if isinstance(transform, CenterCrop):
        return ExportableCenterCrop(size=transform.size)
    if isinstance(transform, Resize) and exports_exactly(transform):
        return ExactResize(tuple(transform.size))
    return transform


def check_exportable(transform: Transform) -> None:
    """Raise a ``ValueError`` if a ``Resize`` of a transform cannot be exported exactly."""
    if not exports_exactly(transform):
        msg = f"{EXPORTABLE}, got {transform}"
        raise ValueError(msg)


def resize_and_crop(image_size: Sequence[int] | None, center_crop_size: Sequence[int] | None = None) -> PreProcessor:
    """Return a pre-processor that resizes to a height and width, 256x256 by default, and crops, if at all.

    Raises:
        ValueError: If a size is none, or the crop is larger than the image.
    """
    image_size = (256, 256) if image_size is None else image_size
    check_size("image_size", image_size)
    resizing = Resize(tuple(image_size), antialias=True)
    if center_crop_size is None:
        return PreProcessor(resizing)
    check_size("center_crop_size", center_crop_size)
    if center_crop_size[0] > image_size[0] or center_crop_size[1] > image_size[1]:
        msg = f"center_crop_size must be within image_size {tuple(image_size)}, got {tuple(center_crop_size)}"
        raise ValueError(msg)
    return PreProcessor(Compose([resizing, CenterCrop(tuple(center_crop_size))]))


def choose_pre_processor(
    given: nn.Module | bool,
    image_size: Sequence[int] | None,
    center_crop_size: Sequence[int] | None,
    papers_crop: tuple[int, int] | None = None,
) -> nn.Module | bool:
    """Return the pre-processor that a user gave, or for ``True`` one of the sizes given, by default ``papers_crop``.

    Raises:
        ValueError: If sizes are given beside a pre-processor, or are none.
    """
    if given is True:
        if image_size is None and center_crop_size is None:
            center_crop_size = papers_crop
        return resize_and_crop(image_size, center_crop_size)
    if image_size is not None or center_crop_size is not None:
        msg = "image_size and center_crop_size describe the model's own pre-processor: give them or a pre_processor"
        raise ValueError(msg)
    return given


def check_keeps_range(transform: nn.Module, role: str, slack: float = ROUNDING) -> None:
    """Raise a ``ValueError`` unless a transform, of a ``role``, makes images in [0, 1] of a black and a white one.

    A transform that takes no such image, being for larger ones or for masks too, is left to the check of batches.
    """
    for grey in (0.0, 1.0):
        try:
            with torch.random.fork_rng(devices=[]):  # augmentations draw
                image = transform(torch.full((1, 3, 1024, 1024), grey))
        except Exception:  # noqa: BLE001  a user's own may raise anything
            return
        try:
            check_pixels(image, slack=slack)  # of one grey, resizing leaves it as it is
        except ValueError as error:
            msg = f"{role} {transform} does not leave images as they are taken: {error}"
            raise ValueError(msg) from error


def applied(transform: nn.Module, image: Tensor) -> Tensor:
    """Return what a transform makes of an image, with the same of torch's random numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return transform(image)


def sample_image() -> Tensor:
    """Return an image ``(1, 3, 600, 800)`` by which transforms can be compared."""
    return torch.rand(1, 3, 600, 800, generator=torch.Generator().manual_seed(0))


def check_resizes_first(pre_processor: nn.Module | None) -> None:
    """Raise a ``ValueError`` if something comes before the first ``Resize`` of a pre-processor, such as a crop.

    anomalib's datamodules resize by it before they do anything else; exported models and folders to predict do not.
    """
    transform = getattr(pre_processor, "transform", None)
    resizes = extract_transforms_by_type(transform, Resize)
    if transform is None or not resizes:
        return
    image = sample_image()
    expected = applied(transform, image)
    if not torch.equal(expected, applied(transform, image)):  # it draws by other random numbers than torch's
        return
    try:
        same = torch.allclose(applied(transform, resizes[0](image)), expected, atol=ROUNDING)
    except Exception:  # noqa: BLE001  a user's own may raise anything of so small an image
        same = False
    if not same:
        msg = (
            f"Resize must come first in the pre_processor's transform, got {transform}: anomalib resizes the images of "
            "a datamodule before it crops or pads them, but not those of a folder to predict"
        )
        raise ValueError(msg)


def warn_unless_exportable(pre_processor: nn.Module | None) -> None:
    """Warn before training of a pre-processor with which no export to ONNX or OpenVINO is possible."""
    transform = getattr(pre_processor, "transform", None)
    if transform is not None and not exports_exactly(transform):
        rank_zero_warn(f"a model with {transform} can be exported to torch alone: {EXPORTABLE}")


def keep_transform(checkpoint: dict[str, Any], pre_processor: nn.Module | None) -> None:
    """Note in a checkpoint what the transform computes: anomalib keeps the arguments of some kinds alone."""
    transform = getattr(pre_processor, "transform", None)
    if transform is not None:
        checkpoint[TRANSFORM] = {"name": str(transform), "gives": fingerprint(transform)}


def fingerprint(transform: nn.Module) -> list[float]:
    """Return some pixels of what a transform makes of an image."""
    pixels = applied(transform, sample_image()).flatten()
    return pixels[:: max(1, len(pixels) // 100)].tolist()


def check_transform(checkpoint: dict[str, Any], pre_processor: nn.Module | None) -> None:
    """Leave the model the transform that it was given if anomalib has not kept that of a checkpoint.

    Raises:
        ValueError: If it computes something else.
    """
    kept, saved = checkpoint.get(CONFIG), checkpoint.get(TRANSFORM)
    if kept and pre_processor is None:
        msg = "the checkpoint has a pre-processor, and the model was given none: leave pre_processor=False out"
        raise ValueError(msg)
    if not kept or not saved or kept.get("transform", ...) is not None:
        return
    transform = getattr(pre_processor, "transform", None)
    own, expected = (torch.tensor(pixels) for pixels in (fingerprint(transform) if transform else [], saved["gives"]))
    if own.shape != expected.shape or not torch.allclose(own, expected, atol=ROUNDING):
        msg = (
            "anomalib does not keep this transform in checkpoints: give the pre_processor of the run, with "
            f"{saved['name']}"
        )
        raise ValueError(msg)
    del checkpoint[CONFIG]


def fixed_size(pre_processor: nn.Module | None) -> tuple[int, int] | None:
    """Return the height and width of whatever a pre-processor is given, or ``None`` if they vary."""
    transform = getattr(pre_processor, "transform", None)
    samples = [torch.zeros(1, 3, *size) for size in ((600, 800), (1000, 700))]
    sizes = {tuple((transform(sample) if transform else sample).shape[-2:]) for sample in samples}
    return sizes.pop() if len(sizes) == 1 else None
