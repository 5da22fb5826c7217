"""Thresholds from good images: rates that come true, on the whole way from the fit to the camera loop."""

import copy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.stats
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

from anomalib_cse import Cse
from anomalib_cse.cse.centres import unseen_scores
from anomalib_cse.deployment import MidwayPostProcessor, compare_good_images
from anomalib_cse.deployment.comparison import Comparison
from anomalib_cse.deployment.good_scores import GoodScores, UnseenScores
from anomalib_cse.deployment.post_processing import scaled, unscaled
from anomalib_cse.deployment.thresholds import MidwayThreshold
from anomalib_cse.preflight.__main__ import main as check

from tiny import COMMON, MODELS, QUIET, data_of

CAMERA_LOOP = Path(__file__).parents[1] / "examples" / "camera_loop.py"
BOTH = pytest.mark.parametrize("name", MODELS)
UNVALIDATED = {**QUIET, "limit_val_batches": 0}


@pytest.mark.parametrize(("number", "rate"), [(5, 0.1), (24, 0.01), (24, 0.1), (100, 0.01)])
def test_rates_of_simulated_scores_are_those_expected_and_within_their_intervals(number, rate):
    """Scores are exponentials of normal numbers of mean 0.5 and deviation 0.2, so that true rates are known."""
    draws = torch.randn(3000, number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spreads = [GoodScores.of((0.5 + 0.2 * logs).exp()) for logs in draws]
    true = np.array([scipy.stats.norm.sf(np.log(spread.threshold(rate)), 0.5, 0.2) for spread in spreads])
    assert true.mean() == pytest.approx(rate, rel=0.06)
    low, high = np.array([spread.interval(rate) for spread in spreads[:300]]).T
    assert np.allclose(low, low[0])  # they depend on number and rate alone
    assert ((true > low[0]) & (true < high[0])).mean() == pytest.approx(0.9, abs=0.02)
    assert spreads[0].rate(spreads[0].threshold(rate)) == pytest.approx(rate)


def test_a_planted_outlier_is_suspected_and_few_others_are():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(1)).mul(0.1).exp()
    paths = [f"{number}.png" for number in range(40)]
    assert UnseenScores(scores, scores, paths).suspicious() == []
    scores[7] = 2.0
    [(path, score)] = UnseenScores(scores, scores, paths).suspicious()
    assert (path, score) == ("7.png", 2.0)
    drawn = torch.randn(200, 24, generator=torch.Generator().manual_seed(2)).exp()
    suspected = [bool(UnseenScores(row, row, paths[:24]).suspicious()) for row in drawn]
    assert np.mean(suspected) == pytest.approx(0.05, abs=0.03)


def test_threshold_is_of_images_as_they_are_and_as_they_are_varied():
    scores, varied = torch.tensor([1.0, 2, 4, 8, 16]), torch.tensor([3.0, 5, 9])
    good = GoodScores.of(scores, varied)
    logs = [np.log([1, 2, 4, 8, 16]), np.log([3, 5, 9])]
    draws = np.random.default_rng(0).choice(2, 400_000)  # of a mixture in equal parts
    mixed = np.where(
        draws, *(np.random.default_rng(n).normal(p.mean(), p.std(ddof=1), 400_000) for n, p in enumerate(logs))
    )
    assert good == pytest.approx((5, mixed.mean(), mixed.std()), rel=0.01)
    twice = GoodScores.of(scores.repeat(1000), varied.repeat(1000))
    assert GoodScores.of(scores.repeat(1000), varied.repeat(500)) == pytest.approx(twice, rel=1e-3)
    post_processor = MidwayPostProcessor(0.1)
    post_processor.learn(UnseenScores(scores, 2 * scores, list("abcde"), torch.stack([varied, 3 * varied])))
    assert post_processor.image_threshold.item() == pytest.approx(good.threshold(0.1))
    expected = GoodScores.of(2 * scores, 3 * varied).threshold(0.1)
    assert post_processor.pixel_threshold.item() == pytest.approx(expected)
    rejected = [(found > post_processor.image_threshold).double().mean() for found in (scores, varied)]
    assert post_processor.counted == (
        f" Of these, {100 * rejected[0]:.2g} % are rejected as they are, {100 * rejected[1]:.2g} % as variations "
        "change them."
    )


