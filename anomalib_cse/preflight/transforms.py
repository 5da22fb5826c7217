"""What is asked of transforms: that they leave images in [0, 1], and can be exported."""

from collections.abc import Iterator, Sequence

import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from torch import nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

from ..checks import check_pixels
from .findings import Finding, error, warning

EXPORTABLE = "export needs Resize((height, width)), bilinear and antialiased"


def transform_of(pre_processor: object) -> nn.Module | None:
    """Return the transform of a pre-processor; ``None`` if there is none."""
    return getattr(pre_processor, "transform", None)


def resized_to(pre_processor: object) -> Sequence[int]:
    """Return the height and width that a pre-processor resizes images to, whatever they are; else nothing."""
    resizes = extract_transforms_by_type(transform_of(pre_processor), Resize)
    return resizes[0].size if resizes and len(resizes[0].size) == 2 else ()


def exports_exactly(transform: nn.Module) -> bool:
    """Whether every ``Resize`` in a transform is one that can be exported to compute the same."""
    if isinstance(transform, Compose):
        return all(map(exports_exactly, transform.transforms))
    if not isinstance(transform, Resize):
        return True
    bilinear = InterpolationMode(transform.interpolation) == InterpolationMode.BILINEAR  # newer torchvisions: a str
    return len(transform.size) == 2 and bilinear and bool(transform.antialias)


def check_exportable(transform: Transform) -> None:
    """Raise a ``ValueError`` if a ``Resize`` of a transform cannot be exported exactly."""
    if not exports_exactly(transform):
        msg = f"{EXPORTABLE}, got {transform}"
        raise ValueError(msg)


def export_findings(pre_processor: nn.Module | None) -> Iterator[Finding]:
    """Say if no export to ONNX or OpenVINO is possible with a pre-processor."""
    transform = transform_of(pre_processor)
    if transform is not None and not exports_exactly(transform):
        yield warning(f"a model with {transform} can be exported to torch alone: {EXPORTABLE}")


def augmentation_findings(part: str, dataset: object) -> Iterator[Finding]:
    """Say if augmentations make something else than images in [0, 1] of a black and a white one, as ``Normalize`` does.

    What takes no such image, being for larger ones or for masks too, is left to the check of batches.
    """
    augmentations = getattr(dataset, "augmentations", None)
    if augmentations is None:
        return
    for grey in (0.0, 1.0):
        try:
            with torch.random.fork_rng(devices=[]):  # augmentations draw
                image = augmentations(torch.full((1, 3, 1024, 1024), grey))
        except Exception:  # noqa: BLE001  a user's own may raise anything
            return
        try:
            check_pixels(image)
        except ValueError as reason:
            yield error(f"the {part} augmentations {augmentations} do not leave images as they are taken: {reason}")
            return
