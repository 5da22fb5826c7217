"""CSE in closed form: layers of frozen features and a map of Gaussian distances to each.

The embedder of the paper is a network that learns, from clean and corrupted images, which combinations of features
tell them apart. Here it is linear, so that this has a solution: a generalised eigenproblem of two covariances, that of
clean features and that of synthetic defects. Distances follow from the same two Gaussians.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_fitted, check_large_enough, check_number, check_same_size
from ..features import FrozenBackbone, filled_up, fuse, pool, resize

FINEST = 8  # stride of the finest map; finer layers are pooled to it
SHARPNESS = 3  # power of the ratio by which maps are sharpened
REGISTER = 16  # numbers that processors multiply at once
POSITIONS = 200  # of so many, an image's score is the highest; of more, the mean of the highest half per cent
HALF = 0.5  # of a position, to count as inside a region of interest


def smooth(maps: Tensor) -> Tensor:
    """Average ``(B, C, H, W)`` with weights 1/4, 1/2, 1/4 along both axes, repeating the border."""
    between = F.avg_pool2d(maps, 2, stride=1, padding=1, count_include_pad=False)
    return F.avg_pool2d(between, 2, stride=1)


def sharpen(maps: Tensor) -> Tensor:
    """Take back some of what smoothing spreads in maps ``(B, 1, H, W)``: a long step of Gold's ratio deconvolution.

    That multiplies a map by a power of its ratio to itself smoothed. Features are smoothed so that no single position
    decides an image's score. What lies around a defect gets some of its distance by that.
    """
    tiny = torch.finfo(maps.dtype).tiny
    # a division, which OpenVINO would replace by what it then rounds
    ratio = maps * (smooth(maps).clamp(min=tiny).log() * -1).exp()
    return maps * ratio**SHARPNESS


def cover(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Return how much of each position of a grid masks ``(B, 1, H, W)`` cover, in [0, 1], ``(B, 1, *size)``."""
    masks = masks if masks.is_floating_point() else masks.float()
    return F.adaptive_avg_pool2d(masks, (size[0], size[1]))


