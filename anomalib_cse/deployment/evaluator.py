"""Metrics, where there is something to measure them by."""

from typing import Any, cast

from anomalib.metrics import AnomalibMetric, Evaluator
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torchmetrics import Metric

TRUTH = {"gt_label", "gt_mask"}


class TwoClassEvaluator(Evaluator):
    """anomalib's evaluator, but metrics of labels and masks are left out unless there are good and defective images.

    anomalib's gives them as 0.0. It takes the same arguments.
    """

    seen: frozenset[bool] = frozenset()  # whether images are anomalous

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to note the kinds of images."""
        del trainer, pl_module
        self.seen = frozenset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Update metrics, and note which kinds of images there are."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)
        self.note(batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Update metrics, and note which kinds of images there are."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)
        self.note(batch)

    def note(self, batch: Any) -> None:
        """Note which kinds of images a batch has."""
        if batch.gt_label is not None:
            self.seen |= {bool(label) for label in batch.gt_label}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log metrics."""
        if self.has_both(trainer):
            super().on_validation_epoch_end(trainer, pl_module)
        else:
            self.log_others(self.val_metrics)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log metrics."""
        if self.has_both(trainer):
            super().on_test_epoch_end(trainer, pl_module)
        else:
            self.log_others(self.test_metrics)

    def has_both(self, trainer: Trainer) -> bool:
        """Whether there were good and defective images, in any process; images of unknown kind are left to metrics."""
        there = [trainer.strategy.reduce_boolean_decision(kind in self.seen, all=False) for kind in (True, False)]
        return all(there) or not any(there)

    def log_others(self, metrics: nn.ModuleList) -> None:
        """Log the metrics that need no labels and no masks, and say which ones are left out."""
        left_out = []
        for metric in metrics:
            name = str(metric.name)
            if TRUTH.isdisjoint(cast(AnomalibMetric, metric).fields):
                self.log(name, metric)  # type: ignore[operator]  # Lightning's, for callbacks
            else:
                cast(Metric, metric).reset()
                left_out.append(name)
        if left_out:
            kind = "defective" if False in self.seen else "good"
            rank_zero_warn(f"there are no {kind} images, so these metrics are left out: {', '.join(left_out)}")
