"""A surface dataset that needs no download: photographs that come with scikit-image, and drawn defects."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from anomalib.data import MVTecAD
from numpy.random import Generator, default_rng

Image = np.ndarray
Drawing = tuple[Image, Image]  # the image with a defect, and the defect's mask, both (H, W) uint8

CATEGORIES = ("brick", "grass", "gravel")
CROP = 160
TRAIN_ROWS = slice(0, 320)  # of the photographs' 512: training and test crops share no pixel
TEST_ROWS = slice(320, 512)
TRAIN_COUNT, GOOD_COUNT, DEFECT_COUNT = 40, 20, 8


def curve(rng: Generator, length: float, bend: float) -> Image:
    """Return points ``(N, 2)`` of a smoothly bending line through a crop, in pixels."""
    steps = int(length)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, steps))
    points = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    return points - points.mean(axis=0) + rng.uniform(0.3 * CROP, 0.7 * CROP, 2)


def draw_line(points: Image, width: int) -> Image:
    """Return the mask of a line of some pixels' width."""
    mask = np.zeros((CROP, CROP), np.uint8)
    cv2.polylines(mask, [np.round(points).astype(np.int32)], isClosed=False, color=255, thickness=width)
    return mask


def blend(image: Image, colour: float, opacity: Image) -> Image:
    """Mix a grey value into an image, by an opacity in [0, 1] per pixel."""
    return (image * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def scratch(image: Image, rng: Generator) -> Drawing:
    """Draw a thin bright line."""
    mask = draw_line(curve(rng, rng.uniform(60, 120), 0.02), 2)
    return blend(image, 235, cv2.GaussianBlur(mask, (3, 3), 0) / 255 * 0.8), mask


def stain(image: Image, rng: Generator) -> Drawing:
    """Draw a soft dark blot."""
    mask = np.zeros((CROP, CROP), np.uint8)
    centre = rng.uniform(0.3 * CROP, 0.7 * CROP, 2)
    for _ in range(5):
        at = np.round(centre + rng.normal(0, 8, 2)).astype(int).tolist()
        cv2.ellipse(mask, at, rng.integers(8, 20, 2).tolist(), rng.uniform(0, 180), 0, 360, 255, -1)
    return blend(image, 40, cv2.GaussianBlur(mask, (0, 0), 3) / 255 * 0.6), mask


def hole(image: Image, rng: Generator) -> Drawing:
    """Draw a ragged hole with a dark ground."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    radius = rng.uniform(9, 16) * rng.uniform(0.7, 1.3, 16)
    points = rng.uniform(0.3 * CROP, 0.7 * CROP, 2) + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    mask = np.zeros((CROP, CROP), np.uint8)
    cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 255)
    return blend(image, 10, mask / 255), mask


def thread(image: Image, rng: Generator) -> Drawing:
    """Draw a foreign thread that lies on the surface and casts a shadow."""
    points = curve(rng, rng.uniform(120, 220), 0.12)
    mask = draw_line(points, 4)
    shadow = cv2.GaussianBlur(draw_line(points + 3, 4), (0, 0), 1.5) / 255 * 0.6
    return blend(blend(image, 0, shadow), 200, mask / 255), mask


DEFECTS: dict[str, Callable[[Image, Generator], Drawing]] = {
    "scratch": scratch,
    "stain": stain,
    "hole": hole,
    "thread": thread,
}


def crop(photograph: Image, rows: slice, rng: Generator) -> Image:
    """Cut a random square out of some rows of a photograph."""
    top = rng.integers(rows.start, rows.stop - CROP + 1)
    left = rng.integers(0, photograph.shape[1] - CROP + 1)
    return photograph[top : top + CROP, left : left + CROP]


def write_dataset(folder: Path, cut: Callable[[slice, Generator], Image], rng: Generator) -> None:
    """Cut and draw a dataset in MVTec AD's layout, in a folder that is complete once it exists.

    ``cut`` returns a good image ``(160, 160)`` uint8, out of some rows of photographs ``(512, 512)``. Raises an
    ``OSError`` if an image cannot be written.
    """

    def write(image: Image, *parts: str) -> None:
        path = unfinished.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), image):
            msg = f"{path} cannot be written: give the dataset another root"
            raise OSError(msg)

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for number in range(TRAIN_COUNT):
        write(cut(TRAIN_ROWS, rng), "train", "good", f"{number:03}.png")
    for number in range(GOOD_COUNT):
        write(cut(TEST_ROWS, rng), "test", "good", f"{number:03}.png")
    for name, draw in DEFECTS.items():
        for number in range(DEFECT_COUNT):
            image, mask = draw(cut(TEST_ROWS, rng), rng)
            write(image, "test", name, f"{number:03}.png")
            write(mask, "ground_truth", name, f"{number:03}_mask.png")
    unfinished.rename(folder)


class SurfaceDemo(MVTecAD):
    """Brick, grass or gravel with drawn scratches, stains, holes and threads; written at first use.

    The photographs (CC0) come with scikit-image, on which anomalib depends. The defects are drawn by other processes
    than the ones that the models are fitted with.

    Args:
        root: Where the images are written.
        category: ``"brick"``, ``"grass"`` or ``"gravel"``; anything else is a ``ValueError``.
        train_batch_size: 8, the CSE paper's number (Section 4.1); anomalib's own is 32.
        num_workers: Of the dataloaders; the images are small.
        **kwargs: As for anomalib's ``MVTecAD``.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/SurfaceDemo",
        category: str = "brick",
        train_batch_size: int = 8,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        if category not in CATEGORIES:
            msg = f"category must be one of {CATEGORIES}, got {category!r}"
            raise ValueError(msg)
        super().__init__(
            root=root, category=category, train_batch_size=train_batch_size, num_workers=num_workers, **kwargs
        )

    def prepare_data(self) -> None:
        """Write the images, unless they are there."""
        from skimage import data

        folder = Path(self.root) / self.category
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            photograph = getattr(data, self.category)()
            write_dataset(folder, partial(crop, photograph), default_rng(CATEGORIES.index(self.category)))
