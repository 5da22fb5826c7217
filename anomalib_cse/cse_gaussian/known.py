"""Known defects: images of real ones, whose moments stand beside those of synthetic ones."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from anomalib.data.utils import read_image, read_mask
from torch import Tensor, nn

from ..features import filled_up, resize
from ..preflight import Sample
from .moments import Moments
from .torch_model import CseGaussianModel, cover

SYNTHETIC = 10  # images of known defects that synthetic ones count for
HIGHEST = 0.05  # of the positions of an image, that are taken for its defect if it has no mask


class KnownDefect(NamedTuple):
    """An image ``(1, 3, H, W)`` of a defect, and how much of each pixel that covers ``(1, 1, H, W)``, if known."""

    image: Tensor
    mask: Tensor | None


def check_known(defects: object, masks: object) -> None:
    """Raise a ``ValueError`` if what is to hold known defects is no folder's name, or masks are given alone."""
    for name, value in (("known_defects", defects), ("known_masks", masks)):
        if value is not None and not (isinstance(value, str | Path) and str(value)):
            msg = f"{name} must be a folder or None, got {value!r}"
            raise ValueError(msg)
    if masks is not None and defects is None:
        msg = "known_masks are of known_defects, got none: give the folder of their images too"
        raise ValueError(msg)


def pixels_of(path: str) -> Tensor:
    """Read an image file, ``(1, 3, H, W)`` in [0, 1]."""
    return cast(Tensor, read_image(path, as_tensor=True)).as_subclass(Tensor)[None]


def read_known(samples: Iterable[Sample], transform: nn.Module | None) -> list[KnownDefect]:
    """Read images of defects, and their masks where they have some, as a pre-processor leaves them."""
    known = []
    for sample in samples:
        image = pixels_of(sample.image)
        mask = None
        if sample.mask:
            read = cast(Tensor, read_mask(sample.mask, as_tensor=True)).as_subclass(Tensor)
            mask = resize(read.float()[None, None], image.shape[-2:])
        if transform is not None:
            image = transform(image)
            mask = None if mask is None else transform(mask.expand(-1, 3, -1, -1))[:, :1]
        known.append(KnownDefect(image, mask))
    return known


def known_moments(model: CseGaussianModel, known: Iterable[KnownDefect], like: Sequence[Moments]) -> list[Moments]:
    """Return moments of the features of known defects, in which each image has a weight of 1; of each layer.

    Where an image has no mask, the model, which must have been fitted then, says where its defect is: at the highest
    ``HIGHEST`` of positions.
    """
    moments = [Moments(m.first.shape[-1], device=m.first.device) for m in like]
    for image, mask in known:
        image, inside = model.filled_up_with_region(image.to(model.layer_weights))
        features = model.smoothed_features(image, inside)
        where = located(model, features) if mask is None else filled_up(mask.to(image), model.backbone.stride)
        for of_layer, f in zip(moments, features, strict=True):
            covered = cover(where, f.shape[-2:])
            if inside is not None:
                covered = covered * cover(inside, f.shape[-2:])
            if covered.sum() > 0:
                of_layer.add_maps(f, (covered / covered.sum())[:, 0])
    return moments


def located(model: CseGaussianModel, features: Sequence[Tensor]) -> Tensor:
    """Return where a fitted model's map of one image is highest ``(1, 1, h, w)``, by its smoothed features."""
    joint = model.joint_distances(features)
    count = max(1, round(HIGHEST * joint.numel()))
    return (joint >= joint.flatten().topk(count).values[-1]).to(joint)


def with_known(synthetic: Sequence[Moments], known: Sequence[Moments]) -> list[Moments]:
    """Return moments of synthetic and known defects together, of each layer: the former count for ``SYNTHETIC`` images.

    So one known image changes little, and many leave the synthetic ones little to say.
    """
    return [
        s.times(SYNTHETIC / float(s.weight)) + k if s.weight > 0 and k.weight > 0 else s
        for s, k in zip(synthetic, known, strict=True)
    ]
