"""What both models share on their way from training to deployment."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin import ExportMixin
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from ..checks import Fittable, plain
from ..preflight import (
    ModelTraits,
    check_checkpoint,
    check_exportable,
    check_image_size,
    preflight,
    transform_of,
)
from ..report import KEY, Origin
from .checkpoints import WholeCheckpointIO
from .components import ComponentsMixin
from .export import check_compression, compress, export_any_size, keep_single_precision, note_good_scores
from .good_scores import UnseenScores
from .post_processing import MidwayPostProcessor, labelled
from .quiet import quiet_exporters
from .trainer import FOUND, restore_at_end, restorer_of, results_folder

COMPONENT_SETTINGS = {"anomalib_pre_processor_config", "anomalib_post_processor_config"}  # in a checkpoint

Computed = TypeVar("Computed")


class DeploymentMixin(ComponentsMixin, ExportMixin, LightningModule):
    """Scores in single precision, whole checkpoints that need no other weights, and exports that score the same.

    A class that uses it is an ``AnomalibModule`` too, has a ``model`` with a ``backbone``, and calls
    :meth:`make_exportable` when both are there.
    """

    of_training: tuple[str, ...] = ("origin",)  # attributes that an export to torch leaves out
    shaping: tuple[str, ...]  # arguments that a checkpoint must agree in, beside backbone and layers
    recipe: tuple[str, ...] = ()  # arguments that a run is resumed with
    seed: int | None
    needs_gradients = True  # or it is fitted in one pass
    logged: tuple[str, ...] = ()  # what a fit logs, which callbacks may wait for
    is_refitted = False  # since thresholds were last set by good images, in this fit
    fitted_in: str | None = None  # the folder, if it was fitted in this process
    folder: Path  # that a run writes to
    frozen: dict[str, Tensor] | None = None  # the backbone's weights, while fitting
    origin = Origin()  # of the last fit, or of the checkpoint

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

    @property
    def trainer(self) -> Trainer:
        """The trainer. It gets back at the end of a run what it had; a fit makes as many epochs as the model takes."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is not None and trainer.state.fn is not None:
            restore_at_end(trainer)
            if trainer.state.fn == TrainerFn.FITTING:
                # no hook is called before Lightning has settled on 1000 epochs if none are given
                trainer.fit_loop.max_epochs = self.epochs(trainer)

    def epochs(self, trainer: Trainer) -> int | None:
        """Return how many epochs a fit takes, of a trainer that may have been given a number."""
        raise NotImplementedError

    def traits(self) -> ModelTraits:
        """Return what the preflight is to know of the model."""
        return ModelTraits(
            name=type(self).__name__,
            image_size=self.image_size,
            needs_gradients=self.needs_gradients,
            logged=frozenset(self.logged),
            roi=self.roi_file,
            labelled=labelled(self.post_processor, is_validated=bool(self.trainer.limit_val_batches)),
        )

    def configure_callbacks(self) -> list[Callback]:
        """Return this model's own callbacks, and choose the folder that the run writes to."""
        trainer = self.trainer
        self.folder = results_folder(trainer, self.fitted_in)
        if self.folder != Path(trainer.default_root_dir) and trainer.is_global_zero:
            restorer_of(trainer).redirect_config(self.folder)
        return self.own_callbacks()

    def setup(self, stage: str) -> None:
        """Check all that the run is given before anything is computed.

        Raises:
            ValueError: If something does not do; it lists all that does not.
        """
        trainer, self.frozen, self.is_refitted = self.trainer, None, False
        if type(trainer.strategy.checkpoint_io) in (AnomalibCheckpointIO, TorchCheckpointIO):  # not the user's own
            trainer.strategy.checkpoint_io = WholeCheckpointIO(self.checkpoint_safe_globals())  # type: ignore[operator]
        restorer = restorer_of(trainer)
        preflight(trainer, stage, self.traits(), others=FOUND[trainer])
        if stage in (TrainerFn.FITTING, TrainerFn.VALIDATING):
            self.origin = self.origin.noted(trainer, trains=stage == TrainerFn.FITTING)
        if stage == TrainerFn.FITTING:
            # or the epochs of an earlier model would count as this one's; a checkpoint to resume is read after this
            trainer.fit_loop.epoch_progress.reset()
            restorer.forget_checkpoints()
            self.fitted_in = str(trainer.default_root_dir)
            return
        restorer.redirect_results(trainer, trainer.strategy.broadcast(self.folder))  # that of the first process

    def on_fit_start(self) -> None:
        """Note the weights of the backbone, that nothing may change."""
        self.frozen = {name: value.cpu().clone() for name, value in self.backbone.state_dict().items()}

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: ImageBatch, batch_idx: int) -> None:
        """Have what the last of ``max_steps`` gives validated, be it in the middle of an epoch."""
        del outputs, batch, batch_idx
        if 0 <= self.trainer.max_steps <= self.trainer.global_step:
            self.trainer.should_stop = True

    def on_fit_end(self) -> None:
        """Check that the backbone is what it was, and that there is a model.

        Raises:
            RuntimeError: If not.
        """
        self.check_frozen()
        self.frozen = None
        if not cast(Fittable, self.model).is_fitted:
            msg = f"nothing has been fitted after {self.trainer.global_step} steps: give more (max_time, max_epochs)"
            raise RuntimeError(msg)

    def check_frozen(self) -> None:
        """Raise a ``RuntimeError`` if something has changed the backbone while fitting."""
        now = self.backbone.state_dict()
        if self.frozen is not None and not all(torch.equal(now[name].cpu(), old) for name, old in self.frozen.items()):
            names = ", ".join(type(callback).__name__ for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
            msg = f"the frozen backbone has changed while fitting, the model is none: one of the callbacks ({names})?"
            raise RuntimeError(msg)

    def from_first(self, compute: Callable[[], Computed]) -> Computed:
        """Return in every process what the first one computes; what it raises all raise, as the others wait for it.

        Raises:
            ValueError: If it raises one, with the same words; of another error, theirs is a ``RuntimeError``.
        """
        found, reason, failure = None, None, None
        if self.trainer.is_global_zero:
            try:
                found = compute()
            except Exception as error:  # noqa: BLE001  whatever it is, the others must not wait for ever
                failure, reason = error, (isinstance(error, ValueError), str(error))
        found, reason = self.trainer.strategy.broadcast((found, reason))
        if failure is not None:
            raise failure
        if reason is not None:
            raise (ValueError if reason[0] else RuntimeError)(reason[1])
        return cast(Computed, found)

    def share_fitted(self) -> None:
        """Give every process what the first one has fitted: the deployed model but for its backbone, which all have."""
        fitted = {n: v.cpu() for n, v in self.model.state_dict().items() if not n.startswith("backbone.")}
        self.model.load_state_dict(self.trainer.strategy.broadcast(fitted), strict=False)
        self.is_refitted = True

    def unseen_scores(self) -> UnseenScores | None:
        """Score training images by fits that have not seen them; ``None`` if there are none or too few. While fitting.

        With several processes all get the same.
        """
        raise NotImplementedError

    @property
    def midway(self) -> MidwayPostProcessor | None:
        """The post-processor, if it is this package's; ``None`` if it is anomalib's, a user's own, or none."""
        return self.post_processor if isinstance(self.post_processor, MidwayPostProcessor) else None

    def check_unseen(self, count: int) -> None:
        """Raise a ``ValueError`` if a rate of rejects is to come of so few images that a fit does not see."""
        if self.midway and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.midway.check_enough(count)

    def on_validation_epoch_end(self) -> None:
        """Set thresholds by good images, if a fit's validation leaves that to them."""
        if self.midway and self.midway.needs_good_scores:
            self.learn_thresholds(self.midway)

    def on_train_epoch_end(self) -> None:
        """Set the thresholds that a rate of rejects asks for, where there is no validation."""
        if self.midway and self.midway.reject_rate is not None and not self.trainer.enable_validation:
            self.learn_thresholds(self.midway)

    def learn_thresholds(self, own: MidwayPostProcessor) -> None:
        """Give the post-processor scores of good images that a fit has not seen, if the model is another since then.

        Raises:
            ValueError: If none can be had, and a rate of rejects was asked for.
        """
        if self.trainer.fast_dev_run or not self.is_refitted:  # type: ignore[attr-defined]
            return
        self.is_refitted = False
        scores = None
        try:
            scores = self.unseen_scores()
        except ValueError as error:
            if own.reject_rate is not None:
                msg = f"reject_rate has no images to go by, as a fit to some of them fails: {error}"
                raise ValueError(msg) from error
        own.learn(scores)

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
            msg = f"no finite score for {', '.join(wrong)}: the backbone's features of it are NaN or infinite"
            raise ValueError(msg)
        return batch.update(**scored._asdict())

    def test_step(self, batch: Any, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Score a batch as in validation."""
        return self.validation_step(batch, *args, **kwargs)

    def predict_step(self, batch: Any, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Score a batch as in validation."""
        return self.validation_step(batch, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the backbone by its architecture: its weights are in the checkpoint, so loading needs no others.

        Raises:
            RuntimeError: If something has changed the backbone while fitting.
        """
        self.check_frozen()
        super().on_save_checkpoint(checkpoint)
        backbone = self.backbone
        own = {"backbone": backbone.architecture, "layers": backbone.levels, "pre_trained": False, "weights": None}
        if self.midway and "reject_rate" in self.hparams:
            own["reject_rate"] = self.midway.reject_rate  # it may have been changed
        checkpoint["hyper_parameters"] = plain(checkpoint["hyper_parameters"] | own)
        for name in COMPONENT_SETTINGS & checkpoint.keys():
            checkpoint[name] = plain(checkpoint[name])
        checkpoint[KEY] = self.origin.as_plain()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model, and take over its pre-processing.

        Raises:
            ValueError: If it is of another model, of other arguments, or of another image size or post-processing than
                was asked for, or has a pre-processor that the model was to do without.
        """
        shaping, recipe = ({name: self.hparams[name] for name in names} for names in (self.shaping, self.recipe))
        shaping |= {"backbone": self.backbone.architecture, "layers": self.backbone.levels}
        check_checkpoint(checkpoint, cast(AnomalibModule, self), shaping, recipe, can_resume=self.needs_gradients)
        asked_for = self.image_size
        super().on_load_checkpoint(checkpoint)
        self.origin = Origin.of(checkpoint)
        self.make_exportable()
        is_given = bool(self.hparams["image_size"] or self.hparams["center_crop_size"])
        check_image_size(self, self.image_size, asked_for, is_given=is_given)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a model as Lightning does, or raise a ``ValueError`` if the file is not a whole checkpoint."""
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except (EOFError, RuntimeError):
            WholeCheckpointIO().load_checkpoint(checkpoint_path)  # names a torn file
            raise

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does, without what the model knows of the images that it was fitted to."""
        known = {name: self.__dict__.pop(name) for name in self.of_training if name in self.__dict__}
        try:
            return super().to_torch(*args, **kwargs)
        finally:
            self.__dict__.update(known)

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
        check_exportable(transform_of(self.pre_processor))
        labels = self.midway.labels_as_there_are() if self.midway else nullcontext()
        with labels, quiet_exporters() as verbose:
            options = {"opset_version": 18, "external_data": False, "verbose": verbose, **kwargs}
            if self.image_size is None and input_size is None:
                return export_any_size(
                    self, Path(export_root) / "weights" / "onnx" / f"{model_file_name}.onnx", **options
                )
            return super().to_onnx(export_root, model_file_name, input_size, **options)

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
        check_compression(compression_type, datamodule, self)
        half = CompressionType.FP16 if compression_type == CompressionType.FP16 else None
        path = super().to_openvino(export_root, model_file_name, input_size, half, **kwargs)
        if compression_type not in (None, CompressionType.FP16):
            compress(path, compression_type, datamodule, input_size)
        keep_single_precision(path, only_before_convolution=compression_type is not None)
        if self.midway:
            note_good_scores(path, self.midway.good_scores_as_scaled())
        return path
