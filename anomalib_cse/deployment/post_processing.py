"""Thresholds: between the scores of validation images, or beyond those of good ones."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from ..checks import check_number, plain
from .good_scores import CONFIDENCE, FEWEST, GoodScores, UnseenScores
from .thresholds import AnyThreshold, MidwayThreshold

CENTRED = {
    "enable_thresholding": True,
    "enable_normalization": True,
    "image_sensitivity": 0.5,
    "pixel_sensitivity": 0.5,
}
HALF = 0.5  # what scores are scaled to at the threshold
USUAL_RATE = 0.01  # of good images rejected, where validation images tell no threshold


class MidwayPostProcessor(PostProcessor):
    """anomalib's post-processor, with an image threshold halfway between two scores, or one for a rate of rejects.

    Without thresholds, as nothing has been validated, it gives no labels and no masks; anomalib's cuts raw scores at
    one half. With them scores are :func:`scaled`. ``good_images`` and ``good_pixels``, 0 until they are needed, are how
    the scores of good images that a fit has not seen spread, and the highest values of their maps: a
    :class:`GoodScores` each.

    Args:
        reject_rate: Share of good images to be called anomalous, in (0, 0.5]; ``None`` takes the thresholds of the best
            F1, or ``USUAL_RATE`` if the validation images are not of both kinds, or have all the same score.
        **options: As for anomalib's post-processor.

    Raises:
        ValueError: If the rate is outside its range, or an option has the threshold elsewhere or nowhere.
    """

    good_images: Tensor
    good_pixels: Tensor
    _image_threshold_metric: MidwayThreshold
    unseen: UnseenScores | None = None  # of this fit
    suspicious: Sequence[tuple[str, float]] = ()  # training images that others do not explain, of the last fit

    def __init__(self, reject_rate: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        contrary = [name for name, value in CENTRED.items() if getattr(self, name) != value]
        if reject_rate is not None and contrary:
            msg = f"reject_rate sets where labels cut, and does not go with {', '.join(contrary)}: give one of them"
            raise ValueError(msg)
        self.register_buffer("good_images", torch.zeros(3))
        self.register_buffer("good_pixels", torch.zeros(3))
        self.register_load_state_dict_pre_hook(load_without_good_scores)
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
        self._reject_rate = config.get("reject_rate")  # the thresholds are in the buffers

    @property
    def reject_rate(self) -> float | None:
        """Share of good images to be called anomalous; to set another one sets the thresholds, if they can be told."""
        return self._reject_rate

    @reject_rate.setter
    def reject_rate(self, rate: float | None) -> None:
        if rate is not None:
            check_number("reject_rate", rate, "(0, 0.5]")
        self._reject_rate = plain(rate)
        if rate is not None and self.has_thresholds:
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
            rank_zero_warn(self.fallback("training images are too few for thresholds from good ones"))
            return
        for known, as_they_are, varied in zip(
            (self.good_images, self.good_pixels), (scores.images, scores.pixels), scores.varied, strict=True
        ):
            known.copy_(torch.tensor(GoodScores.of(as_they_are, varied)))
        self.unseen = scores
        self.reject(self.reject_rate or USUAL_RATE)

    def recalibrate(self, scores: UnseenScores) -> None:
        """Set the thresholds by scores of other good images alone.

        Raises:
            ValueError: If these are too few to tell.
        """
        if len(scores.images) < FEWEST:
            msg = f"a threshold takes {FEWEST} good images that a fit has not seen, got {len(scores.images)}: give more"
            raise ValueError(msg)
        self.learn(scores)
        self.unseen = None

    def follow(
        self, before: UnseenScores, after: UnseenScores, new: UnseenScores | None = None, share: float = 1.0
    ) -> None:
        """Have the thresholds follow a model that has learnt on.

        Those of good images are set anew: scores spread as they did, moved as those of some of these images have, and
        as those of ``new`` images do. Others are multiplied by as much as scores have moved.

        Args:
            before: Of some of the good images that the thresholds are of, by fits of before that had not seen them.
            after: Of the same images by fits of now.
            new: Of images that have been learnt since.
            share: How much the images of before still count, in [0, 1].

        Raises:
            ValueError: If there are too few images to tell.
        """
        buffers = self.good_images, self.good_pixels
        for number, (name, known) in enumerate(zip(("image", "pixel"), buffers, strict=True)):
            was, now, *of_new = (
                GoodScores.of((scores.images, scores.pixels)[number], scores.varied[number])
                for scores in (before, after, new)
                if scores is not None and len(scores.images) > 1
            )
            if self.knows_good_scores:
                good = spread(known).moved(was, now, share)
                good = good.joined(*of_new) if of_new else good
                if good.number < FEWEST:
                    msg = f"thresholds take {FEWEST} good images, got {good.number}: give more, or forget less"
                    raise ValueError(msg)
                known.copy_(torch.tensor(good))
            else:
                factor = float(torch.tensor(now.mean - was.mean).exp())
                for buffer in (f"_{name}_threshold", f"{name}_min", f"{name}_max"):
                    self.get_buffer(buffer).mul_(factor)
        if self.knows_good_scores:
            self.reject(self.reject_rate or USUAL_RATE)

    def reject(self, rate: float) -> None:
        """Set the thresholds such that a ``rate`` of good images is expected to be called anomalous.

        A map is anomalous anywhere in as many images.

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
        self._image_threshold_metric.forget()  # it may not compute
        super().on_validation_epoch_end(trainer, pl_module)
        if not self.needs_good_scores or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        will_learn = trainer.state.fn == TrainerFn.FITTING  # at the end of this validation, if the model is another
        if self.knows_good_scores or (self.reject_rate is not None and not will_learn):
            self.reject(self.reject_rate or USUAL_RATE)
        elif not will_learn:
            rank_zero_warn(self.fallback("no fit has kept how good ones score"))

    def fallback(self, reason: str) -> str:
        """Return what thresholds are where neither validation images nor good training images tell them."""
        metric = self._image_threshold_metric
        where = "the highest values of the validation images"
        if metric.defective and not metric.good:
            where = "below the scores of all validation images, so that good images may be rejected"
        return f"{metric.lack}, and {reason}: the thresholds are {where} (give {FEWEST} that a fit has not seen)"

    @property
    def needs_good_scores(self) -> bool:
        """Whether thresholds are to come from good images: by a rate of rejects, or as validation images tell none."""
        return self.enable_thresholding and (self.reject_rate is not None or bool(self._image_threshold_metric.lack))

    def warn_of_validation(self) -> None:
        """Warn if thresholds that come from validation images could hardly be told by them, or do not come from them.

        That validation has no defects is no fault: a run may have none.
        """
        metric = self._image_threshold_metric
        if self.reject_rate is not None or not self.enable_thresholding or not metric.defective:
            return
        if metric.lack and self.knows_good_scores:
            rank_zero_warn(f"{metric.lack}, so thresholds come from good training images: {USUAL_RATE:.0%} of such")
        elif min(metric.good, metric.defective) == 1:
            rank_zero_warn(
                f"thresholds come from {metric.good} good and {metric.defective} defective validation images, of which "
                "a single one says little: give more of that kind, or a reject_rate"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the scores of another fit; those of a run that is resumed are loaded after this."""
        del trainer, pl_module
        if stage == TrainerFn.FITTING:
            self.good_images.zero_()
            self.good_pixels.zero_()
            self.unseen, self.suspicious = None, ()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the thresholds are, if they are of good images, and which of those stand out."""
        del pl_module
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.warn_of_validation()
        if self.knows_good_scores:
            thresholds = f"{self.image_threshold:.4g} for images, {self.pixel_threshold:.4g} for pixels"
            rank_zero_info(f"Thresholds are {thresholds}. Rejects: {self.expectation}{self.counted}")
        self.suspicious, self.unseen = self.unseen.suspicious() if self.unseen else (), None
        if self.suspicious:
            listed = ", ".join(f"{path} ({score:.3g})" for path, score in self.suspicious[:5])
            rank_zero_warn(
                f"the scores of {len(self.suspicious)} training images are not like those of the others: {listed}. If "
                "they have defects take them out, as they raise the threshold"
            )

    def good_scores_as_scaled(self) -> dict[str, float]:
        """Return how the logarithms of good images' raw scores spread, and by how much new ones may differ by chance.

        Beside that the raw ``threshold`` that scores are scaled by; for ``errors`` see :class:`GoodScores`. Nothing is
        returned if scores are not scaled, or this is not known.
        """
        if not (self.knows_good_scores and self.enable_normalization):
            return {}
        good = spread(self.good_images)
        return {**good._asdict(), "threshold": float(self.image_threshold), "errors": good.errors}

    @property
    def rate_in_force(self) -> float | None:
        """Share of good images that the image threshold is to reject; ``None`` if it does not come from good images."""
        by_rate = self.knows_good_scores and self.image_min == 0 and self.image_max == 2 * self.image_threshold
        return spread(self.good_images).rate(float(self.image_threshold)) if by_rate else None

    @property
    def cut(self) -> float:
        """The raw score above which an image is labelled anomalous."""
        cut = float(self.normalized_image_threshold)
        return unscaled(cut, float(self.image_threshold)) if self.enable_normalization else cut

    @property
    def expectation(self) -> str:
        """How many good images will be rejected; nothing if that is not known."""
        if not self.knows_good_scores:
            return ""
        good = spread(self.good_images)
        rate = good.rate(self.cut)
        low, high = good.interval(rate)
        return (
            f"{100 * rate:.2g} % expected of good images taken like those of training, between {100 * low:.2g} and "
            f"{100 * high:.2g} % with {CONFIDENCE:.0%} confidence, by {good.number} of these, each scored without "
            "training on it."
        )

    @property
    def counted(self) -> str:
        """How many of these images are rejected as they are, and as variations change them; while a fit knows it."""
        if self.unseen is None or not self.unseen.varied.numel():
            return ""
        scores = self.unseen.images, self.unseen.varied[0]
        as_they_are, varied = (100 * float((found > self.cut).double().mean()) for found in scores)
        return f" Of these, {as_they_are:.2g} % are rejected as they are, {varied:.2g} % as variations change them."

    @property
    def has_pixel_threshold(self) -> bool:
        """Whether pixels have a threshold of their own, and not that of images, as without masks to validate with."""
        return not bool(self.get_buffer("_pixel_threshold").isnan())

    @property
    def has_thresholds(self) -> bool:
        """Whether something has been validated."""
        return not bool(self.image_threshold.isnan() & self.pixel_threshold.isnan())

    def _normalize(  # type: ignore[override]  # anomalib has no public way to scale otherwise
        self, preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor
    ) -> Tensor | None:
        """Scale scores or maps by their threshold, or by their range if there is none."""
        has_one = self.enable_thresholding and (torch.compiler.is_compiling() or not bool(threshold.isnan()))
        if preds is None or not has_one:
            return super()._normalize(preds, norm_min, norm_max, threshold)
        return scaled(preds, threshold)

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


def scaled(scores: Tensor, threshold: Tensor) -> Tensor:
    """Scale raw scores in [0, inf) by their ratio to a threshold ``()``, to [0, 1].

    Below the threshold that is half the ratio, and above it what the inverse lacks: of twice the threshold 3/4, of four
    times 7/8. The threshold itself is 1/2. Single precision tells apart scores up to some million times the threshold.
    """
    tiny = torch.finfo(scores.dtype).tiny
    # a sum of logarithms, as OpenVINO rounds what it puts in the place of divisions and differences
    ratio = scores.clamp(min=tiny).log() + threshold.clamp(min=tiny).log() * -1
    half = (ratio.abs() * -1).exp() * 0.5
    return torch.where(ratio > 0, half * -1 + 1, half)


def unscaled(score: float, threshold: float) -> float:
    """Return the raw score that :func:`scaled` has made ``score`` of."""
    if score <= HALF:
        return 2 * score * threshold
    return threshold / (2 * (1 - score)) if score < 1 else math.inf


def load_without_good_scores(own: nn.Module, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
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


def labelled(own: nn.Module | None, *, is_validated: bool) -> frozenset[str]:
    """Return which of ``"val"`` and ``"test"`` batches a post-processor gives labels, as far as is known before."""
    if own is None:
        return frozenset()
    if type(own) not in (PostProcessor, MidwayPostProcessor):  # a user's own may give labels at any time
        return frozenset({"val", "test"})
    # thresholds come from validation or a rate of rejects; anomalib's own gives labels without
    has_some = not isinstance(own, MidwayPostProcessor) or own.has_thresholds or own.reject_rate is not None
    gives_some = cast(PostProcessor, own).enable_thresholding and (has_some or is_validated)
    return frozenset({"test"} if gives_some else ())
