import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from anomalib_cse.synthesis import (
    KINDS,
    AnomalySynthesis,
    builtin_textures,
    download_textures,
    generator_for,
    load_textures,
    textures_from,
)
from anomalib_cse.synthesis.transform import STRUCTURAL_OPERATIONS, TEXTURAL_OPERATIONS


@pytest.fixture
def textures():
    return torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def images():
    return torch.rand(6, 3, 48, 56, generator=torch.Generator().manual_seed(4))


def test_generator_determines_the_defects_and_the_global_one_is_left_alone(images, textures):
    state = torch.get_rng_state()
    synthesis = AnomalySynthesis(textures)
    first, again, other = (synthesis(images, generator_for(seed)) for seed in (7, 7, 8))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)
    synthesis(images)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_seed_gives_the_defects_that_it_always_gave(textures, generator):
    params = AnomalySynthesis(textures).sample((4, 3, 32, 32), generator)
    assert params.mask.sum(dim=(1, 2, 3)).tolist() == [33, 60, 11, 32]
    assert params.kind.tolist() == [2, 2, 1, 2]
    assert params.operations[0].nonzero().flatten().tolist() == [0, 1, 2]
    names = ["texture", "angle", "brightness", "offset", "hue", "saturation", "shift", "gamma", "sharpness", "solarise"]
    first = [getattr(params, name)[0].flatten()[0].item() for name in names]
    assert first == pytest.approx([2, -33.66, 1.034, -0.036, 0.93, 1.372, -0.133, 1.555, 2.933, 0.32], abs=1e-3)
    assert params.levels.tolist() == [256, 32, 256, 16]
    assert params.kernel_size.tolist() == [5, 15, 15, 9]


def test_kinds_are_equally_likely(textures, generator):
    counts = AnomalySynthesis(textures).sample((3000, 3, 8, 8), generator).kind.bincount(minlength=3)
    assert (counts - 1000).abs().max() < 3 * (3000 * 2 / 9) ** 0.5
    kinds = AnomalySynthesis(textures, kinds=["blur", "textural"]).sample((100, 3, 8, 8), generator).kind
    assert kinds.unique().tolist() == [1, 2]


def test_three_operations_of_each_kind_are_drawn_equally_often(textures, generator):
    params = AnomalySynthesis(textures).sample((2000, 3, 8, 8), generator)
    for kind, count in ((0, 5), (1, 9)):
        drawn = params.operations[params.kind == kind]
        assert (drawn[:, :count].sum(1) == 3).all()
        assert not drawn[:, count:].any()
        assert (drawn[:, :count].float().mean(0) - 3 / count).abs().max() < 0.1


def test_parameters_have_the_ranges_of_the_paper(textures, generator):
    params = AnomalySynthesis(textures).sample((2000, 3, 8, 8), generator)
    ranges = {
        "angle": (-45, 45),
        "brightness": (0.8, 1.2),
        "hue": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "offset": (-30 / 255, 30 / 255),
        "shift": (-50 / 255, 50 / 255),
        "gamma": (0.5, 2),
        "sharpness": (0, 3),
        "solarise": (32 / 255, 128 / 255),
    }
    for name, (low, high) in ranges.items():
        least, most = getattr(params, name).aminmax()
        assert low <= least < low + 0.02 * (high - low), name
        assert high - 0.02 * (high - low) < most <= high, name
    assert params.kernel_size.unique().tolist() == [5, 7, 9, 11, 13, 15]
    assert params.levels.unique().tolist() == [2, 4, 8, 16, 32, 64, 128, 256]
    assert params.texture.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(params.cells.sort(1).values, torch.arange(64).expand(2000, -1))
    assert torch.allclose(params.flip.float().mean(0), torch.tensor(0.5), atol=0.05)


