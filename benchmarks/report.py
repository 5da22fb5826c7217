"""What is made of comparisons' lines: a Markdown table, latency against AUPRO, maps side by side, and rejects."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from common import markdown

mpl.use("agg")

MARKERS = "os^DvP*Xp<>h"
CLOSE = 0.03  # in AUPRO, of two points of a picture
METRICS = ["image_AUROC", "image_F1Score", "PG2", "PB2", "pixel_AUROC", "pixel_AUPRO", "pixel_5%_AUPRO"]
COSTS = {"fit_s": "fit s", "exported_MB": "exported MB", "peak_MB": "peak MB"}


def table(lines: pd.DataFrame, latency: pd.DataFrame) -> str:
    """Return a Markdown table for each category: metrics as mean ± deviation over the seeds, costs as means."""
    milliseconds = latency.set_index(["category", "model"])["ms"].to_dict()
    parts = []
    for category, of_category in lines[lines["failed"] == ""].groupby("category", sort=False):
        rows = [
            {
                "model": model,
                **{name.replace("_", " "): mean_and_spread(group[name]) for name in METRICS},
                "ms exported": milliseconds.get((category, model), ""),
                **{title: float(group[name].mean()) for name, title in COSTS.items()},
                "seeds": len(group),
                "differs from its defaults": "; ".join(
                    filter(None, dict.fromkeys([*group["deviations"], *group["remark"]]))
                ),
            }
            for model, group in of_category.groupby("model", sort=False)
        ]
        parts.append(f"### {category}\n\n{markdown(rows)}")
    return "\n\n".join(parts)


def mean_and_spread(values: pd.Series) -> str:
    """Return mean and standard deviation of the sample; one value has no spread."""
    mean = values.mean()
    if pd.isna(mean):
        return ""
    return f"{mean:.3f} ± {values.std():.3f}" if len(values) > 1 else f"{mean:.3f}"


def not_run(lines: pd.DataFrame) -> str:
    """Return a table of the models that have no result, and why."""
    failed = lines[lines["failed"] != ""]
    rows = [
        {"no result of": model, "on": category, "seeds": " ".join(map(str, sorted(group["seed"]))), "because": reason}
        for (model, category, reason), group in failed.groupby(["model", "category", "failed"], sort=False)
    ]
    return f"{markdown(rows)}\n\n" if rows else ""


def trade_off(lines: pd.DataFrame, latency: pd.DataFrame, file: Path) -> None:
    """Draw AUPRO against milliseconds per image, exported.

    AUPRO is the mean over the sets with masks that all of these models were tested on, latency that over the sets on
    which all were timed: other sets would favour one of them.
    """
    timed = lines[(lines["failed"] == "") & lines["model"].isin(latency["model"])]
    accuracy, milliseconds = (
        found.groupby(["model", "category"], sort=False)[column].mean().unstack("category").dropna(axis="columns")
        for found, column in ((timed, "pixel_AUPRO"), (latency, "ms"))
    )
    if accuracy.empty or milliseconds.empty:
        return
    sets = accuracy.shape[1]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    points = {model: (milliseconds.loc[model].mean(), accuracy.loc[model].mean()) for model in accuracy.index}
    for number, (model, (x, y)) in enumerate(points.items()):
        axis.scatter(x, y, color=f"C{number % 10}", marker=MARKERS[number % len(MARKERS)], s=60)
        # a name goes to the left where another point is close on the right
        close = any(x < right < 1.6 * x and abs(up - y) < CLOSE for right, up in points.values())
        side = {"xytext": (-7, 0), "ha": "right"} if close else {"xytext": (7, 0)}
        axis.annotate(model, (x, y), textcoords="offset points", va="center", color=f"C{number % 10}", **side)
    axis.set(
        xscale="log",
        xlabel="milliseconds per image, exported to OpenVINO",
        ylabel=f"mean AUPRO ({sets} sets)" if sets > 1 else "AUPRO",
    )
    axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axis.margins(x=0.35, y=0.1)
    axis.grid(which="both", alpha=0.3)
    save(figure, file)


def shared(lines: pd.DataFrame) -> pd.DataFrame:
    """Return the lines of the sets that all models have; others would favour one of them."""
    models = lines.groupby("category")["model"].nunique()
    return lines[lines["category"].isin(models.index[models == lines["model"].nunique()])]


def rejects(curves: Mapping[str, tuple[list[float], pd.DataFrame]], file: Path) -> None:
    """Draw per cents of good images rejected against how much these are changed, a panel to a kind of change.

    Args:
        curves: By the label of a panel the amplitudes, and the per cents of each model at them, a row to a model.
        file: The picture.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3.4), sharey=True, squeeze=False, layout="constrained")
    for axis, (label, (amplitudes, rejected)) in zip(axes[0], curves.items(), strict=True):
        for number, (model, per_cents) in enumerate(rejected.iterrows()):
            marker = MARKERS[number % len(MARKERS)]
            axis.plot(amplitudes, per_cents, color=f"C{number % 10}", marker=marker, markersize=5, label=model)
        axis.set(xlabel=label, ylim=(0, 103))
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("good images rejected, %")
    handles, names = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    save(figure, file)


def contact_sheet(files: Mapping[str, Path], output: Path) -> None:
    """Draw a row to a test image: the image, its true mask, and each model's map, 0.5 being its own threshold.

    Args:
        files: What the models left, by name.
        output: The picture.
    """
    if not files:
        return
    saved = {model: np.load(file) for model, file in files.items()}
    first = next(iter(saved.values()))
    rows, columns = len(first["kinds"]), 2 + len(saved)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns + 0.9, 1.65 * rows + 0.4), squeeze=False, layout="constrained"
    )
    whole = (0, 1, 1, 0)
    for row, kind in enumerate(first["kinds"]):
        axes[row, 0].set_ylabel(str(kind).replace("_", "\n"), fontsize=9)
        axes[row, 0].imshow(first["images"][row].clip(0, 1), extent=whole)
        axes[row, 1].imshow(first["masks"][row], extent=whole, cmap="gray", vmin=0, vmax=1)
        for axis, data in zip(axes[row, 2:], saved.values(), strict=True):
            top, left = (1 - data["seen"]) / 2  # what lies outside of the crop stays grey
            extent = (left, 1 - left, 1 - top, top)
            drawn = axis.imshow(data["maps"][row], extent=extent, cmap="inferno", vmin=0, vmax=1)
            axis.set_xlabel(f"score {data['scores'][row]:.2f}", fontsize=8, labelpad=2)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0), aspect="equal", facecolor="0.9")
    for axis, title in zip(axes[0], ["image", "mask", *(fill(model, 16) for model in saved)], strict=True):
        axis.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.01, aspect=30, label="anomaly map; 0.5 is the threshold")
    save(figure, output)


def save(figure: Figure, file: Path) -> None:
    """Write a picture and let go of it."""
    figure.savefig(file, dpi=120)
    plt.close(figure)
