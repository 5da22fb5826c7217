"""Thresholds of the best F1, between images' scores, not on one."""

import torch
from anomalib.metrics import F1AdaptiveThreshold
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat


class AnyThreshold(F1AdaptiveThreshold):
    """The threshold of the best F1, or of good images alone the highest score, of which anomalib's warns.

    Attributes:
        good: How many of what was computed last were good.
        defective: How many were not.
        is_constant: Whether all had the same score.
    """

    good = defective = 0
    is_constant = False

    def compute(self) -> Tensor | None:  # type: ignore[override]
        """Return the threshold ``()``, of scores in [0, inf); ``None`` if there are no scores."""
        count = len(dim_zero_cat(self.target)) if len(self.target) else 0
        self.defective = int(dim_zero_cat(self.target).sum()) if count else 0
        self.good = count - self.defective
        if not len(self.preds):
            return super().compute()
        scores = dim_zero_cat(self.preds)
        self.is_constant = bool(scores.min() == scores.max())
        return super().compute() if self.defective else scores.max()


class MidwayThreshold(AnyThreshold):
    """The threshold of the best F1, halfway between the scores that it parts.

    anomalib's is the lower of the scores that it is to call anomalous, and then calls anomalous what is above it: that
    image counts as good, or after export as rounding has it. All values in between have the same F1.
    """

    def forget(self) -> None:
        """Have seen no images."""
        self.good = self.defective = 0
        self.is_constant = False

    @property
    def lack(self) -> str:
        """What images lack to tell a threshold by the best F1; nothing if they tell one."""
        if not self.defective:
            return "no validation image has a defect"
        if not self.good:
            return "no validation image is good"
        return "all validation images have the same score" if self.is_constant else ""

    def compute(self) -> Tensor | None:  # type: ignore[override]
        """Return the threshold ``()``, of scores in [0, inf)."""
        threshold = super().compute()
        if threshold is None or not self.defective or self.is_constant:
            return threshold
        scores = dim_zero_cat(self.preds)
        below = torch.cat([scores[scores < threshold], scores.new_zeros(1)])  # there is none if all are anomalous
        return torch.lerp(below.max(), threshold, 0.5)
