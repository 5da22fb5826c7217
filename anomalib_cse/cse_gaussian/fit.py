"""The closed form: directions, then covariances and scales, by clean and corrupted images."""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import chain
from operator import add
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from ..synthesis import AnomalySynthesis, generator_for
from .moments import RIDGE, Moments, contrastive_directions, evidence, inverse_root
from .sample import BATCH, FOLDS, Half, TrainingSample
from .torch_model import CseGaussianModel

FEWEST_CORRUPTED, MOST_CORRUPTED = 16, 128  # as many images as there are get synthetic defects, within these bounds
ALIKE = 1e-3  # deviation of log distances below which images are copies of one another
ROUNDING = 1e-12  # share of a second moment that is no variance
PRIOR = 10  # images' worth of trust in the covariance that all positions have in common
FEWEST_TRIED = PRIOR  # images to try own covariances with: of fewer, they would count for less than half
DRAWN, DEFECTS = 10, 11  # set apart the random numbers that one seed gives


class Corrupted(NamedTuple):
    """B images with synthetic defects: features of each layer ``(B, C, h, w)``, masks ``(B, 1, H, W)``, folds."""

    features: list[Tensor]
    masks: Tensor
    folds: list[int]


class Trial(NamedTuple):
    """How far synthetic defects stand out with one covariance for all positions, and with their own."""

    in_common: float
    own: float

    @property
    def differ(self) -> bool:
        """Whether positions should have covariances of their own."""
        return self.own > self.in_common


class Fit(NamedTuple):
    """What a model was fitted by, beside the sample: moments of defects, and what decided whether positions differ.

    Moments are of the defects in images of each fold, and of each layer. The trial is ``None`` if nothing was tried,
    for want of images or of memory.
    """

    defects: list[list[Moments]]
    trial: Trial | None

    @property
    def differ(self) -> bool:
        """Whether positions have covariances of their own."""
        return self.trial is not None and self.trial.differ


