"""The closed form against naive loops, NumPy and SciPy."""

import copy
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from scipy.spatial.distance import mahalanobis

from anomalib_cse import gaussian_fit
from anomalib_cse.gaussian import RIDGE, GaussianMap, Moments, contrastive_directions, evidence, inverse_root
from anomalib_cse.gaussian_fit import (
    IN_COMMON,
    PRIOR,
    Sample,
    Trial,
    fit,
    fit_positions,
    moments_of_positions,
    try_both,
)
from anomalib_cse.gaussian_model import (
    GaussianModel,
    directions_of,
    geometric_mean,
    layer_weights,
    mean_of_top,
    smooth,
)

TINY_BACKBONE = {"backbone": "test_efficientnet", "pre_trained": False}


def positive_definite(rng, *shape):
    factor = rng.normal(size=(*shape, shape[-1]))
    return factor @ factor.swapaxes(-1, -2) + np.eye(shape[-1])


def test_smooth_equals_a_naive_loop():
    maps = torch.rand(2, 3, 4, 5)
    smoothed = smooth(maps)
    for i in range(4):
        for j in range(5):
            expected = 0
            for di, row in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                for dj, column in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                    expected += row * column * maps[:, :, min(max(i + di, 0), 3), min(max(j + dj, 0), 4)]
            assert torch.allclose(smoothed[:, :, i, j], expected)


@pytest.mark.parametrize(("share", "count"), [(0.005, 1), (0.1, 2), (1, 20)])
def test_mean_of_top_equals_sorting(share, count):
    maps = torch.rand(3, 1, 4, 5)
    expected = [sorted(image.flatten().tolist())[-count:] for image in maps]
    assert mean_of_top(maps, share).tolist() == pytest.approx([sum(values) / count for values in expected])


def test_directions_are_the_generalised_eigenvectors():
    rng = np.random.default_rng(0)
    clean, defects = positive_definite(rng, 5), positive_definite(rng, 5)
    directions, ratios = contrastive_directions(torch.from_numpy(clean), torch.from_numpy(defects), 3)
    values, vectors = scipy.linalg.eigh(defects, clean)
    assert np.allclose(ratios, values[::-1][:3])
    cosines = np.sum(directions.numpy() * (clean @ vectors[:, ::-1][:, :3]), axis=0)
    assert np.allclose(np.abs(cosines), 1)
    assert np.allclose(directions.T.numpy() @ clean @ directions.numpy(), np.eye(3))


def test_evidence_is_the_factor_of_the_log_likelihood_ratio():
    ratios = torch.tensor([4.0, 1.0, 0.2])
    likelihood = [torch.distributions.Normal(0, r**0.5) for r in ratios.tolist()]
    clean = torch.distributions.Normal(0, 1)
    for distribution, factor in zip(likelihood[:2], evidence(ratios)[:2], strict=True):
        gain = [2 * (distribution.log_prob(x) - clean.log_prob(x)) for x in torch.tensor([0.0, 3.0])]
        assert (gain[1] - gain[0]).item() == pytest.approx(9 * factor.item(), abs=1e-5)
    assert evidence(ratios)[2] == 0  # varies less in defects, and says nothing


def test_moments_in_batches_equal_those_of_all():
    rng = np.random.default_rng(0)
    vectors, weights, centre = rng.normal(size=(2, 30, 4)) + 3, rng.random((2, 30)), rng.normal(size=4)
    moments = Moments(4, (2,))
    for start in (0, 7, 20):
        part = slice(start, {0: 7, 7: 20, 20: 30}[start])
        moments.add(torch.from_numpy(vectors[:, part]), torch.from_numpy(weights[:, part]))
    for cell in range(2):
        assert np.allclose(moments.mean[cell], np.average(vectors[cell], axis=0, weights=weights[cell]))
        own = np.cov(vectors[cell].T, aweights=weights[cell], bias=True)
        assert np.allclose(moments.about(moments.mean[cell])[cell], own)
        away = vectors[cell] - centre
        naive = sum(w * np.outer(v, v) for w, v in zip(weights[cell], away, strict=True)) / weights[cell].sum()
        assert np.allclose(moments.about(torch.from_numpy(centre))[cell], naive)
    alike = Moments(4, (2,))
    alike.add(torch.from_numpy(vectors).float())
    assert np.allclose(alike.mean, vectors.mean(axis=1), atol=1e-6)


