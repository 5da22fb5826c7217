"""Cse in closed form under anomalib's engine."""

import shutil

import pytest
import torch
from anomalib.data import MVTecAD, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torchvision.transforms.v2 import CenterCrop, ColorJitter, Compose, Resize, Transform

from anomalib_cse import Cse, lightning_model
from anomalib_cse.training_data import TrainingData

from tiny import LINEAR, QUIET, TINY


def fit(root, results, callbacks=None, workers=0, epochs=3, ckpt_path=None, **options):
    model = Cse(**{**LINEAR, **options})
    engine = Engine(max_epochs=epochs, default_root_dir=results, callbacks=callbacks, **QUIET)
    data = MVTecAD(root=root, category="tiny", num_workers=workers)
    engine.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model, engine


def assert_equal(first, second):
    theirs = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(theirs[name], value), name


@pytest.fixture(scope="module")
def whole(mvtec_root, tmp_path_factory):
    return fit(mvtec_root, tmp_path_factory.mktemp("whole"))


def test_white_squares_are_found(whole, mvtec_root):
    model, engine = whole
    [metrics] = engine.test(model, datamodule=MVTecAD(root=mvtec_root, category="tiny", num_workers=0))
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.95
    assert engine.trainer.max_epochs == 1


def test_neither_workers_nor_memory_nor_epochs_change_a_number(whole, mvtec_root, tmp_path):
    model, _ = fit(mvtec_root, tmp_path, workers=2, epochs=1, memory_budget=0)
    images = torch.rand(4, 3, 64, 64)
    assert torch.allclose(model.model(images).anomaly_map, whole[0].model(images).anomaly_map, rtol=1e-3)


def test_a_half_is_tried_by_the_other(mvtec_root, tmp_path, monkeypatch):
    asked, samples = [], []
    for name in ("features", "corrupted_features"):
        made = getattr(TrainingData, name)

        def spy(self, *arguments, made=made, name=name, **options):
            asked.append((name, options.get("half", arguments[-1] if arguments else None)))
            return made(self, *arguments, **options)

        monkeypatch.setattr(TrainingData, name, spy)
    monkeypatch.setattr(TrainingData, "again", lambda _, make: make)
    whole_fit = lightning_model.fit
    monkeypatch.setattr(
        lightning_model, "fit", lambda *arguments: (samples.extend(arguments[1:3]), whole_fit(*arguments))[1]
    )
    fit(mvtec_root, tmp_path)
    for half, sample in enumerate(samples):
        asked.clear()
        list(sample.clean()), list(sample.corrupted())
        assert asked == [("features", half), ("corrupted_features", half)]


def test_images_are_read_a_few_times_and_not_an_epoch_longer(mvtec_root, tmp_path, monkeypatch):
    passed = []
    compute = TrainingData.compute
    monkeypatch.setattr(
        TrainingData, "compute", lambda self, images: (passed.append(len(images)), compute(self, images))[1]
    )
    fit(mvtec_root, tmp_path)
    assert sum(passed) == 10 + 256 + 4 * 10  # all once, those with defects, and each in its four symmetries


def test_another_seed_draws_other_defects(whole, mvtec_root, tmp_path):
    again, _ = fit(mvtec_root, tmp_path / "again")
    other, _ = fit(mvtec_root, tmp_path / "other", seed=1)
    assert_equal(again, whole[0])
    assert not torch.equal(other.model.maps[0].directions, again.model.maps[0].directions)


def test_a_checkpoint_is_the_model(whole, mvtec_root):
    model, engine = whole
    loaded = Cse.load_from_checkpoint(engine.best_model_path)
    assert_equal(loaded, model)
    images = PredictDataset(mvtec_root / "tiny" / "test" / "square")
    scores = [
        [
            batch.pred_score.tolist()
            for batch in Engine(default_root_dir=engine.trainer.default_root_dir, **QUIET).predict(m, dataset=images)
        ]
        for m in (model, loaded)
    ]
    assert scores[0] == scores[1]


