"""Runs that are killed, interrupted, out of disk or out of range: the last checkpoint is whole and resumes exactly."""

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback

from anomalib_cse import Cse

from tiny import QUIET, TINY

EPOCHS = 4

KILLED = f"""
import io, os, signal, sys, torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback
from anomalib_cse import Cse

how, busy_with = int(sys.argv[3]), sys.argv[4]
save = torch.save
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts with "&" ignore Ctrl-C

class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx, busy_with) == (2, 1, "training"):
            os.kill(os.getpid(), how)

def save_half(checkpoint, file):
    if (checkpoint["epoch"], busy_with) == (2, "writing"):
        content = io.BytesIO()
        save(checkpoint, content)
        file.write(content.getvalue()[: len(content.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), how)
    save(checkpoint, file)

torch.save = save_half
engine = Engine(max_epochs={EPOCHS}, default_root_dir=sys.argv[2], callbacks=[Kill()], **{QUIET})
engine.fit(Cse(**{TINY}), datamodule=MVTecAD(root=sys.argv[1], category="tiny", num_workers=0))
"""


def fit(root, results, callbacks=None, epochs=EPOCHS, ckpt_path=None, **options):
    model = Cse(**{**TINY, **options})
    engine = Engine(max_epochs=epochs, default_root_dir=results, callbacks=callbacks, **QUIET)
    data = MVTecAD(root=root, category="tiny", num_workers=0)
    engine.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model, engine


@pytest.fixture(scope="module")
def whole(mvtec_root, tmp_path_factory):
    """The state of a run that nothing happened to."""
    return fit(mvtec_root, tmp_path_factory.mktemp("whole"))[0].state_dict()


def assert_resumes_to(whole, checkpoint, root, results):
    resumed, engine = fit(root, results, ckpt_path=checkpoint)
    saved = torch.load(engine.best_model_path, weights_only=True)["state_dict"]
    assert results in Path(engine.best_model_path).parents
    for name, value in whole.items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert torch.equal(saved[name], value), name


def test_a_killed_run_resumes_to_the_uninterrupted_result(whole, mvtec_root, tmp_path):
    """Killed outright and by Ctrl-C amid the third epoch, and when that epoch's checkpoint was half written."""
    cases = (("training", signal.SIGKILL), ("training", signal.SIGINT), ("writing", signal.SIGKILL))
    runs = [
        subprocess.Popen([sys.executable, "-c", KILLED, mvtec_root, tmp_path / f"{case}", str(int(how)), busy_with])
        for case, (busy_with, how) in enumerate(cases)
    ]
    for case, (busy_with, how) in enumerate(cases):
        assert runs[case].wait(timeout=120) == (1 if how == signal.SIGINT else -how)
        [checkpoint] = (tmp_path / f"{case}").rglob("*.ckpt")
        assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
        assert len(list(checkpoint.parent.iterdir())) == (2 if busy_with == "writing" else 1)  # the half one is there
        assert_resumes_to(whole, checkpoint, mvtec_root, tmp_path / f"resumed_{case}")


class BreakAtTheEnd(Callback):
    def on_train_end(self, trainer, pl_module):
        raise InterruptedError


def test_a_run_broken_off_after_its_last_epoch_is_finished(whole, mvtec_root, tmp_path):
    with pytest.raises(InterruptedError):
        fit(mvtec_root, tmp_path / "broken", [BreakAtTheEnd()])
    [checkpoint] = (tmp_path / "broken").rglob("*.ckpt")
    content = checkpoint.read_bytes()
    assert_resumes_to(whole, checkpoint, mvtec_root, tmp_path / "resumed")
    assert checkpoint.read_bytes() == content


