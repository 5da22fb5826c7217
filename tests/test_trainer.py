"""Each argument of the trainer, and each callback, does what docs/training.md says for either model, or is refused."""

import copy
from datetime import timedelta

import pytest
import torch
from anomalib.engine import Engine
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import AUROC, Evaluator
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import RunningStage
from torchvision.transforms.v2 import Resize

from tiny import COMMON, MODELS, QUIET, data_of

both = pytest.mark.parametrize("name", MODELS)


def named(value):
    """A name for a test that is the same in every process: callbacks have addresses in theirs."""
    if isinstance(value, dict):
        return ",".join(f"{name}={named(option)}" for name, option in value.items())
    if isinstance(value, list):
        return "+".join(type(callback).__name__ for callback in value)
    return str(value)


class Notes(Callback):
    """What a run does: images trained on, batches, validations, and the rate of every step."""

    def __init__(self):
        self.images, self.batches, self.validations = set(), 0, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.images |= set(batch.image_path)
        self.batches += 1

    def on_validation_epoch_end(self, trainer, pl_module):
        self.validations += 1


@pytest.fixture
def fit(mvtec_root, dtd, tmp_path):
    """Fits a model to the ten images of the tiny dataset, three at a time, of which ``Cse`` holds three out."""

    def run(name, callbacks=(), model_options=None, checkpoint=None, **options):
        notes = Notes()
        model = MODELS[name](**COMMON, dtd_dir=str(dtd), visualizer=False, **(model_options or {}))
        engine = Engine(
            default_root_dir=tmp_path, callbacks=[notes, *callbacks], **{"max_epochs": 4, **options}, **QUIET
        )
        engine.fit(model, datamodule=data_of(mvtec_root, train_batch_size=3), ckpt_path=checkpoint)
        return model, engine, notes

    return run


