"""The command that looks at images before anything is trained: ``python -m anomalib_cse.preflight FOLDER``."""

import sys
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.data import Folder
from anomalib.data.utils.image import is_image_file
from anomalib.engine import Engine
from anomalib.models import get_model
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..image_files import left_out
from .dataset import inspect
from .findings import NAMED, Finding, error, messages, warning
from .images import PNG, Sample, check_layout


def main(arguments: Sequence[str] | None = None) -> int:
    """Read all images of some folders whole, and write what is there, what is wrong, and what may be.

    Returns:
        1 if something is wrong, else 0.
    """
    parser = ArgumentParser(prog="python -m anomalib_cse.preflight", description="Look at images before training.")
    parser.add_argument(
        "folder", nargs="+", type=Path, help="a category in MVTec AD's layout, or a folder of training images"
    )
    parser.add_argument(
        "--backbone", help="fit CseGaussian with it, and name training images that score unlike the others"
    )
    options = parser.parse_args(arguments)
    training: list[Sample] = []
    test: list[Sample] = []
    findings: list[Finding] = []
    for folder in options.folder:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
        category = next(iter(sorted(folder.glob("*/train/good"))), None)
        if category and not is_category(folder):
            parser.error(f"{folder} holds categories: give one of them, such as {category.parents[1]}")
        good, evaluated = samples_in(folder)
        if not good and not evaluated:
            parser.error(f"{folder} holds no images: give a category's folder, or one of training images")
        training += good
        test += evaluated
        findings += [*layout_findings(folder), *mixed(folder, good)]
        suffixes = PNG if is_category(folder) and (folder / "ground_truth").is_dir() else IMG_EXTENSIONS
        findings += [warning(said) for said in left_out([folder], {suffix.lower() for suffix in suffixes})]
    summary, found, _ = inspect(training, [], test, whole=("training", "evaluation"))
    findings += found
    if options.backbone and not any(finding.is_error for finding in findings):
        findings += unlike_others(options.folder, options.backbone)
    errors, doubts = messages(findings)
    lines = [summary, *(f"error: {e}" for e in errors), *(f"warning: {d}" for d in doubts)]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(bool(errors))


def samples_in(folder: Path) -> tuple[list[Sample], list[Sample]]:
    """Return the images to train and to test with: all train, unless the folder is in MVTec AD's layout."""
    if not is_category(folder):
        return [Sample(str(path)) for path in images_below(folder)], []
    masks = {(path.parent.name, path.stem): str(path) for path in images_below(folder / "ground_truth")}
    return [Sample(str(path)) for path in images_below(folder / "train" / "good")], [
        Sample(str(path), masks.get((path.parent.name, f"{path.stem}_mask"), ""), path.parent.name != "good")
        for path in images_below(folder / "test")
    ]


def mixed(folder: Path, samples: Sequence[Sample]) -> Iterator[Finding]:
    """Say if the training images of a folder without a layout lie in several folders: all of them count as good."""
    counts = Counter(Path(sample.image).parent for sample in samples)
    if len(counts) < 2 or is_category(folder):
        return
    named = ", ".join(f"{counts[below]} in {below}" for below in sorted(counts)[:NAMED])
    more = " and more" if len(counts) > NAMED else ""
    said = f"{folder} has images in {len(counts)} folders, all taken for good ones to train with: {named}{more}"
    yield warning(said)


def unlike_others(folders: Sequence[Path], backbone: str) -> Iterator[Finding]:
    """Say which training images a fit to the others finds anomalous, or why none can be made."""
    normal = [folder / "train" / "good" if is_category(folder) else folder for folder in folders]
    images = Folder(name="images", normal_dir=normal, test_split_mode="none", val_split_mode="none", num_workers=0)
    # by name: this room does not know those of the models
    model = get_model("cse_gaussian", backbone=backbone, reject_rate=0.01, seed=0)
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    try:
        with TemporaryDirectory() as results, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all has been said
            Engine(default_root_dir=results, limit_val_batches=0, **options).fit(model, datamodule=images)
    except ValueError as reason:  # too few images, or too much alike
        yield warning(f"images were not scored: {reason}")
        return
    found: Sequence[tuple[str, float]] = getattr(model.post_processor, "suspicious", ())
    for path, score in found:
        yield warning(f"{path} scores {score:.3g}, unlike the other training images: is it defective?")


def is_category(folder: Path) -> bool:
    """Whether a folder is in MVTec AD's layout."""
    return (folder / "train" / "good").is_dir()


def images_below(folder: Path) -> list[Path]:
    """Return the files in a folder, and in those in it, that anomalib takes for images by their names."""
    return sorted(path for path in folder.rglob("*") if is_image_file(path) and not path.is_dir())


def layout_findings(folder: Path) -> Iterator[Finding]:
    """Say why ``MVTec`` would refuse a folder in its layout; without any masks, ``Folder`` is to read it."""
    try:
        if is_category(folder) and (folder / "ground_truth").is_dir():
            check_layout(folder)
    except ValueError as reason:
        yield error(str(reason))


if __name__ == "__main__":
    sys.exit(main())
