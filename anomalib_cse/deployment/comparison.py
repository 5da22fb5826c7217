"""Whether new good images still score like those that a threshold was set by."""

from pathlib import Path
from typing import NamedTuple, cast

import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.models.components import AnomalibModule
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from .good_scores import GoodScores, logarithms
from .post_processing import MidwayPostProcessor, spread


class Comparison(NamedTuple):
    """Scores of new good images beside those that a threshold was set by.

    Attributes:
        number: Of new images.
        expected: Share of them that should be rejected.
        measured: Share that is.
        shift: How far their mean logarithm lies above the old one, in old deviations.
        has_moved: Whether they have risen by more than chance gives, which would say so once in a hundred times.
    """

    number: int
    expected: float
    measured: float
    shift: float
    has_moved: bool

    @classmethod
    def of(cls, good: GoodScores, scores: Tensor, threshold: float) -> "Comparison":
        """Compare scores ``(N,)`` of new good images with what those of training images let expect."""
        shift = (float(logarithms(scores).mean()) - good.mean) / good.deviation
        # scores may well lie lower: the threshold is also of images that variations have changed
        has_moved = shift > good.largest_rise(len(scores))
        return cls(len(scores), good.rate(threshold), float((scores > threshold).double().mean()), shift, has_moved)

    def __str__(self) -> str:
        """Say it in a sentence."""
        verdict = "the threshold does not fit them" if self.has_moved else "no higher than chance explains"
        return (
            f"Of {self.number} new good images {100 * self.measured:.3g} % are rejected, {100 * self.expected:.3g} % "
            f"expected; their scores have moved by {self.shift:+.1f} deviations: {verdict}."
        )


@torch.no_grad()
def compare_good_images(model: AnomalibModule, folder: str | Path) -> Comparison:
    """Score a folder of new good images, and compare the scores with those of training images that no fit had seen.

    Raises:
        ValueError: If the model was fitted without a ``reject_rate``, so that those are not known, or the folder has no
            images.
    """
    own = model.post_processor
    if not isinstance(own, MidwayPostProcessor) or not own.knows_good_scores:
        msg = "no fit has told how scores of good images spread: fit the model with a reject_rate"
        raise ValueError(msg)
    # one by one: images of different sizes would be stretched to the largest of a batch
    loader = DataLoader(PredictDataset(path=folder), collate_fn=ImageBatch.collate)
    scores = []
    for batch in track(loader, description="Scoring new images"):
        images = cast(Tensor, batch.image).to(model.device)
        images = model.pre_processor(images) if model.pre_processor else images
        scores.append(model.score(images).pred_score.cpu())  # type: ignore[operator]
    return Comparison.of(spread(own.good_images), torch.cat(scores), own.cut)
