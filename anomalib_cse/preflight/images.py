"""Image files: which ones a dataset reads, and what each of them is, told by its header or by all of its pixels."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from anomalib.data import AnomalibDataModule, PredictDataset
from anomalib.data.datasets.image.mvtecad import IMG_EXTENSIONS as PNG
from anomalib.data.utils import LabelName
from anomalib.data.utils.path import is_within_directory
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image, ImageStat
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..image_files import Oddity, and_others, left_out, linked, oddities, oddities_of, opened
from .findings import Finding, error, warning

DARK = 1.0  # standard deviation, of 255 grey values, that a covered lens stays below
IN_A_ROW = 5  # files, from the one that takes the fewest bytes, that show something: then the larger ones do
SIDE = 128  # of the pixels that are looked at first
UNCOMPRESSED = {"BMP", "PPM"}
HALF = 0.5  # of an image, that most defects do not cover
OF_MASKS = {"frames", "orientation"}  # oddities that change what anomalib reads of a mask


class Sample(NamedTuple):
    """An image, the mask of its defect or ``""``, and whether it has one."""

    image: str
    mask: str = ""
    is_defect: bool = False


class Mask(NamedTuple):
    """What a mask file holds, and what anomalib makes of it.

    Attributes:
        is_two_valued: Whether its pixels have two values at most.
        share: Of the image that anomalib counts as defect: pixels whose grey value is above 0.
        bright: Share of pixels that are brighter than half of the brightest.
    """

    is_two_valued: bool
    share: float
    bright: float

    @classmethod
    def of(cls, image: Image.Image) -> "Mask":
        """Read an opened file."""
        grey = np.asarray(image.convert("L"))  # as anomalib's read_mask does
        pixels = np.asarray(image).reshape(grey.size, -1)
        others = pixels[(pixels != pixels[0]).any(axis=1)]
        is_two_valued = not len(others) or bool((others == others[0]).all())
        return cls(is_two_valued, float((grey > 0).mean()), float((grey > grey.max() / 2).mean()))


class Header(NamedTuple):
    """What the beginning of an image file tells, and of a mask all of it, if that was read."""

    path: str
    width: int
    height: int
    mode: str  # Pillow's
    has_alpha: bool
    format: str  # Pillow's, or "" if it is not compressed
    bytes_per_value: float
    oddities: Sequence[Oddity] = ()
    mask: Mask | None = None

    @property
    def colours(self) -> str:
        """``"grey"``, ``"colour"``, or ``"palette"``, which may be either."""
        kind = self.mode.split(";")[0]
        return "palette" if kind in ("P", "PA") else "grey" if kind in ("1", "L", "LA", "La", "I", "F") else "colour"

    @property
    def is_deep(self) -> bool:
        """Whether it has more than 8 bits, which anomalib clips."""
        return any(oddity.kind == "deep" for oddity in self.oddities)


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


def read_header(path: str, *, whole: bool = False, is_mask: bool = False) -> Header:
    """Read the beginning of an image or mask file, or the ``whole`` of it; a ``ValueError`` names one that is none."""
    with opened(path) as image:
        width, height = image.size
        values = width * height * len(image.getbands())
        is_raw = image.format in UNCOMPRESSED or image.info.get("compression") == "raw"
        kind, size = "" if is_raw else str(image.format), Path(path).stat().st_size
        found = tuple(oddity for oddity in oddities_of(image) if not is_mask or oddity.kind in OF_MASKS)
        header = Header(path, width, height, image.mode, image.has_transparency_data, kind, size / values, found)
        if is_mask:
            return header._replace(mask=Mask.of(image)) if whole else header
        if whole:
            image.convert("RGB")
        return header


def read_samples(
    kind: str, samples: Iterable[Sample], headers: dict[str, Header], *, whole: bool, masks: bool = False
) -> tuple[list[Finding], list[Finding]]:
    """Read the images and masks that ``headers`` lacks, and add them to it.

    Args:
        kind: What to call the files.
        samples: What to read.
        headers: Of the files that have been read, by their paths.
        whole: Whether files are read to their ends, not their beginnings alone.
        masks: Whether masks are.

    Returns:
        Files that cannot be read, and masks that do not fit their images, or that anomalib may read otherwise than they
        were meant.
    """
    bar = {"console": Console(stderr=True), "transient": True}
    samples, found = list(dict.fromkeys(samples)), []
    unreadable: list[Finding] = []
    findings: list[Finding] = []
    for sample in track(samples, f"Reading {kind} images", **bar) if whole and samples else samples:  # type: ignore[arg-type]
        for path in files_of([sample]):
            is_mask = path == sample.mask
            to_end = whole or (masks and is_mask)
            try:
                headers[path] = headers.get(path) or read_header(path, whole=to_end, is_mask=is_mask)
            except ValueError as reason:
                unreadable.append(error(f"{kind} file {reason}"))
        image, mask = headers.get(sample.image), headers.get(sample.mask)
        if image and mask:
            findings += wrong_shape(image, mask)
            found.append(mask)
    return unreadable, [*findings, *misread_masks(found)]


def misread_masks(headers: Iterable[Header]) -> Iterator[Finding]:
    """Say, once of each kind, which masks anomalib may read otherwise than they were meant."""
    read = [(header.path, header.mask) for header in dict.fromkeys(headers) if header.mask]
    empty = [path for path, mask in read if not mask.share]
    full = [path for path, mask in read if mask.share == 1]
    graded = [(path, mask) for path, mask in read if not mask.is_two_valued]
    large = [(path, mask) for path, mask in read if HALF < mask.share < 1 and mask.is_two_valued]
    rule = "anomalib counts pixels whose grey value is above 0, whatever is in alpha"
    if empty:
        yield warning(
            f"{empty[0]}, the mask of a defect, is empty: pixel metrics count all of its image as good. {rule}: save "
            f"it as 0 and 255{and_others(empty)}"
        )
    if full:
        yield warning(
            f"{full[0]}, the mask of a defect, covers all: pixel metrics count all of its image as defective. {rule}: "
            f"save it as 0 and 255{and_others(full)}"
        )
    for path, mask in graded[:1]:
        yield warning(
            f"{path}, the mask of a defect, has more than two values: {mask.bright:.1%} of it are in the brighter "
            f"half, and {mask.share:.1%} count as defective. {rule}: save it as 0 and 255, without loss"
            f"{and_others(graded)}"
        )
    if 2 * len(large) > len(read):  # single ones there may be
        path, mask = large[0]
        yield warning(
            f"most masks cover more than half of their images, such as {path}, {mask.share:.1%}: are they inverted? "
            f"{rule}"
        )


def wrong_shape(image: Header, mask: Header) -> Iterator[Finding]:
    """Say so if a mask would be stretched to fit its image."""
    if other_proportions(image, mask.width, mask.height):
        yield error(
            f"the mask {mask.path} has {mask.width}x{mask.height} pixels, its image {image.path} "
            f"{image.width}x{image.height}: masks must have the proportions of their images"
        )


def region_findings(roi: tuple[str, int, int] | None, images: Iterable[Header]) -> Iterator[Finding]:
    """Say so if a region of interest, a file of a width and height, would be stretched over images."""
    if roi is None:
        return
    path, width, height = roi
    stretched = [image for image in images if other_proportions(image, width, height)]
    for image in stretched[:1]:
        yield error(
            f"roi: {path} has {width}x{height} pixels, the image {image.path} {image.width}x{image.height}: it must "
            f"have the proportions of all images{and_others(stretched)}"
        )


def other_proportions(image: Header, width: int, height: int) -> bool:
    """Whether a mask of a width and height has other proportions than an image."""
    # of a smaller copy, sides are off by a pixel
    return abs(image.width * height - image.height * width) > max(image.width, image.height, width, height)


def odd_files(headers: Iterable[Header]) -> list[Finding]:
    """Return which files are not what they seem."""
    return [warning(found) for found in oddities({Path(header.path): header.oddities for header in headers})]


def unread_files(datasets: Iterable[object]) -> list[Finding]:
    """Return what lies in the folders that datasets of one run were given, and is not read."""
    datasets = [getattr(dataset, "dataset", dataset) for dataset in datasets]  # of a Subset
    paths = [Path(path) for dataset in datasets for path in files_of(samples_of(dataset))]
    parents, folders = {path.parent for path in paths}, folders_of(datasets)
    if folders:
        found = left_out(folders, {path.suffix.lower() for path in (*paths, *other_files(datasets))})
    elif len(paths) < 2:  # a single file was meant
        return []
    elif any(isinstance(dataset, PredictDataset) for dataset in datasets):  # it tells files of any depth, no folder
        top = Path(os.path.commonpath(parents))
        found = chain(left_out([top], IMG_EXTENSIONS), linked([top.parent], parents))
    else:
        found = linked(parents, parents)
    return [warning(said) for said in found]


def folders_of(datasets: Iterable[object]) -> set[Path]:
    """Return the folders that anomalib's datasets were given, of those that tell."""
    found: set[Path] = set()
    for dataset in datasets:
        if hasattr(dataset, "root_category"):  # in MVTec AD's layout, and similar ones
            found.add(Path(dataset.root_category))
        given = [getattr(dataset, f"{kind}_dir", None) for kind in ("normal", "abnormal", "normal_test", "mask")]
        for folders in given if getattr(dataset, "extensions", None) is None else ():  # or it is the user's choice
            listed = [folders] if isinstance(folders, str | Path) else folders or ()
            found |= {Path(getattr(dataset, "root", None) or "") / folder for folder in listed}
    return found


