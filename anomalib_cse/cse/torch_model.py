"""The CSE network: frozen features, a small embedder and the distance to the centres (Sections 3.2, 3.4 and 3.5)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_fitted, check_number, check_same_size
from ..features import FrozenBackbone, fuse, pool, resize


def pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 1x1 convolution followed by ReLU and BatchNorm (Section 3.2)."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size=1), nn.ReLU(), nn.BatchNorm2d(out_channels))


class Embedder(nn.Sequential):
    """Three pointwise convolutions ``C -> C/2 -> C/4 -> D`` over the fused features of C channels (Section 3.2)."""

    def __init__(self, in_channels: int, embedding_dim: int = 64) -> None:
        half, quarter = max(1, in_channels // 2), max(1, in_channels // 4)
        super().__init__(pointwise(in_channels, half), pointwise(half, quarter), pointwise(quarter, embedding_dim))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the embedding before pooling ``(B, D, H, W)``, at the size of the largest feature map."""
        return super().forward(fuse(features))


class Decoder(nn.Module):
    """One head of pointwise convolutions ``D -> C/2 -> C`` per layer, back to the features (Section 3.4, Figure 4)."""

    def __init__(self, channels: Sequence[int], embedding_dim: int = 64) -> None:
        super().__init__()
        self.first = nn.ModuleList(pointwise(embedding_dim, max(1, c // 2)) for c in channels)
        self.last = nn.ModuleList(pointwise(max(1, c // 2), c) for c in channels)

    def forward(self, embedding: Tensor, sizes: Sequence[torch.Size]) -> list[Tensor]:
        """Return reconstructions of the features, of each layer ``(B, C, h, w)``, of the embedding ``(B, D, H, W)``.

        A layer whose size, of ``sizes``, is smaller is max-pooled inside its head.
        """
        heads = zip(self.first, self.last, sizes, strict=True)
        return [last(F.adaptive_max_pool2d(first(embedding), size)) for first, last, size in heads]


def cosine_distances(embedding: Tensor, centres: Tensor) -> Tensor:
    """Return ``1 - cos``, in [0, 2], between each position and each centre's vector there (Section 3.5).

    Of embeddings ``(B, D, h, w)`` and centres, maps of unit vectors ``(K, D, h, w)``, it is ``(B, K, h, w)``.
    """
    # no convolution, which runtimes round where they can; what follows the last one they leave in single precision
    return 1 - (F.normalize(embedding, dim=1)[:, None] * centres).sum(dim=2)


class CseModel(DynamicBufferMixin):
    """Score images by the distance of their embeddings to those of defect-free ones; needs no Trainer.

    ``forward`` changes nothing. What it uses is in ``state_dict``: the backbone, the embedder, ``centres``, maps of
    unit vectors ``(K, D, h, w)``, and ``image_size``. The centres are NaN until :meth:`set_centres`.

    Args:
        backbone, layers, pre_trained, weights: See :class:`~anomalib_cse.features.FrozenBackbone`.
        embedding_dim: D, the channels of the embedding (the paper's 64).
        pool_size: Window and stride of the average pooling (the paper's 2); 1 for none.
        num_centres: K (1 in all of the paper's results).

    Raises:
        ValueError: If an argument is outside its range.
    """

    centres: Tensor
    image_size: Tensor

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
        self.num_centres = num_centres
        self.backbone = FrozenBackbone(backbone, layers, pre_trained, weights)
        self.embedder = Embedder(sum(self.backbone.channels), embedding_dim)
        self.register_buffer("centres", torch.full((num_centres, embedding_dim, 1, 1), torch.nan))
        self.register_buffer("image_size", torch.zeros(2, dtype=torch.int64))

    @property
    def is_fitted(self) -> bool:
        """Whether the model can score."""
        return not bool(self.centres.isnan().any())

    def set_centres(self, centres: Tensor, image_size: Sequence[int]) -> None:
        """Keep centres ``(K, D, h, w)``, of any length, as unit vectors, and the size of the images they are of."""
        self.centres.resize_(centres.shape).copy_(F.normalize(centres, dim=1))
        self.image_size.copy_(torch.tensor(image_size))

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Return pooled embeddings ``(B, D, h, w)`` of the backbone's features."""
        return pool(self.embedder(features), self.pool_size)

    def score(self, features: Sequence[Tensor], size: Sequence[int]) -> InferenceBatch:
        """Score images by their features, of each layer ``(B, C, h, w)``, with maps of ``size``; see ``forward``."""
        distances = cosine_distances(self.embed(features), self.centres)  # (B, K, h, w)
        of_image = distances.mean(dim=(2, 3))  # (B, K)
        nearest = of_image.argmin(dim=1)[:, None, None, None].expand(-1, -1, *distances.shape[2:])
        anomaly_map = resize(distances.gather(1, nearest), size)
        return InferenceBatch(pred_score=of_image.amin(dim=1), anomaly_map=anomaly_map)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images ``(B, 3, H, W)`` in [0, 1], of the size of the training images (Section 3.5).

        Returns:
            ``pred_score`` ``(B,)``: the mean over positions of the distance to a centre, the least over centres;
            ``anomaly_map`` ``(B, 1, H, W)``: the distances to that centre, upsampled. Both in [0, 2].

        Raises:
            RuntimeError: If the centres have not been set.
            ValueError: If the images are of another size.
        """
        check_fitted(self)
        check_same_size(images, self.image_size)
        return self.score(self.backbone(images), images.shape[-2:])