class BreakInTheThirdEpoch(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise InterruptedError


def test_train_resumes_and_then_tests_what_it_has_finished(whole, mvtec_root, tmp_path):
    """anomalib's ``train`` hands to its test the checkpoint that it resumed from, which has no centres."""
    with pytest.raises(InterruptedError):
        fit(mvtec_root, tmp_path / "broken", [BreakInTheThirdEpoch()])
    [checkpoint] = (tmp_path / "broken").rglob("*.ckpt")
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    model, fresh = Cse(**TINY), Cse(**TINY)
    engine = Engine(max_epochs=EPOCHS, default_root_dir=tmp_path / "resumed", **QUIET)
    metrics = engine.train(model, datamodule=data, ckpt_path=checkpoint)
    for name, value in whole.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert metrics == engine.test(fresh, datamodule=data, ckpt_path=engine.best_model_path)
    engine.fit(model, datamodule=data, ckpt_path=checkpoint)  # which is not the finished one
    assert all(torch.equal(model.state_dict()[name], value) for name, value in whole.items())
    for other, use in ((fresh, Engine.test), (model, Engine.validate)):  # finished, but not what was asked for
        with pytest.raises(RuntimeError, match=r"model is not fitted.*finished run \(ckpt_path\) or resume"):
            use(Engine(default_root_dir=tmp_path, **QUIET), other, datamodule=data, ckpt_path=checkpoint)


def test_a_run_resumes_with_its_own_seed(mvtec_root, tmp_path):
    _, engine = fit(mvtec_root, tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"begun with seed 0, which is not 5"):
        fit(mvtec_root, tmp_path / "resumed", epochs=1, ckpt_path=engine.best_model_path, seed=5)


class FullDisk(Callback):
    """From the third epoch on no file can grow beyond some kilobytes, as on a full disk."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(whole, mvtec_root, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"checkpoint .*model\.ckpt cannot be written .*one that was there before is"):
            fit(mvtec_root, tmp_path / "full", [FullDisk()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    [checkpoint] = (file for file in (tmp_path / "full").rglob("*") if file.is_file())
    assert_resumes_to(whole, checkpoint, mvtec_root, tmp_path / "resumed")


def test_a_checkpoint_is_never_copied_onto_the_one_before(mvtec_root, tmp_path, monkeypatch):
    """Moving a file to another file system is copying it there: a disk that fills up, or a crash, leaves a part."""

    def move(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        raise OSError(28, "No space left on device", target)

    _, engine = fit(mvtec_root, tmp_path, epochs=1)
    [checkpoint] = tmp_path.rglob("*.ckpt")
    monkeypatch.setattr(shutil, "move", move)
    engine.trainer.save_checkpoint(checkpoint)
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1


def test_a_torn_checkpoint_is_recognised(mvtec_root, tmp_path):
    _, engine = fit(mvtec_root, tmp_path, epochs=1)
    torn = tmp_path / "torn.ckpt"
    content = Path(engine.best_model_path).read_bytes()
    for length in (0, 1000, len(content) // 2, len(content) - 10):
        torn.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"torn\.ckpt is not a whole checkpoint"):
            fit(mvtec_root, tmp_path / "resumed", ckpt_path=torn)
        with pytest.raises(ValueError, match=r"torn\.ckpt is not a whole checkpoint"):
            Engine(default_root_dir=tmp_path, **QUIET).predict(Cse(**TINY), data_path=mvtec_root, ckpt_path=torn)
        with pytest.raises(ValueError, match=r"torn\.ckpt is not a whole checkpoint"):
            Cse.load_from_checkpoint(torn)


def test_a_checkpoint_of_other_arguments(mvtec_root, tmp_path):
    _, engine = fit(mvtec_root, tmp_path, epochs=1, layers=["blocks.2", "blocks.3"])
    fresh = Engine(default_root_dir=tmp_path, **QUIET)
    arguments = {"data_path": mvtec_root / "tiny" / "test" / "good", "ckpt_path": engine.best_model_path}
    fresh.predict(Cse(**TINY), **arguments)  # the same layers by number
    for name, value in {"pool_size": 1, "layers": (1, 3), "num_centres": 2, "decoder": "none"}.items():
        with pytest.raises(ValueError, match=rf"the checkpoint is of {name} .*, the model has .*--model\.{name}"):
            fresh.predict(Cse(**{**TINY, name: value}), **arguments)


class Diverge(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.current_epoch == 1:
            pl_module.embedder[0][0].weight.data.fill_(torch.nan)


def test_a_hold_out_loss_that_is_no_number_stops_the_run(whole, mvtec_root, tmp_path):
    """Weights that are all finite may still give one; what was saved before resumes as if nothing had happened."""
    measured = Cse.holdout_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cse, "holdout_loss", lambda self: measured(self) * (torch.nan if self.current_epoch == 2 else 1))
        with pytest.raises(RuntimeError, match="training diverged: hold-out loss nan in epoch 2; lower learning_rate"):
            fit(mvtec_root, tmp_path / "diverged")
    [checkpoint] = (tmp_path / "diverged").rglob("*.ckpt")
    loaded = Cse.load_from_checkpoint(checkpoint)
    assert loaded.best_loss.isfinite()
    assert_resumes_to(whole, checkpoint, mvtec_root, tmp_path / "resumed")


@pytest.mark.parametrize("holdout_ratio", [0, 0.3])
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(holdout_ratio, mvtec_root, tmp_path):
    with pytest.raises(RuntimeError, match=r"training diverged: .* epoch 1; lower learning_rate"):
        fit(mvtec_root, tmp_path, [Diverge()], holdout_ratio=holdout_ratio)
    [checkpoint] = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["epoch"] == 0
    assert all(value.isfinite().all() for name, value in saved["state_dict"].items() if "embedder." in name)
