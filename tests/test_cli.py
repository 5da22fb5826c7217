"""anomalib's own command line, from configuration to exported model, and training by two processes."""

import inspect
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from anomalib import data as anomalib_data
from anomalib import models as anomalib_models
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import MVTecAD
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict
from torch.nn import functional as F
from torchvision.transforms.v2.functional import resize

from tiny import COMMON, MODELS, ROOT, anomalib, command_line, flags, metrics

CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def data(mvtec_root):
    return {"root": str(mvtec_root), "category": "tiny", "num_workers": 0}


@pytest.fixture(scope="module")
def arguments(dtd):
    return {**COMMON, "dtd_dir": str(dtd)}


@pytest.fixture(scope="module")
def first_run(arguments, data, tmp_path_factory):
    """A folder in which ``anomalib train`` has run with flags, for ``Cse``, and what was printed.

    ``CseGaussian`` is trained by the README's commands, in test_docs.py.
    """
    folder = tmp_path_factory.mktemp("cli")
    model = ["--model", "Cse", *flags("model", arguments)]
    dataset = ["--data", "MVTec", *flags("data", data)]
    return folder, command_line(folder, "train", *model, *dataset, "--trainer.max_epochs", "2")


def checkpoint(folder):
    return folder / "results" / "Cse" / "MVTec" / "tiny" / "latest" / "weights" / "lightning" / "model.ckpt"


def test_train_writes_metrics_pictures_and_a_checkpoint(first_run):
    folder, printed = first_run
    assert [metric for metric, _ in metrics(printed)] == [
        "image_AUROC",
        "image_F1Score",
        "pixel_AUROC",
        "pixel_F1Score",
    ]
    assert dict(metrics(printed))["image_AUROC"] == "1.0"
    assert checkpoint(folder).is_file()
    assert len(list((folder / "results").rglob("images/square/*.png.jpg"))) == 4


def test_test_predict_and_export_take_the_checkpoint(first_run, arguments, data, tmp_path):
    folder, printed = first_run
    model = ["--model", "Cse", *flags("model", arguments), "--ckpt_path", checkpoint(folder)]
    assert metrics(command_line(tmp_path, "test", *model, "--data", "MVTec", *flags("data", data))) == metrics(printed)
    command_line(tmp_path, "predict", *model, "--data", Path(data["root"]) / "tiny" / "test" / "square")
    assert len(list(tmp_path.rglob("Cse/**/predict/v0/images/**/*.png.jpg"))) >= 4
    command_line(tmp_path, "export", *model, "--export_type", "torch", "--export_root", tmp_path / "exported")
    assert [path.name for path in (tmp_path / "exported").rglob("*.*")] == ["model.pt"]


