"""anomalib's own command line, from configuration to exported model, on a tiny dataset."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from anomalib import data as anomalib_data
from anomalib import models as anomalib_models
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict
from torchvision.transforms.v2.functional import resize

from anomalib_cse import Cse

from tiny import LINEAR, QUIET, TINY, anomalib, command_line, flags

BENCHMARKS = Path(__file__).parents[1] / "configs" / "benchmark"

DDP = """
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback
from anomalib_cse import Cse

class Note(Callback):
    sees = ()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 0:
            self.sees += tuple(getattr(batch, "first", batch).tolist())

if __name__ == "__main__":
    model, note = Cse(**{model}), Note()
    engine = Engine(
        max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", callbacks=[note], logger=False,
        default_root_dir="ddp", enable_model_summary=False,
    )
    engine.fit(model, datamodule=MVTecAD(root={root!r}, category="tiny", num_workers=0))
    state = {{"state": model.model.state_dict(), "best_loss": model.best_loss.item(), "sees": note.sees}}
    torch.save(state, f"rank{{engine.trainer.global_rank}}.pt")
"""


@pytest.fixture(scope="module")
def trained(mvtec_root, tmp_path_factory):
    """A folder in which ``anomalib train`` has run with flags, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    data = {"root": mvtec_root, "category": "tiny", "num_workers": 0}
    output = command_line(
        folder, "train", "--model", "Cse", *flags("model", LINEAR), "--data", "MVTec", *flags("data", data),
        "--trainer.max_epochs", "2", "--seed_everything", "0",
    )  # fmt: skip
    return folder, data, output


def checkpoint(folder):
    return folder / "results" / "Cse" / "MVTec" / "tiny" / "latest" / "weights" / "lightning" / "model.ckpt"


def test_train_writes_metrics_pictures_and_a_checkpoint(trained):
    folder, _, output = trained
    assert "image_AUROC" in output
    assert checkpoint(folder).is_file()
    assert len(list((folder / "results").rglob("images/square/*.png"))) == 4


def test_test_predict_and_export(trained):
    folder, data, trained_output = trained
    model = ["--model", "Cse", *flags("model", LINEAR), "--ckpt_path", checkpoint(folder)]
    output = command_line(folder, "test", *model, "--data", "MVTec", *flags("data", data))
    line = next(line for line in trained_output.splitlines() if "pixel_AUROC" in line)
    assert line in output  # the checkpoint gives the metrics that training ended with
    command_line(folder, "predict", *model, "--data", data["root"] / "tiny" / "test" / "square")
    command_line(folder, "export", *model, "--export_type", "openvino", "--export_root", folder / "exported")
    names = {path.name for path in (folder / "exported").rglob("*") if path.is_file()}
    assert {"model.xml", "model.bin"} <= names