def test_generators_of_different_numbers_are_independent():
    numbers = [(), (0,), (1,), (1, 0), (0, 1), (1, 0, 0), (2**32,), (3, 5), (5, 3)]
    streams = torch.stack([torch.rand(1000, generator=generator_for(*n)) for n in numbers])
    assert (streams.corrcoef() - torch.eye(len(numbers))).abs().max() < 0.15
    assert torch.equal(streams[-1], torch.rand(1000, generator=generator_for(5, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_images_one_by_one(kind, images, textures, generator):
    synthesis = AnomalySynthesis(textures, kinds=[kind])
    params = synthesis.sample(images.shape, generator)
    before = images.clone()
    batch = synthesis.apply(images, params)
    singles = torch.cat([synthesis.apply(images[i : i + 1], params[i : i + 1]) for i in range(len(images))])
    assert torch.allclose(batch, singles, atol=1e-6)
    assert torch.equal(images, before)
    assert (batch - images)[params.mask.expand_as(images)].abs().mean() > 0.02


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 5), st.just(3), st.integers(2, 70), st.integers(2, 70)),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    kind=st.sampled_from(KINDS),
)
def test_nothing_changes_outside_the_masks_and_values_stay_in_range(seed, shape, dtype, kind):
    generator = generator_for(seed)
    textures = torch.randint(0, 256, (2, 3, 9, 14), generator=generator, dtype=torch.uint8)
    images = torch.rand(shape, generator=generator).to(dtype)
    corrupted, masks = AnomalySynthesis(textures, kinds=[kind])(images, generator)
    assert (corrupted.shape, corrupted.dtype) == (images.shape, dtype)
    assert masks.shape == (shape[0], 1, *shape[2:])
    assert torch.equal(torch.where(masks, images, corrupted), images)
    assert ((corrupted >= 0) & (corrupted <= 1)).all()


def eight_bits(images):
    return (255 * images).round().to(torch.uint8)


def paint(images, kind, operation=None, **drawn):
    """Replace images wholly by defects of one kind with one operation or none; the textures are the images."""
    synthesis = AnomalySynthesis(eight_bits(images), kinds=[kind])
    params = synthesis.sample(images.shape, generator_for(0))
    plain = {"mask": params.mask | True, "texture": torch.arange(len(images)), "cells": torch.arange(64).repeat(9, 1)}
    params = replace(params, operations=params.operations & False, **(plain | drawn))
    if operation:
        listed = STRUCTURAL_OPERATIONS if kind == "structural" else TEXTURAL_OPERATIONS
        params.operations[:, list(listed).index(operation)] = True
    return synthesis.apply(images, params)


def recolour(image, change):
    """Change hue, saturation and value of every pixel by the standard library."""
    pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p.tolist()))) for p in image.flatten(1).T]
    return torch.tensor(pixels).T.reshape(image.shape)


def rotate_among_mirrored(image, degrees):
    row = torch.cat([image.flip(2), image, image.flip(2)], dim=2)
    mosaic = torch.cat([row.flip(1), row, row.flip(1)], dim=1)
    _, height, width = image.shape
    rotated = TF.rotate(mosaic, degrees, interpolation=TF.InterpolationMode.BILINEAR)
    return rotated[:, height : 2 * height, width : 2 * width]


TWO = torch.tensor([0.6, 1.4])  # one factor per image
HUES, SATURATIONS = torch.tensor([0.15, -0.15]), torch.tensor([-0.2, 0.2])

