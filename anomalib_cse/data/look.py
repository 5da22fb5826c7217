"""What there is to train and test with, before anything is learnt from it: counts, sizes, copies, empty pictures."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageStat

from ..checks import and_others, opened

ASPECTS = 1.1  # that widths to heights may differ by: less is no more than a crop by hand
SQUEEZED = 1.5  # times that resizing may shorten one side more than the other
DARK = 1.0  # standard deviation, of 255 grey values, that a covered lens stays below
IN_A_ROW = 5  # files, from the one that takes the fewest bytes, that show something: then the larger ones do
SIDE = 128  # of the pixels that are looked at first
BLOCK = 2**16
UNCOMPRESSED = {"BMP", "PPM"}


class Sample(NamedTuple):
    """An image, the mask of its defect or ``""``, and whether it has one."""

    image: str
    mask: str = ""
    is_defect: bool = False


class Header(NamedTuple):
    """What the beginning of an image file tells."""

    path: str
    width: int
    height: int
    mode: str  # Pillow's
    has_alpha: bool
    format: str  # Pillow's, or "" if it is not compressed
    bytes_per_value: float

    @property
    def colours(self) -> str:
        """``"grey"``, ``"colour"``, or ``"palette"``, which may be either."""
        kind = self.mode.split(";")[0]
        return "palette" if kind in ("P", "PA") else "grey" if kind in ("1", "L", "LA", "La", "I", "F") else "colour"

    @property
    def is_deep(self) -> bool:
        """Whether it has more than 8 bits, which anomalib clips."""
        return self.mode[:1] in ("I", "F")


class Look(NamedTuple):
    """What was found: one line of what there is, what makes results wrong, and what may."""

    summary: str
    errors: list[str]
    warnings: list[str]


def look(
    training: Sequence[Sample],
    validation: Sequence[Sample],
    test: Sequence[Sample],
    size: Sequence[int] | None = None,
) -> Look:
    """Look at images, which are resized to a height and width, ``()`` if they are not; decode no more than a few."""
    parts = {"training": list(dict.fromkeys(training)), "evaluation": list(dict.fromkeys((*validation, *test)))}
    if not any(parts.values()):
        return Look("", [], [])
    headers, errors = [], []
    for kind, samples in parts.items():
        found, unreadable = headers_of(sample.image for sample in samples)
        headers.append(found)
        errors += [f"{kind} file {reason}" for reason in unreadable]
    constant, unreadable = nearly_constant(headers[0])
    errors += [f"training file {reason}" for reason in unreadable]
    both = [*headers[0], *headers[1]]
    readable = {header.path for header in both}
    contradictions, warnings = copies(*([s for s in part if s.image in readable] for part in parts.values()))
    warnings += mixtures(both, size)
    if constant:
        warnings.append(
            f"{constant[0]} is nearly constant, as with the lens covered: it trains for nothing, take it out"
            f"{and_others(constant)}"
        )
    return Look(summary(training, validation, test, both), [*errors, *contradictions], warnings)


def header_of(path: str) -> Header:
    """Read the beginning of an image file; a ``ValueError`` names one that is none."""
    with opened(path) as image:
        width, height = image.size
        values = width * height * len(image.getbands())
        is_raw = image.format in UNCOMPRESSED or image.info.get("compression") == "raw"
        has_alpha = image.mode.endswith(("A", "a")) or "transparency" in image.info
        kind = "" if is_raw else str(image.format)
        return Header(path, width, height, image.mode, has_alpha, kind, size_of(Path(path)) / values)


def headers_of(paths: Iterable[str]) -> tuple[list[Header], list[str]]:
    """Return the headers of image files, and for those that have none the reasons, with their names."""
    headers, reasons = [], []
    for path in dict.fromkeys(paths):
        try:
            headers.append(header_of(path))
        except ValueError as error:
            reasons.append(str(error))
    return headers, reasons


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
            except ValueError as error:
                reasons.append(str(error))
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


def alike(paths: Sequence[str]) -> list[list[int]]:
    """Return groups of numbers: those of paths to the same contents. Few files are read, and fewer as a whole."""
    groups = [list(range(len(paths)))]
    for key in (size_of, middle_of, digest_of):
        parts: dict[tuple[int, object], list[int]] = defaultdict(list)
        for number, group in enumerate(groups):
            for index in group:
                parts[number, key(Path(paths[index]))].append(index)
        groups = [part for part in parts.values() if len(part) > 1]
    return groups


def size_of(path: Path) -> int:
    """Return how many bytes a file has."""
    return path.stat().st_size


def middle_of(path: Path) -> bytes:
    """Return a hash of some bytes from the middle of a file, which differ between images of one camera."""
    with path.open("rb") as file:
        file.seek(size_of(path) // 2)
        return hashlib.blake2b(file.read(BLOCK)).digest()


def digest_of(path: Path) -> bytes:
    """Return a hash of all of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def copies(training: Sequence[Sample], evaluation: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """Return what is wrong with images that occur twice, and what may be: good and defective, trained on and tested."""
    samples, contrary, leaked, repeated = [*training, *evaluation], [], [], []
    for group in alike([sample.image for sample in samples]):
        trained = [samples[number].image for number in group if number < len(training)]
        tested = [samples[number].image for number in group if number >= len(training)]
        good = [samples[number].image for number in group if not samples[number].is_defect]
        defective = [samples[number].image for number in group if samples[number].is_defect]
        repeated += [(copy, trained[0]) for copy in trained[1:]]
        if good and defective:
            contrary += [(copy, good[0]) for copy in defective]
        elif trained:
            leaked += [(copy, trained[0]) for copy in tested]
    errors, warnings = [], []
    if contrary:
        (copy, original) = contrary[0]
        errors.append(
            f"{copy} counts as defective, but {original}, the same image, as good: take one of them out"
            f"{and_others(contrary)}"
        )
    if leaked:
        (copy, original) = leaked[0]
        warnings.append(
            f"{copy} is to test with, but {original}, the same image, is trained on: the test flatters"
            f"{and_others(leaked)}"
        )
    if repeated:
        (copy, original) = repeated[0]
        warnings.append(f"{copy} is the same image as {original}, which trains twice{and_others(repeated)}")
    return errors, warnings


def squeeze(header: Header, size: Sequence[int]) -> float:
    """Return how many times more one side of an image is shortened than the other by resizing to a height and width."""
    ratio = header.width * size[0] / (header.height * size[1])
    return max(ratio, 1 / ratio)


def mixtures(headers: Sequence[Header], size: Sequence[int] | None) -> list[str]:
    """Return what may be wrong with images of several kinds, or of other proportions than they are resized to."""
    warnings = []
    order = sorted(headers, key=lambda header: header.width / header.height)
    worst = max(headers, key=lambda header: squeeze(header, size), default=None) if size else None
    if size and worst and squeeze(worst, size) > SQUEEZED:
        side = (size[0] * size[1] / (worst.width * worst.height)) ** 0.5  # as many pixels as now
        better = tuple(max(32, 32 * round(side * pixels / 32)) for pixels in (worst.height, worst.width))
        warnings.append(
            f"{worst.path} has {worst.width}x{worst.height} pixels (width x height); resized to {size[1]}x{size[0]}, "
            f"one side is shortened {squeeze(worst, size):.2g} times more than the other: give image_size the "
            f"proportions of the images, such as {better} (height, width)"
        )
    is_resized = size is None or bool(size)
    if is_resized and order and order[-1].width * order[0].height > ASPECTS * order[0].width * order[-1].height:
        narrow, wide = order[0], order[-1]
        warnings.append(
            f"images are resized to one shape, which distorts them differently: {narrow.path} has "
            f"{narrow.width}x{narrow.height} pixels, {wide.path} {wide.width}x{wide.height}"
        )
    grey, colour = ([header for header in headers if header.colours == kind] for kind in ("grey", "colour"))
    if grey and colour:
        fewer, more = sorted((grey, colour), key=len)
        warnings.append(
            f"{fewer[0].path} is {fewer[0].colours}, but {more[0].path} {more[0].colours}: they will differ by that "
            f"alone{and_others(fewer)}"
        )
    alpha = [header for header in headers if header.has_alpha]
    if alpha:
        warnings.append(
            f"{alpha[0].path} has an alpha channel: anomalib drops it, and shows what is transparent{and_others(alpha)}"
        )
    return warnings


def summary(
    training: Sequence[Sample], validation: Sequence[Sample], test: Sequence[Sample], headers: Sequence[Header]
) -> str:
    """Return one line of what there is: how many images, of what kind, and what to judge the model by."""
    parts = [f"{len(training)} training images, {kind_of(headers)}"]
    if set(validation) == set(test):
        parts += [f"{labels(test)} to validate and test with"] * bool(test)
    else:
        uses = ((validation, "validate"), (test, "test"))
        parts += [f"{labels(samples)} to {use} with" for samples, use in uses if samples]
    defective = {sample for sample in (*validation, *test) if sample.is_defect}
    masked = sum(bool(sample.mask) for sample in defective)
    if defective:
        parts.append({0: "no masks", len(defective): "all with masks"}.get(masked, f"{masked} with masks"))
    return "; ".join(parts)


def labels(samples: Sequence[Sample]) -> str:
    """Return how many images are good and how many are defective, in words."""
    defective = sum(sample.is_defect for sample in samples)
    return f"{len(samples) - defective} good and {defective} defective ones"


def kind_of(headers: Sequence[Header]) -> str:
    """Return sizes, colours and depth of images, in words."""
    if not headers:
        return "none of which can be read"
    order = sorted(headers, key=lambda header: (header.width * header.height, header.width))
    sizes = dict.fromkeys(f"{header.width}x{header.height}" for header in (order[0], order[-1]))
    colours = " and ".join(sorted({header.colours for header in headers}))
    depth = "some of more than 8 bits" if any(header.is_deep for header in headers) else "8 bits"
    return f"{' to '.join(sizes)} pixels, {colours}, {depth}"