def test_distances_are_mahalanobis_distances_from_the_positions_gaussian():
    rng = np.random.default_rng(0)
    grid = (4, 6)
    gaussian = GaussianMap(7, 3, grid)
    mean, directions = rng.normal(size=7), rng.normal(size=(7, 3))
    covariances = positive_definite(rng, *grid, 3)
    gaussian.mean.copy_(torch.from_numpy(mean))
    gaussian.directions.copy_(torch.from_numpy(directions))
    gaussian.roots.copy_(inverse_root(torch.from_numpy(covariances)))
    gaussian.scale.copy_(torch.rand(grid))
    features = torch.rand(2, 7, *grid)
    distances = gaussian(features)
    assert distances.shape == (2, 1, *grid)
    for image, i, j in np.ndindex(2, *grid):
        embedding = (features[image, :, i, j].numpy() - mean) @ directions
        expected = mahalanobis(embedding, np.zeros(3), np.linalg.inv(covariances[i, j])) * gaussian.scale[i, j].item()
        assert distances[image, 0, i, j].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("channels", "most", "dim"), [(112, 64, 64), (40, 64, 32), (40, 40, 40), (40, 6, 6), (9, 64, 9)]
)
def test_a_layer_has_no_more_directions_than_channels_and_whole_registers(channels, most, dim):
    assert directions_of(channels, most) == dim


