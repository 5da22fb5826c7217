"""Cross-validation: training images scored by fits that have not seen them."""

import copy
import math
from collections.abc import Sequence

import torch

from ..deployment import UnseenScores, extremes
from .fit import Fit, fit_covariances, fit_directions, fit_scales, over_folds
from .known import with_known
from .moments import Moments
from .sample import FOLDS, TrainingSample, batches
from .torch_model import CseGaussianModel
from .variations import varied_features

OF_FOLD = 16  # most images of a fold that are scored as variations change them


@torch.no_grad()
def unseen_scores(
    model: CseGaussianModel,
    sample: TrainingSample,
    fitted: Fit,
    variations: Sequence[str],
    seed: int,
    *,
    of_more: bool = False,
) -> UnseenScores:
    """Score the images of each fold by a fit to the other folds: to their features, defects and variations.

    The strengths stay those of the whole fit. Some images of a fold are scored once more, each changed by one of the
    variations in turn. The sample has no sums afterwards: memory is enough for one set of them. If the model's scales
    are ``of_more`` images than are sampled, those of the fits differ from them as their distances do.
    """
    partial = copy.deepcopy(model, {id(model.backbone): model.backbone})  # which features have passed already
    moments, sample.moments = sample.moments, []
    if all(map(math.isinf, fitted.strengths)):
        moments = [m.pooled() for m in moments]
    scored, varied, paths = [], [], []
    for number in range(FOLDS):
        unseen = [one for one in sample.kept if one.fold == number]
        of_unseen = [Moments(m.first.shape[-1], m.first.shape[:-1], m.first.device) for m in moments]
        for seen in batches(unseen):
            for layer, (m, f) in enumerate(zip(of_unseen, seen.features, strict=True)):
                m.add_maps(f, seen.weights(layer))
        left = [m - u for m, u in zip(moments, of_unseen, strict=True)]
        defects, changes = (over_folds(without(of_folds, number)) for of_folds in (fitted.defects, fitted.changes))
        factors = fit_directions(partial, [m.pooled() for m in left], with_known(defects, fitted.known), changes)
        others = [one for one in sample.kept if one.fold != number]
        fit_covariances(partial, left, factors, fitted.strengths)
        fit_scales(partial, batches(others), model if of_more else None)
        for seen in batches(unseen):
            scored.append(extremes(partial.score(seen.features, seen.images.shape[-2:], seen.inside)))
        for place, kind in enumerate(variations):
            in_turn = unseen[place : OF_FOLD : len(variations)]
            for seen, features in varied_features(model, in_turn, kind, seed, number, place):
                varied.append(extremes(partial.score(features, seen.images.shape[-2:], seen.inside)))
        paths += [one.path for one in unseen]
        del of_unseen, left  # before the next ones are made
    return UnseenScores.of(scored, paths, varied)


def without(of_folds: Sequence[list[Moments]], number: int) -> list[list[Moments]]:
    """Return the moments of all folds but one."""
    return [of_fold for other, of_fold in enumerate(of_folds) if other != number]
