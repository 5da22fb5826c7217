"""The closed form against naive loops in numpy, and under anomalib's engine."""

import copy
import math
import os
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from scipy.spatial.distance import mahalanobis
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import ColorJitter

from anomalib_cse import CseGaussian, CseGaussianModel
from anomalib_cse.cse_gaussian.fit import fit
from anomalib_cse.cse_gaussian.folds import unseen_scores
from anomalib_cse.cse_gaussian.moments import RIDGE
from anomalib_cse.cse_gaussian.sample import FEWEST_KEPT, TrainingSample
from anomalib_cse.cse_gaussian.torch_model import (
    GaussianMap,
    directions_of,
    geometric_mean,
    image_score,
    sharpen,
    smooth,
)
from anomalib_cse.cse_gaussian.variations import VARIATIONS, varied

from tiny import COMMON, QUIET, data_of

SIZE = (48, 64)  # multiples of all strides


@pytest.fixture(scope="module", autouse=True)
def mild_variation():
    """One that is not random, and as images of noise can bear."""
    brighter = 1 + 0.05 * torch.linspace(-1, 1, SIZE[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            VARIATIONS, "blur", lambda images, _: images * F.interpolate(brighter[None, None], images.shape[-1])
        )
        yield


def new_model(**options):
    torch.manual_seed(0)
    return CseGaussianModel("test_efficientnet", pre_trained=False, **{"embedding_dim": 6, **options})


def test_smooth_equals_a_naive_loop():
    maps = torch.rand(2, 3, 4, 5)
    smoothed = smooth(maps)
    weights = {-1: 0.25, 0: 0.5, 1: 0.25}
    for i, j in np.ndindex(4, 5):
        expected = sum(
            weights[di] * weights[dj] * maps[:, :, min(max(i + di, 0), 3), min(max(j + dj, 0), 4)]
            for di, dj in product(weights, weights)
        )
        assert torch.allclose(smoothed[:, :, i, j], expected)


def test_sharpen_multiplies_by_the_excess_over_what_is_around():
    maps = torch.rand(2, 1, 4, 5)
    assert torch.allclose(sharpen(maps), maps * (maps / smooth(maps)) ** 3)
    assert torch.equal(sharpen(torch.zeros(1, 1, 4, 5)), torch.zeros(1, 1, 4, 5))


@pytest.mark.parametrize(("size", "count"), [((4, 5), 1), ((10, 30), 2), ((32, 32), 5)])
def test_image_score_is_the_mean_of_the_largest_half_per_cent(size, count):
    maps = torch.rand(3, 1, *size)
    expected = [sum(sorted(image.flatten().tolist())[-count:]) / count for image in maps]
    assert image_score(maps).tolist() == pytest.approx(expected)


def test_layers_are_joined_by_their_weighted_geometric_mean():
    maps, weights = torch.rand(2, 3, 4, 5), torch.tensor([0.2, 0.3, 0.5]).view(1, 3, 1, 1)
    expected = scipy.stats.gmean(maps.numpy(), axis=1, weights=weights.expand_as(maps).numpy())
    assert np.allclose(geometric_mean(maps, weights)[:, 0], expected)
    maps[:, 1] = 0
    assert (geometric_mean(maps, weights) == 0).all()


@pytest.mark.parametrize("shape", [(), (4, 6)], ids=["in common", "own"])
def test_distances_are_mahalanobis_distances_from_the_positions_gaussian(shape):
    rng = np.random.default_rng(0)
    gaussian, mean, directions = GaussianMap(7, 3), rng.normal(size=7), rng.normal(size=(7, 3))
    factor = rng.normal(size=(*shape, 3, 3))
    covariances = np.broadcast_to(factor @ factor.swapaxes(-1, -2) + np.eye(3), (4, 6, 3, 3))
    roots = np.linalg.inv(np.linalg.cholesky(covariances)).swapaxes(-1, -2)
    scale, features = rng.random((4, 6)), rng.normal(size=(2, 7, 4, 6))
    values = {"mean": mean, "directions": directions, "roots": roots if shape else roots[0, 0], "scale": scale}
    for name, value in values.items():
        gaussian.set(name, torch.from_numpy(value))
    distances = gaussian(torch.from_numpy(features).float())
    assert distances.shape == (2, 1, 4, 6)
    for image, i, j in np.ndindex(2, 4, 6):
        embedding = (features[image, :, i, j] - mean) @ directions
        expected = mahalanobis(embedding, np.zeros(3), np.linalg.inv(covariances[i, j])) * scale[i, j]
        assert distances[image, 0, i, j].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("channels", "most", "dim"), [(112, 64, 64), (40, 64, 32), (40, 40, 40), (40, 6, 6), (9, 64, 9)]
)
def test_a_layer_has_no_more_directions_than_channels_and_whole_registers(channels, most, dim):
    assert directions_of(channels, most) == dim


