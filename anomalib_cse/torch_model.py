"""The CSE network: frozen features, a small embedder and the distance to the centres (Sections 3.2 and 3.5)."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import FrozenBackbone
from .checks import check_number
from .resize import resize


def pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 1x1 convolution followed by ReLU and BatchNorm (Section 3.2)."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size=1), nn.ReLU(), nn.BatchNorm2d(out_channels))


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear upsampling of ``(B, C, H, W)``; exported in a form whose precision OpenVINO leaves as it is."""
    if torch.compiler.is_compiling():
        return resize(maps, size)
    return F.interpolate(maps, size=tuple(size), mode="bilinear")


def fuse(features: Sequence[Tensor]) -> Tensor:
    """Upsample all maps to the largest one and concatenate them: ``(B, C1 + C2 + ..., H, W)`` (Section 3.2)."""
    size = max((f.shape[-2:] for f in features), key=lambda s: s[0] * s[1])
    return torch.cat([f if f.shape[-2:] == size else upsample(f, size) for f in features], dim=1)


class Embedder(nn.Sequential):
    """Three pointwise convolutions ``C -> C/2 -> C/4 -> D`` over the fused features (Section 3.2).

    Args:
        in_channels: Channels of all layers together.
        embedding_dim: D, the channels of the embedding.
    """

    def __init__(self, in_channels: int, embedding_dim: int = 64) -> None:
        half, quarter = max(1, in_channels // 2), max(1, in_channels // 4)
        super().__init__(pointwise(in_channels, half), pointwise(half, quarter), pointwise(quarter, embedding_dim))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The embedding before pooling ``(B, D, H, W)``, at the size of the largest feature map."""
        return super().forward(fuse(features))


def copied(model: Any) -> Any:
    """A copy of a model that shares its backbone."""
    return copy.deepcopy(model, {id(model.backbone): model.backbone})


def fold_batch_norm(embedder: Embedder) -> Embedder:
    """A copy that computes the same with every BatchNorm but the last in the convolution that follows it."""
    folded: Any = copy.deepcopy(embedder).eval()
    for block, following in pairwise(folded):
        convolution, norm = following[0], block[2]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        weight = convolution.weight[:, :, 0, 0]
        convolution.bias.data += weight @ shift
        convolution.weight.data = (weight * scale)[:, :, None, None]
        block[2] = nn.Identity()
    return folded


class Decoder(nn.Module):
    """One head of pointwise convolutions ``D -> C/2 -> C`` per layer, back to the features (Section 3.4, Figure 4).

    Args:
        channels: Channels C of every feature layer.
        embedding_dim: D, the channels of the embedding.
    """

    def __init__(self, channels: Sequence[int], embedding_dim: int = 64) -> None:
        super().__init__()
        self.first = nn.ModuleList(pointwise(embedding_dim, max(1, c // 2)) for c in channels)
        self.last = nn.ModuleList(pointwise(max(1, c // 2), c) for c in channels)

    def forward(self, embedding: Tensor, sizes: Sequence[torch.Size]) -> list[Tensor]:
        """Reconstructions of the features.

        Args:
            embedding: The embedding before pooling ``(B, D, H, W)``.
            sizes: Height and width of every layer's features; a coarser layer is max-pooled inside its head.

        Returns:
            One ``(B, C, h, w)`` per layer.
        """
        heads = zip(self.first, self.last, sizes, strict=True)
        return [last(F.adaptive_max_pool2d(first(embedding), size)) for first, last, size in heads]


def pool(embedding: Tensor, size: int) -> Tensor:
    """Average pooling as smoothing (Section 3.2); a window over the lower or right edge averages what it covers."""
    return F.avg_pool2d(embedding, size, ceil_mode=True, count_include_pad=False) if size > 1 else embedding


def cosine_distances(embedding: Tensor, centres: Tensor) -> Tensor:
    """``1 - cos`` between every position and every centre (Section 3.5).

    Args:
        embedding: ``(B, D, H, W)``.
        centres: Unit vectors ``(K, D)``.

    Returns:
        ``(B, K, H, W)`` in [0, 2].
    """
    # no convolution, which runtimes round where they can; what follows the last one they leave in single precision
    directions = F.normalize(embedding, dim=1)[:, None]  # (B, 1, D, H, W)
    return 1 - (directions * centres[:, :, None, None]).sum(dim=2)


def is_fitted(*parts: Tensor) -> bool:
    """Whether training has come to its end: what it ends with is NaN before."""
    return not any(part.isnan().any() for part in parts)


def check_fitted(*parts: Tensor) -> None:
    """Refuse to score with a model that is not fitted.

    Raises:
        RuntimeError: If a part is NaN.
    """
    if not is_fitted(*parts):
        msg = (
            "the model is not fitted, which is the end of training: train it, give the checkpoint of a finished run "
            "(ckpt_path) or resume an unfinished one (anomalib train with its ckpt_path)"
        )
        raise RuntimeError(msg)


class CseModel(nn.Module):
    """Scores images by the distance of their embeddings to those of defect-free ones; needs no Trainer.

    ``forward`` changes nothing. What it uses is in ``state_dict``: the backbone, the embedder and ``centres``, unit
    vectors ``(K, D)`` that are NaN until :meth:`set_centres`.

    Args:
        backbone, layers, pre_trained, weights: See :class:`~anomalib_cse.backbone.FrozenBackbone`.
        embedding_dim: D, the channels of the embedding (the paper's 64).
        pool_size: Window and stride of the average pooling (the paper's 2); 1 for none.
        num_centres: K (1 in all of the paper's results).

    Raises:
        ValueError: If an argument is outside its range.
    """

    centres: Tensor

    def __init__(
        self,
        backbone: str = "efficientnet_b3",
        layers: Sequence[int] | Sequence[str] = (3, 4),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        embedding_dim: int = 64,
        pool_size: int = 2,
        num_centres: int = 1,
    ) -> None:
        super().__init__()
        for name, value in {"embedding_dim": embedding_dim, "pool_size": pool_size, "num_centres": num_centres}.items():
            check_number(name, value, "[1, inf)", whole=True)
        self.pool_size = pool_size
        self.backbone = FrozenBackbone(backbone, layers, pre_trained, weights)
        self.embedder = Embedder(sum(self.backbone.channels), embedding_dim)
        self.register_buffer("centres", torch.full((num_centres, embedding_dim), torch.nan))

    @property
    def fitted(self) -> bool:
        """Whether there are centres."""
        return is_fitted(self.centres)

    def forget(self) -> None:
        """Be without centres, as before training."""
        self.centres.fill_(torch.nan)

    def simplified(self) -> "CseModel":
        """A copy that computes the same with less, to be exported: BatchNorm is in the convolution that follows."""
        simple = copied(self)
        simple.embedder = fold_batch_norm(self.embedder)
        return simple

    def set_centres(self, centres: Tensor) -> None:
        """Keep ``centres`` ``(K, D)``, of any length, as unit vectors."""
        self.centres.copy_(F.normalize(centres, dim=1))

    def embed(self, images: Tensor) -> Tensor:
        """Pooled embeddings ``(B, D, h, w)`` of images ``(B, 3, H, W)`` in [0, 1]."""
        return pool(self.embedder(self.backbone(images)), self.pool_size)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images (Section 3.5).

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], of any size that the backbone takes.

        Returns:
            ``pred_score`` ``(B,)``: the mean distance over positions, at the closest centre; ``anomaly_map``
            ``(B, 1, H, W)``: every position's distance to its closest centre, upsampled. Both in [0, 2].

        Raises:
            RuntimeError: If the centres have not been set.
        """
        if not torch.compiler.is_compiling():
            check_fitted(self.centres)
        distances = cosine_distances(self.embed(images), self.centres)  # (B, K, h, w)
        anomaly_map = upsample(distances.amin(1, keepdim=True), images.shape[-2:])
        return InferenceBatch(pred_score=distances.mean(dim=(2, 3)).amin(1), anomaly_map=anomaly_map)
