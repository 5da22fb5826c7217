"""Cse in closed form: layers of frozen features and a map of distances to each."""

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import FrozenBackbone
from .checks import check_number, check_size
from .gaussian import GaussianMap
from .torch_model import check_fitted, copied, fuse, is_fitted, pool, upsample

FINEST = 8  # stride of the finest map; finer layers are pooled to it
REGISTER = 16  # numbers that processors multiply at once
SCORED = 0.005  # share of the positions that an image's score is the mean of


def smooth(maps: Tensor) -> Tensor:
    """Weights 1/4, 1/2, 1/4 along both axes of ``(B, C, H, W)``, the border repeated: two means of neighbours."""
    between = F.avg_pool2d(maps, 2, stride=1, padding=1, count_include_pad=False)
    return F.avg_pool2d(between, 2, stride=1)


def mean_of_top(maps: Tensor, share: float) -> Tensor:
    """The mean of the largest values, a share in (0, 1] of all, at least one: ``(B,)`` of ``(B, 1, H, W)``."""
    values = maps.flatten(1)
    return values.topk(max(1, round(share * values.shape[1])), dim=1).values.mean(dim=1)


def score(joint: Tensor) -> Tensor:
    """An image's score ``(B,)``, from its map ``(B, 1, H, W)``: the mean of the largest half per cent."""
    return mean_of_top(joint, SCORED)


def geometric_mean(maps: Tensor, weights: Tensor) -> Tensor:
    """The weighted geometric mean ``(B, 1, H, W)`` of maps ``(B, L, H, W)``, with weights ``(1, L, 1, 1)`` of sum 1.

    If layers weigh as their dimensions D, its logarithm is proportional, at a position and but for what does not depend
    on the image, to the negative log-likelihood of independent Gaussians of unknown scale: with the likeliest scale of
    each, that is the sum of ``D log distance``.
    """
    return (maps**weights).prod(dim=1, keepdim=True)


def layer_weights(factors: Sequence[Tensor]) -> Tensor:
    """Weights ``(1, L, 1, 1)`` of sum 1: each layer's number of dimensions, counted by what they say ``(D,)``."""
    dimensions = torch.stack([f.sum() for f in factors])
    return (dimensions / dimensions.sum()).view(1, -1, 1, 1)


def directions_of(channels: int, most: int) -> int:
    """How many directions a layer has: ``most``, or if its channels are fewer, as many of them as fill registers."""
    return most if most <= channels else channels // REGISTER * REGISTER or channels


class GaussianModel(nn.Module):
    """Scores images by distances from Gaussians of defect-free features, a map to a layer; needs no Trainer.

    ``forward`` changes nothing; what it uses is in ``state_dict``: the backbone, the maps and ``layer_weights``, which
    are NaN until they are fitted.

    Args:
        backbone, layers, pre_trained, weights: See :class:`~anomalib_cse.backbone.FrozenBackbone`. Layers of a stride
            below 8 are pooled to that.
        embedding_dim: Most directions to a layer; see :func:`directions_of`.
        image_size: Height and width of the images, in pixels.

    Raises:
        ValueError: If an argument is outside its range.
    """

    layer_weights: Tensor
    maps: Sequence[GaussianMap]

    def __init__(
        self,
        backbone: str = "efficientnet_b3",
        layers: Sequence[int] | Sequence[str] = (1, 2, 3),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        embedding_dim: int = 64,
        image_size: tuple[int, int] = (256, 256),
    ) -> None:
        super().__init__()
        check_number("embedding_dim", embedding_dim, "[1, inf)", whole=True)
        self.backbone = FrozenBackbone(backbone, layers, pre_trained, weights)
        self.embedding_dim = embedding_dim
        self.register_buffer("layer_weights", torch.full((1, len(self.backbone.levels), 1, 1), torch.nan))
        self.lay_out(image_size)

    def lay_out(self, image_size: tuple[int, int]) -> None:
        """Have maps, to be fitted, for images of that height and width.

        Raises:
            ValueError: If that is less than the stride of the coarsest layer.
        """
        what = "image_size, or what center_crop_size leaves of it,"
        check_size(what, image_size, self.backbone.stride, ", the stride of the coarsest layer")
        self.image_size = tuple(image_size)
        with torch.no_grad():
            features = self.backbone(torch.zeros(1, 3, *image_size, device=self.layer_weights.device))
            grids = [(f.shape[2], f.shape[3]) for f in self.smoothed(features)]
        self.maps = nn.ModuleList(  # type: ignore[assignment]
            GaussianMap(channels, directions_of(channels, self.embedding_dim), grid)
            for channels, grid in zip(self.backbone.channels, grids, strict=True)
        ).to(self.layer_weights.device)

    @property
    def fitted(self) -> bool:
        """Whether the maps have been fitted."""
        return is_fitted(*self.fitted_last)

    @property
    def fitted_last(self) -> list[Tensor]:
        """The layers' weights and the maps' scales."""
        return [self.layer_weights, *(gaussian.scale for gaussian in self.maps)]

    def forget(self) -> None:
        """Be without maps, as before training."""
        for part in self.fitted_last:
            part.fill_(torch.nan)

    def simplified(self) -> "GaussianModel":
        """A copy that computes the same with less, to be exported: a root that all positions have is there once."""
        simple = copied(self)
        for gaussian in simple.maps:
            if (gaussian.roots == gaussian.roots[0, 0]).all():
                gaussian.roots = gaussian.roots[0, 0].clone()
        return simple

    def smoothed(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's features, a ``(B, C, h, w)`` to a layer, as the maps have them."""
        factors = [max(1, FINEST // stride) for stride in self.backbone.strides]
        return [smooth(pool(f, factor)) for f, factor in zip(features, factors, strict=True)]

    def distances(self, features: Sequence[Tensor]) -> Tensor:
        """The geometric mean of all maps ``(B, 1, h, w)``, at the size of the finest, of smoothed features."""
        maps = [gaussian(f) for gaussian, f in zip(self.maps, features, strict=True)]
        return geometric_mean(fuse(maps), self.layer_weights)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images.

        Args:
            images: ``(B, 3, *image_size)`` in [0, 1].

        Returns:
            ``anomaly_map`` ``(B, 1, H, W)``: the geometric mean of all maps, about 1 for defect-free images;
            ``pred_score`` ``(B,)``: the mean of its largest half per cent, before it is upsampled. Both in [0, inf).

        Raises:
            RuntimeError: If the maps have not been fitted.
            ValueError: If the images are of another size.
        """
        if not torch.compiler.is_compiling():
            if tuple(images.shape[-2:]) != self.image_size:
                msg = f"images must be {self.image_size} pixels high and wide, got {tuple(images.shape[-2:])}"
                raise ValueError(msg)
            check_fitted(*self.fitted_last)
        features = self.backbone(images)
        if torch.compiler.is_compiling():
            joint = self.distances(self.smoothed(features))
        else:  # squares of distances leave the range of 16 bits
            with torch.autocast(images.device.type, enabled=False):
                joint = self.distances(self.smoothed([f.float() for f in features]))
        return InferenceBatch(pred_score=score(joint), anomaly_map=upsample(joint, images.shape[-2:]))