ORACLES = {  # what is drawn for two images, and the operation on image x with index i by other means
    ("structural", "flip"): ({"flip": torch.eye(2).bool()}, lambda x, i: x.flip(2 - i)),
    ("structural", "rotate"): ({"angle": 30 * TWO}, lambda x, i: rotate_among_mirrored(x, 30 * TWO[i].item())),
    ("structural", "brightness"): ({"brightness": TWO}, lambda x, i: (x * TWO[i]).clamp(max=1)),
    ("structural", "saturation"): (
        {"saturation": TWO},
        lambda x, i: recolour(x, lambda h, s, v: (h, min(1, s * TWO[i].item()), v)),
    ),
    ("structural", "hue"): ({"hue": TWO}, lambda x, i: recolour(x, lambda h, s, v: (h * TWO[i].item(), s, v))),
    ("textural", "gamma"): (
        {"gamma": torch.stack([TWO, TWO**2, 1 / TWO], dim=1)},
        lambda x, i: torch.stack([x[0] ** TWO[i], x[1] ** TWO[i] ** 2, x[2] ** (1 / TWO[i])]),
    ),
    ("textural", "brightness"): ({"brightness": TWO, "offset": HUES}, lambda x, i: (x * TWO[i] + HUES[i]).clamp(0, 1)),
    ("textural", "sharpen"): ({"sharpness": 2 * TWO}, lambda x, i: TF.adjust_sharpness(x, 2 * TWO[i].item())),
    ("textural", "hue_and_saturation"): (
        {"shift": torch.stack([HUES, SATURATIONS], dim=1)},
        lambda x, i: recolour(
            x, lambda h, s, v: ((h + HUES[i].item()) % 1, min(1, max(0, s + SATURATIONS[i].item())), v)
        ),
    ),
    ("textural", "solarise"): ({"solarise": TWO / 3}, lambda x, i: TF.solarize(x, TWO[i].item() / 3)),
    ("textural", "posterise"): (
        {"levels": torch.tensor([2, 16])},
        lambda x, i: TF.posterize(eight_bits(x), (1, 4)[i]).float() / 256,
    ),
    ("textural", "invert"): ({}, lambda x, i: 1 - x),
    ("textural", "autocontrast"): ({}, lambda x, i: TF.autocontrast(x)),
    ("textural", "equalise"): ({}, lambda x, i: TF.equalize(eight_bits(x)).float() / 255),
}


def test_every_operation_has_an_oracle():
    listed = {"structural": STRUCTURAL_OPERATIONS, "textural": TEXTURAL_OPERATIONS}
    assert list(ORACLES) == [(kind, name) for kind, names in listed.items() for name in names]


@pytest.mark.parametrize(("kind", "operation"), ORACLES)
def test_operation_equals_its_oracle(kind, operation):
    drawn, oracle = ORACLES[kind, operation]
    grey = torch.tensor([0.0, 0.2, 1.0]).expand(2, 3, 16, 3)  # of no hue
    images = eight_bits(0.1 + 0.7 * torch.cat([torch.rand(2, 3, 16, 17), grey], dim=3)) / 255
    for i, painted in enumerate(paint(images, kind, operation, **drawn)):
        assert torch.allclose(painted, oracle(images[i], i), atol=1e-5)


@pytest.mark.parametrize("size", [(16, 24), (13, 22)])
def test_cells_are_shuffled_within_each_image(size):
    images, order = torch.rand(2, 3, *size), torch.stack([torch.randperm(64), torch.arange(64)])
    shuffled = paint(images, "structural", cells=order)
    assert torch.equal(shuffled[1], images[1])
    h, w = (math.ceil(side / 8) for side in size)
    padded = F.pad(images[0], (0, 8 * w - size[1], 0, 8 * h - size[0]), mode="replicate")
    expected = torch.zeros_like(padded)
    for cell, source in enumerate(order[0].tolist()):
        (row, column), (r, c) = divmod(cell, 8), divmod(source, 8)
        taken = padded[:, r * h : (r + 1) * h, c * w : (c + 1) * w]
        expected[:, row * h : (row + 1) * h, column * w : (column + 1) * w] = taken
    assert torch.equal(shuffled[0], expected[:, : size[0], : size[1]])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_blur_has_sigma_6_and_the_drawn_width(layout):
    images, widths = torch.rand(3, 3, 20, 30), (5, 9, 15)
    blurred = paint(images.contiguous(memory_format=layout), "blur", kernel_size=torch.tensor(widths))
    for image, width, result in zip(images, widths, blurred, strict=True):
        expected = TF.gaussian_blur(F.pad(image, (7,) * 4, mode="replicate"), width, 6.0)[:, 7:-7, 7:-7]
        assert torch.allclose(result, expected, atol=1e-6)


