"""Pre-processing, thresholds, and what several models on one engine do to one another."""

import copy
import shutil

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from sklearn.metrics import f1_score
from torchvision.transforms.v2 import CenterCrop, Compose, Resize
from torchvision.transforms.v2 import functional as TF

from anomalib_cse.deployment import MidwayPostProcessor
from anomalib_cse.deployment.pre_processing import ExactResize
from anomalib_cse.deployment.thresholds import MidwayThreshold

from tiny import COMMON, MODELS, QUIET, data_of

UNSIZED = {name: value for name, value in COMMON.items() if name != "image_size"}
FIELDS = {"fields": ["pred_score", "gt_label"], "strict": False}
both_models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def new(dtd):
    """A model like those of ``trained``."""
    return lambda name, **options: MODELS[name](**{**COMMON, "dtd_dir": str(dtd), **options})


def scores_of(engine, model, root, **options):
    """Of the defective images, after normalisation."""
    batches = engine.predict(model, data_path=root / "tiny" / "test" / "square", **options)
    return [batch.pred_score.tolist() for batch in batches]


def assert_same_state(model, expected):
    theirs = expected.state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(theirs[name].float(), value.float(), rtol=1e-4), name


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    target=st.tuples(st.integers(2, 120), st.integers(2, 120)),  # to one column torch's own makes all rows alike
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_resizing_equals_torchvisions_and_stays_in_range(seed, size, target, dtype):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    resized = ExactResize(target)(images)
    assert (resized.shape, resized.dtype) == ((2, 3, *target), dtype)
    expected = TF.resize(images.double(), list(target), antialias=True)
    roundings = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    assert torch.allclose(resized.double(), expected, rtol=0, atol=max(roundings, 1e-5))
    assert images.min() - roundings <= resized.min()
    assert resized.max() <= images.max() + roundings


@pytest.mark.parametrize("size", [(1024, 1024), (2000, 600), (7, 1000), (1, 1), (31, 40), (31, 50), (60, 40)])
def test_resizing_of_large_and_narrow_images_equals_torchvisions(size):
    images = torch.rand(1, 3, *size)
    assert torch.allclose(ExactResize((31, 40))(images), Resize((31, 40), antialias=True)(images), atol=1e-5)


@both_models
@pytest.mark.parametrize("own", [True, False], ids=["of the arguments", "of the user"])
def test_pre_processing_is_torchvisions_within_the_trainer_and_outside(own, name):
    transform = Compose([Resize((64, 64), antialias=True), CenterCrop((48, 40))])
    sizes = {"image_size": (64, 64), "center_crop_size": (48, 40)}
    model = MODELS[name](**UNSIZED, **({"pre_processor": PreProcessor(transform)} if own else sizes))
    batch = ImageBatch(image=torch.rand(2, 3, 200, 150))
    expected = transform(batch.image)
    assert torch.allclose(model.pre_processor(batch.image), expected, atol=1e-5)
    assert (PreProcessor(transform)(batch.image) - expected).abs().max() > 0.1  # anomalib's own
    model.pre_processor.on_predict_batch_start(None, model, batch, 0)
    assert torch.equal(batch.image, expected)


@both_models
@pytest.mark.filterwarnings("ignore:(?s).* can be exported to torch alone")
def test_checkpoint_brings_its_size_and_levels_along(name, dtd, mvtec_root, tmp_path):
    transform = Compose([Resize(70, antialias=True), CenterCrop((64, 61))])
    model = MODELS[name](**UNSIZED, dtd_dir=str(dtd), pre_processor=PreProcessor(transform))
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    engine.fit(model, datamodule=data_of(mvtec_root))
    expected = scores_of(engine, model, mvtec_root)
    path = engine.best_model_path
    other = MODELS[name](**{**UNSIZED, "seed": 1})
    for fresh in (other, MODELS[name].load_from_checkpoint(path)):
        engine = Engine(default_root_dir=tmp_path, **QUIET)
        assert scores_of(engine, fresh, mvtec_root, ckpt_path=path) == expected
    with pytest.raises(ValueError, match=r"export needs Resize\(\(height, width\)\), bilinear and antialiased"):
        engine.export(model, "onnx", export_root=tmp_path)