def image_score(joint: Tensor, inside: Tensor | None = None) -> Tensor:
    """Return the images' scores ``(B,)``: the mean of the largest half per cent of maps ``(B, 1, H, W)``.

    Of the positions that are ``inside``, ``(B, 1, H, W)`` or ``(1, 1, H, W)``, or of all.
    """
    values = joint.flatten(1)
    number = values.shape[1]
    if inside is None:
        # torch's own maximum and whole numbers: the size may be left open in an exported graph
        count: int = torch.sym_max(1, (number + POSITIONS // 2) // POSITIONS)  # type: ignore[assignment]
        return values.topk(count, dim=1).values.mean(dim=1)
    counted = inside.flatten(1)
    taken = ((counted.sum(dim=1, keepdim=True) + POSITIONS // 2) // POSITIONS).clamp(min=1)
    ordered = (values * counted).sort(dim=1, descending=True).values
    return (ordered * (torch.arange(number, device=joint.device) < taken)).sum(dim=1) / taken.squeeze(1)


def positions_inside(inside: Tensor, stride: int) -> Tensor:
    """Return which positions, of a stride, are inside a region of interest ``(B, 1, H, W)`` by half ``(B, 1, h, w)``.

    Raises:
        ValueError: If none is, in one of the images; an exported graph cannot.
    """
    positions = F.avg_pool2d(inside.float(), stride) >= HALF
    if not torch.compiler.is_compiling() and not positions.flatten(1).any(dim=1).all():
        msg = (
            f"the region of interest (roi) is too narrow: no position of the map, of {stride}x{stride} pixels, is half "
            "inside; make it wider, or image_size larger"
        )
        raise ValueError(msg)
    return positions


def resized_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a mask ``(h, w)`` to a height and width by its nearest pixels."""
    for axis, (known, length) in enumerate(zip(mask.shape, size, strict=True)):
        mask = mask.index_select(axis, (2 * torch.arange(length, device=mask.device) + 1) * known // (2 * length))
    return mask


def from_border(length: int, known: int, device: torch.device | None = None) -> Tensor:
    """Return for each of ``length`` positions in a row which one of ``known`` is as far from the nearer border.

    Those in the middle of a longer row are like the middle of the known one; of as many, each is itself.
    """
    before = torch.arange(length, device=device)
    after = length - 1 - before
    middle = (known - 1) // 2
    return torch.where(before <= after, before.clamp(max=middle), known - 1 - after.clamp(max=middle))


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
    distance; ``scale`` ``(h, w)`` makes about 1 of its mean over defect-free images. With roots for all positions,
    features may have another height and width: see :func:`from_border`.

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

    @property
    def has_positions(self) -> bool:
        """Whether every position has its own covariance."""
        return self.roots.dim() > 2

    def set(self, name: str, values: Tensor) -> None:
        """Give a buffer other values, of any shape."""
        self.get_buffer(name).resize_(values.shape).copy_(values)

    def distances(self, features: Tensor) -> Tensor:
        """Return distances ``(B, 1, h, w)``, before they are scaled, of features ``(B, C, h, w)``."""
        # the mean is taken off first: a product with something added to it, OpenVINO rounds
        centred = features.permute(0, 2, 3, 1) - self.mean  # (B, h, w, C)
        if self.has_positions:
            embedding = (centred @ self.directions).permute(1, 2, 0, 3)  # (h, w, B, D)
            coordinates = (embedding @ self.roots).permute(2, 0, 1, 3)
        else:
            coordinates = centred @ (self.directions @ self.roots)  # one matrix, once exported
        # a dimension that is kept, as OpenVINO rounds one that is added
        return (coordinates * coordinates).sum(dim=-1, keepdim=True).sqrt().permute(0, 3, 1, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Return distances ``(B, 1, h, w)``, about 1 on average, of features ``(B, C, h, w)``."""
        scale = self.scale
        if not self.has_positions:
            for axis in (0, 1):
                places = from_border(features.shape[axis + 2], scale.shape[axis], scale.device)
                scale = scale.index_select(axis, places)
        return self.distances(features) * scale


class CseGaussianModel(DynamicBufferMixin):
    """Score images by distances from Gaussians of defect-free features, a map to a layer; needs no Trainer.

    ``forward`` changes nothing; what it uses is in ``state_dict``: the backbone, the maps, ``layer_weights``,
    ``image_size`` and ``roi``. The weights are NaN until all is fitted. ``roi`` ``(H, W)``, empty unless there is one,
    is true where to look; it is resized to images of other sizes.

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
    roi: Tensor

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
        self.register_buffer("roi", torch.zeros(0, 0, dtype=torch.bool))

    @property
    def is_fitted(self) -> bool:
        """Whether the model can score."""
        return not bool(self.layer_weights.isnan().any())

    @property
    def stride(self) -> int:
        """The stride of the finest map, in pixels."""
        return max(FINEST, min(self.backbone.strides))

    def filled_up(self, images: Tensor) -> Tensor:
        """Return images or masks ``(B, C, H, W)`` whose sides the coarsest layer's stride divides: see ``filled_up``.

        All else is computed of such, so that positions of all layers lie where they belong.
        """
        return filled_up(images, self.backbone.stride)

    def inside(self, size: Sequence[int]) -> Tensor | None:
        """Return where to look in images of a height and width, ``(1, 1, H, W)``; ``None`` for all of them."""
        if not self.roi.numel():
            return None
        return resized_mask(self.roi, size)[None, None]

    def filled_up_with_region(self, images: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return images ``(B, 3, H, W)``, and where to look in them, both filled up; ``None`` is where ``roi`` says."""
        inside = self.inside(images.shape[-2:]) if inside is None else inside
        return self.filled_up(images), None if inside is None else self.filled_up(inside)

    def blanked(self, images: Tensor, inside: Tensor) -> Tensor:
        """Return images that have the colour outside that the backbone takes for the mean, whatever they show there."""
        return torch.where(inside, images, self.backbone.mean.to(images))

    def smoothed_features(self, images: Tensor, inside: Tensor | None = None) -> list[Tensor]:
        """Return the features that the maps are of, of each layer ``(B, C, h, w)``, for images ``(B, 3, H, W)``.

        What is not ``inside`` is left out: see :meth:`blanked`.
        """
        if inside is not None:
            images = self.blanked(images, inside)
        factors = [max(1, FINEST // stride) for stride in self.backbone.strides]
        return [smooth(pool(f.float(), factor)) for f, factor in zip(self.backbone(images), factors, strict=True)]

    def joint_distances(self, features: Sequence[Tensor]) -> Tensor:
        """Return the geometric mean of all maps ``(B, 1, h, w)``, at the size of the finest, of smoothed features."""
        maps = [gaussian(f) for gaussian, f in zip(self.maps, features, strict=True)]
        return geometric_mean(fuse(maps), self.layer_weights)

    def score(self, features: Sequence[Tensor], size: Sequence[int], inside: Tensor | None = None) -> InferenceBatch:
        """Score smoothed features of images of a height and width, which are filled up, where they are ``inside``."""
        joint = self.joint_distances(features)
        anomaly_map = resize(sharpen(joint), size)
        if inside is None:
            return InferenceBatch(pred_score=image_score(joint), anomaly_map=anomaly_map)
        at_positions = positions_inside(inside, self.stride)
        return InferenceBatch(pred_score=image_score(joint, at_positions), anomaly_map=anomaly_map * inside)

    def forward(self, images: Tensor, inside: Tensor | None = None) -> InferenceBatch:
        """Score images ``(B, 3, H, W)`` in [0, 1], of any size, or if positions differ of the training images' size.

        Args:
            images: The images.
            inside: Where to look, ``(B, 1, H, W)`` of truth values; ``None`` is where ``roi`` says.

        Returns:
            ``anomaly_map`` ``(B, 1, H, W)``: the geometric mean of all maps, about 1 for defect-free images, sharpened,
            0 outside; ``pred_score`` ``(B,)``: the mean of its largest half per cent, before it is sharpened and
            upsampled. Both in [0, inf).

        Raises:
            RuntimeError: If the maps have not been fitted.
            ValueError: If the images are of a wrong size.
        """
        check_fitted(self)
        check_large_enough(images, self.backbone.stride)
        height, width = images.shape[-2:]
        images, inside = self.filled_up_with_region(images, inside)
        if any(gaussian.has_positions for gaussian in self.maps):
            check_same_size(images, self.image_size)
        scored = self.score(self.smoothed_features(images, inside), images.shape[-2:], inside)
        anomaly_map = cast(Tensor, scored.anomaly_map)
        return scored._replace(anomaly_map=anomaly_map[..., :height, :width])
