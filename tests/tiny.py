"""What most tests run: small models without a word, from Python and through anomalib's command line."""

import os
import subprocess
import sys
from pathlib import Path

from anomalib.data import MVTecAD

from anomalib_cse import Cse, CseGaussian

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
    """What anomalib's command line prints, which must succeed."""
    run = anomalib(folder, *arguments)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout
