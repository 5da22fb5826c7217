"""Cse's training: what moves, what is held out, which embedder is kept, and every way in which it may be run."""

import copy
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.nn import functional as F
from torchvision.transforms.v2 import RandomInvert, Resize

from anomalib_cse import Cse
from anomalib_cse.features import fuse, pool

import tiny
from tiny import COMMON, MODELS, QUIET

TILDA = Path(__file__).parents[1] / "configs" / "tilda.yaml"


data_of = partial(tiny.data_of, train_batch_size=4, eval_batch_size=4)


@pytest.fixture
def fit(mvtec_root, dtd, tmp_path):
    def fit(epochs=2, callbacks=None, data=None, model=None, trainer=None, **arguments):
        model = model or Cse(**{**COMMON, "dtd_dir": dtd, **arguments})
        engine = Engine(max_epochs=epochs, default_root_dir=tmp_path, callbacks=callbacks, **(trainer or {}), **QUIET)
        engine.fit(model, datamodule=data or data_of(mvtec_root))
        return model, engine

    return fit


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


def are_equal(state, other):
    return all(torch.equal(value, other[name]) for name, value in state.items())


class Notes(Callback):
    """What is logged at the end of every epoch, which embedder that belongs to, and what trains."""

    def __init__(self):
        self.train, self.val, self.embedders, self.training, self.held_out = [], [], [], set(), set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training |= set(batch.image_path)
        self.held_out |= set(pl_module.hold_out.held_out.samples.image_path)

    def on_train_epoch_end(self, trainer, pl_module):
        self.train.append(trainer.callback_metrics["train_loss"].item())
        self.val.append(trainer.callback_metrics["val_loss"].item())
        self.embedders.append(copy_of(pl_module.embedder.state_dict()))