def test_textural_source_is_the_drawn_texture_at_the_size_of_the_images():
    synthesis = AnomalySynthesis(torch.tensor([0, 51, 102], dtype=torch.uint8).repeat(8, 8, 3, 1).permute(3, 2, 0, 1))
    params = synthesis.sample((3, 3, 32, 20), generator_for(0))
    params = replace(params, kind=torch.ones(3).long(), operations=torch.zeros(3, 9).bool(), mask=params.mask | True)
    painted = synthesis.apply(torch.ones(3, 3, 32, 20), replace(params, texture=torch.tensor([2, 0, 1])))
    assert torch.allclose(painted, torch.tensor([0.4, 0, 0.2])[:, None, None, None])


def test_moved_synthesis_is_the_same(images, textures):
    synthesis = AnomalySynthesis(textures, kinds=["blur", "textural"])
    moved = synthesis.to(torch.device("cpu"))
    assert torch.equal(moved(images, generator_for(1))[0], synthesis(images, generator_for(1))[0])


OUT_OF_RANGE = {
    "textures": [None, torch.zeros(1, 3, 0, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)],
    "kinds": ["blur", [], ["scratch"], ["blur", 3], [["blur"]], {"blur"}, 3, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, given in OUT_OF_RANGE.items() for value in given])
def test_arguments_out_of_range_are_refused(name, value, textures):
    with pytest.raises(ValueError, match=rf"^{name} must .*, got "):
        AnomalySynthesis(**{"textures": textures, name: value})


def test_whole_number_images_are_refused(textures):
    with pytest.raises(TypeError, match=r"floating point in \[0, 1\], got torch.uint8"):
        AnomalySynthesis(textures)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_textures_are_read_from_a_folder(texture_folder, generator):
    textures = load_textures(texture_folder, 10, 32, generator)
    assert textures.shape == (3, 3, 32, 32)
    assert sorted(textures.float().mean(dim=(1, 2, 3)).round().tolist()) == pytest.approx([0, 60, 120], abs=2)
    assert load_textures(texture_folder, 2, 32, generator).shape == (2, 3, 32, 32)
    assert textures_from(texture_folder, generator).shape == (3, 3, 256, 256)


def test_textures_that_cannot_be_read_are_refused(texture_folder):
    with pytest.raises(FileNotFoundError, match="no photographs"):
        load_textures(texture_folder / "nowhere", 10, 32)
    (texture_folder / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read"):
        load_textures(texture_folder, 10, 32)


def test_photographs_of_more_than_eight_bits_are_warned_of(tmp_path, generator):
    Image.fromarray(np.full((40, 50), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.warns(UserWarning, match=r"deep\.png is of Pillow's mode 'I;16': anomalib clips such images at 255"):
        load_textures(tmp_path, 4, 16, generator)


def test_builtin_textures_differ_and_are_reproducible():
    textures = textures_from("builtin", generator_for(0))
    assert textures.shape == (512, 3, 256, 256)
    assert torch.equal(textures[:32], builtin_textures(32, 256, generator_for(0)))
    assert textures[:32].float().std(dim=(2, 3)).min() > 1
    assert len({tuple(t[:, ::64, ::64].flatten().tolist()) for t in textures}) == 512


def test_download_is_complete_or_begun_anew(tmp_path, monkeypatch):
    folder, calls = tmp_path / "dtd", []

    def download(url, download_root, md5):
        calls.append(url)
        root = tmp_path / "dtd.unfinished" / "dtd"
        assert str(root) == str(download_root)
        assert not root.exists()
        (root / "dtd" / "images" / "striped").mkdir(parents=True)
        if len(calls) == 1:
            raise ConnectionError
        (root / "dtd-r1.0.1.tar.gz").write_bytes(b"archive")
        (root / "dtd" / "labels").mkdir()
        (root / "dtd" / "labels" / "train1.txt").write_text("striped/0.jpg\n")
        Image.new("RGB", (40, 30), "white").save(root / "dtd" / "images" / "striped" / "0.jpg")

    monkeypatch.setattr("torchvision.datasets.dtd.download_and_extract_archive", download)
    with pytest.raises(ConnectionError):
        download_textures(folder)
    assert not folder.exists()
    folder.mkdir()
    download_textures(folder)
    assert (load_textures(folder, 10, 8) == 255).all()
    assert not list(tmp_path.rglob("*.tar.gz"))
    download_textures(folder)
    assert len(calls) == 2
