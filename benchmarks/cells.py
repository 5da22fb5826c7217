"""Cells of a comparison: a model, a category and a seed, each with a process and a line, going on after a break."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning.pytorch import seed_everything
from torch import nn

from common import QUIET, Row, hardware, in_child
from contenders import Contender, chosen, images_of, parser_of

KEY = ["model", "category", "seed"]
TEXTS = ["model", "category", "settings", "deviations", "remark", "failed"]


@dataclass(frozen=True)
class Cell:
    """A model to be trained on a dataset with a seed."""

    contender: Contender
    dataset: Path
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What its line is found by."""
        return self.contender.name, self.dataset.name, self.seed

    def images(self) -> Folder:
        """Return its dataset."""
        return images_of(self.dataset, self.contender.train_batch_size)

    def fit(
        self, folder: str, accelerator: str, **components: nn.Module | bool
    ) -> tuple[AnomalibModule, Folder, float]:
        """Fit the model, with anomalib's ``components``; return it, its images, and the seconds of the fit.

        Labelled images choose no epoch, and take a while to score: Cse's is chosen by a hold-out loss.
        """
        seed_everything(self.seed, verbose=False)
        model = self.contender.build(self.seed, **components)
        alone = {"max_epochs": self.contender.epochs(model), "limit_val_batches": 0, "limit_test_batches": 0}
        images = self.images()
        trainer = {"accelerator": accelerator, "devices": 1, "default_root_dir": folder, **QUIET}
        engine = Engine(callbacks=self.contender.callbacks, **alone, **trainer)
        start = time.perf_counter()
        engine.fit(model, datamodule=images)
        return model, images, time.perf_counter() - start


def read(file: Path, columns: list[str]) -> pd.DataFrame:
    """Return the lines written so far; text that is empty is text."""
    if not file.exists():
        return pd.DataFrame(columns=columns)
    texts = [column for column in TEXTS if column in columns]
    lines = pd.read_csv(file, dtype=dict.fromkeys(texts, str)).reindex(columns=columns)
    return lines.fillna(dict.fromkeys(texts, ""))


def cells_to_do(options: argparse.Namespace, lines: pd.DataFrame) -> Iterator[Cell]:
    """Give the cells that have no line, seed by seed, so that a run that is broken off has compared all models.

    Raises:
        SystemExit: If a line is of another model of the same name.
    """
    done = lines.set_index(KEY)["settings"].to_dict()
    for seed in options.seeds:
        for category in options.categories:
            for contender in options.models:
                cell = Cell(contender, options.root / category, seed)
                if done.get(cell.key, contender.settings) != contender.settings:
                    raise SystemExit(
                        f"{options.output} has {cell.key} with other settings than {options.config} gives "
                        f"{contender.name!r}: give the changed model another name, or another --output"
                    )
                if cell.key not in done:
                    yield cell


def run_cells(
    options: argparse.Namespace,
    columns: list[str],
    measurement: Callable[[Cell], Callable[[], Row]],
    summary: Callable[[Row], str],
) -> pd.DataFrame:
    """Run the cells that have no line yet, and return all lines.

    Args:
        options: Of :func:`parse_cells`, with ``seeds`` and ``output``.
        columns: Of ``results.csv``, with ``KEY``, ``deviations``, ``failed`` and ``settings``.
        measurement: Gives what is to be run for a cell.
        summary: Gives what is printed of a row.

    Raises:
        SystemExit: If the lines there have other columns.
    """
    file = options.output / "results.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and list(pd.read_csv(file, nrows=0)) != columns:
        raise SystemExit(f"{file} has other columns than these: {', '.join(columns)}; give another --output")
    lines = read(file, columns)
    if options.retry_failed:
        asked = lines["model"].isin([contender.name for contender in options.models])
        lines = lines[(lines["failed"] == "") | ~asked]
        lines.to_csv(file, index=False)
    cells = list(cells_to_do(options, lines))
    print(f"{hardware()}\n{len(lines)} cells are done, {len(cells)} to do", flush=True)
    for number, cell in enumerate(cells, start=1):
        print(f"[{number}/{len(cells)}] {' '.join(map(str, cell.key))} ...", flush=True)
        limits = {"time_limit": options.time_limit, "memory_limit": options.memory_limit}
        row = in_child(measurement(cell), **limits)
        print("   ", row.get("failed") or summary(row), flush=True)
        described = {"deviations": cell.contender.note, "settings": cell.contender.settings}
        line = {**dict(zip(KEY, cell.key, strict=True)), **described, **row}
        pd.DataFrame([line], columns=columns).to_csv(file, mode="a", header=not file.exists(), index=False)
    return read(file, columns)


def cells_parser(description: str | None, models: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Return a parser of what all comparisons of cells take; ``models`` are those that run if none are named."""
    parser = parser_of(description)
    default = ", ".join(models) if models else "all of them"
    parser.add_argument("--models", nargs="+", default=models, help=f"names of the list; default: {default}")
    parser.add_argument("--time-limit", type=int, default=0, help="most seconds for a cell; 0 for no limit")
    parser.add_argument("--memory-limit", type=float, default=0, help="most GiB for a cell; 0 for no limit")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells of these models again")
    return parser


def parse_cells(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line, with the models in the place of their names."""
    options = parser.parse_args(arguments)
    for category in options.categories:
        if not (options.root / category / "train" / "good").is_dir():
            parser.error(f"{options.root / category} has no train/good: --root and --categories must lead to a dataset")
    options.models = chosen(parser, options.config, options.models)
    return options