class Spoil(Callback):
    """Sets the embedder to 0 from some epoch on, whose hold-out loss is then large."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.current_epoch >= self.epoch:
            for parameter in pl_module.embedder.parameters():
                torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("decoder", ["none", "pretrained", "joint", "random"])
def test_embedder_moves_and_the_decoder_as_table_5_has_it(decoder, fit, dtd):
    model = Cse(**COMMON, decoder=decoder, dtd_dir=dtd)
    before = copy_of(model.state_dict())
    fit(1, model=model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert {name for name in before if name.startswith("embedder.")} <= moved
    assert not {name for name in moved if name.startswith("model.backbone.")}
    of_decoder = {name for name in before if name.startswith("decoder.")}
    assert (of_decoder & moved) == (of_decoder if decoder in {"joint", "pretrained"} else set())
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == ({"embedder", "decoder"} if decoder == "joint" else {"embedder"})


def test_hold_out_never_trains_and_is_given_back(fit, mvtec_root):
    class Break(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise InterruptedError

    data, notes = data_of(mvtec_root), [Notes() for _ in range(4)]
    fit(1, [notes[0]], data)
    assert len(data.train_data) == 10
    with pytest.raises(InterruptedError):
        fit(1, [notes[1], Break()], data)
    assert len(data.train_data) == 10
    fit(1, [notes[2]], data, seed=1)
    fit(1, [notes[3]], data, holdout_ratio=0.5)
    everything = set(data.train_data.samples.image_path)
    for note, count in zip(notes, (3, 3, 3, 5), strict=True):
        assert len(note.held_out) == count
        assert note.training == everything - note.held_out
    assert notes[0].held_out == notes[1].held_out != notes[2].held_out


def test_hold_out_loss_and_batch_norm_are_those_of_the_held_out_pairs(fit):
    class Check(Callback):
        def on_train_end(self, trainer, pl_module):
            pairs, losses = list(pl_module.pairing.held_out_pairs()), []
            convolution, relu, norm = pl_module.embedder[0]
            for first, second, corrupted in pairs:
                embeddings = [pl_module.embedder.eval()(features) for features in (first, second)]
                cosine = F.cosine_similarity(*(pool(e, 2) for e in embeddings)).mean(dim=(1, 2))
                decoded = pl_module.decoder.eval()(embeddings[0], [f.shape[-2:] for f in first])
                decoder = [1 - F.cosine_similarity(f, d).mean(dim=(1, 2)) for f, d in zip(first, decoded, strict=True)]
                losses.append(10 * torch.where(corrupted, (1 + cosine) / 2, 1 - cosine) + sum(decoder) / len(decoder))
            self.loss = torch.cat(losses).mean().item()
            inputs = [fuse([torch.cat(layer) for layer in zip(*pair[:2], strict=True)]) for pair in pairs]
            self.mean = torch.stack([relu(convolution(x)).mean(dim=(0, 2, 3)) for x in inputs]).mean(0)
            self.logged, self.norm = trainer.callback_metrics["val_loss"].item(), norm.running_mean

    check = Check()
    fit(2, [check])
    assert check.logged == pytest.approx(check.loss, rel=1e-5)
    assert torch.allclose(check.norm, check.mean, atol=1e-5)


@pytest.fixture(scope="module")
def kept(mvtec_root, dtd, tmp_path_factory):
    """A run whose last epochs are spoilt."""
    model, notes = Cse(**COMMON, dtd_dir=dtd, learning_rate=4e-3), Notes()
    results = tmp_path_factory.mktemp("kept")
    engine = Engine(max_epochs=6, default_root_dir=results, callbacks=[notes, Spoil(4)], **QUIET)
    engine.fit(model, datamodule=data_of(mvtec_root))
    return model, engine, notes


def test_embedder_of_the_lowest_hold_out_loss_is_kept(kept, mvtec_root):
    model, _, notes = kept
    best = min(range(6), key=lambda epoch: notes.val[epoch])
    assert best < 4
    assert model.best_loss.item() == pytest.approx(notes.val[best])
    assert are_equal(model.model.embedder.state_dict(), notes.embedders[best])
    data = data_of(mvtec_root)
    data.setup()
    images = torch.stack([model.pre_processor.transform(item.image) for item in data.train_data])
    mean = model.model.embed(model.model.backbone(images)).mean(dim=0, keepdim=True)
    assert torch.allclose(model.model.centres, F.normalize(mean, dim=1), atol=1e-5)


def threshold_of(model, data):
    """Halfway between good and defective images, all of which the scores tell apart."""
    images = torch.stack([model.pre_processor.transform(item.image) for item in data.val_data])
    scores, defective = model.model(images).pred_score, torch.tensor([bool(item.gt_label) for item in data.val_data])
    assert scores[~defective].max() < scores[defective].min()
    return (scores[~defective].max() + scores[defective].min()).item() / 2


def test_thresholds_are_those_of_the_kept_model(kept, mvtec_root):
    model, _, _ = kept
    data = data_of(mvtec_root)
    data.setup()
    assert model.post_processor.image_threshold.item() == pytest.approx(threshold_of(model, data), abs=1e-6)


def test_validation_after_a_fit_computes_thresholds_anew(kept, mvtec_root, tmp_path):
    """Also if the last epoch's embedder was not the best."""
    model, engine, _ = kept
    fresh = Cse.load_from_checkpoint(engine.best_model_path)
    assert are_equal(fresh.state_dict(), model.state_dict())
    for validated in (fresh, copy.deepcopy(model)):
        inverted = data_of(mvtec_root, val_augmentations=RandomInvert(p=1.0))
        Engine(default_root_dir=tmp_path, **QUIET).validate(validated, datamodule=inverted)
        threshold = validated.post_processor.image_threshold.item()
        assert threshold != model.post_processor.image_threshold.item()
        assert threshold == pytest.approx(fresh.post_processor.image_threshold.item())


@pytest.mark.parametrize("budget", [0, 100_000])
def test_memory_changes_neither_losses_nor_centres(budget, fit):
    """At a low rate: Adam's first steps follow the sign of gradients, so would blow up the last bits of features."""
    notes = Notes(), Notes()
    models = [
        fit(2, [note], memory_budget=memory, learning_rate=1e-5)[0]
        for note, memory in zip(notes, (budget, 2**30), strict=True)
    ]
    assert notes[0].train == pytest.approx(notes[1].train, rel=1e-5)
    assert notes[0].val == pytest.approx(notes[1].val, rel=1e-5)
    assert torch.allclose(models[0].model.centres, models[1].model.centres, atol=1e-5)


