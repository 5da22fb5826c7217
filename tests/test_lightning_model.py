import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from anomalib.data import Folder, MVTecAD
from anomalib.deploy import OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.callbacks import Callback
from sklearn.cluster import KMeans
from torch.nn.functional import normalize
from torchvision.transforms.v2 import Resize

from anomalib_cse import Cse
from anomalib_cse.torch_model import fuse, pool

from tiny import QUIET, TINY

CONFIGS = Path(__file__).parents[1] / "configs"


def datamodule(root, **options):
    return MVTecAD(root=root, category="tiny", num_workers=0, eval_batch_size=4, **options)


def train(root, results, epochs=2, callbacks=None, **options):
    model = Cse(**{**TINY, **options})
    engine = Engine(max_epochs=epochs, default_root_dir=results, callbacks=callbacks, **QUIET)
    engine.fit(model, datamodule=datamodule(root))
    return model, engine


class Losses(Callback):
    """Notes what is logged in every epoch and which embedder that belongs to."""

    def __init__(self):
        self.train, self.val, self.embedders = [], [], []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.embedders.append({k: v.clone() for k, v in pl_module.embedder.state_dict().items()})
        self.val.append(trainer.callback_metrics["val_loss"].item())
        self.train.append(trainer.callback_metrics["train_loss"].item())


@pytest.mark.parametrize("decoder", ["none", "pretrained", "joint", "random"])
def test_what_moves_in_training_and_what_does_not(decoder, mvtec_root, tmp_path):
    model = Cse(**TINY, decoder=decoder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    engine.fit(model, datamodule=datamodule(mvtec_root))
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {n for n in before if n.startswith("embedder.")} <= moved
    assert not {n for n in moved if n.startswith("model.backbone.")}
    decoders = {n for n in before if n.startswith("decoder.")}
    assert bool(decoders) == (decoder != "none")
    assert bool(decoders & moved) == (decoder in {"joint", "pretrained"})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert bool({n for n in trained if n.startswith("decoder.")}) == (decoder == "joint")


def test_the_lowest_hold_out_loss_is_kept(mvtec_root, tmp_path):
    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.current_epoch > 3:
                for parameter in pl_module.embedder.parameters():
                    torch.nn.init.zeros_(parameter)

    losses = Losses()
    model, _ = train(mvtec_root, tmp_path, 6, [Spoil(), losses])
    best = min(range(6), key=lambda epoch: losses.val[epoch])
    assert model.best_loss.item() == pytest.approx(losses.val[best])
    assert best < 4  # so that keeping the last would be noticed
    deployed = model.model.embedder.state_dict()
    assert all(torch.equal(deployed[name], losses.embedders[best][name]) for name in deployed)


def test_centres_are_kmeans_of_all_training_embeddings(mvtec_root, tmp_path):
    model, _ = train(mvtec_root, tmp_path, num_centres=2)
    data = datamodule(mvtec_root)
    data.setup()
    transform = model.pre_processor.transform
    with torch.no_grad():
        embeddings = [
            pool(model.model.embedder(model.model.backbone(transform(data.train_data[i].image)[None])), 2)
            for i in range(len(data.train_data))
        ]
    flat = torch.cat(embeddings).movedim(1, -1).flatten(0, 2).numpy()
    expected = torch.from_numpy(KMeans(2, n_init=10, random_state=1).fit(flat).cluster_centers_)
    expected = expected / expected.norm(dim=1, keepdim=True)
    similarities = model.model.centres @ expected.T
    assert similarities.max(dim=1).values.min() > 0.999


def test_centres_of_very_many_positions_are_those_of_a_sample(mvtec_root, tmp_path, monkeypatch):
    clustered = []

    class Recording(KMeans):
        def fit(self, vectors):
            clustered.append(torch.from_numpy(vectors))
            return super().fit(vectors)

    monkeypatch.setattr("anomalib_cse.lightning_model.KMeans", Recording)
    train(mvtec_root, tmp_path, 1)
    monkeypatch.setattr("anomalib_cse.lightning_model.MOST_CLUSTERED", 80)
    model, _ = train(mvtec_root, tmp_path, 1)
    every, sample = clustered
    assert len(every) == 10 * 4 * 4  # images, positions
    assert 56 < len(sample) < 104
    rows = [every.eq(vector).all(dim=1).nonzero().item() for vector in sample]  # each is one of the whole
    assert rows == sorted(set(rows))  # and none is taken twice
    assert torch.allclose(model.model.centres, normalize(sample.mean(dim=0, keepdim=True)), rtol=0, atol=1e-6)


def test_batch_norm_statistics_are_those_of_the_hold_out(mvtec_root, tmp_path):
    class Note(Callback):
        def on_train_end(self, trainer, pl_module):
            pairs = list(pl_module.data.holdout_features())
            with torch.no_grad():
                fused = [
                    fuse([torch.cat(layer) for layer in zip(first, second, strict=True)]) for first, second, _ in pairs
                ]
                convolution, relu, norm = pl_module.embedder[0]
                values = [relu(convolution(f)) for f in fused]
            expected = torch.stack([v.mean(dim=(0, 2, 3)) for v in values]).mean(0)
            self.close = torch.allclose(norm.running_mean, expected, atol=1e-5)

    note = Note()
    train(mvtec_root, tmp_path, 2, [note])
    assert note.close


def test_memory_does_not_change_the_losses(mvtec_root, tmp_path):
    runs = []
    for budget in (0, 2**30):
        losses = Losses()
        # a low rate: Adam's first steps follow the sign of gradients, so would blow up the last bits of features
        train(mvtec_root, tmp_path / str(budget), 3, [losses], memory_budget=budget, learning_rate=1e-5)
        runs.append(losses)
    assert runs[0].train == pytest.approx(runs[1].train, rel=1e-5)
    assert runs[0].val == pytest.approx(runs[1].val, rel=1e-5)


def test_same_seed_same_model_and_the_global_random_state_is_left_alone(mvtec_root, tmp_path):
    states = []
    for run, seed in enumerate((0, 0, 1)):
        torch.manual_seed(run)
        before = torch.get_rng_state()
        model = Cse(**{**TINY, "seed": seed})
        assert torch.equal(torch.get_rng_state(), before)
        Engine(max_epochs=2, default_root_dir=tmp_path, **QUIET).fit(model, datamodule=datamodule(mvtec_root))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["model.centres"], states[2]["model.centres"])


