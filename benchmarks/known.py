"""What known defects do for the detection of others. Run by ``make bench-known``.

``CseGaussian`` is fitted once to a set. A copy then learns of so many of its defective test images, several draws of
them, with their masks and without, and scores all others: the test images that are left are told from good ones before
and after. ``--kinds`` draws known defects of one kind and tests on each other kind. AUPRO is of maps at the network's
resolution, halved.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from anomalib_cse import CseGaussian
from anomalib_cse.cse_gaussian.known import KnownDefect
from anomalib_cse.cse_gaussian.learning import learn
from anomalib_cse.cse_gaussian.torch_model import CseGaussianModel

from cells import Cell
from common import Row, aupro, hardware, markdown
from contenders import chosen, parser_of
from report import save

FEWEST = 5  # images of a kind, to be known or to test with
SCORES = ["image AUROC", "AUPRO"]


class TestImage(NamedTuple):
    """A test image ``(1, 3, H, W)``, its features, its mask ``(1, 1, H, W)`` or ``None``, and its kind."""

    image: Tensor
    features: list[Tensor]
    mask: Tensor | None
    kind: str


@torch.no_grad()
def read(model: CseGaussian, cell: Cell) -> list[TestImage]:
    """Read a set's test images, as the model sees them."""
    data = cell.images()
    data.setup("test")
    found = []
    for item in data.test_data:
        image = model.pre_processor(item.image[None].as_subclass(Tensor))
        mask = None
        if item.gt_mask is not None:
            mask = model.pre_processor(item.gt_mask[None, None].float().expand(-1, 3, -1, -1).as_subclass(Tensor))[
                :, :1
            ]
        features = model.model.smoothed_features(image)
        found.append(TestImage(image, features, mask, Path(item.image_path).parent.name))
    return found


