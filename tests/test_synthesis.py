import colorsys
from dataclasses import fields

import pytest
import torch
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from anomalib_cse.colour import hsv_to_rgb, rgb_to_hsv
from anomalib_cse.synthesis import (
    KINDS,
    STRUCTURAL_OPERATIONS,
    TEXTURAL_OPERATIONS,
    AnomalySynthesis,
    gaussian_blur,
    shuffle_cells,
)
from anomalib_cse.textures import builtin_textures, load_textures


@pytest.fixture
def textures():
    return torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def images():
    return torch.rand(6, 3, 48, 56, generator=torch.Generator().manual_seed(4))


def test_hsv_equals_colorsys():
    pixels = torch.cat([torch.rand(50, 3), torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 1]])])
    expected = torch.tensor([colorsys.rgb_to_hsv(*pixel.tolist()) for pixel in pixels])
    hsv = rgb_to_hsv(pixels[:, :, None, None])
    assert torch.allclose(hsv[:, :, 0, 0], expected, atol=1e-5)
    back = torch.tensor([colorsys.hsv_to_rgb(*pixel.tolist()) for pixel in expected])
    assert torch.allclose(hsv_to_rgb(hsv)[:, :, 0, 0], back, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_images_one_by_one(kind, images, textures, generator):
    synthesis = AnomalySynthesis(textures, kinds=[kind])
    params = synthesis.sample(images.shape, generator)
    before = images.clone()
    batch = synthesis.apply(images, params)
    singles = torch.cat([synthesis.apply(images[i : i + 1], params[i : i + 1]) for i in range(len(images))])
    assert torch.allclose(batch, singles, atol=1e-6)
    assert torch.equal(images, before)
    outside = ~params.mask.expand_as(images)
    assert torch.equal(batch[outside], images[outside])
    assert (batch - images)[~outside].abs().mean() > 0.02
    assert batch.min() >= 0
    assert batch.max() <= 1


def test_same_generator_gives_the_same_and_the_global_state_is_left_alone(images, textures):
    state = torch.get_rng_state()
    results = [AnomalySynthesis(textures, generator=torch.Generator().manual_seed(7))(images) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(
        AnomalySynthesis(textures, generator=torch.Generator().manual_seed(8))(images)[0], results[0][0]
    )


def test_same_params_replay(images, textures, generator):
    synthesis = AnomalySynthesis(textures)
    params = synthesis.sample(images.shape, generator)
    assert torch.equal(synthesis.apply(images, params), synthesis.apply(images, params))


def test_probability(textures, generator):
    images = torch.rand(2000, 3, 16, 16)
    corrupted, masks = AnomalySynthesis(textures, probability=0.5, generator=generator)(images)
    hits = masks.flatten(1).any(1)
    assert abs(hits.float().mean() - 0.5) < 3 * (0.25 / 2000) ** 0.5
    assert torch.equal(corrupted[~hits], images[~hits])
    untouched, none = AnomalySynthesis(textures, probability=0.0, generator=generator)(images[:8])
    assert torch.equal(untouched, images[:8])
    assert not none.any()


def test_kinds_are_drawn_by_their_weights(textures, generator):
    params = AnomalySynthesis(textures).sample((3000, 3, 8, 8), generator)
    counts = params.kind.bincount(minlength=3)
    assert (counts - 1000).abs().max() < 3 * (3000 * 2 / 9) ** 0.5
    params = AnomalySynthesis(textures, kinds={"blur": 1, "textural": 3}).sample((3000, 3, 8, 8), generator)
    counts = params.kind.bincount(minlength=3)
    assert counts[0] == 0
    assert abs(counts[1] - 2250) < 3 * (3000 * 3 / 16) ** 0.5


def test_three_operations_of_each_kind(textures, generator):
    params = AnomalySynthesis(textures).sample((2000, 3, 8, 8), generator)
    for kind, operations in enumerate((STRUCTURAL_OPERATIONS, TEXTURAL_OPERATIONS)):
        drawn = params.operations[params.kind == kind]
        assert (drawn[:, : len(operations)].sum(1) == 3).all()
        assert not drawn[:, len(operations) :].any()
        share = drawn[:, : len(operations)].float().mean(0)
        assert (share - 3 / len(operations)).abs().max() < 0.1


@pytest.mark.parametrize(
    "option", ["angle", "brightness", "offset", "hue", "saturation", "shift", "gamma", "sharpness", "solarise"]
)
def test_ranges_are_respected(option, textures, generator):
    narrow = {"angle": 10.0, "offset": 0.05, "shift": 0.02, "solarise": (0.6, 0.7)}.get(option, (0.9, 1.3))
    values = getattr(AnomalySynthesis(textures, **{option: narrow}).sample((2000, 3, 8, 8), generator), option)
    low, high = narrow if isinstance(narrow, tuple) else (-narrow, narrow)
    assert low <= values.min() < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < values.max() <= high
    low, high = {"angle": (-45, 45), "offset": (-30 / 255, 30 / 255), "shift": (-50 / 255, 50 / 255)}.get(
        option, getattr(AnomalySynthesis(textures), option)
    )
    values = getattr(AnomalySynthesis(textures).sample((2000, 3, 8, 8), generator), option)
    assert low <= values.min() < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < values.max() <= high


@pytest.mark.parametrize("degrees", [10.0, 90.0])
def test_masks_are_rotated_by_the_angle_given(degrees, textures, generator, monkeypatch):
    drawn = []
    monkeypatch.setattr("anomalib_cse.perlin.rotate", lambda noise, angles: drawn.append(angles) or noise)
    AnomalySynthesis(textures, mask_angle=degrees).sample((500, 3, 32, 32), generator)
    assert -degrees <= drawn[0].min() < -0.95 * degrees
    assert 0.95 * degrees < drawn[0].max() <= degrees


@pytest.mark.parametrize("sigma", [1.0, 6.0])
def test_blur_has_the_sigma_given(sigma, images, textures, generator):
    synthesis = AnomalySynthesis(textures, kinds=["blur"], sigma=sigma)
    params = synthesis.sample(images.shape, generator)
    expected = torch.where(params.mask, gaussian_blur(images, params.kernel_size, sigma), images)
    assert torch.equal(synthesis.apply(images, params), expected)


def test_whole_number_ranges(textures, generator):
    params = AnomalySynthesis(textures).sample((2000, 3, 8, 8), generator)
    assert params.kernel_size.unique().tolist() == [5, 7, 9, 11, 13, 15]
    assert params.levels.unique().tolist() == [2, 4, 8, 16, 32, 64, 128, 256]
    assert params.texture.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(params.cells.sort(1).values, torch.arange(64).expand(2000, -1))
    narrow = AnomalySynthesis(textures, bits=(2, 2), kernel_size=(6, 8), grid=3).sample((50, 3, 8, 8), generator)
    assert narrow.levels.unique().tolist() == [4]
    assert narrow.kernel_size.unique().tolist() == [7]
    assert narrow.cells.shape == (50, 9)


@pytest.mark.parametrize("size", [(16, 24), (13, 22)])
def test_cells_are_shuffled_as_drawn(size):
    images = torch.rand(2, 3, *size)
    order = torch.stack([torch.randperm(16), torch.arange(16)])
    shuffled = shuffle_cells(images, order)
    assert torch.equal(shuffled[1], images[1])
    h, w = -(-size[0] // 4), -(-size[1] // 4)
    padded = F.pad(images, (0, 4 * w - size[1], 0, 4 * h - size[0]), mode="replicate")
    expected = torch.zeros_like(padded[0])
    for cell in range(16):
        row, column = divmod(cell, 4)
        r, c = divmod(order[0, cell].item(), 4)
        expected[:, row * h : (row + 1) * h, column * w : (column + 1) * w] = padded[
            0, :, r * h : (r + 1) * h, c * w : (c + 1) * w
        ]
    assert torch.equal(shuffled[0], expected[:, : size[0], : size[1]])


def test_blur_equals_torchvisions():
    images = torch.rand(3, 3, 40, 50)
    sizes = torch.tensor([5, 9, 15])
    blurred = gaussian_blur(images, sizes, 6.0)
    for image, size, result in zip(images, sizes.tolist(), blurred, strict=True):
        expected = TF.gaussian_blur(image, size, 6.0)
        inside = (..., slice(8, -8), slice(8, -8))  # torchvision reflects at the border
        assert torch.allclose(result[inside], expected[inside], atol=1e-6)


def test_blur_takes_images_in_any_layout():
    images, sizes = torch.rand(3, 3, 40, 50), torch.tensor([5, 9, 15])
    last = gaussian_blur(images.contiguous(memory_format=torch.channels_last), sizes, 6.0)
    assert torch.allclose(last, gaussian_blur(images, sizes, 6.0), atol=1e-6)


def operation(name, images, **changed):
    """One textural operation on ``images`` with some of the drawn parameters replaced."""
    params = AnomalySynthesis(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).sample(
        images.shape, torch.Generator().manual_seed(0)
    )
    for key, value in changed.items():
        setattr(params, key, value)
    return {**STRUCTURAL_OPERATIONS, **TEXTURAL_OPERATIONS}[name](images, params)


def test_operations_equal_torchvisions():
    images = torch.rand(2, 3, 20, 20)
    factors = torch.tensor([0.5, 2.5])
    sharp = operation("sharpen", images, sharpness=factors)
    gamma = operation("gamma", images, gamma=factors[:, None].expand(2, 3))
    solarised = operation("solarise", images, solarise=factors / 4)
    posterised = operation("posterise", (images * 255).floor() / 255, levels=torch.tensor([2, 16]))
    saturated = operation("saturation", images, saturation=factors)
    for i, factor in enumerate(factors.tolist()):
        assert torch.allclose(sharp[i], TF.adjust_sharpness(images[i], factor), atol=1e-6)
        assert torch.allclose(gamma[i], TF.adjust_gamma(images[i], factor), atol=1e-6)
        assert torch.allclose(solarised[i], TF.solarize(images[i], factor / 4))
        bits = TF.posterize((images[i] * 255).to(torch.uint8), (1, 4)[i])
        assert torch.allclose((posterised[i] * 256).round(), bits.float())
        saturations = rgb_to_hsv(saturated[i : i + 1])[:, 1], rgb_to_hsv(images[i : i + 1])[:, 1]
        assert torch.allclose(saturations[0], (saturations[1] * factor).clamp(max=1), atol=1e-4)
    assert torch.allclose(operation("invert", images), TF.invert(images))
    assert torch.allclose(operation("autocontrast", images), TF.autocontrast(images))
    eight_bits = TF.to_dtype(images, torch.uint8, scale=True)
    assert torch.allclose(operation("equalise", images) * 255, TF.equalize(eight_bits).float(), atol=1e-3)
    flips = torch.tensor([[True, False], [False, True]])
    assert torch.equal(operation("flip", images, flip=flips), torch.stack([images[0].flip(-1), images[1].flip(-2)]))
    hues = rgb_to_hsv(images)[:, 0], rgb_to_hsv(operation("hue", images, hue=torch.tensor([0.5, 0.9])))[:, 0]
    assert torch.allclose(hues[1], hues[0] * torch.tensor([0.5, 0.9])[:, None, None], atol=1e-4)
    shifted = rgb_to_hsv(operation("hue_and_saturation", images, shift=torch.tensor([[0.1, 0.0], [-0.1, 0.0]])))[:, 0]
    difference = (shifted - hues[0] - torch.tensor([0.1, -0.1])[:, None, None]) % 1
    assert torch.minimum(difference, 1 - difference).max() < 1e-4


def test_textural_source_is_the_drawn_texture(generator):
    textures = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 51, 102)])
    synthesis = AnomalySynthesis(textures, kinds=["textural"])
    params = synthesis.sample((6, 3, 32, 32), generator)
    params.operations[:] = False
    corrupted = synthesis.apply(torch.ones(6, 3, 32, 32), params)
    for image, mask, texture in zip(corrupted, params.mask, params.texture.tolist(), strict=True):
        assert torch.allclose(image[mask.expand(3, -1, -1)], torch.tensor((0.0, 0.2, 0.4)[texture]), atol=1e-3)


