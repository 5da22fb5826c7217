"""Learning on: new good images and known defects join a fitted model's sums, without the images of before."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from anomalib.models.components import AnomalibModule
from torch import Tensor

from ..deployment import UnseenScores
from ..preflight import Sample, good_findings, images_below, known_findings, known_samples, settle
from ..synthesis import Stream
from .fit import Fit, fit_gaussians, fit_scales, mean_distances
from .folds import unseen_scores
from .known import KnownDefect, known_moments
from .sample import FOLDS, SampledImage, TrainingSample, batches, draw
from .sums import KEPT, Sums, where_needed
from .torch_model import CseGaussianModel


class Learnt(NamedTuple):
    """What has changed by learning; scores are ``(N,)`` each, thresholds NaN if there are none.

    Attributes:
        known: How many good images and defects were known before.
        good: Scores of the new good images before and after; after, they are of fits that have not seen them.
        defects: Scores of the new defects before and after, of which the fit has learnt.
        thresholds: Those of images' scores, before and after.
        expectation: How many good images will be rejected, in words; nothing if that is not known.
        thresholds_only: Whether no more than thresholds has changed.
    """

    known: tuple[int, int]
    good: tuple[Tensor, Tensor]
    defects: tuple[Tensor, Tensor]
    thresholds: tuple[float, float]
    expectation: str = ""
    thresholds_only: bool = False

    def __str__(self) -> str:
        """Say it in three lines."""
        good, defects = self.known
        before, after = self.thresholds
        moved = "there is none" if before != before else f"{before:.4g} before, {after:.4g} now"
        parts = [
            moves(name, scores, self.thresholds)
            for name, scores in (("good images", self.good), ("known defects", self.defects))
            if len(scores[0])
        ]
        new = f"{len(self.good[0])} good images"
        learnt = f"Learnt {new} and {len(self.defects[0])} defects, to {good} and {defects} of before"
        if self.thresholds_only:
            learnt = f"Set thresholds by {new}; all else is as it was"
        return f"{learnt}.\nThreshold: {moved}. {self.expectation}\nScores: {'; '.join(parts)}."


def moves(name: str, scores: tuple[Tensor, Tensor], thresholds: tuple[float, float]) -> str:
    """Say how scores have moved, as geometric means, and how many are above the threshold."""
    means = [float(found.clamp(min=1e-30).log().mean().exp()) for found in scores]
    above = [int((found > cut).sum()) for found, cut in zip(scores, thresholds, strict=True)]
    counted = "" if thresholds[0] != thresholds[0] else f", {above[0]} and {above[1]} of {len(scores[0])} rejected"
    return f"{name} {means[0]:.3g} before and {means[1]:.3g} now{counted}"


def new_samples(
    good: str | Path | None, defects: str | Path | None, masks: str | Path | None
) -> tuple[list[Sample], list[Sample]]:
    """Return images to learn of, good ones and defects.

    Raises:
        FileNotFoundError: If a folder is not there.
        ValueError: If nothing is given, or some image or mask will not do.
    """
    if good is None and defects is None:
        msg = "there is nothing to learn: give a folder of good images, of defects, or both"
        raise ValueError(msg)
    if masks is not None and defects is None:
        msg = "masks are of defects, got none: give the folder of their images too"
        raise ValueError(msg)
    samples = [Sample(str(path)) for path in images_below("good", good)] if good else []
    known = known_samples(defects, masks, ("defects", "masks")) if defects else []
    settle([*good_findings(samples), *known_findings(known, samples, [])])
    return samples, known


@contextmanager
def unchanged_if_it_fails(model: AnomalibModule) -> Iterator[None]:
    """Give a model back what it had if something is raised."""
    had = {name: value.clone() for name, value in model.state_dict().items() if ".backbone." not in name}
    sums = model.sums
    try:
        yield
    except BaseException:
        model.load_state_dict(had, strict=False)
        model.sums = sums
        raise


def kept_images(model: CseGaussianModel, sums: Sums) -> Iterator[SampledImage]:
    """Give the good images that sums hold."""
    for pixels, fold, share in sums.images:
        image = pixels.to(model.layer_weights)[None] / 255
        inside = model.inside(image.shape[-2:])
        features = model.smoothed_features(image, inside)
        region = None if inside is None else inside[0]
        yield SampledImage(image[0], [f[0] for f in features], region, "", fold, share)


def sample_of(kept: Sequence[SampledImage], like: TrainingSample) -> TrainingSample:
    """Return some images of a sample, with all of its sums."""
    sample = copy.copy(like)
    sample.kept = list(kept)
    return sample


@torch.no_grad()
def learn(
    model: CseGaussianModel,
    sums: Sums,
    new: TrainingSample | None,
    known: Sequence[KnownDefect],
    forget: float,
    variations: Sequence[str],
    seed: int,
    *,
    scored: bool = True,
) -> tuple[Sums, tuple[UnseenScores, UnseenScores, UnseenScores | None] | None]:
    """Fit a fitted model anew to its sums and to new images; return the sums of all.

    Directions and covariances follow from sums, as they would of all images at once. Scales do not: they are as much
    larger or smaller as the images that are kept say, and those of the new images come of these.

    Args:
        model: The model, fitted by ``sums``.
        sums: What it was fitted by.
        new: New good images, if there are any.
        known: New defects; those without masks are where the model's map is highest.
        forget: Which part of the earlier good images' sums is left out, in [0, 1].
        variations: See :func:`~anomalib_cse.cse_gaussian.fit.fit`.
        seed: Decides how kept images are varied.
        scored: Whether good images are to be scored by fits that have not seen them.

    Returns:
        The sums, and those scores: of kept images before and after, and of new ones; none if too few are kept.

    Raises:
        ValueError: If nothing can be fitted.
    """
    share = 1 - forget
    before = copy.deepcopy(model, {id(model.backbone): model.backbone})
    found = [old + more for old, more in zip(sums.fitted.known, known_moments(model, known, sums.moments), strict=True)]
    of_before = TrainingSample(0, torch.Generator())
    of_before.moments, of_before.kept = sums.moments, list(kept_images(model, sums))
    of_before.count = sums.good
    kept = [one._replace(share=one.share * share) for one in of_before.kept] if share else []
    total = joined(sample_of(kept, of_before), new, share)
    fitted = fit_gaussians(model, total.moments, sums.fitted._replace(known=found))
    rescale(model, before, kept, new, sums.good * share)

    scores = None
    if scored and len(of_before.kept) >= FOLDS:
        fits = [(before, of_before.kept, of_before, sums.fitted)]
        if kept or new:
            fits.append((model, kept or cast(TrainingSample, new).kept, total, fitted))
        if new and new.count > 1:
            fits.append((model, new.kept, total, fitted))
        unseen = [
            unseen_scores(own, sample_of(images, sample), fit, variations, seed, of_more=True)
            for own, images, sample, fit in fits
        ]
        scores = unseen[0], unseen[1], unseen[2] if len(unseen) > 2 else None
    return summed_up(sums, total, fitted, new, seed), scores


def joined(earlier: TrainingSample, new: TrainingSample | None, share: float) -> TrainingSample:
    """Return a ``share`` of the sums of earlier images with those of new ones, and the images of both."""
    total = copy.copy(earlier)
    total.moments = [m.times(share) for m in earlier.moments] if share < 1 else list(earlier.moments)
    total.count = round(earlier.count * share)
    if new is not None:
        of_new = where_needed(new.moments, [torch.inf if m.weight.dim() == 1 else 0.0 for m in total.moments])
        # those of before may be elsewhere
        total.moments = [m + n.to(m.first) for m, n in zip(total.moments, of_new, strict=True)]
        total.kept, total.count = [*earlier.kept, *new.kept], total.count + new.count
    return total


def rescale(
    model: CseGaussianModel,
    before: CseGaussianModel,
    kept: Sequence[SampledImage],
    new: TrainingSample | None,
    count: float,
) -> None:
    """Fit scales: the means of distances of earlier images, which kept ones tell, and of new ones, by their numbers."""
    if not kept:
        fit_scales(model, batches(cast(TrainingSample, new).kept))
        return
    fit_scales(model, batches(kept), before)
    if new is None:
        return
    for gaussian, mean in zip(model.maps, mean_distances(model, batches(new.kept)), strict=True):
        old = 1 / gaussian.scale
        of_new = mean if mean.shape == old.shape else old * mean.mean() / old.mean()
        gaussian.set("scale", (count + new.count) / (count * old + new.count * of_new))


def summed_up(sums: Sums, total: TrainingSample, fitted: Fit, new: TrainingSample | None, seed: int) -> Sums:
    """Return the sums of earlier and new images, and of both as many kept ones as they are parts of all."""
    if new is None:  # those in 8 bits are what they were
        return Sums.of(total, fitted, seed)._replace(images=sums.images)
    of_new = min(max(round(KEPT * new.count / total.count), 1), len(new.kept))
    earlier = total.kept[: len(total.kept) - len(new.kept)]
    parts = (earlier, min(KEPT - of_new, len(earlier))), (new.kept, of_new)
    kept = [part[place] for part, count in parts if count for place in draw(count, len(part), seed, Stream.KEPT_IMAGES)]
    return Sums.of(sample_of(kept, total), fitted, seed)
