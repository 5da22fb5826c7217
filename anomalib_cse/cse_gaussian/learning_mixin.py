"""A fitted model that learns on, and keeps in its checkpoints what it needs for that."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.models.components import AnomalibModule
from rich.progress import track
from torch import Tensor

from ..checks import check_number
from ..deployment import DeploymentMixin, UnseenScores, extremes, transform_of
from ..preflight import Sample
from ..synthesis import Stream, generator_for
from .known import pixels_of, read_known
from .learning import Learnt, learn, new_samples, unchanged_if_it_fails
from .sample import FOLDS, TrainingSample, add_images
from .sums import Sums
from .torch_model import CseGaussianModel

SUMS = "cse_gaussian_sums"  # what a checkpoint calls them


class LearningMixin(DeploymentMixin):
    """Learn of new images by the sums of a fit, which the model sets as ``sums`` at its end."""

    model: CseGaussianModel
    of_training = (*DeploymentMixin.of_training, "sums")
    sums: Sums | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums, if there are any."""
        super().on_save_checkpoint(checkpoint)
        if self.sums is not None:
            checkpoint[SUMS] = self.sums.packed()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's sums; see the base class for what is raised."""
        super().on_load_checkpoint(checkpoint)
        self.sums = Sums.unpacked(checkpoint[SUMS]) if SUMS in checkpoint else None

    def learn(
        self,
        good: str | Path | None = None,
        defects: str | Path | None = None,
        masks: str | Path | None = None,
        forget: float = 0.0,
    ) -> Learnt:
        """Learn of new good images and of defects, without the images of before, as a fit to all at once would.

        Directions and covariances follow exactly from sums; scales and thresholds as far as 24 good images tell that
        the checkpoint holds. Defects are not told apart from others: to learn of an image twice counts it twice.

        Args:
            good: Folder of good images, and of folders in it.
            defects: Folder of images with defects; see ``known_defects``.
            masks: Folder of their masks, or ``None``; see ``known_masks``.
            forget: Part of the earlier good images that counts no more, in [0, 1]; above 0 it takes ``good`` ones.

        Returns:
            What has changed.

        Raises:
            FileNotFoundError: If a folder is not there.
            ValueError: If images or arguments will not do, or the model has no sums; the model is as it was then.
        """
        samples = new_samples(good, defects, masks)
        check_number("forget", forget, "[0, 1]")
        if forget and good is None:
            msg = f"forget is for new good images to take the place of others, got {forget} without good"
            raise ValueError(msg)
        if forget == 1 and len(samples[0]) < FOLDS:
            msg = f"forget 1 leaves the new good images alone, which must be at least {FOLDS}, got {len(samples[0])}"
            raise ValueError(msg)
        if self.sums is None:
            msg = "the model has no sums to learn on from: fit it, or load a checkpoint of one with keep_sums=True"
            raise ValueError(msg)
        with unchanged_if_it_fails(cast(AnomalibModule, self)):
            return self.learn_of(*samples, forget)

    def learn_of(self, good: Sequence[Sample], defects: Sequence[Sample], forget: float) -> Learnt:
        """Learn of images that have been checked."""
        sums, own, seed = cast(Sums, self.sums), self.midway, self.effective_seed
        sample, known = self.sampled(good, seed), read_known(defects, transform_of(self.pre_processor))
        before = self.scores_of(good), self.scores_of(defects)
        cut = self.threshold
        kinds, follows = self.hparams["variations"], own is not None and own.has_thresholds
        self.sums, scores = learn(self.model, sums, sample, known, forget, kinds, seed, scored=follows)
        if own and follows:
            if scores is None:
                msg = f"thresholds cannot follow, as a fit to fewer than {FOLDS} images tells too little: fit to all"
                raise ValueError(msg)
            own.follow(*scores, 1 - forget)
        unseen = None if scores is None else scores[2]
        is_whole = unseen is not None and len(unseen.images) == len(good)
        after = cast(UnseenScores, unseen).images if is_whole else self.scores_of(good), self.scores_of(defects)
        said = own.expectation if own else ""
        good_scores, defect_scores = zip(before, after, strict=True)
        return Learnt((sums.good, sums.known), good_scores, defect_scores, (cut, self.threshold), said)

    def recalibrate(self, good: str | Path) -> Learnt:
        """Set thresholds by a folder of new good images, and leave all else as it is.

        Raises:
            FileNotFoundError: If the folder is not there.
            ValueError: If it has fewer than 5 images, or the model no thresholds of its own kind.
        """
        [samples, _] = new_samples(good, None, None)
        own = self.midway
        if not (own and own.has_thresholds):
            msg = "the model has no thresholds to set: fit it with a reject_rate, or with validation images"
            raise ValueError(msg)
        before, sums = self.threshold, self.sums
        found = self.found_of(samples)
        own.recalibrate(found)
        known = (sums.good, sums.known) if sums else (0, 0)
        nothing = torch.zeros(0)
        return Learnt(
            known,
            (found.images, found.images),
            (nothing, nothing),
            (before, self.threshold),
            own.expectation,
            thresholds_only=True,
        )

    @property
    def threshold(self) -> float:
        """The raw score above which an image is anomalous; NaN if there is none."""
        return self.midway.cut if self.midway and self.midway.has_thresholds else float("nan")

    def prepared(self, samples: Sequence[Sample]) -> Iterator[tuple[str, Tensor]]:
        """Give the paths of images, and these as the pre-processor leaves them ``(1, 3, H, W)``."""
        for sample in track(samples, description="Reading images") if samples else ():
            pixels = pixels_of(sample.image).to(self.device)
            yield sample.image, self.pre_processor(pixels) if self.pre_processor else pixels

    @torch.no_grad()
    def sampled(self, good: Sequence[Sample], seed: int) -> TrainingSample | None:
        """Return sums and a sample of good images; ``None`` if there are none."""
        budget, generator = self.hparams["memory_budget"], generator_for(seed, Stream.SAMPLE)
        sample = TrainingSample(budget, generator, has_positions=self.image_size is not None)
        for path, image in self.prepared(good):
            add_images(self.model, sample, image.to(self.model.layer_weights), [path])
        return sample if good else None

    @torch.no_grad()
    def found_of(self, samples: Sequence[Sample]) -> UnseenScores:
        """Return the scores of images by the model as it is."""
        found = [extremes(self.model(image)) for _, image in self.prepared(samples)]
        return UnseenScores.of([torch.zeros(2, 0), *found], [sample.image for sample in samples])

    def scores_of(self, samples: Sequence[Sample]) -> Tensor:
        """Return the scores of images by the model as it is, ``(N,)``."""
        return self.found_of(samples).images