class Patch:
    """Paints the same patch into every image whose first pixel is bright, so that numpy can do it too."""

    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[:, 6:34, 2:26] = True
    pattern = 0.06 * torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1))

    def sample(self, shape, generator):
        return SimpleNamespace(mask=torch.zeros(shape[0], 1, *shape[2:], dtype=torch.bool))

    def apply(self, images, params):
        params.mask[images[:, 0, 0, 0] > 0.5] = self.mask
        return torch.where(params.mask, images + self.pattern, images)


def images_of(kind, count=16):
    """Of a smooth surface, on which all places vary alike; or of a part, of which some fields hardly do."""
    images = torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(0)) - 0.5
    if kind == "part":
        rows, columns = torch.arange(SIZE[0])[:, None] // 20, torch.arange(SIZE[1]) // 28
        images *= torch.where((rows + columns) % 2 == 0, 0.1, 1.0)
    else:
        images = 3 * F.avg_pool2d(images, 9, stride=1, padding=4)
    images[:, :, 0, 0] = torch.tensor([-0.1, 0.1, 0.1, 0.1, 0.1]).repeat(count)[:count, None]  # every fifth stays clean
    return images + 0.5


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.linux
@torch.no_grad()
def test_the_process_grows_by_the_images_that_are_kept():
    model = CseGaussianModel("tf_efficientnet_lite0", pre_trained=False)
    sample = TrainingSample(2**30, torch.Generator().manual_seed(0))
    before = bytes_kept = 0
    for batch in range(16):
        images = torch.rand(8, 3, 256, 256)
        features = model.smoothed_features(images)
        sample.add(images, features)
        if batch < 4:  # until all that is needed for a batch has been taken once
            before = resident()
        else:
            bytes_kept += sum(values.nbytes for values in (images, *features))
    assert resident() - before < 2 * bytes_kept


