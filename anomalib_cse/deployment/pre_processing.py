"""Resizing that survives export: the exported graph computes what ``engine.predict`` computes."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize, Transform

from ..checks import check_pixels, check_size
from ..features import resize

ROUNDING = 1e-3  # how far arithmetic may leave [0, 1]
EXPORTABLE = "export needs Resize((height, width)), bilinear and antialiased"


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
    default_crop: tuple[int, int] | None = None,
) -> nn.Module | bool:
    """Return the user's pre-processor, or for ``True`` a new one; ``default_crop`` counts if no size is given.

    Raises:
        ValueError: If sizes are given beside a pre-processor, or are none.
    """
    if given is True:
        if image_size is None and center_crop_size is None:
            center_crop_size = default_crop
        return resize_and_crop(image_size, center_crop_size)
    if image_size is not None or center_crop_size is not None:
        msg = "image_size and center_crop_size describe the model's own pre-processor: give them or a pre_processor"
        raise ValueError(msg)
    return given


def check_transform(transform: nn.Module | None) -> None:
    """Raise a ``ValueError`` unless a transform is torchvision's ``Resize``, with or without ``CenterCrop`` after it.

    Others checkpoints do not keep, exports do not compute alike, or anomalib's datamodules apply in another order.
    """
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    if transform is not None and [type(step) for step in steps] not in ([Resize], [Resize, CenterCrop]):
        msg = (
            "the pre_processor's transform must be Resize of torchvision.transforms.v2, or Compose of that and "
            f"CenterCrop (the model normalises by itself), got {', '.join(type(step).__name__ for step in steps)}"
        )
        raise ValueError(msg)


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


def warn_unless_exportable(pre_processor: nn.Module | None) -> None:
    """Warn before training of a pre-processor with which no export to ONNX or OpenVINO is possible."""
    transform = getattr(pre_processor, "transform", None)
    if transform is not None and not exports_exactly(transform):
        rank_zero_warn(f"a model with {transform} can be exported to torch alone: {EXPORTABLE}")


def check_saved_pre_processor(checkpoint: dict[str, Any], pre_processor: nn.Module | None) -> None:
    """Raise a ``ValueError`` if a model was given no pre-processor, and a checkpoint has one, or one not taken now."""
    saved = checkpoint.get("anomalib_pre_processor_config")
    if saved and pre_processor is None:
        msg = "the checkpoint has a pre-processor, and the model was given none: leave pre_processor=False out"
        raise ValueError(msg)
    kept_by_0_2 = checkpoint.get("pre_processor_transform")
    if saved and kept_by_0_2 and saved.get("transform", ...) is None:
        msg = f"the checkpoint is of {kept_by_0_2['name']}, which is not taken any more: train again"
        raise ValueError(msg)


def fixed_size(pre_processor: nn.Module | None) -> tuple[int, int] | None:
    """Return the height and width of whatever a pre-processor is given, or ``None`` if they vary."""
    transform = getattr(pre_processor, "transform", None)
    samples = [torch.zeros(1, 3, *size) for size in ((600, 800), (1000, 700))]
    sizes = {tuple((transform(sample) if transform else sample).shape[-2:]) for sample in samples}
    return sizes.pop() if len(sizes) == 1 else None
