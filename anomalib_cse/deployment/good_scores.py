"""Thresholds from good images alone: how their scores spread where a fit has not seen them."""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from anomalib.data import InferenceBatch
from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor

FEWEST = 5  # images: of fewer, the deviation is anyone's guess
CONFIDENCE = 0.9  # of the interval of rates
ALIKE = 1e-3  # least deviation of log scores: runtimes differ by a tenth of that
CHANCE = 0.01  # of saying that scores have risen if they have not
SUSPICION = 0.05  # chance that one of all training images is suspected, if all are good


def logarithms(scores: Tensor) -> Tensor:
    """Return the logarithms of scores in [0, inf), in double precision; of 0 a large negative number."""
    return scores.double().clamp(min=torch.finfo(torch.float32).tiny).log()


def extremes(scored: InferenceBatch) -> Tensor:
    """Return the scores of B images and the highest values of their maps ``(2, B)``."""
    scores, maps = cast(Tensor, scored.pred_score), cast(Tensor, scored.anomaly_map)
    return torch.stack([scores, maps.amax(dim=(1, 2, 3))]).cpu()


class UnseenScores(NamedTuple):
    """Scores of good images by fits that have not seen them, and the highest values of their maps, ``(N,)`` each.

    ``varied`` ``(2, M)`` are both of such images as another day, lamp, lens or camera may give them.
    """

    images: Tensor
    pixels: Tensor
    paths: list[str]
    varied: Tensor = torch.zeros(2, 0)

    @classmethod
    def of(cls, found: Iterable[Tensor], paths: list[str], varied: Iterable[Tensor] = ()) -> "UnseenScores":
        """Collect the :func:`extremes` of batches, of images with these paths, and of varied ones."""
        images, pixels = torch.cat(list(found), dim=1)
        return cls(images, pixels, paths, torch.cat([torch.zeros(2, 0), *varied], dim=1))

    def suspicious(self) -> list[tuple[str, float]]:
        """Return the paths of images whose scores the others do not explain, and their scores, the highest first.

        Each is compared with the others' distribution; all of them together are suspected wrongly in ``SUSPICION`` of
        all fits (Bonferroni).
        """
        logs = logarithms(self.images)
        logs, others = logs - logs.mean(), len(logs) - 1
        means = -logs / others  # of all but one, as all have a sum of 0
        variances = (logs.square().sum() - logs.square() - others * means.square()) / (others - 1)
        like_others = GoodScores(others, 0.0, 1.0).deviations(SUSPICION / len(logs))
        far = logs - means > like_others * variances.clamp(min=ALIKE**2).sqrt()
        found = [(self.paths[place], float(self.images[place])) for place in far.nonzero().flatten().tolist()]
        return sorted(found, key=lambda pair: -pair[1])


class GoodScores(NamedTuple):
    """How scores of good images spread: their logarithms are taken for normal.

    Attributes:
        number: Of images, at least 2.
        mean: Of the logarithms.
        deviation: Of the logarithms, with one less than their number in the denominator.
    """

    number: int
    mean: float
    deviation: float

    @classmethod
    def of(cls, scores: Tensor, varied: Tensor | None = None) -> "GoodScores":
        """Return the spread of scores ``(N,)`` in [0, inf), or of an equal mixture with those of ``varied`` ones.

        However many these are: they are some of the same images, and tell no more about how many there are.
        """
        parts = [logarithms(part) for part in (scores, varied) if part is not None and len(part)]
        means, variances = (torch.stack(found) for found in zip(*((p.mean(), p.var()) for p in parts), strict=True))
        variance = variances.mean() + means.var(correction=0)
        return cls(len(scores), float(means.mean()), max(float(variance.sqrt()), ALIKE))

    def moved(self, before: "GoodScores", after: "GoodScores", share: float = 1.0) -> "GoodScores":
        """Return what becomes of the spread when that of some of the images does so, and a ``share`` of all counts."""
        deviation = max(self.deviation * after.deviation / before.deviation, ALIKE)
        return GoodScores(round(self.number * share), self.mean + after.mean - before.mean, deviation)

    def joined(self, other: "GoodScores") -> "GoodScores":
        """Return the spread of both kinds of images together."""
        if not self.number:
            return other
        both = self, other
        number = self.number + other.number
        mean = sum(part.number * part.mean for part in both) / number
        squares = sum((part.number - 1) * part.deviation**2 + part.number * (part.mean - mean) ** 2 for part in both)
        return GoodScores(number, mean, max((squares / (number - 1)) ** 0.5, ALIKE))

    def deviations(self, rate: float) -> float:
        """Return how many deviations above the mean another image's score is with a probability of ``rate``."""
        return float(student.isf(rate, self.number - 1)) * (1 + 1 / self.number) ** 0.5

    def threshold(self, rate: float) -> float:
        """Return the score above which another good image is with a probability of ``rate``, in (0, 1).

        That is a quantile of the predictive distribution, Student's t: mean and deviation are known from few images.
        """
        return float(torch.tensor(self.mean + self.deviation * self.deviations(rate)).exp())

    def rate(self, threshold: float) -> float:
        """Return the probability that another good image's score is above a threshold."""
        distance = (float(torch.tensor(threshold).log()) - self.mean) / self.deviation
        return float(student.sf(distance / (1 + 1 / self.number) ** 0.5, self.number - 1))

    def largest_rise(self, count: int) -> float:
        """Return by how many deviations the mean logarithm of so many new scores may lie higher, but for ``CHANCE``."""
        return self.errors * (1 / self.number + 1 / count) ** 0.5

    @property
    def errors(self) -> float:
        """How many standard errors a second mean may lie higher, but for ``CHANCE``."""
        return float(student.isf(CHANCE, self.number - 1))

    def interval(self, rate: float) -> tuple[float, float]:
        """Return between which rates that threshold will reject good images, with a probability of ``CONFIDENCE``.

        The threshold's distance from the true mean, in true deviations, has the variance that a normal quantile has in
        large samples, which does for 5 images too.
        """
        distance, tail = self.deviations(rate), float(norm.isf((1 - CONFIDENCE) / 2))
        error = tail * (1 / self.number + distance**2 / (2 * (self.number - 1))) ** 0.5
        return float(norm.sf(distance + error)), float(norm.sf(distance - error))
