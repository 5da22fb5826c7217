"""What most tests run: small models without a word, anomalib's command line, and the commands that the docs name."""

import ctypes
import os
import re
import shlex
import string
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

from anomalib.cli.cli import AnomalibCLI
from anomalib.data import MVTecAD

from anomalib_cse import Cse, CseGaussian

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
ANOMALIB = Path(sys.executable).with_name("anomalib")
COMMON = {
    "backbone": "test_efficientnet",
    "layers": (2, 3),
    "pre_trained": False,
    "image_size": (64, 64),
    "seed": 0,
    "report": False,  # a page has 5 MB; test_report.py asks for it
}
MODELS = {"Cse": Cse, "CseGaussian": CseGaussian}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def signal_stack():
    """What signal handlers run on, as ``sigaltstack`` gives and takes it."""
    stack = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).sigaltstack(None, stack)
    return stack


def data_of(root, **options):
    """The tiny dataset, read without workers unless they are asked for."""
    return MVTecAD(root=root, category="tiny", **{"num_workers": 0, **options})


def flags(prefix, values):
    """Arguments as the command line has them."""

    def written(value):
        return list(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value

    return [f"--{prefix}.{name}={written(value)}" for name, value in values.items()]


def anomalib(folder, *arguments):
    """Run anomalib's command line in a folder."""
    return subprocess.run(
        [ANOMALIB, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "500"},
    )


def command_line(folder, *arguments):
    """What ``anomalib`` prints when it is run in a folder; in this process, as each start takes seconds."""
    with chdir(folder), redirect_stdout(StringIO()) as printed:
        AnomalibCLI([str(argument) for argument in arguments])
    return printed.getvalue()


def metrics(printed):
    """Names and values of the metrics that ``anomalib`` prints."""
    return re.findall(r"(\w+_(?:AUROC|F1Score)) +│ +([\d.]+)", printed)


def blocks(page, language):
    """The code that a page has in a language, one text for each block."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """The commands of a page's shell blocks, each a list of words, with the values of what was set before them."""
    values = {}
    for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(string.Template(line).safe_substitute(values), comments=True)
        name, is_set, value = (words or [""])[0].partition("=")
        if is_set and name.isupper():
            values[name] = value
        elif words:
            yield words


def mentioned(page):
    """The commands and options within a page's text, each a list of words."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from map(shlex.split, re.findall(r"`((?:make|anomalib|--\w)[^`]*)`", text))