def test_augmented_images_train_and_plain_ones_are_held_out_and_clustered(fit, mvtec_root):
    """Hardly anything is learnt, so that what is measured is the images."""
    notes, models = (Notes(), Notes()), []
    for note, augmentation in zip(notes, (None, RandomInvert(p=1.0)), strict=True):
        data = data_of(mvtec_root, train_augmentations=augmentation)
        models.append(fit(1, [note], data, learning_rate=1e-12)[0])
    assert notes[0].train != pytest.approx(notes[1].train, rel=1e-3)
    assert notes[0].val == pytest.approx(notes[1].val, rel=1e-5)
    assert torch.allclose(models[0].model.centres, models[1].model.centres, atol=1e-5)


def test_own_dataloaders_and_pre_processor_without_hold_out(mvtec_root, dtd, tmp_path):
    data = data_of(mvtec_root)
    data.setup()
    loaders = {"train_dataloaders": data.train_dataloader(), "val_dataloaders": data.val_dataloader()}
    arguments = {**COMMON, "image_size": None, "dtd_dir": dtd}
    resize = PreProcessor(Resize((48, 80), antialias=True))
    engine = Engine(max_epochs=2, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"holds out images of an anomalib datamodule: .* set holdout_ratio to 0"):
        engine.fit(Cse(**arguments, pre_processor=resize), **loaders)
    model = Cse(**arguments, pre_processor=resize, holdout_ratio=0)
    engine.fit(model, **loaders)
    assert model.post_processor.image_threshold.item() == pytest.approx(threshold_of(model, data), abs=1e-6)
    assert are_equal(model.model.embedder.state_dict(), model.embedder.state_dict())  # the last one


@pytest.mark.filterwarnings("ignore:all validation images have the same score")
def test_second_fit_of_a_model_forgets_the_first(fit):
    """Even if its hold-out loss is higher."""
    model, _ = fit(2)
    first = model.best_loss.item()
    fit(2, [Spoil(0)], model=model)
    assert model.best_loss.item() > first
    assert are_equal(model.model.embedder.state_dict(), model.embedder.state_dict())


@pytest.mark.parametrize(
    ("trainer", "epochs", "steps"),
    [({}, 100, 200), ({"max_epochs": 1000}, 1000, 2000), ({"max_steps": 7}, -1, 7)],
    ids=str,
)
def test_default_is_the_papers_100_epochs(trainer, epochs, steps, mvtec_root, dtd, tmp_path):
    class Stop(Callback):
        def on_train_start(self, trainer, pl_module):
            self.found = trainer.max_epochs, trainer.lr_scheduler_configs[0].scheduler.total_steps
            trainer.should_stop = True

    stop = Stop()
    engine = Engine(default_root_dir=tmp_path, callbacks=[stop], **trainer, **QUIET)
    with pytest.raises(RuntimeError, match="nothing has been fitted after 0 steps"):
        engine.fit(Cse(**COMMON, dtd_dir=dtd), datamodule=data_of(mvtec_root))
    assert stop.found == (epochs, steps)


def test_early_stopping_follows_the_hold_out_loss(fit):
    notes = Notes()
    model, _ = fit(20, [notes, Spoil(2), EarlyStopping("val_loss", patience=2)])
    assert len(notes.val) < 10
    assert model.best_loss.item() == pytest.approx(min(notes.val))
    assert model.post_processor.image_threshold.isfinite()


