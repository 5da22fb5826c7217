"""Models side by side, each trained, tested and exported by anomalib, with what its benchmark leaves out.

That is several seeds, latency, memory, size, and going on after a failure or a break: every model, category and seed
is a cell with a process of its own and a line in ``results.csv``, and what has a line is not run again. Latency is
measured at the end, of all models in turns. Run by ``make bench-compare``.
"""

import argparse
import math
import statistics
import time
import traceback
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator, F1Score
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import CenterCrop, Resize
from torchvision.transforms.v2.functional import resize

from common import check_categories, exported_size, hardware, in_child, peak_memory
from contenders import ABLATIONS, BATCH_SIZE, EFFICIENT_AD_STEPS, EPOCHS, PAPER, contender
from report import contact_sheet, not_run, row_labels, table, trade_off

KEY = ["model", "category", "seed", "deviations"]
NETWORK = ["model", "category", "deviations"]  # has a latency
MEASURED = [
    "image_AUROC",
    "image_F1Score",
    "pixel_AUROC",
    "pixel_AUPRO",
    "fit_s",
    "exported_MB",
    "peak_MB",
    "remark",
    "failed",
]
SHOWN = 6  # test images on a contact sheet
SHOWN_SIZE = [256, 256]

Cell = dict[str, Any]  # the values of KEY


def images_of(options: argparse.Namespace, category: str, batch_size: int = BATCH_SIZE) -> MVTecAD:
    """The images of a category, split as its folders are; its test images give the thresholds, as is anomalib's way."""
    return MVTecAD(root=options.root, category=category, train_batch_size=batch_size, num_workers=0)


def evaluator() -> Evaluator:
    """Anomalib's metrics."""
    pixels = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
    return Evaluator(
        test_metrics=[
            AUROC(["pred_score", "gt_label"], prefix="image_"),
            F1Score(["pred_label", "gt_label"], prefix="image_"),
            AUROC(**pixels),
            AUPRO(**pixels),
        ]
    )