def test_a_run_that_broke_off_before_it_was_fitted_resumes(whole, mvtec_root, tmp_path):
    class Break(Callback):
        def on_train_end(self, trainer, pl_module):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(mvtec_root, tmp_path / "broken", [Break()])
    [checkpoint] = (tmp_path / "broken").rglob("*.ckpt")
    with pytest.raises(RuntimeError, match="the model is not fitted"):
        Cse.load_from_checkpoint(checkpoint).model(torch.rand(1, 3, 64, 64))
    resumed, engine = fit(mvtec_root, tmp_path / "resumed", ckpt_path=checkpoint)
    assert_equal(resumed, whole[0])
    assert_equal(Cse.load_from_checkpoint(engine.best_model_path), whole[0])


@pytest.mark.parametrize(
    ("name", "value"),
    {"image_size": (72, 64), "embedder": "network", "layers": (1, 3), "embedding_dim": 8}.items(),
)
def test_a_checkpoint_of_other_arguments_is_refused(name, value, whole, mvtec_root, tmp_path):
    with pytest.raises(ValueError, match=rf"the checkpoint is of .*--model\.{name}"):
        Engine(default_root_dir=tmp_path, **QUIET).predict(
            Cse(**{**LINEAR, name: value}), data_path=mvtec_root, ckpt_path=whole[1].best_model_path
        )


@pytest.mark.parametrize("transform", [Resize((70, 61)), Compose([Resize(70), CenterCrop((64, 61))])], ids=str)
def test_a_checkpoint_brings_its_size_and_levels_along(transform, mvtec_root, tmp_path):
    options = {name: value for name, value in LINEAR.items() if name not in ("image_size", "layers")}
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    model = Cse(**options, pre_processor=PreProcessor(transform))
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    engine.fit(model, datamodule=data)
    images = mvtec_root / "tiny" / "test" / "square"
    expected = [batch.pred_score.tolist() for batch in engine.predict(model, data_path=images)]
    for other in (Cse(**options), Cse(**options, layers=(1, 2, 3)), Cse.load_from_checkpoint(engine.best_model_path)):
        fresh = Engine(default_root_dir=tmp_path, **QUIET)
        batches = fresh.predict(other, data_path=images, ckpt_path=engine.best_model_path)
        assert [batch.pred_score.tolist() for batch in batches] == expected


def test_images_that_are_no_numbers_are_said_to_be(mvtec_root, tmp_path):
    class Spoil(Transform):
        def transform(self, inpt, params):
            return inpt * torch.nan if isinstance(inpt, torch.Tensor) else inpt

    with pytest.raises(ValueError, match="features of the training images are NaN or infinite"):
        fit(mvtec_root, tmp_path, image_size=None, pre_processor=PreProcessor(Compose([Resize((64, 64)), Spoil()])))


def test_augmentations_are_used(whole, mvtec_root, tmp_path):
    model = Cse(**LINEAR)
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0, train_augmentations=ColorJitter(brightness=0.9))
    Engine(default_root_dir=tmp_path, **QUIET).fit(model, datamodule=data)
    assert not torch.allclose(model.model.maps[0].roots, whole[0].model.maps[0].roots, rtol=0.01)


def test_without_an_end_lightning_takes_one_epoch(mvtec_root, tmp_path):
    model = Cse(**LINEAR)
    trainer = Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    trainer.fit(model, datamodule=MVTecAD(root=mvtec_root, category="tiny", num_workers=0))
    assert trainer.current_epoch == 1
    assert model.model.fitted


