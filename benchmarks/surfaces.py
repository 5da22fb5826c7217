"""Datasets of drawn defects on photographs of textures, to compare models on what nothing was chosen by.

One surface a folder of photographs: crops of the first that is large enough, in grey, with ``SurfaceDemo``'s defects,
in MVTec AD's layout. The other photographs are linked to in ``textures``, to corrupt training images with. Written for
DTD; run by ``make bench-surfaces``.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from anomalib_cse.demo import write_dataset

SIDE = 512  # of a photograph, as write_dataset takes it
SMALLEST = 480  # shorter side of those that are large enough


def squared(photograph: np.ndarray) -> np.ndarray:
    """The middle of a photograph ``(H, W)`` as ``(SIDE, SIDE)``, enlarged if it is too small."""
    larger = SIDE / min(photograph.shape)
    if larger > 1:
        photograph = cv2.resize(photograph, None, fx=larger, fy=larger, interpolation=cv2.INTER_CUBIC)
    top, left = ((length - SIDE) // 2 for length in photograph.shape)
    return photograph[top : top + SIDE, left : left + SIDE]


def main() -> None:
    """Write a dataset for every folder that has a photograph large enough, and say which it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder with a folder for each kind (DTD's)")
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the datasets")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists: give a new folder")
    files = sorted(options.photographs.resolve().rglob("*.jpg"))
    chosen: dict[str, Path] = {}
    for file in files:
        photograph = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
        if photograph is None:
            parser.error(f"{file} is no image that OpenCV reads")
        if file.parent.name not in chosen and min(photograph.shape) >= SMALLEST:
            chosen[file.parent.name] = file
            folder = options.output / file.parent.name
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_dataset(folder, squared(photograph), np.random.default_rng(len(chosen)))
            print(f"{folder.name}: {file.name}")
    if not chosen:
        parser.error(f"no .jpg of {SMALLEST} pixels and more to a side in folders of {options.photographs}")
    for file in files:
        if file not in chosen.values():
            link = options.output / "textures" / file.parent.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)


if __name__ == "__main__":
    main()
