"""A run that was broken off goes on as if it had not been; within an epoch, as Lightning warns, not quite."""

from collections.abc import Mapping, Sized
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..checks import plain
from ..synthesis import Stream, generator_for

SETTINGS = "cse_run"  # in a checkpoint


def settings_of(trainer: Trainer) -> dict[str, object]:
    """Return what shapes a run beside the model's arguments and the number of steps, by its name."""
    loader = trainer.train_dataloader
    images = getattr(loader, "dataset", None)
    return {
        "precision": plain(trainer.precision),
        "gradient_clip_val": plain(trainer.gradient_clip_val),
        "gradient_clip_algorithm": plain(trainer.gradient_clip_algorithm),
        "train_batch_size": plain(getattr(loader, "batch_size", None)),
        "training images": len(images) if isinstance(images, Sized) else None,
    }


class ResumingMixin(LightningModule):
    """Give each epoch random numbers that follow from ``fit_seed``, and finish resumed runs as they were begun.

    Lightning saves weights, optimizer and schedule; what it does not save is the state of the random numbers from
    which dataloaders draw the order of images. Here it need not be saved.
    """

    fit_seed: Tensor  # in the checkpoint
    resumes = False  # whether this run goes on with an earlier one
    is_within_epoch = False  # whether that one was broken off there
    first_epoch = 0  # of this run
    settings: dict[str, object] | None = None  # of this run
    begun_with: Mapping[str, object] = MappingProxyType({})  # those of the run that is resumed, if it has kept them
    resumed_from: str | None = None  # the checkpoint that the last fit has resumed, until something is tested

    def seed_order(self, epoch: int) -> None:
        """Seed torch's global random numbers for an epoch."""
        torch.manual_seed(generator_for(int(self.fit_seed), Stream.ORDER, epoch).initial_seed())

    def setup(self, stage: str) -> None:
        """Begin with the first epoch, unless a checkpoint says otherwise."""
        super().setup(stage)
        if stage == TrainerFn.FITTING:
            self.first_epoch, self.resumes, self.resumed_from = 0, False, None
            self.settings, self.begun_with = None, {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the settings of the run."""
        super().on_save_checkpoint(checkpoint)
        if self.settings is not None:
            checkpoint[SETTINGS] = self.settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the epoch that a resumed run goes on with.

        anomalib's ``train`` tests with the checkpoint that it has resumed, which is unfinished. What resuming has given
        is in memory, and is tested.
        """
        super().on_load_checkpoint(checkpoint)
        self.first_epoch, self.resumes = checkpoint["epoch"] + 1, True
        self.begun_with = checkpoint.get(SETTINGS, {})
        self.is_within_epoch = not checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
        if self.resumed_from is None or self.trainer.state.fn != TrainerFn.TESTING:
            return
        if self.resumed_from == str(self.trainer.ckpt_path):
            checkpoint["state_dict"] = self.state_dict()
            checkpoint["callbacks"] = {}  # they would name the unfinished checkpoint as the best

    def on_fit_start(self) -> None:
        """Warn if there is nothing left of the run to resume."""
        super().on_fit_start()
        last = 0 <= (self.trainer.max_epochs or 0) <= self.first_epoch
        if self.resumes and last and not self.is_within_epoch:
            rank_zero_warn(
                f"all epochs of {self.trainer.ckpt_path} are done: nothing is trained. To learn from other images, "
                "leave ckpt_path out"
            )

    def on_train_start(self) -> None:
        """Check that a resumed run leads to the end that its schedule began with, by what it was begun with.

        Raises:
            ValueError: If it does not.
        """
        self.settings = settings_of(self.trainer)
        if not self.resumes:
            return
        steps, given = self.lr_schedulers().total_steps, self.trainer.estimated_stepping_batches  # type: ignore[union-attr]
        if steps != given:
            msg = (
                f"the run to resume was given {steps} steps and is now given {given}: set max_epochs (and the images, "
                "their batch size and the number of processes) as they were, or begin a new run with the model that "
                "load_from_checkpoint gives"
            )
            raise ValueError(msg)
        differ = [name for name, value in self.settings.items() if self.begun_with.get(name, value) != value]
        if differ:
            was, now = (", ".join(f"{n} {had[n]}" for n in differ) for had in (self.begun_with, self.settings))
            msg = f"the run to resume was given {was} and is now given {now}: set it as it was, or begin a new run"
            raise ValueError(msg)

    def on_train_epoch_start(self) -> None:
        """Seed the order of the images; that of the first epoch is drawn when Lightning counts its steps."""
        if self.current_epoch != self.first_epoch:
            self.seed_order(self.current_epoch)

    def on_fit_end(self) -> None:
        """Note what has been resumed."""
        super().on_fit_end()
        self.resumed_from = str(self.trainer.ckpt_path) if self.resumes else None

    def on_test_start(self) -> None:
        """Have the checkpoint stand for itself from the next test on."""
        self.resumed_from = None
