"""What a trainer may have: its arguments, its callbacks, and the datamodule and metrics that it brings."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.metrics import Evaluator
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from .findings import Finding, error, warning
from .images import Sample, datasets_of

LABELS = {"pred_label", "pred_mask"}
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
REWRITING = (BaseFinetuning, LearningRateFinder, ModelPruning, StochasticWeightAveraging, WeightAveraging)
PARTS = {TrainerFn.FITTING: ("val", "test"), TrainerFn.VALIDATING: ("val",), TrainerFn.TESTING: ("test",)}


@dataclass(frozen=True)
class ModelTraits:
    """What a model says of itself.

    Attributes:
        name: Of its class.
        image_size: Height and width of what goes into its network, ``None`` if images go in as they are.
        needs_gradients: Whether it is trained step by step, by a schedule with an end; else it is fitted in one epoch.
        logged: What it logs while fitting, its evaluator's metrics apart.
        labelled: Which of ``"val"`` and ``"test"`` batches get labels, as far as that is known before.
        known: Images of defects that it is to learn from.
        roi: The file of a mask that all images share, if there is one, its width and its height.
    """

    name: str
    image_size: tuple[int, int] | None
    needs_gradients: bool
    logged: frozenset[str]
    labelled: frozenset[str]
    known: Sequence[Sample] = ()
    roi: tuple[str, int, int] | None = None


def datamodule_of(trainer: object) -> AnomalibDataModule | None:
    """Return anomalib's datamodule of a trainer; ``None`` if it has none, or one of another kind."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, AnomalibDataModule) else None


def earlier_findings(trainer: Trainer, traits: ModelTraits, others: Sequence[str]) -> Iterator[Finding]:
    """Say what a trainer has left of earlier models that would count for the one that it is to fit now.

    What anomalib's other models ask of a trainer replaces the user's numbers, so those are not to be had any more.
    """
    if others and traits.needs_gradients:
        yield error(
            f"this trainer was made for another model (with {', '.join(others)}), whose number of epochs and other "
            f"arguments would count for {traits.name}: take a new Engine. If they are your own, give them to the model"
        )
    if trainer.ckpt_path is not None or not (trainer.current_epoch or trainer.global_step):
        return
    if trainer.max_steps != -1 and trainer.global_step:
        yield error(f"this trainer has made {trainer.global_step} steps of its max_steps: take a new Engine")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        plain_checkpoint = isinstance(callback, ModelCheckpoint) and callback.monitor is None
        if not (plain_checkpoint or isinstance(callback, nn.Module)) and callback.state_dict():
            yield error(
                f"callback {type(callback).__name__} remembers the fit before, which would count for this one: take a "
                "new Engine, with new callbacks"
            )


def trainer_findings(trainer: Trainer, traits: ModelTraits, evaluator: Evaluator | None) -> Iterator[Finding]:
    """Say what does not do in a trainer that is to fit a model."""
    nothing = [name for name in ("max_steps", "max_epochs", "limit_train_batches") if getattr(trainer, name) == 0]
    if nothing:
        yield error(f"{', '.join(nothing)} of 0 leaves nothing to fit {traits.name} by: leave it out, or give more")
        return
    metrics = evaluator.val_metrics if evaluator else ()
    yield from callback_findings(trainer, {*traits.logged, *(str(metric.name) for metric in metrics)})
    yield from validation_findings(trainer)
    if not traits.needs_gradients:
        yield from single_pass_findings(trainer, traits.name)
    elif trainer.max_epochs == -1 and trainer.max_steps == -1:
        yield error("the learning rate's schedule needs to know its end: set max_epochs or max_steps")


def precision_findings(trainer: Trainer) -> Iterator[Finding]:
    """Say if a precision is none that the models are made for."""
    if trainer.precision not in PRECISIONS:
        yield error(f"precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {trainer.precision}")


