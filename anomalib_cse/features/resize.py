"""Bilinear resizing as two matrix products, which export as what they are; pooling and fusing of maps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_matrix(in_size: int, out_size: int, device: torch.device | None = None) -> Tensor:
    """Return weights ``(1, 1, out_size, in_size)`` of antialiased bilinear resizing along one axis, rows summing to 1.

    Output i is centred at ``(i + 1/2) * n / m`` between n input and m output samples; its weights are a triangle of
    half-width ``max(n / m, 1)``. Multiplied by 2 m all of it is whole numbers, so that no precision that a runtime
    chooses for its arithmetic can move an index. The rest is written so that OpenVINO takes the operations as they are:
    divisions, subtractions, changes of rank and products of unequal ranks it replaces by others, and with them goes
    what is said of their precision.
    """
    # samples in the place of channels, which OpenVINO keeps innermost here: it computes along these, not one by one
    centre = (2 * torch.arange(out_size, device=device)[None, None, :, None] + 1) * in_size  # of output i, times 2 m
    sample = (2 * torch.arange(in_size, device=device)[None, :, None, None] + 1) * out_size  # of input j, times 2 m
    half_width: int = 2 * torch.sym_max(in_size, out_size)  # type: ignore[assignment]  # max() would fix a size that is to stay dynamic
    weights = (half_width - (sample - centre).abs()).clamp(min=0)
    weights = weights * (weights.sum(dim=1, keepdim=True).log() * -1).exp()  # weights / their sum
    return weights.transpose(1, 3)


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize ``(B, C, H, W)`` to ``(B, C, *size)``, bilinear, antialiased where it reduces."""
    height, width = images.shape[-2:]
    known = isinstance(height, int) and isinstance(width, int)  # an exported graph may leave them open
    if known and (height, width) == tuple(size):
        return images
    rows = resize_matrix(height, size[0], images.device)
    columns = resize_matrix(width, size[1], images.device)
    # rows last: OpenVINO fails to fuse what is done to channels with a product whose constant is on the right
    return rows.to(images.dtype) @ (images @ columns.to(images.dtype).mT)


def pool(maps: Tensor, size: int) -> Tensor:
    """Average ``(B, C, H, W)`` over windows of ``size``; one over the lower or right edge averages what it covers."""
    return F.avg_pool2d(maps, size, ceil_mode=True, count_include_pad=False) if size > 1 else maps


def fuse(maps: Sequence[Tensor]) -> Tensor:
    """Resize maps ``(B, C, h, w)`` to the largest one and concatenate them: ``(B, C1 + C2 + ..., H, W)``."""
    size = max((m.shape[-2:] for m in maps), key=lambda s: s[0] * s[1])
    # asked here as well: of sizes that an export leaves open, resize() cannot tell that they are equal
    return torch.cat([m if m.shape[-2:] == size else resize(m, size) for m in maps], dim=1)
