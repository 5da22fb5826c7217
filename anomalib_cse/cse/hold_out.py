"""The share of the training images that the embedder is chosen by (Section 4.1)."""

import copy
from typing import TYPE_CHECKING, cast

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torchvision.transforms.v2 import Resize

from ..deployment import datamodule_of
from ..synthesis import Stream, generator_for

if TYPE_CHECKING:
    from .lightning_model import Cse


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


class HoldOut(Callback):
    """Take a share of the training images out of the datamodule while ``fit`` runs, and give it back.

    The split follows from the model's ``fit_seed``, which is in its checkpoints: a resumed run has the same one.

    Args:
        ratio: Share of the images, in [0, 1); 0 holds none out.
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self.all_images: AnomalibDataset | None = None  # the datamodule's own training images, while fitting
        self.training: AnomalibDataset | None = None  # those of them that train
        self.held_out: AnomalibDataset | None = None

    def begin(self, trainer: Trainer, model: "Cse") -> None:
        """Hold images out.

        Raises:
            ValueError: If there is no datamodule to hold them out of, or there are too few images.
        """
        model.fit_seed.fill_(trainer.strategy.broadcast(model.effective_seed))
        data = datamodule_of(trainer)
        if data is not None:
            self.all_images = data.train_data
            self.split(data, int(model.fit_seed))
        elif self.ratio:
            msg = "Cse holds out images of an anomalib datamodule: give one (datamodule=), or set holdout_ratio to 0"
            raise ValueError(msg)

    def split(self, data: AnomalibDataModule, seed: int) -> None:
        """Leave the datamodule the images that train, and keep the others, as they are without augmentations."""
        images = self.training = self.all_images
        if not images or not self.ratio:
            return
        held_out = max(1, round(self.ratio * len(images)))
        if len(images) == held_out:
            msg = f"too few training images, {held_out}, to hold out {held_out}: give more, or set holdout_ratio to 0"
            raise ValueError(msg)
        order = torch.randperm(len(images), generator=generator_for(seed, Stream.SPLIT)).tolist()
        data.train_data = self.training = images.subsample(sorted(order[held_out:]))
        self.held_out = without_augmentations(images.subsample(sorted(order[:held_out])))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        """Split as the run that is resumed did.

        Raises:
            ValueError: If another seed is asked for.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        begun_with, seed = int(checkpoint["state_dict"]["fit_seed"]), cast("Cse", pl_module).seed
        if seed not in (None, begun_with):
            msg = f"the run to resume was begun with seed {begun_with}, not {seed}: give that one or none"
            raise ValueError(msg)
        self.split(trainer.datamodule, begun_with)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise a ``ValueError`` if other images train than those that are left in the datamodule."""
        del pl_module
        images = getattr(trainer.train_dataloader, "dataset", None)
        if self.training is not None and images is not self.training:
            msg = "the trainer still has the datamodule of an earlier fit: take a new Engine to fit with dataloaders"
            raise ValueError(msg)

    def give_back(self, trainer: Trainer) -> None:
        """Give the datamodule its own images back."""
        if self.all_images is not None:
            trainer.datamodule.train_data = self.all_images  # type: ignore[attr-defined]
        self.all_images = self.training = self.held_out = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the images back when ``fit`` ends."""
        del pl_module, stage
        self.give_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the images back when ``fit`` breaks off: Lightning then calls no ``teardown``."""
        del exception
        self.give_back(trainer)
        cast("Cse", pl_module).pairing = None
