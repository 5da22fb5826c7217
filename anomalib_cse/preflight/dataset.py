"""What images are together, before anything is learnt from them: counts, sizes, copies, empty pictures."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from ..image_files import and_others
from .findings import Finding, error, warning
from .images import Header, Sample, nearly_constant, odd_files, read_samples

ASPECTS = 1.1  # that widths to heights may differ by: less is no more than a crop by hand
SQUEEZED = 1.5  # times that resizing may shorten one side more than the other
BLOCK = 2**16


def inspect(
    training: Sequence[Sample],
    validation: Sequence[Sample],
    test: Sequence[Sample],
    size: Sequence[int] | None = None,
    *,
    whole: Collection[str] = (),
) -> tuple[str, list[Finding], dict[str, Header]]:
    """Look at images, which are resized to a height and width, ``()`` if they are not.

    Files are opened once, but for the few training images that may show nothing and those that may be copies. Out of
    ``"training"`` and ``"evaluation"`` images, the ``whole`` ones are read to their ends.

    Returns:
        One line of what there is, what is wrong or may be, and the headers by their paths.
    """
    parts = {"evaluation": list(dict.fromkeys((*validation, *test))), "training": list(dict.fromkeys(training))}
    if not any(parts.values()):
        return "", [], {}
    headers: dict[str, Header] = {}
    findings: list[Finding] = []
    for kind, samples in parts.items():
        unreadable, found = read_samples(kind, samples, headers, whole=kind in whole)
        findings += [*found, *unreadable]
    trained, evaluated = (
        [headers[path] for path in dict.fromkeys(s.image for s in parts[kind]) if path in headers]
        for kind in ("training", "evaluation")
    )
    constant, torn = nearly_constant(trained)
    both = [*trained, *evaluated]
    findings += [error(f"training file {reason}") for reason in torn]
    findings += copies(*([s for s in parts[kind] if s.image in headers] for kind in ("training", "evaluation")))
    findings += odd_files(headers.values())
    findings += mixtures(both, size)
    if constant:
        findings.append(
            warning(
                f"{constant[0]} is nearly constant, as with the lens covered: it trains for nothing, take it out"
                f"{and_others(constant)}"
            )
        )
    return summary(training, validation, test, both), findings, headers


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


def copies(training: Sequence[Sample], evaluation: Sequence[Sample]) -> Iterator[Finding]:
    """Say what is wrong with images that occur twice, and what may be: good and defective, trained on and tested."""
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
    for copy, original in contrary[:1]:
        yield error(
            f"{copy} counts as defective, but {original}, the same image, as good: take one of them out"
            f"{and_others(contrary)}"
        )
    for copy, original in leaked[:1]:
        yield warning(
            f"{copy} is to test with, but {original}, the same image, is trained on: the test flatters"
            f"{and_others(leaked)}"
        )
    for copy, original in repeated[:1]:
        yield warning(f"{copy} is the same image as {original}, which trains twice{and_others(repeated)}")


def squeeze(header: Header, size: Sequence[int]) -> float:
    """Return how many times more one side of an image is shortened than the other by resizing to a height and width."""
    ratio = header.width * size[0] / (header.height * size[1])
    return max(ratio, 1 / ratio)


def mixtures(headers: Sequence[Header], size: Sequence[int] | None) -> Iterator[Finding]:
    """Say what may be wrong with images of several kinds, or of other proportions than they are resized to."""
    order = sorted(headers, key=lambda header: header.width / header.height)
    worst = max(headers, key=lambda header: squeeze(header, size), default=None) if size else None
    if size and worst and squeeze(worst, size) > SQUEEZED:
        side = (size[0] * size[1] / (worst.width * worst.height)) ** 0.5  # as many pixels as now
        better = tuple(max(32, 32 * round(side * pixels / 32)) for pixels in (worst.height, worst.width))
        yield warning(
            f"{worst.path} has {worst.width}x{worst.height} pixels (width x height); resized to {size[1]}x{size[0]}, "
            f"one side is shortened {squeeze(worst, size):.2g} times more than the other: give image_size the "
            f"proportions of the images, such as {better} (height, width)"
        )
    is_resized = size is None or bool(size)
    if is_resized and order and order[-1].width * order[0].height > ASPECTS * order[0].width * order[-1].height:
        narrow, wide = order[0], order[-1]
        yield warning(
            f"images are resized to one shape, which distorts them differently: {narrow.path} has "
            f"{narrow.width}x{narrow.height} pixels, {wide.path} {wide.width}x{wide.height}"
        )
    grey, colour = ([header for header in headers if header.colours == kind] for kind in ("grey", "colour"))
    if grey and colour:
        fewer, more = sorted((grey, colour), key=len)
        yield warning(
            f"{fewer[0].path} is {fewer[0].colours}, but {more[0].path} {more[0].colours}: they will differ by that "
            f"alone{and_others(fewer)}"
        )
    alpha = [header for header in headers if header.has_alpha]
    if alpha:
        yield warning(
            f"{alpha[0].path} has an alpha channel: anomalib drops it, and shows what is transparent{and_others(alpha)}"
        )


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
