"""The closed form: directions, then covariances and scales, by clean, corrupted and varied images."""

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..synthesis import AnomalySynthesis
from .defects import corrupted_features, defect_moments
from .known import KnownDefect, known_moments, with_known
from .moments import RIDGE, Moments, contrastive_directions, direction_weights, inverse_root, prior_strength
from .sample import SampledBatch, TrainingSample, batches
from .torch_model import CseGaussianModel, GaussianMap, from_border
from .variations import change_moments

FEWEST_CORRUPTED, MOST_CORRUPTED = 16, 128  # as many images as there are get synthetic defects, within these bounds
ROUNDING = 1e-12  # share of a second moment that is no variance
LEAST_OWN = 0.1  # share of a covariance that a position's own images must have in it; of less, all positions share one

NOTHING_STANDS_OUT = (
    "no synthetic defect stands out from clean images in layer {}: leave it out of layers, or give other kinds of "
    "defects or textures (defects, dtd_dir), or fewer variations"
)


class Fit(NamedTuple):
    """What a model was fitted by, beside the sample: moments of defects and of variations, and what positions share.

    Moments are of the images of each fold, and of each layer; those of known defects are in no fold. A layer's strength
    is how many images the covariance counts for that all positions share; infinite if it is the only one.
    """

    defects: list[list[Moments]]
    changes: list[list[Moments]]
    known: list[Moments]
    strengths: list[float]


@torch.no_grad()
def fit(
    model: CseGaussianModel,
    sample: TrainingSample,
    synthesis: AnomalySynthesis,
    variations: Sequence[str],
    seed: int,
    known: Sequence[KnownDefect] = (),
) -> Fit:
    """Fit a model's maps and the weights of its layers to the training images, with defects as the seed draws them.

    As many images get synthetic defects as there are, within bounds; with several processes, as many as the first one
    has. ``variations`` are kinds of :data:`~anomalib_cse.cse_gaussian.variations.VARIATIONS`. ``known`` defects count
    beside synthetic ones; where they have no masks, a fit without them says where they are.

    Raises:
        ValueError: If features are not finite or all alike, no synthetic defect is there, or none stands out.
    """
    model.layer_weights.fill_(torch.nan)  # so that what fails half-way is not taken for fitted
    count = min(max(sample.count, FEWEST_CORRUPTED), MOST_CORRUPTED)
    defects = defect_moments(corrupted_features(model, sample.kept, synthesis, count, seed), sample.moments)
    changes = change_moments(model, sample.kept, variations, seed)
    model.image_size.copy_(torch.tensor(sample.kept[0].image.shape[-2:]))
    fitted = Fit(defects, changes, [Moments(m.first.shape[-1], device=m.first.device) for m in sample.moments], [])
    if any(defect.mask is None for defect in known):
        fit_by(model, sample, fitted)
    fitted = fitted._replace(known=known_moments(model, known, sample.moments))
    return fit_by(model, sample, fitted)


def fit_by(model: CseGaussianModel, sample: TrainingSample, fitted: Fit) -> Fit:
    """Fit a model by moments, of the sample and of a fit; return that with the strengths that follow."""
    fitted = fit_gaussians(model, sample.moments, fitted)
    fit_scales(model, batches(sample.kept))
    return fitted


def fit_gaussians(model: CseGaussianModel, moments: Sequence[Moments], fitted: Fit) -> Fit:
    """Fit all but the scales, by moments of clean features and of a fit; return that with the strengths that follow."""
    pooled = [m.pooled() for m in moments]
    defects = with_known(over_folds(fitted.defects), fitted.known)
    factors = fit_directions(model, pooled, defects, over_folds(fitted.changes))
    if useless := useless_layers(model.backbone.levels, factors):
        rank_zero_warn(f"{NOTHING_STANDS_OUT.format(', '.join(useless))}; it counts for nothing")
    strengths = [strength_of(*of_layer) for of_layer in zip(model.maps, moments, strict=True)]
    fit_covariances(model, moments, factors, strengths)
    return fitted._replace(strengths=strengths)


def over_folds(moments: Sequence[list[Moments]]) -> list[Moments]:
    """Return the moments of all folds taken together, of each layer."""
    return [reduce(add, layer) for layer in zip(*moments, strict=True)]


