"""The scores of a run as a table, one line an image."""

import csv
from collections.abc import Sequence
from pathlib import Path

from .page import Record, Scale

COLUMNS = ("path", "kind", "label", "score", "raw score", "verdict")


def write_scores(path: Path, records: Sequence[Record], scale: Scale) -> None:
    """Write a CSV file: where an image lies, its kind, whether it has a defect, its scores, and what follows of them.

    What is not known is left empty: labels of a prediction, raw scores of a post-processor that keeps none, and
    verdicts without a threshold. Numbers have all digits of single precision.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # surrogateescape: names that are no unicode come back as they are
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for record in records:
            label = "" if record.label is None else "defect" if record.label else "good"
            raw = "" if record.raw is None else f"{record.raw:.9g}"
            table.writerow(
                (record.path or "", record.kind, label, f"{record.score:.9g}", raw, verdict(record.score, scale))
            )


def verdict(score: float, scale: Scale) -> str:
    """Return in a word what a score leads to; nothing without a threshold."""
    return "" if scale.threshold is None else "rejected" if score > scale.threshold else "accepted"