@torch.no_grad()
def measured(network: CseGaussianModel, images: Sequence[TestImage]) -> dict[str, float]:
    """Return how well a model tells good test images from others, and their defects from the rest."""
    scored = [network.score(one.features, one.image.shape[-2:]) for one in images]
    is_bad = np.array([one.kind != "good" for one in images])
    found = {"image AUROC": roc_auc_score(is_bad, [one.pred_score.item() for one in scored])}
    if all(one.mask is not None for one in images if one.kind != "good"):
        half = [length // 2 for length in images[0].image.shape[-2:]]
        maps = np.stack([adaptive_avg_pool2d(one.anomaly_map, half)[0, 0].numpy() for one in scored])
        masks = np.stack(
            [
                np.zeros(half, bool) if one.kind == "good" else (adaptive_avg_pool2d(one.mask, half)[0, 0] > 0).numpy()
                for one in images
            ]
        )
        found["AUPRO"] = aupro(maps, masks)
    return found


def learnt(model: CseGaussian, known: Sequence[TestImage], *, masked: bool) -> CseGaussianModel:
    """Return a network that has learnt of defects, and leave the model's."""
    network = copy.deepcopy(model.model)
    defects = [KnownDefect(one.image, one.mask if masked else None) for one in known]
    learn(network, model.sums, None, defects, 0.0, model.hparams["variations"], seed=0, scored=False)
    return network


def of_counts(model: CseGaussian, images: Sequence[TestImage], counts: Sequence[int], draws: int) -> Iterator[Row]:
    """Give a line for each number of known defects, draw, and with masks or without."""
    good, bad = ([one for one in images if (one.kind != "good") is is_bad] for is_bad in (False, True))
    for count in counts:
        for draw in range(draws if count < len(bad) else 0):
            order = np.random.default_rng((draw, count)).permutation(len(bad))
            known, others = ([bad[n] for n in part] for part in (order[:count], order[count:]))
            before = measured(model.model, [*good, *others])
            for masked in (True, False) if all(one.mask is not None for one in bad) else (False,):
                after = measured(learnt(model, known, masked=masked), [*good, *others])
                key = {"known": count, "draw": draw, "masks": masked}
                yield {**key, **{f"{name}, none known": value for name, value in before.items()}, **after}


def of_kinds(model: CseGaussian, images: Sequence[TestImage], count: int) -> Iterator[Row]:
    """Give a line for each kind that so many images are known of, or all there are, and each other kind."""
    kinds = sorted({one.kind for one in images} - {"good"})
    of = {kind: [one for one in images if one.kind == kind] for kind in (*kinds, "good")}
    for kind in (kind for kind in kinds if len(kinds) > 1 and len(of[kind]) >= FEWEST):
        order = np.random.default_rng(0).permutation(len(of[kind]))[:count]
        for masked in (True, False) if of[kind][0].mask is not None else (False,):
            network = learnt(model, [of[kind][n] for n in order], masked=masked)
            for other in (other for other in kinds if other != kind and len(of[other]) >= FEWEST):
                both = [*of["good"], *of[other]]
                before, after = measured(model.model, both), measured(network, both)
                key = {"known": len(order), "draw": 0, "masks": masked, "kind": kind, "other kind": other}
                yield {**key, **{f"{name}, none known": value for name, value in before.items()}, **after}


def picture(lines: pd.DataFrame, file: Path) -> None:
    """Draw what is gained by so many known defects: of each set thin, the mean of sets with masks thick."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharex=True)
    for axis, name in zip(axes, SCORES, strict=True):
        gain = 100 * (lines[name] - lines[f"{name}, none known"])
        means = gain.groupby([lines["masks"], lines["category"], lines["known"]]).mean()
        for (masks, colour), label in zip({True: "C0", False: "C1"}.items(), ("with masks", "without"), strict=True):
            of_sets = means[masks].unstack("known").dropna()
            of_sets.insert(0, 0, 0.0)
            axis.plot(of_sets.T, color=colour, linewidth=0.5)
            axis.plot(of_sets.mean(), color=colour, linewidth=3, marker="o", label=label)
        axis.set(xlabel="known defects", ylabel=f"points of {name} gained")
    axes[0].legend()
    save(figure, file)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="CseGaussian", help="name of the list")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 3, 5, 10], help="of known defects")
    parser.add_argument("--draws", type=int, default=5, help="choices of so many images")
    parser.add_argument("--kinds", action="store_true", help="known defects of one kind, tested on each other")
    parser.add_argument("--output", type=Path, default=Path("results/known"))
    options = parser.parse_args(arguments)
    [options.model] = chosen(parser, options.config, [options.model])
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure the sets that have no line yet, and print means over draws and sets."""
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / ("kinds.csv" if options.kinds else "results.csv")
    lines = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["category"])
    for category in [name for name in options.categories if name not in set(lines["category"])]:
        cell = Cell(options.model, options.root / category, 0)
        with TemporaryDirectory() as folder:
            model, *_ = cell.fit(folder, "cpu", visualizer=False)
        images = read(model.eval(), cell)
        found = (
            of_kinds(model, images, 10) if options.kinds else of_counts(model, images, options.counts, options.draws)
        )
        lines = pd.concat([lines, pd.DataFrame([{"category": category, **row} for row in found])], ignore_index=True)
        lines.to_csv(file, index=False)
        print(f"{category}: {len(lines)} lines", flush=True)
    by = ["kind", "other kind", "masks"] if options.kinds else ["masks", "known"]
    means = lines.groupby(["category", *by])[[c for c in lines if c.startswith(tuple(SCORES))]].mean()
    tables = [means.reset_index()] if options.kinds else [means.groupby(by).mean().reset_index(), means.reset_index()]
    text = "\n\n".join(markdown(table.to_dict("records")) for table in tables) + f"\n\n{hardware()}\n"
    (options.output / ("kinds.md" if options.kinds else "table.md")).write_text(text)
    if not options.kinds:
        picture(lines, options.output / "gains.png")
    print(text)


if __name__ == "__main__":
    main()
