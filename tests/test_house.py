"""Rooms and doors of the package: what each folder may know, and the names it shows."""

import ast
import sys
from importlib import import_module
from pathlib import Path

import pytest

import anomalib_cse

HOUSE = Path(anomalib_cse.__file__).parent
MODELS = {"features", "synthesis", "deployment", "checks", "image_files"}
MAY_KNOW = {
    "cse": MODELS,
    "cse_gaussian": {*MODELS, "preflight"},
    "deployment": {"preflight", "features", "report", "checks", "plugin"},
    "preflight": {"checks", "image_files", "plugin"},
    "features": {"checks"},
    "synthesis": {"checks", "image_files"},
    "data": {"preflight", "checks"},
    "report": {"preflight", "checks"},
    "learn": {"cse_gaussian", "deployment"},
}
LIBRARIES = {"torch", "torchvision", "timm", "huggingface_hub", "kornia", "PIL", "numpy", *sys.stdlib_module_names}


def imports(file):
    """Every import of a file, also within functions: dots, module, and the names taken out of it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def all_imports(room):
    return [found for file in (HOUSE / room).rglob("*.py") for found in imports(file)]


def test_every_folder_is_a_room():
    assert {path.parent.name for path in HOUSE.glob("*/*.py")} == set(MAY_KNOW)
    assert {path.stem for path in HOUSE.glob("*.py")} == {"__init__", "plugin", "checks", "image_files"}


@pytest.mark.parametrize("room", MAY_KNOW)
def test_room_knows_only_the_rooms_below_it_and_enters_by_the_door(room):
    for level, module, names in all_imports(room):
        if level == 1:  # its own files
            assert (HOUSE / room / f"{module}.py").is_file(), f"from .{module}"
        elif level:
            assert level == 2
            assert module in MAY_KNOW[room], f"{room} imports {module}"
            door = import_module(f"anomalib_cse.{module}")
            assert set(names) <= set(getattr(door, "__all__", dir(door))), f"{room} imports {names} of {module}"
        else:
            assert module.split(".")[0] != "anomalib_cse", "imports within the package are relative"


@pytest.mark.parametrize("room", ["features", "synthesis"])
def test_room_needs_neither_anomalib_nor_lightning(room):
    known = {module.split(".")[0] for level, module, _ in all_imports(room) if not level}
    checks = {module.split(".")[0] for level, module, _ in imports(HOUSE / "checks.py") if not level}
    assert known | checks <= LIBRARIES


def test_plugin_imports_nothing_at_the_start_of_an_interpreter():
    body = ast.parse((HOUSE / "plugin.py").read_text()).body
    imported = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    assert imported == ["sys"]
    assert not any(isinstance(node, ast.ImportFrom) for node in body)


def test_public_names():
    assert anomalib_cse.__all__ == ["AnomalySynthesis", "Cse", "CseGaussian", "CseGaussianModel", "CseModel"]
    assert dir(anomalib_cse) == anomalib_cse.__all__
    assert [getattr(anomalib_cse, name).__name__ for name in anomalib_cse.__all__] == anomalib_cse.__all__
    with pytest.raises(AttributeError, match="no attribute 'Csee'"):
        anomalib_cse.Csee  # noqa: B018
