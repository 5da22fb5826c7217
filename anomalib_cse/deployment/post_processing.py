"""Thresholds between images' scores, not on one."""

from typing import Any

import torch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat


class MidwayThreshold(F1AdaptiveThreshold):
    """The threshold of the best F1, halfway between the scores that it parts.

    anomalib's is the lower of the scores that it is to call anomalous, and then calls anomalous what is above it: that
    image counts as good, or after export as rounding has it. All values in between have the same F1.
    """

    def compute(self) -> Tensor | None:  # type: ignore[override]
        """Return the threshold ``()``, of scores in [0, inf); of good images alone anomalib's, the highest score."""
        threshold = super().compute()
        if threshold is None or not dim_zero_cat(self.target).any():
            return threshold
        scores = dim_zero_cat(self.preds)
        below = torch.cat([scores[scores < threshold], scores.new_zeros(1)])  # there is none if all are anomalous
        return torch.lerp(below.max(), threshold, 0.5)


class MidwayPostProcessor(PostProcessor):
    """anomalib's post-processor, with an image threshold halfway between two scores; it takes the same arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # anomalib has no public way to choose the threshold
        self._image_threshold_metric = MidwayThreshold(fields=["pred_score", "gt_label"], strict=False)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Note scores for the thresholds, unless the model says that they are those of the last validation."""
        if getattr(pl_module, "scores_changed", True):
            super().on_validation_batch_end(trainer, pl_module, *args, **kwargs)
