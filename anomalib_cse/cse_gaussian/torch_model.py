"""CSE in closed form: layers of frozen features and a map of Gaussian distances to each.

The embedder of the paper is a network that learns, from clean and corrupted images, which combinations of features
tell them apart. Here it is linear, so that this has a solution: a generalised eigenproblem of two covariances, that of
clean features and that of synthetic defects. Distances follow from the same two Gaussians.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_number, check_scorable
from ..features import FrozenBackbone, fuse, pool, resize

FINEST = 8  # stride of the finest map; finer layers are pooled to it
REGISTER = 16  # numbers that processors multiply at once
SCORED = 0.005  # share of the positions that an image's score is the mean of


def smooth(maps: Tensor) -> Tensor:
    """Average ``(B, C, H, W)`` with weights 1/4, 1/2, 1/4 along both axes, repeating the border."""
    between = F.avg_pool2d(maps, 2, stride=1, padding=1, count_include_pad=False)
    return F.avg_pool2d(between, 2, stride=1)


def image_score(joint: Tensor) -> Tensor:
    """Return the images' scores ``(B,)``: the mean of the largest half per cent of maps ``(B, 1, H, W)``."""
    values = joint.flatten(1)
    return values.topk(max(1, round(SCORED * values.shape[1])), dim=1).values.mean(dim=1)


def geometric_mean(maps: Tensor, weights: Tensor) -> Tensor:
    """Return the geometric mean ``(B, 1, H, W)`` of maps ``(B, L, H, W)``, with weights ``(1, L, 1, 1)`` of sum 1.

    If layers weigh as their dimensions D, its logarithm is proportional, at a position and but for what does not depend
    on the image, to the negative log-likelihood of independent Gaussians of unknown scale: with the likeliest scale of
    each, that is the sum of ``D log distance``.
    """
    return (maps**weights).prod(dim=1, keepdim=True)


def directions_of(channels: int, most: int) -> int:
    """Return how many directions a layer has: ``most``, or if its channels are fewer, as many as fill registers."""
    return most if most <= channels else channels // REGISTER * REGISTER or channels


class GaussianMap(DynamicBufferMixin):
    """Distances of the positions of one grid from defect-free ones.

    All that it has is in buffers, NaN until it is fitted: ``mean`` ``(C,)`` and ``directions`` ``(C, D)`` lead to the
    embedding; ``roots``, ``(D, D)`` for all positions or ``(h, w, D, D)``, to coordinates whose length is the
    distance; ``scale`` ``(h, w)`` makes about 1 of its mean over defect-free images.

    Args:
        channels: C, of the layer.
        dim: D, of at most C.
    """

    mean: Tensor
    directions: Tensor
    roots: Tensor
    scale: Tensor

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels,), torch.nan))
        self.register_buffer("directions", torch.full((channels, dim), torch.nan))
        self.register_buffer("roots", torch.full((dim, dim), torch.nan))
        self.register_buffer("scale", torch.full((1, 1), torch.nan))

    def set(self, name: str, values: Tensor) -> None:
        """Give a buffer other values, of any shape."""
        self.get_buffer(name).resize_(values.shape).copy_(values)

    def distances(self, features: Tensor) -> Tensor:
        """Return distances ``(B, 1, h, w)``, before they are scaled, of features ``(B, C, h, w)``."""
        # the mean is taken off first: a product with something added to it, OpenVINO rounds
        embedding = (features.permute(2, 3, 0, 1) - self.mean) @ self.directions  # (h, w, B, D)
        coordinates = embedding @ self.roots
        # a dimension that is kept, as OpenVINO rounds one that is added
        return (coordinates * coordinates).sum(dim=-1, keepdim=True).sqrt().permute(2, 3, 0, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return distances ``(B, 1, h, w)``, about 1 on average, of features ``(B, C, h, w)``."""
        return self.distances(features) * self.scale


class CseGaussianModel(DynamicBufferMixin):
    """Score images by distances from Gaussians of defect-free features, a map to a layer; needs no Trainer.

    ``forward`` changes nothing; what it uses is in ``state_dict``: the backbone, the maps, ``layer_weights`` and
    ``image_size``. The weights are NaN until all is fitted.

    Args:
        backbone, layers, pre_trained, weights: See :class:`~anomalib_cse.features.FrozenBackbone`. Layers of a stride
            below 8 are pooled to that.
        embedding_dim: Most directions to a layer; see :func:`directions_of`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    maps: Sequence[GaussianMap]
    layer_weights: Tensor
    image_size: Tensor

    def __init__(
        self,
        backbone: str = "efficientnet_b3",
        layers: Sequence[int] | Sequence[str] = (1, 2, 3),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        embedding_dim: int = 64,
    ) -> None:
        super().__init__()
        check_number("embedding_dim", embedding_dim, "[1, inf)", whole=True)
        self.backbone = FrozenBackbone(backbone, layers, pre_trained, weights)
        maps = [GaussianMap(c, directions_of(c, embedding_dim)) for c in self.backbone.channels]
        self.maps = nn.ModuleList(maps)  # type: ignore[assignment]
        self.register_buffer("layer_weights", torch.full((1, len(self.maps), 1, 1), torch.nan))
        self.register_buffer("image_size", torch.zeros(2, dtype=torch.int64))

    @property
    def is_fitted(self) -> bool:
        """Whether the model can score."""
        return not bool(self.layer_weights.isnan().any())

    def smoothed_features(self, images: Tensor) -> list[Tensor]:
        """Return the features that the maps are of, of each layer ``(B, C, h, w)``, for images ``(B, 3, H, W)``."""
        factors = [max(1, FINEST // stride) for stride in self.backbone.strides]
        return [smooth(pool(f.float(), factor)) for f, factor in zip(self.backbone(images), factors, strict=True)]

    def joint_distances(self, features: Sequence[Tensor]) -> Tensor:
        """Return the geometric mean of all maps ``(B, 1, h, w)``, at the size of the finest, of smoothed features."""
        maps = [gaussian(f) for gaussian, f in zip(self.maps, features, strict=True)]
        return geometric_mean(fuse(maps), self.layer_weights)

    def score(self, features: Sequence[Tensor], size: Sequence[int]) -> InferenceBatch:
        """Score smoothed features of images of a height and width."""
        joint = self.joint_distances(features)
        return InferenceBatch(pred_score=image_score(joint), anomaly_map=resize(joint, size))

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images ``(B, 3, H, W)`` in [0, 1], of the size of the training images.

        Returns:
            ``anomaly_map`` ``(B, 1, H, W)``: the geometric mean of all maps, about 1 for defect-free images;
            ``pred_score`` ``(B,)``: the mean of its largest half per cent, before it is upsampled. Both in [0, inf).

        Raises:
            RuntimeError: If the maps have not been fitted.
            ValueError: If the images are of another size.
        """
        check_scorable(self, images)
        return self.score(self.smoothed_features(images), images.shape[-2:])
