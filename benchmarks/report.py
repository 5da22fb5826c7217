"""What is made of the comparison's lines: a Markdown table, latency against AUROC, and maps side by side."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from common import markdown

mpl.use("agg")

ROW = ["category", "model", "deviations"]
METRICS = ["image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_AUPRO"]
COSTS = {"fit_s": "fit s", "exported_MB": "exported MB", "peak_MB": "peak MB"}


def table(lines: pd.DataFrame, latency: pd.DataFrame) -> str:
    """A Markdown table for every category: metrics as mean ± standard deviation over the seeds, costs as means."""
    finished = lines[lines["failed"] == ""]
    milliseconds = latency.set_index(ROW)["ms"].to_dict() if len(latency) else {}
    parts = []
    for category, of_category in finished.groupby("category", sort=False):
        rows = []
        for key, group in of_category.groupby(ROW, sort=False):
            _, model, deviations = key
            rows.append(
                {
                    "model": model,
                    **{name.replace("_", " "): mean_and_spread(group[name]) for name in METRICS},
                    "ms per image": milliseconds.get(key, ""),
                    **{title: float(group[name].mean()) for name, title in COSTS.items()},
                    "seeds": len(group),
                    "differs from its defaults": "; ".join(filter(None, [deviations, *group["remark"].unique()])),
                }
            )
        parts.append(f"### {category}\n\n{markdown(rows)}")
    return "\n\n".join(parts)


def mean_and_spread(values: pd.Series) -> str:
    """Mean and standard deviation of the sample; one value has no spread."""
    mean = values.mean()
    if pd.isna(mean):
        return ""
    return f"{mean:.3f} ± {values.std():.3f}" if len(values) > 1 else f"{mean:.3f}"


def not_run(lines: pd.DataFrame) -> str:
    """The models that have no result, and why."""
    failed = lines[lines["failed"] != ""]
    rows = [
        {"no result of": model, "on": category, "seeds": " ".join(map(str, sorted(group["seed"]))), "because": reason}
        for (model, category, reason), group in failed.groupby(["model", "category", "failed"], sort=False)
    ]
    return f"{markdown(rows)}\n\n" if rows else ""


def row_labels(rows: pd.DataFrame) -> list[str]:
    """What to call each row: its model, with its deviations if a model is there in several ways."""
    several = rows["model"].duplicated().any()
    return (rows["model"] + ": " + rows["deviations"] if several else rows["model"]).tolist()


def trade_off(lines: pd.DataFrame, latency: pd.DataFrame, file: Path) -> None:
    """Image AUROC, with its spread over the seeds, against milliseconds per image."""
    scores = lines[lines["failed"] == ""].groupby(ROW, sort=False)["image_AUROC"].agg(["mean", "std"]).reset_index()
    points = scores.merge(latency, on=ROW) if len(latency) else scores.iloc[:0]
    if points.empty:
        return
    categories, models = points["category"].unique(), points[["model", "deviations"]].drop_duplicates()
    figure, axes = plt.subplots(
        1,
        len(categories),
        figsize=(1.5 + 4 * len(categories), 4),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    digits = "2357" if points["ms"].max() < 20 * points["ms"].min() else "25"  # as many as there is room for
    for axis, category in zip(axes[0], categories, strict=True):
        for number, (label, model, deviations) in enumerate(
            zip(row_labels(models), models["model"], models["deviations"], strict=True)
        ):
            of_model = (points["model"] == model) & (points["deviations"] == deviations)
            found = points[of_model & (points["category"] == category)]
            axis.errorbar(
                found["ms"],
                found["mean"],
                yerr=found["std"].fillna(0),
                fmt="os^DvP*Xp<>h"[number % 12],
                color=plt.get_cmap("tab10")(number % 10),
                markersize=9 if model == "Cse" else 7,
                capsize=3,
                label=label,
            )
        axis.set(title=category, xlabel="ms per image, eager, on the processor", xscale="log")
        axis.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(
            mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in digits else "")
        )
        axis.margins(0.1)
        axis.tick_params(axis="x", which="minor", labelsize=8)
        axis.grid(which="both", alpha=0.3)
    axes[0][0].set_ylabel("image AUROC")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    save(figure, file)


def contact_sheet(files: Mapping[str, Path], output: Path) -> None:
    """A row a test image: the image, its true mask, and every model's map, 0.5 being the model's own threshold.

    Args:
        files: What the models left, by name.
        output: The picture.
    """
    if not files:
        return
    saved = {model: np.load(file) for model, file in files.items()}
    first = next(iter(saved.values()))
    figure, axes = plt.subplots(
        len(first["kinds"]),
        2 + len(saved),
        figsize=(1.5 * (2 + len(saved)) + 0.9, 1.65 * len(first["kinds"]) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0), aspect="equal", facecolor="0.9")
    whole = (0, 1, 1, 0)
    for row, kind in enumerate(first["kinds"]):
        axes[row, 0].set_ylabel(str(kind).replace("_", "\n"), fontsize=9)
        axes[row, 0].imshow(first["images"][row].clip(0, 1), extent=whole)
        axes[row, 1].imshow(first["masks"][row], extent=whole, cmap="gray", vmin=0, vmax=1)
        for axis, data in zip(axes[row, 2:], saved.values(), strict=True):
            top, left = (1 - data["seen"]) / 2  # what lies outside of the crop stays grey
            extent = (left, 1 - left, 1 - top, top)
            drawn = axis.imshow(data["maps"][row], extent=extent, cmap="inferno", vmin=0, vmax=1)
            axis.set(xlim=(0, 1), ylim=(1, 0))
            axis.set_xlabel(f"score {data['scores'][row]:.2f}", fontsize=8, labelpad=2)
    for axis, title in zip(axes[0], ["image", "mask", *(model.replace(" ", "\n") for model in saved)], strict=True):
        axis.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.01, aspect=30, label="anomaly map; 0.5 is the threshold")
    save(figure, output)


def save(figure: Figure, file: Path) -> None:
    """Write a picture and let go of it."""
    figure.savefig(file, dpi=120)
    plt.close(figure)
