"""What is kept of the training images as they stream by, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Generator, Tensor

from .moments import Moments

FEWEST_KEPT = 24  # images, whatever the memory: to draw defects into, and to measure distances of
BATCH = 8  # images to a pass of the backbone
FOLDS = 5  # of cross-validation


def batches(features: Sequence[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Give features of images, of each layer ``(C, h, w)``, in batches, of each layer ``(B, C, h, w)``."""
    for start in range(0, len(features), BATCH):
        yield [torch.stack(layer) for layer in zip(*features[start : start + BATCH], strict=True)]


class Fold(NamedTuple):
    """Some of the sampled images: features of each, of each layer ``(C, h, w)``, and paths."""

    features: list[list[Tensor]]
    paths: list[str]


class Half:
    """Every second training image: sums over all of them, and a random sample.

    Args:
        number: 0 or 1, of this half.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = 0
        self.moments: list[Moments] = []  # of each layer, of every position or of all together
        self.images: list[Tensor] = []  # (3, H, W)
        self.features: list[list[Tensor]] = []  # of the same images, of each layer (C, h, w)
        self.paths: list[str] = []  # likewise, or ""

    def keep(self, image: Tensor, features: list[Tensor], path: str, most: int, generator: Generator) -> None:
        """Sample an image, all having the same chance (reservoir sampling, algorithm R)."""
        self.count += 1
        if len(self.images) < most:
            self.images.append(image)
            self.features.append(features)
            self.paths.append(path)
            return
        place = int(torch.randint(self.count, (), generator=generator))
        if place < most:
            self.images[place], self.features[place], self.paths[place] = image, features, path

    @property
    def folds(self) -> list[int]:
        """The fold that every sampled image is in, of ``FOLDS``."""
        return [(2 * place + self.number) % FOLDS for place in range(len(self.paths))]

    def feature_batches(self) -> Iterator[list[Tensor]]:
        """Give the features of the sampled images, of each layer ``(B, C, h, w)``."""
        return batches(self.features)


class TrainingSample:
    """Sums over all training images, and a sample of them, in two halves of which one can be tried by the other.

    Args:
        memory_budget: Most bytes to keep.
        generator: Decides the sample.
    """

    def __init__(self, memory_budget: int, generator: Generator) -> None:
        self.room = memory_budget
        self.generator = generator
        self.halves = Half(0), Half(1)
        self.most = 0  # images to a half
        self.has_positions = True  # whether there are moments of every position

    def begin(self, image: Tensor, features: Sequence[Tensor]) -> None:
        """Decide what fits the memory, by one image ``(3, H, W)`` and its features ``(C, h, w)``."""
        needed = sum(2 * 8 * f.shape[1] * f.shape[2] * f.shape[0] ** 2 for f in features)
        self.has_positions = 2 * needed <= self.room
        if self.has_positions:
            self.room -= needed
        else:
            rank_zero_info(
                f"Covariances for every position would take {needed / 2**20:.0f} MiB, more than half of memory_budget: "
                "all positions get one."
            )
        self.most = max(FEWEST_KEPT // 2, self.room // (2 * (image.nbytes + sum(f.nbytes for f in features))))
        for half in self.halves:
            half.moments = [Moments(f.shape[0], f.shape[1:] if self.has_positions else (), f.device) for f in features]

    def add(self, images: Tensor, features: Sequence[Tensor], paths: Sequence[str] | None = None) -> None:
        """Add images ``(B, 3, H, W)``, all of one size, and their features, of each layer ``(B, C, h, w)``."""
        if not self.most:
            self.begin(images[0], [f[0] for f in features])
        turn = self.count % 2  # halves take turns, also over batches
        for half, rows in zip(self.halves, (slice(turn, None, 2), slice(1 - turn, None, 2)), strict=True):
            for moments, f in zip(half.moments, features, strict=True):
                moments.add_maps(f[rows])
            names = paths[rows] if paths else [""] * len(images[rows])
            for path, *kept in zip(names, images[rows], *(f[rows] for f in features), strict=True):
                image, *of_image = (values.clone() for values in kept)  # a view would keep the whole batch in memory
                half.keep(image, of_image, path, self.most, self.generator)

    @property
    def count(self) -> int:
        """How many images have been added."""
        return sum(half.count for half in self.halves)

    def can_be_tried(self, fewest: int) -> bool:
        """Whether own covariances can be tried: with moments of positions, of so many images, some kept of both halves.

        With several processes the moments are those of all, the images those of the first.
        """
        images = sum(float(half.moments[0].weight.max()) for half in self.halves)
        return self.has_positions and images >= fewest and all(half.images for half in self.halves)

    @property
    def kept(self) -> list[Tensor]:
        """The sampled images of both halves, ``(3, H, W)`` each."""
        return [image for half in self.halves for image in half.images]

    def folds(self) -> list[Fold]:
        """Return the sampled images, in folds for cross-validation."""
        folds = [Fold([], []) for _ in range(FOLDS)]
        for half in self.halves:
            for number, features, path in zip(half.folds, half.features, half.paths, strict=True):
                folds[number].features.append(features)
                folds[number].paths.append(path)
        return folds

    def sum_over_processes(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up the sums of several processes, by a function that sums a tensor over them; samples stay their own."""
        for half in self.halves:
            half.moments = [moments.summed(reduce) for moments in half.moments]
