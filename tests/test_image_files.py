"""What of image files, and beside them, is not read as it was meant: each is said, and nothing of plain ones."""

import struct

import numpy as np
import pytest
from anomalib.data.utils import read_image, read_mask
from PIL import Image, ImageCms, ImageOps

from anomalib_cse.cse_gaussian.region import region_of
from anomalib_cse.image_files import left_out, oddities_of, opened
from anomalib_cse.preflight.findings import messages
from anomalib_cse.preflight.images import Header, Sample, read_header, read_samples, region_findings

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
SHAPE = np.zeros((24, 32), np.uint8)
SHAPE[4:12, 6:20] = 1


def profile(**primaries):
    """sRGB's ICC profile, with other primaries."""
    found = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for place in range(132, 132 + 12 * struct.unpack(">I", found[128:132])[0], 12):
        name, start, _ = struct.unpack(">4sII", found[place : place + 12])
        for values in filter(None, [primaries.get(name.decode().strip())]):
            found[start + 8 : start + 20] = struct.pack(">3i", *(round(65536 * value) for value in values))
    return bytes(found)


P3 = profile(rXYZ=(0.5151, 0.2412, -0.0011), gXYZ=(0.2920, 0.6922, 0.0419), bXYZ=(0.1571, 0.0666, 0.7841))


def saved(path, image=NOISE, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def kinds(path):
    with opened(path) as image:
        return {oddity.kind for oddity in oddities_of(image)}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_an_orientation_is_said_where_pixels_are_not_turned(suffix, tmp_path):
    for number in (1, 6):
        path = saved(tmp_path / f"{number}.{suffix}", exif=orientation(number))
        with Image.open(path) as image:
            shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB")) / 255
        read = read_image(path)
        is_the_same = read.shape == shown.shape and bool((read == shown).all())
        assert kinds(path) == (set() if is_the_same else {"orientation"})
    assert (suffix == "tif") is is_the_same


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "gif"])
def test_several_pages_are_said(suffix, tmp_path):
    assert not kinds(saved(tmp_path / f"one.{suffix}"))
    more = {"save_all": True, "append_images": [Image.fromarray(255 - NOISE)]}
    assert kinds(saved(tmp_path / f"two.{suffix}", **more)) == {"frames"}


def test_colours_of_other_screens_and_other_channels_are_said(tmp_path):
    assert not kinds(saved(tmp_path / "srgb.png", icc_profile=profile()))
    assert not kinds(saved(tmp_path / "grey.png", NOISE[..., 0], icc_profile=P3))  # which viewers ignore, too
    assert not kinds(saved(tmp_path / "broken.png", icc_profile=b"none"))
    for suffix in ("png", "jpg", "tif", "webp"):
        assert kinds(saved(tmp_path / f"wide.{suffix}", icc_profile=P3)) == {"colours"}
    infrared = Image.fromarray(np.dstack([NOISE, NOISE[..., :1]]), "RGBX")
    assert kinds(saved(tmp_path / "infrared.tif", infrared)) == {"channels"}


def in_alpha(mode):
    bands = [Image.fromarray(255 * SHAPE)]
    return Image.merge(mode, [Image.new("L", bands[0].size, 255)] * (len(mode) - 1) + bands)


MASKS = {  # what is said of a mask, and one that it is said of
    "": [Image.fromarray(255 * SHAPE), Image.fromarray(SHAPE), Image.fromarray(65535 * SHAPE.astype(np.uint16))],
    "has more than two values": [
        Image.fromarray(SHAPE * 100 + SHAPE.cumsum(0, np.uint8)),
        Image.fromarray(np.dstack([SHAPE * 3, SHAPE[::-1], SHAPE])),
    ],
    "covers all": [Image.fromarray(3 + 252 * SHAPE), in_alpha("LA"), in_alpha("RGBA")],
    "is empty": [
        Image.fromarray(0 * SHAPE),
        Image.fromarray(np.dstack([SHAPE, 0 * SHAPE, 0 * SHAPE])),
        Image.fromarray(np.dstack([0 * SHAPE, 0 * SHAPE, 4 * SHAPE])),
        Image.fromarray(SHAPE * np.float32(0.9)),
    ],
    "are they inverted": [Image.fromarray(255 * (1 - SHAPE))],
}


@pytest.mark.parametrize(("said", "mask"), [(said, mask) for said, masks in MASKS.items() for mask in masks])
def test_a_mask_that_anomalib_reads_otherwise_is_said(said, mask, tmp_path):
    suffix = "tif" if mask.mode == "F" else "png"
    sample = Sample(str(saved(tmp_path / "image.png")), str(saved(tmp_path / f"mask.{suffix}", mask)), is_defect=True)
    headers: dict[str, Header] = {}
    unreadable, found = read_samples("test", [sample], headers, whole=False, masks=True)
    _, doubts = messages([*unreadable, *found])
    assert len(doubts) == bool(said)
    assert all(said in doubt and sample.mask in doubt for doubt in doubts)
    assert headers[sample.mask].mask.share == read_mask(sample.mask, as_tensor=True).double().mean().item()


def test_a_jpeg_mask_is_said_with_what_anomalib_makes_of_it(tmp_path):
    path = str(saved(tmp_path / "mask.jpg", 255 * SHAPE))
    read = read_header(path, whole=True, is_mask=True).mask
    assert read.share == read_mask(path, as_tensor=True).double().mean().item()
    assert not read.is_two_valued
    assert read.bright == pytest.approx(SHAPE.mean(), abs=0.01)


def test_a_region_that_is_transparent_turned_or_of_several_pages_is_refused(tmp_path):
    indexed = Image.fromarray(SHAPE, "P")
    indexed.putpalette([255] * 6)
    regions = {
        "transparency": [("indexed.png", indexed, {"transparency": 0}), ("alpha.png", in_alpha("LA"), {})],
        "orientation 3": [("turned.png", 255 * SHAPE, {"exif": orientation(3)})],
        "several pages": [("pages.tif", 255 * SHAPE, {"save_all": True, "append_images": [Image.fromarray(SHAPE)]})],
    }
    regions["transparency"] += [("key.png", 254 + SHAPE, {"transparency": 254})]
    for said, files in regions.items():
        for name, image, options in files:
            with pytest.raises(ValueError, match=f"roi: .*{name}.*{said}"):
                region_of(saved(tmp_path / name, image, **options), None)


def test_a_region_of_other_proportions_is_refused(tmp_path):
    _, (path, width, height) = region_of(saved(tmp_path / "roi.png", 255 * SHAPE), None)
    image = read_header(str(saved(tmp_path / "image.png", np.tile(NOISE, (2, 2, 1)))))
    assert not list(region_findings((path, width, height), [image]))
    [found] = region_findings((path, width, height // 2), [image])
    assert found.is_error
    assert "roi.png has 32x12 pixels" in found.message
    assert "image.png 64x48" in found.message


def test_files_of_other_kinds_and_linked_folders_are_said_at_any_depth(tmp_path):
    for name in ("given/a/0.jpg", "given/b/1.TIF", "given/notes.txt", "other/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert not list(left_out([tmp_path / "given"], {".jpg", ".tif"}))
    (tmp_path / "given" / "c").symlink_to(tmp_path / "other")
    links, others = left_out([tmp_path / "given"], {".jpg"})
    assert f"{tmp_path}/given/c is a link to a folder" in links
    assert f"{tmp_path}/given/b/1.TIF is left out, as only .jpg are read" in others