def callback_findings(trainer: Trainer, logged: Iterable[str]) -> Iterator[Finding]:
    """Say which callbacks would change weights or rate, or wait for what is not among ``logged``."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, REWRITING):
            yield error(f"callback {name} would rewrite frozen weights or the schedule: take it out")
        monitored = getattr(callback, "monitor", None)
        if isinstance(callback, ModelCheckpoint) and monitored in ("epoch", "step"):
            continue
        strict = isinstance(callback, ModelCheckpoint) or (isinstance(callback, EarlyStopping) and callback.strict)
        if strict and monitored is not None and monitored not in logged:
            yield error(
                f"callback {name} monitors {monitored!r}, which is not logged while fitting; there is "
                f"{', '.join(sorted(logged)) or 'nothing'}, and what the model's evaluator has as val_metrics"
            )


def validation_findings(trainer: Trainer) -> Iterator[Finding]:
    """Say if a trainer would validate before a model is fitted or never."""
    if trainer.limit_val_batches and trainer.num_sanity_val_steps:
        yield error("nothing is fitted before training: set num_sanity_val_steps to 0, as anomalib's Engine does")
    if trainer.limit_val_batches and 0 <= (trainer.max_epochs or 0) < (trainer.check_val_every_n_epoch or 0):
        yield error(
            f"no epoch of {trainer.max_epochs} would be validated, which thresholds come from: set "
            f"check_val_every_n_epoch, now {trainer.check_val_every_n_epoch}, to at most that"
        )


def single_pass_findings(trainer: Trainer, name: str) -> Iterator[Finding]:
    """Say if a trainer would validate within the one epoch, or has arguments for gradients."""
    if trainer.precision == "16-mixed" and trainer.world_size > 1:
        yield error("several processes take precision 32-true or bf16-mixed, got 16-mixed: it needs an optimizer")
    if trainer.check_val_every_n_epoch not in (1, None):
        yield error(
            f"{name} is fitted and validated in one epoch: leave check_val_every_n_epoch at 1, got "
            f"{trainer.check_val_every_n_epoch} (limit_val_batches=0 does without validation)"
        )
    interval = trainer.val_check_interval
    if isinstance(interval, int) or interval != 1.0:  # the whole number 1 is a batch
        yield error(f"the model is fitted after a whole epoch: leave val_check_interval at 1.0, got {interval}")
    given = {
        "accumulate_grad_batches": trainer.accumulate_grad_batches != 1,
        "gradient_clip_val": bool(trainer.gradient_clip_val),
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm is not None,
        "min_epochs": (trainer.min_epochs or 0) > 1,
        "max_steps": trainer.max_steps != -1 and not trainer.fast_dev_run,  # type: ignore[attr-defined]
    }
    given |= {type(c).__name__: isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks}  # type: ignore[attr-defined]
    wrong = [argument for argument, is_given in given.items() if is_given]
    if wrong:
        yield error(
            f"{', '.join(wrong)}: {name} takes no gradient steps; leave it out (limit_train_batches limits images)"
        )


def no_images(trainer: Trainer, data: AnomalibDataModule) -> Iterator[Finding]:
    """Say if a datamodule has no images to train with, or none to validate with."""
    if not len(data.train_data):
        yield error(f"{data.name} finds no training images of a kind that it reads: give defect-free ones")
    validation = datasets_of(data)["val"]
    if trainer.limit_val_batches and not validation:
        yield error(
            f"{data.name} has no validation images, from which thresholds come (val_split_mode is "
            f"{data.val_split_mode.value!r}): give some, or set limit_val_batches to 0 and take a reject_rate for "
            "thresholds from good images, or do without thresholds"
        )
    elif trainer.limit_val_batches and len(data.val_data) == 1:
        yield warning("there is one validation image: normalised by it, scores are 0 or 1")


def metric_findings(
    trainer: Trainer, stage: str, traits: ModelTraits, evaluator: nn.Module | None, datasets: dict[str, object]
) -> Iterator[Finding]:
    """Say which metrics of an evaluator are of what a ``stage`` will not have.

    A fit warns of what a test after it will not have. Metrics that are not strict are left out where there is nothing
    for them.
    """
    for part in PARTS.get(TrainerFn(stage), ()) if evaluator else ():
        dataset = datasets[part]
        has_masks = not (isinstance(dataset, AnomalibDataset) and dataset.task == TaskType.CLASSIFICATION)
        missing = (set() if has_masks else {"gt_mask"}) | (set() if part in traits.labelled else LABELS)
        for metric in getattr(evaluator, f"{part}_metrics") if getattr(trainer, f"limit_{part}_batches") else ():
            lacking = missing.intersection(getattr(metric, "fields", ()))
            if getattr(metric, "strict", False) and lacking:
                say = warning if (stage, part) == (TrainerFn.FITTING, "test") else error
                yield say(
                    f"the evaluator's {part} metric {metric.name} is of {', '.join(sorted(lacking))}, which there will "
                    "not be: take it out, or give it strict=False"
                )


def end_findings(trainer: Trainer) -> Iterator[Finding]:
    """Say if ``max_steps`` are reached before the first epoch that is validated; batches must have been counted."""
    every = trainer.check_val_every_n_epoch or 1
    epochs = -(-trainer.max_steps * trainer.accumulate_grad_batches // int(trainer.num_training_batches or 1))
    if trainer.enable_validation and 0 < epochs < every:
        yield error(
            f"max_steps {trainer.max_steps} end in epoch {epochs}, and the first to be validated is {every}: set "
            "check_val_every_n_epoch to less, or max_steps to more"
        )
