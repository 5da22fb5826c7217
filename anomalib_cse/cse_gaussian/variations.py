"""Variations: good images as another day, lamp, lens or camera gives them, and what that does to their features."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from ..synthesis import Stream, generator_for
from .moments import Moments
from .sample import FOLDS, SampledBatch, SampledImage, batches, draw
from .torch_model import CseGaussianModel

FEWEST_VARIED, MOST_VARIED = 16, 32  # twice as many images as there are are varied, within these bounds
LIGHT = 0.2  # brightness, contrast and slope: factors of 1 less or more this
NOISE = 0.02  # standard deviation, of pixels in [0, 1]: 5 of 255 grey values
BLUR = 1.2  # standard deviation, in pixels
CAST = 0.1  # factors of the colour channels: 1 less or more this


def factors(amplitude: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Return factors of a shape, each 1 less or more the amplitude."""
    return 1 + amplitude * (2.0 * torch.randint(2, shape, generator=generator) - 1)


def light(images: Tensor, generator: Generator) -> Tensor:
    """Change brightness, contrast about the mean, and a slope from left to right."""
    brightness, contrast, slope = factors(LIGHT, (3, len(images), 1, 1, 1), generator).to(images)
    images = (images * brightness).clamp(0, 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean).clamp(0, 1)
    across = torch.linspace(-1, 1, images.shape[-1]).to(images)
    return images * (1 + across * (slope - 1))


def noise(images: Tensor, generator: Generator) -> Tensor:
    """Add Gaussian noise, independent for every value."""
    return images + (NOISE * torch.randn(images.shape, generator=generator)).to(images)


def blur(images: Tensor, generator: Generator) -> Tensor:
    """Blur by a Gaussian."""
    del generator
    return gaussian_blur(images, [2 * round(3 * BLUR) + 1] * 2, [BLUR] * 2)


def cast(images: Tensor, generator: Generator) -> Tensor:
    """Change the colour channels, each by a factor of its own."""
    return images * factors(CAST, (len(images), 3, 1, 1), generator).to(images)


VARIATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "light": light,
    "noise": noise,
    "blur": blur,
    "cast": cast,
}


def varied(images: Tensor, kind: str, generator: Generator) -> Tensor:
    """Return images ``(B, 3, H, W)`` in [0, 1] changed by a kind of :data:`VARIATIONS`, as far as it goes.

    Draws are the generator's, which is on the CPU, so that they are the same on every device.
    """
    return VARIATIONS[kind](images, generator).clamp(0, 1)


def varied_features(
    model: CseGaussianModel, images: Sequence[SampledImage], kind: str, *numbers: int
) -> Iterator[tuple[SampledBatch, list[Tensor]]]:
    """Give batches of sampled images, and their features once they are changed; the numbers decide how."""
    done = 0
    for seen in batches(images):
        # outside a region of interest images have been painted, so light and blur see that paint, not what was there
        changed = varied(seen.images, kind, generator_for(*numbers, Stream.VARIATIONS, done))
        yield seen, model.smoothed_features(changed, seen.inside)
        done += len(seen.images)


def change_moments(
    model: CseGaussianModel, kept: Sequence[SampledImage], kinds: Sequence[str], seed: int
) -> list[list[Moments]]:
    """Return moments of the change of features by variations, of all positions together, by fold and layer.

    All kinds count alike, each with an equal share of the images. Without any the moments are of nothing.
    """
    folds = [[Moments(f.shape[0], device=f.device) for f in kept[0].features] for _ in range(FOLDS)]
    count = min(max(2 * len(kept), FEWEST_VARIED), MOST_VARIED)
    for number, kind in enumerate(kinds):
        share = -(-count // len(kinds))
        images = [kept[place] for place in draw(share, len(kept), seed, Stream.VARIED_IMAGES, number)]
        for seen, features in varied_features(model, images, kind, seed, number):
            for layer, (before, after) in enumerate(zip(seen.features, features, strict=True)):
                changes, weights = (after - before).movedim(1, -1), seen.weights(layer)
                for fold, vectors, counted in zip(seen.folds, changes, weights, strict=True):
                    folds[fold][layer].add(vectors.flatten(0, 1), counted.flatten())
    return folds