def other_files(datasets: Iterable[object]) -> list[Path]:
    """Return the files beside images and masks that anomalib's datasets name, such as depth."""
    tables = [getattr(dataset, "samples", {}) for dataset in datasets]
    columns = [table[name] for table in tables for name in table if str(name).endswith("_path")]
    return [Path(path) for column in columns for path in column if isinstance(path, str | Path)]


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


def loader_findings(
    loaders: object, *, any_size: bool, whole: str = "", roi: tuple[str, int, int] | None = None
) -> list[Finding]:
    """Return what is found of the images that dataloaders read, for a model of one size or of ``any_size``.

    Args:
        loaders: A dataloader, or a list or dictionary of them.
        any_size: Whether images go into the network as they are.
        roi: See :class:`~anomalib_cse.preflight.ModelTraits`.
        whole: What to call the images, to have all of them read to their ends; else who reads them later will say
            what cannot be read.
    """
    headers: dict[str, Header] = {}
    loaders = loaders_in(loaders)
    samples = [sample for loader in loaders for sample in samples_of(loader.dataset)]
    unreadable, found = read_samples(whole, samples, headers, whole=bool(whole), masks=True)
    unread = unread_files(loader.dataset for loader in loaders)
    mixed = mixed_batches(loaders, headers) if any_size else ()
    shown = region_findings(roi, (headers[sample.image] for sample in samples if sample.image in headers))
    return [*(unreadable if whole else ()), *found, *odd_files(headers.values()), *unread, *mixed, *shown]


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
        if link.is_dir() or (link.suffix in PNG and not is_within_directory(category, link)):
            msg = f"{link} leads to {link.resolve()}: anomalib leaves such links out, copy what they lead to"
            raise ValueError(msg)
    folders = [path for part in ("test", "ground_truth") for path in category.glob(f"{part}/*") if path.is_dir()]
    for kind in sorted({path.name for path in folders} - {"good"}):
        images, masks = category / "test" / kind, category / "ground_truth" / kind
        found, expected = (sum(file.suffix in PNG for file in folder.glob("*")) for folder in (masks, images))
        if found != expected:
            msg = (
                f"{images} holds {expected} images (.png) and {masks} {found} masks: MVTec AD's layout has one for "
                "each, NAME_mask.png; anomalib's Folder takes other kinds of files, and does without masks"
            )
            raise ValueError(msg)
