"""What can only be seen once a run has its dataloaders and batches: images of the user's own, and pixels."""

from collections.abc import Iterable, Sequence
from traceback import walk_tb
from typing import Any, cast

import torch
from anomalib.data import DepthBatch, ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from ..checks import check_pixels
from .findings import settle
from .images import Sample, datasets_of, files_of, loader_findings, loaders_in, read_header, samples_of
from .trainer import datamodule_of, end_findings

LOADERS = {  # of a trainer, by its stage
    "train": "train_dataloader",
    "val": "val_dataloaders",
    "test": "test_dataloaders",
    "predict": "predict_dataloaders",
}


class BatchCheck(Callback):
    """Check dataloaders that are not a datamodule's, and the pixels of all batches; name a file that cannot be read.

    It has to come before the pre-processor.

    Args:
        any_size: Whether images go into the network as they are.
        roi: See :class:`~anomalib_cse.preflight.ModelTraits`.
    """

    def __init__(self, *, any_size: bool, roi: tuple[str, int, int] | None = None) -> None:
        self.any_size, self.roi = any_size, roi
        self.training: Sequence[Sample] = ()
        self.seen: list[object] = []  # datasets

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the training images, before any are held out."""
        del pl_module
        datasets = datasets_of(datamodule_of(trainer)) if stage == TrainerFn.FITTING else {}
        self.training, self.seen = samples_of(datasets.get("train")), []

    def check_loaders(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images of a stage's dataloaders once, but for those that the preflight of a fit has seen.

        Raises:
            ValueError: If images of several sizes would be stretched to one, or steps end before the first validation.
        """
        del pl_module
        is_fit, stage = trainer.state.fn == TrainerFn.FITTING, cast(RunningStage, trainer.state.stage)
        known = [*self.seen, *(datasets_of(datamodule_of(trainer)).values() if is_fit else ())]
        loaders = loaders_in(getattr(trainer, LOADERS[stage.dataloader_prefix or ""]))
        fresh = [loader for loader in loaders if not any(loader.dataset is dataset for dataset in known)]
        self.seen += [loader.dataset for loader in fresh]
        if trainer.training:  # or what is wrong with validation would be known after an epoch
            validated = loaders_in(trainer.val_dataloaders)
            check_first([loader for loader in validated if not any(loader.dataset is dataset for dataset in known)])
        findings = loader_findings(fresh, any_size=self.any_size, roi=self.roi if is_fit else None)
        settle([*findings, *(end_findings(trainer) if trainer.training else ())])

    on_train_start = on_validation_start = on_test_start = on_predict_start = check_loaders

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raise a ``ValueError`` unless a training batch is of images in [0, 1]."""
        del trainer, pl_module, batch_idx
        check_batch(batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Raise a ``ValueError`` unless a batch to score is of images in [0, 1]."""
        del trainer, pl_module, batch_idx, dataloader_idx
        check_batch(batch)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add to an error from reading images which file it was; a user who breaks a run off waits for nothing."""
        del pl_module
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(exception.__traceback__)]
        if not isinstance(exception, Exception) or not any(name.startswith("torch.utils.data") for name in modules):
            return
        loaders = (loader for name in LOADERS.values() for loader in loaders_in(getattr(trainer, name)))
        loaded = (sample for loader in loaders for sample in samples_of(loader.dataset))
        for path in dict.fromkeys(files_of((*self.training, *loaded))):
            try:
                read_header(path, whole=True)
            except ValueError as reason:
                exception.add_note(str(reason))
                return


def check_first(loaders: Iterable[DataLoader]) -> None:
    """Raise a ``ValueError`` unless the first image of each loader that goes through a dataset is in [0, 1]."""
    for loader in loaders:
        if isinstance(loader.sampler, SequentialSampler) and len(loader.sampler) and loader.collate_fn is not None:
            with torch.random.fork_rng(devices=[]):  # it may be augmented
                check_batch(loader.collate_fn([loader.dataset[0]]))


def check_batch(batch: object) -> None:
    """Raise a ``ValueError`` unless a batch, before anything is done to it, is of images in [0, 1]."""
    if not isinstance(batch, ImageBatch | DepthBatch):
        msg = f"dataloaders must give anomalib's ImageBatch, got {type(batch).__name__}: see ImageBatch.collate"
        raise ValueError(msg)
    check_pixels(cast(Tensor, batch.image), batch.image_path)
