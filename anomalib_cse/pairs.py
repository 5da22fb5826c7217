"""Training pairs: which two images meet, and reading only those that are not in memory (Section 3.2)."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, DistributedSampler

from .reading import files_of, read_item

CORRUPT_PROBABILITY = 0.5  # of the second image of a pair (Section 3.2)


class Pair(NamedTuple):
    """A defect-free image, the image it is compared with, and whether that one is to be corrupted."""

    first: int
    second: int
    corrupt: bool


class PairBatch(NamedTuple):
    """B pairs as the training step gets them.

    Attributes:
        first, second: Indices of the images, ``(B,)``.
        corrupt: Whether the second is to be corrupted, ``(B,)`` bool.
        rows: Those pairs in which it is, a list, so that choosing them does not wait for a device.
        images: The images that had to be read: both of every pair ``(B, 2, 3, H, W)``, the corrupted ones alone
            ``(len(rows), 3, H, W)``, or ``(0,)`` if all are in memory.
    """

    first: Tensor
    second: Tensor
    corrupt: Tensor
    rows: list[int]
    images: Tensor


def generator_for(*seeds: int) -> Generator:
    """A generator on the CPU that the numbers determine, so that no state needs to be kept or restored."""
    state = 0
    for seed in seeds:
        state = int(torch.randint(2**62, (), generator=Generator().manual_seed(state ^ seed)))
    return Generator().manual_seed(state)


def even_batches(pairs: Sequence[Pair], batch_size: int) -> list[list[Pair]]:
    """Batches of at most ``batch_size`` pairs whose sizes differ by one at most.

    A last batch of a single pair would give BatchNorm the statistics of one image.
    """
    count = math.ceil(len(pairs) / batch_size)
    ends = [len(pairs) * number // count for number in range(count + 1)]
    return [list(pairs[start:end]) for start, end in pairwise(ends)]


class PairSampler(DistributedSampler):
    """Batches of pairs: every image once as the first of a pair, the second drawn at random, anew every epoch.

    Being torch's own ``DistributedSampler``, it is told the epoch by Lightning and is left in place under DDP.

    Args:
        indices: The images to pair.
        batch_size: Most pairs of a batch.
        seed: Together with the epoch it decides everything drawn.
        num_replicas, rank: Number of processes, and which one this is.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(indices, num_replicas, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.indices = indices
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of this process's batches."""
        return math.ceil(self.num_samples / self.batch_size)

    def __iter__(self) -> Iterator[list[Pair]]:
        """Draw this epoch's pairs and go through this process's share of them, batch by batch."""
        generator = generator_for(self.seed, self.epoch)
        count = len(self.indices)
        second = torch.randint(count, (count,), generator=generator).tolist()
        corrupt = (torch.rand(count, generator=generator) < CORRUPT_PROBABILITY).tolist()
        pairs = [Pair(self.indices[i], self.indices[second[i]], corrupt[i]) for i in super().__iter__()]
        return iter(even_batches(pairs, self.batch_size))


class PairDataset(Dataset):
    """Reads what a batch of pairs needs from disk.

    Args:
        images: The training images, preprocessed: ``images[i]`` is ``(3, H, W)`` in [0, 1].
        needs: Which images of a pair are not in memory: ``"both"``, the ``"corrupted"`` second or ``"none"``.
    """

    def __init__(self, images: Dataset, needs: Literal["both", "corrupted", "none"]) -> None:
        self.images = images
        self.needs = needs

    def __getitem__(self, pairs: Sequence[Pair]) -> PairBatch:
        """A batch of pairs with the images that it needs."""
        first, second, corrupt = zip(*pairs, strict=True)
        rows = [row for row, is_corrupt in enumerate(corrupt) if is_corrupt]
        images = torch.empty(0)
        if self.needs == "both":
            images = torch.stack([torch.stack([self.images[i], self.images[j]]) for i, j, _ in pairs])
        elif self.needs == "corrupted" and rows:
            images = torch.stack([self.images[second[row]] for row in rows])
        return PairBatch(torch.tensor(first), torch.tensor(second), torch.tensor(corrupt), rows, images)


class PreparedImages(Dataset):
    """The images of an anomalib dataset as the network sees them.

    Args:
        dataset: Its items have an ``image`` ``(3, H, W)`` in [0, 1].
        transform: The model's pre-processing, or ``None``.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Tensor], Tensor] | None) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        """One image ``(3, H, W)``.

        Raises:
            ValueError: If it cannot be read or holds NaN or infinite pixels.
        """
        image = read_item(self.dataset, index, "training image").image
        if not image.isfinite().all():
            msg = f"training image {files_of(self.dataset, index)[0]} holds NaN or infinite pixels"
            raise ValueError(msg)
        return self.transform(image) if self.transform else image
