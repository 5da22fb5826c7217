"""What of a trainer the models work with: its arguments, the callbacks in it, and the data that it brings."""

from collections.abc import Iterable, Sequence
from typing import cast

from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn

from ..checks import OVERSHOOT
from .post_processing import MidwayPostProcessor
from .pre_processing import check_keeps_range

LABELS = {"pred_label", "pred_mask"}
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
COMPONENTS = (PreProcessor, PostProcessor, Evaluator, Visualizer)  # that are callbacks too
REWRITING = (BaseFinetuning, LearningRateFinder, ModelPruning, StochasticWeightAveraging, WeightAveraging)


class OwnCallbacks(Callback):
    """Take a model's callbacks out of the trainer when it is done, where Lightning leaves them for the next model.

    There they would process another model's images and scores.

    Args:
        callbacks: Those of the model.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks

    def take_out(self, trainer: Trainer) -> None:
        """Leave the trainer the other callbacks."""
        own = {id(callback) for callback in (self, *self.callbacks)}
        # a new list: Lightning is going through the old one
        trainer.callbacks = [c for c in trainer.callbacks if id(c) not in own]  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take them out at a regular end."""
        del pl_module, stage
        self.take_out(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take them out when a run breaks off: Lightning then calls no ``teardown``."""
        del pl_module, exception
        self.take_out(trainer)


def take_out_others(trainer: Trainer, own: Iterable[Callback]) -> None:
    """Take out of a trainer what earlier models have left there, such as anomalib's own; keep what is in ``own``."""
    kept = {id(callback) for callback in own}
    callbacks = [c for c in trainer.callbacks if id(c) in kept or not isinstance(c, COMPONENTS)]  # type: ignore[attr-defined]
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def check_trainer(trainer: Trainer) -> None:
    """Raise a ``ValueError`` if a trainer has a precision that the models are not made for."""
    if trainer.precision not in PRECISIONS:
        msg = f"precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {trainer.precision}"
        raise ValueError(msg)


def check_callbacks(trainer: Trainer, logged: Iterable[str]) -> None:
    """Raise a ``ValueError`` if a callback would change weights or rate, or waits for what is not among ``logged``."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, REWRITING):
            msg = f"callback {name} would rewrite frozen weights or the schedule: take it out"
            raise ValueError(msg)
        monitored = getattr(callback, "monitor", None)
        if isinstance(callback, ModelCheckpoint) and monitored in ("epoch", "step"):
            continue
        strict = isinstance(callback, ModelCheckpoint) or (isinstance(callback, EarlyStopping) and callback.strict)
        if strict and monitored is not None and monitored not in logged:
            msg = (
                f"callback {name} monitors {monitored!r}, which is not logged while fitting; there is "
                f"{', '.join(sorted(logged)) or 'nothing'}, and what the model's evaluator has as val_metrics"
            )
            raise ValueError(msg)


def check_images(trainer: Trainer) -> None:
    """Raise a ``ValueError`` if anomalib's datamodule has no images to train with, or none to validate with."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, AnomalibDataModule):
        return
    if not len(data.train_data):
        msg = f"{data.name} finds no training images of a kind that it reads: give defect-free ones"
        raise ValueError(msg)
    if trainer.limit_val_batches and not getattr(data, "val_data", None):
        msg = (
            f"{data.name} has no validation images, from which thresholds come (val_split_mode is "
            f"{data.val_split_mode.value!r}): give some, or set limit_val_batches to 0 and take a reject_rate for "
            "thresholds from good images, or do without thresholds"
        )
        raise ValueError(msg)
    if trainer.limit_val_batches and len(data.val_data) == 1:
        rank_zero_warn("there is one validation image: normalised by it, scores are 0 or 1")


def resizes_before(model: LightningModule, becomes_free: bool) -> bool:
    """Whether images have another size, once a checkpoint's pre-processing has taken the place of the model's own.

    anomalib's datamodules have taken over the resizing that the model was made with. And a trainer that has the
    pre-processor among its callbacks keeps it, even if there is to be none (``becomes_free``).
    """
    try:
        trainer = model.trainer
    except RuntimeError:  # it has none
        return False
    return becomes_free or isinstance(getattr(trainer, "datamodule", None), AnomalibDataModule)


def check_metrics(trainer: Trainer, evaluator: Evaluator | None, post_processor: object, stage: str) -> None:
    """Raise a ``ValueError`` if an evaluator has a metric of what a ``stage`` will not have.

    A fit warns of what a test after it will not have. Metrics that are not strict are left out where there is nothing
    for them.
    """
    used = {"fit": ("val", "test"), "validate": ("val",), "test": ("test",)}.get(stage, ())
    for part in used if evaluator else ():
        limit = getattr(trainer, f"limit_{part}_batches")
        for metric in getattr(evaluator, f"{part}_metrics") if limit else ():
            missing = lacking(trainer, part, post_processor).intersection(getattr(metric, "fields", ()))
            if getattr(metric, "strict", False) and missing:
                msg = (
                    f"the evaluator's {part} metric {metric.name} is of {', '.join(sorted(missing))}, which there will "
                    "not be: take it out, or give it strict=False"
                )
                if (stage, part) != ("fit", "test"):
                    raise ValueError(msg)
                rank_zero_warn(msg)


def lacking(trainer: Trainer, part: str, post_processor: object) -> set[str]:
    """Return which fields batches to validate or test with (``part``) lack, as far as that is known before."""
    dataset = getattr(getattr(trainer, "datamodule", None), f"{part}_data", None)
    without_masks = isinstance(dataset, AnomalibDataset) and dataset.task == TaskType.CLASSIFICATION
    missing = {"gt_mask"} if without_masks else set()
    if post_processor is None:
        return missing | LABELS
    if type(post_processor) not in (PostProcessor, MidwayPostProcessor):  # a user's own may give labels at any time
        return missing
    own = cast(PostProcessor, post_processor)
    never = part == "val" or not own.enable_thresholding
    # thresholds come from validation or a rate of rejects; anomalib's own gives labels without
    not_yet = (
        isinstance(own, MidwayPostProcessor)
        and not trainer.limit_val_batches
        and not own.has_thresholds
        and own.reject_rate is None
    )
    return missing | LABELS if never or not_yet else missing


def check_augmentations(trainer: Trainer, stage: str) -> None:
    """Raise a ``ValueError`` if augmentations of a datamodule leave no images in [0, 1], as ``Normalize`` does."""
    data = getattr(trainer, "datamodule", None)
    for name in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
        augmentations = getattr(getattr(data, f"{name}_data", None), "augmentations", None)
        if augmentations is not None:
            check_keeps_range(augmentations, f"the {name} augmentations", OVERSHOOT)


def check_validation(trainer: Trainer) -> None:
    """Raise a ``ValueError`` if a trainer would validate before a model is fitted or never, or has no steps left."""
    if trainer.ckpt_path is None and trainer.max_steps != -1 and trainer.global_step:
        msg = f"this trainer has made {trainer.global_step} steps of its max_steps: take a new Engine"
        raise ValueError(msg)
    if not trainer.limit_val_batches:
        return
    if trainer.num_sanity_val_steps:
        msg = "nothing is fitted before training: set num_sanity_val_steps to 0, as anomalib's Engine does"
        raise ValueError(msg)
    if 0 <= (trainer.max_epochs or 0) < (trainer.check_val_every_n_epoch or 0):
        msg = (
            f"no epoch of {trainer.max_epochs} would be validated, which thresholds come from: set "
            f"check_val_every_n_epoch, now {trainer.check_val_every_n_epoch}, to at most that"
        )
        raise ValueError(msg)
