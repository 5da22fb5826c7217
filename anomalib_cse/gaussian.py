"""Contrastively selected embedding in closed form: the directions in which defects stand out, and their distances.

The embedder of the paper is a network that learns, from clean and corrupted images, which combinations of features
tell them apart. Here it is linear, so that this has a solution: a generalised eigenproblem of two covariances, that of
clean features and that of synthetic defects. Distances follow from the same two Gaussians.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RIDGE = 0.01  # added to a covariance, as a share of its mean variance
PRIOR = 30  # images' worth of trust in the covariance that all positions have in common


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
    return (1 - 1 / ratios.clamp(min=1)).clamp(min=0)


class Moments:
    """Sum of weights, mean and second moments of vectors that come in batches.

    Args:
        dim: Length C of the vectors.
        cells: Leading shape, for moments of several kinds at once.
        device: Where the vectors are; the moments are there too, if it knows double precision.
    """

    def __init__(self, dim: int, cells: Sequence[int] = (), device: torch.device | None = None) -> None:
        known = device is None or device.type in ("cpu", "cuda")
        options: dict[str, Any] = {"dtype": torch.float64, "device": device if known else "cpu"}
        self.weight = torch.zeros(*cells, 1, **options)
        self.first = torch.zeros(*cells, dim, **options)
        self.second = torch.zeros(*cells, dim, dim, **options)

    def add(self, vectors: Tensor, weights: Tensor | None = None) -> None:
        """Add vectors ``(*cells, N, C)``, of weight 1 or ``weights`` ``(*cells, N)``."""
        vectors = vectors.to(self.first)
        count = torch.ones_like(vectors[..., 0]) if weights is None else weights.to(self.first)
        weighted = vectors * count[..., None]
        self.weight += count.sum(dim=-1, keepdim=True)
        self.first += weighted.sum(dim=-2)
        self.second += weighted.mT @ vectors

    @property
    def mean(self) -> Tensor:
        """``(*cells, C)``."""
        return self.first / self.weight

    def about(self, centre: Tensor) -> Tensor:
        """The second moment ``(*cells, C, C)`` about ``centre`` ``(C,)``."""
        mean = self.mean
        shift = (mean - centre)[..., None]
        central = self.second / self.weight[..., None] - mean[..., None] @ mean[..., None, :]
        return central + shift @ shift.mT


class GaussianMap(nn.Module):
    """Distances of the positions of one grid from defect-free ones.

    All that it has is in buffers of known shape, NaN until it is fitted: ``projection`` ``(1, 1, D, C)`` and
    ``offset`` ``(D, 1)`` lead to the embedding; ``roots`` ``(rows, columns, D, D)``, one for a cell of positions, to
    coordinates whose length is the distance; ``scale`` ``(h, w)`` makes 1 of its mean over defect-free images.

    Args:
        channels: C, of the layer.
        dim: D, at most; fewer than that if C is smaller.
        grid: Height and width h, w of the map.
        cell: Positions to a cell along each axis.
    """

    projection: Tensor
    offset: Tensor
    roots: Tensor
    scale: Tensor

    def __init__(self, channels: int, dim: int, grid: tuple[int, int], cell: int) -> None:
        super().__init__()
        dim = min(channels, dim)
        self.grid, self.cell, self.cells = grid, cell, (-(-grid[0] // cell), -(-grid[1] // cell))
        self.register_buffer("projection", torch.full((1, 1, dim, channels), torch.nan))
        self.register_buffer("offset", torch.full((dim, 1), torch.nan))
        self.register_buffer("roots", torch.full((*self.cells, dim, dim), torch.nan))
        self.register_buffer("scale", torch.full(grid, torch.nan))

    def in_cells(self, values: Tensor) -> Tensor:
        """``(B, K, h, w)`` as ``(rows, columns, N, K)``: the N positions of each cell, zeros for those it lacks."""
        (rows, columns), cell = self.cells, self.cell
        missing = rows * cell - self.grid[0], columns * cell - self.grid[1]
        if any(missing):
            values = F.pad(values, (0, missing[1], 0, missing[0]))
        blocks = values.reshape(-1, values.shape[1], rows, cell, columns, cell)
        return blocks.permute(2, 4, 0, 3, 5, 1).reshape(rows, columns, -1, values.shape[1])

    def embed(self, features: Tensor) -> Tensor:
        """The linear embedding ``(B, D, h, w)`` of features ``(B, C, h, w)``."""
        # constant times variable: the other way round, or as a convolution, OpenVINO rounds it
        embedded = self.projection @ features.reshape(-1, 1, features.shape[1], features[0, 0].numel()) + self.offset
        return embedded.reshape(-1, len(self.offset), *self.grid)

    def forward(self, features: Tensor) -> Tensor:
        """Distances ``(B, 1, h, w)``, 1 on average, of features ``(B, C, h, w)``."""
        return self.distances(features) * self.scale

    def distances(self, features: Tensor) -> Tensor:
        """Distances ``(B, 1, h, w)`` before they are scaled."""
        coordinates = (self.in_cells(self.embed(features)) @ self.roots).permute(2, 3, 0, 1)  # (N, D, rows, columns)
        squared = (coordinates * coordinates).sum(dim=1, keepdim=True)
        height, width = self.grid
        if self.cell > 1:
            squared = F.pixel_shuffle(squared.reshape(-1, self.cell**2, *self.cells), self.cell)
        return squared[..., :height, :width].sqrt()

    def fit_directions(self, clean: Moments, defects: Moments) -> Tensor:
        """Select the embedding; returns what a squared deviation along each of its directions says ``(D,)``."""
        covariance = clean.about(clean.mean)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        directions, ratios = contrastive_directions(covariance, defects.about(clean.mean), len(self.offset))
        self.projection.copy_(directions.T)
        self.offset.copy_(-(clean.mean @ directions)[:, None])
        return evidence(ratios)

    def fit_covariances(self, embedded: Moments, factors: Tensor, images: int) -> None:
        """Give every cell its covariance: its own, shrunk to the common one, which is 1, as far as images are few.

        Args:
            embedded: Moments of every cell's embeddings.
            factors: Of the squared deviations ``(D,)``.
            images: How many images they are from.
        """
        own = images / (images + PRIOR)
        shrunk = own * embedded.about(torch.zeros_like(factors)) + (1 - own) * torch.eye(len(factors)).to(factors)
        self.roots.copy_(inverse_root(shrunk) * factors.sqrt())
