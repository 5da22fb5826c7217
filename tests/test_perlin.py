import math

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from anomalib_cse.synthesis import perlin_masks
from anomalib_cse.synthesis.perlin import perlin_noise

LEAST_AREA = 100 / 224**2


def naive_noise(height, width, cells, angles):
    """Perlin's own description, one pixel at a time."""
    noise = torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            v, u = y / height * cells[0], x / width * cells[1]
            row, column = int(v), int(u)
            dy, dx = v - row, u - column
            corners = []
            for p in (0, 1):
                for q in (0, 1):
                    angle = angles[row + p, column + q].item()
                    corners.append(math.sin(angle) * (dy - p) + math.cos(angle) * (dx - q))
            fy, fx = (t**3 * (t * (t * 6 - 15) + 10) for t in (dy, dx))
            top, bottom = corners[0] + fx * (corners[1] - corners[0]), corners[2] + fx * (corners[3] - corners[2])
            noise[y, x] = math.sqrt(2) * (top + fy * (bottom - top))
    return noise


@pytest.mark.parametrize("cells", [(1, 1), (4, 2), (8, 32)])
def test_noise_equals_naive_loop(cells):
    angles = 2 * math.pi * torch.rand(3, 33, 33)
    batch = perlin_noise((24, 40), torch.tensor([cells, (2, 2), cells]), angles)
    assert torch.allclose(batch[0], naive_noise(24, 40, cells, angles[0]), atol=1e-5)
    assert torch.allclose(batch[1], naive_noise(24, 40, (2, 2), angles[1]), atol=1e-5)


@pytest.mark.parametrize(("size", "largest"), [((224, 160), (5, 5)), ((64, 40), (4, 3)), ((9, 30), (1, 2))])
def test_masks_are_rotated_noise_above_half(size, largest):
    masks = perlin_masks(40, size, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)  # as drawn first; too small ones are drawn again
    exponents = [torch.randint(0, exponent + 1, (40,), generator=generator) for exponent in largest]
    angles = 2 * math.pi * torch.rand(40, 33, 33, generator=generator)
    degrees = 180 * torch.rand(40, generator=generator) - 90
    noise = perlin_noise(size, 2 ** torch.stack(exponents, dim=1), angles)
    rotated = [
        TF.rotate(n[None], d, interpolation=TF.InterpolationMode.BILINEAR)
        for n, d in zip(noise, degrees.tolist(), strict=True)
    ]
    expected = torch.stack(rotated) > 0.5
    large = expected.float().mean(dim=(1, 2, 3)) >= LEAST_AREA + 2 / math.prod(size)
    assert large.sum() > 10
    assert (masks[large] != expected[large]).float().mean() < 2e-4


def test_masks_have_a_least_area():
    masks = perlin_masks(2000, (56, 56))
    assert (masks.shape, masks.dtype) == ((2000, 1, 56, 56), torch.bool)
    assert masks.float().mean(dim=(1, 2, 3)).min() >= LEAST_AREA


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1)])
def test_images_that_no_mask_fits_are_refused(size):
    with pytest.raises(ValueError, match=f"at least 2x2 pixels, got {size[0]}x{size[1]}"):
        perlin_masks(1, size)
