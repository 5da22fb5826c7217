"""Resizing that survives export: the exported graph computes what ``engine.predict`` computes."""

from collections.abc import Sequence

import torch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from ..checks import check_size
from ..features import resize
from ..preflight import exports_exactly, transform_of


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


def exact(transform: nn.Module) -> nn.Module:
    """Return a transform with ``Resize`` and ``CenterCrop`` in forms that export, if they can, and compute the same."""
    if isinstance(transform, Compose):
        return nn.Sequential(*map(exact, transform.transforms))
    if isinstance(transform, CenterCrop):
        return ExportableCenterCrop(size=transform.size)
    if isinstance(transform, Resize) and exports_exactly(transform):
        return ExactResize(tuple(transform.size))
    return transform


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


def fixed_size(pre_processor: nn.Module | None) -> tuple[int, int] | None:
    """Return the height and width of whatever a pre-processor is given, or ``None`` if they vary."""
    transform = transform_of(pre_processor)
    samples = [torch.zeros(1, 3, *size) for size in ((600, 800), (1000, 700))]
    sizes = {tuple((transform(sample) if transform else sample).shape[-2:]) for sample in samples}
    return sizes.pop() if len(sizes) == 1 else None
