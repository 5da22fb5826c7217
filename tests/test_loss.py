import math

import pytest
import torch
from torch.nn import functional as F

from anomalib_cse.cse.loss import CseLoss, contrastive_cosine_loss, decoder_loss


def at_angle(degrees):
    """A 2-channel, one-position embedding that points in a direction."""
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]).view(1, 2, 1, 1)


@pytest.mark.parametrize(("degrees", "clean", "corrupted"), [(0, 0, 1), (60, 0.5, 0.75), (90, 1, 0.5), (180, 2, 0)])
def test_contrastive_loss_of_known_angles(degrees, clean, corrupted):
    first, second = 3 * at_angle(10), 0.5 * at_angle(10 + degrees)
    assert contrastive_cosine_loss(first, second, torch.tensor([False])).item() == pytest.approx(clean, abs=1e-6)
    assert contrastive_cosine_loss(first, second, torch.tensor([True])).item() == pytest.approx(corrupted, abs=1e-6)


def test_contrastive_loss_equals_naive_loop():
    first, second = torch.randn(2, 5, 7, 3, 4, dtype=torch.float64)
    corrupted = torch.tensor([True, False, False, True, True])
    total = 0.0
    for image in range(5):
        vectors = zip(first[image].flatten(1).T, second[image].flatten(1).T, strict=True)
        similarities = [(a @ b / (a.norm() * b.norm())).item() for a, b in vectors]
        mean = sum(similarities) / len(similarities)
        total += (1 + mean) / 2 if corrupted[image] else 1 - mean
    assert contrastive_cosine_loss(first, second, corrupted).item() == pytest.approx(total / 5, rel=1e-12)


def test_decoder_loss_equals_naive_loop():
    features = [torch.randn(2, 5, 4, 4, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)]
    reconstructions = [torch.randn_like(f) for f in features]
    layers = []
    for f, r in zip(features, reconstructions, strict=True):
        vectors = zip(f.movedim(1, -1).flatten(0, 2), r.movedim(1, -1).flatten(0, 2), strict=True)
        values = [0.5 * ((a / a.norm() - b / b.norm()) ** 2).sum().item() for a, b in vectors]
        layers.append(sum(values) / len(values))
    assert decoder_loss(features, reconstructions).item() == pytest.approx(sum(layers) / 2, rel=1e-12)


@pytest.mark.parametrize(("scale", "expected"), [(2.0, 0.0), (-0.1, 2.0)])
def test_decoder_loss_ignores_length_but_not_sign(scale, expected):
    features = torch.randn(2, 4, 3, 3)
    assert decoder_loss([features], [scale * features]).item() == pytest.approx(expected, abs=1e-5)


def test_total_loss_is_the_weighted_sum():
    first, second = torch.randn(2, 3, 4, 2, 2)
    corrupted = torch.tensor([True, False, True])
    features, reconstructions = [torch.randn(3, 5, 2, 2)], [torch.randn(3, 5, 2, 2)]
    contrast = contrastive_cosine_loss(first, second, corrupted).item()
    decoder = decoder_loss(features, reconstructions).item()
    total = CseLoss()(first, second, corrupted, features, reconstructions).item()
    assert total == pytest.approx(10 * contrast + decoder, rel=1e-6)
    assert CseLoss(3)(first, second, corrupted).item() == pytest.approx(3 * contrast, rel=1e-6)


def test_gradients_are_right_and_zero_vectors_finite():
    first = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    flags = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda a, b: contrastive_cosine_loss(a, b, flags), (first, second))
    assert torch.autograd.gradcheck(lambda b: decoder_loss([first.detach()], [b]), (second,))
    zero, one = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    assert contrastive_cosine_loss(zero, one, torch.tensor([False])).item() == 1
    assert decoder_loss([zero], [one]).item() == pytest.approx(0.5)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_losses_of_16_bit_features_are_computed_in_32(size):
    """Squares of large ones are infinite in 16 bits, those of small ones 0."""
    first, second = (size * torch.rand(2, 2, 16, 3, 3)).half()
    expected = 1 - F.cosine_similarity(first.double(), second.double()).mean().item()
    clean = torch.tensor([False, False])
    assert contrastive_cosine_loss(first, second, clean).item() == pytest.approx(expected, abs=1e-5)
    assert decoder_loss([first], [second]).item() == pytest.approx(expected, abs=1e-5)  # |a - b|^2 / 2 is 1 - cos


def test_losses_refuse_shapes_that_differ():
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 3, 3\) and \(1, 2, 3, 1\)"):
        contrastive_cosine_loss(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 1), torch.tensor([True]))
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 3, 3\) and \(1, 1, 3, 3\)"):
        decoder_loss([torch.ones(1, 2, 3, 3)], [torch.ones(1, 1, 3, 3)])
