"""Runs that are killed, interrupted, out of disk or out of range: the last checkpoint is whole, scores and resumes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback

from anomalib_cse import Cse
from anomalib_cse.deployment.checkpoints import WholeCheckpointIO

import tiny
from tiny import COMMON, MODELS, QUIET

EPOCHS = 4

KILL, INTERRUPT = 9, 2  # signals, by number: Windows has no name for the first
CASES = [("training", KILL, 2), ("training", INTERRUPT, 0), ("writing", KILL, 0)]  # workers

KILLED = f"""
import io, os, signal, sys, torch
from multiprocessing import get_context
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback
from anomalib_cse import Cse

root, dtd, results = sys.argv[1:]
save = torch.save
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts with "&" ignore Ctrl-C

def fit(number, busy_with, how, workers):
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
    folder = os.path.join(results, str(number))
    engine = Engine(max_epochs={EPOCHS}, default_root_dir=folder, callbacks=[Kill()], **{QUIET})
    data = MVTecAD(root=root, category="tiny", num_workers=workers, train_batch_size=4)
    engine.fit(Cse(**{COMMON}, dtd_dir=dtd), datamodule=data)

cases = {CASES}
runs = [get_context("fork").Process(target=fit, args=(number, *case)) for number, case in enumerate(cases)]
for run in runs:
    run.start()
for run in runs:
    run.join()
print("exit codes", [run.exitcode for run in runs])
"""


data_of = partial(tiny.data_of, train_batch_size=4)


@pytest.fixture(scope="module")
def fit(mvtec_root, dtd):
    def fit(results, callbacks=None, epochs=EPOCHS, ckpt_path=None, model=Cse, data=None, **arguments):
        fitted = model(**{**COMMON, "dtd_dir": dtd, **arguments})
        epochs = {"max_epochs": epochs} if model is Cse else {}
        engine = Engine(default_root_dir=results, callbacks=callbacks, **epochs, **QUIET)
        engine.fit(fitted, datamodule=data or data_of(mvtec_root), ckpt_path=ckpt_path)
        return fitted, engine

    return fit


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    """The state of a run that nothing happened to."""
    return fit(tmp_path_factory.mktemp("whole"))[0].state_dict()


@pytest.fixture(scope="module")
def broken(fit, tmp_path_factory):
    """The checkpoint of a run that broke off in its third epoch."""
    return broken_off(fit, tmp_path_factory.mktemp("broken"), Break(2))


def assert_equal(state, expected):
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


class Break(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise InterruptedError


def broken_off(fit, results, callback, **options):
    """The checkpoint of a run that the callback broke off."""
    with pytest.raises(InterruptedError):
        fit(results, [callback], **options)
    [checkpoint] = results.rglob("*.ckpt")
    return checkpoint


@pytest.mark.linux
def test_killed_runs_resume_to_the_uninterrupted_result(whole, fit, mvtec_root, dtd, tmp_path):
    """Killed outright, with workers, and by Ctrl-C amid the third epoch, and when its checkpoint was half written."""
    command = [sys.executable, "-c", KILLED, mvtec_root, dtd, tmp_path]
    killed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"exit codes {[1 if how == INTERRUPT else -how for _, how, _ in CASES]}" in killed
    for case, (busy_with, _, workers) in enumerate(CASES):
        [checkpoint] = (tmp_path / f"{case}").rglob("*.ckpt")
        assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
        assert len(list(checkpoint.parent.iterdir())) == (2 if busy_with == "writing" else 1)  # the half one is there
        torch.manual_seed(case)  # as in any other process
        data = data_of(mvtec_root, num_workers=workers)
        resumed, engine = fit(tmp_path / f"resumed_{case}", ckpt_path=checkpoint, data=data)
        assert_equal(resumed.state_dict(), whole)
        assert tmp_path / f"resumed_{case}" in Path(engine.best_model_path).parents
        assert_equal(torch.load(engine.best_model_path, weights_only=True)["state_dict"], whole)


@pytest.mark.parametrize("decoder", ["joint", "pretrained"])
def test_trained_decoders_resume_too(decoder, fit, tmp_path):
    uninterrupted, _ = fit(tmp_path / "whole", epochs=2, decoder=decoder)
    checkpoint = broken_off(fit, tmp_path / "broken", Break(1), epochs=2, decoder=decoder)
    resumed, _ = fit(tmp_path / "resumed", epochs=2, ckpt_path=checkpoint, decoder=decoder)
    assert_equal(resumed.state_dict(), uninterrupted.state_dict())


def test_unfinished_checkpoint_scores(broken, fit, mvtec_root, tmp_path):
    """As the model that the run had got to."""
    model = Cse(**{**COMMON, "seed": 3})
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    [metrics] = engine.test(model, datamodule=data_of(mvtec_root), ckpt_path=broken)
    assert 0 <= metrics["image_AUROC"] <= 1
    state = {name: value for name, value in model.state_dict().items() if name.startswith(("model.", "post_processor"))}
    assert all(value.isfinite().all() for value in state.values())
    reached, _ = fit(tmp_path / "reached", [StopAfter(1)])
    assert_equal(state, {name: value for name, value in reached.state_dict().items() if name in state})


class StopAfter(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == self.epoch


class BreakAtTheEnd(Callback):
    def on_train_end(self, trainer, pl_module):
        raise InterruptedError


@pytest.mark.filterwarnings("ignore:all epochs of .* are done")
def test_run_broken_off_after_its_last_epoch_is_finished(whole, fit, tmp_path):
    checkpoint = broken_off(fit, tmp_path / "broken", BreakAtTheEnd())
    content = checkpoint.read_bytes()
    resumed, _ = fit(tmp_path / "resumed", ckpt_path=checkpoint)
    assert_equal(resumed.state_dict(), whole)
    assert checkpoint.read_bytes() == content


def test_resuming_what_is_finished_is_said_to_train_nothing(trained, fit, mvtec_root, tmp_path):
    """CseGaussian is always finished."""
    with pytest.warns(UserWarning, match=r"all epochs of .*model\.ckpt are done: nothing is trained"):
        fit(tmp_path, epochs=2, ckpt_path=trained["Cse"][1], data=tiny.data_of(mvtec_root))
    with pytest.raises(ValueError, match=r"fitted in one pass, so there is nothing to resume in .*model\.ckpt: leave"):
        fit(tmp_path, ckpt_path=trained["CseGaussian"][1], model=MODELS["CseGaussian"])


def test_train_resumes_and_then_tests_what_it_has_finished(broken, whole, mvtec_root, dtd, tmp_path):
    """anomalib's ``train`` hands to its test the checkpoint that it resumed from."""
    model = Cse(**COMMON, dtd_dir=dtd)
    engine = Engine(max_epochs=EPOCHS, default_root_dir=tmp_path / "resumed", **QUIET)
    metrics = engine.train(model, datamodule=data_of(mvtec_root), ckpt_path=broken)
    assert_equal(model.state_dict(), whole)
    fresh = Engine(default_root_dir=tmp_path / "fresh", **QUIET)
    assert metrics == fresh.test(model, datamodule=data_of(mvtec_root))
    [checkpoint] = (tmp_path / "resumed").rglob("*.ckpt")
    assert Path(engine.best_model_path).resolve() == checkpoint.resolve()
    assert_equal(torch.load(checkpoint, weights_only=True)["state_dict"], whole)


