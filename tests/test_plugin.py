"""Registration, in interpreters of its own: it must work without any import by the user."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

TINY = "backbone='test_efficientnet', layers=(2, 3), pre_trained=False"
NAMES = "print(m.Cse.__name__, m.CseGaussian.__name__, d.MVTec.__name__, d.SurfaceDemo.__name__)"
THEN = f"import anomalib.models as m, anomalib.data as d\n{NAMES}"
ALL = "Cse CseGaussian MVTec SurfaceDemo"
ROOMS = ("cse", "cse_gaussian", "data", "deployment", "features", "preflight", "report", "synthesis")
RECORD = "import warnings\nwith warnings.catch_warnings(record=True) as caught:\n"
SUBCLASSES = f"""
from anomalib.models import list_models
print([w for w in caught if "cannot be registered" in str(w.message)], {{"cse", "cse_gaussian"}} <= set(list_models()))
{THEN}
"""
KNOWN = f"""
from anomalib.models import get_model, list_models
from anomalib.data import get_datamodule
print({{"cse", "cse_gaussian"}} <= set(list_models()))
for name, known_as in (("Cse", "cse"), ("CseGaussian", "cse_gaussian")):
    print(type(get_model(known_as, {TINY})).__module__)
    print(type(get_model({{"class_path": name, "init_args": dict({TINY})}})).__name__)
    print(type(get_model({{"class_path": f"anomalib.models.{{name}}"}}, {TINY})).__name__)
data = get_datamodule({{"class_path": "MVTec", "init_args": {{"category": "grid"}}}})
print(data.category, data.train_batch_size, get_datamodule({{"class_path": "SurfaceDemo"}}).train_batch_size)
"""
OLDER = """
import importlib.metadata, warnings
version = importlib.metadata.version
importlib.metadata.version = lambda name: "2.6.2" if name == "anomalib" else version(name)
import anomalib_cse
try:
    anomalib_cse.Cse
except ImportError as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    from anomalib.models import list_models
print("cse" in list_models(), any("found 2.6.2" in str(warning.message) for warning in caught))
"""
OTHER = """
import sys, tempfile, warnings
from pathlib import Path
models = Path(tempfile.mkdtemp()) / "anomalib" / "models"
models.mkdir(parents=True)
(models.parent / "__init__.py").touch()
(models / "__init__.py").write_text({!r})
sys.path.insert(0, str(models.parents[1]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        import anomalib.models
        print(anomalib.models.AnomalibModule.__name__, "cannot be registered" in str(caught[-1].message))
    except RuntimeError as error:
        print(error)
"""
BETA = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "3.0b1" if name == "anomalib" else version(name)
import anomalib.models as m
print(m.Cse.__name__)
"""
LAZY = """
class AnomalibModule: pass
def __getattr__(name):
    if name == "Lazy":
        return "kept"
    raise AttributeError(name)
"""
ABSENT = "import sys; sys.modules['anomalib'] = None\ntry: import anomalib.models\nexcept ImportError: print('absent')"

PROGRAMS = {  # what each is, its code, what it prints
    "models and data are known": (
        KNOWN,
        "True anomalib_cse.cse.lightning_model Cse Cse anomalib_cse.cse_gaussian.lightning_model CseGaussian "
        "CseGaussian grid 8 8",
    ),
    "after our models": (f"from anomalib_cse import Cse, CseGaussianModel\n{THEN}", ALL),
    "after our data": (f"from anomalib_cse.data import SurfaceDemo\n{THEN}", ALL),
    **{
        f"after our {room}": (f"{RECORD}    import anomalib_cse.{room}\n{SUBCLASSES}", f"[] True {ALL}")
        for room in ROOMS
    },
    "after anomalib's data": (f"import anomalib.data\n{THEN}", ALL),
    "after the engine": (f"from anomalib.engine import Engine\n{THEN}", ALL),
    "older anomalib refused by number": (
        OLDER,
        "anomalib-cse needs anomalib 2.7 or newer, found 2.6.2: pip install -U anomalib False True",
    ),
    "a version that is no number": (BETA, "Cse"),
    "what anomalib imports on demand": (OTHER.format(LAZY) + "print(anomalib.models.Lazy)", "AnomalibModule True kept"),
    "absent anomalib": (ABSENT, "absent"),
    "anomalib unlike ours left alone": (OTHER.format("class AnomalibModule: pass"), "AnomalibModule True"),
    "broken anomalib in its own words": (OTHER.format("raise RuntimeError('broken')"), "broken"),
}
TURNED_OFF = {  # by an environment variable
    "nothing": (
        "import sys, anomalib.models as m; print(hasattr(m, 'Cse'), 'anomalib_cse' in sys.modules)",
        "False False",
    ),
    "by hand": (f"import anomalib_cse.plugin as p; p.install()\n{THEN}", ALL),
    "by hand afterwards": (f"{THEN.splitlines()[0]}, anomalib_cse.plugin as p; p.install()\n{NAMES}", ALL),
}
FORKS = """
import os, sys
import cv2, jsonargparse, kornia, lightning.pytorch, matplotlib.pyplot, pandas, skimage.morphology, sklearn.cluster
import sklearn.metrics, timm, torch, torchmetrics, torchvision
for code in sys.argv[1:]:
    print("----", flush=True)
    if not (child := os.fork()):
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)  # tearing all that down would take as long as importing it
    os.waitpid(child, 0)
"""


def python(code, *arguments, **environment):
    command = [sys.executable, "-W", "ignore::FutureWarning", "-c", code, *arguments]
    run = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, cwd="/"
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def printed():
    """What each program prints, in a fork of an interpreter that has imported what is slow to and not anomalib."""
    outputs = []
    for programs, setting in ((PROGRAMS, "1"), (TURNED_OFF, "0")):
        codes = (code for code, _ in programs.values())
        outputs += python(FORKS, *codes, ANOMALIB_CSE_AUTOLOAD=setting).split("----\n")[1:]
    return dict(zip((*PROGRAMS, *TURNED_OFF), outputs, strict=True))


@pytest.mark.linux
@pytest.mark.parametrize(("name", "expected"), [(name, said) for name, (_, said) in (PROGRAMS | TURNED_OFF).items()])
def test_registration(name, expected, printed):
    assert printed[name].split() == expected.split()


def test_the_hook_is_installed_with_the_package():
    assert (Path(sysconfig.get_paths()["purelib"]) / "anomalib_cse.pth").is_file()


def test_starting_up_imports_nothing_heavy():
    modules = "import sys; print(*sorted(sys.modules))"
    before, after = (set(python(modules, ANOMALIB_CSE_AUTOLOAD=value).split()) for value in "01")
    assert after - before == {"anomalib_cse", "anomalib_cse.plugin"}