def sample_of(model, images, budget=2**30, batch=5):
    sample = TrainingSample(budget, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in images.split(batch):
            sample.add(part, model.smoothed_features(part))
    return sample


def features_of(model, images):
    """Of each layer ``(N, h, w, C)``."""
    with torch.no_grad():
        return [f.movedim(1, -1).double().numpy() for f in model.smoothed_features(images)]


class NaiveLayer:
    """Mean, directions and weights of evidence, of all images at once; then distances with loops."""

    def __init__(self, clean, defects, masks, varied, dim):
        flat = clean.reshape(-1, clean.shape[-1])
        change = (varied - clean).reshape(flat.shape)
        self.clean = np.cov(flat.T, bias=True)
        ridge = RIDGE * np.trace(self.clean) / len(self.clean) * np.eye(len(self.clean))
        self.mean = flat.mean(axis=0)
        cover = F.adaptive_avg_pool2d(masks.double(), clean.shape[1:3]).numpy().reshape(-1, 1)
        away = defects.reshape(flat.shape) - self.mean
        background = self.clean + ridge + change.T @ change / len(change)
        ratios, vectors = scipy.linalg.eigh((away * cover).T @ away / cover.sum(), background)
        self.directions = vectors[:, ::-1][:, :dim]
        self.factors = np.maximum(1 - 1 / ratios[::-1][:dim], 0)
        self.in_common = self.directions.T @ (background - self.clean) @ self.directions

    def distances(self, features, own, strength):
        """``(N, h, w)``; positions have covariances of their own, of features ``own``, if the strength is finite."""
        embedded, distances = (features - self.mean) @ self.directions, np.zeros(features.shape[:3])
        for i, j in np.ndindex(*features.shape[1:3]):
            covariance = np.eye(len(self.factors))
            if np.isfinite(strength):
                here = (own[:, i, j] - self.mean) @ self.directions
                moment = here.T @ here / len(here) + self.in_common
                covariance = (len(here) * moment + strength * covariance) / (len(here) + strength)
            whitened = embedded[:, i, j] @ np.linalg.inv(scipy.linalg.sqrtm(covariance).real)
            distances[:, i, j] = np.sqrt((self.factors * whitened**2).sum(axis=-1))
        return distances


def naive_joint(layers, features, shown, strengths):
    """The joint map ``(N, 1, h, w)``: distances are 1 on average over the features ``shown``.

    They are so at every position with covariances of their own, else, as the means of rows and columns say.
    """
    maps = []
    for layer, tested, usual, strength in zip(layers, features, shown, strengths, strict=True):
        mean = layer.distances(usual, usual, strength).mean(axis=0)
        in_common = np.outer(mean.mean(axis=1), mean.mean(axis=0)) / mean.mean()
        maps.append(layer.distances(tested, usual, strength) / (mean if np.isfinite(strength) else in_common))
    large = [F.interpolate(torch.from_numpy(m)[:, None], maps[0].shape[1:], mode="bilinear").numpy() for m in maps]
    total = sum(layer.factors.sum() for layer in layers)
    return np.prod([m ** (layer.factors.sum() / total) for m, layer in zip(large, layers, strict=True)], axis=0)


def naive_scores(joint):
    count = max(1, round(0.005 * joint[0].size))
    return np.sort(joint.reshape(len(joint), -1))[:, -count:].mean(axis=1)


VARIED = ("blur",)  # all of 16 images as often as one another


def all_features(model, images):
    """Of images as they are, with defects, and varied; and where the defects are."""
    params = Patch().sample(images.shape, None)
    painted = Patch().apply(images, params)
    return *(features_of(model, each) for each in (images, painted, varied(images, *VARIED, None))), params.mask


@pytest.fixture(params=[True, False], ids=["own covariances", "in common"])
def own(request, monkeypatch):
    """Whether positions have covariances of their own."""
    monkeypatch.setattr("anomalib_cse.cse_gaussian.fit.LEAST_OWN", 0.1 if request.param else 1)
    return request.param


def test_fit_and_forward_equal_numpys_of_all_images_at_once(own):
    model, images = new_model(layers=(1, 2, 3)), images_of("part")  # strides 4 and 8, on one grid, and 16
    strengths = fit(model, sample_of(model, images), Patch(), VARIED, 0).strengths
    assert np.isfinite(strengths).tolist() == [own] * 3
    assert [g.roots.dim() for g in model.maps] == [4 if own else 2] * 3
    clean, defects, changed, masks = all_features(model, images)
    layers = [NaiveLayer(c, d, masks, v, 6) for c, d, v in zip(clean, defects, changed, strict=True)]
    joint = naive_joint(layers, features_of(model, images.flip(1)), clean, strengths)
    scored = model(images.flip(1))
    assert scored.pred_score.numpy() == pytest.approx(naive_scores(joint), rel=1e-4)
    expected = F.interpolate(sharpen(torch.from_numpy(joint)), SIZE, mode="bilinear")
    assert np.allclose(scored.anomaly_map, expected, rtol=1e-4)


def test_unseen_scores_are_those_of_fits_to_the_other_images(own):
    model, images = new_model(layers=(1, 2, 3)), images_of("part")
    sample = TrainingSample(2**30, torch.Generator().manual_seed(0))
    for start in range(0, 16, 5):
        part = images[start : start + 5]
        with torch.no_grad():
            sample.add(part, model.smoothed_features(part), [str(start + n) for n in range(len(part))])
    fitted = fit(model, sample, Patch(), VARIED, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = unseen_scores(model, sample, fitted, VARIED, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    clean, defects, changed, masks = all_features(model, images)
    assert sorted(found.paths, key=int) == [str(number) for number in range(16)]
    of_changed = []
    for fold in range(5):
        unseen, seen = [n for n in range(16) if n % 5 == fold], [n for n in range(16) if n % 5 != fold]
        shown = [f[seen] for f in clean]
        parts = zip(shown, defects, changed, strict=True)
        layers = [NaiveLayer(c, d[seen], masks[seen], v[seen], 6) for c, d, v in parts]
        joint = naive_joint(layers, [f[unseen] for f in clean], shown, fitted.strengths)
        of_changed += naive_scores(naive_joint(layers, [f[unseen] for f in changed], shown, fitted.strengths)).tolist()
        maps = F.interpolate(sharpen(torch.from_numpy(joint)), SIZE, mode="bilinear").numpy()
        places = [found.paths.index(str(number)) for number in unseen]
        assert found.images[places].numpy() == pytest.approx(naive_scores(joint), rel=1e-4)
        assert found.pixels[places].numpy() == pytest.approx(maps.max(axis=(1, 2, 3)), rel=1e-4)
    assert found.varied[0].tolist() == pytest.approx(of_changed, rel=1e-4)


class Counting(Patch):
    def __init__(self):
        self.painted = 0

    def apply(self, images, params):
        self.painted += len(images)
        return super().apply(images, params)


@pytest.mark.parametrize(("images", "painted"), [(2, 16), (9, 16), (41, 41), (140, 128)])
def test_as_many_images_get_defects_as_there_are_within_bounds(images, painted):
    model, synthesis = new_model(layers=(2, 3)), Counting()
    fit(model, sample_of(model, images_of("surface", images)), synthesis, (), 0)
    assert synthesis.painted == painted


def test_the_log_says_how_much_positions_have_of_their_own(mvtec_root, dtd, tmp_path, caplog, monkeypatch):
    strengths = {"surface": [math.inf, 190], "part": [10, 2.5]}
    for values in map(iter, strengths.values()):
        monkeypatch.setattr("anomalib_cse.cse_gaussian.fit.strength_of", lambda *_, left=values: next(left))
        with caplog.at_level("INFO"):
            fit_with(tmp_path, datamodule=data_of(mvtec_root))
    said = [record.getMessage() for record in caplog.records if "covariance" in record.getMessage()]
    start = "What a position's own images say of its covariance counts"
    assert said == [f"{start} 0% in layer 2, 5% in layer 3.", f"{start} 50% in layer 2, 80% in layer 3."]


def fitted(images=None, variations=VARIED, **options):
    model = new_model(layers=(2, 3))
    images = images_of("part") if images is None else images
    fit(model, sample_of(model, images, **options), Patch(), variations, 0)
    return model


@pytest.fixture(scope="module")
def part():
    return fitted()


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batch_sizes_do_not_change_the_fit(batch, part):
    images = images_of("part")
    assert torch.allclose(fitted(batch=batch)(images).anomaly_map, part(images).anomaly_map, rtol=1e-4)


def test_scoring_changes_nothing_and_needs_only_the_state(part):
    images, before = images_of("part"), copy.deepcopy(part.state_dict())
    other = new_model(layers=(2, 3))
    other.load_state_dict(before)
    assert torch.equal(other.train()(images).pred_score, part(images).pred_score)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(parameter.requires_grad for parameter in part.parameters())


def test_half_precision_leaves_distances_alone(part):
    """Only rounding may show."""

    images = images_of("part")
    images[:, :, 8:24, 8:24] = 1
    expected = part(images).pred_score
    with torch.autocast("cpu", torch.float16):
        scores = part(images).pred_score
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, expected, rtol=5e-3)  # half precision has 1e-3, of features


@pytest.mark.parametrize("budget", [0, 1_200_000])
def test_memory_is_bounded_and_own_covariances_give_way_to_one(budget):
    model, images = new_model(layers=(2, 3)), images_of("part", 70)
    sample = sample_of(model, images, budget)
    kept = len(sample.kept)
    assert sample.count == 70
    assert kept == FEWEST_KEPT if budget == 0 else FEWEST_KEPT < kept < 70
    size = sum(image.nbytes + sum(f.nbytes for f in model.smoothed_features(image[None])) for image in images[:1])
    assert kept * size <= budget or budget == 0
    fit(model, sample, Patch(), VARIED, 0)
    assert [g.roots.dim() for g in model.maps] == [2, 2]
    flat = features_of(model, images)[0].reshape(-1, model.backbone.channels[0])
    assert np.allclose(model.maps[0].mean, flat.mean(axis=0), atol=1e-5)  # of all images, whichever were kept


def test_every_image_is_as_likely_to_be_kept():
    images = torch.arange(60.0).view(60, 1, 1, 1).expand(-1, 3, 1, 1)
    kept = Counter()
    for seed in range(200):
        sample = TrainingSample(0, torch.Generator().manual_seed(seed))
        for part in images.split(20):
            sample.add(part, [part])
        kept.update(int(one.image[0, 0, 0]) for one in sample.kept)
    share = FEWEST_KEPT / 60
    assert sorted(kept) == list(range(60))
    assert all(abs(count - 200 * share) < 4.5 * (200 * share * (1 - share)) ** 0.5 for count in kept.values())


class Unseen(Patch):
    pattern = torch.zeros(3, 1, 1)


class Unpainted(Patch):
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)


@pytest.mark.parametrize(
    ("synthesis", "spoil", "message"),
    [
        (Unpainted(), lambda f: f, "no synthetic defects to select the embedding by"),
        (
            Unseen(),
            lambda f: torch.randn(f.shape).mul(100),
            "no synthetic defect stands out from clean images in layer 2",
        ),
        (Patch(), lambda f: f * torch.nan, "features of the training images are NaN or infinite"),
        (Patch(), lambda f: torch.ones_like(f) / 10, "features of the training images are all alike in layer 2"),
    ],
)
def test_fit_refuses_and_leaves_no_model_that_seems_fitted(synthesis, spoil, message, part):
    model, images = copy.deepcopy(part), images_of("part")
    sample = TrainingSample(2**30, torch.Generator())
    sample.add(images, [spoil(f) for f in model.smoothed_features(images)])
    with pytest.raises(ValueError, match=message):
        fit(model, sample, synthesis, VARIED, 0)
    with pytest.raises(RuntimeError, match="the model is not fitted"):
        model(images)


def test_forward_refuses_other_sizes_and_a_model_that_is_not_fitted(part):
    with pytest.raises(RuntimeError, match="the model is not fitted"):
        new_model()(torch.rand(1, 3, *SIZE))
    with pytest.raises(ValueError, match=r"images must be \(48, 64\) pixels high and wide.* got \(48, 32\)"):
        part(torch.rand(1, 3, 48, 32))


def fit_with(results, *loaders, trainer=None, **data):
    """Fit by anomalib's engine, with training images in the same order."""
    model = CseGaussian(**COMMON)
    torch.manual_seed(0)
    engine = Engine(default_root_dir=results, **QUIET, **(trainer or {}))
    engine.fit(model, *loaders, **data)
    return model


def assert_same_model(model, expected, rtol=1e-4):
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, wanted = model.model(images), expected.model(images)
    assert torch.allclose(found.anomaly_map, wanted.anomaly_map, rtol=rtol)


@pytest.fixture(scope="module")
def reference(mvtec_root, tmp_path_factory):
    return fit_with(tmp_path_factory.mktemp("reference"), datamodule=data_of(mvtec_root))


def test_white_squares_are_found_after_one_epoch(reference, mvtec_root, tmp_path):
    engine = Engine(max_epochs=5, default_root_dir=tmp_path, **QUIET)
    [metrics] = engine.test(reference, datamodule=data_of(mvtec_root))
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.9


@pytest.mark.parametrize("options", [{"train_batch_size": 3}, {"train_batch_size": 1, "num_workers": 1}], ids=str)
def test_batches_and_workers_do_not_change_a_run(options, reference, mvtec_root, tmp_path):
    assert_same_model(fit_with(tmp_path, datamodule=data_of(mvtec_root, **options)), reference)


def test_validation_and_an_earlier_fit_do_not_change_a_run(reference, mvtec_root, tmp_path):
    model = copy.deepcopy(reference)
    dark = data_of(mvtec_root, train_augmentations=ColorJitter(brightness=0.9))
    Engine(default_root_dir=tmp_path, **QUIET).fit(model, datamodule=dark)
    with pytest.raises(AssertionError):  # augmentations are used
        assert_same_model(model, reference, rtol=0.01)
    torch.manual_seed(0)
    Engine(default_root_dir=tmp_path, limit_val_batches=0, **QUIET).fit(model, datamodule=data_of(mvtec_root))
    assert_same_model(model, reference)


@pytest.mark.parametrize(
    "arguments",
    [
        {"embedding_dim": 3},
        {"defects": ["textural"]},
        {"variations": ["light"]},
        {"layers": (1, 3)},
        {"center_crop_size": (48, 64)},
        "dtd_dir",
    ],
    ids=str,
)
def test_every_argument_matters(arguments, reference, mvtec_root, dtd, tmp_path):
    model = CseGaussian(**{**COMMON, **({"dtd_dir": dtd} if arguments == "dtd_dir" else arguments)})
    model.model.backbone.load_state_dict(reference.model.backbone.state_dict(), strict=False)
    Engine(default_root_dir=tmp_path, **QUIET).fit(model, datamodule=data_of(mvtec_root))
    if "center_crop_size" in arguments:  # maps of another size cannot be compared
        assert model.model.image_size.tolist() == list(arguments["center_crop_size"])
        return
    with pytest.raises(AssertionError):
        assert_same_model(model, reference)


def test_seed_decides_the_defects(reference, mvtec_root, tmp_path):
    model = CseGaussian(**{**COMMON, "seed": 1})
    model.model.backbone.load_state_dict(reference.model.backbone.state_dict())
    torch.manual_seed(0)
    Engine(default_root_dir=tmp_path, **QUIET).fit(model, datamodule=data_of(mvtec_root))
    with pytest.raises(AssertionError):
        assert_same_model(model, reference)


def test_same_seed_gives_the_same_model_whatever_the_global_random_numbers(reference, mvtec_root, tmp_path):
    model = CseGaussian(**COMMON)
    torch.manual_seed(1)
    Engine(default_root_dir=tmp_path, **QUIET).fit(model, datamodule=data_of(mvtec_root))
    assert_same_model(model, reference)


def test_mixed_precision_finds_white_squares(mvtec_root, tmp_path):
    data = data_of(mvtec_root)
    model = fit_with(tmp_path, datamodule=data, trainer={"precision": "bf16-mixed"})
    [metrics] = Engine(default_root_dir=tmp_path, **QUIET).test(model, datamodule=data)
    assert metrics["image_AUROC"] == 1
    assert all(v.dtype in (torch.float32, torch.int64, torch.bool) for v in model.state_dict().values())


class Images(torch.utils.data.Dataset):
    """The user's own images, which no datamodule knows."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return ImageItem(image=self.images[index], image_path=f"{index}.raw")


def loader_of(images):
    return DataLoader(Images(images), batch_size=4, collate_fn=ImageBatch.collate)


FEW = {
    **{f"{n} of noise": torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(0)) for n in (1, 2, 3, 12)},
    "black": torch.zeros(4, 3, 64, 64),
    "identical": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).repeat(12, 1, 1, 1),
}


@pytest.mark.parametrize("images", FEW.values(), ids=FEW)
def test_few_black_and_identical_images_from_own_loaders_give_finite_scores(images, tmp_path):
    model = fit_with(tmp_path, loader_of(images))
    unlike = torch.rand(2, 3, 64, 64)
    unlike[:, :, 16:48, 16:48] = 1
    scored = model.model(torch.cat([images, unlike]))
    assert scored.anomaly_map.isfinite().all()
    assert scored.pred_score[-2:].min() > scored.pred_score[:-2].max()


def test_trainer_of_lightnings_own_fits_in_one_epoch(reference, mvtec_root, tmp_path):
    model = CseGaussian(**COMMON)
    torch.manual_seed(0)
    trainer = Trainer(default_root_dir=tmp_path, enable_checkpointing=False, num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, datamodule=data_of(mvtec_root))
    assert trainer.current_epoch == 1
    assert_same_model(model, reference)


def test_layer_in_which_no_defect_stands_out_counts_for_nothing(monkeypatch):
    """A fine grain that variations take away may leave nothing to see in a fine layer."""
    model, images = new_model(layers=(2, 3)), images_of("part")
    real = model.smoothed_features

    def of_one_layer(*given):
        fine, coarse = real(*given)
        return [torch.randn(fine.shape, generator=torch.Generator().manual_seed(0)), coarse]

    monkeypatch.setattr(model, "smoothed_features", of_one_layer)
    with pytest.warns(UserWarning, match="stands out from clean images in layer 2: leave it out .* counts for nothing"):
        fit(model, sample_of(model, images), Patch(), VARIED, 0)
    assert model.layer_weights.flatten().tolist() == [0, 1]
    expected = model.maps[1](of_one_layer(images)[1])
    assert torch.allclose(
        model.joint_distances(of_one_layer(images)), F.interpolate(expected, scale_factor=2, mode="bilinear")
    )