def test_is_a_v2_transform(images, textures, generator):
    synthesis = AnomalySynthesis(textures, generator=generator)
    assert isinstance(synthesis, v2.Transform)
    old = tv_tensors.Mask(torch.zeros(6, 1, 48, 56, dtype=torch.uint8))
    old[:, :, :4] = 1
    corrupted, masks = v2.Compose([synthesis, v2.ToDtype(torch.float32)])(tv_tensors.Image(images), old)
    assert isinstance(corrupted, tv_tensors.Image)
    assert isinstance(masks, tv_tensors.Mask)
    assert masks[:, :, :4].bool().all()
    changed = (corrupted != images).any(1, keepdim=True)
    assert masks.bool()[changed].all()
    single, mask = synthesis(images[0])
    assert single.shape == images[0].shape
    assert mask.shape == (1, 48, 56)


def test_dtype_is_kept(images, textures, generator):
    corrupted, _ = AnomalySynthesis(textures, generator=generator)(images.half())
    assert corrupted.dtype == torch.float16


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1)])
def test_images_that_no_mask_fits_are_refused(size, textures):
    with pytest.raises(ValueError, match=f"at least 2x2 pixels, got {size[0]}x{size[1]}"):
        AnomalySynthesis(textures)(torch.zeros(1, 3, *size))