def test_comparison_says_when_scores_have_moved():
    old, new = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)).exp()
    good = GoodScores.of(old)
    threshold = good.threshold(0.1)
    same, moved = Comparison.of(good, new, threshold), Comparison.of(good, 2 * new, threshold)
    assert same.expected == pytest.approx(0.1)
    assert same.measured == pytest.approx((new > threshold).float().mean().item())
    assert not same.has_moved
    assert moved.has_moved
    assert not Comparison.of(good, new / 2, threshold).has_moved  # no more of them will be rejected
    assert moved.shift - same.shift == pytest.approx(np.log(2) / good.deviation)
    assert "2" + "00 new good images" in str(moved)


def fitted(name, root, dtd, folder, trainer=UNVALIDATED, data=None, **options):
    model = MODELS[name](**{**COMMON, "dtd_dir": str(dtd), **options})
    engine = Engine(max_epochs=2, default_root_dir=folder, **trainer)
    engine.fit(model, datamodule=data or data_of(root))
    return model, engine


def many(root, count=20):
    """A dataset of so many training images, that Cse holds 6 out of."""
    rng = np.random.default_rng(3)
    for number in range(count):
        path = root / "many" / "train" / "good" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(90, 110, (72, 96, 3), dtype=np.uint8))
    return Folder(
        name="many",
        root=root / "many",
        normal_dir="train/good",
        test_split_mode="none",
        val_split_mode="none",
        train_batch_size=8,
        num_workers=0,
    )


@pytest.fixture(scope="module")
def rejecting(mvtec_root, dtd, tmp_path_factory):
    """Both models fitted without validation, with a rate of rejects; and the checkpoints."""
    models = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        model, engine = fitted(name, mvtec_root, dtd, folder, data=many(folder), reject_rate=0.05)
        models[name] = model, engine.best_model_path
    return models


@BOTH
def test_thresholds_need_no_validation_and_are_quantiles_of_unseen_scores(name, rejecting):
    model, _ = rejecting[name]
    own = model.post_processor
    for threshold, (number, mean, deviation) in (
        (own.image_threshold, own.good_images.tolist()),
        (own.pixel_threshold, own.good_pixels.tolist()),
    ):
        assert number == (20 if name == "CseGaussian" else 6)
        quantile = scipy.stats.t.ppf(0.95, number - 1, mean, deviation * np.sqrt(1 + 1 / number))
        assert threshold.item() == pytest.approx(np.exp(quantile), rel=1e-5)
    assert (own.image_min, own.image_max) == (0, pytest.approx(2 * own.image_threshold.item()))


@BOTH
def test_rate_survives_the_checkpoint_and_can_be_changed_after_it(name, rejecting):
    model, path = rejecting[name]
    loaded = MODELS[name].load_from_checkpoint(path)
    own = loaded.post_processor
    assert own.reject_rate == 0.05
    assert torch.equal(own.image_threshold, model.post_processor.image_threshold)
    own.reject_rate = 0.01
    assert own.image_threshold > model.post_processor.image_threshold
    own.reject_rate = 0.05
    assert own.image_threshold.item() == pytest.approx(model.post_processor.image_threshold.item())
    with pytest.raises(ValueError, match=r"reject_rate must be a number in \(0, 0.5\], got 0.7"):
        own.reject_rate = 0.7


