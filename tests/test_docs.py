"""The commands of README.md and docs/: the README's are run as they stand, the others are understood."""

import argparse
import inspect
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from anomalib import data as anomalib_data
from anomalib.cli.cli import AnomalibCLI
from anomalib.engine import Engine
from lightning.pytorch import Trainer

from tiny import DOCS, MODELS, README, ROOT, blocks, command_line, commands, mentioned, metrics

PAGES = [README, *DOCS]
FOLDER = ["--data", "Folder", "--data.name", "NAME", "--data.normal_dir", "good"]
TRAIN = ["train", "--model", "CseGaussian", *FOLDER]  # what options are added to that stand alone
OF_ANOMALIB = re.compile(r"--(model|data|trainer)(\.[a-z_]+)?")


def named(value):
    """A name for a test: a command."""
    return shlex.join(value)


def are_anomalibs(words):
    """Whether words are options of ``anomalib``, each with a value."""
    return len(words) > 1 and all(OF_ANOMALIB.fullmatch(word) for word in words[::2])


def unique(lists):
    """Lists of words, each of them once: pages repeat one another."""
    return [list(words) for words in dict.fromkeys(map(tuple, lists))]


EVERYWHERE = [words for page in PAGES for find in (commands, mentioned) for words in find(page)]
WHOLE = [words for page in DOCS for words in (*commands(page), *mentioned(page))]  # the README's are run, below
ASKED = unique(
    [words[1:] for words in WHOLE if words[0] == "anomalib" and len(words) > 2]  # `anomalib test` is but a name
    + [TRAIN + words for words in EVERYWHERE if are_anomalibs(words)]
)
MADE = [words for words in EVERYWHERE if words[0] == "make"]
MEASURED = unique(words for words in MADE if words[1].startswith("bench-") and len(words) > 2)


class CommandLine(AnomalibCLI):
    """anomalib's command line, which reads arguments and does nothing."""

    def __init__(self):
        self.parser, self.subcommand_parsers, self.subcommand_method_arguments = self.init_parser(), {}, {}
        self.add_subcommands()


@pytest.fixture(scope="module")
def parser():
    return CommandLine().parser