HONOURED = [  # model, trainer's arguments, batches, optimizer's steps, training images seen, validations
    ("Cse", {}, 12, 12, 7, 4),
    ("Cse", {"limit_train_batches": 1}, 4, 4, 7, 4),
    ("Cse", {"limit_train_batches": 0.4}, 4, 4, 7, 4),
    ("Cse", {"overfit_batches": 1}, 4, 4, 3, 4),
    ("Cse", {"fast_dev_run": True}, 1, 1, 3, 1),
    ("Cse", {"fast_dev_run": 2}, 2, 2, 6, 1),
    ("Cse", {"accumulate_grad_batches": 2}, 12, 8, 7, 4),
    ("Cse", {"gradient_clip_val": 0.1}, 12, 12, 7, 4),
    ("Cse", {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 12, 12, 7, 4),
    ("Cse", {"check_val_every_n_epoch": 2}, 12, 12, 7, 2),
    ("Cse", {"val_check_interval": 1}, 12, 12, 7, 12),
    ("Cse", {"limit_val_batches": 0}, 12, 12, 7, 0),
    ("Cse", {"max_steps": 1}, 1, 1, 3, 1),  # in the middle of an epoch
    ("Cse", {"max_steps": 5}, 5, 5, 7, 2),
    ("Cse", {"max_time": {"hours": 1}}, 12, 12, 7, 4),
    ("Cse", {"precision": "bf16-mixed"}, 12, 12, 7, 4),
    ("CseGaussian", {}, 4, 4, 10, 1),
    ("CseGaussian", {"limit_train_batches": 2}, 2, 2, 6, 1),
    ("CseGaussian", {"limit_train_batches": 0.4}, 1, 1, 3, 1),
    ("CseGaussian", {"overfit_batches": 1}, 1, 1, 3, 1),
    ("CseGaussian", {"fast_dev_run": True}, 1, 1, 3, 1),
    ("CseGaussian", {"limit_val_batches": 0}, 4, 4, 10, 0),
    ("CseGaussian", {"max_time": {"hours": 1}}, 4, 4, 10, 1),
    ("CseGaussian", {"precision": "bf16-mixed"}, 4, 4, 10, 1),
]


@pytest.mark.parametrize(("name", "options", "batches", "steps", "images", "validations"), HONOURED, ids=named)
def test_argument_of_the_trainer_is_honoured(name, options, batches, steps, images, validations, fit):
    model, engine, notes = fit(name, **options)
    assert (notes.batches, len(notes.images), notes.validations) == (batches, images, validations)
    assert engine.trainer.global_step == steps
    assert model.model.is_fitted
    assert model.post_processor.image_threshold.isfinite() == bool(validations)


REFUSED = [
    (
        "Cse",
        {"max_steps": 2, "check_val_every_n_epoch": 2},
        "max_steps 2 end in epoch 1, and the first to",
    ),
    ("Cse", {"check_val_every_n_epoch": 5}, "no epoch of 4 would be validated.* now 5, to at most"),
    ("Cse", {"max_epochs": -1}, "schedule needs to know its end: set max_epochs or max_steps"),
    ("CseGaussian", {"accumulate_grad_batches": 2}, "accumulate_grad_batches: CseGaussian takes no gradient steps"),
    ("CseGaussian", {"gradient_clip_val": 0.1}, "gradient_clip_val: CseGaussian takes no gradient steps"),
    ("CseGaussian", {"gradient_clip_algorithm": "norm"}, "gradient_clip_algorithm: CseGaussian takes no"),
    ("CseGaussian", {"min_epochs": 2}, "min_epochs: CseGaussian takes no gradient steps"),
    ("CseGaussian", {"max_steps": 3}, r"max_steps: CseGaussian takes no .*limit_train_batches"),
    ("CseGaussian", {"val_check_interval": 1}, "leave val_check_interval at 1.0, got 1"),
    (
        "CseGaussian",
        {"check_val_every_n_epoch": 2},
        "(?s)no epoch of 1 would be validated.*leave check_val_every_n_epoch at 1, got 2",
    ),
    (
        "CseGaussian",
        {"callbacks": [GradientAccumulationScheduler({0: 2})]},
        "GradientAccumulationScheduler: Cse",
    ),
    *(
        (name, options, message)
        for name in MODELS
        for options, message in [
            ({"max_steps": 0}, f"max_steps of 0 leaves nothing to fit {name} by"),
            ({"limit_train_batches": 0}, f"limit_train_batches of 0 leaves nothing to fit {name} by"),
            ({"precision": "16-true"}, "precision must be 32-true, 16-mixed or bf16-mixed, got 16-true"),
            ({"callbacks": [StochasticWeightAveraging(1e-3)]}, "StochasticWeightAveraging would rewrite"),
            ({"callbacks": [EMAWeightAveraging()]}, "EMAWeightAveraging would rewrite"),
            ({"callbacks": [WeightAveraging()]}, "WeightAveraging would rewrite"),
            ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder would rewrite"),
            ({"callbacks": [BackboneFinetuning()]}, "BackboneFinetuning would rewrite"),
            ({"callbacks": [ModelPruning("l1_unstructured")]}, "ModelPruning would rewrite"),
            ({"callbacks": [BatchSizeFinder()]}, "batch_size not found"),
            (
                {"callbacks": [EarlyStopping("image_AUROC")]},
                "EarlyStopping monitors 'image_AUROC', which is not",
            ),
            ({"callbacks": [ModelCheckpoint(monitor="nope")]}, "ModelCheckpoint monitors 'nope', which is not logged"),
        ]
    ),
    ("CseGaussian", {"callbacks": [EarlyStopping("val_loss")]}, "monitors 'val_loss', which is not logged"),
    (
        "Cse",
        {"callbacks": [EarlyStopping("val_loss")], "model_options": {"holdout_ratio": 0}},
        "'val_loss', which is not logged while fitting; there is train_loss",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=named)
def test_argument_of_the_trainer_is_refused_before_a_step(name, options, message, fit):
    class NoStep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pytest.fail("an image was read")

    with pytest.raises(Exception, match=message):
        fit(name, **{**options, "callbacks": [*copy.deepcopy(options.get("callbacks", [])), NoStep()]})


@both
def test_no_time_at_all_is_an_error_and_no_model(name, fit):
    with pytest.raises(RuntimeError, match="nothing has been fitted after 0 steps: give more"):
        fit(name, [Timer(timedelta(0))])


class AfterABatch(Timer):
    """A timer that finds its time to be up after the first batch."""

    def __init__(self):
        super().__init__(timedelta(hours=1))
        self.has_trained = False

    def time_elapsed(self, stage=RunningStage.TRAINING):
        return 3601.0 if self.has_trained else 0.0

    def on_train_batch_end(self, trainer, *args, **kwargs):
        self.has_trained = True
        super().on_train_batch_end(trainer, *args, **kwargs)


@both
def test_time_that_is_up_within_an_epoch_stops_and_validates(name, fit):
    model, _, notes = fit(name, [AfterABatch()])
    assert (notes.batches, len(notes.images), notes.validations) == (1, 3, 1)
    assert model.model.is_fitted
    assert model.post_processor.image_threshold.isfinite()


@both
@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_metric_of_validation_can_be_waited_for(kind, name, fit):
    evaluator = Evaluator(val_metrics=[AUROC(["pred_score", "gt_label"], prefix="image_")])
    callback = kind(monitor="image_AUROC", mode="max")
    fit(name, [callback], model_options={"evaluator": evaluator}, max_epochs=2)
    assert getattr(callback, "best_score", getattr(callback, "best_model_score", None)).isfinite()


class Rewrite(Callback):
    """Does what the ones that are refused by name do, at the end of the first epoch or of training."""

    def __init__(self, late):
        self.late = late

    def on_train_epoch_end(self, trainer, pl_module):
        if not self.late:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        next(
            module for module in pl_module.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)
        ).running_mean += 1


@both
@pytest.mark.parametrize("late", [False, True])
def test_backbone_that_has_changed_is_an_error_and_not_saved(late, name, fit, tmp_path):
    with pytest.raises(RuntimeError, match=r"frozen backbone has changed while fitting.* \(.*Rewrite.*\)"):
        fit(name, [Rewrite(late)], max_epochs=2)
    for path in tmp_path.rglob("*.ckpt"):  # of before
        MODELS[name].load_from_checkpoint(path).check_frozen()


class OwnPreProcessor(PreProcessor):
    pass


class OwnPostProcessor(PostProcessor):
    pass


class OwnEvaluator(Evaluator):
    pass


class OwnVisualizer(ImageVisualizer):
    """Notes the models whose images it draws."""

    def __init__(self):
        super().__init__()
        self.models = set()

    def on_predict_batch_end(self, trainer, pl_module, *args, **kwargs):
        self.models.add(pl_module)


def components():
    """A user's own of each, as arguments of a model."""
    return {
        "pre_processor": OwnPreProcessor(Resize((64, 64))),
        "post_processor": OwnPostProcessor(),
        "evaluator": OwnEvaluator(test_metrics=[AUROC(["pred_score", "gt_label"], prefix="image_")]),
        "visualizer": OwnVisualizer(),
    }


def test_models_with_a_users_own_parts_leave_an_engine_as_they_found_it(mvtec_root, dtd, tmp_path):
    def engine():
        return Engine(max_epochs=2, default_root_dir=tmp_path, **QUIET)

    def scores(engine, model):
        batches = engine.predict(model, data_path=mvtec_root / "tiny" / "test" / "square")
        return [score for batch in batches for score in batch.pred_score.tolist()]

    def new(name, *, own):
        parts = {"pre_processor": PreProcessor(Resize((64, 64))), "visualizer": False}
        parts |= components() if own else {}
        if name == "Padim":
            return Padim(backbone="test_resnet", layers=["layer1"], pre_trained=False, n_features=8, **parts)
        return MODELS[name](**plain, **parts, dtd_dir=str(dtd))

    plain = {name: value for name, value in COMMON.items() if name != "image_size"}
    shared, models = engine(), []
    for own in (True, False):
        for name in ("CseGaussian", "Padim", "Cse", "CseGaussian"):
            models.append(new(name, own=own))
            # an engine that has fitted one of anomalib's own models is refused
            (engine() if name == "Padim" else shared).fit(models[-1], datamodule=data_of(mvtec_root))
    for model in (*models, *models[::-1]):
        assert scores(shared, model) == scores(engine(), model)
    for model in models:
        if isinstance(model.visualizer, OwnVisualizer) and not isinstance(model, Padim):  # whose callbacks stay
            assert model.visualizer.models == {model}


def test_model_after_others_on_an_engine_is_the_one_that_a_new_engine_gives(mvtec_root, dtd, tmp_path):
    def fitted(engine, *names):
        for name in names:
            model = MODELS[name](**COMMON, dtd_dir=str(dtd), visualizer=False)
            engine.fit(model, datamodule=data_of(mvtec_root, train_batch_size=3))
        return model.state_dict()

    def engine(folder):
        return Engine(default_root_dir=tmp_path / folder, max_epochs=3, **QUIET)

    alone = {name: fitted(engine(name), name) for name in MODELS}
    shared = engine("shared")
    for order in (("CseGaussian", "Cse"), ("CseGaussian",), ("Cse", "Cse")):
        found = fitted(shared, *order)
        assert all(torch.equal(value, found[name]) for name, value in alone[order[-1]].items())
        assert shared.trainer.max_epochs == 3


def test_default_of_100_epochs_holds_after_a_model_of_one_and_after_a_fit_that_failed(mvtec_root, dtd, tmp_path):
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    for name in ("CseGaussian", "Cse"):
        with pytest.raises(FileNotFoundError, match="dtd_dir"):
            engine.fit(MODELS[name](**COMMON, dtd_dir=str(tmp_path / "none")), datamodule=data_of(mvtec_root))
    engine.fit(MODELS["CseGaussian"](**COMMON, dtd_dir=str(dtd)), datamodule=data_of(mvtec_root))

    class Stop(Callback):
        def on_train_start(self, trainer, pl_module):
            self.found = trainer.max_epochs
            trainer.should_stop = True

    engine.trainer.callbacks.append(stop := Stop())
    with pytest.raises(RuntimeError, match="nothing has been fitted"):
        engine.fit(MODELS["Cse"](**COMMON, dtd_dir=str(dtd)), datamodule=data_of(mvtec_root))
    assert stop.found == 100


@pytest.mark.parametrize("use", ["fit", "predict"])
def test_engine_of_another_model_is_refused_as_its_numbers_are_lost(use, mvtec_root, trained, tmp_path):
    size = PreProcessor(Resize((64, 64)))
    padim = Padim("test_resnet", ["layer1"], pre_trained=False, n_features=8, pre_processor=size, visualizer=False)
    engine, data = Engine(default_root_dir=tmp_path, max_epochs=4, **QUIET), data_of(mvtec_root)
    if use == "fit":
        engine.fit(padim, datamodule=data)
    else:
        with pytest.raises(RuntimeError, match="size of tensor"):  # it is not fitted, but its arguments are there
            engine.predict(padim, data_path=mvtec_root / "tiny" / "test" / "good")
    engine.predict(trained["Cse"][0], data_path=mvtec_root / "tiny" / "test" / "good")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"for another model .*PreProcessor.* count for Cse: take a new Engine"):
            engine.fit(MODELS["Cse"](**COMMON), datamodule=data)


