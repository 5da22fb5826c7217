"""Training pairs by their features (Section 3.2).

The backbone is frozen, so the features of a defect-free image never change and are computed once. What differs from
step to step is the corrupted images.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from anomalib.data import ImageBatch
from rich.progress import track
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..features import FeatureCache
from ..synthesis import AnomalySynthesis, Stream, generator_for
from .hold_out import HoldOut, is_augmented, without_augmentations

CORRUPT_PROBABILITY = 0.5  # of the second image of a pair (Section 3.2)
MIN_HELD_OUT_PAIRS = 64  # few images are paired several times over: a few draws would be a coarse measure


class Pairs(NamedTuple):
    """B pairs: features of defect-free images, those of their partners, and whether a partner is corrupted, ``(B,)``.

    Features are of each layer ``(B, C, h, w)``.
    """

    first: list[Tensor]
    second: list[Tensor]
    corrupted: Tensor

    def features(self) -> list[Tensor]:
        """Return all features as one batch of 2B, so that BatchNorm sees clean and corrupted ones alike."""
        return [torch.cat(layer) for layer in zip(self.first, self.second, strict=True)]

    @property
    def nbytes(self) -> int:
        """How many bytes the features take."""
        return sum(f.nbytes for f in (*self.first, *self.second))


def draw_partners(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw for each of B images another one of the batch, and whether to corrupt it: indices and bool ``(B,)``.

    A single image is its own partner.
    """
    steps = torch.randint(1, max(2, count), (count,), generator=generator)
    corrupted = torch.rand(count, generator=generator) < CORRUPT_PROBABILITY
    return (torch.arange(count) + steps) % count, corrupted


def first(dataset: Dataset, count: int) -> Dataset:
    """Return the first images of a dataset."""
    return Subset(dataset, range(min(count, len(dataset))))  # type: ignore[arg-type]


def paths_of(dataset: object) -> list[str]:
    """Return the paths of a dataset's images in order; none of a dataset that does not name them."""
    if isinstance(dataset, Subset):
        paths = paths_of(dataset.dataset)
        return [paths[index] for index in dataset.indices] if paths else []
    samples = getattr(dataset, "samples", {})
    return list(samples["image_path"]) if "image_path" in samples else []


def in_order(dataset: Dataset, loader: DataLoader) -> Iterator[ImageBatch]:
    """Read a dataset in order, as ``loader`` reads its own."""
    own_numbers = torch.Generator()  # or this would draw from the global ones
    workers, collate = loader.num_workers, loader.collate_fn
    return iter(DataLoader(dataset, loader.batch_size, num_workers=workers, collate_fn=collate, generator=own_numbers))


