"""What a checkpoint keeps of a fit, so that the model can learn on: sums, and a few of the good images."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..synthesis import Stream
from .fit import Fit
from .moments import Moments
from .sample import SampledImage, TrainingSample, draw

KEPT = 24  # images, in 8 bits, by which scales and scores are compared before and after


class Sums(NamedTuple):
    """What a model was fitted by, in little room.

    Attributes:
        good: How many good images the moments are of, less what has been forgotten.
        known: How many known defects have been learnt.
        moments: Of good images, of each layer; of every position where positions have covariances of their own.
        fitted: The rest of the moments.
        images: A sample of the good images as the network sees them, ``(3, H, W)`` in 8 bits; each one's fold, and how
            much of it is in the moments.
    """

    good: int
    known: int
    moments: list[Moments]
    fitted: Fit
    images: list[tuple[Tensor, int, float]]

    @classmethod
    def of(cls, sample: TrainingSample, fitted: Fit, seed: int) -> "Sums":
        """Return the sums of a fit, and a sample of its sample."""
        places = draw(min(KEPT, len(sample.kept)), len(sample.kept), seed, Stream.KEPT_IMAGES)
        return cls(
            sample.count,
            round(float(fitted.known[0].weight)),
            where_needed(sample.moments, fitted.strengths),
            fitted,
            [in_8_bits(sample.kept[place]) for place in sorted(places)],
        )

    def packed(self) -> dict[str, Any]:
        """Return all that as numbers and tensors."""
        fitted = self.fitted
        return {
            "good": self.good,
            "known": self.known,
            "moments": [packed(m) for m in self.moments],
            "defects": [[packed(m) for m in fold] for fold in fitted.defects],
            "changes": [[packed(m) for m in fold] for fold in fitted.changes],
            "known_moments": [packed(m) for m in fitted.known],
            "strengths": list(fitted.strengths),
            "images": [list(image) for image in self.images],
        }

    @classmethod
    def unpacked(cls, values: Mapping[str, Any]) -> "Sums":
        """Return what :meth:`packed` gave."""
        fitted = Fit(
            [[unpacked(m) for m in fold] for fold in values["defects"]],
            [[unpacked(m) for m in fold] for fold in values["changes"]],
            [unpacked(m) for m in values["known_moments"]],
            list(values["strengths"]),
        )
        images = [(image, int(fold), float(share)) for image, fold, share in values["images"]]
        return cls(values["good"], values["known"], [unpacked(m) for m in values["moments"]], fitted, images)


def where_needed(moments: Sequence[Moments], strengths: Sequence[float]) -> list[Moments]:
    """Return moments of all positions together where these share one covariance."""
    return [m.pooled() if strength == torch.inf else m for m, strength in zip(moments, strengths, strict=True)]


def in_8_bits(one: SampledImage) -> tuple[Tensor, int, float]:
    """Return a sampled image's pixels in 8 bits, its fold and its share."""
    return (255 * one.image.clamp(0, 1)).round().to(torch.uint8).cpu(), one.fold, one.share


def packed(moments: Moments) -> dict[str, Tensor]:
    """Return moments, the second ones without what symmetry tells, on the CPU."""
    rows, columns = torch.triu_indices(*moments.second.shape[-2:])
    second = moments.second[..., rows, columns]
    return {"weight": moments.weight.cpu(), "first": moments.first.cpu(), "second": second.cpu()}


def unpacked(values: Mapping[str, Tensor]) -> Moments:
    """Return the moments that :func:`packed` gave."""
    first = values["first"]
    dim = first.shape[-1]
    rows, columns = torch.triu_indices(dim, dim)
    second = first.new_zeros(*first.shape, dim)
    second[..., rows, columns] = values["second"]
    second[..., columns, rows] = values["second"]
    return Moments(1).of_sums(values["weight"], first, second)
