"""Images and masks that cannot be read, or not as they are, called by the name of their file; images that are none."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any, cast

from anomalib.data import DepthBatch, ImageBatch
from anomalib.data.utils import LabelName
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..checks import and_others, check_pixels, read_rgb, warn_of_files


def pairs_of(dataset: object) -> list[tuple[str, str]]:
    """Return the images that a dataset reads, each with its mask or ``""``; none of one that does not name them."""
    if isinstance(dataset, Subset):
        pairs = pairs_of(dataset.dataset)
        return [pairs[index] for index in dataset.indices if pairs]
    if hasattr(dataset, "image_filenames"):  # anomalib's PredictDataset
        return [(str(path), "") for path in dataset.image_filenames]
    samples = getattr(dataset, "samples", {})  # a table of anomalib's
    if "image_path" not in samples:
        return []
    images = [str(path) for path in samples["image_path"]]
    if "mask_path" not in samples or "label_index" not in samples:
        return [(path, "") for path in images]
    # anomalib reads masks of defects alone, whatever else is listed
    masks = (
        str(path) if label == LabelName.ABNORMAL and isinstance(path, str | Path) else ""
        for path, label in zip(samples["mask_path"], samples["label_index"], strict=True)
    )
    return list(zip(images, masks, strict=True))


def files_of(dataset: object) -> list[str]:
    """Return the files that a dataset reads, images and masks; none of a dataset that does not name them."""
    return [path for pair in pairs_of(dataset) for path in pair if path]


def reason_unreadable(path: str) -> str:
    """Return why a file does not hold a whole image; nothing if it does."""
    try:
        read_rgb(path)
    except ValueError as error:
        return str(error)
    return ""


def check_files(kind: str, *datasets: object) -> None:
    """Read all images and masks of datasets; warn of those that can be read but are not what they seem.

    Raises:
        ValueError: If a file, of a ``kind``, cannot be read, or a mask is of other proportions than its image.
    """
    pairs = list(dict.fromkeys(pair for dataset in datasets for pair in pairs_of(dataset)))
    empty = []
    for path, mask_path in track(pairs, description=f"Reading {kind} images"):
        try:
            image, mask = read_rgb(path), read_rgb(mask_path) if mask_path else None
        except ValueError as error:
            msg = f"{kind} file {error}"
            raise ValueError(msg) from error
        if mask is not None:
            check_mask(path, image.size, mask_path, mask.size)
            if mask.getbbox() is None:
                empty.append(mask_path)
    if empty:
        msg = f"{empty[0]}, the mask of a defect, is empty: pixel metrics count all of its image as good"
        warnings.warn(msg + and_others(empty), stacklevel=2)
    warn_of_files(file for pair in pairs for file in pair if file)


def check_mask(path: str, size: tuple[int, int], mask_path: str, mask_size: tuple[int, int]) -> None:
    """Raise a ``ValueError`` if a mask would be stretched to fit its image; ``size`` is width and height."""
    (width, height), (mask_width, mask_height) = size, mask_size
    # of a smaller copy, sides are off by a pixel
    if abs(width * mask_height - height * mask_width) > max(width, height, mask_width, mask_height):
        msg = (
            f"the mask {mask_path} has {mask_width}x{mask_height} pixels, its image {path} {width}x{height}: masks "
            "must have the proportions of their images"
        )
        raise ValueError(msg)


def check_batch(batch: object) -> None:
    """Raise a ``ValueError`` unless a batch, before anything is done to it, is of images in [0, 1]."""
    if not isinstance(batch, ImageBatch | DepthBatch):
        msg = f"dataloaders must give anomalib's ImageBatch, got {type(batch).__name__}: see ImageBatch.collate"
        raise ValueError(msg)
    check_pixels(cast(Tensor, batch.image), batch.image_path)


class ImageCheck(Callback):
    """Name files that cannot be read, those for validation before training, and images that are none.

    It has to come before the pre-processor, and before what holds images out.
    """

    training_files: Sequence[str] = ()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the images of a training batch."""
        del trainer, pl_module, batch_idx
        check_batch(batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the images of a batch to score."""
        del trainer, pl_module, batch_idx, dataloader_idx
        check_batch(batch)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the training images, before any are held out."""
        del pl_module
        data = getattr(trainer, "datamodule", None) if stage == TrainerFn.FITTING else None
        self.training_files = files_of(getattr(data, "train_data", None))
        warn_of_files(self.training_files)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read all that is to validate and test with, so that a broken file does not end a training of hours."""
        del pl_module
        data = getattr(trainer, "datamodule", None)
        used = {"val_data": trainer.limit_val_batches, "test_data": trainer.limit_test_batches}
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_files("evaluation", *(getattr(data, name, None) for name, limit in used.items() if limit))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation images, where no fit has."""
        del pl_module
        if trainer.state.fn == TrainerFn.VALIDATING:
            warn_of_loaded(trainer.val_dataloaders)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the test images."""
        del pl_module
        warn_of_loaded(trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the images."""
        del pl_module
        warn_of_loaded(trainer.predict_dataloaders)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add to an error from reading images which file it was."""
        del pl_module
        if not any("torch/utils/data" in frame.f_code.co_filename for frame, _ in walk_tb(exception.__traceback__)):
            return
        used = (
            trainer.train_dataloader,
            trainer.val_dataloaders,
            trainer.test_dataloaders,
            trainer.predict_dataloaders,
        )
        datasets = (dataset for loaders in used for dataset in datasets_of(loaders))
        loaded = (path for dataset in datasets for path in files_of(dataset))
        files = dict.fromkeys((*self.training_files, *loaded))
        reason = next(filter(None, map(reason_unreadable, files)), "")
        if reason:
            exception.add_note(reason)


def warn_of_loaded(loaders: object) -> None:
    """Warn of files that dataloaders read and that are not what they seem."""
    for dataset in datasets_of(loaders):
        warn_of_files(files_of(dataset))


def datasets_of(loaders: object) -> Iterator[Dataset]:
    """Give the datasets of a dataloader, or of a list or dictionary of them."""
    for loader in CombinedLoader(loaders).flattened if loaders is not None else ():
        if isinstance(loader, DataLoader):
            yield loader.dataset
