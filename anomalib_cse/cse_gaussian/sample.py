"""What is kept of the training images as they stream by, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Generator, Tensor

from ..synthesis import generator_for
from .moments import Moments
from .torch_model import CseGaussianModel, cover, positions_inside

FEWEST_KEPT = 24  # images, whatever the memory: to draw defects into, and to measure distances of
BATCH = 8  # images to a pass of the backbone, unless they are large
PIXELS = BATCH * 2**18  # of a pass, whose memory grows with them
FOLDS = 5  # of cross-validation


class SampledBatch(NamedTuple):
    """B images of one size: pixels, features, and where to look.

    ``images`` are ``(B, 3, H, W)``, ``features`` of each layer ``(B, C, h, w)``; ``inside`` ``(B, 1, H, W)`` is the
    region of interest, or ``None`` for all of the image. ``folds`` are those that the images are in, of ``FOLDS``;
    ``shares`` is how much of each image is in the sums, all of it if there are none.
    """

    images: Tensor
    features: list[Tensor]
    inside: Tensor | None = None
    folds: Sequence[int] = ()
    shares: Sequence[float] = ()

    def weights(self, layer: int) -> Tensor:
        """Return how much of each position of a layer is to be looked at, ``(B, h, w)``."""
        features = self.features[layer]
        weights = torch.ones_like(features[:, 0])
        if self.inside is not None:
            weights = cover(self.inside, features.shape[-2:])[:, 0].to(features)
        return weights * torch.tensor(self.shares).to(features)[:, None, None] if self.shares else weights


class SampledImage(NamedTuple):
    """A sampled image, as in :class:`SampledBatch` but without the first dimension, and its path, or ``""``."""

    image: Tensor
    features: list[Tensor]
    inside: Tensor | None
    path: str
    fold: int
    share: float = 1.0


def in_one_pass(size: Sequence[int]) -> int:
    """Return how many images of a height and width the backbone takes at once, in bounded memory."""
    return max(1, PIXELS // (size[0] * size[1]))


def batches(kept: Sequence[SampledImage]) -> Iterator[SampledBatch]:
    """Give sampled images in batches of one size, in order."""
    for shape, group in groupby(kept, key=lambda one: one.image.shape):
        same = list(group)
        most = min(BATCH, in_one_pass(shape[1:]))
        for start in range(0, len(same), most):
            images, features, inside, _, folds, shares = zip(*same[start : start + most], strict=True)
            layers = [torch.stack(layer) for layer in zip(*features, strict=True)]
            regions = None if inside[0] is None else torch.stack(inside)
            yield SampledBatch(torch.stack(images), layers, regions, folds, shares if set(shares) != {1.0} else ())


def in_passes(images: Tensor, inside: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Split images ``(B, 3, H, W)``, and where to look in them, into what the backbone takes at once."""
    count = in_one_pass(images.shape[-2:])
    parts = images.split(count)
    return list(zip(parts, [None] * len(parts) if inside is None else inside.split(count), strict=True))


def add_images(
    model: CseGaussianModel, sample: "TrainingSample", images: Tensor, paths: Sequence[str] | None = None
) -> None:
    """Add good images ``(B, 3, H, W)`` to a sample, with the features that a model takes of them.

    Raises:
        ValueError: If nothing of them is to be looked at.
    """
    images, inside = model.filled_up_with_region(images)
    inside = None if inside is None else inside.expand(len(images), -1, -1, -1)
    passes = [model.smoothed_features(*part) for part in in_passes(images, inside)]
    if inside is not None:
        positions_inside(inside, model.stride)
        images = model.blanked(images, inside)  # synthetic defects may be made of their own pixels
    sample.add(images, [torch.cat(layer) for layer in zip(*passes, strict=True)], paths, inside)


def draw(count: int, images: int, *numbers: int) -> list[int]:
    """Draw so many of the images, none again before all have been drawn; the numbers decide."""
    generator = generator_for(*numbers)
    rounds = [torch.randperm(images, generator=generator) for _ in range(-(-count // images))]
    return torch.cat(rounds)[:count].tolist()


class TrainingSample:
    """Sums over all training images, and a random sample of them.

    Args:
        memory_budget: Most bytes to keep.
        generator: Decides the sample.
        has_positions: Whether positions are alike in all images, so that there may be moments of each.
    """

    def __init__(self, memory_budget: int, generator: Generator, *, has_positions: bool = True) -> None:
        self.bytes_left = memory_budget
        self.generator = generator
        self.count = 0  # of images that have been added
        self.moments: list[Moments] = []  # of each layer, of every position or of all together
        self.kept: list[SampledImage] = []
        self.capacity = 0  # images to keep
        self.has_positions = has_positions

    def begin(self, features: Sequence[Tensor]) -> None:
        """Decide whether moments of every position fit the memory, by the features of an image ``(C, h, w)``."""
        needed = sum(8 * f.shape[1] * f.shape[2] * f.shape[0] ** 2 for f in features)
        if self.has_positions and 2 * needed > self.bytes_left:
            self.has_positions = False
            rank_zero_info(
                f"Covariances for every position would take {needed / 2**20:.0f} MiB, more than half of memory_budget: "
                "all positions get one."
            )
        if self.has_positions:
            self.bytes_left -= needed
        self.moments = [Moments(f.shape[0], f.shape[1:] if self.has_positions else (), f.device) for f in features]

    def limit(self, image_bytes: int) -> None:
        """Keep no more images than there is room for, if all had so many bytes."""
        most = max(FEWEST_KEPT, self.bytes_left // image_bytes)
        self.capacity = min(self.capacity, most) if self.capacity else most
        if len(self.kept) > self.capacity:
            places = torch.randperm(len(self.kept), generator=self.generator)[: self.capacity]
            self.kept = [self.kept[place] for place in sorted(places.tolist())]

    def add(
        self,
        images: Tensor,
        features: Sequence[Tensor],
        paths: Sequence[str] | None = None,
        inside: Tensor | None = None,
    ) -> None:
        """Add images ``(B, 3, H, W)`` and their features, of each layer ``(B, C, h, w)``.

        ``inside`` ``(B, 1, H, W)`` says where to look; images of different calls may have different sizes if positions
        are not alike.
        """
        if not self.count:
            self.begin([f[0] for f in features])
        of_batch = (images, *features) if inside is None else (images, inside, *features)
        self.limit(sum(values.nbytes for values in of_batch) // len(images))
        seen = SampledBatch(images, list(features), inside)
        for layer, (moments, f) in enumerate(zip(self.moments, features, strict=True)):
            moments.add_maps(f, seen.weights(layer))
        names = paths or [""] * len(images)
        regions = [None] * len(images) if inside is None else inside
        for path, region, *values in zip(names, regions, images, *features, strict=True):
            self.keep(path, region, *values)

    def keep(self, path: str, inside: Tensor | None, image: Tensor, *features: Tensor) -> None:
        """Sample an image, all having the same chance (reservoir sampling, algorithm R)."""
        self.count += 1
        full = len(self.kept) >= self.capacity
        place = int(torch.randint(self.count, (), generator=self.generator)) if full else len(self.kept)
        if place < self.capacity:
            # clones, as a view would keep the whole batch in memory
            region, own = None if inside is None else inside.clone(), [f.clone() for f in features]
            self.kept[place : place + 1] = [SampledImage(image.clone(), own, region, path, place % FOLDS)]

    def sum_over_processes(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up the sums of several processes, by a function that sums a tensor over them; samples stay their own."""
        self.moments = [moments.summed(reduce) for moments in self.moments]
