"""Images and masks that cannot be read, or not as they are, called by the name of their file; images that are none."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any, cast

from anomalib.data import DepthBatch, ImageBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils import LabelName
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import Resize

from ..checks import and_others, check_pixels, read_rgb, warn_of_files
from .look import Sample, headers_of, look

NAMED = 5  # files that are wrong: more would bury the message


def samples_of(dataset: object) -> list[Sample]:
    """Return the images that a dataset reads, with their masks; none of one that does not name them."""
    if isinstance(dataset, Subset):
        samples = samples_of(dataset.dataset)
        return [samples[index] for index in dataset.indices if samples]
    if hasattr(dataset, "image_filenames"):  # anomalib's PredictDataset
        return [Sample(str(path)) for path in dataset.image_filenames]
    table = getattr(dataset, "samples", {})  # anomalib's
    if "image_path" not in table:
        return []
    images = [str(path) for path in table["image_path"]]
    if "label_index" not in table:
        return [Sample(path) for path in images]
    defective = [bool(label == LabelName.ABNORMAL) for label in table["label_index"]]
    masks = table.get("mask_path", [""] * len(images))
    # anomalib reads masks of defects alone, whatever else is listed
    return [
        Sample(path, str(mask) if is_defect and isinstance(mask, str | Path) else "", is_defect)
        for path, mask, is_defect in zip(images, masks, defective, strict=True)
    ]


def files_of(samples: Iterable[Sample]) -> list[str]:
    """Return the files of samples, images and masks."""
    return [path for sample in samples for path in (sample.image, sample.mask) if path]


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
    samples = list(dict.fromkeys(sample for dataset in datasets for sample in samples_of(dataset)))
    for error in errors_in(kind, track(samples, description=f"Reading {kind} images")):
        raise ValueError(error)
    warn_of_files(files_of(samples))


def errors_in(kind: str, samples: Iterable[Sample]) -> Iterator[str]:
    """Read all images and masks; give what is wrong with each of them, and warn of empty masks at the end."""
    empty = []
    for path, mask_path, _ in samples:
        try:
            image, mask = read_rgb(path), read_rgb(mask_path) if mask_path else None
        except ValueError as error:
            yield f"{kind} file {error}"
            continue
        if mask is not None:
            yield from wrong_shape(path, image.size, mask_path, mask.size)
            if mask.getbbox() is None:
                empty.append(mask_path)
    if empty:
        msg = f"{empty[0]}, the mask of a defect, is empty: pixel metrics count all of its image as good"
        warnings.warn(msg + and_others(empty), stacklevel=2)


def wrong_shape(path: str, size: tuple[int, int], mask_path: str, mask_size: tuple[int, int]) -> Iterator[str]:
    """Say so if a mask would be stretched to fit its image; ``size`` is width and height."""
    (width, height), (mask_width, mask_height) = size, mask_size
    # of a smaller copy, sides are off by a pixel
    if abs(width * mask_height - height * mask_width) > max(width, height, mask_width, mask_height):
        yield (
            f"the mask {mask_path} has {mask_width}x{mask_height} pixels, its image {path} {width}x{height}: masks "
            "must have the proportions of their images"
        )


def check_batch(batch: object) -> None:
    """Raise a ``ValueError`` unless a batch, before anything is done to it, is of images in [0, 1]."""
    if not isinstance(batch, ImageBatch | DepthBatch):
        msg = f"dataloaders must give anomalib's ImageBatch, got {type(batch).__name__}: see ImageBatch.collate"
        raise ValueError(msg)
    check_pixels(cast(Tensor, batch.image), batch.image_path)


def check_batches(loaders: object, model: LightningModule) -> None:
    """Raise a ``ValueError`` if a model takes images as they are, and batches would have them of several sizes.

    anomalib would stretch all of a batch to the size of the largest, without a word.
    """
    if getattr(model, "image_size", ()) is not None:
        return
    for loader in CombinedLoader(loaders).flattened if loaders is not None else ():
        batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        headers = headers_of(sample.image for sample in samples_of(getattr(loader, "dataset", None)))[0]
        sizes = sorted({(header.width, header.height) for header in headers})
        if len(sizes) > 1 and batch_size not in (1, None):  # None: a sampler of the user's own may sort by size
            (width, height), (other_width, other_height) = sizes[0], sizes[-1]
            msg = (
                f"images have several sizes ({width}x{height}, {other_width}x{other_height}, ...), so each needs a "
                f"batch of its own, not of {batch_size}: set train_batch_size and eval_batch_size to 1, or give the "
                "model an image_size"
            )
            raise ValueError(msg)


class ImageCheck(Callback):
    """Name files that cannot be read, those for validation before training, and images that are none.

    It has to come before the pre-processor, and before what holds images out.
    """

    training: Sequence[Sample] = ()

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
        """Note the training images, before any are held out."""
        del pl_module
        data = getattr(trainer, "datamodule", None) if stage == TrainerFn.FITTING else None
        self.training = samples_of(getattr(data, "train_data", None))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at all images, and read all that is to validate and test with: no broken file is to end a training.

        Raises:
            ValueError: If a file cannot be read, or an image is labelled both good and defective.
        """
        data = getattr(trainer, "datamodule", None)
        limits = {"val_data": trainer.limit_val_batches, "test_data": trainer.limit_test_batches}
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            limits = dict.fromkeys(limits, 0)
        datasets = [getattr(data, name, None) if limit else None for name, limit in limits.items()]
        validation, test = map(samples_of, datasets)
        found = look(self.training, validation, test, resized_to(getattr(pl_module, "pre_processor", None)))
        if found.errors:
            more = [f"and {len(found.errors) - NAMED} more"] if len(found.errors) > NAMED else []
            raise ValueError("\n".join([*found.errors[:NAMED], *more]))
        warn_of_files(files_of(self.training))
        check_files("evaluation", *datasets)
        warn_of(found.warnings)
        if found.summary:
            rank_zero_info(found.summary)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that no batch would have images of several sizes."""
        check_batches(trainer.train_dataloader, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the validation images, where no fit has."""
        check_batches(trainer.val_dataloaders, pl_module)
        if trainer.state.fn == TrainerFn.VALIDATING:
            warn_of_loaded(trainer.val_dataloaders)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the test images."""
        check_batches(trainer.test_dataloaders, pl_module)
        warn_of_loaded(trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the images."""
        check_batches(trainer.predict_dataloaders, pl_module)
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
        loaded = (sample for dataset in datasets for sample in samples_of(dataset))
        files = dict.fromkeys(files_of((*self.training, *loaded)))
        reason = next(filter(None, map(reason_unreadable, files)), "")
        if reason:
            exception.add_note(reason)


def resized_to(pre_processor: object) -> Sequence[int]:
    """Return the height and width that a pre-processor resizes images to, whatever they are; else nothing."""
    resizes = extract_transforms_by_type(getattr(pre_processor, "transform", None), Resize)
    return resizes[0].size if resizes and len(resizes[0].size) == 2 else ()


def warn_of(messages: Iterable[str]) -> None:
    """Warn of each."""
    for message in messages:
        warnings.warn(message, stacklevel=2)


def warn_of_loaded(loaders: object) -> None:
    """Warn of files that dataloaders read and that are not what they seem."""
    for dataset in datasets_of(loaders):
        warn_of_files(files_of(samples_of(dataset)))


def datasets_of(loaders: object) -> Iterator[Dataset]:
    """Give the datasets of a dataloader, or of a list or dictionary of them."""
    for loader in CombinedLoader(loaders).flattened if loaders is not None else ():
        if isinstance(loader, DataLoader):
            yield loader.dataset
