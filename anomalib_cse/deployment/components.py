"""anomalib's components as both models have them: what processes, judges and draws images around the network."""

from typing import cast

from anomalib.metrics import AnomalibMetric, Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback, LightningModule
from torch import nn

from ..checks import check_flag, check_plain, check_size, plain
from ..features import FrozenBackbone
from ..preflight import LABELS, BatchCheck, transform_of
from ..report import RawScores, Report
from .evaluator import TwoClassEvaluator
from .post_processing import MidwayPostProcessor
from .pre_processing import check_transform, exact, fixed_size, resize_and_crop
from .visualizer import VerdictVisualizer


class ComponentsMixin(LightningModule):
    """Defaults of an ``AnomalibModule``'s components, and their place in the trainer."""

    model: nn.Module
    pre_processor: nn.Module | None
    post_processor: nn.Module | None
    report: bool  # whether a test or prediction ends with a page of what it found
    image_size: tuple[int, int] | None  # height and width of what the pre-processor leaves of any image; None: any
    takes_any_size = False  # whether images may differ in size
    roi_file: tuple[str, int, int] | None = None  # a mask that all images share, its width and height, if given

    @property
    def backbone(self) -> FrozenBackbone:
        """The frozen feature extractor of the deployed model."""
        return cast(FrozenBackbone, self.model.get_submodule("backbone"))

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Return a pre-processor that resizes; ``None`` is 256x256. Normalisation belongs to the backbone."""
        return resize_and_crop(image_size)

    def configure_post_processor(self) -> PostProcessor:
        """Return anomalib's post-processor, but with an image threshold between two validation images' scores."""
        return MidwayPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Return what draws each image with its verdict."""
        return VerdictVisualizer()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return anomalib's evaluator, but metrics are left out where there are no labels, the model's or the true."""
        metrics = [cast(AnomalibMetric, metric) for metric in AnomalibModule.configure_evaluator().test_metrics]
        for metric in metrics:
            metric.strict &= not LABELS.intersection(metric.fields)
        return TwoClassEvaluator(test_metrics=metrics)

    def own_callbacks(self) -> list[Callback]:
        """Return what processes this model's images and scores, and no other's."""
        components: tuple[object, ...] = (self.pre_processor, self.post_processor, self.evaluator, self.visualizer)
        own, raw = [c for c in components if isinstance(c, Callback)], RawScores()
        # the post-processor, which normalises scores, is between the two
        checked = BatchCheck(any_size=self.image_size is None, roi=self.roi_file)
        return [checked, raw, *own, Report(page=self.report, raw=raw)]

    def make_exportable(self) -> None:
        """Have the pre-processor compute the same outside the trainer as within.

        Raises:
            ValueError: If its transform does more than resize and crop, or leaves images in several sizes or too small;
                or if an argument of both models is none.
        """
        check_flag("report", self.report)
        self.hparams.update(plain(dict(self.hparams)))  # a subclass may have more, or have given others
        check_plain(self.hparams)
        transform = transform_of(self.pre_processor)
        check_transform(transform)
        self.image_size = fixed_size(self.pre_processor)
        if self.image_size is None and not self.takes_any_size:
            msg = (
                "the model needs all images in one size: give image_size, or a pre_processor that resizes to "
                f"Resize((height, width)); got the transform {transform}"
            )
            raise ValueError(msg)
        only_size = self.backbone.only_size
        if only_size not in (None, self.image_size):
            height, width = only_size
            msg = (
                f"backbone {self.backbone.architecture} takes images of {height}x{width} alone, not "
                f"{'of any size' if self.image_size is None else '{}x{}'.format(*self.image_size)}: give image_size="
                f"[{height}, {width}] and no center_crop_size"
            )
            raise ValueError(msg)
        if self.image_size is None and self.backbone.embeds_positions:
            msg = (
                f"backbone {self.backbone.architecture} embeds positions, which an exported file cannot resample to "
                "images of any size: give image_size, or another backbone, such as a DINOv3 or a convolutional one"
            )
            raise ValueError(msg)
        if self.image_size is not None:
            self.backbone.fit_to(self.image_size)
            name = "center_crop_size" if self.hparams["center_crop_size"] else "image_size"
            check_size(name, self.image_size, self.backbone.stride, ", the stride of the coarsest layer")
        if isinstance(self.pre_processor, PreProcessor) and self.pre_processor.transform:
            self.pre_processor.export_transform = exact(self.pre_processor.transform)
