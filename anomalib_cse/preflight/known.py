"""Images of known defects, which a model learns from: which ones they are, and whether they are fit for that."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from anomalib.data.utils.image import is_image_file

from ..image_files import and_others
from .dataset import alike
from .findings import Finding, error
from .images import Header, Mask, Sample, odd_files, read_samples


def images_below(name: str, folder: str | Path) -> list[Path]:
    """Return the images in a folder that an argument of that name gives, and in those in it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"{name}: {folder} is not a folder: give one of images"
        raise FileNotFoundError(msg)
    found = sorted(path for path in folder.rglob("*") if is_image_file(path) and not path.is_dir())
    if not found:
        msg = f"{name}: {folder} holds no images of a kind that anomalib reads"
        raise ValueError(msg)
    return found


def known_samples(defects: str | Path, masks: str | Path | None, names: tuple[str, str]) -> list[Sample]:
    """Return images of known defects, with their masks if a folder of these is given.

    The mask of ``A/B.png`` is ``A/B.*`` or ``A/B_mask.*`` in its folder.

    Args:
        defects: A folder.
        masks: A folder, or ``None``.
        names: What to call both in errors.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no images, or an image has no mask or more than one.
    """
    images = images_below(names[0], defects)
    if masks is None:
        return [Sample(str(path), is_defect=True) for path in images]
    found: dict[str, list[Path]] = {}
    for path in images_below(names[1], masks):
        found.setdefault(str(path.relative_to(masks).with_suffix("")), []).append(path)
    samples = []
    for path in images:
        own = str(path.relative_to(defects).with_suffix(""))
        its = found.get(own, []) + found.get(f"{own}_mask", [])
        if len(its) != 1:
            count = "no mask" if not its else f"{len(its)} masks"
            msg = f"{path} has {count} in {masks}: give one, {own}.png or {own}_mask.png, or leave {names[1]} out"
            raise ValueError(msg)
        samples.append(Sample(str(path), str(its[0]), is_defect=True))
    return samples


def good_findings(good: Sequence[Sample]) -> Iterator[Finding]:
    """Say what is wrong with files of good images to learn of."""
    headers: dict[str, Header] = {}
    unreadable, found = read_samples("good image's", good, headers, whole=True)
    yield from (*unreadable, *found)
    yield from odd_files(headers.values())


def is_black(mask: Mask | None) -> bool:
    """Whether anomalib counts nothing of a mask as defect."""
    return mask is not None and not mask.share


def known_findings(known: Sequence[Sample], good: Sequence[Sample], evaluation: Sequence[Sample]) -> Iterator[Finding]:
    """Say what is wrong with images of known defects, also beside those to fit to and those to evaluate with."""
    headers: dict[str, Header] = {}
    unreadable, found = read_samples("known defect's", known, headers, whole=True)
    yield from (finding for finding in (*unreadable, *found) if finding.is_error)
    yield from odd_files(headers.values())
    empty = [s.mask for s in known if s.mask in headers and is_black(headers[s.mask].mask)]
    if empty:
        yield error(f"{empty[0]}, the mask of a known defect, is black: make it bright where it is{and_others(empty)}")
    known = [sample for sample in known if sample.image in headers]
    others = [*dict.fromkeys((*good, *evaluation))]
    as_good, as_test = [], []
    for group in alike([sample.image for sample in (*known, *others)]):
        mine = [known[number] for number in group if number < len(known)]
        theirs = [others[number - len(known)] for number in group if number >= len(known)]
        as_good += [(mine[0], other) for other in theirs if mine and not other.is_defect]
        as_test += [(mine[0], other) for other in theirs if mine and other.is_defect]
    for own, other in as_good[:1]:
        yield error(
            f"{own.image} counts as a known defect, but {other.image}, the same image, as good: take one of them out"
            f"{and_others(as_good)}"
        )
    for own, other in as_test[:1]:
        yield error(
            f"{own.image} is a known defect, and {other.image}, the same image, is to validate or test with, which "
            f"would flatter: take one of them out{and_others(as_test)}"
        )
