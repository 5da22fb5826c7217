"""Perlin noise masks for a whole batch at once (Section 3.1)."""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

MAX_LATTICE = 32
MIN_CELL = 4  # pixels; a finer lattice would be sampled at its zeros
MIN_AREA = 100 / 224**2  # of the image, the method's 100 pixels at 224x224


def axis_weights(size: int, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Influence of every lattice line on every pixel along one axis.

    Args:
        size: Pixels along the axis.
        cells: Lattice cells along it, ``(B,)``, each at most 32.

    Returns:
        ``(B, size, 33)`` fade weights, and the same times the signed distance to the lattice line in cells.
    """
    position = torch.arange(size, device=cells.device) / size * cells[:, None]  # (B, size), in cells
    distance = position[:, :, None] - torch.arange(MAX_LATTICE + 1, device=cells.device)  # (B, size, 33)
    t = (1 - distance.abs()).clamp(min=0)
    fade = t**3 * (t * (6 * t - 15) + 10)
    return fade, fade * distance


def perlin_noise(size: tuple[int, int], cells: Tensor, angles: Tensor) -> Tensor:
    """Perlin's gradient noise.

    The interpolation is separable: the noise is a sum, over lattice points, of a gradient's component times one
    weight per row and one per column, which is two matrix products per component.

    Args:
        size: Height and width in pixels.
        cells: Lattice cells over the height and the width, ``(B, 2)``, each at most 32.
        angles: Direction of the gradient at every lattice point in radians, ``(B, 33, 33)``.

    Returns:
        ``(B, H, W)``, zero at the lattice points, within [-sqrt(2), sqrt(2)] with gradients of length sqrt(2).
    """
    rows, rows_distance = axis_weights(size[0], cells[:, 0])
    columns, columns_distance = axis_weights(size[1], cells[:, 1])
    vertical = rows_distance @ angles.sin() @ columns.mT
    horizontal = rows @ angles.cos() @ columns_distance.mT
    return math.sqrt(2) * (vertical + horizontal)


def rotate(images: Tensor, degrees: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """Rotate every image of a batch about its centre by its own angle.

    Args:
        images: ``(B, C, H, W)``.
        degrees: ``(B,)``, counter-clockwise.
        mode: Interpolation of :func:`torch.nn.functional.grid_sample`.
        padding: What lies outside the image, a padding mode of the same function.

    Returns:
        ``(B, C, H, W)``.
    """
    height, width = images.shape[-2:]
    cos, sin, zero = degrees.deg2rad().cos(), degrees.deg2rad().sin(), torch.zeros_like(degrees)
    # grid_sample's coordinates run from -1 to 1 on both axes, hence the aspect ratio
    theta = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=False)


def perlin_masks(
    count: int,
    size: tuple[int, int],
    generator: Generator | None = None,
    max_exponent: int = 5,
    max_angle: float = 90.0,
    threshold: float = 0.5,
) -> Tensor:
    """Draw defect masks: rotated, thresholded Perlin noise.

    Masks with fewer than 100 pixels (at 224x224, in proportion at other sizes) are drawn again.

    Args:
        count: B, how many.
        size: Height and width in pixels.
        generator: Source of randomness, which also sets the device.
        max_exponent: The lattice has 2^i by 2^j cells with i and j uniform in 0..max_exponent, at most 5, and less in
            small images, where cells would have fewer than 4 pixels a side.
        max_angle: Rotation is uniform within plus and minus this many degrees.
        threshold: The mask is where the noise exceeds it.

    Returns:
        ``(B, 1, H, W)`` bool.

    Raises:
        ValueError: If a side has less than 2 pixels: noise is 0 at the first, so no mask might ever be large enough.
    """
    if min(size) < 2:
        msg = f"defects need images of at least 2x2 pixels, got {size[0]}x{size[1]}"
        raise ValueError(msg)
    device = generator.device if generator else None
    largest = [min(max_exponent, int(math.log2(max(1, pixels // MIN_CELL)))) for pixels in size]
    masks = torch.zeros(count, 1, *size, dtype=torch.bool, device=device)
    missing = torch.arange(count, device=device)
    while len(missing):
        n = len(missing)
        exponents = [torch.randint(0, e + 1, (n,), generator=generator, device=device) for e in largest]
        cells = 2 ** torch.stack(exponents, dim=1)
        angles = 2 * math.pi * torch.rand(n, MAX_LATTICE + 1, MAX_LATTICE + 1, generator=generator, device=device)
        degrees = max_angle * (2 * torch.rand(n, generator=generator, device=device) - 1)
        noise = rotate(perlin_noise(size, cells, angles)[:, None], degrees)
        masks[missing] = noise > threshold
        missing = missing[masks[missing].float().mean(dim=(1, 2, 3)) < MIN_AREA]
    return masks
