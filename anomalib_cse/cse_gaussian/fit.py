"""The closed form: directions, then covariances and scales, by clean and corrupted images."""

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import chain
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from ..synthesis import AnomalySynthesis
from .corrupted import Corrupted, corrupted_features, defect_moments
from .moments import RIDGE, Moments, contrastive_directions, evidence, inverse_root
from .sample import Seen, TrainingSample, batches
from .torch_model import CseGaussianModel, from_border
from .trial import Trial, separation

FEWEST_CORRUPTED, MOST_CORRUPTED = 16, 128  # as many images as there are get synthetic defects, within these bounds
ROUNDING = 1e-12  # share of a second moment that is no variance
PRIOR = 10  # images' worth of trust in the covariance that all positions have in common
TRIED_PRIOR = 100  # likewise in the trial: covariances of half of the images are noisier than those they stand for
FEWEST_TRIED = PRIOR  # images to try own covariances with: of fewer, they would count for less than half


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

    As many images get synthetic defects as there are, within bounds; with several processes, as many as the first one
    has.

    Raises:
        ValueError: If features are not finite or all alike, or no synthetic defect is there or stands out in a layer.
    """
    model.layer_weights.fill_(torch.nan)  # so that what fails half-way is not taken for fitted
    some, others = sample.halves
    count = -(-min(max(sample.count, FEWEST_CORRUPTED), MOST_CORRUPTED) // 2)  # of either half
    corrupted = corrupted_features(model, others, synthesis, count, seed)
    tried = list(corrupted) if sample.can_be_tried(FEWEST_TRIED) else []  # else used as they come
    drawn = chain(corrupted_features(model, some, synthesis, count, seed), tried or corrupted)
    defects = defect_moments(drawn, some.moments)
    of_halves = zip(some.moments, others.moments, strict=True)
    factors = fit_directions(model, [(a + b).pooled() for a, b in of_halves], over_folds(defects))
    model.image_size.copy_(torch.tensor(sample.kept[0].image.shape[-2:]))
    return Fit(defects, fit_covariances(model, sample, factors, tried))


def fit_covariances(
    model: CseGaussianModel, sample: TrainingSample, factors: Sequence[Tensor], corrupted: Sequence[Corrupted]
) -> Trial | None:
    """Give all positions one covariance or each its own, whichever finds synthetic defects better.

    Parts lie alike in every image, and what is usual differs from place to place. On a surface nothing has a place: own
    covariances learn no more than the images at hand. So both are tried: with covariances and scales of one half of the
    images, own ones shrunk harder than in the model, they are to find the defects in the other, ``corrupted``. Without
    any defect nothing is tried.
    """
    some, others = sample.halves
    trial = None
    if sample.can_be_tried(FEWEST_TRIED) and any(drawn.masks.any() for drawn in corrupted):
        fit_own(model, some.moments, factors, batches(some.kept), TRIED_PRIOR)
        own = separation(model, batches(others.kept), corrupted)
        fit_common(model, factors, batches(some.kept))
        trial = Trial(separation(model, batches(others.kept), corrupted), own)
    if trial is not None and trial.differ:
        moments = [a + b for a, b in zip(some.moments, others.moments, strict=True)]
        fit_own(model, moments, factors, batches(sample.kept))
    else:
        fit_common(model, factors, batches(sample.kept))
    return trial


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
        msg = "no synthetic defects to select the embedding by: their masks are empty, or outside of the roi"
        raise ValueError(msg)
    power = clean.second.diagonal().sum() / clean.weight
    if clean.about(clean.mean).diagonal().sum() <= ROUNDING * power:
        msg = f"features of the training images are all alike in layer {level}: give more or larger images"
        raise ValueError(msg)


def fit_common(model: CseGaussianModel, factors: Sequence[Tensor], shown: Iterable[Seen]) -> None:
    """Give all positions one covariance, which is 1 in the embedding; fit scales, of rows and columns, and weights."""
    for gaussian, factor in zip(model.maps, factors, strict=True):
        gaussian.set("roots", factor.sqrt().diag())
    set_scales(model, factors, [of_rows_and_columns(total, weight) for total, weight in distances(model, shown)])


def fit_own(
    model: CseGaussianModel,
    moments: Sequence[Moments],
    factors: Sequence[Tensor],
    shown: Iterable[Seen],
    prior: float = PRIOR,
) -> None:
    """Give every position its own covariance, shrunk to the common one if images are few; fit scales and weights.

    ``moments`` are those of the features at every position, of each layer; ``shown`` features measure the scales;
    ``prior`` is how many images the common covariance counts for.
    """
    for gaussian, at_positions, factor in zip(model.maps, moments, factors, strict=True):
        directions = gaussian.directions.to(factor)
        embedded = directions.mT @ at_positions.about(gaussian.mean.to(factor)) @ directions  # (h, w, D, D)
        own = (at_positions.weight / (at_positions.weight + prior))[..., None]
        shrunk = own * embedded + (1 - own) * torch.eye(len(factor)).to(factor)
        gaussian.set("roots", inverse_root(shrunk) * factor.sqrt())
    set_scales(model, factors, [mean_of(total, weight) for total, weight in distances(model, shown)])


def distances(model: CseGaussianModel, shown: Iterable[Seen]) -> list[tuple[Tensor, Tensor]]:
    """Return sums of the distances at every position ``(h, w)``, and how much they are of, of each layer.

    Where images differ in size, positions are those of the largest height and the largest width: see
    :func:`~anomalib_cse.cse_gaussian.torch_model.from_border`.
    """
    of_images: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.maps]
    for seen in shown:
        for layer, (gaussian, features) in enumerate(zip(model.maps, seen.features, strict=True)):
            weights = seen.weights(layer)
            weighted = weights * gaussian.distances(features)[:, 0]
            of_images[layer].append((weighted.sum(dim=0), weights.sum(dim=0)))
    sums = []
    for of_layer in of_images:
        height, width = (max(total.shape[axis] for total, _ in of_layer) for axis in (0, 1))
        both = [[gathered(values, height, width) for values in pair] for pair in of_layer]
        sums.append((sum(total for total, _ in both), sum(weight for _, weight in both)))
    return sums  # type: ignore[return-value]  # of tensors


def gathered(values: Tensor, height: int, width: int) -> Tensor:
    """Return values ``(h, w)`` at the positions of a larger grid that are as far from the borders, 0 elsewhere."""
    rows, columns = (
        from_border(length, most, values.device) for length, most in zip(values.shape, (height, width), strict=True)
    )
    of_rows = values.new_zeros(height, values.shape[1]).index_add_(0, rows, values)
    return values.new_zeros(height, width).index_add_(1, columns, of_rows)


def mean_of(total: Tensor, weight: Tensor) -> Tensor:
    """Return means of sums of distances, above 0 though positions may be all alike; where nothing was seen, of all."""
    mean = torch.where(weight > 0, total / weight, total.sum() / weight.sum())
    return mean.clamp(min=torch.finfo(mean.dtype).eps)


def of_rows_and_columns(total: Tensor, weight: Tensor) -> Tensor:
    """Return a map ``(h, w)`` in which every position has the product of its row's and its column's mean, over all's.

    The backbone's padding makes distances larger towards a border, whatever the image shows, and by as much anywhere
    along it; differences there come from the images.
    """
    rows, columns = (mean_of(total.sum(dim=axis), weight.sum(dim=axis)) for axis in (1, 0))
    return rows[:, None] * columns / mean_of(total.sum(), weight.sum())


def set_scales(model: CseGaussianModel, factors: Sequence[Tensor], means: Iterable[Tensor]) -> None:
    """Make 1 of the mean distances at every position, of each layer; weigh layers by their dimensions."""
    for gaussian, mean in zip(model.maps, means, strict=True):
        gaussian.set("scale", 1 / mean)
    dimensions = torch.stack([f.sum() for f in factors])
    model.layer_weights.copy_((dimensions / dimensions.sum()).view(1, -1, 1, 1))