def test_default_number_of_epochs(mvtec_root, tmp_path):
    class Stop(Callback):
        def on_train_start(self, trainer, pl_module):
            self.epochs = trainer.max_epochs
            self.schedule = trainer.lr_scheduler_configs[0].scheduler.total_steps
            trainer.should_stop = True

    for options, epochs, steps in (
        ({}, 100, 200),
        ({"max_epochs": 1000}, 1000, 2000),
        ({"max_epochs": 3}, 3, 6),
        ({"max_steps": 7}, -1, 7),
    ):
        stop = Stop()
        engine = Engine(default_root_dir=tmp_path, callbacks=[stop], **options, **QUIET)
        engine.fit(Cse(**TINY), datamodule=datamodule(mvtec_root))
        assert (stop.epochs, stop.schedule) == (epochs, steps)


def test_checkpoint_memory_and_export_are_one_state(mvtec_root, tmp_path):
    losses = Losses()
    model, engine = train(mvtec_root, tmp_path, 4, [losses], learning_rate=0.05)
    [in_memory] = engine.test(model, datamodule=datamodule(mvtec_root))
    image = mvtec_root / "tiny" / "test" / "square" / "000.png"

    def predict(model, **options):
        engine = Engine(default_root_dir=tmp_path / "predict", **QUIET)
        [batch] = engine.predict(model, data_path=image, **options)
        return batch.pred_score.item(), batch.pred_label.item(), batch.anomaly_map

    score, label, anomaly_map = predict(model)
    reloaded = Cse.load_from_checkpoint(engine.best_model_path)
    assert predict(reloaded)[:2] == (score, label)
    assert torch.equal(predict(reloaded)[2], anomaly_map)
    assert predict(Cse(**{**TINY, "seed": 5}), ckpt_path=engine.best_model_path)[:2] == (score, label)
    fresh = Engine(default_root_dir=tmp_path / "test", **QUIET)
    [from_disk] = fresh.test(
        Cse(**{**TINY, "seed": 5}), datamodule=datamodule(mvtec_root), ckpt_path=engine.best_model_path
    )
    assert from_disk == in_memory
    thresholds = {n: v for n, v in model.state_dict().items() if n.startswith("post_processor")}
    assert all(value.isfinite() for value in thresholds.values())

    exported = OpenVINOInferencer(engine.export(model, export_type="openvino", export_root=tmp_path)).predict(image)
    assert exported.pred_score.item() == pytest.approx(score, abs=1e-4)
    assert exported.pred_label.item() == label
    engine.export(model, export_type="onnx", export_root=tmp_path)
    assert not list(tmp_path.rglob("*.onnx.data"))  # one file


