"""The region of interest: where to look in images, by one mask for all of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from ..image_files import oddities, oddities_of, opened

INSIDE = 1 - 1e-3  # of what a pixel is resized from, to count as inside
DEEP = ("1", "L", "I", "F", "I;16")  # Pillow's modes of one channel, which need no conversion


def check_roi(path: object) -> None:
    """Raise a ``ValueError`` if ``path`` is no file, a ``FileNotFoundError`` if nothing is there."""
    if not (isinstance(path, str | Path) and str(path)):
        msg = f"roi must be a mask image, got {path!r}"
        raise ValueError(msg)
    if not Path(path).exists():
        msg = f"roi: {path} does not exist: give a mask image, bright where to look"
        raise FileNotFoundError(msg)
    if Path(path).is_dir():
        msg = f"roi: {path} is a folder: give one mask image, bright where to look in all images"
        raise ValueError(msg)


def read_mask(path: Path) -> Tensor:
    """Read a mask ``(H, W)``, true where it is brighter than half of its maximum.

    Raises:
        ValueError: If the file holds no image, a black one, one with transparency, or one of several pages or turned.
    """
    with opened(path) as image:
        if image.has_transparency_data:
            msg = f"roi: {path} has transparency: give an image that is bright where to look, and black elsewhere"
            raise ValueError(msg)
        found = [oddity for oddity in oddities_of(image) if oddity.kind in ("frames", "orientation")]
        for said in oddities({path: found}):
            msg = f"roi: {said}"
            raise ValueError(msg)
        values = pil_to_tensor(image if image.mode in DEEP else image.convert("L"))[0].float()
    mask = values > values.max() / 2
    if not mask.any():
        msg = f"roi: {path} is black, so there is nowhere to look: make it bright where to look"
        raise ValueError(msg)
    return mask


def region_of(path: str | Path, transform: nn.Module | None) -> tuple[Tensor, tuple[str, int, int]]:
    """Read a mask as a pre-processor leaves images, ``(H, W)``; a pixel is inside if all that it is made of is.

    Returns:
        The mask, and the file, its width and its height.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If that is no image, or nothing of it is inside.
    """
    check_roi(path)
    mask = read_mask(Path(path))
    file = str(path), mask.shape[1], mask.shape[0]
    if transform is None:
        return mask, file
    inside = transform(mask.float().expand(1, 3, -1, -1))[0, 0] >= INSIDE
    if not inside.any():
        msg = f"roi: nothing is left of {path} at {tuple(inside.shape)} pixels: make its bright part larger"
        raise ValueError(msg)
    return inside, file


def check_same_region(checkpoint: Mapping[str, Any], roi: Tensor) -> None:
    """Raise a ``ValueError`` if a checkpoint has another region of interest than a model was given."""
    saved: Tensor = checkpoint["state_dict"].setdefault("model.roi", torch.zeros(0, 0, dtype=torch.bool))
    if roi.numel() and not torch.equal(roi.cpu(), saved.cpu()):
        wants = "one region" if saved.numel() else "no region"
        msg = f"the checkpoint is of {wants} of interest, and the model was given another roi: give it as in training"
        raise ValueError(msg)
