"""Images that cannot be read, refused by the name of their file: Pillow does not always give it."""

from typing import Any

from anomalib.data.utils import read_image
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset


def paths(dataset: Any, index: int) -> list[str]:
    """The image, or else its number, and the mask if there is one, of an anomalib dataset or a ``Subset`` of one."""
    if isinstance(dataset, Subset):
        return paths(dataset.dataset, dataset.indices[index])
    if hasattr(dataset, "image_filenames"):  # anomalib's PredictDataset
        return [str(dataset.image_filenames[index])]
    if not hasattr(dataset, "samples"):
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


def read(dataset: Dataset, index: int, kind: str = "image") -> Any:
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
        image, *masks = paths(dataset, index)
        broken = masks[0] if masks and is_readable(image) else image
        msg = f"{kind} {broken} cannot be read: {error}"
        raise ValueError(msg) from error


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
        return read(self.dataset, index)


def name_files(trainer: Trainer) -> None:
    """Have a trainer read what it is about to validate, test or predict as :class:`NamedFiles`.

    To be called in ``setup``: between asking for a dataloader and starting its workers Lightning calls nobody.
    """
    loops: dict[Any, tuple[Any, float]] = {
        TrainerFn.FITTING: (trainer.fit_loop.epoch_loop.val_loop, trainer.limit_val_batches),
        TrainerFn.VALIDATING: (trainer.validate_loop, trainer.limit_val_batches),
        TrainerFn.TESTING: (trainer.test_loop, trainer.limit_test_batches),
        TrainerFn.PREDICTING: (trainer.predict_loop, trainer.limit_predict_batches),
    }
    loop, limit = loops[trainer.state.fn]
    source = loop._data_source
    if limit and source.is_defined():
        source.instance = apply_to_collection(source.dataloader(), DataLoader, with_named_files)


def with_named_files(loader: DataLoader) -> DataLoader:
    """The same dataloader, reading by name; the user's own stays as it is."""
    if isinstance(loader.dataset, IterableDataset):
        return loader
    named = loader.__new__(type(loader))
    # not copied: Lightning's notes for making the loader anew, which hold the dataset as well
    state = {name: value for name, value in vars(loader).items() if not name.startswith("__pl_")}
    vars(named).update(state, dataset=NamedFiles(loader.dataset))
    return named
