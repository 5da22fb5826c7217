"""Every argument of either model, as users have them, comes back out of the checkpoint; the signature says which."""

import inspect
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.engine import Engine
from PIL import Image
from safetensors.torch import save_file

from tiny import COMMON, MODELS, QUIET, data_of, flags

VALUES = {
    "backbone": (np.str_("test_efficientnet"), "test_efficientnet"),
    "layers": (np.array([2, 3]), [2, 3]),
    "pre_trained": (np.zeros((), bool), False),
    "weights": (Path("weights.safetensors"), "weights.safetensors"),
    "embedding_dim": (np.int64(16), 16),
    "pool_size": (np.int8(1), 1),
    "num_centres": (np.int32(2), 2),
    "decoder": (np.str_("joint"), "joint"),
    "contrast_weight": (np.float32(5), 5.0),
    "dtd_dir": (Path("dtd"), "dtd"),
    "download_dtd": (np.zeros((), bool), False),
    "variations": (np.array(["noise", "light"]), ["noise", "light"]),
    "defects": (np.array(["blur", "structural"]), ["blur", "structural"]),
    "learning_rate": (np.float64(1e-3), 1e-3),
    "holdout_ratio": (np.float32(0.5), 0.5),
    "image_size": (np.array([64, 72]), [64, 72]),
    "center_crop_size": ((np.int64(48), np.int64(40)), (48, 40)),
    "roi": (Path("mask.png"), None),  # it is among the buffers
    "memory_budget": (np.uint32(2**20), 2**20),
    "reject_rate": (np.float32(0.25), 0.25),
    "seed": (np.int64(3), 3),
    "report": (np.zeros((), bool), False),
    "known_defects": (Path("known"), None),  # they are in the fit
    "known_masks": (Path("known_masks"), None),
    "keep_sums": (np.zeros((), bool), False),
}
FILES = {"roi": "mask.png", "known_defects": "known", "known_masks": "known_masks"}  # that no checkpoint names
NOT_SAVED = {"pre_processor", "post_processor", "evaluator", "visualizer"}  # which anomalib saves otherwise
OF_WEIGHTS = {"backbone": "test_efficientnet", "layers": [2, 3], "pre_trained": False, "weights": None}  # in the file
both = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def folder(dtd, tmp_path):
    """A folder in which the paths of ``VALUES`` are."""
    (tmp_path / "dtd").symlink_to(dtd)
    state = timm.create_model("test_efficientnet").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    Image.new("L", (96, 72), 255).save(tmp_path / "mask.png")
    for part, grey in (("known", 130), ("known_masks", 255)):
        (tmp_path / part).mkdir()
        Image.new("L", (96, 72), grey).save(tmp_path / part / "000.png")
    return tmp_path


def arguments_of(name, number):
    """All arguments of a model that are saved: as a user may have them, or as they are to come back."""
    names = [argument for argument in inspect.signature(MODELS[name]).parameters if argument not in NOT_SAVED]
    values = {argument: VALUES[argument][number] for argument in names}
    return {**values, "pre_trained": True}  # with weights


def check(name, checkpoint):
    expected = {**arguments_of(name, 1), **OF_WEIGHTS}
    found = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert {
        argument: list(v) if isinstance(v, tuple) else v for argument, v in found.items() if argument in expected
    } == {argument: list(v) if isinstance(v, tuple) else v for argument, v in expected.items()}
    loaded = MODELS[name].load_from_checkpoint(checkpoint)
    assert loaded.image_size == (48, 40)
    assert loaded.model.is_fitted


@both
def test_arguments_of_numpy_and_paths_come_back_on_the_engine(name, folder, mvtec_root):
    with chdir(folder):
        model = MODELS[name](**arguments_of(name, 0))
        engine = Engine(max_epochs=1, default_root_dir=folder, **QUIET)
        engine.fit(model, datamodule=data_of(mvtec_root))
        check(name, engine.best_model_path)
        again = MODELS[name](**arguments_of(name, 0))
        new = Engine(default_root_dir=folder, **QUIET)
        image = mvtec_root / "tiny" / "test" / "square" / "000.png"
        scores = [
            e.predict(m, data_path=image, ckpt_path=c)[0].pred_score
            for e, m, c in ((engine, model, None), (new, again, engine.best_model_path))
        ]
        assert torch.equal(*scores)


@pytest.mark.parametrize(("way", "name"), [("yaml", "Cse"), ("flags", "CseGaussian")])
def test_arguments_come_back_on_the_command_line(way, name, folder, mvtec_root):
    arguments = {argument: v.tolist() if hasattr(v, "tolist") else v for argument, v in arguments_of(name, 1).items()}
    arguments = {argument: list(v) if isinstance(v, tuple) else v for argument, v in arguments.items()}
    arguments |= {argument: file for argument, file in FILES.items() if argument in arguments}
    if way == "yaml":
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": name, "init_args": arguments}}))
        model = ["--config", "config.yaml"]
    else:
        model = ["--model", name, *flags("model", arguments)]
    data = ["--data", "MVTec", *flags("data", {"root": str(mvtec_root), "category": "tiny", "num_workers": 0})]
    with chdir(folder), redirect_stdout(StringIO()):
        AnomalibCLI(["train", *model, *data, "--trainer.max_epochs=1"])
        check(name, next(folder.rglob("model.ckpt")))


def test_every_value_is_of_an_argument():
    assert set(VALUES) | NOT_SAVED == {a for model in MODELS.values() for a in inspect.signature(model).parameters}
    assert set(COMMON) <= set(VALUES)


@both
def test_arguments_of_a_subclass_come_back(name, dtd, mvtec_root, tmp_path):
    class Own(MODELS[name]):
        def __init__(self, extra, **options):
            super().__init__(**options)
            self.extra = extra

    model = Own(np.int64(3), **{**COMMON, "seed": np.int64(2)}, dtd_dir=dtd)
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    engine.fit(model, datamodule=data_of(mvtec_root))
    loaded = Own.load_from_checkpoint(engine.best_model_path)
    assert (loaded.extra, loaded.seed, loaded.hparams["layers"]) == (3, 2, [2, 3])
