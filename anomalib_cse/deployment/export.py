"""Telling OpenVINO, in the exported file itself, what it must not round, and NNCF what it must not quantise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ..features import resize
from ..preflight import datasets_of, loader_findings, settle

if TYPE_CHECKING:  # optional packages
    from nncf import IgnoredScope
    from openvino import Model

EXAMPLE = 320, 448  # pixels in height and width of what is traced: no side, nor that of a feature map, is special
CONSTANT = {"Parameter", "Const"}
CONVOLUTIONS = {"Convolution", "GroupConvolution"}


def export_any_size(model: nn.Module, path: Path, **options: Any) -> Path:
    """Export a model that takes images ``(B, 3, H, W)`` of any size to ONNX, with options of ``torch.onnx.export``.

    anomalib's own export traces images of 2x2 pixels, whose features have one position: what it then writes holds for
    these alone.

    Raises:
        ValueError: If ``dynamo`` is off, without which no size can be left open, or sizes are described otherwise.
    """
    fixed = [name for name in ("dynamic_axes", "dynamic_shapes") if options.get(name) is not None]
    if not options.pop("dynamo", True) or fixed:
        what = fixed[0] if fixed else "dynamo=False"
        msg = f"a model of images of any size takes no {what}: leave it out of onnx_kwargs"
        raise ValueError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = torch.zeros(2, 3, *EXAMPLE, device=next(model.parameters()).device)
    found = model.eval()(images)._asdict()
    size = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)  # a named one is to be proven free for all sizes, even 1
    names = {"input_names": ["input"], "output_names": [name for name, value in found.items() if value is not None]}
    shapes = {"dynamic_shapes": (size,), "dynamic_axes": None}
    torch.onnx.export(model, (images,), path, **{**names, **options, **shapes, "dynamo": True})
    return path


def check_compression(
    kind: CompressionType | None, datamodule: AnomalibDataModule | None, model: LightningModule
) -> None:
    """Raise a ``ValueError`` if a compression cannot be had, or lacks the images that it takes ranges from.

    Those are prepared and read here, before anything is written.
    """
    if kind not in (None, CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ):
        msg = (
            "compression_type: take FP16, INT8 or INT8_PTQ (INT8_ACQ would quantise the resizing of images), "
            f"got {kind}"
        )
        raise ValueError(msg)
    if kind != CompressionType.INT8_PTQ:
        return
    if datamodule is None:
        msg = "compression_type INT8_PTQ takes ranges from images: give a datamodule (--data on the command line)"
        raise ValueError(msg)
    datamodule.prepare_data()
    datamodule.setup("fit")
    if not datasets_of(datamodule)["val"]:
        msg = f"compression_type INT8_PTQ takes ranges from validation images, of which {datamodule.name} has none"
        raise ValueError(msg)
    settle(loader_findings(datamodule.val_dataloader(), any_size=model.image_size is None, whole="validation"))


def keep_single_precision(path: Path, *, only_before_convolution: bool = False) -> None:
    """Mark operations of an OpenVINO ``.xml`` file as to be computed in single precision, whatever the runtime prefers.

    By default OpenVINO rounds to bfloat16 on processors that have it, so one file would give different scores on
    different machines. Its Python interface has no way to say so of single operations, but the file format has:
    ``precise``, which OpenVINO 2024 to 2026 obey. ``only_before_convolution`` marks the pre-processing alone.
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


def note_good_scores(path: Path, numbers: Mapping[str, float]) -> None:
    """Write how scores of good images spread into an OpenVINO ``.xml`` file, as its ``rt_info``, if that is known."""
    if not numbers:
        return
    tree = ElementTree.parse(path)
    info = tree.getroot().find("rt_info")
    info = ElementTree.SubElement(tree.getroot(), "rt_info") if info is None else info
    noted = ElementTree.SubElement(info, "good_scores")
    for name, value in numbers.items():
        ElementTree.SubElement(noted, name, value=repr(value))
    tree.write(path, xml_declaration=True, encoding="utf-8")


def compress(
    path: Path,
    kind: CompressionType,
    datamodule: AnomalibDataModule | None,
    input_size: tuple[int, int] | None = None,
) -> None:
    """Compress an OpenVINO ``.xml`` file to 8 bits, in place, but for the pre-processing.

    ``INT8`` takes weights alone; ``INT8_PTQ`` activations too, whose ranges are those of the datamodule's validation
    images, resized to ``input_size`` if the file takes no other.
    """
    import nncf
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file is to be overwritten
    model = core.read_model(path)
    if kind == CompressionType.INT8:
        model = nncf.compress_weights(model, ignored_scope=left_alone())
    elif datamodule is not None:
        model = quantize(model, datamodule, input_size)
    openvino.save_model(model, path, compress_to_fp16=False)


def left_alone(operations: Sequence[str] = ()) -> "IgnoredScope":
    """Return what NNCF is not to round: ``operations``, and matrix products, which resize or lead to distances."""
    import nncf

    return nncf.IgnoredScope(types=["MatMul"], names=list(operations), validate=False)


def after_convolutions(model: "Model") -> list[str]:
    """Return the names of operations that no convolution depends on: distances and what is made of them."""
    operations = model.get_ordered_ops()
    needed = {op.get_friendly_name() for op in operations if op.get_type_name() in CONVOLUTIONS}
    for op in reversed(operations):
        if op.get_friendly_name() in needed:
            needed |= {value.get_node().get_friendly_name() for value in op.input_values()}
    return [op.get_friendly_name() for op in operations if op.get_friendly_name() not in needed]


def quantize(model: "Model", datamodule: AnomalibDataModule, input_size: tuple[int, int] | None) -> "Model":
    """Quantise all but the resizing and the distances, whose squares have a range that 8 bits do not."""
    import nncf

    def as_input(batch: ImageBatch) -> np.ndarray:
        images = cast(Tensor, batch.image)
        return (resize(images, input_size) if input_size else images).numpy()

    images = nncf.Dataset(datamodule.val_dataloader(), as_input)
    return nncf.quantize(model, images, ignored_scope=left_alone(after_convolutions(model)))