@both
def test_callback_that_remembers_another_fit_is_refused(name, trained, mvtec_root, fit):
    evaluator = Evaluator(val_metrics=[AUROC(["pred_score", "gt_label"], prefix="image_")])
    _, engine, _ = fit(name, [EarlyStopping("image_AUROC")], model_options={"evaluator": evaluator}, max_epochs=2)
    with pytest.raises(ValueError, match=r"EarlyStopping remembers the fit before, .*: take a new Engine, with new"):
        engine.fit(MODELS[name](**COMMON, evaluator=evaluator), datamodule=data_of(mvtec_root))


def test_second_fit_keeps_the_checkpoint_of_the_first(fit, mvtec_root, dtd):
    model, engine, _ = fit("CseGaussian")
    first = engine.best_model_path
    engine.fit(MODELS["Cse"](**COMMON, dtd_dir=str(dtd), visualizer=False), datamodule=data_of(mvtec_root))
    assert engine.best_model_path != first
    loaded = MODELS["CseGaussian"].load_from_checkpoint(first)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_checkpoints_of_the_next_model_are_written_by_the_engines_own_plugin(fit):
    _, engine, _ = fit("CseGaussian")
    assert type(engine.trainer.strategy.checkpoint_io) is AnomalibCheckpointIO


@both
def test_what_a_model_brings_leaves_the_trainer_with_it(name, fit):
    _, engine, notes = fit(name)
    kinds = {type(callback) for callback in engine.trainer.callbacks}
    assert not any(kind.__module__.startswith("anomalib_cse") for kind in kinds)
    assert not any(issubclass(kind, PreProcessor | PostProcessor | Evaluator | ImageVisualizer) for kind in kinds)
    assert type(notes) in kinds
