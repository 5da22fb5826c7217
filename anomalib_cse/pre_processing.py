"""Resizing that survives export: the exported graph computes what ``engine.predict`` computes."""

from typing import Any

import torch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize, Transform

from .resize import resize


class ExactResize(nn.Module):
    """Antialiased bilinear resizing that exports; equal to torchvision's ``Resize``.

    Args:
        size: Height and width of the output.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Resize ``(B, C, H, W)`` to ``(B, C, *size)``."""
        return resize(images, self.size)


def exportable(transform: Transform) -> nn.Module:
    """``transform`` with every ``Resize`` and ``CenterCrop`` in a form that exports and computes the same.

    Raises:
        ValueError: If a ``Resize`` cannot be exported exactly.
    """
    if isinstance(transform, Compose):
        return nn.Sequential(*map(exportable, transform.transforms))
    if isinstance(transform, CenterCrop):
        return ExportableCenterCrop(size=transform.size)
    if isinstance(transform, Resize):
        bilinear = InterpolationMode(transform.interpolation) == InterpolationMode.BILINEAR  # newer torchvisions: a str
        if len(transform.size) != 2 or not bilinear or not transform.antialias:
            msg = f"export needs Resize((height, width)), bilinear and antialiased, got {transform}"
            raise ValueError(msg)
        return ExactResize(tuple(transform.size))
    return transform


def fixed_size(transform: Transform | None) -> tuple[int, int]:
    """Height and width of whatever ``transform`` is given.

    Raises:
        ValueError: If images of different sizes leave it with different sizes.
    """
    sizes = (
        [tuple(transform(torch.zeros(1, 3, *size)).shape[-2:]) for size in ((600, 800), (1000, 700))]
        if transform
        else []
    )
    if len(set(sizes)) != 1:
        msg = (
            "the linear embedder needs all images in one size: give image_size, a pre_processor that resizes to "
            f"Resize((height, width)), or embedder='network'; got the transform {transform}"
        )
        raise ValueError(msg)
    return sizes[0]


class ExactPreProcessor(PreProcessor):
    """anomalib's pre-processor whose exported form gives the scores of the original.

    anomalib's own turns antialiasing off on export, which changes the score of every image that is really reduced
    (its issues 2448, 2672, 2686, 2747, 3726).
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        if transform:
            exportable(transform)  # refused here rather than on export

    def forward(self, batch: Tensor) -> Tensor:
        """Transform images ``(B, C, H, W)``, while they are traced for export in the form that exports."""
        if self.transform is None:
            return batch
        return exportable(self.transform)(batch) if torch.compiler.is_compiling() else self.transform(batch)


class EvaluationPreProcessing(Callback):
    """Runs a pre-processor on validation, test and prediction batches, but not on training batches.

    Args:
        pre_processor: The one to run.
    """

    def __init__(self, pre_processor: PreProcessor) -> None:
        self.pre_processor = pre_processor

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Transform a validation batch."""
        del dataloader_idx
        self.pre_processor.on_validation_batch_start(trainer, pl_module, batch, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Transform a test batch."""
        self.pre_processor.on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Transform a prediction batch."""
        self.pre_processor.on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
