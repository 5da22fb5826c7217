"""All that is asked of a trainer, a datamodule, a model and files before anything is computed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from anomalib.metrics import Evaluator
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from ..plugin import import_waiting
from .batches import BatchCheck
from .checkpoint import check_checkpoint, check_image_size
from .dataset import inspect
from .findings import Finding, settle
from .images import (
    Sample,
    check_layout,
    datasets_of,
    loader_findings,
    loaders_in,
    mixed_batches,
    region_findings,
    samples_of,
    unread_files,
)
from .known import good_findings, images_below, known_findings, known_samples
from .trainer import (
    LABELS,
    ModelTraits,
    datamodule_of,
    earlier_findings,
    metric_findings,
    no_images,
    precision_findings,
    trainer_findings,
)
from .transforms import (
    augmentation_findings,
    check_exportable,
    export_findings,
    exports_exactly,
    resized_to,
    transform_of,
)

if TYPE_CHECKING:  # it would import the models, which import this
    from anomalib.models.components import AnomalibModule

__all__ = [
    "LABELS",
    "BatchCheck",
    "ModelTraits",
    "Sample",
    "check_checkpoint",
    "check_exportable",
    "check_image_size",
    "check_layout",
    "datamodule_of",
    "datasets_of",
    "exports_exactly",
    "good_findings",
    "images_below",
    "known_findings",
    "known_samples",
    "loader_findings",
    "preflight",
    "samples_of",
    "settle",
    "transform_of",
]

AUGMENTED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}  # what a stage reads


def preflight(trainer: Trainer, stage: str, traits: ModelTraits, *, others: Sequence[str] = ()) -> None:
    """Look at all that a run is given, warn of what is doubtful, and say in one line what a fit has to learn from.

    Args:
        trainer: Of the run.
        stage: Lightning's name of what it does.
        traits: Of the model.
        others: Components of the model that the trainer was made for, if that is another one.

    Raises:
        ValueError: If anything is wrong; it lists all that is.
    """
    model, datasets = cast("AnomalibModule", trainer.lightning_module), datasets_of(datamodule_of(trainer))
    evaluator = cast(Evaluator | None, model.evaluator)
    findings = [*precision_findings(trainer), *metric_findings(trainer, stage, traits, evaluator, datasets)]
    for part in AUGMENTED.get(stage, ()):
        findings += augmentation_findings(part, datasets[part])
    summary = ""
    if stage == TrainerFn.FITTING:
        findings += earlier_findings(trainer, traits, others)
        findings += trainer_findings(trainer, traits, evaluator)
        summary, found = data_findings(trainer, traits, model.pre_processor, read=not any(f.is_error for f in findings))
        findings += found
    settle(findings)
    if summary:
        rank_zero_info(summary)


def data_findings(
    trainer: Trainer, traits: ModelTraits, pre_processor: nn.Module | None, *, read: bool
) -> tuple[str, list[Finding]]:
    """Return one line of what a datamodule has for a fit, and what is wrong or doubtful.

    All headers are read, and whole images to evaluate with if ``read``, which takes a while, and in no dry run.
    """
    data = datamodule_of(trainer)
    findings = [*export_findings(pre_processor)]
    if data is None:
        return "", findings
    used = {"train": True, "val": trainer.limit_val_batches, "test": trainer.limit_test_batches}
    samples = {part: samples_of(found) if used[part] else [] for part, found in datasets_of(data).items()}
    findings += no_images(trainer, data)
    whole = ("evaluation",) if read and not trainer.fast_dev_run else ()  # type: ignore[attr-defined]
    summary, found, headers = inspect(
        samples["train"], samples["val"], samples["test"], resized_to(pre_processor), whole=whole
    )
    findings += [*found, *unread_files(dataset for dataset in datasets_of(data).values() if dataset is not None)]
    if read:
        findings += known_findings(traits.known, samples["train"], [*samples["val"], *samples["test"]])
    images = dict.fromkeys(sample.image for part in samples.values() for sample in part)
    findings += region_findings(traits.roi, [headers[path] for path in images if path in headers])
    if traits.image_size is None:
        parts = [part for part in ("train", "val") if samples[part]]
        loaders = [loader for part in parts for loader in loaders_in(getattr(data, f"{part}_dataloader")())]
        findings += mixed_batches(loaders, headers)
    return summary, findings


import_waiting()
