"""Images that cannot be read, refused by the name of their file: Pillow does not always give it."""

import copy
import warnings
from typing import Any

import torch
from anomalib.data.utils import read_image
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from rich.progress import track
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset


def files_of(dataset: Any, index: int) -> list[str]:
    """The image, or else its number, and the mask if there is one, of an anomalib dataset or a ``Subset`` of one."""
    if isinstance(dataset, Subset):
        return files_of(dataset.dataset, dataset.indices[index])
    if hasattr(dataset, "image_filenames"):  # anomalib's PredictDataset
        return [str(dataset.image_filenames[index])]
    if not hasattr(getattr(dataset, "samples", None), "iloc"):
        return [f"number {index}"]
    sample = dataset.samples.iloc[index]
    mask = sample.get("mask_path")
    return [str(sample.get("image_path", f"number {index}")), *([mask] if isinstance(mask, str) and mask else [])]


def is_readable(path: str) -> bool:
    """Whether a file holds a whole image."""
    try:
        read_image(path)
    except Exception:  # noqa: BLE001  Pillow has a dozen kinds for broken files
        return False
    return True


def read_item(dataset: Dataset, index: int, kind: str = "image") -> Any:
    """One item of a dataset.

    Args:
        dataset: Of images.
        index: Which one.
        kind: What it is, for the message.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return dataset[index]
    except Exception as error:
        files = files_of(dataset, index)
        broken = next((file for file in files if not is_readable(file)), None)
        if broken is None:
            raise
        msg = f"{kind if broken == files[0] else 'mask'} {broken} cannot be read: {error}; replace it or take it out"
        raise ValueError(msg) from error


def warn_of_depth(dataset: Dataset) -> None:
    """Warn if the first image has more than 8 bits: anomalib accepts such and has Pillow clip them at 255."""
    try:
        first = files_of(dataset, 0)[0]
        with Image.open(first) as image:
            mode = image.mode
    except Exception:  # noqa: BLE001  a dataset may keep its files elsewhere, and read what Pillow does not
        return
    if mode[0] in "IF":  # 16 and 32 bits of grey, and floating point
        warnings.warn(
            f"{first} is of Pillow's mode {mode!r}: anomalib clips such images at 255, so that most 16-bit ones are "
            "white and floating-point ones black; convert them to 8 bits first",
            stacklevel=2,
        )


class NamedFiles(Dataset):
    """A dataset of images, but those that cannot be read are named.

    Args:
        dataset: What to read from.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of items."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """One item."""
        return read_item(self.dataset, index)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the dataset has, for those who look through the dataloader."""
        if name.startswith("__"):  # of pickle and torch, which are to take this one for what it is
            raise AttributeError(name)
        return getattr(self.dataset, name)


def name_unreadable_files(trainer: Trainer) -> None:
    """Have a trainer validate, test and predict from :class:`NamedFiles`, once Lightning has made its dataloaders."""
    strategy = trainer.strategy

    def process(loader: object) -> object:
        loader = type(strategy).process_dataloader(strategy, loader)
        if trainer.training or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return loader
        warn_of_depth(loader.dataset)
        return with_named_files(loader)

    strategy.process_dataloader = process  # type: ignore[assignment, method-assign]


def with_named_files(loader: DataLoader) -> DataLoader:
    """The same dataloader, reading by name; the user's own stays as it is."""
    named = copy.copy(loader)
    vars(named).update(dataset=NamedFiles(loader.dataset), _iterator=None)  # workers, if any, have the other dataset
    return named


def read_through(loaders: Any) -> None:
    """Read all that validation will, so that what cannot be read is named before training and not after it.

    Args:
        loaders: The validation dataloader, or a list or dictionary of them.

    Raises:
        ValueError: If an image or mask cannot be read.
    """
    for loader in CombinedLoader(loaders).flattened:
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            named = with_named_files(loader)
            named.generator = torch.Generator()  # or it would draw from the global one
            for _ in track(named, description="Reading validation images"):
                pass
