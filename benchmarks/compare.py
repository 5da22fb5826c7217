"""Models side by side, each trained, tested and exported by anomalib, with what its benchmark leaves out.

That is several seeds, latency, memory, size, and going on after a failure or a break: every model, category and seed
is a cell with a process of its own and a line in ``results.csv``, and what has a line is not run again. Latency is
measured at the end, of all exported models in turns. The models stand in a YAML file; see ``configs/compare``. Run by
``make bench-compare``.
"""

import argparse
import shutil
import traceback
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator, F1Score, PBn, PGn
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import CenterCrop, Resize
from torchvision.transforms.v2.functional import resize

from cells import KEY, Cell, cells_parser, parse_cells, read, run_cells
from common import (
    OPSET,
    QUIET,
    SINGLE_PRECISION,
    Network,
    Row,
    compiled,
    exported_size,
    hardware,
    in_child,
    peak_memory,
    per_image,
)
from report import METRICS, contact_sheet, not_run, table, trade_off

COLUMNS = [*KEY, "deviations", *METRICS, "fit_s", "exported_MB", "peak_MB", "remark", "failed", "settings"]
SHOWN = 6  # test images on a contact sheet
SHOWN_SIZE = [256, 256]


def run_cell(cell: Cell, accelerator: str, keep: Path | None) -> Row:
    """Fit, test and export a model.

    Args:
        cell: Which one, on what, with which seed.
        accelerator: What to train with.
        keep: Where to leave the network and its maps for what comes after all cells, if it is to do so.
    """
    # anomalib's thresholds for all alike; Cse's own would have one defective image more right
    components = {"evaluator": evaluator(), "post_processor": PostProcessor(), "visualizer": False}
    with TemporaryDirectory() as folder:
        model, images, seconds = cell.fit(folder, accelerator, **components)
        trainer = {"accelerator": accelerator, "devices": 1, "default_root_dir": folder, **QUIET}
        engine = Engine(callbacks=cell.contender.callbacks, **trainer)
        engine.validate(model, datamodule=images, verbose=False)  # for thresholds, and scores from 0 to 1
        [metrics] = engine.test(model, datamodule=images, verbose=False)
        costs = {"fit_s": seconds, "peak_MB": peak_memory()}  # before export, which takes memory of its own
        return {**metrics, **costs, **leave(engine, model, images, Path(folder), keep)}


def evaluator() -> Evaluator:
    """Return anomalib's metrics."""
    pixels = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
    return Evaluator(
        test_metrics=[
            AUROC(["pred_score", "gt_label"], prefix="image_"),
            F1Score(["pred_label", "gt_label"], prefix="image_"),
            AUROC(**pixels),
            AUPRO(**pixels),
            AUPRO(**{**pixels, "prefix": "pixel_5%_"}, fpr_limit=0.05),
            PGn(["pred_score", "gt_label"], fnr=0.02),
            PBn(["pred_score", "gt_label"], fpr=0.02),
        ]
    )


def leave(engine: Engine, model: AnomalibModule, images: AnomalibDataModule, folder: Path, keep: Path | None) -> Row:
    """Export the model and, if asked for, keep that and some maps; return its size in OpenVINO, or what failed."""
    unfinished = folder / "kept"
    unfinished.mkdir()
    missing = "neither maps nor export"
    try:
        if keep:
            save_maps(engine, model, images, unfinished / "maps.npz")
            np.save(unfinished / "image.npy", images.test_data[0].image[None].numpy())
        missing = "not exported"
        network = Path(engine.export(model, "openvino", export_root=folder, onnx_kwargs=OPSET))
        if keep:
            shutil.copytree(network.parent, unfinished / "exported")
    except Exception as error:  # noqa: BLE001  whatever ails it, the hours of training before it count
        traceback.print_exception(error)
        return {"remark": f"{missing}: {type(error).__name__}"}
    finally:
        if keep:
            shutil.move(unfinished, keep)
    return {"exported_MB": exported_size(network)}


def seen(model: AnomalibModule) -> list[float]:
    """Return the part of an image's height and width that the network sees, as its pre-processing may crop."""
    transforms = getattr(getattr(model.pre_processor, "transform", None), "transforms", [])
    resized = [t.size for t in transforms if isinstance(t, Resize)]
    cropped = [t.size for t in transforms if isinstance(t, CenterCrop)]
    return [c / r for c, r in zip(cropped[0], resized[0], strict=True)] if cropped else [1.0, 1.0]


