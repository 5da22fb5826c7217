"""Regions of interest: where to look in images, by one mask for all of them or by a folder with a mask for each."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils import TestSplitMode, ValSplitMode
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from ..checks import opened
from ..deployment import DeploymentMixin, image_files
from .torch_model import CseGaussianModel, nearest

INSIDE = 1 - 1e-3  # of what a pixel is resized from, to count as inside
DEEP = ("1", "L", "I", "F", "I;16")  # Pillow's modes of one channel, which need no conversion


def check_roi(path: object) -> None:
    """Raise a ``ValueError`` if ``path`` is none, a ``FileNotFoundError`` if nothing is there."""
    if not (isinstance(path, str | Path) and str(path)):
        msg = f"roi must be a mask image or a folder of them, got {path!r}"
        raise ValueError(msg)
    if not Path(path).exists():
        msg = f"roi: {path} does not exist: give a mask image, bright where to look, or a folder of them"
        raise FileNotFoundError(msg)


def read_mask(path: Path) -> Tensor:
    """Read a mask ``(H, W)``, true where it is brighter than half of its maximum.

    Raises:
        ValueError: If the file holds no image, a black one, or one with an alpha channel.
    """
    with opened(path) as image:
        if image.mode.endswith(("A", "a")):
            msg = f"roi: {path} has an alpha channel: give an image that is bright where to look, and black elsewhere"
            raise ValueError(msg)
        values = pil_to_tensor(image if image.mode in DEEP else image.convert("L"))[0].float()
    mask = values > values.max() / 2
    if not mask.any():
        msg = f"roi: {path} is black, so there is nowhere to look: make it bright where to look"
        raise ValueError(msg)
    return mask


def region_of(path: Path, transform: nn.Module | None) -> Tensor:
    """Read a mask as a pre-processor leaves images, ``(H, W)``; a pixel is inside if all that it is made of is.

    Raises:
        ValueError: If the file holds no image, or nothing of it is inside.
    """
    mask = read_mask(path)
    if transform is None:
        return mask
    inside = transform(mask.float().expand(1, 3, -1, -1))[0, 0] >= INSIDE
    if not inside.any():
        msg = f"roi: nothing is left of {path} at {tuple(inside.shape)} pixels: make its bright part larger"
        raise ValueError(msg)
    return inside


def check_same_region(checkpoint: Mapping[str, Any], roi: Tensor, folder: "RegionFolder | None") -> None:
    """Raise a ``ValueError`` if a checkpoint has another region of interest than a model was given."""
    saved: Tensor = checkpoint["state_dict"].setdefault("model.roi", torch.zeros(0, 0, dtype=torch.bool))
    saved_folder = checkpoint["hyper_parameters"].get("roi")
    wants = "one region" if saved.numel() else f"regions in {saved_folder}" if saved_folder else "no region"
    agrees = (
        bool(saved_folder) if folder else not saved_folder and (not roi.numel() or torch.equal(roi.cpu(), saved.cpu()))
    )
    if not agrees:
        msg = f"the checkpoint is of {wants} of interest, and the model was given another roi: give it as in training"
        raise ValueError(msg)


class RegionFolder:
    """A folder with a mask for each image: of ``a/b/c.jpg`` it is ``a/b/c.png``, or else ``b/c.png``, or ``c.png``.

    Args:
        root: The folder.

    Raises:
        ValueError: If it holds no images, or two of one name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.masks: dict[Path, Path] = {}
        for file in sorted(root.rglob("*")):
            if file.suffix.lower() not in Image.registered_extensions():
                continue
            other = self.masks.setdefault(file.with_suffix(""), file)
            if other != file:
                msg = f"roi: {other} and {file} are masks of one name: take one out"
                raise ValueError(msg)
        if not self.masks:
            msg = f"roi: there are no images in {root}: give a mask for each image, by its name"
            raise ValueError(msg)

    def mask_of(self, image: str) -> Path:
        """Return the file of an image's mask; raise a ``ValueError`` if there is none."""
        parts = Path(image).with_suffix("").parts[-3:]
        folder, name = Path(image).parent.name, Path(image).stem
        for start in range(len(parts)):
            candidate = self.root.joinpath(*parts[start:])
            if candidate in self.masks:
                return self.masks[candidate]
        msg = f"roi: {self.root} has no mask of {image}: there must be {folder}/{name}.png or {name}.png in it"
        raise ValueError(msg)

    def check(self, images: Iterable[str]) -> None:
        """Raise a ``ValueError`` if one of the images has no mask."""
        for image in images:
            self.mask_of(image)

    def inside(self, images: Tensor, paths: Sequence[str] | None, transform: nn.Module | None) -> Tensor:
        """Return where to look in pre-processed images ``(B, 3, H, W)``: ``(B, 1, H, W)``.

        Raises:
            ValueError: If an image has no path or no mask, or its mask is no image or of nothing.
        """
        if not paths:
            msg = f"roi: masks of {self.root} are found by the paths of images, which these have not: give one mask"
            raise ValueError(msg)
        masks = [region_of(self.mask_of(path), transform) for path in paths]
        return torch.stack([nearest(mask, images.shape[-2:])[None] for mask in masks]).to(images.device)


