"""Pictures of the whole image, also for a model that looks at its centre alone."""

from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import ImageItem
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.models.components import AnomalibModule
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import CenterCrop, Resize

from ..preflight import datamodule_of, transform_of
from ..report import folded, is_strip


def margins(transform: nn.Module | None) -> list[int] | None:
    """Return what a transform crops off, in pixels left, right, above and below.

    ``None`` if it is not one ``Resize`` to a height and width and one ``CenterCrop`` within that.
    """
    resizes, crops = (extract_transforms_by_type(transform, kind) for kind in (Resize, CenterCrop))
    if len(resizes) != 1 or len(crops) != 1 or len(resizes[0].size) != 2:
        return None
    cropped = []
    for whole, part in zip(resizes[0].size[::-1], crops[0].size[::-1], strict=True):
        before = round((whole - part) / 2)  # as torchvision does
        cropped += [before, whole - part - before]
    return cropped if min(cropped) >= 0 else None


class WholeImageVisualizer(ImageVisualizer):
    """anomalib's visualizer, but maps of a centre crop lie where they belong, and strips are folded.

    It takes the same arguments. anomalib's draws the whole file, and stretches a map of its centre over it; a strip it
    squeezes into a square. So does this one when called by hand.
    """

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Draw a batch."""
        margin = margins(transform_of(pl_module.pre_processor))
        if margin:
            fields = {name: getattr(batch, name) for name in ("image", "anomaly_map", "gt_mask", "pred_mask")}
            whole = {name: F.pad(values, margin) for name, values in fields.items() if values is not None}
            if batch.anomaly_map is not None:  # the margin is as normal as anything in the map
                padded = [F.pad(values, margin, value=values.min().item()) for values in batch.anomaly_map]
                whole["anomaly_map"] = torch.stack(padded)
            batch = batch.update(in_place=False, **whole)
        if is_strip(batch.image):
            self.draw_strips(trainer, batch)
            return
        super().on_test_batch_end(trainer, cast(AnomalibModule, pl_module), outputs, batch, *args, **kwargs)

    def draw_strips(self, trainer: Trainer, batch: Any) -> None:
        """Draw images that are much longer than wide in parts, below one another, at twice the size of others."""
        gaps = {"image": 1.0, "gt_mask": 0, "pred_mask": 0, "anomaly_map": 0.0}
        data = datamodule_of(trainer)
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / "images"
        for item in batch:
            fields = {name: getattr(item, name) for name in gaps if getattr(item, name) is not None}
            parts: dict[str, Any] = {name: folded(values, gaps[name]) for name, values in fields.items()}
            picture = visualize_image_item(
                ImageItem(**parts),
                fields=self.fields,
                overlay_fields=self.overlay_fields,
                field_size=(2 * self.field_size[0], 2 * self.field_size[1]),
                fields_config=self.fields_config,
                overlay_fields_config=self.overlay_fields_config,
                text_config=self.text_config,
            )
            if picture is not None:
                names = (getattr(data, "name", None), getattr(data, "category", None))
                picture.save(generate_output_filename(item.image_path or "", self.output_dir, *names))
