"""Pictures of a test or a prediction: what an image shows, what the model saw there, and what it said."""

from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib as mpl
import numpy as np
import torch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageDraw, ImageFont
from skimage.segmentation import find_boundaries
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import CenterCrop, Resize
from torchvision.transforms.v2.functional import resize

from ..preflight import datamodule_of, transform_of
from ..report import COLOURS, Scale, folded, is_strip, scale_of

GAP, CAPTION, TITLE = 6, 56, 20  # pixels: around panels, and of the lines of text above them
FONTS = Path(mpl.get_data_path()) / "fonts" / "ttf"  # knows more alphabets than Pillow's own, and is on any system
ACCEPTED, REJECTED, UNJUDGED = ("#ffffff", "#1b1f24"), ("#b3400a", "#ffffff"), ("#d5dae0", "#1b1f24")  # ground, text
OUTLINE, CASING = np.array([0, 229, 255], np.uint8), np.array([0, 0, 0], np.uint8)
WORDS = {
    (True, True): "REJECTED, and is defective",
    (True, False): "REJECTED, but is good: a false reject",
    (False, True): "ACCEPTED, but is defective: an escape",
    (False, False): "ACCEPTED, and is good",
    (True, None): "REJECTED",
    (False, None): "ACCEPTED",
}


class Verdict(NamedTuple):
    """What a picture says in words."""

    name: str
    score: float
    threshold: float | None
    is_rejected: bool | None
    is_defective: bool | None

    def __str__(self) -> str:
        """Say what the model made of the image, and whether that is right."""
        return "NO THRESHOLD" if self.is_rejected is None else WORDS[self.is_rejected, self.is_defective]

    @property
    def figures(self) -> str:
        """Score and threshold."""
        cut = "" if self.threshold is None else f", threshold {self.threshold:.3f}"
        return f"score {self.score:.3f}{cut}"


def margins(transform: nn.Module | None) -> list[int] | None:
    """Return what a transform crops off, in pixels left, right, above and below.

    ``None`` if it is not one ``Resize`` to a height and width and one ``CenterCrop`` within that.
    """
    resizes, crops = (extract_transforms_by_type(transform, kind) for kind in (Resize, CenterCrop))
    if len(resizes) != 1 or len(crops) != 1 or len(resizes[0].size) != 2:
        return None
    cropped = []
    for whole, part in zip(resizes[0].size[::-1], crops[0].size[::-1], strict=True):
        before = round((whole - part) / 2)  # as torchvision does
        cropped += [before, whole - part - before]
    return cropped if min(cropped) >= 0 else None


