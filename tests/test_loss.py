import math

import pytest
import torch
from torch.nn import functional as F

from anomalib_cse.loss import (
    CseLoss,
    contrastive_cosine_loss,
    cosine_similarity_map,
    decoder_loss,
    feature_reconstruction_loss,
)


def at_angle(degrees):
    """A 2-channel, one-position embedding that points in a direction."""
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]).view(1, 2, 1, 1)


@pytest.mark.parametrize(("degrees", "clean", "corrupted"), [(0, 0, 1), (60, 0.5, 0.75), (90, 1, 0.5), (180, 2, 0)])
def test_contrastive_loss_of_known_angles(degrees, clean, corrupted):
    first, second = 3 * at_angle(10), 0.5 * at_angle(10 + degrees)
    assert contrastive_cosine_loss(first, second, torch.tensor([False])).item() == pytest.approx(clean, abs=1e-6)
    assert contrastive_cosine_loss(first, second, torch.tensor([True])).item() == pytest.approx(corrupted, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_contrastive_loss_equals_naive_loop(dtype):
    first, second = torch.randn(2, 5, 7, 3, 4, dtype=dtype)
    corrupted = torch.tensor([True, False, False, True, True])
    total = 0.0
    for image in range(5):
        similarities = []
        for row in range(3):
            for column in range(4):
                a, b = first[image, :, row, column], second[image, :, row, column]
                similarities.append((a @ b / (a.norm() * b.norm())).item())
        mean = sum(similarities) / len(similarities)
        total += (1 + mean) / 2 if corrupted[image] else 1 - mean
    expected = pytest.approx(total / 5, rel=1e-12 if dtype == torch.float64 else 1e-5)
    assert contrastive_cosine_loss(first, second, corrupted).item() == expected


def test_decoder_loss_equals_naive_loop():
    features = [torch.randn(2, 5, 4, 4, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)]
    reconstructions = [torch.randn_like(f) for f in features]
    layers = []
    for f, r in zip(features, reconstructions, strict=True):
        values = []
        for image in range(2):
            for row in range(f.shape[2]):
                for column in range(f.shape[3]):
                    a, b = f[image, :, row, column], r[image, :, row, column]
                    values.append(0.5 * ((a / a.norm() - b / b.norm()) ** 2).sum().item())
        layers.append(sum(values) / len(values))
    assert decoder_loss(features, reconstructions).item() == pytest.approx(sum(layers) / 2, rel=1e-12)


@pytest.mark.parametrize(("scale", "expected"), [(2.0, 0.0), (-0.1, 2.0)])
def test_reconstruction_loss_ignores_length_but_not_sign(scale, expected):
    features = torch.randn(2, 4, 3, 3)
    assert feature_reconstruction_loss(features, scale * features).item() == pytest.approx(expected, abs=1e-5)


def test_total_is_the_weighted_sum():
    first, second = torch.randn(2, 3, 4, 2, 2)
    corrupted = torch.tensor([True, False, True])
    features, reconstructions = [torch.randn(3, 5, 2, 2)], [torch.randn(3, 5, 2, 2)]
    contrast = contrastive_cosine_loss(first, second, corrupted).item()
    decoder = decoder_loss(features, reconstructions).item()
    total = CseLoss()(first, second, corrupted, features, reconstructions).item()
    assert total == pytest.approx(10 * contrast + decoder, rel=1e-6)
    assert CseLoss(3)(first, second, corrupted).item() == pytest.approx(3 * contrast, rel=1e-6)


def test_gradient_pulls_clean_and_pushes_corrupted():
    first = at_angle(0)
    for corrupted, better in ((False, 40), (True, 50)):
        flag = torch.tensor([corrupted])
        now = contrastive_cosine_loss(first, at_angle(45), flag)
        assert contrastive_cosine_loss(first, at_angle(better), flag) < now


def test_gradcheck_and_zero_vector():
    first = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    flags = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda a, b: contrastive_cosine_loss(a, b, flags), (first, second))
    assert torch.autograd.gradcheck(lambda b: decoder_loss([first.detach()], [b]), (second,))
    assert cosine_similarity_map(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)).item() == 0


def test_similarity_of_almost_equal_large_vectors():
    first = 1e4 + torch.rand(1, 64, 2, 2)
    second = first + 1e-2 * torch.randn(1, 64, 2, 2)
    expected = F.cosine_similarity(first.double(), second.double(), dim=1)
    assert torch.allclose(cosine_similarity_map(first, second).double(), expected, atol=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 3, 3\) and \(1, 2, 3, 4\)"):
        cosine_similarity_map(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4))
    with pytest.raises(ValueError, match="shape of its features"):
        feature_reconstruction_loss(torch.ones(1, 2, 3, 3), torch.ones(1, 3, 3, 3))
