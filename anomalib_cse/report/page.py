"""The page: what it shows, as data, and the file."""

from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from sklearn.metrics import precision_recall_curve, roc_curve

from .pictures import COLOURS, Picture

GOOD, UNLABELLED, NAMELESS = "good", "images", "defect"


class Record(NamedTuple):
    """What is kept of every image."""

    path: str | None
    label: bool | None  # True for a defect
    score: float
    raw: float | None = None  # as the model gives it, before the post-processor

    @property
    def folder(self) -> str:
        """The name of the folder that it lies in."""
        return Path(self.path or "").parent.name or UNLABELLED

    @property
    def kind(self) -> str:
        """``good``, or the name of the folder that an image with a defect, or without a label, lies in."""
        if self.label is None:
            return self.folder
        return GOOD if not self.label else self.folder if self.folder not in (UNLABELLED, GOOD) else NAMELESS


class Scale(NamedTuple):
    """How scores are scaled, and where they are cut.

    ``pixel_threshold`` is where maps are cut; ``None`` if they have no threshold of their own.
    """

    threshold: float | None
    normalised: bool
    pixel_threshold: float | None = None


def chart_data(records: Sequence[Record], scale: Scale) -> dict[str, object]:
    """Return all that the page computes with: for every image its name, kind and score, and the curves.

    ``kinds`` begins with the good ones. If an image has no label, kinds are the names of folders.
    """
    labelled = all(record.label is not None for record in records)
    of = [record.kind if labelled else record.folder for record in records]
    kinds = [GOOD, *sorted(set(of) - {GOOD})] if labelled else sorted(set(of))
    index, scores = {kind: number for number, kind in enumerate(kinds)}, [record.score for record in records]
    data: dict[str, object] = {
        "labelled": labelled,
        "normalised": scale.normalised,
        "threshold": scale.threshold,
        "pixel_threshold": scale.pixel_threshold,
        "kinds": kinds,
        "names": [name(record.path, number) for number, record in enumerate(records, 1)],
        "kind": [index[kind] for kind in of],
        "scores": scores,
        "roc": None,
        "precision_recall": None,
    }
    if labelled and len(set(of) - {GOOD}) and GOOD in of:
        labels = [kind != GOOD for kind in of]
        false_rejects, found, _ = roc_curve(labels, scores)
        precision, recall, _ = precision_recall_curve(labels, scores, drop_intermediate=True)
        data["roc"] = {"x": false_rejects.tolist(), "y": found.tolist()}
        data["precision_recall"] = {"x": recall.tolist(), "y": precision.tolist()}
    return data


def name(path: str | None, number: int) -> str:
    """Return a file's name with its folder, or a number."""
    return "/".join(Path(path).parts[-2:]) if path else f"image {number}"


def in_words(records: Sequence[Record]) -> str:
    """Return how many images there are, and of what kinds."""
    counts = Counter(record.kind for record in records)
    good = counts.pop(GOOD, 0)
    if any(record.label is None for record in records):
        found = Counter(record.folder for record in records)
        lie = ", ".join(f"{count} in {folder}" for folder, count in sorted(found.items())) if len(found) > 1 else ""
        return f"{plural(len(records), 'image')}, without labels" + (f" ({lie})" if lie else "")
    defects = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return f"{plural(len(records), 'image')}: {good} good, {counts.total()} with defects" + (
        f" ({defects})" if defects else ""
    )


def plural(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def write_page(
    path: Path,
    title: str,
    records: Sequence[Record],
    pictures: Sequence[Picture],
    scale: Scale,
    facts: Mapping[str, str],
    metrics: Mapping[str, float],
    warning: str = "",
) -> None:
    """Write the page, which needs no other file and no network, or raise an ``OSError`` and leave one that was there.

    Args:
        path: The file.
        title: Its heading.
        records: Of all images.
        pictures: Of some of them.
        scale: Of the scores.
        facts: What else to say of the run, by its name.
        metrics: What the run has logged.
        warning: What to be careful about, if anything.
    """
    shown = [[-number, *(b64encode(file).decode() for file in files)] for _, number, *files in pictures]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("template.html").render(
        title=title,
        images=in_words(records),
        data={**chart_data(records, scale), "title": title, "checkpoint": facts.get("Checkpoint", "")},
        pictures=shown,
        facts=facts,
        metrics=metrics,
        warning=warning,
        colours=[" ".join(f"{value / 255:.3f}" for value in channel) for channel in COLOURS[::15].T],
        plotly=get_plotlyjs(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    try:
        unfinished.write_text(page, encoding="utf-8", errors="replace")  # a file's name may be no unicode
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
