"""One seed, one result, however a model is trained."""

import random

import numpy as np
import pytest
import torch
from anomalib.engine import Engine

from tiny import COMMON, MODELS, QUIET, command_line, data_of, flags

EPOCHS = {"Cse": {"max_epochs": 2}, "CseGaussian": {}}


def global_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def checkpoint_in(folder):
    [checkpoint] = folder.rglob("*.ckpt")
    return torch.load(checkpoint, weights_only=True)


@pytest.fixture(scope="module")
def command_lines(mvtec_root, dtd, tmp_path_factory):
    """A folder with results of anomalib's command line, of each model by its name."""
    results = tmp_path_factory.mktemp("command_lines")
    data = flags("data", {"root": mvtec_root, "category": "tiny", "num_workers": 2, "train_batch_size": 4})
    for name in MODELS:
        torch.manual_seed(7)
        model = flags("model", {**COMMON, "dtd_dir": dtd})
        trainer = flags("trainer", {**EPOCHS[name], "accelerator": "cpu"})
        options = ["--data", "MVTecAD", *data, *trainer, f"--default_root_dir={results / name}"]
        command_line(results, "train", "--model", name, *model, *options)
    return results


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_gives_one_model(name, command_lines, mvtec_root, dtd, tmp_path):
    """From Python and the command line, with and without workers, whatever the global random numbers are."""
    for run, (seed, workers) in enumerate(((0, 0), (0, 2), (1, 0))):
        torch.manual_seed(run)
        model = MODELS[name](**{**COMMON, "dtd_dir": dtd, "seed": seed})
        engine = Engine(default_root_dir=tmp_path / f"{run}", **EPOCHS[name], **QUIET)
        data = data_of(mvtec_root, num_workers=workers, train_batch_size=4)
        engine.fit(model, datamodule=data)
    first, second, other = (checkpoint_in(tmp_path / f"{run}") for run in range(3))
    for checkpoint in (second, checkpoint_in(command_lines / name)):
        for key, value in first["state_dict"].items():
            assert torch.equal(checkpoint["state_dict"][key], value), key
        assert all(torch.equal(a, b) for a, b in zip(moments_of(checkpoint), moments_of(first), strict=True))
    assert any(not torch.equal(other["state_dict"][key], value) for key, value in first["state_dict"].items())


def moments_of(checkpoint):
    """What the optimizer has of each parameter, if there is one."""
    return [state["exp_avg"] for own in checkpoint["optimizer_states"] for state in own.get("state", {}).values()]


@pytest.mark.parametrize("name", MODELS)
def test_constructing_a_model_leaves_the_global_random_state_alone(name):
    for seed in (0, None):
        before = global_state()
        MODELS[name](**{**COMMON, "seed": seed})
        assert global_state() == before
    torch.rand(1)
    assert global_state() != before  # which the comparison would notice
