"""Image files: opened with one kind of error, and what of them, or beside them, is not read."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from itertools import chain, islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms

# suffixes of what a user takes for a photograph, whether or not Pillow reads it
PHOTOGRAPHS = {
    *(".avif", ".bmp", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}
LOOKED_AT = 1000  # entries of a linked folder
UPRIGHT = (0, 1, None)  # orientations that say nothing
SRGB_GAMMA = 1 / 2.2
OTHER_GAMMA = 0.1  # share of it that is seen
OTHER_COLOUR = 16  # of 255: what grey profiles of gamma 2.2, and the many that are named sRGB, stay below


class Oddity(NamedTuple):
    """What of a file is not read as a viewer shows it: its kind, and what is to be said of it."""

    kind: str
    said: str


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, of which the header alone is read as yet.

    Raises:
        ValueError: If the file, which it names, does not hold an image, or not all of what is read of it.
    """
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow has a dozen kinds for broken files
        msg = f"{path} cannot be read as an image: {error}; replace it or take it out"
        raise ValueError(msg) from error


def oddities_of(image: Image.Image) -> tuple[Oddity, ...]:
    """Return what of an opened file is lost to anomalib, which has Pillow convert it to 8 bits of RGB."""
    return tuple(found for look in (deep, in_frames, turned, more_channels, other_colours) for found in look(image))


def deep(image: Image.Image) -> Iterator[Oddity]:
    """Say if an image has more than 8 bits, which Pillow clips."""
    if image.mode[:1] in ("I", "F"):
        yield Oddity(
            "deep",
            f"is of Pillow's mode {image.mode!r}: anomalib clips such images at 255, so that most 16-bit ones are "
            "white and floating-point ones black; convert them to 8 bits first",
        )


def in_frames(image: Image.Image) -> Iterator[Oddity]:
    """Say if a file holds several images."""
    if getattr(image, "is_animated", False):
        yield Oddity(
            "frames", "holds several pages or frames, of which the first is read alone: save each as a file of its own"
        )


def turned(image: Image.Image) -> Iterator[Oddity]:
    """Say if a viewer would turn or mirror an image; of a TIFF, Pillow does."""
    # not PNG's own method, which decodes all of the image to look behind it
    orientation = None if image.format == "TIFF" else Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    if orientation not in UPRIGHT:
        yield Oddity(
            "orientation",
            f"has the EXIF orientation {orientation}, by which viewers turn it and anomalib does not: turn the pixels "
            "(PIL.ImageOps.exif_transpose)",
        )


def more_channels(image: Image.Image) -> Iterator[Oddity]:
    """Say if an image has channels that are neither colours nor transparency, such as infrared."""
    count, known = getattr(image, "tag_v2", {}).get(277, 0), len(image.getbands())  # SamplesPerPixel
    if count > known or "X" in image.getbands():
        yield Oddity(
            "channels", f"has {max(count, known)} channels, of which the first 3 are read: save others as files"
        )


def other_colours(image: Image.Image) -> Iterator[Oddity]:
    """Say if colours are meant for another screen than sRGB, as a viewer shows them."""
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    kind = {"1": "L", "L": "L", "LA": "L", "La": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if profile:
        name, difference = colour_profile(profile, kind)
        if difference > OTHER_COLOUR:
            yield Oddity(
                "colours",
                f"has the colour profile {name!r}, by which viewers show values that differ by up to {difference} of "
                "255 from those that are read: convert it to sRGB",
            )
    elif gamma and "srgb" not in image.info and abs(gamma / SRGB_GAMMA - 1) > OTHER_GAMMA:
        yield Oddity("colours", f"is of gamma {gamma:.3g}, by which viewers change its values: convert it to sRGB")


@lru_cache
def colour_profile(profile: bytes, mode: str) -> tuple[str, int]:
    """Return an ICC profile's name, and how much values of a mode differ from sRGB at most, of 255.

    None of a profile that is broken, or of another mode: viewers do not follow these either.
    """
    bands = len(Image.new(mode, (1, 1)).getbands())
    levels = {1: 16, 3: 6, 4: 4}[bands]
    colours = np.array(list(product(np.linspace(0, 255, levels).round(), repeat=bands)), np.uint8)
    patches = Image.fromarray(colours[None, :, 0] if bands == 1 else colours[None], mode)
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        shown = ImageCms.profileToProfile(patches, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        name = ImageCms.getProfileDescription(source).strip()
    except (ImageCms.PyCMSError, OSError, TypeError):
        return "", 0
    difference = np.asarray(shown, int) - np.asarray(patches.convert("RGB"), int)
    return name, int(np.abs(difference).max())


def oddities(found: Mapping[Path, Sequence[Oddity]]) -> Iterator[str]:
    """Say, once of each kind, which image files are odd, or hidden: those anomalib takes for images like any other."""
    paths = sorted(found)
    for kind in dict.fromkeys(oddity.kind for path in paths for oddity in found[path]):
        said = [(path, oddity.said) for path in paths for oddity in found[path] if oddity.kind == kind]
        yield f"{said[0][0]} {said[0][1]}{and_others(said)}"
    hidden = [path for path in paths if path.name.startswith(".") or path.parent.name.startswith(".")]
    if hidden:
        yield f"{hidden[0]} is hidden, but counts as an image: if it is none, take it out{and_others(hidden)}"


def left_out(folders: Collection[Path], suffixes: Collection[str]) -> Iterator[str]:
    """Say, once of each kind, what in folders, and in those below them, is not read where files of some suffixes are.

    That is linked folders of images, and photographs of other kinds.
    """
    below = {Path(place): names for folder in folders for place, _, names in os.walk(folder)}
    yield from linked(below, [place for place, names in below.items() if names])
    others = sorted(
        place / name
        for place, names in below.items()
        for name in names
        if is_photograph(name) and Path(name).suffix.lower() not in suffixes
    )
    if others:
        yield f"{others[0]} is left out, as only {', '.join(sorted(suffixes))} are read: convert it{and_others(others)}"


def linked(places: Collection[Path], used: Collection[Path]) -> Iterator[str]:
    """Say which links in places lead to folders of images, other than ``used`` ones and those in the same place."""
    try:
        links = [Path(e) for place in places for e in os.scandir(place) if e.is_symlink() and e.is_dir()]
        known = {folder.resolve() for folder in used} if links else set()
        links = sorted(
            link
            for link in links
            if not any(folder.is_relative_to(link.resolve()) for folder in known)
            and not link.resolve().is_relative_to(link.parent.resolve())  # which is looked into without the link
            and holds_photographs(link)
        )
    except OSError:  # the files are not of this file system, or not to be listed
        return
    if links:
        yield (
            f"{links[0]} is a link to a folder, which is not looked into: give that folder, or copy it"
            f"{and_others(links)}"
        )


def holds_photographs(folder: Path) -> bool:
    """Whether a folder, or one in it, holds photographs, as far as its first entries tell."""
    entries = chain(folder.glob("*"), folder.glob("*/*"))
    return any(is_photograph(entry.name) for entry in islice(entries, LOOKED_AT))


def is_photograph(name: str) -> bool:
    """Whether a user would take a file for a photograph, by its name."""
    return Path(name).suffix.lower() in PHOTOGRAPHS


def and_others(found: Sequence[object]) -> str:
    """Return how many there are beside the first one, in words."""
    return f" ({len(found) - 1} others too)" if len(found) > 1 else ""
