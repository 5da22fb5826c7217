"""Moments of features, and the directions that follow from them."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

RIDGE = 0.01  # added to a covariance, as a share of its mean variance
STRONGEST = 1e6  # images that a prior may count for: more leave positions nothing of their own
TINY = 1e-300  # a weight that divides nothing by nothing: outside of a region of interest there are no vectors


def inverse_root(matrix: Tensor) -> Tensor:
    """Return the symmetric M of ``M S M = 1`` for positive definite S ``(..., D, D)``."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.rsqrt()[..., None, :] @ vectors.mT


def contrastive_directions(clean: Tensor, defects: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the ``dim`` directions ``(C, dim)`` in which defects vary most, measured by how clean features vary.

    They solve ``defects v = ratio * clean v`` with ``v' clean v = 1``: generalised contrastive principal components.

    Args:
        clean: Covariance of clean features ``(C, C)``, positive definite.
        defects: Second moment of defects' features about the clean mean ``(C, C)``.
        dim: How many directions, of at most C.

    Returns:
        The directions, and their ratios of variances ``(dim,)``, the largest first.
    """
    whitening = inverse_root(clean)
    ratios, rotation = torch.linalg.eigh(whitening @ defects @ whitening)
    return (whitening @ rotation).flip(1)[:, :dim], ratios.flip(0)[:dim]


def direction_weights(ratios: Tensor) -> Tensor:
    """Return what a squared deviation, in clean deviations, says for a defect: the factor of the log-likelihood ratio.

    Between a Gaussian of variance 1 and one of variance r that is ``1 - 1 / r`` (but for the constant and the half);
    directions in which defects vary less than clean features say nothing.
    """
    return 1 - 1 / ratios.clamp(min=1)


def log_evidence(strength: float, variances: Tensor, counts: Tensor) -> float:
    """Return the log marginal likelihood of positions' second moments, but for what does not depend on the strength.

    At a position, n vectors of D numbers come from a Gaussian of mean 0, whose covariance comes from an inverse Wishart
    prior with a mean of 1 and ``strength + D + 1`` degrees of freedom. Given the vectors, that covariance has the mean
    ``(n S + strength) / (n + strength)``.

    Args:
        strength: How many vectors the prior counts for, above 0.
        variances: Eigenvalues of the positions' second moments S, ``(P, D)``.
        counts: How many vectors these are of, n ``(P,)``.
    """
    dim = variances.shape[-1]
    before = torch.full_like(counts, (strength + dim + 1) / 2)
    after = before + counts / 2
    powers = before * dim * math.log(strength) - after * (strength + counts[:, None] * variances).log().sum(dim=-1)
    volumes = torch.special.multigammaln(after, dim) - torch.special.multigammaln(before, dim)
    return float((powers + volumes).sum())


def prior_strength(second: Tensor, counts: Tensor) -> float:
    """Return the strength, up to ``STRONGEST``, of the likeliest prior of positions' covariances: see ``log_evidence``.

    Args:
        second: The positions' second moments ``(..., D, D)``; they are 1 on average.
        counts: How many vectors they are of ``(...)``.
    """
    variances = torch.linalg.eigvalsh(second).clamp(min=0).flatten(0, -2)

    def cost(logarithm: float) -> float:
        return -log_evidence(math.exp(logarithm), variances, counts.flatten())

    return math.exp(minimize_scalar(cost, bounds=(0, math.log(STRONGEST)), method="bounded").x)


class Moments:
    """Sum of weights, mean and second moments of vectors that come in batches.

    Args:
        dim: Length C of the vectors.
        grid: Leading shape, for moments of several kinds at once.
        device: Where the vectors are; the moments are there too, if it knows double precision.
    """

    def __init__(self, dim: int, grid: Sequence[int] = (), device: torch.device | None = None) -> None:
        known = device is None or device.type in ("cpu", "cuda")
        place = device if known else torch.device("cpu")
        self.weight = torch.zeros(*grid, 1, dtype=torch.float64, device=place)
        self.first = torch.zeros(*grid, dim, dtype=torch.float64, device=place)
        self.second = torch.zeros(*grid, dim, dim, dtype=torch.float64, device=place)

    def add(self, vectors: Tensor, weights: Tensor | None = None) -> None:
        """Add vectors ``(*grid, N, C)``, of weight 1 or ``weights`` ``(*grid, N)``."""
        vectors = vectors.to(self.first)
        count = torch.ones_like(vectors[..., 0]) if weights is None else weights.to(self.first)
        weighted = vectors * count[..., None]
        self.weight += count.sum(dim=-1, keepdim=True)
        self.first += weighted.sum(dim=-2)
        second = self.second.view(-1, *self.second.shape[-2:])  # of all kinds
        shape = (len(second), *vectors.shape[-2:])
        # in place: a product made first and added next to what is kept for good would leave the heap in fragments
        second.baddbmm_(weighted.reshape(shape).mT, vectors.reshape(shape))

    def add_maps(self, features: Tensor, weights: Tensor) -> None:
        """Add feature maps ``(B, C, h, w)``, of weights ``(B, h, w)``; a grid has every position for itself."""
        at_positions, of_positions = features.permute(2, 3, 0, 1), weights.permute(1, 2, 0)  # (h, w, B, C), (h, w, B)
        if self.weight.dim() == 1:
            at_positions, of_positions = at_positions.flatten(0, 2), of_positions.flatten()
        self.add(at_positions, of_positions)

    def of_sums(self, weight: Tensor, first: Tensor, second: Tensor) -> "Moments":
        """Return moments of other sums."""
        moments = copy.copy(self)
        moments.weight, moments.first, moments.second = weight, first, second
        return moments

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of all vectors that either has been given."""
        return self.of_sums(self.weight + other.weight, self.first + other.first, self.second + other.second)

    def __sub__(self, other: "Moments") -> "Moments":
        """Return the moments of the vectors that this one has been given and ``other``, given some of them, has not."""
        return self.of_sums(self.weight - other.weight, self.first - other.first, self.second - other.second)

    def times(self, factor: float) -> "Moments":
        """Return the moments of the same vectors, each of so many times its weight."""
        return self.of_sums(self.weight * factor, self.first * factor, self.second * factor)

    def to(self, other: Tensor) -> "Moments":
        """Return the same moments on the device of a tensor."""
        return self.of_sums(*(values.to(other.device) for values in (self.weight, self.first, self.second)))

    def pooled(self) -> "Moments":
        """Return the moments of the vectors of all kinds taken together."""
        kinds = tuple(range(self.weight.dim() - 1))
        if not kinds:  # torch's sum over no dimension is one over all
            return self
        return self.of_sums(self.weight.sum(kinds), self.first.sum(kinds), self.second.sum(kinds))

    def summed(self, reduce: Callable[[Tensor], Tensor]) -> "Moments":
        """Return the moments of the vectors of several processes, by a function that sums a tensor over them."""
        return self.of_sums(reduce(self.weight), reduce(self.first), reduce(self.second))

    @property
    def mean(self) -> Tensor:
        """The mean ``(*grid, C)``; 0 of no vectors."""
        return self.first / self.weight.clamp(min=TINY)

    def about(self, centre: Tensor) -> Tensor:
        """Return the second moment ``(*grid, C, C)`` about ``centre`` ``(C,)``."""
        mean = self.mean
        shift = (mean - centre)[..., None]
        central = self.second / self.weight[..., None].clamp(min=TINY) - mean[..., None] @ mean[..., None, :]
        return central + shift @ shift.mT
