"""Thresholds of the best F1, between images' scores, not on one."""

import torch
from anomalib.metrics import F1AdaptiveThreshold
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat


class AnyThreshold(F1AdaptiveThreshold):
    """The threshold of the best F1, or of good images alone the highest score, of which anomalib's warns."""

    has_defects = False  # whether what was computed last had some

    def compute(self) -> Tensor | None:  # type: ignore[override]
        """Return the threshold ``()``, of scores in [0, inf); ``None`` if there are no scores."""
        self.has_defects = len(self.target) > 0 and bool(dim_zero_cat(self.target).any())
        return super().compute() if self.has_defects or not len(self.preds) else dim_zero_cat(self.preds).max()


class MidwayThreshold(AnyThreshold):
    """The threshold of the best F1, halfway between the scores that it parts.

    anomalib's is the lower of the scores that it is to call anomalous, and then calls anomalous what is above it: that
    image counts as good, or after export as rounding has it. All values in between have the same F1.
    """

    def compute(self) -> Tensor | None:  # type: ignore[override]
        """Return the threshold ``()``, of scores in [0, inf)."""
        threshold = super().compute()
        if threshold is None or not self.has_defects:
            return threshold
        scores = dim_zero_cat(self.preds)
        below = torch.cat([scores[scores < threshold], scores.new_zeros(1)])  # there is none if all are anomalous
        return torch.lerp(below.max(), threshold, 0.5)
