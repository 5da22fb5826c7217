"""The command that looks at images before anything is trained: ``python -m anomalib_cse.data.check FOLDER``."""

import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from anomalib.data.utils.image import is_image_file
from rich.console import Console
from rich.progress import track

from ..checks import warn_of_files
from .datamodules import check_layout
from .image_check import errors_in, files_of
from .look import Sample, look


def main(arguments: Sequence[str] | None = None) -> int:
    """Read all images of some folders whole, and write what is there, what is wrong, and what may be.

    Returns:
        1 if something is wrong, else 0.
    """
    parser = ArgumentParser(prog="python -m anomalib_cse.data.check", description="Look at images before training.")
    parser.add_argument(
        "folder", nargs="+", type=Path, help="a category in MVTec AD's layout, or a folder of training images"
    )
    training: list[Sample] = []
    test: list[Sample] = []
    errors: list[str] = []
    for folder in parser.parse_args(arguments).folder:
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kind, samples in (("training", training), ("evaluation", test)):
            shown = track(samples, f"Reading {kind} images", console=Console(stderr=True), transient=True)
            errors += errors_in(kind, shown)
        warn_of_files(files_of((*training, *test)))
    seen = look(training, [], test)
    errors = list(dict.fromkeys((*errors, *seen.errors)))
    doubts = [*(str(warning.message) for warning in caught), *seen.warnings]
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
