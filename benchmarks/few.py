"""How accurate models are with few training images, and what a fit takes. Run by ``make bench-few``.

Every model is fitted to several draws of so many training images, the same for all models, without validation, and
tested on all test images. The models stand in a YAML file; see ``configs/compare``. The draws of one model, set and
number are a process: Patchcore's coreset leaves gigabytes behind, and the remedy in ``common.py`` would slow its fit.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from lightning.pytorch import seed_everything
from lightning.pytorch.trainer.states import TrainerFn

from common import QUIET, Row, hardware, markdown, peak_memory
from contenders import Contender, chosen, parser_of

# of memory that of the first draw's fit: what a process has taken never falls
MEANS = {"image AUROC": "mean", "AUPRO": "mean", "fit s": "median", "peak MB": "min"}


def measure(contender: Contender, dataset: Path, count: int, draw: int) -> Row:
    """Fit a model to ``count`` training images, the ``draw``-th choice of them, and test it."""
    images = MVTecAD(
        root=dataset.parent, category=dataset.name, train_batch_size=contender.train_batch_size, num_workers=0
    )
    images.setup(TrainerFn.FITTING)  # without a stage, the fit would do it again
    if len(images.train_data) < count:
        msg = f"{dataset} gives {len(images.train_data)} images to train with, not {count}: has it test images?"
        raise ValueError(msg)
    drawn = np.random.default_rng((draw, count)).permutation(len(images.train_data))[:count]
    images.train_data = images.train_data.subsample(sorted(drawn.tolist()))
    seed_everything(draw, verbose=False)
    metrics = [AUROC(["pred_score", "gt_label"]), AUPRO(["anomaly_map", "gt_mask"])]
    model = contender.build(draw, evaluator=Evaluator(test_metrics=metrics), visualizer=False)
    with TemporaryDirectory() as folder:
        trainer = {"max_epochs": contender.epochs(model), "default_root_dir": folder, "accelerator": "cpu", **QUIET}
        engine = Engine(limit_val_batches=0, limit_test_batches=0, **trainer)
        start = time.perf_counter()
        engine.fit(model, datamodule=images)
        costs = {"fit s": time.perf_counter() - start, "peak MB": peak_memory()}
        # scores are to be in [0, 1]: torchmetrics takes others for logits, and large ones for 1
        Engine(**trainer).validate(model, datamodule=images, verbose=False)
        [found] = Engine(**trainer).test(model, datamodule=images, verbose=False)
    return {"image AUROC": found["AUROC"], "AUPRO": found["AUPRO"], **costs}


def measure_draws(contender: Contender, dataset: Path, count: int, draws: int) -> list[Row]:
    """Measure so many draws."""
    return [measure(contender, dataset, count, draw) for draw in range(draws)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", required=True, help="names of the list")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="of training images")
    parser.add_argument("--draws", type=int, default=5, help="choices of so many images")
    parser.add_argument("--output", type=Path, default=Path("results/few"))
    options = parser.parse_args(arguments)
    options.models = chosen(parser, options.config, options.models)
    for category in options.categories:
        there = len(list((options.root / category / "train" / "good").glob("*.png")))
        if there < max(options.counts):
            parser.error(f"{options.root / category} has {there} training images (.png), not {max(options.counts)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, write a line for each run, and print means over draws and sets, of seconds the median."""
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    lines = []
    for count, category, contender in product(options.counts, options.categories, options.models):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows = pool.submit(measure_draws, contender, options.root / category, count, options.draws).result()
        for draw, row in enumerate(rows):
            lines.append({"model": contender.name, "category": category, "images": count, "draw": draw, **row})
            print(lines[-1], flush=True)
        pd.DataFrame(lines).to_csv(options.output / "results.csv", index=False)
    means = pd.DataFrame(lines).groupby(["model", "images"], sort=False).agg(MEANS).reset_index()
    text = f"{markdown(means.to_dict('records'))}\n\n{', '.join(options.categories)}\n\n{hardware()}\n"
    (options.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
