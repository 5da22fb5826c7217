"""The command that looks at images before anything is trained: ``python -m anomalib_cse.data.check FOLDER``."""

import sys
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.data import Folder
from anomalib.data.utils.image import is_image_file
from anomalib.engine import Engine
from anomalib.models import get_model
from rich.console import Console
from rich.progress import track

from ..checks import warn_of_files
from .datamodules import check_layout
from .image_check import errors_in, files_of
from .look import Sample, look

NAMED = 5  # folders in a message


def main(arguments: Sequence[str] | None = None) -> int:
    """Read all images of some folders whole, and write what is there, what is wrong, and what may be.

    Returns:
        1 if something is wrong, else 0.
    """
    parser = ArgumentParser(prog="python -m anomalib_cse.data.check", description="Look at images before training.")
    parser.add_argument(
        "folder", nargs="+", type=Path, help="a category in MVTec AD's layout, or a folder of training images"
    )
    parser.add_argument(
        "--backbone", help="fit CseGaussian with it, and name training images that score unlike the others"
    )
    options = parser.parse_args(arguments)
    training: list[Sample] = []
    test: list[Sample] = []
    errors: list[str] = []
    doubts: list[str] = []
    for folder in options.folder:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
        category = next(iter(sorted(folder.glob("*/train/good"))), None)
        if category and not is_category(folder):
            parser.error(f"{folder} holds categories: give one of them, such as {category.parents[1]}")
        found = samples_in(folder)
        if not any(found):
            parser.error(f"{folder} holds no images: give a category's folder, or one of training images")
        training += found[0]
        test += found[1]
        errors += layout_errors(folder)
        doubts += mixed(folder, found[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind, samples in (("training", training), ("evaluation", test)):
            shown = track(samples, f"Reading {kind} images", console=Console(stderr=True), transient=True)
            errors += errors_in(kind, shown)
        warn_of_files(files_of((*training, *test)))
    seen = look(training, [], test)
    errors = list(dict.fromkeys((*errors, *seen.errors)))
    doubts = [*(str(warning.message) for warning in caught), *seen.warnings, *doubts]
    if options.backbone and not errors:
        try:
            doubts += unlike_others(options.folder, options.backbone)
        except ValueError as error:  # too few images, or too much alike
            doubts.append(f"images were not scored: {error}")
    lines = [seen.summary, *(f"error: {e}" for e in errors), *(f"warning: {d}" for d in doubts)]
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


def mixed(folder: Path, samples: Sequence[Sample]) -> list[str]:
    """Say if the training images of a folder without a layout lie in several folders: all of them count as good."""
    counts = Counter(Path(sample.image).parent for sample in samples)
    if len(counts) < 2 or is_category(folder):
        return []
    named = ", ".join(f"{counts[below]} in {below}" for below in sorted(counts)[:NAMED])
    more = " and more" if len(counts) > NAMED else ""
    return [f"{folder} has images in {len(counts)} folders, all taken for good ones to train with: {named}{more}"]


def unlike_others(folders: Sequence[Path], backbone: str) -> list[str]:
    """Return which training images a fit to others finds anomalous; raise a ``ValueError`` if none can be made."""
    normal = [folder / "train" / "good" if is_category(folder) else folder for folder in folders]
    images = Folder(name="images", normal_dir=normal, test_split_mode="none", val_split_mode="none", num_workers=0)
    # by name: this room does not know those of the models
    model = get_model("cse_gaussian", backbone=backbone, reject_rate=0.01, seed=0)
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    with TemporaryDirectory() as results, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the look has said all
        Engine(default_root_dir=results, limit_val_batches=0, **options).fit(model, datamodule=images)
    found: Sequence[tuple[str, float]] = getattr(model.post_processor, "suspicious", ())
    return [f"{path} scores {score:.3g}, unlike the other training images: is it defective?" for path, score in found]


def is_category(folder: Path) -> bool:
    """Whether a folder is in MVTec AD's layout."""
    return (folder / "train" / "good").is_dir()


def images_below(folder: Path) -> list[Path]:
    """Return the files in a folder, and in those in it, that anomalib takes for images by their names."""
    return sorted(path for path in folder.rglob("*") if is_image_file(path) and not path.is_dir())


def layout_errors(folder: Path) -> list[str]:
    """Return why ``MVTec`` would refuse a folder in its layout; without any masks, ``Folder`` is to read it."""
    try:
        if is_category(folder) and (folder / "ground_truth").is_dir():
            check_layout(folder)
    except ValueError as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    sys.exit(main())
