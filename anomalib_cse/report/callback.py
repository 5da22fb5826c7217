"""Notes scores and small pictures while a model is tested or predicts, and has a table and a page made of them."""

import time
from pathlib import Path
from typing import Any, cast

from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from ..preflight import datamodule_of
from .facts import facts_of, next_command
from .page import Record, Scale, write_page
from .pictures import Picture, Pictures, nearest_pictures
from .scores import write_scores

Share = tuple[list[Record], list[Picture]]  # of one process


class RawScores(Callback):
    """Keep the latest batch's scores as the model gives them: it has to come before the post-processor."""

    latest: list[float] | None = None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Note the scores of a batch."""
        del trainer, pl_module, batch, args, kwargs
        scores = outputs.pred_score if isinstance(outputs, ImageBatch) else None
        self.latest = None if scores is None else scores.flatten().tolist()

    on_predict_batch_end = on_test_batch_end


class Report(Callback):
    """Write ``scores.csv`` and ``report.html`` at the end of a test, of a prediction ``-predict`` files of both.

    They go to ``folder``, or if that is ``None`` to the trainer's ``default_root_dir``. It has to come after the
    post-processor, so that scores are normalised. Nothing is written with ``fast_dev_run``, nor if no batch was an
    ``ImageBatch`` with scores.

    Args:
        page: Whether to write the page; the table is written in any case.
        raw: What notes scores before the post-processor; ``None`` if nothing does.
    """

    def __init__(self, *, page: bool = True, raw: RawScores | None = None) -> None:
        self.page, self.raw = page, raw
        self.folder: Path | None = None
        self.closing = ""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with no images."""
        self.checkpoint = trainer.ckpt_path  # Lightning forgets it
        self.records: list[Record] = []
        self.scale = scale_of(getattr(pl_module, "post_processor", None))
        self.pictures = Pictures(self.scale.threshold, normalised=self.scale.normalised)
        self.start = time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Note a batch."""
        del pl_module, batch, args, kwargs
        if trainer.fast_dev_run or not isinstance(outputs, ImageBatch) or outputs.pred_score is None:  # type: ignore[attr-defined]
            return
        scores = outputs.pred_score.flatten().tolist()
        none = [None] * len(scores)
        labels = none if outputs.gt_label is None else outputs.gt_label.flatten().bool().tolist()
        maps = none if outputs.anomaly_map is None else outputs.anomaly_map.flatten(0, -3)  # (B, H, W)
        images, raw = cast(Tensor, outputs.image), (self.raw and self.raw.latest) or none
        for path, label, score, own, image, drawn in zip(
            outputs.image_path or none, labels, scores, raw, images, maps, strict=True
        ):
            if self.page:
                self.pictures.add(len(self.records), score, image, drawn)
            self.records.append(Record(path and str(path), label, score, own))

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table and the page of a test."""
        self.write(trainer, pl_module, "Test", "", trainer.test_dataloaders)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table and the page of a prediction."""
        self.write(trainer, pl_module, "Prediction", "-predict", trainer.predict_dataloaders)

    def write(self, trainer: Trainer, pl_module: LightningModule, run: str, suffix: str, loaders: object) -> None:
        """Write both, of all processes' images, in the first process."""
        seconds = time.perf_counter() - self.start
        logged = dict(trainer.callback_metrics)  # in all processes, as they are summed up by it
        records, pictures = joined(gathered((self.records, self.pictures.kept)))
        if not records:
            return
        folder = self.folder or Path(trainer.default_root_dir)
        table, page = folder / f"scores{suffix}.csv", folder / f"report{suffix}.html"
        written = table
        try:
            write_scores(table, records, self.scale)
            written = page
            if self.page:
                data = data_in_words(trainer, loaders)
                title = f"{run} of {type(pl_module).__name__}{data and f' on {data}'}"
                facts, warning = facts_of(pl_module, records, seconds, self.checkpoint, saved_in(trainer))
                metrics = {name: float(value) for name, value in logged.items()} if run == "Test" else {}
                write_page(page, title, records, pictures, self.scale, facts, metrics, warning)
            else:
                page.unlink(missing_ok=True)  # of an earlier run, whose table is gone
        except OSError as error:  # the results of the run are worth more than their files
            rank_zero_warn(f"{written} cannot be written ({error}): this run has its results, and not all of its files")
            return
        self.closing = where(trainer, pl_module, page if self.page else None, table)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a run that has broken off."""
        del trainer, pl_module, stage
        self.closing = ""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where the results are, below the metrics that Lightning prints, also if no images were tested."""
        if not self.closing and stage == TrainerFn.TESTING and not any(trainer.num_test_batches):
            self.closing = "\n".join(filter(None, ("No images were tested.", where(trainer, pl_module))))
        if self.closing:
            rank_zero_info(self.closing)
        self.closing = ""