@torch.no_grad()
def fit(model: CseGaussianModel, sample: TrainingSample, synthesis: AnomalySynthesis, seed: int) -> Fit:
    """Fit a model's maps and the weights of its layers to the training images, with defects as the seed draws them.

    Parts lie alike in every image, and what is usual differs from place to place. On a surface nothing has a place: own
    covariances learn no more than the images at hand. So both are tried: with covariances and scales of one half of the
    images, they are to find synthetic defects in the other. As many images get such defects as there are, within
    bounds; with several processes, as many as the first one has.

    Raises:
        ValueError: If features are not finite or all alike, or no synthetic defect is there or stands out in a layer.
    """
    model.layer_weights.fill_(torch.nan)  # so that what fails half-way is not taken for fitted
    some, others = sample.halves
    count = -(-min(max(sample.count, FEWEST_CORRUPTED), MOST_CORRUPTED) // 2)  # of either half
    corrupted = list(corrupted_features(model, others, synthesis, count, seed))  # for the trial too
    drawn = chain(corrupted_features(model, some, synthesis, count, seed), corrupted)
    defects = defect_moments(drawn, some.moments)
    of_halves = zip(some.moments, others.moments, strict=True)
    factors = fit_directions(model, [(a + b).pooled() for a, b in of_halves], over_folds(defects))
    model.image_size.copy_(torch.tensor(sample.kept[0].shape[-2:]))
    trial = None
    if sample.can_be_tried(FEWEST_TRIED):
        fit_own(model, some.moments, factors, some.feature_batches())
        own = separation(model, others.feature_batches(), corrupted)
        fit_common(model, factors, some.feature_batches())
        trial = Trial(separation(model, others.feature_batches(), corrupted), own)
    shown = chain(some.feature_batches(), others.feature_batches())
    if trial is not None and trial.differ:
        moments = [a + b for a, b in zip(some.moments, others.moments, strict=True)]
        fit_own(model, moments, factors, shown)
    else:
        fit_common(model, factors, shown)
    return Fit(defects, trial)


def draw(count: int, images: int, *numbers: int) -> list[int]:
    """Draw so many of the images, none again before all have been drawn; the numbers decide."""
    generator = generator_for(*numbers)
    rounds = [torch.randperm(images, generator=generator) for _ in range(-(-count // images))]
    return torch.cat(rounds)[:count].tolist()


def corrupted_features(
    model: CseGaussianModel, half: Half, synthesis: AnomalySynthesis, count: int, seed: int
) -> Iterator[Corrupted]:
    """Give the features of sampled images with synthetic defects, and the defects' masks."""
    if not half.images:
        return
    drawn = draw(count, len(half.images), seed, DRAWN, half.number)
    for start in track(range(0, len(drawn), BATCH), description="Drawing defects"):
        places = drawn[start : start + BATCH]
        images = torch.stack([half.images[i] for i in places])
        params = synthesis.sample(images.shape, generator_for(seed, DEFECTS, half.number, start))
        features = model.smoothed_features(synthesis.apply(images, params))
        yield Corrupted(features, params.mask.to(images.device), [half.folds[i] for i in places])


def defect_moments(corrupted: Iterable[Corrupted], like: Sequence[Moments]) -> list[list[Moments]]:
    """Return moments of the features of synthetic defects, by fold and layer; those of ``like`` are of these layers."""
    folds = [[Moments(m.first.shape[-1], device=m.first.device) for m in like] for _ in range(FOLDS)]
    for drawn in corrupted:
        for layer, f in enumerate(drawn.features):
            cover = F.adaptive_avg_pool2d(drawn.masks.float(), (f.shape[2], f.shape[3]))
            for fold, vectors, weights in zip(drawn.folds, f.movedim(1, -1), cover, strict=True):
                folds[fold][layer].add(vectors.flatten(0, 1), weights.flatten())
    return folds


def over_folds(moments: Sequence[list[Moments]]) -> list[Moments]:
    """Return the moments of all folds taken together, of each layer."""
    return [reduce(add, layer) for layer in zip(*moments, strict=True)]


def fit_directions(model: CseGaussianModel, background: Sequence[Moments], defects: Sequence[Moments]) -> list[Tensor]:
    """Select the embedding of every map by moments of clean features and of defects, of all positions together.

    Returns:
        What a squared deviation along the directions says, ``(D,)`` of each layer.
    """
    factors = []
    for level, gaussian, clean, defect in zip(model.backbone.levels, model.maps, background, defects, strict=True):
        check_moments(level, clean, defect)
        covariance = clean.about(clean.mean)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        dim = gaussian.directions.shape[1]
        directions, ratios = contrastive_directions(covariance, defect.about(clean.mean), dim)
        gaussian.set("directions", directions)
        gaussian.set("mean", clean.mean)
        factors.append(evidence(ratios))
        if not factors[-1].any():
            msg = (
                f"no synthetic defect stands out from clean images in layer {level}: leave it out of layers, "
                "or give other kinds of defects or textures (defects, dtd_dir)"
            )
            raise ValueError(msg)
    return factors


def check_moments(level: int, clean: Moments, defects: Moments) -> None:
    """Raise a ``ValueError`` if moments of a layer's features are not finite, not of defects, or of no variance."""
    if not (clean.second.isfinite().all() and defects.second.isfinite().all()):
        msg = (
            "features of the training images are NaN or infinite: so are pixels of theirs, or 16 bits (the trainer's "
            "precision) are too few for this backbone"
        )
        raise ValueError(msg)
    if not defects.weight > 0:
        msg = "no synthetic defects to select the embedding by: their masks are empty"
        raise ValueError(msg)
    power = clean.second.diagonal().sum() / clean.weight
    if clean.about(clean.mean).diagonal().sum() <= ROUNDING * power:
        msg = f"features of the training images are all alike in layer {level}: give more or larger images"
        raise ValueError(msg)


def fit_common(model: CseGaussianModel, factors: Sequence[Tensor], shown: Iterable[list[Tensor]]) -> None:
    """Give all positions one covariance, which is 1 in the embedding; fit scales, of rows and columns, and weights."""
    for gaussian, factor in zip(model.maps, factors, strict=True):
        gaussian.set("roots", factor.sqrt().diag())
    set_scales(model, factors, map(of_rows_and_columns, mean_distances(model, shown)))


def fit_own(
    model: CseGaussianModel, moments: Sequence[Moments], factors: Sequence[Tensor], shown: Iterable[list[Tensor]]
) -> None:
    """Give every position its own covariance, shrunk to the common one if images are few; fit scales and weights.

    ``moments`` are those of the features at every position, of each layer; ``shown`` features measure the scales.
    """
    for gaussian, at_positions, factor in zip(model.maps, moments, factors, strict=True):
        directions = gaussian.directions.to(factor)
        embedded = directions.mT @ at_positions.about(gaussian.mean.to(factor)) @ directions  # (h, w, D, D)
        own = (at_positions.weight / (at_positions.weight + PRIOR))[..., None]
        shrunk = own * embedded + (1 - own) * torch.eye(len(factor)).to(factor)
        gaussian.set("roots", inverse_root(shrunk) * factor.sqrt())
    set_scales(model, factors, mean_distances(model, shown))


def mean_distances(model: CseGaussianModel, shown: Iterable[list[Tensor]]) -> list[Tensor]:
    """Return the mean distance at every position ``(h, w)`` over the features ``shown``, of each layer."""
    totals: list[Tensor] = []
    count = 0
    for features in shown:
        distances = [m.distances(f).sum(dim=(0, 1)) for m, f in zip(model.maps, features, strict=True)]
        totals = [t + d for t, d in zip(totals, distances, strict=True)] if totals else distances
        count += len(features[0])
    # positions may be all alike in all images
    return [(total / count).clamp(min=torch.finfo(total.dtype).eps) for total in totals]


def of_rows_and_columns(means: Tensor) -> Tensor:
    """Return a map ``(h, w)`` in which every position has the product of its row's and its column's mean, over all's.

    The backbone's padding makes distances larger towards a border, whatever the image shows, and by as much anywhere
    along it; differences there come from the images.
    """
    return means.mean(dim=1, keepdim=True) * means.mean(dim=0, keepdim=True) / means.mean()


def set_scales(model: CseGaussianModel, factors: Sequence[Tensor], means: Iterable[Tensor]) -> None:
    """Make 1 of the mean distances at every position, of each layer; weigh layers by their dimensions."""
    for gaussian, mean in zip(model.maps, means, strict=True):
        gaussian.set("scale", 1 / mean)
    dimensions = torch.stack([f.sum() for f in factors])
    model.layer_weights.copy_((dimensions / dimensions.sum()).view(1, -1, 1, 1))


def separation(model: CseGaussianModel, clean: Iterable[list[Tensor]], corrupted: Iterable[Corrupted]) -> float:
    """Return how far defects stand out of clean features: of log distances, the difference of means in deviations.

    The deviation is that of clean positions, or ``ALIKE`` if that is more. Positions are many where images are few, so
    a few defects suffice to tell two models apart.
    """

    def logs(features: list[Tensor]) -> Tensor:
        joint = model.joint_distances(features)
        return joint.clamp(min=torch.finfo(joint.dtype).tiny).log().cpu().double()  # not all devices know double

    usual = torch.cat([logs(features).flatten() for features in clean])
    total = cover = usual.new_zeros(())
    for drawn in corrupted:
        values = logs(drawn.features)
        weights = F.adaptive_avg_pool2d(drawn.masks.cpu().double(), (values.shape[2], values.shape[3]))
        total, cover = total + (weights * values).sum(), cover + weights.sum()
    return float((total / cover - usual.mean()) / usual.std().clamp(min=ALIKE))
