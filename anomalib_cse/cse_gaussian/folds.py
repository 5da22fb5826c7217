"""Cross-validation: training images scored by fits that have not seen them."""

import copy
from itertools import chain

import torch

from ..deployment import UnseenScores, extremes
from .fit import Fit, fit_common, fit_directions, fit_own, over_folds
from .moments import Moments
from .sample import TrainingSample, batches
from .torch_model import CseGaussianModel


@torch.no_grad()
def unseen_scores(model: CseGaussianModel, sample: TrainingSample, fitted: Fit) -> UnseenScores:
    """Score the sampled images, each fold by a fit to all other images and to the defects drawn into them.

    Whether positions differ is not tried again. The sample's sums are used up, as those here take their place.
    """
    trial = copy.deepcopy(model, {id(model.backbone): model.backbone})  # which features have passed already
    size = model.image_size.tolist()
    moments = [a + b for a, b in zip(*(half.moments for half in sample.halves), strict=True)]
    for half in sample.halves:
        half.moments.clear()
    if not fitted.differ:
        moments = [m.pooled() for m in moments]
    folds, scored = sample.folds(), []
    for number, unseen in enumerate(folds):
        of_unseen = [Moments(m.first.shape[-1], m.first.shape[:-1], m.first.device) for m in moments]
        for features in batches(unseen.features):
            for m, f in zip(of_unseen, features, strict=True):
                m.add_maps(f)
        left = [m - u for m, u in zip(moments, of_unseen, strict=True)]
        defects = over_folds([of_fold for other, of_fold in enumerate(fitted.defects) if other != number])
        factors = fit_directions(trial, [m.pooled() for m in left], defects)
        seen = batches(list(chain.from_iterable(fold.features for fold in folds if fold is not unseen)))
        if fitted.differ:
            fit_own(trial, left, factors, seen)
        else:
            fit_common(trial, factors, seen)
        scored += [extremes(trial.score(features, size)) for features in batches(unseen.features)]
        del of_unseen, left  # before the next ones are made
    return UnseenScores.of(scored, list(chain.from_iterable(fold.paths for fold in folds)))