def test_configuration_file_gives_what_flags_give(first_run, arguments, data, tmp_path):
    _, printed = first_run
    lists = {"layers": [2, 3], "image_size": [64, 64]}
    config = {
        "model": {"class_path": "anomalib_cse.Cse", "init_args": {**arguments, **lists}},
        "data": {"class_path": "MVTec", "init_args": data},
        "trainer": {"max_epochs": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert metrics(command_line(tmp_path, "train", "--config", tmp_path / "config.yaml")) == metrics(printed)


def test_benchmark_makes_one_table(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "1")  # Lightning's; anomalib's benchmark has no argument for it
    backbones = {"Cse": "test_resnet", "CseGaussian": "test_resnet", "Patchcore": "test_resnet", "Padim": "resnet18"}
    arguments = {"layers": ["layer3", "layer4"], "pre_trained": False}
    grid = [{"class_path": name, "init_args": {"backbone": b, **arguments}} for name, b in backbones.items()]
    config = {
        "accelerator": "cpu",
        "benchmark": {"seed": 0, "model": {"grid": grid}, "data": {"class_path": "MVTec", "init_args": data}},
    }
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    command_line(tmp_path, "benchmark", "--config", tmp_path / "benchmark.yaml")
    [results] = (tmp_path / "runs" / "benchmark").rglob("results.csv")
    table = pd.read_csv(results)
    assert table["model.class_path"].tolist() == list(backbones)
    assert table["image_AUROC"].between(0, 1).all()


@pytest.mark.parametrize("file", [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("model/*.yaml")], ids=lambda file: file.stem)
def test_configuration_is_accepted(file, capsys):
    data = [] if "data:" in file.read_text() else ["--data", "MVTec"]
    with pytest.raises(SystemExit) as stopped:
        AnomalibCLI(["train", "--config", str(file), *data, "--print_config"], run=False)
    assert not stopped.value.code
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].split(".")[-1] in MODELS


@pytest.mark.parametrize("file", [*CONFIGS.glob("benchmark/*.yaml")], ids=lambda file: file.stem)
def test_benchmark_configuration_makes_one_table_of_what_models_accept(file):
    rows = list(get_iterator_from_grid_dict(yaml.safe_load(file.read_text())["benchmark"]))
    assert len({frozenset(flatten_dict(row)) for row in rows}) == 1  # anomalib's table needs the same columns
    for row in rows:
        model = getattr(anomalib_models, row["model"]["class_path"])
        inspect.signature(model).bind(**row["model"].get("init_args", {}))
        inspect.signature(getattr(anomalib_data, row["data"]["class_path"])).bind(**row["data"]["init_args"])


@pytest.mark.parametrize("name", MODELS)
def test_every_argument_has_a_help_text(name):
    with pytest.raises(SystemExit), redirect_stdout(StringIO()) as printed:
        AnomalibCLI(["train", f"--model.help={name}"])
    _, helped = printed.getvalue().split("Help for")
    texts = re.findall(r"^  --model\.(\w+).*\n +(\S)", helped, re.MULTILINE)
    assert [argument for argument, start in texts if start == "("] == []
    assert {argument for argument, _ in texts} >= set(inspect.signature(MODELS[name]).parameters)


def test_an_argument_that_is_refused_is_said_at_the_end(tmp_path):
    """Below it jsonargparse says the type and value of what it was given, on a line each."""
    said = "- layers must be distinct numbers in 0..4 or names out of ['blocks.0', "
    model = ["--model", "Cse", *flags("model", COMMON), "--model.layers=[9]"]
    run = anomalib(tmp_path, "fit", *model, "--data", "SurfaceDemo")
    assert run.returncode
    assert said in run.stderr[run.stderr.rindex("ValueError:") :], run.stderr[-2000:]


def test_an_argument_of_a_datamodule_that_is_refused_is_in_the_last_error(tmp_path):
    """Which is what a process ends with, as above."""
    said = "  - category must be one of ('brick', 'grass', 'gravel'), got 'wood'"
    model = ["--model", "CseGaussian", *flags("model", COMMON)]
    with pytest.raises(ValueError, match=re.escape(said)):
        command_line(tmp_path, "fit", *model, "--data", "SurfaceDemo", "--data.category=wood")


DDP = """
import os, torch
from pathlib import Path
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback
from anomalib_cse import Cse, CseGaussian

class Note(Callback):
    sees = ()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 0:
            self.sees += tuple(batch.image_path)

rank = int(os.environ.get("LOCAL_RANK", 0))  # anomalib numbers folders without a lock: each process has its own
torch.manual_seed(rank)  # what both are to agree in, one must tell the other
for name, model, root in (("Cse", Cse, "ten"), ("CseGaussian", CseGaussian, "ten"), ("few", Cse, "two")):
    rate = {{"reject_rate": 0.1}} if name == "CseGaussian" else {{}}
    model, note = model(**{arguments}, **rate), Note()
    engine = Engine(
        max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", callbacks=[note], logger=False,
        default_root_dir=f"ddp{{rank}}", enable_model_summary=False, enable_progress_bar=False,
    )
    engine.fit(model, datamodule=MVTecAD(root=root, category="tiny", num_workers=0, train_batch_size=2))
    trained = {{name: value.detach() for name, value in model.named_parameters()}}
    own = dict(model.post_processor.named_buffers())
    states = {{"deployed": model.model.state_dict(), "trained": trained, "thresholds": own, "sees": note.sees}}
    torch.save(states, f"{{name}}{{rank}}.pt")
"""


@pytest.fixture(scope="module")
def two_processes(mvtec_root, arguments, tmp_path_factory):
    """A folder with what two processes have fitted together, without a seed."""
    folder = tmp_path_factory.mktemp("ddp")
    for name, count in (("ten", 10), ("two", 2)):
        shutil.copytree(mvtec_root, folder / name)
        for file in sorted((folder / name / "tiny" / "train" / "good").iterdir())[count:]:
            file.unlink()
    (folder / "ddp.py").write_text(DDP.format(arguments={**arguments, "seed": None}))
    run = subprocess.run(
        [sys.executable, "ddp.py"], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-20_000:]
    return folder


def fitted_by_two(folder, name):
    """The model of the first process, which must be that of the second, and the images that each has trained with."""
    first, second = (torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("deployed", "trained", "thresholds"):
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items())
    model = (MODELS.get(name) or MODELS["Cse"])(**COMMON).model
    model.load_state_dict(first["deployed"])
    return model, first["sees"], second["sees"]


def training_images(root):
    data = MVTecAD(root=root, category="tiny")
    data.setup()
    return torch.stack([resize(item.image, [64, 64]) for item in data.train_data])


# of 10 images 7 train, in shares of 4 that are filled up; of 2 images 1 trains, fewer than there are processes
@pytest.mark.parametrize(("name", "root", "training"), [("Cse", "ten", 7), ("few", "two", 1)])
def test_two_processes_get_one_cse_whose_centre_is_of_all_images(name, root, training, two_processes):
    model, *shares = fitted_by_two(two_processes, name)
    assert [len(share) for share in shares] == [-(-training // 2)] * 2
    assert len(set(shares[0] + shares[1])) == training
    with torch.no_grad():
        embeddings = model.embed(model.backbone(training_images(two_processes / root)))
    assert torch.allclose(model.centres[0], F.normalize(embeddings.mean(dim=0), dim=0), atol=1e-5)


def test_two_processes_get_one_cse_gaussian_whose_means_are_of_all_images(two_processes):
    model, *shares = fitted_by_two(two_processes, "CseGaussian")
    assert [len(set(share)) for share in shares] == [5, 5]
    assert not set(shares[0]) & set(shares[1])
    features = model.smoothed_features(training_images(two_processes / "ten"))
    thresholds = torch.load(two_processes / "CseGaussian0.pt", weights_only=True)["thresholds"]
    assert thresholds["good_images"][0] == 5  # the first process has scored its own
    assert thresholds["image_max"] == 2 * thresholds["_image_threshold"] > 0
    for gaussian, of_layer in zip(model.maps, features, strict=True):
        assert torch.allclose(gaussian.mean, of_layer.mean(dim=(0, 2, 3)), atol=1e-4)
