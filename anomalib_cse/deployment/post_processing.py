"""Thresholds between images' scores, not on one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
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
    """anomalib's post-processor, with an image threshold halfway between two scores; it takes the same arguments.

    Without thresholds, as nothing has been validated, it gives no labels and no masks; anomalib's cuts raw scores at
    one half.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # anomalib has no public way to choose the threshold
        self._image_threshold_metric = MidwayThreshold(fields=["pred_score", "gt_label"], strict=False)

    @property
    def has_thresholds(self) -> bool:
        """Whether something has been validated."""
        return not bool(self.image_threshold.isnan() & self.pixel_threshold.isnan())

    def threshold_batch(self, batch: Batch) -> None:
        """Give a batch labels and masks, if there are thresholds."""
        if self.has_thresholds:
            super().threshold_batch(batch)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise scores, and give labels and masks if there are thresholds."""
        processed = super().forward(predictions)
        if torch.compiler.is_compiling() or self.has_thresholds:  # to export, see labels_as_there_are
            return processed
        return processed._replace(pred_label=None, pred_mask=None)

    @contextmanager
    def labels_as_there_are(self) -> Iterator[None]:
        """Export no labels where there are no thresholds: a graph cannot ask."""
        asked_for = self.enable_thresholding
        self.enable_thresholding = asked_for and self.has_thresholds
        try:
            yield
        finally:
            self.enable_thresholding = asked_for

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Note scores for the thresholds, unless the model says that they are those of the last validation."""
        if getattr(pl_module, "scores_changed", True):
            super().on_validation_batch_end(trainer, pl_module, *args, **kwargs)


def check_settings(own: nn.Module | None, default: PostProcessor | None, checkpoint: dict[str, Any]) -> None:
    """Raise a ``ValueError`` if a post-processor was given settings that those of a checkpoint would overrule."""
    saved = checkpoint.get("anomalib_post_processor_config")
    if not isinstance(own, PostProcessor) or not saved:
        return
    usual = default.checkpoint_config() if default else {}
    for name, value in own.checkpoint_config().items():
        if value != usual.get(name, value) and value != saved.get(name, value):
            msg = (
                f"the post_processor was given {name}={value}, but {saved[name]} of the checkpoint would count: load "
                f"the model without a post_processor, set model.post_processor.{name}, and give no ckpt_path after that"
            )
            raise ValueError(msg)
