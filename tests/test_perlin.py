import math

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from anomalib_cse.perlin import perlin_masks, perlin_noise, rotate


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


def test_noise_is_zero_at_lattice_points():
    noise = perlin_noise((64, 64), torch.tensor([[4, 8]]), 2 * math.pi * torch.rand(1, 33, 33))
    assert noise[0, ::16, ::8].abs().max() < 1e-6
    assert noise.abs().max() > 0.1


@pytest.mark.parametrize("size", [(40, 40), (31, 50)])
def test_rotation_equals_torchvisions(size):
    images = torch.rand(2, 3, *size)
    for index, degrees in enumerate((30.0, -75.0)):
        expected = TF.rotate(images[index], degrees, interpolation=TF.InterpolationMode.BILINEAR)
        rotated = rotate(images, torch.tensor([30.0, -75.0]))[index]
        inside = TF.rotate(torch.ones(1, *size), degrees)[0] > 0  # torchvision blends its fill at the border
        inside = TF.gaussian_blur(inside[None].float(), 5)[0] > 0.999
        assert torch.allclose(rotated[:, inside], expected[:, inside], atol=1e-4)


def test_masks_have_their_least_area_and_are_reproducible(generator):
    masks = perlin_masks(200, (56, 56), generator)
    assert masks.shape == (200, 1, 56, 56)
    assert masks.dtype == torch.bool
    assert masks.float().mean(dim=(1, 2, 3)).min() >= 100 / 224**2
    again = perlin_masks(200, (56, 56), torch.Generator().manual_seed(0))
    assert torch.equal(masks, again)
    assert not torch.equal(masks[0], masks[1])


def test_threshold_and_lattice_are_used():
    def area(**options):
        return perlin_masks(100, (64, 64), torch.Generator().manual_seed(1), **options).float().mean()

    assert area(threshold=0.1) > 2 * area()
    coarse = perlin_masks(100, (64, 64), torch.Generator().manual_seed(1), max_exponent=1, max_angle=0).float()
    fine = perlin_masks(100, (64, 64), torch.Generator().manual_seed(1), max_angle=0).float()
    assert coarse.diff(dim=-1).abs().mean() < 0.5 * fine.diff(dim=-1).abs().mean()