def saved_in(trainer: Trainer) -> Path | None:
    """Return the checkpoint that a run has saved in its folder; ``None`` if it has not."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    # Lightning restores that of an earlier run, too
    return Path(path) if path and Path(path).is_relative_to(trainer.default_root_dir) else None


def where(trainer: Trainer, model: LightningModule, page: Path | None = None, table: Path | None = None) -> str:
    """Return where a run's results are, as far as they lie in its folder, and the command to go on with; or nothing."""
    folder, checkpoint = table.parent if table else Path(trainer.default_root_dir), saved_in(trainer)
    if checkpoint and not checkpoint.is_relative_to(folder):
        checkpoint = None
    drawn = any(isinstance(callback, Visualizer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    found = {
        **({page: "scores and images, to choose a threshold by"} if page else {}),
        **({table: "score and verdict of each image"} if table else {}),
        **({folder / "images": "a picture of each image"} if table and drawn else {}),
        **({checkpoint: "the model"} if checkpoint else {}),
    }
    lines = {str(path.relative_to(folder)): text for path, text in found.items() if path.exists()}
    if not lines:
        return ""
    width = max(map(len, lines))
    said = f"Results in {folder}" + "".join(f"\n  {path:{width}}  {text}" for path, text in lines.items())
    return f"{said}\nNext: {next_command(model, checkpoint)}" if checkpoint and checkpoint.exists() else said


def scale_of(post_processor: object) -> Scale:
    """Return how a post-processor scales scores and where it cuts them."""
    if not isinstance(post_processor, PostProcessor):
        return Scale(None, normalised=False)
    span = post_processor.image_max - post_processor.image_min
    normalised = post_processor.enable_normalization and not bool(span.isnan())
    threshold = post_processor.image_threshold
    if normalised and not threshold.isnan():
        threshold = post_processor.normalized_image_threshold
    has_own = getattr(post_processor, "has_pixel_threshold", not post_processor.pixel_threshold.isnan())
    pixels = float(post_processor.normalized_pixel_threshold) if normalised and has_own else None
    return Scale(None if threshold.isnan() else threshold.item(), normalised, pixels)


def gathered(share: Share) -> list[Share]:
    """Return the shares of all processes, in the first one; none in the others."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [share]
    shares = [share] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(share, shares)
    return shares or []


def joined(shares: list[Share]) -> Share:
    """Merge the images of all processes. A sampler may give an image to two of them: it is taken once."""
    records, kept, paths = list[Record](), list[list[Picture]](), set[str]()
    for own, pictures in shares:
        fresh = {}
        for number, record in enumerate(own):
            if len(shares) == 1 or record.path is None or record.path not in paths:
                fresh[number] = len(records)
                records.append(record)
        paths.update(record.path for record in own if record.path)
        kept.append([(rank, -fresh[-n], *files) for rank, n, *files in pictures if -n in fresh])  # type: ignore[misc]
    return records, nearest_pictures(kept)


def data_in_words(trainer: Trainer, loaders: object) -> str:
    """Return the name of the datamodule and its category, if the images were its test images; else nothing."""
    data = datamodule_of(trainer)
    datasets = [loader.dataset for loader in CombinedLoader(loaders).flattened if isinstance(loader, DataLoader)]
    if not any(dataset is getattr(data, "test_data", None) for dataset in datasets):
        return ""
    return ", ".join(filter(None, (getattr(data, name, None) for name in ("name", "category"))))