@both_models
def test_checkpoint_of_another_size_is_refused_if_the_datamodule_has_resized(name, trained, mvtec_root, tmp_path):
    options = {key: value for key, value in COMMON.items() if key != "image_size"}
    with pytest.raises(
        ValueError, match=r"the checkpoint is of images of \(64, 64\) pixels, the model was made for \(2"
    ):
        Engine(default_root_dir=tmp_path, **QUIET).test(
            MODELS[name](**options), datamodule=data_of(mvtec_root), ckpt_path=trained[name][1]
        )


@both_models
@pytest.mark.parametrize(
    ("argument", "value"), {"image_size": (72, 64), "layers": (1, 3), "embedding_dim": 8}.items(), ids=str
)
def test_checkpoint_of_other_arguments_is_refused(argument, value, name, trained, mvtec_root, tmp_path):
    model = MODELS[name](**{**COMMON, argument: value})
    with pytest.raises(ValueError, match=rf"the checkpoint is of .*--model\.{argument}"):
        scores_of(Engine(default_root_dir=tmp_path, **QUIET), model, mvtec_root, ckpt_path=trained[name][1])


@both_models
def test_checkpoint_is_the_model(name, trained, mvtec_root, tmp_path):
    model, path = trained[name]
    loaded = MODELS[name].load_from_checkpoint(path)
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    assert_same_state(loaded.model, model.model)
    assert scores_of(engine, loaded, mvtec_root) == scores_of(engine, copy.deepcopy(model), mvtec_root)


def batch_of(scores, labels):
    scores = torch.as_tensor(scores)
    image = torch.zeros(len(scores), 3, 1, 1)
    return ImageBatch(image=image, pred_score=scores, gt_label=torch.as_tensor(labels).bool())


def threshold_of(metric, scores, labels):
    for part in torch.arange(len(scores)).chunk(3):
        metric.update(batch_of(torch.as_tensor(scores)[part], torch.as_tensor(labels)[part]))
    return metric.compute()