def test_a_checkpoint_from_before_good_scores_were_kept_loads(rejecting, tmp_path):
    checkpoint = torch.load(rejecting["CseGaussian"][1], weights_only=True)
    for name in ("good_images", "good_pixels"):
        del checkpoint["state_dict"][f"post_processor.{name}"]
    del checkpoint["anomalib_post_processor_config"]["reject_rate"], checkpoint["hyper_parameters"]["reject_rate"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    own = MODELS["CseGaussian"].load_from_checkpoint(tmp_path / "old.ckpt").post_processor
    assert (own.reject_rate, own.knows_good_scores) == (None, False)
    assert torch.equal(own.image_threshold, rejecting["CseGaussian"][0].post_processor.image_threshold)


@BOTH
def test_a_changed_rate_is_saved_with_the_model(name, rejecting, mvtec_root, tmp_path):
    model = MODELS[name].load_from_checkpoint(rejecting[name][1])
    model.post_processor.reject_rate = 0.2
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    engine.test(model, datamodule=data_of(mvtec_root))
    engine.trainer.save_checkpoint(tmp_path / "changed.ckpt")
    loaded = MODELS[name].load_from_checkpoint(tmp_path / "changed.ckpt")
    assert (loaded.post_processor.reject_rate, loaded.hparams["reject_rate"]) == (0.2, 0.2)
    assert torch.equal(loaded.post_processor.image_threshold, model.post_processor.image_threshold)


def test_a_rate_that_cannot_be_told_is_refused(trained, rejecting, tmp_path):
    model = MODELS["CseGaussian"].load_from_checkpoint(trained["CseGaussian"][1])
    with pytest.raises(ValueError, match="no fit has told how scores of good images spread"):
        model.post_processor.reject_rate = 0.05
    with pytest.raises(ValueError, match=r"the model was given reject_rate=0\.05, but None of"):
        MODELS["CseGaussian"].load_from_checkpoint(trained["CseGaussian"][1], reject_rate=0.05)
    for options in ({"image_sensitivity": 0.7}, {"enable_normalization": False}, {"enable_thresholding": False}):
        with pytest.raises(ValueError, match=f"does not go with {next(iter(options))}"):
            MidwayPostProcessor(0.05, **options)


def test_a_changed_sensitivity_is_in_what_is_expected(rejecting):
    """The label cuts at 0.3, so at three fifths of the threshold."""
    model = MODELS["CseGaussian"].load_from_checkpoint(rejecting["CseGaussian"][1])
    own = model.post_processor
    own.image_sensitivity = 0.7
    number, mean, deviation = own.good_images.tolist()
    rate = GoodScores(int(number), mean, deviation).rate(0.6 * own.image_threshold.item())
    assert own.expectation.startswith(f"{100 * rate:.2g} % expected")


def test_good_scores_survive_a_resumed_run_that_no_epoch_improves(dtd, tmp_path):
    data, folder = many(tmp_path), tmp_path / "first"
    model, engine = fitted("Cse", None, dtd, folder, data=data, reject_rate=0.05)
    again = Cse(**COMMON, dtd_dir=str(dtd), reject_rate=0.05)
    resuming = Engine(max_epochs=2, default_root_dir=tmp_path / "second", **UNVALIDATED)
    with pytest.warns(UserWarning, match="nothing is trained"):
        resuming.fit(again, datamodule=data, ckpt_path=engine.best_model_path)
    assert again.post_processor.knows_good_scores
    assert torch.equal(again.post_processor.good_images, model.post_processor.good_images)
    assert torch.equal(again.post_processor.image_threshold, model.post_processor.image_threshold)


def test_validation_without_labels_does_not_keep_a_rate_from_being_set(mvtec_root, dtd, tmp_path):
    model = MODELS["CseGaussian"](**COMMON, dtd_dir=str(dtd), reject_rate=0.1)
    images = [PredictDataset(path=mvtec_root / "tiny" / part / "good") for part in ("train", "test")]
    loaders = [DataLoader(dataset, batch_size=5, collate_fn=ImageBatch.collate) for dataset in images]
    Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(model, *loaders)
    assert model.post_processor.knows_good_scores


def test_held_out_images_are_scored_by_what_the_others_make_of_the_embedder(rejecting, dtd, tmp_path, monkeypatch):
    """Centres and BatchNorm averages of a refit, by the model's own pairs, to the images that train."""
    asked = []

    def noting(model, pairing, size, seed):
        scores = unseen_scores(model, pairing, size, seed)
        asked.append((copy.deepcopy(model), pairing, scores))
        return scores

    monkeypatch.setattr("anomalib_cse.cse.lightning_model.unseen_scores", noting)
    fitted("Cse", None, dtd, tmp_path, data=many(tmp_path), reject_rate=0.05)
    model, pairing, found = asked[-1]
    training, held_out = (list(dataset.samples.image_path) for dataset in (pairing.training, pairing.held_out))
    assert found.paths == held_out
    assert (len(training), len(held_out)) == (14, 6)
    assert not set(training) & set(held_out)
    embedder, layers = model.embedder, [m for m in model.embedder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    batches = [pairs.features() for pairs in pairing.pairs_like_held_out()]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over batches
    embedder.train()
    for batch in batches:
        embedder(batch)
    embedder.eval()
    images = [resize(PredictDataset(path=path)[0].image, [64, 64]) for path in (*training, *held_out)]
    embedded = model.embed(model.backbone(torch.stack(images)))
    centre = embedded[:14].mean(dim=0)
    distances = 1 - torch.cosine_similarity(embedded[14:], centre[None], dim=1)
    assert torch.allclose(found.images, distances.mean(dim=(1, 2)), atol=1e-5)


@BOTH
def test_another_rate_than_that_of_a_checkpoint_is_refused(name, rejecting, mvtec_root, tmp_path):
    model = MODELS[name](**COMMON, reject_rate=0.2)
    with pytest.raises(ValueError, match=r"given reject_rate=0.2, but 0.05 of the checkpoint"):
        Engine(default_root_dir=tmp_path, **QUIET).test(
            model, datamodule=data_of(mvtec_root), ckpt_path=rejecting[name][1]
        )


@BOTH
def test_validation_with_defects_does_not_overrule_a_rate_that_was_asked_for(name, rejecting, mvtec_root, tmp_path):
    model = MODELS[name].load_from_checkpoint(rejecting[name][1])
    before = model.post_processor.image_threshold.clone()
    Engine(default_root_dir=tmp_path, **QUIET).validate(model, datamodule=data_of(mvtec_root))
    assert torch.equal(model.post_processor.image_threshold, before)


def test_good_images_alone_mean_one_per_cent_of_rejects(mvtec_root, dtd, tmp_path, caplog):
    """Nothing was asked for; with defects in validation the best F1 stays."""
    data = data_of(mvtec_root, val_split_mode="from_train", val_split_ratio=0.3, test_split_mode="none")
    with caplog.at_level("INFO"):
        model, _ = fitted("CseGaussian", mvtec_root, dtd, tmp_path / "good", QUIET, data)
    number, mean, deviation = model.post_processor.good_images.tolist()
    expected = np.exp(scipy.stats.t.ppf(0.99, number - 1, mean, deviation * np.sqrt(1 + 1 / number)))
    assert model.post_processor.image_threshold.item() == pytest.approx(expected, rel=1e-5)
    low, high = GoodScores(7, mean, deviation).interval(0.01)
    own = model.post_processor
    said = (
        f"Thresholds are {own.image_threshold:.4g} for images, {own.pixel_threshold:.4g} for pixels. Rejects: 1 % "
        f"expected of good images taken like those of training, between {100 * low:.2g} and {100 * high:.2g} % with "
        "90% confidence, by 7 of these, each scored without training on it. Of these, 0 % are rejected as they are, "
    )
    assert any(record.getMessage().startswith(said) for record in caplog.records)
    model, _ = fitted("CseGaussian", mvtec_root, dtd, tmp_path / "defects", QUIET)
    assert not model.post_processor.knows_good_scores


def only(data, labels):
    """The datamodule with validation images of these labels alone, in this order."""
    data.setup(TrainerFn.FITTING)
    found = data.val_data.samples.label_index.tolist()
    places = [found.index(label) + labels[:n].count(label) for n, label in enumerate(labels)]
    data.val_data = data.val_data.subsample(places)
    return data


def test_defects_alone_do_not_set_a_threshold_that_rejects_every_good_image(mvtec_root, dtd, tmp_path):
    data = only(data_of(mvtec_root), [1, 1, 1])
    with pytest.warns(UserWarning, match="no validation image is good, so thresholds come from good training images"):
        model, engine = fitted("CseGaussian", None, dtd, tmp_path, QUIET, data)
    own = model.post_processor
    assert own.image_threshold.item() == pytest.approx(GoodScores(*own.good_images.tolist()).threshold(0.01), rel=1e-5)
    batches = engine.predict(model, data_path=mvtec_root / "tiny" / "test" / "good")
    assert not any(label for batch in batches for label in batch.pred_label)
    with pytest.warns(UserWarning, match=r"no validation image is good, and .* too few .* below the scores of all"):
        fitted("Cse", None, dtd, tmp_path, QUIET, only(data_of(mvtec_root), [1, 1, 1]))  # it holds out three images


def test_one_image_of_a_kind_is_said_to_tell_little(mvtec_root, dtd, tmp_path):
    for labels, counts in (([0, 1, 1], "1 good and 2"), ([0, 0, 1], "2 good and 1")):
        with pytest.warns(UserWarning, match=f"come from {counts} defective validation images, of which a single one"):
            fitted("CseGaussian", None, dtd, tmp_path, QUIET, only(data_of(mvtec_root), labels))


@pytest.mark.parametrize(
    ("scores", "labels", "lack"),
    [
        ([1.0, 1.0, 1.0], [0, 1, 1], "all validation images have the same score"),
        ([1.0, 2.0, 3.0], [1, 1, 1], "no validation image is good"),
        ([1.0, 2.0, 3.0], [0, 0, 0], "no validation image has a defect"),
        ([1.0, 2.0, 3.0], [0, 1, 1], ""),
    ],
    ids=str,
)
def test_validation_that_tells_no_threshold_is_known(scores, labels, lack):
    metric = MidwayThreshold(fields=["pred_score", "gt_label"], strict=False)
    batch = ImageBatch(torch.rand(3, 3, 8, 8), pred_score=torch.tensor(scores), gt_label=torch.tensor(labels))
    metric.update(batch)
    threshold = metric.compute()
    assert metric.lack == lack
    if scores[0] == scores[-1]:
        assert threshold == 1.0  # no score is above it
    metric.forget()
    assert metric.lack


def test_too_few_images_for_a_rate_are_refused_and_else_warned_of(mvtec_root, dtd, tmp_path):
    data = data_of(mvtec_root)
    data.setup(TrainerFn.FITTING)
    data.train_data = data.train_data.subsample([0, 1, 2, 3])
    with pytest.raises(ValueError, match="reject_rate takes 5 training images that a fit has not seen, got 4"):
        fitted("CseGaussian", mvtec_root, dtd, tmp_path, UNVALIDATED, data, reject_rate=0.01)
    with pytest.raises(ValueError, match="that a fit has not seen, got 3: give more of them"):
        fitted("Cse", mvtec_root, dtd, tmp_path, UNVALIDATED, reject_rate=0.01)
    with pytest.raises(ValueError, match="got 0"):
        fitted("Cse", mvtec_root, dtd, tmp_path, UNVALIDATED, reject_rate=0.01, holdout_ratio=0.0)
    good = data_of(mvtec_root, val_split_mode="from_train", val_split_ratio=0.3, test_split_mode="none")
    with pytest.warns(UserWarning, match="training images are too few for thresholds from good ones"):
        fitted("Cse", mvtec_root, dtd, tmp_path, QUIET, good)


@BOTH
def test_fast_dev_run_with_a_rate_does_without_thresholds(name, mvtec_root, dtd, tmp_path):
    data = data_of(mvtec_root, train_batch_size=2)
    model, _ = fitted(name, mvtec_root, dtd, tmp_path, {**QUIET, "fast_dev_run": True}, data, reject_rate=0.1)
    assert not model.post_processor.knows_good_scores


@BOTH
def test_rate_that_is_none_or_has_no_place_is_refused(name):
    for wrong in (0, 1, -0.1, True, "0.01"):
        with pytest.raises(ValueError, match=r"reject_rate must be a number in \(0, 0.5\], got"):
            MODELS[name](**COMMON, reject_rate=wrong)
    for given in (PostProcessor(), MidwayPostProcessor(), False):
        with pytest.raises(ValueError, match="reject_rate describes the model's own post-processor"):
            MODELS[name](**COMMON, reject_rate=0.01, post_processor=given)


@pytest.fixture(scope="module")
def with_defect(tmp_path_factory):
    """Twenty good training images and one with a white square."""
    root = tmp_path_factory.mktemp("defect")
    data = many(root)
    image = np.random.default_rng(9).integers(90, 110, (72, 96, 3), dtype=np.uint8)
    image[20:50, 30:60] = 255
    cv2.imwrite(str(root / "many" / "train" / "good" / "900.png"), image)
    return data


def test_training_image_with_a_defect_is_named(with_defect, dtd, tmp_path):
    with pytest.warns(UserWarning, match=r"the scores of 1 training images are not like .*900.png \("):
        model, _ = fitted("CseGaussian", None, dtd, tmp_path, UNVALIDATED, with_defect, reject_rate=0.01)
    [(path, score)] = model.post_processor.suspicious
    assert Path(path).name == "900.png"
    assert score > model.post_processor.good_images[1].exp()


def test_the_look_at_data_names_an_image_unlike_the_others(with_defect, capsys):
    assert check([str(with_defect.root), "--backbone", "pypi:tf_efficientnet_lite0"]) == 0
    [doubt] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "900.png scores " in doubt
    assert doubt.endswith("unlike the other training images: is it defective?")


def test_new_good_images_are_compared(rejecting, mvtec_root, tmp_path):
    model, _ = rejecting["CseGaussian"]
    again = compare_good_images(model, mvtec_root / "tiny" / "test" / "good")
    assert (again.number, again.has_moved) == (4, False)
    scores = [
        model.model(model.pre_processor(item.image[None])).pred_score.item()
        for item in PredictDataset(path=mvtec_root / "tiny" / "test" / "good")
    ]
    assert again.measured == np.mean([score > model.post_processor.image_threshold for score in scores])
    assert compare_good_images(model, mvtec_root / "tiny" / "test" / "square").has_moved
    with pytest.raises(ValueError, match="fit the model with a reject_rate"):
        compare_good_images(Cse(**COMMON), mvtec_root / "tiny" / "test" / "good")


@pytest.fixture(scope="module")
def network(rejecting, tmp_path_factory):
    return Engine(default_root_dir=tmp_path_factory.mktemp("network"), **QUIET).export(
        rejecting["CseGaussian"][0], ExportType.OPENVINO
    )


def test_exported_model_rejects_what_the_threshold_does(rejecting, network, mvtec_root):
    model, _ = rejecting["CseGaussian"]
    inferencer = OpenVINOInferencer(network)
    for path in sorted((mvtec_root / "tiny" / "test").rglob("*.png")):
        exported = inferencer.predict(path)
        raw = model.model(model.pre_processor(PredictDataset(path=path)[0].image[None])).pred_score.item()
        assert bool(exported.pred_label) == (raw > model.post_processor.image_threshold)
        ratio = raw / model.post_processor.image_threshold.item()
        assert exported.pred_score.item() == pytest.approx(ratio / 2 if ratio < 1 else 1 - 1 / ratio / 2, abs=1e-4)


def test_scores_far_above_the_threshold_keep_their_order():
    threshold, raw = torch.tensor(0.3), torch.tensor([0.0, 1e-30, 0.1, 0.2999, 0.3, 0.3001, 0.6, 3.0, 300.0, 30_000.0])
    found = scaled(raw, threshold)
    ratios = raw.double() / threshold
    assert torch.allclose(found.double(), torch.where(ratios < 1, ratios / 2, 1 - 1 / ratios / 2), atol=1e-6)
    assert (found.diff() >= 0).all()
    assert (found[1:].diff()[1:] > 0).all()
    assert found[-1] < 1
    for score, known in zip(found[2:].tolist(), raw[2:].tolist(), strict=True):
        assert unscaled(score, threshold.item()) == pytest.approx(known, rel=0.01)
    assert unscaled(1.0, 0.3) == np.inf
    assert scaled(torch.tensor([0.0, 0.1]), torch.tensor(0.0)).tolist() == [0.5, 1]


@pytest.mark.parametrize(("gain", "moved"), [(1.0, False), (2.5, True)])
def test_camera_loop_says_when_recent_scores_have_moved(gain, moved, network, tmp_path):
    """Good frames as in training, and some of more contrast, of which each scores higher."""
    rng = np.random.default_rng(5)
    (tmp_path / "frames").mkdir()
    for number in range(110):
        noise = rng.integers(90, 110, (72, 96, 3)) - 99.5
        cv2.imwrite(str(tmp_path / "frames" / f"{number:03}.png"), (gain * noise + 99.5).astype(np.uint8))
    command = [sys.executable, CAMERA_LOOP, network, tmp_path / "frames", "--rejects", tmp_path / "rejects"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ("the last 100 scores have moved by +" in run.stderr) is moved


def test_only_good_images_leave_out_metrics_that_need_defects(rejecting, mvtec_root, tmp_path):
    model, _ = rejecting["CseGaussian"]
    data = data_of(mvtec_root)
    data.setup(TrainerFn.TESTING)
    data.test_data = data.test_data.subsample(
        [n for n, label in enumerate(data.test_data.samples.label_index) if not label]
    )
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    with pytest.warns(UserWarning, match="no defective images, so these metrics are left out: image_AUROC, image_F1Sc"):
        assert engine.test(model, datamodule=data) == [{}]
    [metrics] = engine.test(model, datamodule=data_of(mvtec_root))
    assert metrics["image_AUROC"] == 1
