"""Thresholds: between the scores of validation images, or beyond those of good ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics.utilities.data import dim_zero_cat

from ..checks import check_number, plain
from .good_scores import CONFIDENCE, FEWEST, GoodScores, UnseenScores

USUAL_RATE = 0.01  # of good images rejected, where no validation image has a defect


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


class MidwayPostProcessor(PostProcessor):
    """anomalib's post-processor, with an image threshold halfway between two scores, or one for a rate of rejects.

    Without thresholds, as nothing has been validated, it gives no labels and no masks; anomalib's cuts raw scores at
    one half. ``good_images`` and ``good_pixels``, 0 until they are needed, are how the scores of good images that a
    fit has not seen spread, and the highest values of their maps: a :class:`GoodScores` each.

    Args:
        reject_rate: Share of good images to be called anomalous, in (0, 0.5]; ``None`` takes the thresholds of the best
            F1, or ``USUAL_RATE`` if no validation image has a defect.
        **options: As for anomalib's post-processor.

    Raises:
        ValueError: If the rate is outside its range.
    """

    good_images: Tensor
    good_pixels: Tensor
    suspicious: Sequence[tuple[str, float]] = ()  # training images that others do not explain, of the last fit

    def __init__(self, reject_rate: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("good_images", torch.zeros(3))
        self.register_buffer("good_pixels", torch.zeros(3))
        self.register_load_state_dict_pre_hook(know_nothing)
        self.reject_rate = reject_rate
        # anomalib has no public way to choose the threshold
        self._image_threshold_metric = MidwayThreshold(fields=["pred_score", "gt_label"], strict=False)
        self._pixel_threshold_metric = AnyThreshold(fields=["anomaly_map", "gt_mask"], strict=False)

    def checkpoint_config(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the buffers."""
        return {**super().checkpoint_config(), "reject_rate": self.reject_rate}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take over what a checkpoint has kept."""
        super().load_checkpoint_config(config)
        self.reject_rate = config.get("reject_rate")

    @property
    def reject_rate(self) -> float | None:
        """Share of good images to be called anomalous; to set another one sets the thresholds, if they can be told."""
        return self._reject_rate

    @reject_rate.setter
    def reject_rate(self, rate: float | None) -> None:
        if rate is not None:
            check_number("reject_rate", rate, "(0, 0.5]")
        self._reject_rate = plain(rate)
        if rate is not None and self.knows_good_scores:
            self.reject(rate)

    @property
    def knows_good_scores(self) -> bool:
        """Whether a fit has told how scores of good images spread."""
        return bool(self.good_images[0] > 0)

    def check_enough(self, count: int) -> None:
        """Raise a ``ValueError`` if a rate of rejects was asked for and too few good images can tell thresholds."""
        if self.reject_rate is not None and count < FEWEST:
            msg = (
                f"reject_rate takes {FEWEST} training images that a fit has not seen, got {count}: give more of them "
                "(to Cse, or a larger holdout_ratio), or leave reject_rate out and validate with defects"
            )
            raise ValueError(msg)

    def learn(self, scores: UnseenScores | None) -> None:
        """Set the thresholds by scores of good images that a fit has not seen.

        Raises:
            ValueError: If a rate was asked for, and there are too few images to tell.
        """
        if scores is None or len(scores.paths) < FEWEST:
            self.check_enough(len(scores.paths) if scores else 0)
            rank_zero_warn(
                "no validation image has a defect, and training images are too few for thresholds from good ones: the "
                f"thresholds are the highest values of the validation images (give {FEWEST} that a fit has not seen)"
            )
            return
        self.good_images.copy_(torch.tensor(GoodScores.of(scores.images)))
        self.good_pixels.copy_(torch.tensor(GoodScores.of(scores.pixels)))
        self.suspicious = scores.suspicious()
        self.reject(self.reject_rate or USUAL_RATE)

    def reject(self, rate: float) -> None:
        """Set the thresholds such that a ``rate`` of good images is expected to be called anomalous.

        A map is anomalous anywhere in as many images. Scores are scaled from 0, and to 1 at twice the threshold.

        Raises:
            ValueError: If it is not known how scores of good images spread.
        """
        if not self.knows_good_scores:
            msg = "no fit has told how scores of good images spread: fit the model with a reject_rate"
            raise ValueError(msg)
        for kind, good in (("image", self.good_images), ("pixel", self.good_pixels)):
            threshold = spread(good).threshold(rate)
            # anomalib has public names for reading them alone
            self.get_buffer(f"_{kind}_threshold").fill_(threshold)
            self.get_buffer(f"{kind}_min").fill_(0)
            self.get_buffer(f"{kind}_max").fill_(2 * threshold)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute thresholds and the range of scores.

        Raises:
            ValueError: If a rate of rejects was asked for, and it is not known how scores of good images spread.
        """
        is_new = self._image_threshold_metric.update_called
        super().on_validation_epoch_end(trainer, pl_module)
        if not is_new or (self.reject_rate is None and self._image_threshold_metric.has_defects):
            return
        unseen_scores = getattr(pl_module, "unseen_scores", None)  # of the models here
        if trainer.state.fn == TrainerFn.FITTING and callable(unseen_scores):
            self.learn(unseen_scores())
        elif self.reject_rate is not None or self.knows_good_scores:
            self.reject(self.reject_rate or USUAL_RATE)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the scores of another fit."""
        del trainer, pl_module
        self.good_images.zero_()
        self.good_pixels.zero_()
        self.suspicious = ()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the thresholds are, if they are of good images, and which of those stand out."""
        del trainer, pl_module
        if self.knows_good_scores:
            rank_zero_info(self.words)
        if self.suspicious:
            listed = ", ".join(f"{path} ({score:.3g})" for path, score in self.suspicious[:5])
            rank_zero_warn(
                f"the scores of {len(self.suspicious)} training images are not like those of the others: {listed}. If "
                "they have defects take them out, as they raise the threshold"
            )

    def good_scores_as_scaled(self) -> dict[str, float]:
        """Return mean and deviation of the logarithms of good images' raw scores, and what makes these of scaled ones.

        A raw score is ``(scaled - 0.5) * range + threshold``.
        """
        good, scaled = spread(self.good_images), self.enable_normalization
        threshold = float(self.image_threshold) if scaled else 0.5
        extent = float(self.image_max - self.image_min) if scaled else 1.0
        return {"mean": good.mean, "deviation": good.deviation, "threshold": threshold, "range": extent}

    @property
    def words(self) -> str:
        """What the thresholds are and how many good images they will reject; nothing if that is not known."""
        if not self.knows_good_scores:
            return ""
        good = spread(self.good_images)
        rate = good.rate(float(self.image_threshold))
        low, high = good.interval(rate)
        return (
            f"Thresholds are {self.image_threshold:.4g} for images, {self.pixel_threshold:.4g} for pixels. By "
            f"{good.number} good images, each scored by a fit without it, {100 * rate:.2g} % of such images will be "
            f"rejected, between {100 * low:.2g} and {100 * high:.2g} % with {CONFIDENCE:.0%} confidence."
        )

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


def know_nothing(own: nn.Module, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
    """Load a checkpoint from before good scores were kept."""
    del args
    for name in ("good_images", "good_pixels"):
        state_dict.setdefault(f"{prefix}{name}", torch.zeros_like(own.get_buffer(name)))


def spread(values: Tensor) -> GoodScores:
    """Return what a buffer of three numbers says."""
    number, mean, deviation = values.tolist()
    return GoodScores(int(number), mean, deviation)


def choose_post_processor(given: nn.Module | bool, reject_rate: float | None) -> nn.Module | bool:
    """Return what a user gave for a post-processor, or one of the rate of rejects that was given.

    Raises:
        ValueError: If both are given, or the rate is outside its range.
    """
    if reject_rate is None:
        return given
    if given is not True:
        msg = "reject_rate describes the model's own post-processor: give it or a post_processor"
        raise ValueError(msg)
    return MidwayPostProcessor(reject_rate)


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
