"""Perlin noise masks for a whole batch at once (Section 3.1)."""

import math

import torch
from kornia.geometry.transform import rotate
from torch import Generator, Tensor

# Section 3.1: the lattice has 2^i by 2^j cells with i and j in 0..5, the noise is rotated and thresholded
MAX_EXPONENT = 5
MAX_ANGLE = 90.0  # degrees, both ways
THRESHOLD = 0.5
MIN_AREA = 100 / 224**2  # of the image: the method's 100 pixels at 224x224

MAX_CELLS = 2**MAX_EXPONENT
MIN_CELL = 4  # pixels; a finer lattice would be sampled at its zeros


def axis_weights(size: int, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return the influence of every lattice line on every pixel, along one axis of ``cells`` ``(B,)``.

    That is fade weights ``(B, size, 33)``, and the same times the signed distance to the lattice line in cells.
    """
    position = torch.arange(size, device=cells.device) / size * cells[:, None]  # (B, size), in cells
    distance = position[:, :, None] - torch.arange(MAX_CELLS + 1, device=cells.device)  # (B, size, 33)
    t = (1 - distance.abs()).clamp(min=0)
    fade = t**3 * (t * (6 * t - 15) + 10)
    return fade, fade * distance


def perlin_noise(size: tuple[int, int], cells: Tensor, angles: Tensor) -> Tensor:
    """Compute Perlin's gradient noise ``(B, H, W)``, zero at the lattice points and within [-sqrt(2), sqrt(2)].

    The interpolation is separable: the noise is a sum, over lattice points, of a gradient's component times one
    weight per row and one per column, which is two matrix products per component.

    Args:
        size: Height and width in pixels.
        cells: Lattice cells over the height and the width, ``(B, 2)``, each at most 32.
        angles: Direction of the gradients, of length sqrt(2), in radians, ``(B, 33, 33)``.
    """
    rows, rows_distance = axis_weights(size[0], cells[:, 0])
    columns, columns_distance = axis_weights(size[1], cells[:, 1])
    vertical = rows_distance @ angles.sin() @ columns.mT
    horizontal = rows @ angles.cos() @ columns_distance.mT
    return math.sqrt(2) * (vertical + horizontal)


def perlin_masks(count: int, size: tuple[int, int], generator: Generator | None = None) -> Tensor:
    """Draw defect masks ``(count, 1, H, W)`` bool: rotated, thresholded Perlin noise.

    Masks with fewer than 100 pixels (at 224x224, in proportion at other sizes) are drawn again. The lattice is coarser
    in small images, where cells would have fewer than 4 pixels a side. The generator, torch's global one if none is
    given, also sets the device.

    Raises:
        ValueError: If a side has less than 2 pixels: noise is 0 at the first, so no mask might ever be large enough.
    """
    if min(size) < 2:
        msg = f"defects need images of at least 2x2 pixels, got {size[0]}x{size[1]}"
        raise ValueError(msg)
    device = generator.device if generator else None
    largest = [min(MAX_EXPONENT, int(math.log2(max(1, pixels // MIN_CELL)))) for pixels in size]
    masks = torch.zeros(count, 1, *size, dtype=torch.bool, device=device)
    missing = torch.arange(count, device=device)
    while len(missing):
        n = len(missing)
        exponents = [torch.randint(0, e + 1, (n,), generator=generator, device=device) for e in largest]
        cells = 2 ** torch.stack(exponents, dim=1)
        angles = 2 * math.pi * torch.rand(n, MAX_CELLS + 1, MAX_CELLS + 1, generator=generator, device=device)
        degrees = MAX_ANGLE * (2 * torch.rand(n, generator=generator, device=device) - 1)
        noise = rotate(perlin_noise(size, cells, angles)[:, None], degrees, align_corners=False)
        masks[missing] = noise > THRESHOLD
        missing = missing[masks[missing].float().mean(dim=(1, 2, 3)) < MIN_AREA]
    return masks
