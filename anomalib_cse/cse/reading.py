"""Reading training images again, as they are and in order."""

import copy
from collections.abc import Iterator

import torch
from anomalib.data import AnomalibDataset, ImageBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import Resize


def is_augmented(dataset: object) -> bool:
    """Whether images differ from one reading to the next; anomalib itself puts the model's ``Resize`` in there."""
    return not isinstance(getattr(dataset, "augmentations", None), Resize | None)


def without_augmentations(dataset: AnomalibDataset) -> AnomalibDataset:
    """Return the same images as they are, but for the model's ``Resize``, which makes batches of them."""
    if not is_augmented(dataset):
        return dataset
    plain = copy.copy(dataset)
    plain.augmentations = next(reversed(extract_transforms_by_type(dataset.augmentations, Resize)), None)
    return plain


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