def run_cell(cell: Cell, options: argparse.Namespace, keep: Path | None) -> dict[str, Any]:
    """Fit, test and export a model.

    Args:
        cell: Which one, on what, with which seed.
        options: Those of the command line.
        keep: Where to leave the network and its maps for what comes after all cells, if it is to do so.
    """
    seed_everything(cell["seed"], verbose=False)
    chosen = contender(cell["model"], cell["seed"], options)
    category = next(path for path in options.categories if Path(path).name == cell["category"])
    images = images_of(options, category, chosen.batch_size)
    images.setup()
    epochs = chosen.epochs or math.ceil(EFFICIENT_AD_STEPS / len(images.train_data))
    # anomalib's thresholds for all alike; Cse's own would have one defective image more right
    model = chosen.build(evaluator=evaluator(), post_processor=PostProcessor(), visualizer=False)
    with TemporaryDirectory() as folder:
        engine = Engine(
            max_epochs=epochs,
            check_val_every_n_epoch=epochs,  # for thresholds alone: no epoch is chosen by labelled images
            accelerator=options.accelerator,
            devices=1,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        engine.fit(model, datamodule=images)
        seconds = time.perf_counter() - start
        [metrics] = engine.test(model, datamodule=images, verbose=False)
        peak = peak_memory()  # before export, which takes some of its own
        return {
            **metrics,
            "fit_s": seconds,
            "peak_MB": peak,
            **leave(engine, model, images_of(options, category), Path(folder), keep),
        }


def leave(engine: Engine, model: AnomalibModule, images: MVTecAD, folder: Path, keep: Path | None) -> dict[str, Any]:
    """Leave the model's maps and network and export it; give its size as OpenVINO has it, or say what there is not."""
    try:
        if keep:
            save_maps(engine, model, images, keep.with_suffix(".npz"))
            torch.save({"network": model.model.cpu().eval(), "size": input_size(model)}, keep.with_suffix(".part"))
            keep.with_suffix(".part").rename(keep.with_suffix(".pt"))  # there or not, but never half
    except Exception as error:  # noqa: BLE001  whatever ails it, the hours of training before it count
        traceback.print_exception(error)
        return {"remark": f"neither maps nor latency nor export: {type(error).__name__}"}
    try:
        network = Path(engine.export(model, "openvino", export_root=folder, onnx_kwargs={"opset_version": 18}))
    except Exception as error:  # noqa: BLE001  as above
        traceback.print_exception(error)
        return {"remark": f"not exported: {type(error).__name__}"}
    return {"exported_MB": exported_size(network)}


def input_size(model: AnomalibModule) -> tuple[int, int]:
    """Height and width of what the network gets to see."""
    return tuple(model.pre_processor.transform(torch.rand(1, 3, 300, 300)).shape[-2:])


def seen(model: AnomalibModule) -> list[float]:
    """Which part of an image's height and width the network sees, as its pre-processing may crop."""
    transforms = getattr(model.pre_processor.transform, "transforms", [])
    resized = [t.size for t in transforms if isinstance(t, Resize)]
    cropped = [t.size for t in transforms if isinstance(t, CenterCrop)]
    return [c / r for c, r in zip(cropped[0], resized[0], strict=True)] if cropped else [1.0, 1.0]


def save_maps(engine: Engine, model: AnomalibModule, images: MVTecAD, file: Path) -> None:
    """The same test images for every model, the first of every kind of defect and of none, with this model's maps."""
    images.setup()
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


def latencies(files: list[Path], rounds: int) -> dict[str, Any]:
    """Median milliseconds that each network takes for one image, eager and on the CPU; none for one that fails.

    All take turns, so that what else the machine does meets them alike.
    """
    saved = {file: torch.load(file, weights_only=False) for file in files}  # our own files
    seconds: dict[Path, list[float]] = {file: [] for file in files}
    with torch.inference_mode():
        for _ in range(rounds + 2):
            for file in list(saved):
                image = torch.rand(1, 3, *saved[file]["size"])
                start = time.perf_counter()
                try:
                    saved[file]["network"](image)
                except Exception as error:  # noqa: BLE001  the others' latencies do not depend on it
                    traceback.print_exception(error)
                    del saved[file], seconds[file]
                    continue
                seconds[file].append(time.perf_counter() - start)
    return {"ms": {file: statistics.median(values[2:]) * 1000 for file, values in seconds.items()}}


def kept(output: Path, cell: Cell) -> Path:
    """Where a cell leaves what is wanted after all of them; the suffix is to be set."""
    row = " ".join(cell[key] for key in NETWORK)
    return output / "kept" / f"{cell['category']}_{cell['model'].split()[0]}_{zlib.crc32(row.encode()):08x}.file"


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All cells that are asked for, seed by seed, so that a run that is broken off has compared all models."""
    return [
        {
            "model": row,
            "category": Path(category).name,
            "seed": seed,
            "deviations": "; ".join(contender(row, seed, options).deviations),
        }
        for seed in options.seeds
        for category in options.categories
        for row in options.models
    ]


def read(file: Path, columns: list[str]) -> pd.DataFrame:
    """The lines written so far; text that is empty is text."""
    if not file.exists():
        return pd.DataFrame(columns=columns)
    texts = ["model", "category", "deviations", "remark", "failed"]
    return pd.read_csv(file, dtype=dict.fromkeys(texts, str)).fillna(dict.fromkeys(texts, ""))


def run(options: argparse.Namespace) -> pd.DataFrame:
    """Run the cells that have no line yet, and return all lines."""
    file = options.output / "results.csv"
    (options.output / "kept").mkdir(parents=True, exist_ok=True)
    lines = read(file, KEY + MEASURED)
    cells = cells_of(options)
    if options.retry_failed:
        asked = pd.MultiIndex.from_frame(lines[KEY]).isin([tuple(cell.values()) for cell in cells])
        lines = lines[(lines["failed"] == "") | ~asked]
        lines.to_csv(file, index=False)
    done = set(lines[KEY].itertuples(index=False, name=None))
    cells = [cell for cell in cells if tuple(cell.values()) not in done]
    print(f"{hardware()}\n{len(done)} cells are done, {len(cells)} to do", flush=True)
    for number, cell in enumerate(cells, start=1):
        print(f"[{number}/{len(cells)}] {cell['model']} on {cell['category']}, seed {cell['seed']} ...", flush=True)
        keep = kept(options.output, cell)  # of the first seed
        keep = None if keep.with_suffix(".pt").exists() else keep
        unavailable = contender(cell["model"], cell["seed"], options).unavailable
        row = (
            {"failed": unavailable}
            if unavailable
            else in_child(
                run_cell, cell, options, keep, time_limit=options.time_limit, memory_limit=options.memory_limit
            )
        )
        print(f"    {row.get('failed') or summary(row)}", flush=True)
        line = pd.DataFrame([{**cell, **row}], columns=KEY + MEASURED)
        line.to_csv(file, mode="a", header=not file.exists(), index=False)
    return read(file, KEY + MEASURED)


def summary(row: dict[str, Any]) -> str:
    """A cell's outcome in a few words."""
    return f"image AUROC {row['image_AUROC']:.3f}, fit {row['fit_s']:.0f} s, {row['peak_MB']:.0f} MB"


def measure_latency(options: argparse.Namespace, lines: pd.DataFrame) -> pd.DataFrame:
    """Latency of all models, anew if one is missing: numbers of different occasions cannot be compared."""
    file = options.output / "latency.csv"
    which = lines.loc[lines["failed"] == "", NETWORK].drop_duplicates()
    cells = [cell for cell in which.to_dict("records") if kept(options.output, cell).with_suffix(".pt").exists()]
    known = read(file, [*NETWORK, "ms"])
    measured_before = set(known[NETWORK].itertuples(index=False, name=None))
    if not options.latency and {tuple(cell.values()) for cell in cells} <= measured_before:
        return known
    print(f"Latency of {len(cells)} networks ...", flush=True)
    files = [kept(options.output, cell).with_suffix(".pt") for cell in cells]
    result = in_child(latencies, files, options.rounds)
    if "failed" in result:
        print(f"latency could not be measured: {result['failed']}", flush=True)
        return known
    times = result["ms"]
    measured = pd.DataFrame([{**c, "ms": times[f]} for c, f in zip(cells, files, strict=True) if f in times])
    measured.to_csv(file, index=False)
    return measured


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of datasets in MVTec AD's layout")
    parser.add_argument("--categories", nargs="+", required=True, help="folders in it")
    parser.add_argument("--backbone", help="a timm name or local-dir:FOLDER for all models that take it")
    parser.add_argument("--offline", action="store_true", help="no hub: random weights for models that take no folder")
    parser.add_argument("--dtd-dir", help="texture photographs for Cse and Draem; default: each one's own")
    parser.add_argument("--models", nargs="+", help="names, with arguments if wanted: Patchcore 'Cse embedder=network'")
    parser.add_argument("--ablation", nargs="+", choices=ABLATIONS, default=[], help="variants of Cse instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="most epochs; below a model's own number the table says so")
    parser.add_argument("--accelerator", default="auto", help="to train with; latency is always the processor's")
    parser.add_argument("--time-limit", type=int, default=0, help="most seconds for a cell; 0 for no limit")
    parser.add_argument("--memory-limit", type=float, default=0, help="most GiB for a cell; 0 for no limit")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells again")
    parser.add_argument("--latency", action="store_true", help="measure latency anew, on a quieter machine")
    parser.add_argument("--rounds", type=int, default=20, help="of the latency measurement")
    parser.add_argument("--output", type=Path, default=Path("results/compare"))
    options = parser.parse_args(arguments)
    check_categories(parser, options)
    if not options.models:
        rows = dict.fromkeys(["Cse", PAPER, *EPOCHS, "EfficientAd"])
        options.models = [] if options.ablation else [row for row in rows if row != "BinaryClassifier"]
    options.models = list(dict.fromkeys([*options.models, *(row for a in options.ablation for row in ABLATIONS[a])]))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run what is to be run; write the table and the pictures of all that has been."""
    options = parse(arguments)
    lines = run(options)
    latency = measure_latency(options, lines)
    text = f"{table(lines, latency)}\n\n{not_run(lines)}{hardware()}\n"
    (options.output / "table.md").write_text(text)
    trade_off(lines, latency, options.output / "trade_off.png")
    for category in lines["category"].unique():
        rows = lines.loc[(lines["category"] == category) & (lines["failed"] == ""), NETWORK].drop_duplicates()
        files = [kept(options.output, row).with_suffix(".npz") for row in rows.to_dict("records")]
        shown = {name: file for name, file in zip(row_labels(rows), files, strict=True) if file.exists()}
        contact_sheet(shown, options.output / f"maps_{category}.png")
    print(text)


if __name__ == "__main__":
    main()
