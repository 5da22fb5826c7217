"""Images and masks that cannot be read, or not as they are, called by the name of their file; images that are none."""

from collections.abc import Iterator
from traceback import walk_tb
from typing import Any, cast

from anomalib.data import DepthBatch, ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..checks import check_pixels, read_rgb, warn_of_depth


def files_of(dataset: object) -> list[str]:
    """Return the files that a dataset reads, images and masks; none of a dataset that does not name them."""
    if isinstance(dataset, Subset):
        files = files_of(dataset.dataset)
        return [files[index] for index in dataset.indices if files]
    if hasattr(dataset, "image_filenames"):  # anomalib's PredictDataset
        return [str(path) for path in dataset.image_filenames]
    samples = getattr(dataset, "samples", {})  # a table of anomalib's
    columns = [samples[name] for name in ("image_path", "mask_path") if name in samples]
    return [path for column in columns for path in column if isinstance(path, str) and path]


def reason_unreadable(path: str) -> str:
    """Return why a file does not hold a whole image; nothing if it does."""
    try:
        read_rgb(path)
    except ValueError as error:
        return str(error)
    return ""


def check_files(dataset: Dataset | None, kind: str) -> None:
    """Read all files of a dataset; raise a ``ValueError`` that names the first, of a ``kind``, that cannot be read."""
    files = files_of(dataset)
    for path in track(files, description=f"Reading {kind} images"):
        reason = reason_unreadable(path)
        if reason:
            msg = f"{kind} file {reason}"
            raise ValueError(msg)
    warn_of_depth(files)


def check_batch(batch: object) -> None:
    """Raise a ``ValueError`` unless a batch, before anything is done to it, is of images in [0, 1]."""
    if not isinstance(batch, ImageBatch | DepthBatch):
        msg = f"dataloaders must give anomalib's ImageBatch, got {type(batch).__name__}: see ImageBatch.collate"
        raise ValueError(msg)
    check_pixels(cast(Tensor, batch.image), batch.image_path)


class ImageCheck(Callback):
    """Name files that cannot be read, those for validation before training, and images that are none.

    It has to come before the pre-processor.
    """

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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read all validation files, so that a broken one does not end a training of hours."""
        del pl_module
        data = getattr(trainer, "datamodule", None)
        warn_of_depth(files_of(getattr(data, "train_data", None)))
        if trainer.limit_val_batches:
            check_files(getattr(data, "val_data", None), "validation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the depth of the test images."""
        del pl_module
        for dataset in datasets_of(trainer.test_dataloaders):
            warn_of_depth(files_of(dataset))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the depth of the images."""
        del pl_module
        for dataset in datasets_of(trainer.predict_dataloaders):
            warn_of_depth(files_of(dataset))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add to an error from reading images which file it was."""
        del pl_module
        if not any("torch/utils/data" in frame.f_code.co_filename for frame, _ in walk_tb(exception.__traceback__)):
            return
        data = getattr(getattr(trainer, "datamodule", None), "train_data", None)
        used = (
            trainer.train_dataloader,
            trainer.val_dataloaders,
            trainer.test_dataloaders,
            trainer.predict_dataloaders,
        )
        datasets = [data] if data is not None else []
        datasets += [dataset for loaders in used for dataset in datasets_of(loaders)]
        files = dict.fromkeys(path for dataset in datasets for path in files_of(dataset))
        reason = next(filter(None, map(reason_unreadable, files)), "")
        if reason:
            exception.add_note(reason)


def datasets_of(loaders: object) -> Iterator[Dataset]:
    """Give the datasets of a dataloader, or of a list or dictionary of them."""
    for loader in CombinedLoader(loaders).flattened if loaders is not None else ():
        if isinstance(loader, DataLoader):
            yield loader.dataset