def fitted(images=12, **options):
    """A model of random weights, and what it was fitted to."""
    torch.manual_seed(0)
    model = GaussianModel(**TINY_BACKBONE, **{"image_size": (40, 56), **options})
    clean, corrupted = torch.rand(images, 3, *model.image_size), torch.rand(4, 3, *model.image_size)
    masks = torch.zeros(4, *model.image_size)
    masks[:, 8:32, 16:40] = 1
    with torch.no_grad():
        features, defects = (model.smoothed(model.backbone(images)) for images in (clean, corrupted))
    halves = [[f[: images // 2] for f in features], [f[images // 2 :] for f in features]]
    some, others = (
        Sample(partial(list, [half]), partial(list, [([f[part] for f in defects], masks[part])]))
        for half, part in zip(halves, (slice(2), slice(2, 4)), strict=True)
    )
    fit(model, some, others, lambda: [[f[:3] for f in features]])
    return model, clean, corrupted, masks


@pytest.mark.parametrize(("prior", "shown"), [(PRIOR, 12), (IN_COMMON, 3)])
def test_fit_equals_statistics_of_all_images_at_once(prior, shown, monkeypatch):
    monkeypatch.setattr(gaussian_fit, "try_both", lambda *_: Trial(0.5, 0.6 if prior == PRIOR else 0.5))
    model, clean, corrupted, masks = fitted(embedding_dim=6)
    with torch.no_grad():
        layers = zip(model.smoothed(model.backbone(clean)), model.smoothed(model.backbone(corrupted)), strict=True)
    telling = []
    for gaussian, (features, defects) in zip(model.maps, layers, strict=True):
        x, d = (f.movedim(1, -1).double().numpy() for f in (features, defects))  # (N, h, w, C)
        c = x.shape[-1]
        mean, covariance = x.reshape(-1, c).mean(axis=0), np.cov(x.reshape(-1, c).T, bias=True)
        covariance += RIDGE * np.trace(covariance) / c * np.eye(c)
        cover = torch.nn.functional.adaptive_avg_pool2d(masks[:, None].double(), x.shape[1:3])[:, 0].numpy()
        away = (d - mean).reshape(-1, c)
        scatter = (away * cover.reshape(-1, 1)).T @ away / cover.sum()
        values, vectors = scipy.linalg.eigh(scatter, covariance)
        dim = gaussian.directions.shape[1]
        assert dim == 6
        values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
        assert np.abs(gaussian.directions.T.double().numpy() @ covariance @ vectors) == pytest.approx(
            np.eye(dim), abs=2e-3
        )
        factors = np.maximum(1 - 1 / np.maximum(values, 1), 0)
        embedded = (x - mean) @ vectors
        own = len(x) / (len(x) + prior)
        distances = np.zeros(x.shape[:3])
        for i, j in np.ndindex(*x.shape[1:3]):
            here = embedded[:, i, j]
            shrunk = own * here.T @ here / len(here) + (1 - own) * np.eye(dim)
            coordinates = here @ np.linalg.inv(scipy.linalg.sqrtm(shrunk).real)
            distances[:, i, j] = np.sqrt((factors * coordinates**2).sum(axis=-1))
        expected = distances / distances[:shown].mean(axis=0)
        assert np.allclose(gaussian(features)[:, 0], expected, rtol=5e-3)
        telling.append(factors.sum())
    assert np.allclose(model.layer_weights.flatten(), np.array(telling) / sum(telling), rtol=1e-3)


def test_the_map_is_one_on_average_where_it_was_measured():
    model, clean, *_ = fitted()
    features = model.smoothed(model.backbone(clean[:3]))
    for gaussian, f in zip(model.maps, features, strict=True):
        assert torch.allclose(gaussian(f).mean(dim=(0, 1)), torch.ones_like(gaussian.scale), atol=1e-4)


def test_layers_are_multiplied_each_as_often_as_it_has_dimensions_that_say_something():
    model, clean, *_ = fitted(layers=(1, 2, 3))  # strides 4 and 8, on one grid, and 16
    with torch.no_grad():
        scored = model(clean)
        maps = [g(f) for g, f in zip(model.maps, model.smoothed(model.backbone(clean)), strict=True)]
    assert [m.shape[-2:] for m in maps] == [(5, 7), (5, 7), (3, 4)]
    maps[2] = torch.nn.functional.interpolate(maps[2], size=(5, 7), mode="bilinear")
    joint = scipy.stats.gmean(torch.stack(maps).numpy(), weights=model.layer_weights.view(3, 1, 1, 1, 1).numpy())
    # half a per cent of 35 positions is one
    assert scored.pred_score.tolist() == pytest.approx(joint.max(axis=(1, 2, 3)).tolist(), rel=1e-5)
    large = torch.nn.functional.interpolate(torch.from_numpy(joint), size=(40, 56), mode="bilinear")
    assert torch.allclose(scored.anomaly_map, large, rtol=1e-4)


def test_layers_count_dimensions_by_what_they_say():
    factors = [torch.tensor([0.5, 0.25, 0]), torch.tensor([1.0, 0.25])]
    assert layer_weights(factors).flatten().tolist() == pytest.approx([0.75 / 2, 1.25 / 2])


def test_a_layer_without_any_distance_makes_the_product_zero():
    weights = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    product = geometric_mean(torch.tensor([0.0, 2.0]).view(1, 2, 1, 1), weights)
    assert product.item() == 0
    assert geometric_mean(torch.full((1, 2, 1, 1), 3.0), weights).item() == pytest.approx(3)


def surface(spread, images=40):
    """A model of one layer and what to fit it to: features that vary by ``spread`` ``(4, 4)``, and more in defects."""
    rng = torch.Generator().manual_seed(0)
    model = GaussianModel(**TINY_BACKBONE, layers=(3,), image_size=(64, 64), embedding_dim=8)
    clean = spread * torch.randn(2 * images, model.backbone.channels[0], 4, 4, generator=rng)
    mask = torch.zeros(2 * images, 4, 4)
    mask.flatten(1)[torch.arange(2 * images), torch.randint(16, (2 * images,), generator=rng)] = 1
    defects = clean + 0.7 * mask[:, None] * torch.randn(clean.shape, generator=rng)
    masks = torch.nn.functional.interpolate(mask[:, None], size=(64, 64))[:, 0]
    some, others = (
        Sample(partial(list, [[clean[half]]]), partial(list, [([defects[half]], masks[half])]))
        for half in (slice(images), slice(images, 2 * images))
    )
    mirrored = torch.randn(clean.shape, generator=rng)
    return model, some, others, lambda: [[mirrored]]


EVEN, UNEVEN = torch.full((4, 4), 0.5), torch.tensor([0.1, 0.1, 0.1, 1.0]).expand(4, 4)


def test_a_position_is_judged_by_what_is_usual_there():
    """Where clean images vary, a deviation says less than where they do not."""
    model, *rest = surface(UNEVEN)
    fit(model, *rest)
    distances = model.distances([torch.ones(1, model.backbone.channels[0], 4, 4)])
    assert distances[0, 0, 0, 3] < distances[0, 0, 0, 0] / 2


@pytest.mark.parametrize("spread", [EVEN, UNEVEN])
def test_own_covariances_are_for_positions_that_differ(spread, monkeypatch):
    model, some, others, mirrored = surface(spread)
    given = []

    def spy(*arguments):
        given.extend(copy.deepcopy(arguments[1:3]))  # before they change
        return try_both(*arguments)

    monkeypatch.setattr(gaussian_fit, "try_both", spy)
    trial = fit(model, some, others, mirrored)
    assert trial.differ is (spread is UNEVEN)
    [m] = model.maps
    assert torch.allclose(m.roots, m.roots[:1, :1].expand_as(m.roots)) is (not trial.differ)
    (embedded, factors), (clean, corrupted) = given, (next(iter(others.clean())), next(iter(others.corrupted()))[0])
    assert (embedded[0].weight == 40).all()  # of half of the images
    assert torch.allclose(embedded[0].second, moments_of_positions(model, some)[0].second)
    for auroc, prior, shown in ((trial.in_common, IN_COMMON, mirrored), (trial.own, PRIOR, some.clean)):
        with torch.no_grad():
            fit_positions(model, embedded, factors, prior, shown)
            scores = [model.distances(features).amax(dim=(1, 2, 3)).tolist() for features in (clean, corrupted)]
        right = [(c < d) + (c == d) / 2 for c in scores[0] for d in scores[1]]
        assert auroc == pytest.approx(sum(right) / len(right))


def test_images_without_a_synthetic_defect_count_as_clean():
    model, some, others, mirrored = surface(UNEVEN)
    [(corrupted, masks)], [clean] = others.corrupted(), others.clean()
    more = [torch.cat([corrupted[0], clean[0]])], torch.cat([masks, torch.zeros_like(masks)])
    with torch.no_grad():
        factors = gaussian_fit.fit_directions(model, (some, others))
        embedded = moments_of_positions(model, some)
        trials = [
            try_both(model, embedded, factors, some, Sample(others.clean, lambda batch=batch: [batch]), mirrored)
            for batch in ((corrupted, masks), more)
        ]
    assert trials[0] == pytest.approx(trials[1])


@pytest.mark.parametrize("images", [1, 9])
def test_with_few_images_nothing_is_tried(images):
    model, some, others, mirrored = surface(UNEVEN)
    [clean] = some.clean()
    few = [clean[0][:images]]
    assert fit(model, Sample(lambda: [few], some.corrupted), Sample(list, others.corrupted), mirrored) is None
    [m] = model.maps
    assert torch.allclose(m.roots, m.roots[:1, :1].expand_as(m.roots))
    assert fit(model, Sample(lambda: [few], some.corrupted), others, mirrored) is not None


def test_what_fails_after_the_trial_is_not_taken_for_fitted():
    model, some, others, mirrored = surface(EVEN)
    tries = iter([mirrored])
    with pytest.raises(StopIteration):
        fit(model, some, others, lambda: next(tries)())
    assert not model.fitted


def test_sixteen_bits_leave_the_distances_alone():
    """Squares of distances overflow in half precision; only the backbone's rounding may show."""
    model, clean, *_ = fitted()
    images = clean[:2].clone()
    images[:, :, 8:24, 8:24] = 5
    expected = model(images).pred_score
    with torch.autocast("cpu", torch.float16):
        scores = model(images).pred_score
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, expected, rtol=0.1)


def test_the_score_is_the_mean_of_the_largest_half_per_cent():
    model, clean, *_ = fitted(images=2, image_size=(256, 256), layers=(1, 2))
    with torch.no_grad():
        joint, scores = model.distances(model.smoothed(model.backbone(clean))), model(clean).pred_score
    assert joint.shape[-2:] == (32, 32)
    expected = [sum(sorted(image.flatten().tolist())[-5:]) / 5 for image in joint]
    assert scores.tolist() == pytest.approx(expected)


def refit(model, features, masks, defects=None):
    sample = Sample(lambda: [features], lambda: [(defects or features, masks)])
    fit(model, sample, sample, lambda: [features])


def test_what_it_refuses():
    model = GaussianModel(**TINY_BACKBONE, image_size=(64, 64))
    images = torch.rand(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match="the model is not fitted"):
        model(images)
    with pytest.raises(ValueError, match=r"images must be \(64, 64\) pixels high and wide, got \(64, 32\)"):
        model(images[..., :32])
    with pytest.raises(ValueError, match=r"image_size.* must .* at least 16"):
        GaussianModel(**TINY_BACKBONE, image_size=(8, 64))
    features = model.smoothed(model.backbone(images))
    with pytest.raises(ValueError, match="no synthetic defects"):
        refit(model, features, torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="no synthetic defect stands out from clean images in layer 1"):
        refit(model, features, torch.ones(1, 64, 64))
    alike = [torch.full_like(f, 0.1) for f in features]
    with pytest.raises(ValueError, match="are all alike in layer 1"):
        refit(model, alike, torch.ones(1, 64, 64), features)
    fitted_model, clean, *_ = fitted()
    fitted_model.layer_weights.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="the model is not fitted"):
        fitted_model(clean)


def test_what_fails_half_way_is_not_taken_for_fitted():
    model, clean, *_ = fitted()
    with torch.no_grad():
        features = model.smoothed(model.backbone(clean))
    with pytest.raises(ValueError, match="no synthetic defect stands out"):
        refit(model, features, torch.ones(len(clean), *model.image_size))
    assert not model.fitted


def test_weights_and_state_that_scoring_needs_are_saved():
    model, clean, *_ = fitted()
    other = GaussianModel(**TINY_BACKBONE, image_size=(40, 56))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(clean).pred_score, model(clean).pred_score)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(clean)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
