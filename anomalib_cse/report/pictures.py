"""Small pictures of images and their anomaly maps, of a bounded number."""

import heapq
from io import BytesIO

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image

MOST = 1500  # of 10 to 20 kB each: a browser has no trouble with these
IMAGE_SIDE, MAP_SIDE = 256, 96  # most pixels; maps are smooth
STRIP = 3  # times as long as wide: such images are folded
STRIP_SIDE = 512  # most pixels of these
COLOURS = colormaps["inferno"](np.arange(256), bytes=True)[:, :3]  # (256, 3); also in grey, brighter is more

Picture = tuple[float, int, bytes, bytes]  # closeness to the threshold, minus the image's number, image, map or nothing


def is_strip(values: Tensor) -> bool:
    """Whether images ``(..., H, W)`` are much longer than wide, or wider than long."""
    height, width = values.shape[-2:]
    return max(height, width) >= STRIP * min(height, width)


def folded(values: Tensor, gap: float) -> Tensor:
    """Cut strips ``(..., H, W)`` into parts below one another, or if they are high beside one another, nearly square.

    What is not much longer than wide stays as it is. The value of the ``gap`` lies between the parts and after the end.
    """
    height, width = values.shape[-2:]
    if not is_strip(values):
        return values
    if height > width:
        return folded(values.mT, gap).mT
    parts = round((width / height) ** 0.5)
    between = max(1, height // 32)
    long = -(-width // parts)
    padded = F.pad(values, (0, parts * long - width, 0, between), value=gap)
    return torch.cat(padded.split(long, dim=-1), dim=-2)[..., :-between, :]


class Pictures:
    """JPEG pictures of the images whose scores are nearest to a threshold.

    Args:
        threshold: Of scores; ``None`` keeps the highest scores.
        normalised: Whether anomaly maps are scaled to [0, 1]; each one's own range has all colours otherwise.
    """

    def __init__(self, threshold: float | None, *, normalised: bool) -> None:
        self.threshold, self.normalised = threshold, normalised
        self.kept: list[Picture] = []  # a heap, the farthest first

    def add(self, number: int, score: float, image: Tensor, anomaly_map: Tensor | None) -> None:
        """Keep an image ``(3, H, W)`` in [0, 1] and its map ``(H, W)`` if there are not enough nearer ones."""
        rank = (score if self.threshold is None else -abs(score - self.threshold), -number)
        full = len(self.kept) >= MOST
        if full and rank < self.kept[0][:2]:
            return
        drawn = b"" if anomaly_map is None else self.draw(anomaly_map)
        shown = folded(image.float().clamp(0, 1).cpu(), gap=1)
        side = STRIP_SIDE if is_strip(image) else IMAGE_SIDE
        entry = (*rank, jpeg(to_pil_image(shown), side, quality=70), drawn)
        (heapq.heapreplace if full else heapq.heappush)(self.kept, entry)

    def draw(self, anomaly_map: Tensor) -> bytes:
        """Return a map ``(H, W)`` in grey, which the page colours."""
        values = folded(anomaly_map.float().cpu(), gap=float(anomaly_map.min())).numpy()
        if not self.normalised:
            values = (values - values.min()) / (np.ptp(values) or 1)
        side = STRIP_SIDE // 2 if is_strip(anomaly_map) else MAP_SIDE
        return jpeg(Image.fromarray((255 * values).round().astype(np.uint8)), side, quality=90)


def nearest_pictures(shares: list[list[Picture]]) -> list[Picture]:
    """Return what is to be kept of all processes' pictures."""
    return heapq.nlargest(MOST, (entry for share in shares for entry in share))


def jpeg(picture: Image.Image, side: int, quality: int) -> bytes:
    """Return a picture, of at most ``side`` pixels in height and width, as a file. WebP's take ten times as long."""
    picture.thumbnail((side, side))
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()
