"""Training images with synthetic defects, and the moments of these."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.progress import track
from torch import Tensor

from ..synthesis import AnomalySynthesis, Stream, generator_for
from .moments import Moments
from .sample import BATCH, FOLDS, SampledImage, batches, draw, in_one_pass
from .torch_model import CseGaussianModel, cover


class Corrupted(NamedTuple):
    """B images with synthetic defects, whose masks are ``(B, 1, H, W)``; the rest is as in a sampled batch."""

    features: list[Tensor]
    masks: Tensor
    inside: Tensor | None
    folds: Sequence[int]


def corrupted_features(
    model: CseGaussianModel, kept: Sequence[SampledImage], synthesis: AnomalySynthesis, count: int, seed: int
) -> Iterator[Corrupted]:
    """Give the features of so many sampled images with synthetic defects, and the defects' masks."""
    drawn = [kept[place] for place in draw(count, len(kept), seed, Stream.DEFECTIVE_IMAGES)]
    done = 0
    passes = -(-count // min(BATCH, in_one_pass(drawn[0].image.shape[1:])))
    for seen in track(batches(drawn), description="Painting synthetic defects", total=passes):
        params = synthesis.sample(seen.images.shape, generator_for(seed, Stream.DEFECTS, done))
        masks = params.mask.to(seen.images.device)
        features = model.smoothed_features(synthesis.apply(seen.images, params), seen.inside)
        yield Corrupted(features, masks if seen.inside is None else masks * seen.inside, seen.inside, seen.folds)
        done += len(seen.images)


def defect_moments(corrupted: Iterable[Corrupted], like: Sequence[Moments]) -> list[list[Moments]]:
    """Return moments of the features of synthetic defects, by fold and layer; those of ``like`` are of these layers."""
    folds = [[Moments(m.first.shape[-1], device=m.first.device) for m in like] for _ in range(FOLDS)]
    for drawn in corrupted:
        for layer, f in enumerate(drawn.features):
            covered = cover(drawn.masks, f.shape[-2:])
            for fold, vectors, weights in zip(drawn.folds, f.movedim(1, -1), covered, strict=True):
                folds[fold][layer].add(vectors.flatten(0, 1), weights.flatten())
    return folds