def test_whole_number_images_are_refused(textures):
    with pytest.raises(TypeError, match="floating point"):
        AnomalySynthesis(textures)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_every_parameter_has_a_row_per_image(textures, generator):
    params = AnomalySynthesis(textures).sample((4, 3, 8, 8), generator)
    assert {f.name: len(getattr(params, f.name)) for f in fields(params)} == dict.fromkeys(
        [f.name for f in fields(params)], 4
    )


def test_textures_are_read_from_a_folder(texture_folder, generator):
    textures = load_textures(texture_folder, 10, 32, generator)
    assert textures.shape == (3, 3, 32, 32)
    assert sorted(textures.float().mean(dim=(1, 2, 3)).round().tolist()) == pytest.approx([0, 60, 120], abs=2)
    assert load_textures(texture_folder, 2, 32, generator).shape == (2, 3, 32, 32)


def test_textures_that_cannot_be_read(texture_folder):
    with pytest.raises(FileNotFoundError, match="no photographs"):
        load_textures(texture_folder / "nowhere", 10, 32)
    (texture_folder / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be read"):
        load_textures(texture_folder, 10, 32)


def test_builtin_textures_differ_and_are_reproducible(generator):
    textures = builtin_textures(8, 32, generator)
    assert textures.shape == (8, 3, 32, 32)
    assert torch.equal(textures, builtin_textures(8, 32, torch.Generator().manual_seed(0)))
    assert textures.float().std(dim=(2, 3)).min() > 1
    assert len({tuple(t.float().mean(dim=(1, 2)).round().tolist()) for t in textures}) == 8
