"""anomalib's own command line, from configuration to exported model, on a tiny dataset."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

ANOMALIB = Path(sys.executable).with_name("anomalib")
MODEL = {
    "backbone": "test_efficientnet",
    "layers": [2, 3],
    "pre_trained": False,
    "image_size": [64, 64],
    "batch_size": 4,
    "seed": 0,
}


def flags(prefix, values):
    return [
        f"--{prefix}.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()
    ]


def anomalib(folder, *arguments):
    run = subprocess.run(
        [ANOMALIB, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def trained(mvtec_root, tmp_path_factory):
    """A folder in which ``anomalib train`` has run with flags, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    data = {"root": mvtec_root, "category": "tiny", "num_workers": 0}
    output = anomalib(
        folder, "train", "--model", "Cse", *flags("model", MODEL), "--data", "MVTec", *flags("data", data),
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
    model = ["--model", "Cse", *flags("model", MODEL), "--ckpt_path", checkpoint(folder)]
    output = anomalib(folder, "test", *model, "--data", "MVTec", *flags("data", data))
    line = next(line for line in trained_output.splitlines() if "pixel_AUROC" in line)
    assert line in output  # the checkpoint gives the metrics that training ended with
    anomalib(folder, "validate", *model, "--data", "MVTec", *flags("data", data))
    anomalib(folder, "predict", *model, "--data", data["root"] / "tiny" / "test" / "square")
    for kind in ("torch", "onnx", "openvino"):
        anomalib(folder, "export", *model, "--export_type", kind, "--export_root", folder / "exported")
    names = {path.name for path in (folder / "exported").rglob("*") if path.is_file()}
    assert {"model.pt", "model.onnx", "model.xml", "model.bin"} <= names


def test_configuration_file_gives_what_the_flags_give(trained):
    folder, data, trained_output = trained
    config = {
        "model": {"class_path": "anomalib_cse.Cse", "init_args": MODEL},
        "data": {"class_path": "MVTec", "init_args": {**data, "root": str(data["root"])}},
        "trainer": {"max_epochs": 2},
        "default_root_dir": str(folder / "from_config"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    output = anomalib(folder, "train", "--config", folder / "config.yaml")
    line = next(line for line in trained_output.splitlines() if "pixel_AUROC" in line)
    assert line in output


def test_benchmark_makes_one_table(trained):
    folder, data, _ = trained
    backbone = {"backbone": "resnet18", "layers": ["layer2", "layer3"], "pre_trained": False}
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 0,
            "model": {"class_path": {"grid": ["Cse", "Padim"]}, "init_args": backbone},
            "data": {"class_path": "MVTec", "init_args": {**data, "root": str(data["root"])}},
        },
    }
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(config))
    anomalib(folder, "benchmark", "--config", folder / "benchmark.yaml")
    [results] = (folder / "runs" / "benchmark").rglob("results.csv")
    table = pd.read_csv(results)
    assert table["model.class_path"].tolist() == ["Cse", "Padim"]
    assert table["image_AUROC"].between(0, 1).all()


def test_every_configuration_is_accepted(tmp_path):
    configs = Path(__file__).parents[1] / "configs"
    files = sorted(configs.glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        data = [] if "data:" in file.read_text() else ["--data", "MVTec"]
        printed = anomalib(tmp_path, "train", "--config", file, *data, "--print_config")
        assert yaml.safe_load(printed)["model"]["class_path"].endswith("Cse")
