"""The frozen feature extractor (Section 3.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from timm.layers import Conv2dSame, Format
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_flag, check_pixels, plain
from .weights import (
    LOCAL,
    PYPI_BACKBONE,
    PYPI_PACKAGE,
    existing,
    found_in_hub,
    lite0_state_dict,
    load_weights,
    out_of_reach,
    read_weights,
    weights_in,
)

if TYPE_CHECKING:
    from timm.models import FeatureListNet


class FrozenBackbone(nn.Module):
    """Deep features of a pretrained network that never trains (Section 3.2): convolutional, or a transformer's blocks.

    Parameters take no gradient and the module stays in evaluation mode, so that BatchNorm does not move either. Images
    are normalised here, with the mean and deviation of the backbone's own timm configuration. For transformers, and
    networks that came from TensorFlow, they are filled up to multiples of the coarsest layer's stride by their last row
    and column. ``only_size`` is the height and width of the only images that the network takes, mostly ``None``.

    Args:
        name: A timm model name, ``local-dir:FOLDER``, or ``pypi:tf_efficientnet_lite0``.
        layers: Feature levels: timm's ``out_indices``, of a transformer its blocks, or the layers' module names.
        pre_trained: Load pretrained weights; ``False`` asks for random ones.
        weights: A ``.safetensors`` or ``.pth`` file with the backbone's weights, in place of the hub's.

    Raises:
        ValueError: If the backbone, a layer or the combination of arguments does not exist.
        FileNotFoundError, ModuleNotFoundError, ConnectionError: If the weights are not where they are to come from.
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
        architecture = timm_name(name)
        check_sources(name, pre_trained, weights)
        at_hand = weights is not None or name == PYPI_BACKBONE or name.startswith(LOCAL)
        from_hub = pre_trained and not at_hand
        overlay = {"pretrained_cfg_overlay": found_in_hub(architecture)} if from_hub else {}
        described, options = description(architecture)
        self.levels = resolve_layers(described, layers)
        self.net = features_of(architecture, pretrained=from_hub, out_indices=self.levels, **options, **overlay)
        if pre_trained and name == PYPI_BACKBONE:
            load_weights(self.net, lite0_state_dict(), PYPI_PACKAGE)
        elif pre_trained and at_hand:
            file = existing(weights or weights_in(name))
            load_weights(getattr(self.net, "model", self.net), read_weights(file), file)
        truncate(self.net)
        self.fills = fix_padding(self.net) or bool(options)
        self.channels_last = getattr(self.net, "output_fmt", Format.NCHW) == Format.NHWC
        self.net.to(memory_format=torch.channels_last)  # what convolutions on a CPU prefer
        self.architecture: str = self.net.pretrained_cfg["architecture"]  # type: ignore[assignment, index]
        self.strides: list[int] = self.net.feature_info.reduction()
        self.channels: list[int] = self.net.feature_info.channels()
        config = timm.data.resolve_data_config({}, model=self.net)
        fixed = self.net.pretrained_cfg.get("fixed_input_size") and not options  # type: ignore[union-attr, operator]
        self.only_size: tuple[int, int] | None = tuple(config["input_size"][1:]) if fixed else None
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1))
        self.requires_grad_(requires_grad=False)
        self.eval()

    @property
    def stride(self) -> int:
        """The stride of the coarsest layer, in pixels."""
        return max(self.strides)

    @property
    def embeds_positions(self) -> bool:
        """Whether the network adds what it has learnt of every position, for images of one size."""
        return getattr(getattr(self.net, "model", None), "pos_embed", None) is not None

    def fit_to(self, size: tuple[int, int]) -> None:
        """Resample what a transformer knows of positions, once and for all, to images of a height and width.

        It would do so for every image, but what ONNX and OpenVINO resample is not what torch does.
        """
        if self.embeds_positions and self.only_size is None:
            self.net.model.set_input_size(img_size=[multiple_of(self.stride, length) for length in size])  # type: ignore[operator, union-attr]

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stay in evaluation mode, whatever ``mode`` is asked for."""
        del mode
        return super().train(mode=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of ``images`` ``(B, 3, H, W)`` in [0, 1], of each layer ``(B, C, h, w)``.

        Raises:
            ValueError: If that is not what the images are.
        """
        check_pixels(images)
        if self.fills:
            images = filled_up(images, self.stride)
        features = self.net((images - self.mean) / self.std)
        return [f.permute(0, 3, 1, 2) for f in features] if self.channels_last else features


def check_sources(name: str, pre_trained: bool, weights: str | Path | None) -> None:
    """Raise a ``ValueError`` if ``weights`` is no path, or a second source of weights beside another."""
    if weights is None:
        return
    if not (isinstance(weights, str | Path) and str(weights)):
        msg = f"weights must be a .safetensors or .pth file or None, got {weights!r}"
        raise ValueError(msg)
    if not pre_trained:
        msg = f"weights={str(weights)!r} with pre_trained=False: give weights or ask for random ones, not both"
        raise ValueError(msg)
    if name == PYPI_BACKBONE:
        msg = f"weights={str(weights)!r} with backbone={name!r}: two sources of weights, give one"
        raise ValueError(msg)