class Pairing:
    """Pair the images of a batch and give the pairs' features; exists while a model is being fitted.

    Args:
        extract: Computes the frozen features of images ``(B, 3, H, W)`` in [0, 1], in float32.
        synthesis: Paints the defects.
        memory_budget: Most bytes of features to keep.
        seed: Decides pairs and defects.
        hold_out: What of the datamodule's training images is held out.
        loader: The training dataloader, which says how images are read again.
        transform: The model's pre-processing, or ``None``.
    """

    def __init__(
        self,
        extract: Callable[[Tensor], list[Tensor]],
        synthesis: AnomalySynthesis,
        memory_budget: int,
        seed: int,
        hold_out: HoldOut,
        loader: DataLoader,
        transform: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.extract = extract
        self.synthesis = synthesis
        self.cache = FeatureCache(memory_budget, synthesis.textures.device)
        self.seed = seed
        self.held_out: Dataset | None = hold_out.held_out
        images = hold_out.all_images
        self.caches = memory_budget > 0 and images is not None  # a user's own may differ at each reading
        self.defect_free = loader.dataset if images is None else without_augmentations(images)  # held out or not
        training = hold_out.training
        self.training = loader.dataset if training is None else without_augmentations(training)
        self.caches_training = not is_augmented(images)
        self.loader = loader
        self.transform = transform
        self.caches_validation = False  # whether features of images to validate with may be kept
        self.kept: dict[int, list[Pairs]] = {}  # that are the same at every call

    def limit(self, count: int) -> None:
        """Take no more than so many images to hold out and to fit centres to, as ``fast_dev_run`` wants."""
        self.defect_free = first(self.defect_free, count)
        self.training = first(self.training, count)
        self.held_out = None if self.held_out is None else first(self.held_out, count)

    @property
    def count(self) -> int:
        """How many training images there are, held out or not."""
        return len(self.defect_free)  # type: ignore[arg-type]

    @property
    def count_held_out(self) -> int:
        """How many images are held out."""
        return 0 if self.held_out is None else len(self.held_out)  # type: ignore[arg-type]

    def training_pairs(self, images: Tensor, paths: Sequence[str] | None, *numbers: int) -> Pairs:
        """Pair the images ``(B, 3, H, W)`` of a training step, which the numbers tell from all others."""
        clean = self.features_of(images, paths if self.caches_training else None)
        return self.pair(images, clean, generator_for(self.seed, Stream.TRAINING_PAIRS, *numbers))

    @torch.no_grad()
    def pair(self, images: Tensor, clean: list[Tensor], generator: Generator) -> Pairs:
        """Give each image ``(B, 3, H, W)``, of features ``clean``, a partner out of its batch, corrupted or not."""
        partners, corrupted = (drawn.to(images.device) for drawn in draw_partners(len(images), generator))
        second = [f[partners] for f in clean]
        if corrupted.any():
            originals = images[partners[corrupted]]
            # a training step may be in 16 bits: these would be other defects than the held-out ones
            with torch.autocast(images.device.type, enabled=False):
                painted = self.synthesis.apply(originals, self.synthesis.sample(originals.shape, generator))
            for features, new in zip(second, self.extract(painted), strict=True):
                features[corrupted] = new
        return Pairs(clean, second, corrupted)

    def held_out_pairs(self) -> Iterator[Pairs]:
        """Give the pairs of held-out images, the same at every call."""
        return iter(()) if self.held_out is None else self.fixed_pairs(self.held_out, Stream.HELD_OUT_PAIRS)

    def pairs_like_held_out(self) -> Iterator[Pairs]:
        """Give pairs of training images, as many as of held-out ones, the same at every call."""
        return self.fixed_pairs(first(self.training, self.count_held_out), Stream.PAIRS_LIKE_HELD_OUT)

    def fixed_pairs(self, dataset: Dataset, number: int) -> Iterator[Pairs]:
        """Give the pairs of a dataset as a number draws them; they are kept if there is room for all."""
        if number in self.kept:
            yield from self.kept[number]
            return
        kept: list[Pairs] = []
        needed = 0
        for pairs in self.new_pairs(dataset, number):
            needed += pairs.nbytes
            if needed <= self.cache.bytes_left:
                kept.append(pairs)
            else:
                kept.clear()
            yield pairs
        if kept:
            self.cache.bytes_left -= needed
            self.kept[number] = kept

    def new_pairs(self, dataset: Dataset, number: int) -> Iterator[Pairs]:
        """Read images and pair them, several times over if they are few."""
        repeats = -(-MIN_HELD_OUT_PAIRS // len(dataset))  # type: ignore[arg-type]
        for batch, (images, clean) in enumerate(self.read(dataset, "Reading held-out images")):
            for repeat in range(repeats):
                yield self.pair(images, clean, generator_for(self.seed, number, repeat, batch))

    def clean_features(self, dataset: Dataset) -> Iterator[list[Tensor]]:
        """Give the features of a dataset's images in order, batch by batch, reading only what is not in memory."""
        paths = paths_of(dataset)
        if paths and all(path in self.cache.features for path in paths):
            size = self.loader.batch_size or 1
            yield from (self.cache.of_paths(paths[start : start + size]) for start in range(0, len(paths), size))
        else:
            yield from (features for _, features in self.read(dataset, "Reading training images"))

    def read(self, dataset: Dataset, description: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Read images in order: give them, ``(B, 3, H, W)`` on the device, and their features."""
        total = -(-len(dataset) // (self.loader.batch_size or 1))  # type: ignore[arg-type]
        for batch in track(in_order(dataset, self.loader), description=description, total=total):
            images = batch.image.to(self.synthesis.textures.device)  # type: ignore[union-attr]
            images = self.transform(images) if self.transform else images
            yield images, self.features_of(images, batch.image_path)

    def features_of(self, images: Tensor, paths: Sequence[str] | None) -> list[Tensor]:
        """Return the features of clean images ``(B, 3, H, W)``, out of memory if they have paths."""
        return self.cache(images, paths, self.extract) if self.caches and paths else self.extract(images)
