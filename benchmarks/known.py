"""What a few known defects are worth. Run by ``make bench-known``.

A model is fitted to a category's good images, and learns of 1, 3, 5 and 10 of its defective test images, at most of
half of them, in an order that the seed draws, with their masks and without. All figures of a seed are of the test
images that are never learnt, so that they compare. ``others`` is what 5 known defects of one kind change of the image
AUROC of another kind, of all pairs of kinds the one that loses most. The models stand in a YAML file; see
``configs/compare``.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataset
from anomalib.models import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from cells import KEY, Cell, cells_parser, parse_cells, run_cells
from common import Row, aupro, hardware, markdown, peak_memory
from report import known_curves, not_run

COUNTS = 0, 1, 3, 5, 10
OF_A_KIND = 5
WAYS = "masks", "none"  # how a defect is known: with its mask, or as an image alone

Places = Sequence[int] | NDArray[np.int64]  # of images in a dataset


@torch.no_grad()
def tested(model: AnomalibModule, data: AnomalibDataset) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return raw scores ``(N,)`` and maps ``(N, H, W)`` of a dataset's images."""
    outputs = [model.model(model.pre_processor(item.image[None].as_subclass(torch.Tensor))) for item in data]
    scores, maps = (torch.cat([getattr(output, name) for output in outputs]) for name in ("pred_score", "anomaly_map"))
    return scores.double().numpy(), maps[:, 0].numpy()


def learnt(model: AnomalibModule, samples: pd.DataFrame, places: Places, way: str) -> AnomalibModule:
    """Return a copy of a model that has learnt of a dataset's images at some places, with their masks or without."""
    model = copy.deepcopy(model)
    with TemporaryDirectory() as folder:
        for part in ("defects", "masks"):
            (Path(folder) / part).mkdir()
        for place in places:
            of_image = samples.iloc[int(place)]
            for part, column in (("defects", "image_path"), ("masks", "mask_path")):
                if part == "defects" or way == "masks":
                    file = Path(of_image[column]).resolve()
                    (Path(folder) / part / f"{place}{file.suffix}").symlink_to(file)
        model.learn(defects=f"{folder}/defects", masks=f"{folder}/masks" if way == "masks" else None)
    return model


def auroc(scores: NDArray[np.float64], good: Places, defective: Places) -> float:
    """Return image AUROC of scores at some places."""
    both = [*good, *defective]
    return float(roc_auc_score(np.arange(len(both)) >= len(good), scores[both]))


def worst_of_others(
    model: AnomalibModule, data: AnomalibDataset, before: NDArray[np.float64], way: str, rng: np.random.Generator
) -> Iterator[float]:
    """Give what known defects of a kind change of the image AUROC of another kind, of each pair of kinds."""
    kinds = data.samples["image_path"].map(lambda path: Path(path).parent.name).to_numpy()
    good = np.flatnonzero(data.samples["label_index"] == 0)
    places = {kind: np.flatnonzero(kinds == kind) for kind in sorted({*kinds} - {*kinds[good]})}
    if len(places) < 2:
        return
    after = {}
    for kind, members in places.items():
        known = rng.permutation(members)[:OF_A_KIND]
        after[kind] = tested(learnt(model, data.samples, known, way), data)[0]
    for kind, other in permutations(places, 2):
        yield auroc(after[kind], good, places[other]) - auroc(before, good, places[other])


def measure(cell: Cell) -> Row:
    """Fit a model, have it learn of more and more defects, and test it on the images that it never learns of."""
    with TemporaryDirectory() as folder:
        components = {"evaluator": False, "post_processor": False, "visualizer": False}
        model, images, seconds = cell.fit(folder, "cpu", **components)
    images.setup(TrainerFn.TESTING)
    data, rng = images.test_data, np.random.default_rng(cell.seed)
    defective = np.flatnonzero(data.samples["label_index"] == 1)
    good = np.flatnonzero(data.samples["label_index"] == 0)
    order = rng.permutation(defective)[: min(max(COUNTS), len(defective) // 2)]
    rest = np.setdiff1d(defective, order)
    masks = [item.gt_mask for item in data]
    has_masks = all(mask is not None for mask in masks)
    row: Row = {"fit_s": seconds}
    before = tested(model, data)[0]
    for way in WAYS if has_masks else WAYS[1:]:
        for count in (c for c in COUNTS if c <= len(order)):
            start = time.perf_counter()
            own = learnt(model, data.samples, order[:count], way) if count else model
            row["learn_s"] = time.perf_counter() - start
            scores, maps = tested(own, data)
            row[f"AUROC_{way}_{count}"] = auroc(scores, good, rest)
            if has_masks:
                left = [*good, *rest]
                row[f"AUPRO_{way}_{count}"] = aupro(maps[left], torch.stack([masks[p] for p in left]).bool().numpy())
        row[f"others_{way}"] = min(worst_of_others(model, data, before, way, rng), default=np.nan)
    return {**row, "peak_MB": peak_memory()}


def columns() -> list[str]:
    """Return the columns of ``results.csv``."""
    figures = [f"{figure}_{way}_{count}" for figure in ("AUROC", "AUPRO") for way in WAYS for count in COUNTS]
    others = [f"others_{way}" for way in WAYS]
    return [*KEY, "deviations", *figures, *others, "fit_s", "learn_s", "peak_MB", "failed", "settings"]


def table(lines: pd.DataFrame) -> str:
    """Return Markdown tables of means over the draws, one to a way and a figure."""
    means = lines[lines["failed"] == ""].groupby(["model", "category"], sort=False).mean(numeric_only=True)
    parts = []
    for way, known in zip(WAYS, ("with their masks", "without masks"), strict=True):
        for figure, name in (("AUROC", "Image AUROC"), ("AUPRO", "AUPRO")):
            found = means[[f"{figure}_{way}_{count}" for count in COUNTS]].set_axis([*map(str, COUNTS)], axis=1)
            if figure == "AUROC":
                found = found.assign(others=means[f"others_{way}"])
            found = found.dropna(how="all").astype(object)
            rows = found.where(found.notna(), "").reset_index().to_dict("records")
            parts += [f"### {name} by number of known defects, {known}\n\n{markdown(rows)}"] if rows else []
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Run what is to be run; write the tables and the picture of all that has been."""
    parser = cells_parser(__doc__, ["CseGaussian"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="draws of known defects")
    parser.add_argument("--output", type=Path, default=Path("results/known"))
    options = parse_cells(parser, arguments)
    lines = run_cells(
        options,
        columns(),
        lambda cell: partial(measure, cell),
        lambda row: f"fit {row['fit_s']:.0f} s, learning {row['learn_s']:.1f} s",
    )
    text = f"{table(lines)}\n\n{not_run(lines)}{hardware()}\n"
    (options.output / "table.md").write_text(text)
    known_curves(lines, COUNTS, options.output / "known.png")
    print(text)


if __name__ == "__main__":
    main()