def test_resumed_run_keeps_the_seed_of_the_first(fit, tmp_path):
    torch.manual_seed(3)
    uninterrupted, _ = fit(tmp_path / "whole", epochs=2, seed=None)
    torch.manual_seed(3)
    checkpoint = broken_off(fit, tmp_path / "broken", Break(1), epochs=2, seed=None)
    torch.manual_seed(4)
    resumed, _ = fit(tmp_path / "resumed", epochs=2, seed=None, ckpt_path=checkpoint)
    assert_equal(resumed.state_dict(), uninterrupted.state_dict())
    with pytest.raises(ValueError, match=r"begun with seed 3, not 5: give that one or none"):
        fit(tmp_path / "other", epochs=2, ckpt_path=checkpoint, seed=5)


@pytest.mark.parametrize(("epochs", "batch_size", "steps"), [(5, 4, 10), (EPOCHS, 2, 16)])
def test_resuming_to_another_end_is_refused(epochs, batch_size, steps, broken, fit, mvtec_root, tmp_path):
    data = data_of(mvtec_root, train_batch_size=batch_size)
    with pytest.raises(ValueError, match=rf"was given 8 steps and is now given {steps}: set max_epochs"):
        fit(tmp_path, epochs=epochs, ckpt_path=broken, data=data)


OTHERS = {
    "contrast_weight": 1.0,
    "learning_rate": 1e-2,
    "holdout_ratio": 0.5,
    "defects": ["blur"],
    "dtd_dir": "builtin",
}


@pytest.mark.parametrize("name", OTHERS)
def test_resuming_with_another_argument_is_refused(name, broken, fit, mvtec_root, tmp_path):
    with pytest.raises(ValueError, match=rf"the checkpoint is of {name} .*, the model has .*--model\.{name}"):
        fit(tmp_path, ckpt_path=broken, **{name: OTHERS[name]})
    model = Cse(**{**COMMON, name: OTHERS[name]})  # to score, it does not matter
    good = mvtec_root / "tiny" / "test" / "good"
    Engine(default_root_dir=tmp_path, **QUIET).predict(model, data_path=good, ckpt_path=broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 0.1}, "gradient_clip_val None and is now given gradient_clip_val 0.1"),
        ({"precision": "bf16-mixed"}, "precision 32-true and is now given precision bf16-mixed"),
    ],
    ids=str,
)
def test_resuming_with_another_setting_of_the_trainer_is_refused(options, message, broken, mvtec_root, dtd, tmp_path):
    engine = Engine(default_root_dir=tmp_path, max_epochs=EPOCHS, **options, **QUIET)
    with pytest.raises(ValueError, match=f"the run to resume was given {message}: set it as it was"):
        engine.fit(Cse(**COMMON, dtd_dir=dtd), datamodule=data_of(mvtec_root), ckpt_path=broken)


