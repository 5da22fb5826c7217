import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from anomalib_cse.cse_gaussian.moments import (
    STRONGEST,
    Moments,
    contrastive_directions,
    direction_weights,
    inverse_root,
    log_evidence,
    prior_strength,
)


def positive_definite(rng, *shape):
    factor = rng.normal(size=(*shape, shape[-1]))
    return factor @ factor.swapaxes(-1, -2) + np.eye(shape[-1])


def moments_of(vectors, weights=None, *, batches=(slice(None),)):
    """Moments of numpy's ``(*grid, N, C)``, added in batches."""
    moments = Moments(vectors.shape[-1], vectors.shape[:-2])
    for part in batches:
        weighted = None if weights is None else torch.from_numpy(weights[..., part])
        moments.add(torch.from_numpy(vectors[..., part, :]), weighted)
    return moments


def assert_moments(moments, vectors, weights=None, centre=None):
    """Against numpy, of all vectors at once."""
    weights = np.ones(vectors.shape[:-1]) if weights is None else weights
    centre = np.zeros(vectors.shape[-1]) if centre is None else centre
    for cell in np.ndindex(vectors.shape[:-2]):
        v, w = vectors[cell], weights[cell]
        assert np.allclose(moments.mean[cell], np.average(v, axis=0, weights=w))
        own = np.cov(v.T, aweights=w, bias=True)
        assert np.allclose(moments.about(moments.mean[cell])[cell], own, rtol=1e-6)
        about = sum(wi * np.outer(vi - centre, vi - centre) for wi, vi in zip(w, v, strict=True)) / w.sum()
        assert np.allclose(moments.about(torch.from_numpy(centre))[cell], about, rtol=1e-6)


@pytest.mark.parametrize("grid", [(), (2,), (2, 3)])
def test_moments_of_batches_are_numpys_of_all_vectors(grid):
    rng = np.random.default_rng(0)
    vectors, weights = rng.normal(size=(*grid, 30, 4)) + 3, rng.random((*grid, 30))
    batches = slice(7), slice(7, 20), slice(20, 20), slice(20, 30)
    assert_moments(moments_of(vectors, weights, batches=batches), vectors, weights, rng.normal(size=4))
    assert_moments(moments_of(vectors, batches=batches), vectors)


def test_moments_of_halves_positions_and_processes_add_up():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, 3, 20, 4)) + 3
    some, others = moments_of(vectors[..., :8, :]), moments_of(vectors[..., 8:, :])
    assert_moments(some + others, vectors)
    assert_moments((some + others).pooled(), vectors.reshape(-1, 4))
    of_process = {id(a): b for a, b in zip(vars(some).values(), vars(others).values(), strict=True)}
    assert_moments(some.summed(lambda values: values + of_process[id(values)]), vectors)
    assert_moments(some, vectors[..., :8, :])


def test_moments_lose_no_digits_far_from_zero():
    """Single precision would leave nothing of a deviation of 0.01 from 1000."""
    vectors = 1000 + np.random.default_rng(0).normal(scale=0.01, size=(500, 3)).astype(np.float32)
    covariance = moments_of(vectors).about(torch.from_numpy(vectors.mean(axis=0, dtype=float)))
    assert np.allclose(covariance, np.cov(vectors.astype(float).T, bias=True), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dim", [1, 3, 5])
def test_contrastive_directions_solve_the_generalised_eigenproblem(dim):
    rng = np.random.default_rng(0)
    clean, defects = positive_definite(rng, 5), positive_definite(rng, 5)
    directions, ratios = contrastive_directions(torch.from_numpy(clean), torch.from_numpy(defects), dim)
    values, vectors = scipy.linalg.eigh(defects, clean)
    assert np.allclose(ratios, values[::-1][:dim])
    assert np.allclose(np.abs(directions.numpy().T @ clean @ vectors[:, ::-1][:, :dim]), np.eye(dim))


def test_inverse_root_is_scipys():
    matrices = positive_definite(np.random.default_rng(0), 2, 3, 4)
    roots = inverse_root(torch.from_numpy(matrices))
    for cell in np.ndindex(2, 3):
        assert np.allclose(roots[cell], np.linalg.inv(scipy.linalg.sqrtm(matrices[cell])))


def test_the_weight_of_a_direction_is_the_factor_of_the_log_likelihood_ratio():
    ratios = torch.tensor([4.0, 1.0, 0.2])
    clean = torch.distributions.Normal(0, 1)
    for ratio, factor in zip(ratios[:2].tolist(), direction_weights(ratios)[:2], strict=True):
        defects = torch.distributions.Normal(0, ratio**0.5)
        gain = [2 * (defects.log_prob(x) - clean.log_prob(x)) for x in torch.tensor([0.0, 3.0])]
        assert (gain[1] - gain[0]).item() == pytest.approx(9 * factor.item(), abs=1e-5)
    assert direction_weights(ratios)[2] == 0  # varies less in defects, and says nothing


def second_moments(vectors):
    """Of vectors ``(P, N, D)``, ``(P, D, D)``."""
    return torch.from_numpy(vectors.swapaxes(1, 2) @ vectors / vectors.shape[1])


@pytest.mark.parametrize("strength", [0.5, 3.0, 40.0])
def test_log_evidence_is_that_of_vectors_that_come_one_by_one(strength):
    """Given those before it, a vector has Student's t distribution."""
    vectors = np.random.default_rng(0).normal(size=(2, 5, 3)) * [1, 2, 0.3]
    expected = 0.0
    for position in vectors:
        scale, freedom = strength * np.eye(3), strength + 4
        for vector in position:
            expected += scipy.stats.multivariate_t.logpdf(vector, shape=scale / (freedom - 2), df=freedom - 2)
            scale, freedom = scale + np.outer(vector, vector), freedom + 1
    constant = -vectors.size / 2 * np.log(np.pi)
    variances = torch.linalg.eigvalsh(second_moments(vectors))
    found = log_evidence(strength, variances, torch.full((2,), 5.0, dtype=torch.float64))
    assert found + constant == pytest.approx(expected)


def test_positions_without_vectors_say_nothing():
    variances, counts = torch.rand(3, 4, dtype=torch.float64), torch.tensor([7.0, 0.0, 5.0], dtype=torch.float64)
    assert log_evidence(2.0, variances, counts) == pytest.approx(log_evidence(2.0, variances[::2], counts[::2]))


@pytest.mark.parametrize("strength", [3, 30])
def test_prior_strength_is_that_which_covariances_were_drawn_with(strength):
    covariances = scipy.stats.invwishart.rvs(strength + 5, strength * np.eye(4), size=400, random_state=0)
    normal = np.random.default_rng(0).normal(size=(400, 25, 4))
    vectors = normal @ np.linalg.cholesky(covariances).swapaxes(1, 2)
    counts = torch.full((20, 20), 25.0, dtype=torch.float64)
    assert prior_strength(second_moments(vectors).view(20, 20, 4, 4), counts) == pytest.approx(strength, rel=0.15)


def test_prior_is_as_strong_as_can_be_where_all_positions_are_alike():
    vectors = np.random.default_rng(0).normal(size=(400, 25, 4))
    assert prior_strength(second_moments(vectors), torch.full((400,), 25.0, dtype=torch.float64)) > STRONGEST / 1000