def test_a_checkpoint_of_another_backbone(mvtec_root, tmp_path):
    _, engine = train(mvtec_root, tmp_path, 1)
    other = Cse(**{**TINY, "backbone": "test_resnet"})
    with pytest.raises(ValueError, match="checkpoint is of backbone test_efficientnet, the model has test_resnet"):
        engine.test(other, datamodule=datamodule(mvtec_root), ckpt_path=engine.best_model_path)


def test_train_finds_the_defects(mvtec_root, tmp_path):
    engine = Engine(max_epochs=8, default_root_dir=tmp_path, **QUIET)
    [metrics] = engine.train(Cse(**TINY), datamodule=datamodule(mvtec_root))
    assert metrics["image_AUROC"] == 1.0


def test_validate_recomputes_the_thresholds(mvtec_root, tmp_path):
    model, _ = train(mvtec_root, tmp_path, 1)
    threshold = model.post_processor.image_threshold.clone()
    model.post_processor._image_threshold.fill_(torch.nan)
    Engine(default_root_dir=tmp_path, **QUIET).validate(model, datamodule=datamodule(mvtec_root))
    assert torch.equal(model.post_processor.image_threshold, threshold)


def test_validation_runs_once_and_the_limit_is_given_back(mvtec_root, tmp_path):
    class Count(Callback):
        validations = 0

        def on_validation_epoch_start(self, trainer, pl_module):
            self.validations += 1

    count = Count()
    _, engine = train(mvtec_root, tmp_path, 3, [count])
    assert count.validations == 1
    assert engine.trainer.limit_val_batches == 1.0


@pytest.mark.parametrize("budget", [0, 2**30])
def test_resumes_to_the_uninterrupted_result(budget, mvtec_root, tmp_path):
    options = {**TINY, "memory_budget": budget}
    whole, _ = train(mvtec_root, tmp_path / "whole", 4, memory_budget=budget)

    class Interrupt(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError

    model = Cse(**options)
    engine = Engine(max_epochs=4, default_root_dir=tmp_path / "part", callbacks=[Interrupt()], **QUIET)
    with pytest.raises(RuntimeError):
        engine.fit(model, datamodule=datamodule(mvtec_root))
    [checkpoint] = (tmp_path / "part").rglob("*.ckpt")
    resumed = Cse(**options)
    engine = Engine(max_epochs=4, default_root_dir=tmp_path / "rest", **QUIET)
    engine.fit(resumed, datamodule=datamodule(mvtec_root), ckpt_path=checkpoint)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_a_broken_off_fit_leaves_no_stale_centres_and_no_limits(mvtec_root, tmp_path):
    class Break(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise RuntimeError

    model, _ = train(mvtec_root, tmp_path, 1)
    broken = Engine(max_epochs=2, default_root_dir=tmp_path, callbacks=[Break()], **QUIET)
    with pytest.raises(RuntimeError):
        broken.fit(model, datamodule=datamodule(mvtec_root))
    with pytest.raises(RuntimeError, match="the model is not fitted"):
        model.model(torch.rand(1, 3, 64, 64))
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, limit_val_batches=0, **QUIET)
    engine.fit(model, datamodule=datamodule(mvtec_root))
    assert (broken.trainer.limit_val_batches, engine.trainer.limit_val_batches) == (1.0, 0)


def test_a_diverging_run_stops(mvtec_root, tmp_path):
    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.embedder[0][0].weight.data.fill_(torch.nan)

    with pytest.raises(RuntimeError, match="training diverged: weights of the embedder are NaN or infinite in epoch 0"):
        train(mvtec_root, tmp_path, 2, [Spoil()])


@pytest.mark.parametrize(
    "options",
    [
        {"contrast_weight": 1.0},
        {"defects": ["blur"]},
        {"learning_rate": 1e-2},
        {"holdout_ratio": 0.5},
        {"batch_size": 7},
        {"half_precision_memory": True},
        {"pool_size": 1},
        {"embedding_dim": 16},
        {"decoder": "none"},
    ],
    ids=str,
)
def test_every_argument_matters(options, mvtec_root, tmp_path):
    base, _ = train(mvtec_root, tmp_path, 1)
    other, _ = train(mvtec_root, tmp_path, 1, **options)
    centres = other.model.centres
    assert centres.shape != base.model.centres.shape or not torch.equal(centres, base.model.centres)


def test_adam_reaches_the_learning_rate_it_was_given(mvtec_root, tmp_path):
    class Rates(Callback):
        seen = ()

        def on_train_batch_start(self, trainer, pl_module, *_):
            assert isinstance(trainer.optimizers[0], torch.optim.Adam)
            self.seen += (trainer.optimizers[0].param_groups[0]["lr"],)

    rates = Rates()
    train(mvtec_root, tmp_path, 10, [rates], learning_rate=2e-3)
    assert max(rates.seen) == pytest.approx(2e-3, rel=0.01)
    assert rates.seen[0] == pytest.approx(2e-3 / 25)
    assert rates.seen[-1] < 1e-5


def test_dtd_is_downloaded_when_asked_for(mvtec_root, tmp_path, texture_folder, monkeypatch):
    asked = []

    def download(folder, info):
        asked.append(info.hashsum)
        shutil.copytree(texture_folder, folder)

    monkeypatch.setattr("anomalib_cse.lightning_model.download_and_extract", download)
    for _ in range(2):
        train(mvtec_root, tmp_path, 1, dtd_dir=tmp_path / "downloaded", download_dtd=True)
    assert len(asked) == 1
    assert len(asked[0]) == 64


def test_a_resumed_run_keeps_the_seed_of_the_first(mvtec_root, tmp_path):
    torch.manual_seed(3)
    first, engine = train(mvtec_root, tmp_path / "first", 1, seed=None)
    torch.manual_seed(4)
    resumed = Cse(**{**TINY, "seed": None})
    again = Engine(max_epochs=1, default_root_dir=tmp_path / "again", **QUIET)
    again.fit(resumed, datamodule=datamodule(mvtec_root), ckpt_path=engine.best_model_path)
    assert resumed.fit_seed == first.fit_seed == 3
    longer = Engine(max_epochs=5, default_root_dir=tmp_path / "longer", **QUIET)
    with pytest.raises(ValueError, match="was given 2 steps and is now given 10"):
        longer.fit(Cse(**{**TINY, "seed": None}), datamodule=datamodule(mvtec_root), ckpt_path=engine.best_model_path)


def test_folder_of_tilda_layout(tmp_path):
    rng = np.random.default_rng(0)
    for kind in range(8):
        folder = tmp_path / "TILDA" / "c1" / "r1" / f"e{kind}"
        folder.mkdir(parents=True)
        for number in range(10 if kind == 0 else 2):
            image = rng.integers(90, 110, (512, 768), dtype=np.uint8)
            if kind:
                image[200:300, 300:400] = 255
            cv2.imwrite(str(folder / f"c1r1e{kind}n{number}.tif"), image)
    config = yaml.safe_load((CONFIGS / "tilda.yaml").read_text())["data"]["init_args"]
    data = Folder(**{**config, "root": tmp_path / "TILDA" / "c1" / "r1", "num_workers": 0})
    data.setup()
    assert len(data.train_data) == 7
    assert len(data.test_data) + len(data.val_data) == 17
    assert {int(s) for s in data.test_data.samples.label_index} == {0, 1}
    assert data.train_data[0].image.shape == (3, 512, 768)
    engine = Engine(max_epochs=2, default_root_dir=tmp_path, **QUIET)
    [metrics] = engine.train(Cse(**TINY), datamodule=data)
    assert metrics["image_AUROC"] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre_processor": False}, "image_size and center_crop_size"),
        ({"download_dtd": True}, "download_dtd needs a dtd_dir"),
    ],
)
def test_arguments_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        Cse(**{**TINY, **options})


