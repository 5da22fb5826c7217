"""A trainer while a model uses it: what it had before counts neither for the model nor is it lost to the next one."""

import re
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from ..report import Report
from .quiet import Silence

OWN_FOLDERS = {TrainerFn.TESTING: "test", TrainerFn.PREDICTING: "predict", TrainerFn.VALIDATING: "validate"}
COMPONENTS = (PreProcessor, PostProcessor, Evaluator, Visualizer)  # that are callbacks too


# what components the first model of this package has found in a trainer: if any, the trainer was made for another model
FOUND: WeakKeyDictionary[Trainer, list[str]] = WeakKeyDictionary()


class TrainerRestorer(Callback):
    """Give a trainer back at the end of a run as the run found it.

    Lightning leaves a model's callbacks in the trainer, where they would process another model's images, and all that
    a model has set. Components that other models have left there are taken out for good.
    """

    def __init__(self, trainer: Trainer) -> None:
        found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in found if isinstance(callback, COMPONENTS)]
        FOUND.setdefault(trainer, sorted({type(callback).__name__ for callback in others}))
        self.callbacks = [callback for callback in found if callback not in others]
        self.max_epochs, self.checkpoint_io = trainer.max_epochs, trainer.strategy.checkpoint_io
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of the losses, in half precision
        self.scaling: dict[str, Any] = scaler.state_dict() if scaler else {}
        self.config_names = {c: c.config_filename for c in self.callbacks if isinstance(c, SaveConfigCallback)}
        self.silence = Silence()
        self.silence.begin()
        self.drawing: list[ImageVisualizer] = []  # into a folder that is of this run alone
        trainer.callbacks = [*self.callbacks, self]  # type: ignore[attr-defined]

    def forget_checkpoints(self) -> None:
        """Have a fit keep the checkpoints of the one before: Lightning would write over the last, or delete it."""
        for callback in self.callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor is None:
                callback.best_model_path = callback.last_model_path = ""

    def redirect_config(self, folder: Path) -> None:
        """Have the command line's arguments saved in a folder; Lightning does that before a model is set up."""
        for callback in self.config_names:
            folder.mkdir(parents=True, exist_ok=True)
            callback.config_filename = str((folder / self.config_names[callback]).resolve())

    def redirect_results(self, trainer: Trainer, folder: Path) -> None:
        """Have reports, and pictures that have no other place, go to a folder, in this run; anomalib keeps to one."""
        found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.drawing = [c for c in found if isinstance(c, ImageVisualizer) and c.output_dir is None]
        for visualizer in self.drawing:
            visualizer.output_dir = folder / "images"
        for report in (c for c in found if isinstance(c, Report)):
            report.folder = folder

    def restore(self, trainer: Trainer) -> None:
        """Give back what there was."""
        self.silence.end()
        trainer.callbacks = self.callbacks  # type: ignore[attr-defined]
        trainer.fit_loop.max_epochs = self.max_epochs
        trainer.strategy.checkpoint_io = self.checkpoint_io
        for callback, name in self.config_names.items():
            callback.config_filename = name
        for visualizer in self.drawing:
            visualizer.output_dir = None
        if self.scaling:
            cast(Any, trainer.precision_plugin).scaler.load_state_dict(self.scaling)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give it back at a regular end."""
        del pl_module, stage
        self.restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back when a run breaks off: Lightning then calls no ``teardown``."""
        del pl_module, exception
        self.restore(trainer)


def results_folder(trainer: Trainer, fitted_in: str | None) -> Path:
    """Return where a run is to write: in a folder of its own, unless it fits, or has just been fitted.

    anomalib's ``Engine`` has tests and predictions write where the latest training did, whatever that was of.

    Args:
        trainer: Of the run.
        fitted_in: The folder in which the model in memory was fitted.
    """
    root, stage = Path(trainer.default_root_dir), OWN_FOLDERS.get(trainer.state.fn)  # type: ignore[arg-type]
    if stage is None or fitted_in == str(root) or not re.fullmatch(r"latest|v\d+", root.name):
        return root
    parent = root.parent / stage
    taken = [int(path.name[1:]) for path in parent.glob("v*") if path.name[1:].isdecimal()]
    return parent / f"v{max(taken, default=-1) + 1}"


def restorer_of(trainer: Trainer) -> TrainerRestorer:
    """Return what is to give a trainer back at the end of the run."""
    return next(c for c in trainer.callbacks if isinstance(c, TrainerRestorer))  # type: ignore[attr-defined]


def restore_at_end(trainer: Trainer) -> None:
    """Have a trainer given back as it is now; if it was left in the middle of a run, as it was before that."""
    for left in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(left, TrainerRestorer):
            left.restore(trainer)
    TrainerRestorer(trainer)