def test_configuration_file_gives_what_the_flags_give(trained):
    folder, data, trained_output = trained
    config = {
        "model": {"class_path": "anomalib_cse.Cse", "init_args": LINEAR},
        "data": {"class_path": "MVTec", "init_args": {**data, "root": str(data["root"])}},
        "trainer": {"max_epochs": 2},
        "default_root_dir": str(folder / "from_config"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    output = command_line(folder, "train", "--config", folder / "config.yaml")
    line = next(line for line in trained_output.splitlines() if "pixel_AUROC" in line)
    assert line in output


# of 10 images 7 train, in shares of 4 and 3; of 2 images 1 trains, fewer than there are processes
@pytest.mark.parametrize(("count", "training", "share"), [(10, 7, 4), (2, 1, 1)], ids=["uneven shares", "one image"])
def test_two_processes_get_one_model(count, training, share, mvtec_root, tmp_path):
    """Lightning's DDP: both have the same best weights and centres, and those are what one process would fit."""
    shutil.copytree(mvtec_root, tmp_path / "data")
    for file in sorted((tmp_path / "data" / "tiny" / "train" / "good").iterdir())[count:]:
        file.unlink()
    script = tmp_path / "ddp.py"
    script.write_text(DDP.format(model=TINY, root=str(tmp_path / "data")))
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=180
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["sees"]) == len(second["sees"]) == share
    assert len(set(first["sees"] + second["sees"])) == training  # the larger share is filled up
    assert first["best_loss"] == second["best_loss"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    model = Cse(**TINY).model
    model.load_state_dict(first["state"])
    images = MVTecAD(root=tmp_path / "data", category="tiny")
    images.setup()
    with torch.no_grad():
        embeddings = model.embed(torch.stack([resize(item.image, [64, 64]) for item in images.train_data]))
    centre = embeddings.mean(dim=(0, 2, 3))
    assert torch.allclose(model.centres[0], centre / centre.norm(), atol=1e-5)


def test_two_processes_get_the_closed_form_of_one(mvtec_root, tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP.format(model=LINEAR, root=str(mvtec_root)))
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=180
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["state"] for rank in range(2))
    model = Cse(**LINEAR)
    data = MVTecAD(root=mvtec_root, category="tiny", num_workers=0)
    Engine(default_root_dir=tmp_path, **QUIET).fit(model, datamodule=data)
    assert all(torch.equal(first[name], second[name]) for name in model.model.state_dict())
    images = torch.rand(4, 3, 64, 64)
    expected = model.model(images).anomaly_map
    model.model.load_state_dict(first)
    assert torch.allclose(model.model(images).anomaly_map, expected, rtol=1e-3)  # they have a thread each


def test_benchmark_makes_one_table(trained):
    folder, data, _ = trained
    backbone = {"backbone": "test_resnet", "layers": ["layer3", "layer4"], "pre_trained": False}
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 0,
            "model": {"class_path": {"grid": ["Cse", "Patchcore"]}, "init_args": backbone},
            "data": {"class_path": "MVTec", "init_args": {**data, "root": str(data["root"])}},
        },
    }
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(config))
    command_line(folder, "benchmark", "--config", folder / "benchmark.yaml")
    [results] = (folder / "runs" / "benchmark").rglob("results.csv")
    table = pd.read_csv(results)
    assert table["model.class_path"].tolist() == ["Cse", "Patchcore"]
    assert table["image_AUROC"].between(0, 1).all()


def test_every_configuration_is_accepted(capsys):
    root = Path(__file__).parents[1] / "configs"
    files = [*sorted(root.glob("*.yaml")), *sorted(root.glob("model/*.yaml"))]
    assert len(files) >= 4
    for file in files:
        data = [] if "data:" in file.read_text() else ["--data", "MVTec"]
        with pytest.raises(SystemExit) as stopped:
            AnomalibCLI(["train", "--config", str(file), *data, "--print_config"], run=False)
        assert not stopped.value.code
        assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"].endswith("Cse")


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_benchmark_makes_one_table_of_what_the_models_accept(file):
    rows = list(get_iterator_from_grid_dict(yaml.safe_load(file.read_text())["benchmark"]))
    assert len({frozenset(flatten_dict(row)) for row in rows}) == 1  # anomalib's table needs the same columns
    for row in rows:
        model = getattr(anomalib_models, row["model"]["class_path"])
        inspect.signature(model).bind(**row["model"].get("init_args", {}))
        inspect.signature(getattr(anomalib_data, row["data"]["class_path"])).bind(**row["data"]["init_args"])


@pytest.mark.parametrize(
    ("model", "category", "last"),
    [
        ({**TINY, "layers": [9]}, "brick", "layers must be distinct numbers in 0..4 or names out of"),
        (TINY, "wood", "category must be one of"),
    ],
)
def test_an_argument_that_is_refused_is_the_last_that_is_said(model, category, last, tmp_path):
    """And not jsonargparse's list of all arguments."""
    data = ["--data", "SurfaceDemo", "--data.category", category]
    run = anomalib(tmp_path, "fit", "--model", "Cse", *flags("model", model), *data)
    assert run.returncode
    assert run.stderr.strip().splitlines()[-1].startswith(f"ValueError: {last}"), run.stderr[-2000:]