def test_a_second_fit_forgets_the_first(whole, mvtec_root, tmp_path):
    model = Cse(**LINEAR)
    model.load_state_dict(whole[0].state_dict())

    class NotFitted(Callback):
        fitted = True

        def on_train_start(self, trainer, pl_module):
            self.fitted = pl_module.model.fitted

    note = NotFitted()
    engine = Engine(default_root_dir=tmp_path, callbacks=[note], **QUIET)
    engine.fit(model, datamodule=MVTecAD(root=mvtec_root, category="tiny", num_workers=0))
    assert not note.fitted
    assert_equal(model, whole[0])


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_parameters_stay_in_32_bits(precision, mvtec_root, tmp_path):
    engine = Engine(default_root_dir=tmp_path, precision=precision, **QUIET)
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    with pytest.raises(ValueError, match=f"precision must be 32-true, 16-mixed or bf16-mixed, got {precision}"):
        engine.fit(Cse(**LINEAR), datamodule=data)


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"plugins": [MixedPrecision("16-mixed", "cpu")]}],  # a processor's is bfloat16 too
    ids=["bf16-mixed", "16-mixed"],
)
@pytest.mark.parametrize("embedder", ["linear", "network"])
def test_mixed_precision_finds_white_squares(embedder, options, mvtec_root, tmp_path):
    model = Cse(**{**LINEAR, "embedder": embedder})
    engine = Engine(max_epochs=6, default_root_dir=tmp_path, **options, **QUIET)
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    engine.fit(model, datamodule=data)
    [metrics] = engine.test(model, datamodule=data)
    assert metrics["image_AUROC"] == 1
    assert all(value.dtype == torch.float32 for value in model.parameters())


def test_steps_of_an_earlier_run_are_not_counted_in_silence(mvtec_root, tmp_path):
    engine = Engine(max_steps=1, default_root_dir=tmp_path, **QUIET)
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    engine.fit(Cse(**LINEAR), datamodule=data)
    with pytest.raises(ValueError, match="this trainer has made 1 steps of its max_steps: take a new Engine"):
        engine.fit(Cse(**LINEAR), datamodule=data)


@pytest.mark.parametrize("arguments", [LINEAR, TINY], ids=["linear", "network"])
@pytest.mark.parametrize(("broken", "same"), [("train/good", True), ("ground_truth/square", False)])
def test_a_fit_that_broke_off_leaves_nothing_behind(broken, same, arguments, mvtec_root, tmp_path):
    """The engine goes on as a new one would, with the same model or with another."""
    shutil.copytree(mvtec_root, tmp_path / "data")
    file = max((tmp_path / "data" / "tiny" / broken).iterdir())
    shutil.copy(file, tmp_path / "whole.png")
    file.write_bytes(file.read_bytes()[:100])

    def data():
        return MVTecAD(root=tmp_path / "data", category="tiny", num_workers=0)

    model, engine = Cse(**arguments), Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=rf"(image|mask) \S*{file.name} cannot be read"):
        engine.fit(model, datamodule=data())
    if same:
        file.unlink()
    else:
        model = Cse(**arguments)
        shutil.copy(tmp_path / "whole.png", file)
    engine.fit(model, datamodule=data())
    next_one = Cse(**arguments)
    engine.fit(next_one, datamodule=data())
    fresh = Cse(**arguments)
    Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(fresh, datamodule=data())
    assert fresh.post_processor.image_threshold.isfinite()
    assert_equal(model, fresh)
    assert_equal(next_one, fresh)


def test_the_next_model_of_an_engine_has_its_own_pre_processing_alone(mvtec_root, tmp_path):
    model, engine = fit(mvtec_root, tmp_path)
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    smaller = PreProcessor(Resize((48, 64)))
    other = Patchcore("test_resnet", ["layer3"], pre_trained=False, pre_processor=smaller, visualizer=False)
    fresh = Engine(default_root_dir=tmp_path, **QUIET)
    fresh.fit(other, datamodule=data)
    images = mvtec_root / "tiny" / "test" / "square"
    expected, found = ([b.pred_score.tolist() for b in e.predict(other, data_path=images)] for e in (fresh, engine))
    assert found == expected
    own = Engine(default_root_dir=tmp_path, **QUIET)
    expected, found = ([b.pred_score.tolist() for b in e.predict(model, data_path=images)] for e in (own, engine))
    assert found == expected


def test_an_export_to_torch_holds_nothing_of_the_training_images(whole, mvtec_root, tmp_path):
    model, engine = whole
    file = engine.export(model, "torch", export_root=tmp_path)
    assert str(mvtec_root).encode() not in file.read_bytes()
