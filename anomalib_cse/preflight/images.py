"""Image files: which ones a dataset reads, and what each of them is, told by its header or by all of its pixels."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.image.mvtecad import IMG_EXTENSIONS
from anomalib.data.utils import LabelName
from anomalib.data.utils.path import is_within_directory
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image, ImageStat
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Subset

from ..checks import and_others, oddities, opened
from .findings import Finding, error, warning

DARK = 1.0  # standard deviation, of 255 grey values, that a covered lens stays below
IN_A_ROW = 5  # files, from the one that takes the fewest bytes, that show something: then the larger ones do
SIDE = 128  # of the pixels that are looked at first
UNCOMPRESSED = {"BMP", "PPM"}


class Sample(NamedTuple):
    """An image, the mask of its defect or ``""``, and whether it has one."""

    image: str
    mask: str = ""
    is_defect: bool = False


class Header(NamedTuple):
    """What the beginning of an image file tells, and whether all of it, if that was read, is black."""

    path: str
    width: int
    height: int
    mode: str  # Pillow's
    has_alpha: bool
    format: str  # Pillow's, or "" if it is not compressed
    bytes_per_value: float
    is_black: bool = False

    @property
    def colours(self) -> str:
        """``"grey"``, ``"colour"``, or ``"palette"``, which may be either."""
        kind = self.mode.split(";")[0]
        return "palette" if kind in ("P", "PA") else "grey" if kind in ("1", "L", "LA", "La", "I", "F") else "colour"

    @property
    def is_deep(self) -> bool:
        """Whether it has more than 8 bits, which anomalib clips."""
        return self.mode[:1] in ("I", "F")


def datasets_of(data: AnomalibDataModule | None) -> dict[str, object]:
    """Return the datasets of a datamodule to train, validate and test with; ``None`` for what it has not."""
    return {part: getattr(data, f"{part}_data", None) for part in ("train", "val", "test")}


def samples_of(dataset: object) -> list[Sample]:
    """Return the images that a dataset reads, with their masks; none of one that does not name them."""
    if isinstance(dataset, Subset):
        samples = samples_of(dataset.dataset)
        return [samples[index] for index in dataset.indices if samples]
    if hasattr(dataset, "image_filenames"):  # anomalib's PredictDataset
        return [Sample(str(path)) for path in dataset.image_filenames]
    table = getattr(dataset, "samples", {})  # anomalib's
    if "image_path" not in table:
        return []
    images = [str(path) for path in table["image_path"]]
    if "label_index" not in table:
        return [Sample(path) for path in images]
    defective = [bool(label == LabelName.ABNORMAL) for label in table["label_index"]]
    masks = table.get("mask_path", [""] * len(images))
    # anomalib reads masks of defects alone, whatever else is listed
    return [
        Sample(path, str(mask) if is_defect and isinstance(mask, str | Path) else "", is_defect)
        for path, mask, is_defect in zip(images, masks, defective, strict=True)
    ]


def files_of(samples: Iterable[Sample]) -> list[str]:
    """Return the files of samples, images and masks."""
    return [path for sample in samples for path in (sample.image, sample.mask) if path]


def read_header(path: str, *, whole: bool = False) -> Header:
    """Read the beginning of an image file, or the ``whole`` of it; a ``ValueError`` names one that is none."""
    with opened(path) as image:
        width, height = image.size
        values = width * height * len(image.getbands())
        is_raw = image.format in UNCOMPRESSED or image.info.get("compression") == "raw"
        has_alpha = image.mode.endswith(("A", "a")) or "transparency" in image.info
        kind, size = "" if is_raw else str(image.format), Path(path).stat().st_size
        mode, is_black = image.mode, whole and image.convert("RGB").getbbox() is None
        return Header(path, width, height, mode, has_alpha, kind, size / values, is_black)


def read_samples(kind: str, samples: Iterable[Sample], headers: dict[str, Header], *, whole: bool) -> list[Finding]:
    """Read the images and masks that ``headers`` lacks, whole ones or their beginnings, and add them to it.

    Returns:
        Files, of a ``kind``, that cannot be read, and masks that do not fit their images or are empty.
    """
    bar = {"console": Console(stderr=True), "transient": True}
    samples, findings, empty = list(dict.fromkeys(samples)), [], []
    for sample in track(samples, f"Reading {kind} images", **bar) if whole and samples else samples:  # type: ignore[arg-type]
        for path in files_of([sample]):
            try:
                headers[path] = headers.get(path) or read_header(path, whole=whole)
            except ValueError as reason:
                findings.append(error(f"{kind} file {reason}"))
        image, mask = headers.get(sample.image), headers.get(sample.mask)
        if image and mask:
            findings += wrong_shape(image, mask)
            empty += [mask.path] * mask.is_black
    if empty:
        said = f"{empty[0]}, the mask of a defect, is empty: pixel metrics count all of its image as good"
        findings.append(warning(said + and_others(empty)))
    return findings


def wrong_shape(image: Header, mask: Header) -> Iterator[Finding]:
    """Say so if a mask would be stretched to fit its image."""
    sides = image.width, image.height, mask.width, mask.height
    # of a smaller copy, sides are off by a pixel
    if abs(image.width * mask.height - image.height * mask.width) > max(sides):
        yield error(
            f"the mask {mask.path} has {mask.width}x{mask.height} pixels, its image {image.path} "
            f"{image.width}x{image.height}: masks must have the proportions of their images"
        )


def odd_files(headers: Iterable[Header]) -> list[Finding]:
    """Return which files are not what they seem."""
    return [warning(found) for found in oddities({Path(header.path): header.mode for header in headers})]


def loaders_in(loaders: object) -> list[DataLoader]:
    """Return the dataloaders out of one, or a list or dictionary of them."""
    found = CombinedLoader(loaders).flattened if loaders is not None else []
    return [loader for loader in found if isinstance(loader, DataLoader)]


def mixed_batches(loaders: Iterable[DataLoader], headers: Mapping[str, Header]) -> Iterator[Finding]:
    """Say so if batches would have images of several sizes, for a model that takes them as they are.

    anomalib would stretch all of a batch to the size of the largest, without a word.
    """
    for loader in loaders:
        batch_size = getattr(loader.batch_sampler, "batch_size", None)
        found = [headers[sample.image] for sample in samples_of(loader.dataset) if sample.image in headers]
        sizes = sorted({(header.width, header.height) for header in found})
        if len(sizes) > 1 and batch_size not in (1, None):  # None: a sampler of the user's own may sort by size
            (width, height), (other_width, other_height) = sizes[0], sizes[-1]
            yield error(
                f"images have several sizes ({width}x{height}, {other_width}x{other_height}, ...), so each needs a "
                f"batch of its own, not of {batch_size}: set train_batch_size and eval_batch_size to 1, or give the "
                "model an image_size"
            )


def loader_findings(loaders: object, *, any_size: bool, whole: str = "") -> list[Finding]:
    """Return what is found of the images that dataloaders read, for a model of one size or of ``any_size``.

    Args:
        loaders: A dataloader, or a list or dictionary of them.
        any_size: Whether images go into the network as they are.
        whole: What to call the images, to have all of them read to their ends; else who reads them later will say
            what cannot be read.
    """
    headers: dict[str, Header] = {}
    loaders = loaders_in(loaders)
    samples = [sample for loader in loaders for sample in samples_of(loader.dataset)]
    found = read_samples(whole, samples, headers, whole=bool(whole))
    mixed = mixed_batches(loaders, headers) if any_size else ()
    return [*(found if whole else ()), *odd_files(headers.values()), *mixed]


def nearly_constant(headers: Iterable[Header]) -> tuple[list[str], list[str]]:
    """Return the images whose grey values hardly differ, and why some cannot be read; most are not decoded.

    The less an image shows, the fewer bytes a compressed file takes, so those with the fewest are decoded until
    several in a row show something. A file that was cut off is among them, too. Uncompressed ones take little time.
    """
    found, reasons = [], []
    order = sorted((h for h in headers if not h.is_deep), key=lambda h: (h.format, h.bytes_per_value, h.path))
    for name, members in groupby(order, lambda header: header.format):
        in_a_row = 0
        for path in (member.path for member in members):
            try:
                is_constant = shows_nothing(path)
            except ValueError as reason:
                reasons.append(str(reason))
                continue
            found += [path] * is_constant
            in_a_row = 0 if is_constant else in_a_row + 1
            if name and in_a_row == IN_A_ROW:
                break
    return found, reasons


def shows_nothing(path: str) -> bool:
    """Whether an image is nearly of one grey; every pixel is looked at only if some of them do not tell."""

    def deviation(image: Image.Image) -> float:
        return ImageStat.Stat(image.convert("RGB").convert("L")).stddev[0]

    with opened(path) as image:
        return deviation(image.resize((SIDE, SIDE), Image.Resampling.NEAREST)) < DARK and deviation(image) < DARK


def check_layout(category: Path) -> None:
    """Raise a ``ValueError`` if a folder in MVTec AD's layout lacks masks, or has links that anomalib leaves out."""
    for link in filter(Path.is_symlink, category.rglob("*")):
        if link.is_dir() or (link.suffix in IMG_EXTENSIONS and not is_within_directory(category, link)):
            msg = f"{link} leads to {link.resolve()}: anomalib leaves such links out, copy what they lead to"
            raise ValueError(msg)
    folders = [path for part in ("test", "ground_truth") for path in category.glob(f"{part}/*") if path.is_dir()]
    for kind in sorted({path.name for path in folders} - {"good"}):
        images, masks = category / "test" / kind, category / "ground_truth" / kind
        found, expected = (
            sum(file.suffix in IMG_EXTENSIONS for file in folder.glob("*")) for folder in (masks, images)
        )
        if found != expected:
            msg = (
                f"{images} holds {expected} images (.png) and {masks} {found} masks: MVTec AD's layout has one for "
                "each, NAME_mask.png; anomalib's Folder takes other kinds of files, and does without masks"
            )
            raise ValueError(msg)
