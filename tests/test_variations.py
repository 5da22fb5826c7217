"""Variations: what they make of images, the moments of what they do to features, and scores that hardly rise."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anomalib_cse import CseGaussianModel
from anomalib_cse.cse_gaussian import variations
from anomalib_cse.cse_gaussian.fit import fit, over_folds
from anomalib_cse.cse_gaussian.sample import TrainingSample
from anomalib_cse.cse_gaussian.variations import VARIATIONS, change_moments, varied
from anomalib_cse.synthesis import AnomalySynthesis

SIZE = (48, 64)


def images_of(count, seed=0):
    """Grey values around one half, so that no change leaves [0, 1]."""
    return 0.4 + 0.2 * torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CseGaussianModel("test_efficientnet", layers=(2, 3), pre_trained=False, embedding_dim=6)


def sample_of(model, images):
    sample = TrainingSample(2**30, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sample.add(images, model.smoothed_features(images))
    return sample


def test_light_is_brightness_contrast_and_a_slope(generator):
    images = images_of(40)
    found = varied(images, "light", generator).numpy()
    combinations = set()
    for before, after in zip(images.numpy(), found, strict=True):
        errors = {}
        for brightness, contrast, slope in np.ndindex(2, 2, 2):
            b, c, s = (0.8 + 0.4 * sign for sign in (brightness, contrast, slope))
            expected = (before * b - (before * b).mean()) * c + (before * b).mean()
            expected = expected * (1 + (2 * np.arange(64) / 63 - 1) * (s - 1))
            errors[brightness, contrast, slope] = np.abs(expected - after).max()
        best = min(errors, key=errors.get)
        assert errors[best] < 1e-5
        combinations.add(best)
    assert len(combinations) == 8


def test_noise_has_five_grey_values(generator):
    images = images_of(8)
    added = varied(images, "noise", generator) - images
    assert added.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(added.mean()) < 2e-4
    assert added[0].flatten().corrcoef().abs() == 1
    assert np.abs(np.corrcoef(added.flatten(1).numpy()) - np.eye(8)).max() < 0.05


def test_blur_is_a_gaussian_of_1_2_pixels(generator):
    images = torch.zeros(1, 3, 33, 33)
    images[..., 16, 16] = 1
    spread = varied(images, "blur", generator)[0, 0]
    assert spread.sum().item() == pytest.approx(1, abs=1e-4)
    away = torch.arange(33.0) - 16
    assert (spread.sum(dim=0) * away**2).sum().item() == pytest.approx(1.2**2, rel=0.05)
    assert torch.allclose(spread, spread.mT)


def test_cast_multiplies_colours(generator):
    images = images_of(40)
    ratios = varied(images, "cast", generator) / images
    of_channels = ratios.mean(dim=(2, 3))
    assert ((ratios - of_channels[..., None, None]).abs() < 1e-5).all()
    assert torch.allclose((of_channels - 1).abs(), torch.tensor(0.1), atol=1e-5)
    assert len({tuple(row) for row in of_channels.gt(1).tolist()}) == 8


@pytest.mark.parametrize("kind", VARIATIONS)
def test_images_stay_images_and_are_left_alone(kind, generator):
    images = torch.rand(4, 3, *SIZE, generator=generator)
    before, state = images.clone(), torch.random.get_rng_state()
    found = varied(images, kind, torch.Generator().manual_seed(1))
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(found, varied(images, kind, torch.Generator().manual_seed(1)))
    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_moments_of_change_are_those_of_a_loop(model, monkeypatch):
    """Each of 16 images is blurred and brightened."""
    monkeypatch.setitem(VARIATIONS, "cast", lambda images, _: images * 1.1)
    images = images_of(16)
    sample = sample_of(model, images)
    with torch.no_grad():
        found = over_folds(change_moments(model, sample.kept, ["blur", "cast"], 0))
        before = model.smoothed_features(images)
        changed = [model.smoothed_features(varied(images, kind, torch.Generator())) for kind in ("blur", "cast")]
    for layer, moments in enumerate(found):
        expected = np.zeros((model.backbone.channels[layer],) * 2)
        vectors = [
            change
            for after in changed
            for change in (after[layer] - before[layer]).movedim(1, -1).flatten(0, 2).numpy()
        ]
        for vector in vectors:
            expected += np.outer(vector, vector) / len(vectors)
        assert np.allclose(
            moments.about(torch.zeros(len(expected), dtype=torch.float64)), expected, rtol=1e-3, atol=1e-9
        )


def synthesis_of(seed):
    textures = torch.randint(256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return AnomalySynthesis(textures)


def fitted(model, images, kinds):
    fit(model, sample_of(model, images), synthesis_of(0), kinds, 0)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_variation_of_no_strength_changes_nothing(model, monkeypatch):
    images = images_of(16)
    without = fitted(model, images, [])
    monkeypatch.setattr(variations, "NOISE", 0.0)
    for name, value in fitted(model, images, ["noise"]).items():
        assert torch.equal(value, without[name]), name


@pytest.mark.parametrize("kind", VARIATIONS)
def test_scores_rise_less_by_what_was_varied(kind, model):
    """Of images of a smooth surface that no fit has seen."""
    images, unseen = (F.avg_pool2d(images_of(n, seed=n), 5, stride=1, padding=2) for n in (24, 16))
    changed = varied(unseen, kind, torch.Generator().manual_seed(2))
    rises = []
    for kinds in ([], [kind]):
        fitted(model, images, kinds)
        with torch.no_grad():
            rises.append((model(changed).pred_score.mean() / model(unseen).pred_score.mean()).item() - 1)
    without, with_kind = rises
    assert with_kind < 0.85 * without
