"""Whether positions should have covariances of their own, tried by how far synthetic defects stand out."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .corrupted import Corrupted
from .sample import Seen
from .torch_model import CseGaussianModel, cover, image_score, positions_inside

ALIKE = 1e-3  # deviation of log distances below which images are copies of one another


class Separation(NamedTuple):
    """How far synthetic defects stand out, in deviations of clean logarithms: positions' distances, images' scores."""

    positions: float
    images: float


class Trial(NamedTuple):
    """How far synthetic defects stand out with one covariance for all positions, and with their own."""

    in_common: Separation
    own: Separation

    @property
    def differ(self) -> bool:
        """Whether positions should have covariances of their own: those are to be better in both respects."""
        return self.own.positions > self.in_common.positions and self.own.images > self.in_common.images

    def __str__(self) -> str:
        """Say what has been chosen and why."""
        shared, own = self.in_common, self.own
        return (
            f"{'Each position has a covariance of its own' if self.differ else 'All positions share one covariance'}. "
            "Tried on held-out training images, synthetic defects stand out, in standard deviations, by "
            f"{shared.positions:.2f} at positions and {shared.images:.2f} in scores of images with a shared one, by "
            f"{own.positions:.2f} and {own.images:.2f} with their own; own ones are taken if both are higher"
        )


def separation(model: CseGaussianModel, clean: Iterable[Seen], corrupted: Iterable[Corrupted]) -> Separation:
    """Return how far defects stand out of clean features: of logarithms, the difference of means in deviations.

    Positions are many where images are few, so a few defects suffice to tell two models apart by their distances. But
    an image's score is of few positions, of which their mean says nothing: so images' scores are compared as well.
    Deviations are those of clean features, or ``ALIKE`` if that is more.
    """

    def logs(seen: Seen | Corrupted) -> tuple[Tensor, Tensor, Tensor | None]:
        joint = model.joint_distances(seen.features)
        inside = None if seen.inside is None else positions_inside(seen.inside, model.stride)
        tiny = torch.finfo(joint.dtype).tiny
        # not all devices know double
        of_positions, of_images = (
            values.clamp(min=tiny).log().cpu().double() for values in (joint, image_score(joint, inside))
        )
        return of_positions, of_images, inside

    def deviations(mean: Tensor, usual: Tensor) -> float:
        return float((mean - usual.mean()) / usual.std(correction=0).clamp(min=ALIKE))

    distances, scores = [], []
    for seen in clean:
        of_positions, of_images, inside = logs(seen)
        distances.append(of_positions.flatten() if inside is None else of_positions[inside.cpu()])
        scores.append(of_images)
    total = covered = torch.zeros((), dtype=torch.float64)
    corrupted_scores = []
    for drawn in corrupted:
        of_positions, of_images, _ = logs(drawn)
        weights = cover(drawn.masks.cpu().double(), of_positions.shape[-2:])
        total, covered = total + (weights * of_positions).sum(), covered + weights.sum()
        corrupted_scores.append(of_images)
    of_defects, of_corrupted = total / covered, torch.cat(corrupted_scores).mean()
    return Separation(deviations(of_defects, torch.cat(distances)), deviations(of_corrupted, torch.cat(scores)))
