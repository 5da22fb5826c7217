"""The training objective of CSE: contrastive cosine loss and decoder loss (Sections 3.3 and 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def widened(values: Tensor) -> Tensor:
    """Return values in single precision at least: in 16 bits lengths overflow, and the guard against 0 is 0 itself."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_shapes(first: Tensor, second: Tensor) -> None:
    """Raise a ``ValueError`` unless two tensors, which broadcasting might hide, have one shape."""
    if first.shape != second.shape:
        msg = f"both must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(msg)


def contrastive_cosine_loss(first: Tensor, second: Tensor, corrupted: Tensor) -> Tensor:
    """Pull defect-free pairs together and push corrupted ones apart (Eq. 1 and 2).

    ``1 - cos`` for a clean second image, ``(1 + cos) / 2`` for a corrupted one, with the cosine similarity over
    channels averaged over positions. The similarity of a zero vector is 0.

    Args:
        first: Embeddings of the defect-free images ``(B, D, H, W)``.
        second: Embeddings of the second images, of the same shape.
        corrupted: Whether the second image is corrupted, ``(B,)`` bool.

    Returns:
        The mean over the batch, in [0, 2].
    """
    check_shapes(first, second)
    similarity = F.cosine_similarity(widened(first), widened(second), dim=1).mean(dim=(1, 2))  # (B,)
    return torch.where(corrupted, (1 + similarity) / 2, 1 - similarity).mean()


def decoder_loss(features: Sequence[Tensor], reconstructions: Sequence[Tensor]) -> Tensor:
    """Return how far reconstructions point away from the features of defect-free images (Eq. 3 to 5).

    Args:
        features: The backbone's, of each layer ``(B, C, H, W)``.
        reconstructions: The decoder's, of the same shapes.

    Returns:
        The mean, over layers, batch and positions, of ``0.5 * |f - r|^2`` between vectors of unit length, in [0, 2].
    """
    losses = []
    for f, r in zip(features, reconstructions, strict=True):
        check_shapes(f, r)
        difference = F.normalize(widened(f), dim=1) - F.normalize(widened(r), dim=1)
        losses.append(0.5 * difference.square().sum(dim=1).mean())
    return torch.stack(losses).mean()


class CseLoss(nn.Module):
    """The total loss, ``contrast_weight * L_contrast + L_decoder`` (Eq. 6; the paper's weight is 10)."""

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
        """Return the weighted sum; without reconstructions ("no decoder", Table 5) that term is left out."""
        contrast = self.contrast_weight * contrastive_cosine_loss(first, second, corrupted)
        return contrast + decoder_loss(features, reconstructions) if reconstructions else contrast