class RegionMixin(DeploymentMixin):
    """A region of interest, of a model whose ``model`` has it in a buffer ``roi``, or one for every image."""

    model: CseGaussianModel
    regions: RegionFolder | None = None

    def look_inside(self, roi: str | Path) -> None:
        """Look at nothing but a region of interest; raise an error if its file or folder is none."""
        check_roi(roi)
        if Path(roi).is_dir():
            self.regions = RegionFolder(Path(roi))
        else:
            region = region_of(Path(roi), getattr(self.pre_processor, "transform", None))
            self.model.roi.resize_(region.shape).copy_(region)

    def setup(self, stage: str) -> None:
        """Check that all images of a datamodule have a mask, if each is to have its own."""
        super().setup(stage)
        if self.regions:
            data = getattr(self.trainer, "datamodule", None)
            modes = [getattr(data, f"{part}_split_mode", None) for part in ("val", "test")]
            if {ValSplitMode.SYNTHETIC, TestSplitMode.SYNTHETIC}.intersection(modes):
                msg = "a folder of regions (roi) has no masks of synthetic images: set val_split_mode to another way"
                raise ValueError(msg)
            self.regions.check(image_files(self.trainer))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name a folder of regions; one region for all images is among the buffers."""
        super().on_save_checkpoint(checkpoint)
        if not self.regions:
            checkpoint["hyper_parameters"]["roi"] = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint; raise a ``ValueError`` if it has another region of interest than was given."""
        super().on_load_checkpoint(checkpoint)
        check_same_region(checkpoint, self.model.roi, self.regions)

    def inside(self, images: Tensor, paths: Sequence[str] | None) -> Tensor | None:
        """Return where to look in images ``(B, 3, H, W)``, ``(B, 1, H, W)``; ``None`` for all of them."""
        if self.regions:
            return self.regions.inside(images, paths, getattr(self.pre_processor, "transform", None))
        inside = self.model.inside(images.shape[-2:])
        return None if inside is None else inside.expand(len(images), -1, -1, -1)

    def forward(self, batch: Tensor) -> InferenceBatch:
        """Score images ``(B, 3, H, W)`` of any size as an exported model does.

        Raises:
            ValueError: If every image has a region of interest of its own: a tensor has no name to find it by.
        """
        self.check_one_region()
        return super().forward(batch)

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does; raise a ``ValueError`` if every image has a region of interest of its own."""
        self.check_one_region()
        return super().to_torch(*args, **kwargs)

    def check_one_region(self) -> None:
        """Raise a ``ValueError`` if every image has a region of interest of its own."""
        if self.regions:
            msg = (
                f"every image has a region of interest of its own, in {self.regions.root}, found by its name, which an "
                "exported model is not told: give one mask image for roi, or score with engine.predict"
            )
            raise ValueError(msg)