@pytest.mark.parametrize("words", ASKED, ids=named)
def test_command_is_understood_by_anomalib(words, parser, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser.parse_args(words)  # which exits if it does not know one of them
    for name, value in pairwise(words):
        if name == "--config":  # a benchmark's is not looked at
            assert (ROOT / value).is_file()


def test_options_of_anomalib_are_arguments_of_the_models_a_datamodule_or_the_trainer():
    owners = {"model": MODELS.values(), "data": (anomalib_data.MVTec, anomalib_data.Folder), "trainer": (Trainer,)}
    known = {f"--{part}.{name}" for part, of in owners.items() for o in of for name in inspect.signature(o).parameters}
    written = {found.group() for page in PAGES for found in OF_ANOMALIB.finditer(page.read_text()) if found.group(2)}
    assert written
    assert written <= known | {"--model.help"}


def dry_run(*targets):
    """The commands that ``make`` would run."""
    run = ["make", "--dry-run", "--no-print-directory", *targets]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_makefile_has_the_targets_that_pages_name():
    targets = {words[1] for words in MADE}
    assert {"demo", "test"} <= targets
    assert not [line for line in dry_run(*targets) if "Nothing to be done" in line]  # as of those that have no rule


class UnderstoodError(Exception):
    """The arguments were."""


@pytest.mark.parametrize("words", MEASURED, ids=named)
def test_benchmark_understands_its_arguments(words, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    from contenders import chosen

    parse = argparse.ArgumentParser.parse_args

    def parsed(parser, given=None):
        options = parse(parser, given)  # which exits if it does not know one of them
        if hasattr(options, "config") and options.config.is_file():  # "LIST" stands for one of the reader's own
            models = [options.model] if hasattr(options, "model") else options.models
            chosen(parser, options.config, models)  # exits if the list has no such model
        raise UnderstoodError

    _, script, *arguments = shlex.split(dry_run(*words[1:])[-1])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    with pytest.raises(UnderstoodError):
        runpy.run_path(str(ROOT / script), run_name="__main__")


FOLDERS = {  # of the README: which folders of the tiny dataset stand for them
    "parts/good": "train/good",
    "parts/good_of_another_day": "test/good",
    "parts/scratch": "test/square",
    "parts/hole": "test/square",
    "path/to/images": "test/*",
}


@pytest.fixture(scope="module")
def readme(mvtec_root, tmp_path_factory):
    """A folder in which the README's commands have run on tiny images, and what each has printed."""
    folder, printed = tmp_path_factory.mktemp("readme"), {}
    for name, images in FOLDERS.items():
        (folder / name).mkdir(parents=True)
        for file in (mvtec_root / "tiny").glob(f"{images}/*.png"):
            shutil.copy(file, folder / name / f"{Path(name).name}_{file.parent.name}_{file.name}")
    (folder / "examples").symlink_to(ROOT / "examples")
    for program, *arguments in commands(README):
        if program == "anomalib":
            printed[arguments[0]] = command_line(folder, *arguments)
        elif program == "python":
            run = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=True)
            printed[arguments[0]] = run.stdout
    return folder, printed


def test_readme_trains_and_tests(readme):
    folder, printed = readme
    run = folder / "results" / "CseGaussian" / "parts" / "latest"
    assert [metric for metric, _ in metrics(printed["train"])] == ["image_AUROC", "image_F1Score"]
    assert dict(metrics(printed["train"]))["image_AUROC"] == "1.0"
    assert metrics(printed["test"]) == metrics(printed["train"])
    assert (run / "weights" / "lightning" / "model.ckpt").is_file()
    assert (run / "report.html").is_file()
    tested = {file.name for file in folder.glob("parts/*/*") if file.parent.name != "good"}
    own = folder / "results" / "CseGaussian" / "parts" / "test" / "v0"
    assert {path.name for path in own.iterdir()} == {"config.yaml", "images", "report.html", "scores.csv"}
    for place in (run, own):
        assert {file.name.removesuffix(".jpg") for file in (place / "images").rglob("*.jpg")} == tested


def test_readme_predicts_exports_and_runs_the_camera_loop(readme):
    folder, printed = readme
    images = {path.name for path in (folder / "path" / "to" / "images").iterdir()}
    pictures = folder / "results" / "CseGaussian" / "predict" / "v0" / "images"
    assert {path.name.removesuffix(".jpg") for path in pictures.rglob("*.jpg")} == images
    assert {path.name for path in (folder / "exported").rglob("*.*")} == {"model.bin", "model.xml"}
    assert {path.name for path in (folder / "rejects").iterdir()} == {name for name in images if "square" in name}
    assert printed["examples/camera_loop.py"].endswith("; 4 rejected\n")


def test_readme_in_python(readme, monkeypatch):
    folder, _ = readme
    exports, signature = [], inspect.signature(Engine.export)  # which takes ten seconds, and has been run above
    monkeypatch.setattr(Engine, "export", lambda *a, **options: exports.append(signature.bind(*a, **options).arguments))
    monkeypatch.chdir(folder)
    [code] = blocks(README, "python")
    with redirect_stdout(StringIO()) as printed:
        exec(code, {})
    said = re.findall(r"^(\S+\.png) ([\d.]+) (True|False)$", printed.getvalue(), re.MULTILINE)
    assert [file for file, *_ in said] == [str(path) for path in sorted((folder / "path" / "to" / "images").iterdir())]
    assert {("square" in Path(file).name, label) for file, _, label in said} == {(True, "True"), (False, "False")}
    assert [(export["export_type"], export["model"].model.is_fitted) for export in exports] == [("openvino", True)]
