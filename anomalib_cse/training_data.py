"""The training images: hold-out, pairs, and what of them is kept in memory (Sections 3.2 and 4.1).

The backbone is frozen, so the features of a defect-free image never change and are computed once. What differs from
epoch to epoch is the corrupted images, and those need their originals. Both are kept as plain tensors, because then a
pair is an index on any device and needs no worker; what does not fit the budget is read by the dataloader's workers.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import Resize, Transform

from .pairs import Pair, PairBatch, PairDataset, PairSampler, PreparedImages, even_batches, generator_for
from .reading import warn_of_depth
from .synthesis import AnomalySynthesis

logger = logging.getLogger(__name__)

Extract = Callable[[Tensor], list[Tensor]]
PairFeatures = tuple[list[Tensor], list[Tensor], Tensor]
T = TypeVar("T")

MIN_HOLDOUT_PAIRS = 64  # few images are paired several times over: a few draws would be a coarse measure
# set apart the streams of random numbers that one seed gives
SPLIT, TRAIN_PAIRS, TRAIN_DEFECTS, HOLDOUT_PAIRS, HOLDOUT_DEFECTS, SHUFFLE, SAMPLE, SAMPLE_DEFECTS = range(8)


class TrainingData:
    """Everything that training needs from the images of a dataloader.

    Args:
        loader: The training dataloader that the user configured: its dataset, and how to read it.
        transform: The model's pre-processing, or ``None``.
        synthesis: Paints the defects.
        batch_size: Pairs per step.
        holdout_ratio: Share of the images held out.
        seed: Decides the split, the pairs and the defects.
        memory_budget: Most bytes for features and images.
        memory_dtype: In which numbers they are kept.
        keep_images: Whether images, as they are without augmentations, are of use between epochs.
        num_replicas, rank: Number of processes, and which one this is.

    Raises:
        TypeError: If the loader is no ``DataLoader`` over a dataset of known length.
        ValueError: If there are too few images to train with some and hold out others.
    """

    def __init__(
        self,
        loader: DataLoader,
        transform: Transform | None,
        *,
        synthesis: AnomalySynthesis,
        batch_size: int = 8,
        holdout_ratio: float = 0.3,
        seed: int = 0,
        memory_budget: int = 4 * 2**30,
        memory_dtype: torch.dtype = torch.float32,
        keep_images: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
            msg = f"Cse draws pairs, so it needs one DataLoader over a dataset of known length, got {type(loader)}"
            raise TypeError(msg)
        warn_of_depth(loader.dataset)
        self.loader = loader
        self.augmented = PreparedImages(loader.dataset, transform)
        plain = without_augmentations(loader.dataset) if keep_images else loader.dataset
        self.images = PreparedImages(plain, transform)
        self.synthesis = synthesis
        self.batch_size = batch_size
        self.seed = seed
        self.memory_budget = memory_budget
        if is_augmented(loader.dataset):
            logger.info("Training augmentations change the images, so nothing is kept between epochs.")
            self.memory_budget = 0
        self.memory_dtype = memory_dtype
        self.keep_images = keep_images
        self.num_replicas = num_replicas
        self.rank = rank
        count = len(self.images)
        held_out = max(1, round(holdout_ratio * count)) if holdout_ratio else 0
        if count <= held_out:
            msg = f"too few training images, {count}, to hold out {held_out}: give more, or set holdout_ratio to 0"
            raise ValueError(msg)
        order = torch.randperm(count, generator=generator_for(seed, SPLIT)).tolist()
        self.holdout, self.training = sorted(order[:held_out]), sorted(order[held_out:])
        self.halves = order[: -(-count // 2)], order[-(-count // 2) :]
        self.room = 0
        self.kept_features: list[Tensor] | None = None
        self.kept_images: Tensor | None = None
        self.kept_holdout: list[tuple[PairBatch, list[Tensor]]] | None = None

    def load(self, extract: Extract, device: torch.device) -> None:
        """Read every image once and keep what fits the budget: features first, being smaller and saving more.

        Args:
            extract: The backbone, from ``(B, 3, H, W)`` to ``(B, C, h, w)`` per layer.
            device: Where it runs and where things are kept.
        """
        self.extract, self.device = extract, device
        at = 0
        for images in track(self.read_images(range(len(self.images))), description="Reading training images"):
            features = self.compute(images.to(device))
            if at == 0 and not self.allocate(images[0], features):
                return
            for kept, new in zip(self.kept_features or (), features, strict=True):
                kept[at : at + len(images)] = new
            if self.kept_images is not None:
                self.kept_images[at : at + len(images)] = images
            at += len(images)
        # the images of these pairs are not needed again
        self.kept_holdout = [
            (batch._replace(images=torch.empty(0)), [f.to(self.memory_dtype) for f in new])
            for batch, new in self.new_holdout_features()
        ]

    def allocate(self, image: Tensor, features: Sequence[Tensor]) -> bool:
        """Make room for the features of all images, and for the images if both fit; whether anything did."""
        count, size = len(self.images), self.memory_dtype.itemsize
        features_needed = size * sum(f[0].numel() for f in features) * (count + sum(map(len, self.holdout_pairs())))
        images_needed = size * image.numel() * count
        options: dict[str, Any] = {"dtype": self.memory_dtype, "device": self.device}
        if features_needed <= self.memory_budget:
            self.kept_features = [torch.empty(count, *f.shape[1:], **options) for f in features]
            self.room = self.memory_budget - features_needed
        if self.keep_images and features_needed + images_needed <= self.memory_budget:
            self.kept_images = torch.empty(count, *image.shape, **options)
        elif self.keep_images or self.kept_features is None:
            logger.info(
                "memory_budget is %d bytes; features need %d (%s), images %d more (read anew every epoch).",
                self.memory_budget,
                features_needed,
                "kept" if self.kept_features else "computed anew every epoch",
                images_needed,
            )
        return self.kept_features is not None

    @property
    def needs(self) -> Literal["both", "corrupted", "none"]:
        """Which images of a pair have to be read, as :class:`PairDataset` has it."""
        if self.kept_features is None:
            return "both"
        return "corrupted" if self.kept_images is None else "none"

    def read(self, dataset: Dataset, order: Iterable, batch_size: int | None, num_workers: int) -> DataLoader:
        """A dataloader whose workers are seeded from its own generator, not from the global one."""
        return DataLoader(
            dataset,
            sampler=order,
            batch_size=batch_size,
            num_workers=num_workers,
            generator=generator_for(self.seed),
        )

    def read_images(self, order: Sequence[int], batch_size: int | None = None) -> DataLoader:
        """A dataloader of the images alone, in batches as large as the user's if no size is given."""
        return self.read(
            self.images, order, batch_size or self.loader.batch_size or self.batch_size, self.loader.num_workers
        )

    def read_pairs(self, images: Dataset, batches: Iterable[list[Pair]]) -> DataLoader:
        """A dataloader of pairs, without workers if it has nothing to read."""
        workers = 0 if self.needs == "none" else self.loader.num_workers
        return self.read(PairDataset(images, self.needs), batches, None, workers)

    def train_dataloader(self, epoch: int = 0) -> DataLoader:
        """This process's share of the training pairs, drawn anew every epoch.

        Args:
            epoch: The first one.
        """
        seed = int(generator_for(self.seed, TRAIN_PAIRS).initial_seed())
        sampler = PairSampler(self.training, self.batch_size, seed, num_replicas=self.num_replicas, rank=self.rank)
        sampler.set_epoch(epoch)
        return self.read_pairs(self.augmented, sampler)

    def holdout_pairs(self) -> list[list[Pair]]:
        """Batches of pairs of held-out images: every process's, and the same every epoch."""
        if not self.holdout:
            return []
        seed = int(generator_for(self.seed, HOLDOUT_PAIRS).initial_seed())
        sampler = PairSampler(self.holdout, len(self.holdout), seed)
        pairs: list[Pair] = []
        while len(pairs) < MIN_HOLDOUT_PAIRS:
            sampler.set_epoch(len(pairs))
            pairs += next(iter(sampler))
        return even_batches(pairs, self.batch_size)

    @torch.no_grad()
    def compute(self, images: Tensor) -> list[Tensor]:
        """Features of ``images``, without gradients."""
        return self.extract(images)

    def corrupt(self, images: Tensor, *seeds: int) -> Tensor:
        """Paint defects into all ``images`` ``(R, 3, H, W)``."""
        # a training step may be in 16 bits: these would be other defects than the held-out ones
        with torch.autocast(images.device.type, enabled=False):
            return self.synthesis.apply(images, self.synthesis.sample(images.shape, generator_for(self.seed, *seeds)))

    def new_features(self, batch: PairBatch, *seeds: int) -> list[Tensor]:
        """Features of the images of a batch that are not kept: the corrupted ones, or else all, first and second."""
        rows = batch.rows
        if self.kept_features is None:
            images = batch.images.movedim(1, 0).flatten(0, 1)  # firsts, then seconds: (2B, 3, H, W)
            if rows:
                seconds = [len(batch.first) + row for row in rows]
                images = images.index_put((torch.tensor(seconds),), self.corrupt(images[seconds], *seeds))
            return self.compute(images)
        if not rows:
            return [f[:0] for f in self.kept_features]
        originals = batch.images if self.kept_images is None else self.kept_images[batch.second[rows]]
        return self.compute(self.corrupt(originals.float(), *seeds))

    def assemble(self, batch: PairBatch, new: list[Tensor]) -> PairFeatures:
        """Put new and kept features together: the pairs' first ones, second ones, and which of those are corrupted."""
        if self.kept_features is None:
            halves = [f.chunk(2) for f in new]
            return [first for first, _ in halves], [second for _, second in halves], batch.corrupt
        first = [f[batch.first].float() for f in self.kept_features]
        second = [f[batch.second].float() for f in self.kept_features]
        for features, corrupted in zip(second, new, strict=True):
            features[batch.rows] = corrupted.float()
        return first, second, batch.corrupt

    def pair_features(self, batch: PairBatch, epoch: int, number: int) -> PairFeatures:
        """Features of the pairs of a training step, the ``number``-th of an epoch."""
        return self.assemble(batch, self.new_features(batch, TRAIN_DEFECTS, self.rank, epoch, number))

    def new_holdout_features(self) -> Iterator[tuple[PairBatch, list[Tensor]]]:
        """The batches of held-out pairs with the features that are not kept of them."""
        for number, batch in enumerate(self.read_pairs(self.images, self.holdout_pairs())):
            on_device = move_data_to_device(batch, self.device)
            yield on_device, self.new_features(on_device, HOLDOUT_DEFECTS, number)

    def holdout_features(self) -> Iterator[PairFeatures]:
        """Features of the held-out pairs, batch by batch."""
        for batch, new in self.kept_holdout or self.new_holdout_features():
            yield self.assemble(batch, new)

    def features(self, epoch: int | None = None, half: int | None = None) -> Iterator[list[Tensor]]:
        """Clean features of all images, batch by batch; in random order if an epoch is given.

        Args:
            epoch: Decides the order.
            half: Which half of the images is meant, 0 or 1, in place of all.
        """
        order = list(range(len(self.images))) if half is None else self.halves[half]
        if epoch is not None:
            shuffled = torch.randperm(len(order), generator=generator_for(self.seed, SHUFFLE, epoch))
            order = [order[i] for i in shuffled]
        if self.kept_features is not None:
            for start in range(0, len(order), self.batch_size):
                yield [f[order[start : start + self.batch_size]].float() for f in self.kept_features]
        else:
            loader = self.read_images(order, self.batch_size)
            for images in track(loader, description="Embedding training images"):
                yield self.compute(images.to(self.device))

    def draw(self, count: int, images: Sequence[int]) -> list[int]:
        """So many images at random, none again before all have been drawn; none if there are none."""
        generator = generator_for(self.seed, SAMPLE)
        drawn: list[int] = []
        while images and len(drawn) < count:
            drawn += [images[i] for i in torch.randperm(len(images), generator=generator)]
        return drawn[:count]

    def corrupted_features(self, count: int, half: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Features of ``count`` images with synthetic defects, and the defects' masks ``(B, H, W)``, in batches."""
        loader = self.read_images(self.draw(count, self.halves[half]), self.batch_size)
        for number, read in enumerate(track(loader, description="Drawing defects")):
            images = read.to(self.device)
            params = self.synthesis.sample(images.shape, generator_for(self.seed, SAMPLE_DEFECTS, half, number))
            yield self.compute(self.synthesis.apply(images, params)), params.mask[:, 0].to(self.device)

    def mirrored_features(self, count: int) -> Iterator[list[Tensor]]:
        """Features of up to ``count`` images, each as it is, mirrored along either axis and along both."""
        order = range(len(self.images))
        loader = self.read_images(self.draw(min(count, len(order)), order), self.batch_size)
        for read in track(loader, description="Measuring the border"):
            images = read.to(self.device)
            for axes in ((), (-1,), (-2,), (-2, -1)):
                yield self.compute(images.flip(axes))

    def again(self, make: Callable[[], Iterable[T]]) -> Callable[[], Iterable[T]]:
        """What ``make`` gives, batches of tensors, to go through again: kept, or made anew without room."""
        kept: list[T] = []
        room = self.room
        for made in make():
            room -= size_of(made)
            if room < 0:
                return make
            kept.append(made)
        self.room = room
        return lambda: kept


def size_of(batch: Any) -> int:
    """Bytes of a tensor, or of all in nested sequences."""
    return batch.nbytes if isinstance(batch, Tensor) else sum(map(size_of, batch))


def is_augmented(dataset: Any) -> bool:
    """Whether images differ from one reading to the next; anomalib itself puts the model's ``Resize`` in there."""
    if hasattr(dataset, "dataset"):  # a torch Subset
        return is_augmented(dataset.dataset)
    return not isinstance(getattr(dataset, "augmentations", None), Resize | None)


def without_augmentations(dataset: Any) -> Any:
    """The same images as they are, for the hold-out and the centres."""
    plain = copy.copy(dataset)
    if hasattr(plain, "dataset"):
        plain.dataset = without_augmentations(plain.dataset)
    if getattr(plain, "augmentations", None) is not None:
        plain.augmentations = None
    return plain
