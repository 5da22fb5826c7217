"""Datasets to compare models on, in MVTec AD's layout: ``SurfaceDemo``'s, and others like them.

The others are one to a folder of photographs, such as DTD's: crops of the first photograph that is large enough, in
grey, with ``SurfaceDemo``'s drawn defects. Of the same photographs simulated parts are made (``parts.py``). Those that
are left are linked to in ``other_photographs``, to corrupt training images with. Run by ``make bench-surfaces``.
"""

import argparse
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from anomalib_cse.data.demo import CATEGORIES, SurfaceDemo, crop, write_dataset

from parts import write_parts

SIDE = 512  # of a photograph, whose rows write_dataset cuts from
SMALLEST = 480  # shorter side of those that are large enough


def squared(photograph: np.ndarray) -> np.ndarray:
    """Return the middle of a photograph ``(H, W)`` as ``(SIDE, SIDE)``, enlarged if it is too small."""
    larger = SIDE / min(photograph.shape)
    if larger > 1:
        photograph = cv2.resize(photograph, None, fx=larger, fy=larger, interpolation=cv2.INTER_CUBIC)
    top, left = ((length - SIDE) // 2 for length in photograph.shape)
    return photograph[top : top + SIDE, left : left + SIDE]


def write_others(photographs: Path, output: Path) -> None:
    """Write a dataset for every folder that has a photograph large enough, saying which it is, and those of parts.

    Raises:
        SystemExit: If none is, or one cannot be read.
    """
    files = sorted(photographs.resolve().rglob("*.jpg"))
    chosen: dict[str, Path] = {}
    shown = []
    for file in files:
        photograph = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
        if photograph is None:
            raise SystemExit(f"{file} is no image that OpenCV reads: take it out of the folder")
        if file.parent.name not in chosen and min(photograph.shape) >= SMALLEST:
            chosen[file.parent.name] = file
            shown.append(squared(photograph))
            write_dataset(output / file.parent.name, partial(crop, shown[-1]), np.random.default_rng(len(chosen)))
            print(f"{file.parent.name}: {file.name}")
    if not chosen:
        raise SystemExit(f"no .jpg of {SMALLEST} pixels and more to a side in folders of {photographs}")
    write_parts(shown, output)
    for file in files:
        if file not in chosen.values():
            link = output / "other_photographs" / file.parent.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)


def main(arguments: list[str] | None = None) -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    help_ = "folder with a folder for each kind (DTD's), for others and parts"
    parser.add_argument("--photographs", type=Path, help=help_)
    options = parser.parse_args(arguments)
    if options.output.exists():
        parser.error(f"{options.output} exists: give a new folder")
    for category in CATEGORIES:
        SurfaceDemo(root=options.output, category=category).prepare_data()
    if options.photographs:
        write_others(options.photographs, options.output)


if __name__ == "__main__":
    main()
