"""Notes scores and small pictures while a model is tested or predicts, and has a page made of them."""

import platform
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from ..preflight import datamodule_of
from .page import Record, Scale, name, plural, write_page
from .pictures import Picture, Pictures, nearest_pictures

Share = tuple[list[Record], list[Picture]]  # of one process


class Report(Callback):
    """Write ``report.html`` at the end of a test, ``report-predict.html`` at that of a prediction.

    Both go to the trainer's ``default_root_dir``. It has to come after the post-processor, so that scores are
    normalised. Nothing is written with ``fast_dev_run``, nor if no batch was an ``ImageBatch`` with scores.

    Args:
        backbone: What to call the model's backbone.
    """

    def __init__(self, backbone: str) -> None:
        self.backbone = backbone
        self.closing = ""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with no images."""
        del trainer
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
        images = cast(Tensor, outputs.image)
        for path, label, score, image, drawn in zip(
            outputs.image_path or none, labels, scores, images, maps, strict=True
        ):
            self.pictures.add(len(self.records), score, image, drawn)
            self.records.append(Record(path and str(path), label, score))

    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page of a test."""
        self.write(trainer, pl_module, "Test", "report.html", trainer.test_dataloaders)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page of a prediction."""
        self.write(trainer, pl_module, "Prediction", "report-predict.html", trainer.predict_dataloaders)

    def write(self, trainer: Trainer, pl_module: LightningModule, run: str, file: str, loaders: object) -> None:
        """Write the page, of all processes' images, in the first process."""
        seconds = time.perf_counter() - self.start
        logged = dict(trainer.callback_metrics)  # in all processes, as they are summed up by it
        records, pictures = joined(gathered((self.records, self.pictures.kept)))
        if not records:
            return
        model, data = type(pl_module).__name__, data_in_words(trainer, loaders)
        facts = {
            "Model": model,
            "Backbone": self.backbone,
            **({"Data": data} if data else {}),
            **threshold_in_words(getattr(pl_module, "post_processor", None)),
            "Date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
            "Time": f"{seconds:.1f} s, {len(records) / seconds:.1f} images a second, reading and drawing included",
            "Processor": f"{processor(pl_module.device)}, {plural(torch.get_num_threads(), 'thread')}",
            "Versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "anomalib", "anomalib_cse")),
        }
        path = Path(trainer.default_root_dir) / file
        metrics = {name: float(value) for name, value in logged.items()} if run == "Test" else {}
        title = f"{run} of {model}{data and f' on {data}'}"
        write_page(path, title, records, pictures, self.scale, facts, metrics)
        self.closing = where(path, trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a run that has broken off."""
        del trainer, pl_module, stage
        self.closing = ""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where the results are, below the metrics that Lightning prints, also if no images were tested."""
        del pl_module
        if not self.closing and stage == TrainerFn.TESTING and not any(trainer.num_test_batches):
            self.closing = "\n".join(filter(None, ("No images were tested.", where(None, trainer))))
        if self.closing:
            rank_zero_info(self.closing)
        self.closing = ""


def where(page: Path | None, trainer: Trainer) -> str:
    """Return where a run's page, pictures and checkpoint are, as far as they lie in its folder, or nothing."""
    folder, checkpoint = Path(trainer.default_root_dir), getattr(trainer.checkpoint_callback, "best_model_path", "")
    drawn = any(isinstance(callback, ImageVisualizer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    saved = checkpoint and Path(checkpoint).is_relative_to(folder)  # Lightning restores that of an earlier run, too
    found = {
        **({page: "scores and images, to choose a threshold by"} if page else {}),
        **({folder / "images": "a picture of each image"} if page and drawn else {}),
        **({Path(checkpoint): "the model"} if saved else {}),
    }
    lines = {str(path.relative_to(folder)): text for path, text in found.items() if path.exists()}
    if not lines:
        return ""
    width = max(map(len, lines))
    return f"Results in {folder}" + "".join(f"\n  {path:{width}}  {text}" for path, text in lines.items())


def scale_of(post_processor: object) -> Scale:
    """Return how a post-processor scales scores and where it cuts them."""
    if not isinstance(post_processor, PostProcessor):
        return Scale(None, normalised=False)
    span = post_processor.image_max - post_processor.image_min
    normalised = post_processor.enable_normalization and not bool(span.isnan())
    threshold = post_processor.image_threshold
    if normalised and not threshold.isnan():
        threshold = post_processor.normalized_image_threshold
    return Scale(None if threshold.isnan() else threshold.item(), normalised)


def threshold_in_words(post_processor: object) -> dict[str, str]:
    """Return how many rejects are expected at the model's threshold, and which training images are unlike others."""
    expectation = getattr(post_processor, "expectation", "")
    suspicious = getattr(post_processor, "suspicious", ())
    listed = ", ".join(f"{name(path, 0)} ({score:.3g})" for path, score in suspicious)
    return {
        **({"Rejects, at the model's own threshold": expectation} if expectation else {}),
        **({"Training images unlike the others": listed} if listed else {}),
    }


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


def processor(device: torch.device) -> str:
    """Return the name of what the model ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
