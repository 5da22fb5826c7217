"""Registration, in interpreters of its own: it must work without any import by the user."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TINY = "backbone='test_efficientnet', layers=(2, 3), pre_trained=False"


def python(code, *options, **environment):
    run = subprocess.run(
        [sys.executable, *options, "-W", "ignore::FutureWarning", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()


def pythons(*codes, **environment):
    """Two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda code: python(code, **environment), codes))


def test_the_hook_is_installed_with_the_package():
    assert (Path(sysconfig.get_paths()["purelib"]) / "anomalib_cse.pth").is_file()


def test_anomalib_knows_the_model_without_an_import():
    code = f"""
from anomalib.models import get_model, list_models
import anomalib.data, anomalib.models
print("cse" in list_models())
print(type(get_model("cse", {TINY})).__module__)
print(type(get_model({{"class_path": "Cse", "init_args": dict({TINY})}})).__name__)
print(type(get_model({{"class_path": "anomalib.models.Cse"}}, {TINY})).__name__)
print(issubclass(anomalib.data.MVTec, anomalib.data.MVTecAD))
print(anomalib.data.get_datamodule({{"class_path": "MVTec", "init_args": {{"category": "grid"}}}}).category)
"""
    assert python(code) == ["True", "anomalib_cse.lightning_model", "Cse", "Cse", "True", "grid"]


def test_any_order_of_imports():
    first = [
        "import anomalib_cse; anomalib_cse.Cse",
        "from anomalib_cse.lightning_model import Cse",
        "from anomalib_cse.demo import SurfaceDemo",
        "import anomalib.data",
        "from anomalib.engine import Engine",
    ]
    then = "import anomalib.models as m, anomalib.data as d\nprint(m.Cse.__name__, d.MVTec.__name__)"
    assert pythons(*(f"{line}\n{then}" for line in first)) == [["Cse MVTec"]] * len(first)


def test_starting_up_imports_nothing_heavy():
    before = set(python("import sys; print(*sorted(sys.modules), sep='\\n')", ANOMALIB_CSE_AUTOLOAD="0"))
    after = set(python("import sys; print(*sorted(sys.modules), sep='\\n')"))
    assert after - before == {"anomalib_cse", "anomalib_cse.plugin"}


def test_an_environment_variable_turns_it_off():
    printed = pythons(
        "import sys, anomalib.models as m; print(hasattr(m, 'Cse'), 'anomalib_cse' in sys.modules)",
        "import anomalib_cse.plugin as p; p.install(); import anomalib.models as m; print(m.Cse.__name__)",
        "import anomalib.models as m; import anomalib_cse.plugin as p; p.install(); print(m.Cse.__name__)",
        ANOMALIB_CSE_AUTOLOAD="0",
    )
    assert printed == [["False False"], ["Cse"], ["Cse"]]


def test_other_programs_survive_a_broken_or_absent_anomalib(tmp_path):
    absent = (
        "import sys; sys.modules['anomalib'] = None\ntry:\n import anomalib.models\nexcept ImportError: print('absent')"
    )
    assert python(absent) == ["absent"]
    broken = tmp_path / "anomalib" / "models"
    broken.mkdir(parents=True)
    (tmp_path / "anomalib" / "__init__.py").touch()
    (broken / "__init__.py").write_text("class AnomalibModule: pass\n")
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import anomalib.models
print(anomalib.models.AnomalibModule.__name__, "cannot be registered" in str(caught[-1].message))
"""
    assert python(code, PYTHONPATH=str(tmp_path)) == ["AnomalibModule True"]
    (broken / "__init__.py").write_text("raise RuntimeError('broken')\n")
    code = "try:\n import anomalib.models\nexcept RuntimeError as e: print(e)"
    assert python(code, PYTHONPATH=str(tmp_path)) == ["broken"]


def test_public_names():
    import anomalib_cse

    assert anomalib_cse.__all__ == ["AnomalySynthesis", "Cse", "CseModel"]
    assert dir(anomalib_cse) == anomalib_cse.__all__
    assert [getattr(anomalib_cse, name).__name__ for name in anomalib_cse.__all__] == anomalib_cse.__all__
    with pytest.raises(AttributeError, match="no attribute 'Csee'"):
        anomalib_cse.Csee  # noqa: B018


def test_an_older_anomalib_is_refused_by_number():
    code = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "2.6.2" if name == "anomalib" else version(name)
import anomalib_cse
try:
    anomalib_cse.Cse
except ImportError as error:
    print(error)
import warnings
with warnings.catch_warnings(record=True) as caught:
    from anomalib.models import list_models
print("cse" in list_models(), any("found 2.6.2" in str(warning.message) for warning in caught))
"""
    message, registered = python(code)
    assert message == "anomalib-cse needs anomalib 2.7 or newer, found 2.6.2: pip install -U anomalib"
    assert registered == "False True"


def test_arrows_point_one_way():
    import ast

    import anomalib_cse

    def imported(module):
        source = Path(anomalib_cse.__file__).with_name(f"{module}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split(".")[0] if node.level == 0 else f".{node.module}"

    library = {"torch", "torchvision", "PIL", ".perlin", ".colour", ".checks"}
    for module in ("loss", "synthesis", "perlin", "colour", "textures", "resize", "checks", "gaussian"):
        assert {m for m in imported(module) if m not in sys.stdlib_module_names} <= library
    assert set(imported("plugin")) <= {"sys", "importlib", "warnings", "lightning"}  # all but sys inside functions
    assert {m for m in imported("torch_model") if m.startswith(".")} == {".backbone", ".checks", ".resize"}
    models = {".gaussian", ".gaussian_model", ".torch_model", ".backbone", ".checks", ".resize"}
    assert {m for m in (*imported("gaussian_model"), *imported("gaussian_fit")) if m.startswith(".")} <= models
    for module in ("torch_model", "gaussian_model", "gaussian_fit", "backbone"):
        assert "lightning" not in imported(module)
    for module in ("torch_model", "gaussian_model", "backbone"):
        assert "sklearn" not in imported(module)
    for file in Path(anomalib_cse.__file__).parent.glob("*.py"):
        assert file.stem == "__init__" or ".lightning_model" not in imported(file.stem)


def test_seed_everything_seeds_the_command_line():
    code = """
import torch
from anomalib.cli.cli import AnomalibCLI
flags = ["--model.backbone=test_efficientnet", "--model.layers=[2,3]", "--model.pre_trained=false"]
flags += ["--model.embedder=network"]
for seed in ("7", "7", "8"):
    arguments = ["fit", "--model", "Cse", *flags, "--data", "MVTec", "--seed_everything", seed]
    cli = AnomalibCLI(arguments, run=False)
    print(cli.model.effective_seed, cli.model.embedder[0][0].weight.sum().item())
"""
    first, again, other = python(code)[-3:]
    assert first == again
    assert first.split()[0] == "7"
    assert other.split()[0] == "8"
    assert first.split()[1] != other.split()[1]