@pytest.mark.parametrize("trainer", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}], ids=str)
def test_rare_or_no_validation_still_deploys_a_model(trainer, fit, mvtec_root, tmp_path):
    model, engine = fit(4, trainer=trainer)
    assert model.best_loss.isfinite()
    [metrics] = engine.test(model, datamodule=data_of(mvtec_root))
    reloaded = Engine(default_root_dir=tmp_path / "test", **QUIET)
    [checkpoint] = tmp_path.rglob("*.ckpt")
    assert reloaded.test(Cse(**COMMON), datamodule=data_of(mvtec_root), ckpt_path=checkpoint) == [metrics]


@pytest.fixture(scope="module")
def base(mvtec_root, dtd, tmp_path_factory):
    """The centres of a run of one epoch."""
    model, engine = (
        Cse(**COMMON, dtd_dir=dtd),
        Engine(max_epochs=1, default_root_dir=tmp_path_factory.mktemp("base"), **QUIET),
    )
    engine.fit(model, datamodule=data_of(mvtec_root))
    return model.model.centres


@pytest.mark.parametrize(
    "arguments",
    [
        {"contrast_weight": 1.0},
        {"defects": ["blur"]},
        {"dtd_dir": "builtin"},
        {"learning_rate": 1e-2},
        {"holdout_ratio": 0.5},
        {"pool_size": 1},
        {"embedding_dim": 16},
        {"decoder": "none"},
        {"decoder": "pretrained"},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_argument_matters(arguments, base, fit):
    model, _ = fit(1, **arguments)
    assert model.model.centres.shape != base.shape or not torch.equal(model.model.centres, base)


def test_adam_reaches_the_learning_rate_of_the_one_cycle_schedule(fit):
    class Rates(Callback):
        seen = ()

        def on_train_batch_start(self, trainer, pl_module, *_):
            assert isinstance(trainer.optimizers[0], torch.optim.Adam)
            self.seen += (trainer.optimizers[0].param_groups[0]["lr"],)

    rates = Rates()
    fit(10, [rates], learning_rate=2e-3)
    assert max(rates.seen) == pytest.approx(2e-3, rel=0.01)
    assert rates.seen[0] == pytest.approx(2e-3 / 25)
    assert rates.seen[-1] < 1e-5


def test_train_finds_the_defects(mvtec_root, dtd, tmp_path):
    engine = Engine(max_epochs=8, default_root_dir=tmp_path, **QUIET)
    [metrics] = engine.train(Cse(**COMMON, dtd_dir=dtd), datamodule=data_of(mvtec_root))
    assert metrics["image_AUROC"] == 1.0


def test_folder_in_the_layout_of_tilda_trains(dtd, tmp_path):
    rng = np.random.default_rng(0)
    for kind in range(8):
        folder = tmp_path / "TILDA" / f"e{kind}"
        folder.mkdir(parents=True)
        for number in range(10 if kind == 0 else 2):
            image = rng.integers(90, 110, (512, 768), dtype=np.uint8)
            if kind:
                image[200:300, 300:400] = 255
            cv2.imwrite(str(folder / f"c1r1e{kind}n{number}.tif"), image)
    config = yaml.safe_load(TILDA.read_text())["data"]["init_args"]
    data = Folder(**{**config, "root": tmp_path / "TILDA", "num_workers": 0})
    engine = Engine(max_epochs=2, default_root_dir=tmp_path, **QUIET)
    [metrics] = engine.train(Cse(**COMMON, dtd_dir=dtd), datamodule=data)
    assert len(data.train_data) == 7
    assert len(data.test_data) + len(data.val_data) == 17
    assert {int(label) for label in data.test_data.samples.label_index} == {0, 1}
    assert metrics["image_AUROC"] > 0.5


@pytest.mark.parametrize(("name", "size"), [("Cse", (224, 224)), ("CseGaussian", (256, 256))])
def test_default_image_sizes_are_the_papers_and_anomalibs(name, size):
    images = torch.rand(1, 3, 500, 400)
    assert MODELS[name](**{**COMMON, "image_size": None}).pre_processor.transform(images).shape[-2:] == size
    cropped = MODELS[name](**{**COMMON, "image_size": (96, 64)}, center_crop_size=(32, 48))
    assert cropped.pre_processor.transform(images).shape[-2:] == (32, 48)