def test_papers_pre_processing():
    images = torch.rand(1, 3, 500, 400)
    assert Cse(**{**TINY, "image_size": None}).pre_processor.transform(images).shape[-2:] == (224, 224)
    assert Cse(**{**TINY, "image_size": (96, 64)}).pre_processor.transform(images).shape[-2:] == (96, 64)
    cropped = Cse(**{**TINY, "image_size": (96, 64), "center_crop_size": (32, 48)})
    assert cropped.pre_processor.transform(images).shape[-2:] == (32, 48)


def test_missing_textures_stop_before_training(mvtec_root, tmp_path):
    with pytest.raises(FileNotFoundError, match="dtd_dir: no photographs"):
        train(mvtec_root, tmp_path, dtd_dir=tmp_path / "nowhere")


def test_textures_from_a_folder_are_used(mvtec_root, tmp_path, texture_folder):
    builtin, _ = train(mvtec_root, tmp_path, 1)
    folder, _ = train(mvtec_root, tmp_path, 1, dtd_dir=texture_folder)
    assert not torch.equal(builtin.model.centres, folder.model.centres)


def test_own_dataloaders_and_pre_processor(mvtec_root, tmp_path):
    data = datamodule(mvtec_root)
    data.setup()
    model = Cse(**{**TINY, "image_size": None, "pre_processor": PreProcessor(Resize((48, 48), antialias=True))})
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    engine.fit(model, train_dataloaders=data.train_dataloader(), val_dataloaders=data.val_dataloader())
    assert model.model.centres.isfinite().all()
    assert model.post_processor.image_threshold.isfinite()