@pytest.mark.parametrize("letter", ["a", "ä"])
def test_checkpoint_may_have_the_longest_name(letter, tmp_path):
    path = tmp_path / (letter * (250 // len(letter.encode())) + ".ckpt")
    assert len(os.fsencode(path.name)) == 255
    WholeCheckpointIO().save_checkpoint({"epoch": 3}, path)
    assert [*tmp_path.iterdir()] == [path]
    assert torch.load(path, weights_only=True) == {"epoch": 3}


class FullDisk(Callback):
    """From the third epoch on no file can grow beyond some kilobytes, as on a full disk."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            import resource  # Windows has none

            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.linux
def test_full_disk_stops_the_run_and_leaves_the_last_checkpoint(whole, fit, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"checkpoint .*model\.ckpt cannot be written .*one that was there before is"):
            fit(tmp_path / "full", [FullDisk()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    [checkpoint] = (file for file in (tmp_path / "full").rglob("*") if file.is_file())
    assert_equal(fit(tmp_path / "resumed", ckpt_path=checkpoint)[0].state_dict(), whole)


@pytest.mark.parametrize("holdout_ratio", [0, 0.3])
def test_diverging_run_stops_and_leaves_the_last_checkpoint(holdout_ratio, fit, tmp_path):
    class Diverge(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.current_epoch == 1:
                pl_module.embedder[0][0].weight.data.fill_(torch.nan)

    with pytest.raises(RuntimeError, match=r"training diverged: hold-out loss .* in epoch 1; lower learning_rate"):
        fit(tmp_path, [Diverge()], holdout_ratio=holdout_ratio)
    [checkpoint] = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["epoch"] == 0
    assert all(value.isfinite().all() for name, value in saved["state_dict"].items() if "embedder." in name)


@pytest.mark.parametrize("name", MODELS)
def test_torn_checkpoints_are_refused(name, trained, fit, mvtec_root, tmp_path):
    torn, content = tmp_path / "torn.ckpt", Path(trained[name][1]).read_bytes()
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    for length in (0, 1000, len(content) // 2, len(content) - 10):
        torn.write_bytes(content[:length])
        for use in uses_of(torn, name, fit, engine, mvtec_root, tmp_path):
            with pytest.raises(ValueError, match=r"torn\.ckpt is not a whole checkpoint"):
                use()


def uses_of(path, name, fit, engine, mvtec_root, results):
    """Three ways in which a checkpoint is loaded."""
    model, images = MODELS[name], mvtec_root / "tiny" / "test" / "good"
    return (
        lambda: model.load_from_checkpoint(path),
        lambda: engine.predict(model(**COMMON), data_path=images, ckpt_path=path),
        lambda: fit(results, ckpt_path=path, model=model),
    )


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_the_other_model_and_of_0_1_are_refused(name, trained, fit, mvtec_root, tmp_path):
    """Those of 0.1 have arguments that are no more."""
    checkpoint, old = torch.load(trained[name][1], weights_only=True), tmp_path / "old.ckpt"
    checkpoint["hyper_parameters"] |= {"embedder": "network", "batch_size": 8, "half_precision_memory": False}
    torch.save(checkpoint, old)
    [other] = [path for model, (_, path) in trained.items() if model != name]
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    for path in (old, other):
        for use in uses_of(path, name, fit, engine, mvtec_root, tmp_path):
            with pytest.raises(
                ValueError, match=rf"not of this {name}: .* or of anomalib-cse before 0\.2.* train again"
            ):
                use()


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("Cse", "pool_size", 1),
        ("Cse", "num_centres", 2),
        ("Cse", "decoder", "none"),
        ("Cse", "backbone", "test_resnet"),
        ("CseGaussian", "backbone", "test_resnet"),
    ],
)
def test_checkpoint_of_other_arguments_is_refused(name, argument, value, trained, mvtec_root, tmp_path):
    other = MODELS[name](**{**COMMON, argument: value})
    images = mvtec_root / "tiny" / "test" / "good"
    with pytest.raises(ValueError, match=rf"the checkpoint is of {argument} .*, the model has .*--model\.{argument}"):
        Engine(default_root_dir=tmp_path, **QUIET).predict(other, data_path=images, ckpt_path=trained[name][1])
