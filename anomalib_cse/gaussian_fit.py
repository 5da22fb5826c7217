"""How Cse is fitted in closed form: directions, then covariances and scales, by clean and corrupted images."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from .gaussian import Moments
from .gaussian_model import GaussianModel, layer_weights, score
from .torch_model import copied

ROUNDING = 1e-12  # share of a second moment that is no variance
PRIOR = 10  # images' worth of trust in the covariance that all positions have in common
IN_COMMON = float("inf")
FEWEST = PRIOR  # images to try both with: of fewer, own covariances would count for less than half

Clean = Callable[[], Iterable[list[Tensor]]]


class Sample(NamedTuple):
    """Some of the training images, to be gone through more than once.

    ``clean`` gives their smoothed features, a ``(B, C, h, w)`` to a layer, batch by batch; ``corrupted`` those of the
    same images with synthetic defects, and the defects' masks ``(B, H, W)``.
    """

    clean: Clean
    corrupted: Callable[[], Iterable[tuple[list[Tensor], Tensor]]]


class Trial(NamedTuple):
    """AUROC of synthetic defects with one covariance that all positions have in common, and with their own."""

    in_common: float
    own: float

    @property
    def differ(self) -> bool:
        """Whether positions should have covariances of their own."""
        return self.own > self.in_common


def fit(model: GaussianModel, some: Sample, others: Sample, mirrored: Clean) -> Trial | None:
    """Fit a model's maps and the weights of its layers.

    Args:
        model: The model.
        some: Half of the training images.
        others: The other half, by which the first is tried.
        mirrored: Smoothed features of defect-free images, mirrored in all ways, so that what the images show evens out
            and what is left of a position's mean distance is the backbone's own: its padding, at the border.

    Returns:
        What decided whether positions differ. With fewer than ten images nothing is tried: they do not.

    Raises:
        ValueError: If features are not finite or all alike, if no corrupted image has a defect, or if none stands out
            in a layer.
    """
    with torch.no_grad():
        model.forget()  # so that what fails half-way is not taken for fitted
        factors = fit_directions(model, (some, others))
        embedded, more = (moments_of_positions(model, sample) for sample in (some, others))
        enough = embedded[0].weight.max() + more[0].weight.max() >= FEWEST
        trial = try_both(model, embedded, factors, some, others, mirrored) if enough else None
        for moments, rest in zip(embedded, more, strict=True):
            moments.include(rest)
        if trial is not None and trial.differ:
            fit_positions(model, embedded, factors, PRIOR, lambda: chain(some.clean(), others.clean()))
        else:
            fit_positions(model, embedded, factors, IN_COMMON, mirrored)
        return trial


def fit_directions(model: GaussianModel, samples: Sequence[Sample]) -> list[Tensor]:
    """Select every map's embedding; returns what its directions say, a ``(D,)`` to a layer; raises as ``fit`` does."""
    background, defects = ([Moments(len(m.mean), device=m.mean.device) for m in model.maps] for _ in range(2))
    for sample in samples:
        for features in sample.clean():
            for moments, f in zip(background, features, strict=True):
                moments.add(f.movedim(1, -1).flatten(0, 2))
        for features, masks in sample.corrupted():
            for moments, f in zip(defects, features, strict=True):
                cover = F.adaptive_avg_pool2d(masks[:, None].float(), (f.shape[2], f.shape[3]))
                moments.add(f.movedim(1, -1).flatten(0, 2), cover.flatten())
    if not all(moments.second.isfinite().all() for moments in (*background, *defects)):
        msg = (
            "features of the training images are NaN or infinite: so are pixels of theirs, or 16 bits "
            "(half_precision_memory, the trainer's precision) are too few for this backbone"
        )
        raise ValueError(msg)
    if not all(moments.weight > 0 for moments in defects):
        msg = "no synthetic defects to select the embedding by: their masks are empty"
        raise ValueError(msg)
    for level, moments in zip(model.backbone.levels, background, strict=True):
        power = moments.second.diagonal().sum() / moments.weight
        if moments.about(moments.mean).diagonal().sum() <= ROUNDING * power:
            msg = f"features of the training images are all alike in layer {level}: give more or larger images"
            raise ValueError(msg)
    factors = [m.fit_directions(*moments) for m, *moments in zip(model.maps, background, defects, strict=True)]
    for level, factor in zip(model.backbone.levels, factors, strict=True):
        if not factor.any():
            msg = (
                f"no synthetic defect stands out from clean images in layer {level}: leave it out of layers, "
                "or give other kinds of defects or textures (defects, dtd_dir)"
            )
            raise ValueError(msg)
    return factors


def moments_of_positions(model: GaussianModel, sample: Sample) -> list[Moments]:
    """Moments of every position's clean embeddings, of one layer after the other."""
    found = [Moments(m.directions.shape[1], m.scale.shape, m.scale.device) for m in model.maps]
    for features in sample.clean():
        for m, moments, f in zip(model.maps, found, features, strict=True):
            moments.add(m.embed(f))
    return found


def fit_positions(
    model: GaussianModel, embedded: Sequence[Moments], factors: Sequence[Tensor], prior: float, shown: Clean
) -> None:
    """Fit the maps' covariances, with ``prior`` images' worth of the common one, their scales, and the layers' weights.

    A position's scale makes 1 of its mean distance in what is ``shown``, smoothed features batch by batch.
    """
    for m, moments, factor in zip(model.maps, embedded, factors, strict=True):
        m.fit_covariances(moments, factor, prior)
    totals = [torch.zeros_like(m.scale) for m in model.maps]
    count = 0
    for features in shown():
        count += len(features[0])
        for m, total, f in zip(model.maps, totals, features, strict=True):
            total += m.distances(f).sum(dim=(0, 1))
    model.layer_weights.copy_(layer_weights(factors))
    for m, total in zip(model.maps, totals, strict=True):
        m.scale.copy_(count / total.clamp(min=torch.finfo(total.dtype).eps * count))  # images may be all alike


def try_both(
    model: GaussianModel,
    embedded: Sequence[Moments],
    factors: Sequence[Tensor],
    some: Sample,
    others: Sample,
    mirrored: Clean,
) -> Trial:
    """Fit copies of the model to ``some``, of moments ``embedded``, with either covariance; try them by ``others``.

    Parts lie alike in every image, and what is usual differs from place to place. On a surface nothing has a place: own
    covariances learn no more than the images at hand, and only the backbone's border is to be evened out, for which
    mirrored images serve. Of a part they would show things where they never lie. The directions are those of all
    images; the covariances are not, so which of the two generalises is seen.
    """
    models: list[GaussianModel] = []
    labels: list[bool] = []
    scores: tuple[list[float], list[float]] = [], []
    for prior, shown in ((IN_COMMON, mirrored), (PRIOR, some.clean)):
        models.append(copied(model))
        fit_positions(models[-1], embedded, factors, prior, shown)
    nothing = ((features, torch.zeros(len(features[0]), 1)) for features in others.clean())
    for features, masks in chain(nothing, others.corrupted()):
        labels += masks.flatten(1).any(dim=1).tolist()
        for fitted, found in zip(models, scores, strict=True):
            found += score(fitted.distances(features)).tolist()
    return Trial(*(roc_auc_score(labels, found) for found in scores))