def multiple_of(stride: int, length: int) -> int:
    """Return the least multiple of a stride that is no less than a length."""
    return (length + stride - 1) // stride * stride


def filled_up(images: Tensor, stride: int) -> Tensor:
    """Repeat the last row and column of images ``(B, C, H, W)`` until the sides are multiples of a stride."""
    for axis in (-2, -1):
        length = images.shape[axis]
        whole = multiple_of(stride, length)
        if not (isinstance(whole, int) and whole == length):  # an exported graph may leave the size open
            # a choice of pixels: what pads them OpenVINO may round, whatever its file says
            images = images.index_select(axis, torch.arange(whole, device=images.device).clamp(max=length - 1))
    return images


class EvenConv2d(nn.Conv2d):
    """A convolution with the padding that TensorFlow chooses for images whose sides are multiples of the stride."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the convolution of ``(B, C, H, W)``."""
        extents = [d * (k - 1) + 1 - s for k, s, d in zip(self.kernel_size, self.stride, self.dilation, strict=True)]
        rows, columns = (max(0, extent) for extent in extents)
        images = F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(images, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def fix_padding(net: nn.Module) -> bool:
    """Have a network that came from TensorFlow pad all images alike; return whether it did not.

    Such a network pads by what is left when its strides divide a side, which makes of an export for images of any size
    a formula of formulas that takes many minutes to write. Images whose sides are multiples of all strides it pads as
    before, so those of other sizes have to be filled up.
    """
    found = {name: module for name, module in net.named_modules() if isinstance(module, Conv2dSame)}
    for name, same in found.items():
        arguments = (same.in_channels, same.out_channels, same.kernel_size, same.stride)
        even = EvenConv2d(*arguments, dilation=same.dilation, groups=same.groups, bias=same.bias is not None)  # type: ignore[arg-type]
        even.weight, even.bias = same.weight, same.bias
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, even)
    return bool(found)


def truncate(net: nn.Module) -> None:
    """Cut off what follows the last layer used of a ``features_only`` network: timm leaves it in EfficientNets."""
    blocks = getattr(net, "blocks", None)
    last: str = net.feature_info.module_name()[-1]  # type: ignore[operator, union-attr]
    if last.startswith("blocks.") and isinstance(blocks, nn.Sequential):
        del blocks[int(last.removeprefix("blocks.")) + 1 :]


def timm_name(name: str) -> str:
    """Return the name under which timm knows a backbone, or raise an error if it, or its folder, does not exist."""
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


def description(architecture: str) -> tuple["FeatureListNet", dict[str, bool]]:
    """Return a network without its weights, and the options by which timm has it take images of any size."""
    options = {"dynamic_img_size": True}
    try:
        return without_weights(architecture, **options), options
    except TypeError:  # all but transformers, and some of these, know no such option
        return without_weights(architecture), {}


def without_weights(architecture: str, **options: bool) -> "FeatureListNet":
    """Create a network to look at what it is made of, if possible without memory for weights."""
    try:
        with torch.device("meta"):
            return features_of(architecture, pretrained=False, **options)
    except NotImplementedError:  # some networks compute their own shape in tensors, which takes a newer torch or timm
        with torch.random.fork_rng(devices=[]):
            return features_of(architecture, pretrained=False, **options)


def resolve_layers(net: "FeatureListNet", layers: Sequence[int] | Sequence[str]) -> list[int]:
    """Return timm's feature levels for layer numbers or module names, from fine to coarse.

    Raises:
        ValueError: If a layer is unknown or repeated, or none is given.
    """
    info = net.feature_info
    names: list[str] = info.module_name(list(range(len(info.info))))  # of a transformer, timm selects the last three
    known: dict[int | str, int] = {
        **{level: level for level in range(len(names))},
        **{n: i for i, n in enumerate(names)},
    }
    layers = plain(layers)
    listed = isinstance(layers, Sequence) and not isinstance(layers, str)
    levels = [known[layer] for layer in layers if type(layer) in (int, str) and layer in known] if listed else []
    if not levels or len(levels) < len(layers) or len(set(levels)) < len(levels):
        given = list(layers) if listed else layers
        msg = f"layers must be distinct numbers in 0..{len(names) - 1} or names out of {names}, got {given!r}"
        raise ValueError(msg)
    return sorted(levels)


def features_of(architecture: str, *, pretrained: bool, **options: Any) -> "FeatureListNet":
    """Create a timm network that returns feature levels; a ``ConnectionError`` says that the hub cannot be reached."""
    try:
        net = timm.create_model(architecture, pretrained=pretrained, features_only=True, **options)
    except OSError as error:  # what huggingface_hub raises for a file that it can neither find nor fetch
        raise out_of_reach(architecture) from error
    return cast("FeatureListNet", net)