def fit_directions(
    model: CseGaussianModel, background: Sequence[Moments], defects: Sequence[Moments], changes: Sequence[Moments]
) -> list[Tensor]:
    """Select the embedding of every map by moments of clean features, of defects, and of changes by variations.

    All are of all positions together. What a change does to features counts as if clean features varied by it.

    Returns:
        What a squared deviation along the directions says, ``(D,)`` of each layer.
    """
    factors = []
    of_layers = zip(model.backbone.levels, model.maps, background, defects, changes, strict=True)
    for level, gaussian, clean, defect, change in of_layers:
        check_moments(level, clean, defect)
        covariance = clean.about(clean.mean)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        covariance += change.about(torch.zeros_like(change.mean))
        dim = gaussian.directions.shape[1]
        directions, ratios = contrastive_directions(covariance, defect.about(clean.mean), dim)
        gaussian.set("directions", directions)
        gaussian.set("mean", clean.mean)
        factors.append(direction_weights(ratios))
    useless = useless_layers(model.backbone.levels, factors)
    if len(useless) == len(factors):
        raise ValueError(NOTHING_STANDS_OUT.format(", ".join(useless)))
    return factors


def useless_layers(levels: Sequence[int], factors: Sequence[Tensor]) -> list[str]:
    """Return the layers in which no defect stands out, which count for nothing."""
    return [str(level) for level, factor in zip(levels, factors, strict=True) if not factor.any()]


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


def embedded(gaussian: GaussianMap, moments: Moments) -> Tensor:
    """Return second moments at every position in the embedding, ``(h, w, D, D)``; they are 1 on average.

    To the clean features' own comes what all positions share: the ridge, and what variations do.
    """
    mean, directions = gaussian.mean.to(moments.first), gaussian.directions.to(moments.first)
    at_positions, of_all = (directions.mT @ m.about(mean) @ directions for m in (moments, moments.pooled()))
    return at_positions + torch.eye(len(of_all)).to(of_all) - of_all


def strength_of(gaussian: GaussianMap, moments: Moments) -> float:
    """Return how many images the covariance counts for that all positions share, infinite if it is the only one.

    Parts lie alike in every image, and what is usual differs from place to place. On a surface nothing has a place: own
    covariances learn no more than the images at hand. The likeliest prior of positions' covariances tells which it is.
    """
    if moments.weight.dim() == 1:
        return math.inf
    strength = prior_strength(embedded(gaussian, moments), moments.weight[..., 0])
    return strength if own_share(moments, strength) >= LEAST_OWN else math.inf


def own_share(moments: Moments, strength: float) -> float:
    """Return how much of a covariance a position's own images say, in [0, 1]: of the position seen most often."""
    images = float(moments.weight.max())
    return images / (images + strength)


def fit_covariances(
    model: CseGaussianModel,
    moments: Sequence[Moments],
    factors: Sequence[Tensor],
    strengths: Sequence[float],
) -> None:
    """Fit covariances, and the layers' weights.

    A position's covariance is ``(n S + v 1) / (n + v)``: its own n images have S, all images have 1 in the embedding,
    and the layer's strength v says how many images that counts for. If v is infinite, all positions have the same.

    Args:
        model: Whose directions have been fitted.
        moments: Of each layer; of every position, if its strength is finite.
        factors: See :func:`fit_directions`.
        strengths: Of each layer.
    """
    for gaussian, of_layer, factor, strength in zip(model.maps, moments, factors, strengths, strict=True):
        if math.isinf(strength):
            gaussian.set("roots", factor.sqrt().diag())
            continue
        own = (of_layer.weight / (of_layer.weight + strength))[..., None]
        shrunk = own * embedded(gaussian, of_layer) + (1 - own) * torch.eye(len(factor)).to(factor)
        gaussian.set("roots", inverse_root(shrunk) * factor.sqrt())
    dimensions = torch.stack([f.sum() for f in factors])
    model.layer_weights.copy_((dimensions / dimensions.sum()).view(1, -1, 1, 1))


def fit_scales(model: CseGaussianModel, shown: Iterable[SampledBatch], like: CseGaussianModel | None = None) -> None:
    """Fit scales by images: distances are 1 on average over them, or as they are on average with another model.

    The latter is of one whose scales are of more images than there are here.
    """
    shown = list(shown)
    means = mean_distances(model, shown)
    if like is None:
        scales = [1 / mean for mean in means]
    else:
        scales = [
            gaussian.scale * (before / after if before.shape == gaussian.scale.shape else before.mean() / after.mean())
            for gaussian, before, after in zip(like.maps, mean_distances(like, shown), means, strict=True)
        ]
    for gaussian, scale in zip(model.maps, scales, strict=True):
        gaussian.set("scale", scale)


def mean_distances(model: CseGaussianModel, shown: Iterable[SampledBatch]) -> list[Tensor]:
    """Return the mean distance of images at every position ``(h, w)``, before it is scaled, of each layer."""
    return [
        (mean_of if gaussian.has_positions else of_rows_and_columns)(*sums)
        for gaussian, sums in zip(model.maps, distances(model, shown), strict=True)
    ]


def distances(model: CseGaussianModel, shown: Iterable[SampledBatch]) -> list[tuple[Tensor, Tensor]]:
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
