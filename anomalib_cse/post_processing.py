"""Thresholds that no image's label hangs on."""

from typing import Any

from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat


class MidwayThreshold(F1AdaptiveThreshold):
    """The threshold of the best F1, halfway between the scores that it parts.

    anomalib's is the lower of the scores that it is to call anomalous, and then calls anomalous what is above it: that
    image counts as good, or after export as rounding has it. All values in between have the same F1.
    """

    def compute(self) -> Tensor:  # type: ignore[override]
        """The threshold ``()``; of images of one kind alone, anomalib's."""
        threshold = super().compute()
        scores = dim_zero_cat(self.preds)
        below = scores[scores < threshold]
        if not (self._has_anomalous_samples() and self._has_normal_samples() and len(below)):
            return threshold
        return (below.max() + threshold) / 2


class MidwayPostProcessor(PostProcessor):
    """anomalib's post-processor, with an image threshold halfway between two images' scores.

    Args:
        **kwargs: As for anomalib's.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._image_threshold_metric = MidwayThreshold(fields=["pred_score", "gt_label"], strict=False)
