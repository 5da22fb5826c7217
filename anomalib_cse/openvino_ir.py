"""Telling OpenVINO, in the exported file itself, what it must not round, and NNCF what it must not quantise."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from anomalib.data import AnomalibDataModule

from .reading import with_named_files

if TYPE_CHECKING:  # optional packages
    from nncf import IgnoredScope
    from openvino import Model

CONSTANT = {"Parameter", "Const", "Result"}
CONVOLUTIONS = {"Convolution", "GroupConvolution"}


def keep_single_precision(path: Path, *, only_before_convolution: bool = False) -> None:
    """Mark the operations of an OpenVINO model as to be computed in single precision, whatever the runtime prefers.

    By default OpenVINO rounds to bfloat16 on processors that have it, so one file would give different scores on
    different machines. Its Python interface has no way to say so of single operations, but the file format has:
    ``precise``, which OpenVINO 2024 to 2026 obey.

    Args:
        path: The model's ``.xml`` file, whose layers stand in the order of computation.
        only_before_convolution: Mark only what comes before the first convolution, which is the pre-processing.
    """
    tree = ElementTree.parse(path)
    for layer in tree.getroot().iterfind("layers/layer"):
        if only_before_convolution and layer.get("type") in CONVOLUTIONS:
            break
        if layer.get("type") in CONSTANT:
            continue
        info = layer.find("rt_info")
        if info is None:
            info = ElementTree.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, info)
        ElementTree.SubElement(info, "attribute", name="precise", version="0")
    tree.write(path, xml_declaration=True, encoding="utf-8")


def left_alone(operations: Sequence[str] = ()) -> "IgnoredScope":
    """What NNCF is not to round: matrix products, which resize images or lead to distances, and what is named."""
    import nncf

    return nncf.IgnoredScope(types=["MatMul"], names=list(operations), validate=False)


def compress_weights(model: "Model") -> "Model":
    """NNCF's 8-bit weights for all but matrix products, so that linear layers of a backbone stay as they are too."""
    import nncf

    return nncf.compress_weights(model, ignored_scope=left_alone())


def after_convolutions(model: "Model") -> list[str]:
    """The operations that no convolution depends on: distances and what is made of them."""
    operations = model.get_ordered_ops()
    needed = {op.get_friendly_name() for op in operations if op.get_type_name() in CONVOLUTIONS}
    for op in reversed(operations):
        if op.get_friendly_name() in needed:
            needed |= {value.get_node().get_friendly_name() for value in op.input_values()}
    return [op.get_friendly_name() for op in operations if op.get_friendly_name() not in needed]


def quantize(model: "Model", datamodule: AnomalibDataModule) -> "Model":
    """NNCF's post-training quantisation of all but the resizing and the distances.

    Squares of distances have a range that 8 bits do not: clean ones would become 0.

    Args:
        model: What is to be quantised.
        datamodule: Its validation images are those that the ranges are taken from.
    """
    import nncf

    datamodule.setup("fit")
    images = nncf.Dataset(with_named_files(datamodule.val_dataloader()), lambda batch: batch.image.numpy())
    return nncf.quantize(model, images, ignored_scope=left_alone(after_convolutions(model)))
