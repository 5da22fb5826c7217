"""Hue, saturation and value of whole batches, differing per image where torchvision's functions take one number."""

import torch
from torch import Tensor


def rgb_to_hsv(images: Tensor) -> Tensor:
    """Hue, saturation and value, all in [0, 1], of RGB images ``(B, 3, H, W)`` in [0, 1]."""
    red, green, blue = images.unbind(1)
    value, largest = images.max(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sectors = torch.stack([(green - blue) / safe % 6, (blue - red) / safe + 2, (red - green) / safe + 4], dim=1)
    hue = sectors.gather(1, largest[:, None])[:, 0] / 6
    return torch.stack([hue, chroma / torch.where(value > 0, value, 1), value], dim=1)


def hsv_to_rgb(images: Tensor) -> Tensor:
    """RGB images ``(B, 3, H, W)`` in [0, 1] of hue, saturation and value in [0, 1]; hue wraps around."""
    hue, saturation, value = images[:, :, None].unbind(1)  # (B, 1, H, W)
    k = (images.new_tensor([5, 3, 1]).view(1, 3, 1, 1) + 6 * hue) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)
