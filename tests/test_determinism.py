"""One seed, one result, however it is run; and the random numbers of the user's program stay the user's."""

import random

import numpy as np
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine

from anomalib_cse import AnomalySynthesis, Cse
from anomalib_cse.textures import builtin_textures

from tiny import QUIET, TINY, command_line, flags


def global_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_command_line_workers_and_one_process_give_equal_checkpoints(mvtec_root, tmp_path):
    """Without memory everything is read anew by the workers, every epoch."""
    arguments = {**TINY, "memory_budget": 0}
    model = Cse(**arguments)
    engine = Engine(max_epochs=2, default_root_dir=tmp_path / "one", **QUIET)
    engine.fit(model, datamodule=MVTecAD(root=mvtec_root, category="tiny", num_workers=0))
    data = flags("data", {"root": mvtec_root, "category": "tiny", "num_workers": 2})
    command = ["train", "--model", "Cse", *flags("model", arguments), "--data", "MVTec", *data]
    command_line(tmp_path, *command, "--trainer.max_epochs=2", f"--default_root_dir={tmp_path / 'line'}")
    [one], [line] = ((tmp_path / name).rglob("*.ckpt") for name in ("one", "line"))
    first, second = (torch.load(path, weights_only=True) for path in (one, line))
    for name, value in first["state_dict"].items():
        assert torch.equal(second["state_dict"][name], value), name
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])


def test_the_global_random_state_is_left_alone(mvtec_root, tmp_path):
    before = global_state()
    model = Cse(**TINY)
    assert global_state() == before
    generator = torch.Generator().manual_seed(1)
    synthesis = AnomalySynthesis(builtin_textures(4, 32, generator), generator=generator)
    for _ in range(3):
        synthesis(torch.rand(4, 3, 40, 40, generator=generator))
    assert global_state() == before
    model.model.set_centres(torch.ones_like(model.model.centres))
    images = mvtec_root / "tiny" / "test" / "good"
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    engine.predict(model, data_path=images)
    assert global_state() == before
    synthesis.generator = None
    synthesis(torch.rand(4, 3, 40, 40))
    assert global_state() != before  # which the comparison would notice
