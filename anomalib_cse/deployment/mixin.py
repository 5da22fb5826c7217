"""What both models share on their way from training to deployment."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from ..checks import check_size
from ..data import FileCheck
from ..features import FrozenBackbone
from .checkpoints import WholeCheckpointIO, check_checkpoint
from .export import check_compression, compress, keep_single_precision
from .post_processing import MidwayPostProcessor
from .pre_processing import check_exportable, exact, fixed_size, resize_and_crop

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


class DeploymentMixin(ExportMixin, LightningModule):
    """Scores in single precision, whole checkpoints that need no other weights, and exports that score the same.

    A class that uses it is an ``AnomalibModule`` too, has a ``model`` with a ``backbone``, and calls
    :meth:`make_exportable` when both are there.
    """

    pre_processor: nn.Module | None
    image_size: tuple[int, int]  # height and width of what the pre-processor leaves of any image
    shaping: tuple[str, ...]  # arguments that a checkpoint must agree in, beside backbone and layers
    seed: int | None

    @property
    def backbone(self) -> FrozenBackbone:
        """The frozen feature extractor of the deployed model."""
        return cast(FrozenBackbone, self.model.get_submodule("backbone"))

    @property
    def effective_seed(self) -> int:
        """``seed``, or torch's own."""
        return (torch.initial_seed() if self.seed is None else self.seed) % 2**32

    @contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Draw from torch's global generator by ``seed``, and leave it as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.effective_seed)
            yield

    @property
    def learning_type(self) -> LearningType:
        """Trained on defect-free images alone."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Return a pre-processor that resizes; ``None`` is 256x256. Normalisation belongs to the backbone."""
        return resize_and_crop(image_size)

    def configure_post_processor(self) -> PostProcessor:
        """Return anomalib's post-processor, but with an image threshold between two validation images' scores."""
        return MidwayPostProcessor()

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's callbacks, and one that names files that cannot be read."""
        callbacks = super().configure_callbacks()
        return [FileCheck(), *(callbacks if isinstance(callbacks, list) else [callbacks])]

    def make_exportable(self) -> None:
        """Have the pre-processor compute the same outside the trainer as within.

        Raises:
            ValueError: If images of different sizes leave it with different sizes, or too small.
        """
        self.image_size = fixed_size(self.pre_processor)
        name = "center_crop_size" if self.hparams["center_crop_size"] else "image_size"
        check_size(name, self.image_size, self.backbone.stride, ", the stride of the coarsest layer")
        if isinstance(self.pre_processor, PreProcessor) and self.pre_processor.transform:
            self.pre_processor.export_transform = exact(self.pre_processor.transform)

    def setup(self, stage: str) -> None:
        """Check the data and the trainer before anything is computed.

        Raises:
            ValueError: If images to train or validate with are missing, or the trainer's precision or steps do not do.
        """
        trainer = self.trainer
        if trainer.precision not in PRECISIONS:
            msg = f"precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {trainer.precision}"
            raise ValueError(msg)
        if type(trainer.strategy.checkpoint_io) in (AnomalibCheckpointIO, TorchCheckpointIO):  # not the user's own
            trainer.strategy.checkpoint_io = WholeCheckpointIO(self.checkpoint_safe_globals())  # type: ignore[operator]
        # Lightning leaves the callbacks of an earlier model in the trainer, where they would process this one's images,
        # and adds this one's own once more if another model came in between
        own = (self.pre_processor, self.post_processor, self.evaluator, self.visualizer)
        kinds = (PreProcessor, PostProcessor, Evaluator, Visualizer)
        kept = [c for c in trainer.callbacks if c in own or not isinstance(c, kinds)]  # type: ignore[attr-defined]
        trainer.callbacks[:] = dict.fromkeys(kept)  # type: ignore[attr-defined]
        if stage != TrainerFn.FITTING:
            return
        check_images(trainer)
        check_validation(trainer)
        if trainer.ckpt_path is None and trainer.max_steps != -1 and trainer.global_step:
            msg = f"this trainer has made {trainer.global_step} steps of its max_steps: take a new Engine"
            raise ValueError(msg)
        # or the epochs of an earlier model would count as this one's; a checkpoint to resume is read after this
        trainer.fit_loop.epoch_progress.reset()

    def share_fitted(self) -> None:
        """Give every process what the first one has fitted: the deployed model but for its backbone, which all have."""
        fitted = {n: v.cpu() for n, v in self.model.state_dict().items() if not n.startswith("backbone.")}
        self.model.load_state_dict(self.trainer.strategy.broadcast(fitted), strict=False)

    def score(self, images: Tensor, paths: Sequence[str] | None = None) -> InferenceBatch:
        """Score images ``(B, 3, H, W)``, known by ``paths``."""
        del paths
        return self.model(images)

    def validation_step(self, batch: ImageBatch, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Score a batch, in single precision as it is deployed; raise a ``ValueError`` if a score is not a number."""
        del args, kwargs
        with torch.autocast(self.device.type, enabled=False):
            scored = self.score(cast(Tensor, batch.image), batch.image_path)
        finite = cast(Tensor, scored.pred_score).isfinite()
        if not finite.all():
            paths = batch.image_path or [f"image {number} of the batch" for number in range(len(finite))]
            wrong = [str(path) for path, good in zip(paths, finite.tolist(), strict=True) if not good]
            msg = f"no finite score for {', '.join(wrong)}: it holds NaN or infinite pixels, or they are not in [0, 1]"
            raise ValueError(msg)
        return batch.update(**scored._asdict())

    def test_step(self, batch: Any, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Score a batch as in validation."""
        return self.validation_step(batch, *args, **kwargs)

    def predict_step(self, batch: Any, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Score a batch as in validation."""
        return self.validation_step(batch, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the backbone by its architecture: its weights are in the checkpoint, so loading needs no others."""
        super().on_save_checkpoint(checkpoint)
        backbone = self.backbone
        own = {"backbone": backbone.architecture, "layers": backbone.levels, "pre_trained": False, "weights": None}
        checkpoint["hyper_parameters"].update(own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, and take over its pre-processing.

        Raises:
            ValueError: If it is of another model, of other arguments, or of another image size than was asked for.
        """
        arguments = {name: self.hparams[name] for name in self.shaping}
        arguments |= {"backbone": self.backbone.architecture, "layers": self.backbone.levels}
        check_checkpoint(checkpoint, type(self), arguments)
        asked_for = self.image_size
        super().on_load_checkpoint(checkpoint)
        self.make_exportable()
        if self.image_size != asked_for and (self.hparams["image_size"] or self.hparams["center_crop_size"]):
            msg = (
                f"the checkpoint is of images of {self.image_size} pixels, image_size and center_crop_size of the "
                f"model give {asked_for}: give --model.image_size as in training, or neither"
            )
            raise ValueError(msg)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a model as Lightning does, or raise a ``ValueError`` if the file is not a whole checkpoint."""
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except (EOFError, RuntimeError):
            WholeCheckpointIO().load_checkpoint(checkpoint_path)  # names a torn file
            raise

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export as anomalib does, but to one file, and at torch's opset 18: its own 14 cannot be had of this graph.

        Raises:
            ValueError: If the pre-processing cannot be exported exactly.
        """
        check_exportable(getattr(self.pre_processor, "transform", None))
        defaults = {"opset_version": 18, "external_data": False}
        return super().to_onnx(export_root, model_file_name, input_size, **{**defaults, **kwargs})

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export as anomalib does, but scores do not depend on the precision that a processor prefers.

        To compress is to accept rounding of the network. The pre-processing stays as it is, with INT8_PTQ what comes
        after the backbone too.

        Raises:
            ValueError: If that cannot be had of a compression, or it lacks its images.
        """
        check_compression(compression_type, datamodule)
        half = CompressionType.FP16 if compression_type == CompressionType.FP16 else None
        path = super().to_openvino(export_root, model_file_name, input_size, half, **kwargs)
        if compression_type not in (None, CompressionType.FP16):
            compress(path, compression_type, datamodule)
        keep_single_precision(path, only_before_convolution=compression_type is not None)
        return path


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
            f"{data.val_split_mode.value!r}): give some, or set limit_val_batches to 0 and do without thresholds"
        )
        raise ValueError(msg)


def check_validation(trainer: Trainer) -> None:
    """Raise a ``ValueError`` if a trainer would validate before a model is fitted, or never."""
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
