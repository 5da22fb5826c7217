"""Simulated parts: regions that have their place in every image and show crops of photographs.

Written by ``surfaces.py``, beside its surfaces.
"""

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator, default_rng

from anomalib_cse.data.demo import CROP, Image, crop, write_dataset

FINER = 4  # pixels of a layout to one of an image, along either axis
CONTRAST = 0.35  # of the photographs

Region = tuple[Image, float]  # a mask, 255 where it is, on 640x640 pixels; its mean grey value


def blank() -> Image:
    """Return the mask of nothing."""
    return np.zeros((FINER * CROP, FINER * CROP), np.uint8)


def disc(x: int, y: int, radius: int) -> Image:
    """Draw a filled circle."""
    return cv2.circle(blank(), (x, y), radius, 255, -1)


def box(left: int, top: int, right: int, bottom: int) -> Image:
    """Draw a filled rectangle."""
    return cv2.rectangle(blank(), (left, top), (right, bottom), 255, -1)


def polygon(*corners: tuple[int, int]) -> Image:
    """Draw a filled polygon."""
    return cv2.fillPoly(blank(), [np.array(corners, np.int32)], 255)


def letters(text: str, x: int, y: int) -> Image:
    """Draw printed letters."""
    return cv2.putText(blank(), text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 3, 255, 10)


EVERYWHERE = np.full_like(blank(), 255)
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
    """Return an image of a part ``(160, 160)``: not quite in its place, a little lighter or darker, and noisy.

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
    for (region, grey), photograph in zip(layout, photographs, strict=True):
        mask = cv2.warpAffine(region, move, (side, side), borderMode=cv2.BORDER_REPLICATE)
        opacity = cv2.resize(mask, (CROP, CROP), interpolation=cv2.INTER_AREA) / 255
        shown = grey + CONTRAST * (crop(photograph, rows, rng) - photograph.mean())
        image = image * (1 - opacity) + shown.clip(0, 255) * opacity
    across = np.linspace(-0.5, 0.5, CROP)
    light = 1 + rng.normal(0, 0.03) + rng.normal(0, 0.04) * across + rng.normal(0, 0.04) * across[:, None]
    return (image * light + rng.normal(0, 2, image.shape)).clip(0, 255).round().astype(np.uint8)


def write_parts(photographs: Sequence[Image], output: Path) -> None:
    """Write a dataset for every part, of photographs ``(512, 512)`` in turn, with ``SurfaceDemo``'s drawn defects."""
    in_turn = cycle(photographs)
    for number, (name, layout) in enumerate(PARTS.items()):
        shown = list(islice(in_turn, len(layout)))
        write_dataset(output / name, partial(photograph_part, layout, shown), default_rng(number))
