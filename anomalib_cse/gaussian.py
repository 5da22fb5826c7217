"""Contrastively selected embedding in closed form: the directions in which defects stand out, and their distances.

The embedder of the paper is a network that learns, from clean and corrupted images, which combinations of features
tell them apart. Here it is linear, so that this has a solution: a generalised eigenproblem of two covariances, that of
clean features and that of synthetic defects. Distances follow from the same two Gaussians.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

RIDGE = 0.01  # added to a covariance, as a share of its mean variance


def inverse_root(matrix: Tensor) -> Tensor:
    """The symmetric M of ``M S M = 1`` for positive definite S ``(..., D, D)``."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.rsqrt()[..., None, :] @ vectors.mT


def contrastive_directions(clean: Tensor, defects: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The directions in which defects vary most, measured by how clean features vary.

    They solve ``defects v = ratio * clean v`` with ``v' clean v = 1``: generalised contrastive principal components.

    Args:
        clean: Covariance of clean features ``(C, C)``, positive definite.
        defects: Second moment of defects' features about the clean mean ``(C, C)``.
        dim: How many directions, of at most C.

    Returns:
        The directions ``(C, dim)`` and their ratios of variances ``(dim,)``, the largest first.
    """
    whitening = inverse_root(clean)
    ratios, rotation = torch.linalg.eigh(whitening @ defects @ whitening)
    return (whitening @ rotation).flip(1)[:, :dim], ratios.flip(0)[:dim]


def evidence(ratios: Tensor) -> Tensor:
    """What a squared deviation, in clean deviations, says for a defect: the factor of the log-likelihood ratio.

    Between a Gaussian of variance 1 and one of variance r that is ``1 - 1 / r`` (but for the constant and the half);
    directions in which defects vary less than clean features say nothing.
    """
    return 1 - 1 / ratios.clamp(min=1)


class Moments:
    """Sum of weights, mean and second moments of vectors that come in batches.

    Args:
        dim: Length C of the vectors.
        grid: Leading shape, for moments of several kinds at once.
        device: Where the vectors are; the moments are there too, if it knows double precision.
    """

    def __init__(self, dim: int, grid: Sequence[int] = (), device: torch.device | None = None) -> None:
        known = device is None or device.type in ("cpu", "cuda")
        options: dict[str, Any] = {"dtype": torch.float64, "device": device if known else "cpu"}
        self.weight = torch.zeros(*grid, 1, **options)
        self.first = torch.zeros(*grid, dim, **options)
        self.second = torch.zeros(*grid, dim, dim, **options)

    def add(self, vectors: Tensor, weights: Tensor | None = None) -> None:
        """Add vectors ``(*grid, N, C)``, of weight 1 or ``weights`` ``(*grid, N)``."""
        vectors = vectors.to(self.first)
        count = torch.ones_like(vectors[..., 0]) if weights is None else weights.to(self.first)
        weighted = vectors * count[..., None]
        self.weight += count.sum(dim=-1, keepdim=True)
        self.first += weighted.sum(dim=-2)
        self.second += weighted.mT @ vectors

    def include(self, others: "Moments") -> None:
        """Add what others have been given."""
        self.weight += others.weight
        self.first += others.first
        self.second += others.second

    @property
    def mean(self) -> Tensor:
        """``(*grid, C)``."""
        return self.first / self.weight

    def about(self, centre: Tensor) -> Tensor:
        """The second moment ``(*grid, C, C)`` about ``centre`` ``(C,)``."""
        mean = self.mean
        shift = (mean - centre)[..., None]
        central = self.second / self.weight[..., None] - mean[..., None] @ mean[..., None, :]
        return central + shift @ shift.mT


class GaussianMap(nn.Module):
    """Distances of the positions of one grid from defect-free ones.

    All that it has is in buffers of known shape, NaN until it is fitted: ``mean`` ``(C,)`` and ``directions``
    ``(C, D)`` lead to the embedding; ``roots`` ``(h, w, D, D)``, one for each position, to coordinates whose length is
    the distance; ``scale`` ``(h, w)`` makes 1 of its mean over defect-free images. Roots that are all the same are one
    ``(D, D)`` when exported.

    Args:
        channels: C, of the layer.
        dim: D, of at most C.
        grid: Height and width h, w of the map.
    """

    mean: Tensor
    directions: Tensor
    roots: Tensor
    scale: Tensor

    def __init__(self, channels: int, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels,), torch.nan))
        self.register_buffer("directions", torch.full((channels, dim), torch.nan))
        self.register_buffer("roots", torch.full((*grid, dim, dim), torch.nan))
        self.register_buffer("scale", torch.full(grid, torch.nan))

    def embed(self, features: Tensor) -> Tensor:
        """The linear embedding ``(h, w, B, D)`` of features ``(B, C, h, w)``."""
        # the mean is taken off first: a product with something added to it, OpenVINO rounds
        return (features.permute(2, 3, 0, 1) - self.mean) @ self.directions

    def forward(self, features: Tensor) -> Tensor:
        """Distances ``(B, 1, h, w)``, 1 on average, of features ``(B, C, h, w)``."""
        return self.distances(features) * self.scale

    def distances(self, features: Tensor) -> Tensor:
        """Distances ``(B, 1, h, w)`` before they are scaled."""
        coordinates = self.embed(features) @ self.roots
        # a dimension that is kept, as OpenVINO rounds one that is added
        return (coordinates * coordinates).sum(dim=-1, keepdim=True).sqrt().permute(2, 3, 0, 1)

    def fit_directions(self, clean: Moments, defects: Moments) -> Tensor:
        """Select the embedding; returns what a squared deviation along each of its directions says ``(D,)``."""
        covariance = clean.about(clean.mean)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        directions, ratios = contrastive_directions(covariance, defects.about(clean.mean), self.directions.shape[1])
        self.directions.copy_(directions)
        self.mean.copy_(clean.mean)
        return evidence(ratios)

    def fit_covariances(self, embedded: Moments, factors: Tensor, prior: float) -> None:
        """Give every position its covariance: its own, shrunk to the common one, which is 1, as far as images are few.

        Args:
            embedded: Moments of every position's embeddings.
            factors: Of the squared deviations ``(D,)``.
            prior: How many images the common one counts for, in (0, inf].
        """
        own = (embedded.weight / (embedded.weight + prior))[..., None]
        shrunk = own * embedded.about(torch.zeros_like(factors)) + (1 - own) * torch.eye(len(factors)).to(factors)
        self.roots.copy_(inverse_root(shrunk) * factors.sqrt())
