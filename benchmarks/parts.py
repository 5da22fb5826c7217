"""Simulated parts: regions that have their place in every image and show crops of photographs.

Written by ``surfaces.py``, beside its surfaces.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator, default_rng

from anomalib_cse.demo import CROP, Image, crop, write_dataset

FINER = 4  # pixels of a layout to one of an image, along either axis
CONTRAST = 0.35  # of the photographs

Shape = Callable[[Image], Image]
Region = tuple[Shape, float]  # draws 255 where it is, on 640x640 pixels; its mean grey value


def disc(x: int, y: int, radius: int) -> Shape:
    """A filled circle."""
    return partial(cv2.circle, center=(x, y), radius=radius, color=255, thickness=-1)


def box(left: int, top: int, right: int, bottom: int) -> Shape:
    """A filled rectangle."""
    return partial(cv2.rectangle, pt1=(left, top), pt2=(right, bottom), color=255, thickness=-1)


def polygon(*corners: tuple[int, int]) -> Shape:
    """A filled polygon."""
    return partial(cv2.fillPoly, pts=[np.array(corners, np.int32)], color=255)


def letters(text: str, x: int, y: int) -> Shape:
    """Printed letters."""
    return partial(
        cv2.putText, text=text, org=(x, y), fontFace=cv2.FONT_HERSHEY_SIMPLEX, fontScale=3, color=255, thickness=10
    )


EVERYWHERE = box(0, 0, FINER * CROP, FINER * CROP)
PARTS: dict[str, Sequence[Region]] = {
    "part_washer": [(EVERYWHERE, 60), (disc(320, 320, 270), 150), (disc(320, 320, 100), 60)],
    "part_plate": [
        (EVERYWHERE, 190),
        (box(75, 115, 565, 525), 110),
        (disc(160, 320, 45), 190),
        (disc(480, 320, 45), 190),
    ],
    "part_nut": [
        (EVERYWHERE, 40),
        (polygon((600, 320), (460, 562), (180, 562), (40, 320), (180, 78), (460, 78)), 140),
        (disc(320, 320, 130), 70),
    ],
    "part_label": [(EVERYWHERE, 120), (box(95, 190, 545, 450), 220), (letters("LOT 42", 130, 350), 30)],
    "part_slab": [(EVERYWHERE, 110), (box(0, 0, 50, 640), 40), (box(595, 0, 640, 640), 60)],
    "part_halves": [(EVERYWHERE, 90), (box(0, 320, 640, 640), 140)],
    "part_board": [
        (EVERYWHERE, 90),
        (box(130, 95, 320, 290), 50),
        (box(350, 350, 575, 545), 160),
        (disc(480, 190, 75), 180),
        (letters("R7", 100, 570), 230),
    ],
    "part_signs": [(EVERYWHERE, 120), (disc(225, 225, 140), 130), (polygon((500, 370), (250, 560), (190, 260)), 160)],
}


def photograph_part(layout: Sequence[Region], photographs: Sequence[Image], rows: slice, rng: Generator) -> Image:
    """One image of a part ``(160, 160)``: not quite in its place, a little lighter or darker, and noisy.

    Args:
        layout: Regions, each over the ones before.
        photographs: What each region shows a crop of, ``(512, 512)``.
        rows: Of the photographs.
        rng: Source of randomness.
    """
    side = FINER * CROP
    move = cv2.getRotationMatrix2D((side / 2, side / 2), rng.normal(0, 1), 1 + rng.normal(0, 0.005))
    move[:, 2] += FINER * rng.normal(0, 1.2, 2)
    image = np.zeros((CROP, CROP))
    for (draw, grey), photograph in zip(layout, photographs, strict=True):
        mask = cv2.warpAffine(
            draw(np.zeros((side, side), np.uint8)), move, (side, side), borderMode=cv2.BORDER_REPLICATE
        )
        opacity = cv2.resize(mask, (CROP, CROP), interpolation=cv2.INTER_AREA) / 255
        shown = grey + CONTRAST * (crop(photograph, rows, rng) - photograph.mean())
        image = image * (1 - opacity) + shown.clip(0, 255) * opacity
    across = np.linspace(-0.5, 0.5, CROP)
    light = 1 + rng.normal(0, 0.03) + rng.normal(0, 0.04) * across + rng.normal(0, 0.04) * across[:, None]
    return (image * light + rng.normal(0, 2, image.shape)).clip(0, 255).round().astype(np.uint8)


def write_parts(photographs: Sequence[Image], output: Path) -> None:
    """Write a dataset for every part, of photographs ``(512, 512)`` in turn, with ``SurfaceDemo``'s drawn defects."""
    first = 0
    for number, (name, layout) in enumerate(PARTS.items()):
        shown = [photographs[(first + i) % len(photographs)] for i in range(len(layout))]
        first += len(layout)
        write_dataset(output / name, partial(photograph_part, layout, shown), default_rng(number))
