"""Images that cannot be read, refused by the name of their file: Pillow does not always give it."""

import copy
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils import read_image
from lightning.pytorch import Trainer
from PIL import Image, UnidentifiedImageError
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
    return [str(sample.image_path), *([mask] if isinstance(mask, str) and mask else [])]


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
        item = dataset[index]
    except Exception as error:
        files = files_of(dataset, index)
        broken = next((file for file in files if not is_readable(file)), None)
        if broken is None:
            raise
        msg = f"{kind} {broken} cannot be read: {error}"
        raise ValueError(msg) from error
    warn_of_depth(files_of(dataset, index)[0])
    return item


def warn_of_depth(file: str) -> None:
    """Warn, once, of images of more than 8 bits: anomalib accepts them and has Pillow clip them at 255."""
    if Path(file).is_file():
        with suppress(UnidentifiedImageError), Image.open(file) as image:  # a dataset may read what Pillow does not
            if image.mode[0] in "IF":  # 32 and 16 bits, and floating point
                # no name in it, or there would be a warning for every file
                warnings.warn(
                    f"among the images are some of Pillow's mode {image.mode!r}: anomalib clips them at 255, so that "
                    "most 16-bit images are white and floating-point ones black; convert them to 8 bits first",
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
        return loader if trainer.training else with_named_files(loader)

    strategy.process_dataloader = process  # type: ignore[assignment, method-assign]


def read_through(loaders: object) -> None:
    """Read all that validation will, so that what cannot be read is named before training and not after it.

    Args:
        loaders: The validation dataloader, or several.

    Raises:
        ValueError: If an image or mask cannot be read.
    """
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            files = DataLoader(
                NamedFiles(loader.dataset),
                batch_size=None,
                num_workers=loader.num_workers,
                generator=torch.Generator(),  # or it would draw from the global one
            )
            for _ in track(files, description="Reading validation images"):
                pass


def with_named_files(loader: Any) -> Any:
    """The same dataloader, reading by name; the user's own stays as it is."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    named = copy.copy(loader)
    vars(named).update(dataset=NamedFiles(loader.dataset), _iterator=None)  # workers, if any, have the other dataset
    return named
