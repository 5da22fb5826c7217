"""The training objective of CSE: contrastive cosine loss and decoder loss (Sections 3.3 and 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def widened(values: Tensor) -> Tensor:
    """In single precision at least: in 16 bits lengths overflow, and the guard against division by 0 is 0 itself."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cosine_similarity_map(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity over the channels at every position (Eq. 1).

    Args:
        first: Embeddings ``(B, D, H, W)``.
        second: Embeddings of the same shape.

    Returns:
        Similarities ``(B, H, W)`` in [-1, 1]; 0 where a vector is zero.

    Raises:
        ValueError: If the shapes differ.
    """
    if first.shape != second.shape:
        msg = f"both embeddings must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(msg)
    return F.cosine_similarity(widened(first), widened(second), dim=1)


def contrastive_cosine_loss(first: Tensor, second: Tensor, corrupted: Tensor) -> Tensor:
    """Pull defect-free pairs together and push corrupted ones apart (Eq. 2).

    ``1 - cos`` for a clean second image, ``(1 + cos) / 2`` for a corrupted one, with the similarity averaged over
    positions.

    Args:
        first: Embeddings of the defect-free images ``(B, D, H, W)``.
        second: Embeddings of the second images ``(B, D, H, W)``.
        corrupted: Whether the second image is corrupted, ``(B,)`` bool.

    Returns:
        The mean over the batch, in [0, 2].
    """
    similarity = cosine_similarity_map(first, second).mean(dim=(1, 2))  # (B,)
    return torch.where(corrupted, (1 + similarity) / 2, 1 - similarity).mean()


def feature_reconstruction_loss(features: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean over positions of ``0.5 * |f - r|^2`` between channel vectors of unit length (Eq. 3 and 4).

    Args:
        features: Backbone features of one layer ``(B, C, H, W)``.
        reconstruction: The decoder's output for that layer, of the same shape.

    Returns:
        The mean over batch and positions, in [0, 2].

    Raises:
        ValueError: If the shapes differ.
    """
    if features.shape != reconstruction.shape:
        shapes = tuple(features.shape), tuple(reconstruction.shape)
        msg = f"a reconstruction must have the shape of its features {shapes[0]}, got {shapes[1]}"
        raise ValueError(msg)
    difference = F.normalize(widened(features), dim=1) - F.normalize(widened(reconstruction), dim=1)
    return 0.5 * difference.square().sum(dim=1).mean()


def decoder_loss(features: Sequence[Tensor], reconstructions: Sequence[Tensor]) -> Tensor:
    """Mean over layers of :func:`feature_reconstruction_loss` (Eq. 5).

    Args:
        features: Backbone features of the defect-free images, one ``(B, C, H, W)`` per layer.
        reconstructions: The decoder's outputs, in the same order.

    Returns:
        The mean over layers, in [0, 2].
    """
    return torch.stack(
        [feature_reconstruction_loss(f, r) for f, r in zip(features, reconstructions, strict=True)]
    ).mean()


class CseLoss(nn.Module):
    """The total loss, ``contrast_weight * L_contrast + L_decoder`` (Eq. 6; the paper's weight is 10).

    Args:
        contrast_weight: Weight of the contrastive loss, above 0.
    """

    def __init__(self, contrast_weight: float = 10.0) -> None:
        super().__init__()
        self.contrast_weight = contrast_weight

    def forward(
        self,
        first: Tensor,
        second: Tensor,
        corrupted: Tensor,
        features: Sequence[Tensor] = (),
        reconstructions: Sequence[Tensor] = (),
    ) -> Tensor:
        """Weight and add the terms; without reconstructions ("no decoder", Table 5) the decoder's term is left out."""
        contrast = self.contrast_weight * contrastive_cosine_loss(first, second, corrupted)
        return contrast + decoder_loss(features, reconstructions) if reconstructions else contrast