@pytest.mark.parametrize("seed", range(5))
def test_threshold_parts_the_best_f1_halfway_where_anomalibs_loses_an_image(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 2
    scores = (torch.randn(40, generator=generator) + labels).mul(8).round().div(8).exp()  # with ties
    threshold = threshold_of(MidwayThreshold(**FIELDS), scores, labels)
    best = max(f1_score(labels, scores >= cut) for cut in scores)
    assert f1_score(labels, scores > threshold) == pytest.approx(best)
    assert f1_score(labels, scores > threshold_of(F1AdaptiveThreshold(**FIELDS), scores, labels)) < best
    above, below = scores[scores > threshold].min(), scores[scores < threshold].max()
    assert (above - threshold).item() == pytest.approx((threshold - below).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("scores", "labels", "anomalibs", "ours"),
    [
        ([0.1, 0.2, 0.3, 0.9, 1.5], [0, 0, 0, 1, 1], 0.9, 0.6),
        ([0.1, 0.2, 0.3], [1, 0, 1], 0.1, 0.05),  # best are all called anomalous
        ([0.1, 0.2, 0.3], [1, 1, 1], 0.1, 0.05),
        ([0.3, 0.1], [0, 0], 0.3, 0.3),
    ],
)
def test_thresholds_of_hand_made_scores(scores, labels, anomalibs, ours):
    assert threshold_of(F1AdaptiveThreshold(**FIELDS), scores, labels) == pytest.approx(anomalibs)
    assert threshold_of(MidwayThreshold(**FIELDS), scores, labels) == pytest.approx(ours)


def test_threshold_of_no_images_is_none():
    assert MidwayThreshold(**FIELDS).compute() is None


def test_arguments_of_the_post_processor_are_anomalibs():
    assert MidwayPostProcessor(image_sensitivity=0.7).normalized_image_threshold == pytest.approx(0.3)


@both_models
def test_threshold_after_training_is_midway_between_validation_scores(name, trained, mvtec_root):
    model, data = copy.deepcopy(trained[name][0]), data_of(mvtec_root)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    scores, labels = model.model(model.pre_processor(batch.image)).pred_score, batch.gt_label
    assert len(scores) == len(data.val_data)
    middle = (scores[~labels].max() + scores[labels].min()) / 2
    assert model.post_processor.image_threshold.item() == pytest.approx(middle.item(), rel=1e-4)


def tiny_padim():
    size = PreProcessor(Resize((48, 64)))
    return Padim("test_resnet", ["layer1"], pre_trained=False, n_features=8, pre_processor=size, visualizer=False)


def test_models_on_one_engine_are_as_on_new_ones(new, trained, mvtec_root, tmp_path):
    """Of which Lightning leaves the callbacks of one in the trainer of the next."""
    engine = Engine(max_epochs=2, default_root_dir=tmp_path, **QUIET)
    padim = tiny_padim()
    alone = copy.deepcopy(padim)
    Engine(default_root_dir=tmp_path, **QUIET).fit(alone, datamodule=data_of(mvtec_root))
    models = {"Padim": padim}
    for name in ("Cse", "Cse", "CseGaussian", "Padim", "CseGaussian"):
        model = models[name] = padim if name == "Padim" else new(name)
        torch.manual_seed(0)
        engine.fit(model, datamodule=data_of(mvtec_root))
        assert_same_state(model, alone if name == "Padim" else trained[name][0])
    expected = {
        name: scores_of(Engine(default_root_dir=tmp_path, **QUIET), model, mvtec_root) for name, model in models.items()
    }
    for name in ("Padim", "Cse", "CseGaussian", "Padim", "CseGaussian", "Cse"):
        assert scores_of(engine, models[name], mvtec_root) == expected[name], name


@both_models
def test_fit_that_broke_off_leaves_nothing_behind(name, new, trained, mvtec_root, tmp_path):
    shutil.copytree(mvtec_root, tmp_path / "data")
    file = tmp_path / "data" / "tiny" / "train" / "good" / "004.png"
    file.write_bytes(file.read_bytes()[:100])
    model, engine = new(name), Engine(max_epochs=2, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(Exception, match=rf"{file.name} cannot be read as an image"):
        engine.fit(model, datamodule=data_of(tmp_path / "data"))
    shutil.copy(mvtec_root / "tiny" / "train" / "good" / file.name, file)
    torch.manual_seed(0)
    engine.fit(model, datamodule=data_of(tmp_path / "data"))
    assert_same_state(model, trained[name][0])


@both_models
def test_steps_of_an_earlier_run_are_refused(name, new, mvtec_root, tmp_path):
    engine = Engine(max_steps=1, default_root_dir=tmp_path, **QUIET)
    engine.fit(new("Cse"), datamodule=data_of(mvtec_root))
    with pytest.raises(ValueError, match="this trainer has made 1 steps of its max_steps: take a new Engine"):
        engine.fit(new(name), datamodule=data_of(mvtec_root))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Cse", {"num_sanity_val_steps": 2}, "nothing is fitted before training: set num_sanity_val_steps to 0"),
        (
            "CseGaussian",
            {"num_sanity_val_steps": 2},
            "nothing is fitted before training: set num_sanity_val_steps to 0",
        ),
    ],
)
def test_trainer_that_would_not_validate_the_fitted_model_is_refused(name, options, message, new, mvtec_root, tmp_path):
    arguments = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False, **QUIET, **options}
    with pytest.raises(ValueError, match=message):
        Trainer(default_root_dir=tmp_path, **arguments).fit(new(name), datamodule=data_of(mvtec_root))
