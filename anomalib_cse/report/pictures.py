"""Small pictures of images and their anomaly maps, of a bounded number."""

import heapq
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

MOST = 1000  # of 5 kB each: a browser has no trouble with these
IMAGE_SIDE, MAP_SIDE = 160, 80  # most pixels; maps are smooth
COLOURS = colormaps["inferno"]  # also in grey, brighter is more

Kept = tuple[float, int, bytes, bytes]  # closeness to the threshold, minus the image's number, image, map or nothing


class Pictures:
    """WebP pictures of the images whose scores are nearest to a threshold.

    Args:
        threshold: Of scores; ``None`` keeps the highest scores.
        normalised: Whether anomaly maps are scaled to [0, 1]; each one's own range has all colours otherwise.
    """

    def __init__(self, threshold: float | None, *, normalised: bool) -> None:
        self.threshold, self.normalised = threshold, normalised
        self.kept: list[Kept] = []  # a heap, the farthest first

    def add(self, number: int, score: float, image: Tensor, anomaly_map: Tensor | None) -> None:
        """Keep an image ``(3, H, W)`` in [0, 1] and its map ``(H, W)`` if there are not enough nearer ones."""
        rank = (score if self.threshold is None else -abs(score - self.threshold), -number)
        full = len(self.kept) >= MOST
        if full and rank < self.kept[0][:2]:
            return
        drawn = b"" if anomaly_map is None else self.draw(anomaly_map)
        entry = (*rank, webp(to_pil_image(image.float().clamp(0, 1).cpu()), IMAGE_SIDE), drawn)
        (heapq.heapreplace if full else heapq.heappush)(self.kept, entry)

    def draw(self, anomaly_map: Tensor) -> bytes:
        """Return a map ``(H, W)`` in colours."""
        values = anomaly_map.float().cpu().numpy()
        if not self.normalised:
            values = (values - values.min()) / (np.ptp(values) or 1)
        return webp(Image.fromarray(COLOURS(values, bytes=True)).convert("RGB"), MAP_SIDE)


def nearest(shares: list[list[Kept]]) -> list[Kept]:
    """Return what is to be kept of all processes' pictures."""
    return heapq.nlargest(MOST, (entry for share in shares for entry in share))


def webp(picture: Image.Image, side: int) -> bytes:
    """Return a picture, of at most ``side`` pixels in height and width, as a file."""
    picture.thumbnail((side, side))
    file = BytesIO()
    picture.save(file, "WEBP", quality=70)
    return file.getvalue()
