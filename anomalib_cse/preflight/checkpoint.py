"""What is asked of a checkpoint before it is loaded: that it is of this model, and of what the model was made with."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from .findings import Finding, error, settle
from .trainer import datamodule_of

if TYPE_CHECKING:  # it would import the models, which import this
    from anomalib.models.components import AnomalibModule


def trainer_of(model: LightningModule) -> Trainer | None:
    """Return the trainer of a model; ``None`` if it has none."""
    try:
        return model.trainer
    except RuntimeError:
        return None


def check_checkpoint(
    checkpoint: Mapping[str, Any],
    model: "AnomalibModule",
    shaping: Mapping[str, object],
    recipe: Mapping[str, object],
    *,
    can_resume: bool,
) -> None:
    """Raise a ``ValueError`` if a checkpoint is not of such a model, with what it was given, or no run to resume.

    Args:
        checkpoint: What is to be loaded.
        model: The model, before that.
        shaping: Arguments that must be the checkpoint's, and their values.
        recipe: Arguments that must be so too if the run is resumed.
        can_resume: Whether the model can go on with a run.
    """
    findings = [*model_findings(checkpoint, model, shaping, recipe, can_resume=can_resume)]
    settle(findings or setting_findings(checkpoint, model))


def model_findings(
    checkpoint: Mapping[str, Any],
    model: LightningModule,
    shaping: Mapping[str, object],
    recipe: Mapping[str, object],
    *,
    can_resume: bool,
) -> Iterator[Finding]:
    """Say if a checkpoint is of another model, of other values of the arguments that shape it, or no run to resume."""
    trainer, kind = trainer_of(model), type(model)
    is_resumed = trainer is not None and trainer.state.fn == TrainerFn.FITTING
    if trainer is not None and is_resumed and not can_resume:
        yield error(
            f"{kind.__name__} is fitted in one pass, so there is nothing to resume in {trainer.ckpt_path}: leave "
            "ckpt_path out to fit a new one; test, predict and export take it"
        )
    saved = checkpoint["hyper_parameters"]
    known = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}  # type: ignore[misc]
    differ = [n for n in saved if n not in known and not n.startswith("_")] + [n for n in shaping if n not in saved]
    if differ:
        yield error(
            f"the checkpoint is not of this {kind.__name__}: arguments differ ({', '.join(sorted(differ))}). It is of "
            "another model, or of anomalib-cse before 0.2, where Cse held both methods: train again"
        )
        return
    for name, own in {**shaping, **(recipe if is_resumed else {})}.items():
        if name in saved and not is_same(saved[name], own):
            yield error(
                f"the checkpoint is of {name} {saved[name]}, the model has {own}: give the arguments that it was "
                f"trained with, such as --model.{name}"
            )


def is_same(saved: object, own: object) -> bool:
    """Whether an argument has the value that a checkpoint has: in a list or a tuple, and of a path in any spelling."""
    if isinstance(own, list | tuple) and isinstance(saved, list | tuple):
        return list(saved) == list(own)
    if isinstance(own, str) and isinstance(saved, str):
        return saved == own or Path(saved).resolve() == Path(own).resolve()
    return saved == own


def setting_findings(checkpoint: Mapping[str, Any], model: "AnomalibModule") -> Iterator[Finding]:
    """Say if a checkpoint would overrule settings of the model's components, or has ones that are not taken now."""
    saved = checkpoint.get("anomalib_pre_processor_config")
    if saved and model.pre_processor is None:
        yield error("the checkpoint has a pre-processor, and the model was given none: leave pre_processor=False out")
    kept_by_0_2 = checkpoint.get("pre_processor_transform")
    if saved and kept_by_0_2 and saved.get("transform", ...) is None:
        yield error(f"the checkpoint is of {kept_by_0_2['name']}, which is not taken any more: train again")
    settings, given = checkpoint.get("anomalib_post_processor_config"), model.post_processor
    if not settings or not isinstance(given, PostProcessor):
        return
    usual = cast(PostProcessor, model.configure_post_processor()).checkpoint_config()
    for name, value in given.checkpoint_config().items():
        kept = settings.get(name, usual.get(name))
        if value not in (usual.get(name, value), kept):
            argument = "model" if name == "reject_rate" else "post_processor"
            yield error(
                f"the {argument} was given {name}={value}, but {kept} of the checkpoint would count: load the model "
                f"without it, set model.post_processor.{name}, and give no ckpt_path after that"
            )


def check_image_size(
    model: LightningModule, saved: tuple[int, int] | None, own: tuple[int, int] | None, *, is_given: bool
) -> None:
    """Raise a ``ValueError`` if a checkpoint's pre-processing leaves images of another size than the model's own did.

    That matters if the size is one that the user has given, or if the trainer keeps the model's own pre-processing:
    anomalib's datamodules have taken over the resizing that the model was made with, and a trainer that has the
    pre-processor among its callbacks keeps it, even if there is to be none.
    """
    trainer = trainer_of(model)
    keeps_own = trainer is not None and (None in (saved, own) or datamodule_of(trainer) is not None)
    if saved != own and (is_given or keeps_own):
        of, to = ("any number of" if size is None else size for size in (saved, own))
        msg = (
            f"the checkpoint is of images of {of} pixels, the model was made for {to}: give --model.image_size, "
            "--model.center_crop_size and --model.pre_processor as in training"
        )
        raise ValueError(msg)