class VerdictVisualizer(ImageVisualizer):
    """Write a JPEG of each image that is tested or predicted, below ``images`` in the run's folder.

    Its caption says file, score, threshold and verdict, and is filled with colour, as the frame is, if the image is
    rejected. Panels show the image, its true defect if there is a mask, the anomaly map over it, and the outline of
    what is above the pixel threshold, if there is one. Called by hand it draws as anomalib's does, which a model
    that is given an ``ImageVisualizer`` has in its runs too.

    Args:
        side: Most pixels of a panel in height and width; strips, which are folded, get twice as many.
        output_dir: Where pictures go instead.
    """

    cannot_write = False  # in this run

    def __init__(self, side: int = 256, output_dir: str | Path | None = None) -> None:
        super().__init__(field_size=(side, side), output_dir=output_dir)
        self.side = side

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Draw a batch; warn, and draw no more, where a picture cannot be written."""
        if self.cannot_write:
            return
        try:
            self.draw(trainer, pl_module, outputs, batch, *args, **kwargs)
        except OSError as error:  # the results of the run are worth more than its pictures
            self.cannot_write = True
            rank_zero_warn(f"{self.output_dir}: pictures cannot be written ({error}): the others are left out")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try to write again."""
        del trainer, pl_module
        self.cannot_write = False

    on_predict_start = on_test_start

    def draw(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Draw a batch."""
        del outputs, args, kwargs
        own, data = getattr(pl_module, "post_processor", None), datamodule_of(trainer)
        scale, margin = scale_of(own), margins(transform_of(pl_module.pre_processor))
        names = (getattr(data, "name", None), getattr(data, "category", None))
        folder = Path(trainer.default_root_dir) / "images" if self.output_dir is None else self.output_dir
        for item in batch:
            path = item.image_path or ""
            target = generate_output_filename(path, folder, *names)
            verdict = Verdict(
                name="/".join(Path(path).parts[-2:]) or "an image without a name",
                score=float(item.pred_score),
                threshold=scale.threshold,
                is_rejected=None if item.pred_label is None else bool(item.pred_label),
                is_defective=None if item.gt_label is None else bool(item.gt_label),
            )
            picture = drawn(panels(item, scale, margin, self.side), verdict)
            # the whole name: a folder may hold 1.png and 1.bmp
            picture.save(target.with_name(f"{target.name}.jpg"), quality=90)

    on_predict_batch_end = on_test_batch_end


def panels(item: Any, scale: Scale, margin: list[int] | None, side: int) -> dict[str, np.ndarray]:
    """Return the panels of a picture ``(H, W, 3)``, 8 bits, by what they show; none is larger than ``side``."""
    image = cast(Tensor, item.image).float().clamp(0, 1).cpu()
    layers = {
        "map": item.anomaly_map,
        "truth": item.gt_mask,
        "found": item.pred_mask if scale.pixel_threshold is not None else None,
    }
    there = {
        name: values.float().cpu().reshape(1, *values.shape[-2:])
        for name, values in layers.items()
        if values is not None
    }
    if margin:
        image = whole_image(item.image_path, image, margin)
        # the margin is as normal as anything in the map
        there = {
            name: F.pad(values, margin, value=values.min().item() if name == "map" else 0.0)
            for name, values in there.items()
        }
    side = 2 * side if is_strip(image) else side
    height, width = (image := folded(image, gap=1)).shape[-2:]
    size = [max(1, round(extent * side / max(height, width))) for extent in (height, width)]
    picture = eight_bits(resize(image, size))
    shown = {"image": picture}
    if "truth" in there:
        shown["true defect"] = outlined(picture, resize(folded(there["truth"], gap=0), size) > 0.5)
    if "map" in there:
        values = folded(there["map"], gap=float(there["map"].min()))
        if not scale.normalised:
            values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
        colours = COLOURS[eight_bits(resize(values.clamp(0, 1), size).expand(3, -1, -1))[..., 0]]
        shown["anomaly map"] = (0.35 * picture + 0.65 * colours).astype(np.uint8)
    if "found" in there:
        shown["above the pixel threshold"] = outlined(picture, resize(folded(there["found"], gap=0), size) > 0.5)
    return shown


def whole_image(path: str | None, crop: Tensor, margin: list[int]) -> Tensor:
    """Return all of an image file ``(3, H, W)``, resized as it was before the crop, or the crop in grey without one."""
    left, right, above, below = margin
    height, width = crop.shape[-2] + above + below, crop.shape[-1] + left + right
    if not path:
        return F.pad(crop, margin, value=0.5)
    with Image.open(path) as file:
        resized = file.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255


def eight_bits(image: Tensor) -> np.ndarray:
    """Return an image ``(3, H, W)`` in [0, 1] as ``(H, W, 3)`` of 8 bits."""
    return (255 * image).round().byte().permute(1, 2, 0).contiguous().numpy()


def outlined(picture: np.ndarray, mask: Tensor) -> np.ndarray:
    """Draw the outline of a mask ``(1, H, W)``, in a colour that no surface has, with a dark line around."""
    inside, result = mask[0].numpy(), picture.copy()
    result[find_boundaries(inside, connectivity=2, mode="outer")] = CASING
    result[find_boundaries(inside, connectivity=2, mode="inner")] = OUTLINE
    return result


def drawn(shown: dict[str, np.ndarray], verdict: Verdict) -> Image.Image:
    """Return the panels side by side, with a caption above them."""
    ground, ink = UNJUDGED if verdict.is_rejected is None else REJECTED if verdict.is_rejected else ACCEPTED
    height = max(panel.shape[0] for panel in shown.values())
    width = sum(panel.shape[1] + GAP for panel in shown.values()) + GAP
    width = max(width, 420)  # or the caption would not be read
    picture = Image.new("RGB", (width, CAPTION + TITLE + height + GAP), ground)
    draw = ImageDraw.Draw(picture)
    small, bold = font("DejaVuSans.ttf", 14), font("DejaVuSans-Bold.ttf", 18)
    draw.text((GAP + 2, 6), fitting(str(verdict), bold, width - 2 * GAP), ink, bold)
    score = verdict.figures
    room = width - 4 * GAP - int(small.getlength(score))
    draw.text((GAP + 2, 33), fitting(verdict.name, small, room), ink, small)
    draw.text((width - GAP - 2, 33), score, ink, small, anchor="ra")
    left = GAP
    for title, panel in shown.items():
        draw.text((left + 2, CAPTION), fitting(title, small, panel.shape[1]), ink, small)
        picture.paste(Image.fromarray(panel), (left, CAPTION + TITLE))
        left += panel.shape[1] + GAP
    return picture


def font(file: str, size: int) -> ImageFont.FreeTypeFont:
    """Return one of matplotlib's fonts."""
    return ImageFont.truetype(str(FONTS / file), size)


def fitting(text: str, of: ImageFont.FreeTypeFont, width: float) -> str:
    """Return a text, without so much of its middle as would make it wider than some pixels."""
    text = text.encode(errors="replace").decode()  # a file's name may be no unicode
    kept, least = text, 2
    while of.getlength(kept) > width and len(text) > least:
        text = text[: len(text) // 2] + text[len(text) // 2 + 1 :]
        kept = f"{text[: len(text) // 2]}…{text[len(text) // 2 :]}"
    return kept