def save_maps(engine: Engine, model: AnomalibModule, images: AnomalibDataModule, file: Path) -> None:
    """Save this model's maps of the first test image of every kind of defect and of none, and those images."""
    data = images.test_data
    kinds = [Path(path).parent.name for path in data.samples.image_path]
    first = sorted({kind: kinds.index(kind) for kind in sorted(kinds)}.values())[:SHOWN]
    items = [data[index] for index in first]
    masks = [item.gt_mask if item.gt_mask is not None else torch.zeros(item.image.shape[-2:]) for item in items]
    loader = DataLoader(Subset(data, first), batch_size=1, collate_fn=data.collate_fn)
    batches = engine.predict(model, dataloaders=loader)
    np.savez_compressed(
        file,
        kinds=[kinds[index] for index in first],
        images=torch.stack([resize(item.image, SHOWN_SIZE) for item in items]).movedim(1, -1).numpy(),
        masks=torch.stack([resize(mask[None].float(), SHOWN_SIZE)[0] for mask in masks]).numpy(),
        maps=torch.cat([batch.anomaly_map.reshape(1, *batch.anomaly_map.shape[-2:]) for batch in batches]).numpy(),
        scores=torch.cat([batch.pred_score.reshape(1) for batch in batches]).numpy(),
        seen=seen(model),
    )


def opened(folder: Path) -> tuple[Network, np.ndarray]:
    """Return the exported model that a cell has left, ready to run, and an image as it comes from its dataset."""
    network, (count, *_) = compiled(next((folder / "exported").glob("*.xml")), SINGLE_PRECISION)
    return network, np.repeat(np.load(folder / "image.npy"), count or 1, axis=0)


def latencies(folders: list[Path], rounds: int) -> Row:
    """Return the median milliseconds that each exported model takes for an image, if it does not fail."""
    return per_image({str(folder): partial(opened, folder) for folder in folders}, rounds)


def kept(output: Path, category: str, model: str) -> Path:
    """Return the folder in which a cell leaves what is wanted after all of them."""
    return output / "kept" / f"{category}_{zlib.crc32(model.encode()):08x}"


def run(options: argparse.Namespace) -> pd.DataFrame:
    """Run the cells that have no line yet, and return all lines."""
    (options.output / "kept").mkdir(parents=True, exist_ok=True)

    def measurement(cell: Cell) -> Callable[[], Row]:
        keep = kept(options.output, cell.dataset.name, cell.contender.name)  # of the first seed
        return partial(run_cell, cell, options.accelerator, None if keep.exists() else keep)

    return run_cells(
        options, COLUMNS, measurement, lambda row: f"image AUROC {row['image_AUROC']:.3f}, fit {row['fit_s']:.0f} s"
    )


def measure_latency(options: argparse.Namespace, lines: pd.DataFrame) -> pd.DataFrame:
    """Return the latency of all models, anew if one is missing: numbers of different occasions cannot be compared."""
    columns = ["model", "category", "ms"]
    known = read(options.output / "latency.csv", columns)
    names = lines.loc[lines["failed"] == "", ["model", "category"]].drop_duplicates().itertuples(index=False, name=None)
    folders = {(m, c): kept(options.output, c, m) for m, c in names}
    folders = {cell: folder for cell, folder in folders.items() if (folder / "exported").exists()}
    if not options.latency and folders.keys() <= set(known[["model", "category"]].itertuples(index=False, name=None)):
        return known
    print(f"Latency of {len(folders)} networks ...", flush=True)
    result = in_child(partial(latencies, list(folders.values()), options.rounds))
    if "failed" in result:
        print(f"latency could not be measured: {result['failed']}", flush=True)
        return known
    measured = [(*cell, result[str(folder)]) for cell, folder in folders.items() if str(folder) in result]
    latency = pd.DataFrame(measured, columns=columns)
    latency.to_csv(options.output / "latency.csv", index=False)
    return latency


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cells_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--accelerator", default="auto", help="to train with; latency is always the processor's")
    parser.add_argument("--latency", action="store_true", help="measure latency anew, on a quieter machine")
    parser.add_argument("--rounds", type=int, default=20, help="of the latency measurement")
    parser.add_argument("--output", type=Path, default=Path("results/compare"))
    return parse_cells(parser, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run what is to be run; write the table and the pictures of all that has been."""
    options = parse(arguments)
    lines = run(options)
    latency = measure_latency(options, lines)
    text = f"{table(lines, latency)}\n\n{not_run(lines)}{hardware()}\n"
    (options.output / "table.md").write_text(text)
    trade_off(lines, latency, options.output / "trade_off.png")
    for category, of_category in lines[lines["failed"] == ""].groupby("category"):
        maps = {name: kept(options.output, category, name) / "maps.npz" for name in of_category["model"]}
        sheet = {name: file for name, file in maps.items() if file.exists()}
        contact_sheet(sheet, options.output / f"maps_{category}.png")
    print(text)


if __name__ == "__main__":
    main()
