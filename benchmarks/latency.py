"""How long one image takes: Cse in torch, ONNX Runtime and OpenVINO, beside its bare backbone and anomalib's models.

Every row is measured in a process of its own; milliseconds are medians of rounds. Weights are random (latency does not
depend on them), images too, of the size that the model's own pre-processing asks for. Run by ``make bench-latency``.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models import (
    AnomalibModule,
    EfficientAd,
    Fastflow,
    Padim,
    Patchcore,
    ReverseDistillation,
)
from torch import Tensor, nn

from anomalib_cse import Cse

from common import hardware, in_child, markdown

BACKBONES = ("efficientnet_b3", "tf_efficientnet_lite0")
SIZE = (224, 224)
IN_TORCH = ("backbone, channels last", "eager", "eager, channels last")
RUNTIMES = (
    *IN_TORCH,
    "ONNX Runtime",
    "OpenVINO f32",
    "OpenVINO default",
    "OpenVINO FP16",
    "OpenVINO INT8",
)


def milliseconds(run: Callable[[Any], Any], image: Any, rounds: int) -> float:
    """Median of ``rounds`` runs, after two that are not counted."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run(image)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]) * 1000


def measured(run: Callable[[Tensor], Any], size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Milliseconds for one image and, per image, for a batch of 8."""
    with torch.inference_mode():
        one = milliseconds(run, torch.rand(1, 3, *size), rounds)
        eight = milliseconds(run, torch.rand(8, 3, *size), max(3, rounds // 4)) / 8
    return {"ms, one image": one, "ms, batch of 8": eight}


def cse(backbone: str) -> Cse:
    """Cse with random weights and centres."""
    model = Cse(backbone=backbone, pre_trained=False, pre_processor=False, seed=0).eval()
    model.model.set_centres(torch.randn(model.model.centres.shape))
    return model


def in_torch(backbone: str, name: str, rounds: int) -> dict[str, Any]:
    """Cse's network, or the backbone alone, at the 224x224 that it sees."""
    network = cse(backbone).model
    if name == "eager":  # as torch lays images out by default; Cse asks for channels last
        network = network.to(memory_format=torch.contiguous_format)
    return measured(network.backbone if name == "backbone, channels last" else network, SIZE, rounds)


def export(backbone: str, name: str, folder: Path) -> dict[str, Any]:
    """Export Cse's network for one runtime."""
    kind = "onnx" if name == "ONNX Runtime" else "openvino"
    compression = next((kind for kind in CompressionType if name.endswith(kind.name)), None)
    network = Engine(default_root_dir=folder).export(
        cse(backbone), kind, export_root=folder, input_size=SIZE, compression_type=compression
    )
    files = [Path(network), *([Path(network).with_suffix(".bin")] if kind == "openvino" else [])]
    return {"file": files[0], "exported MB": sum(file.stat().st_size for file in files) / 1e6}


def deployed(file: Path, name: str, rounds: int) -> dict[str, Any]:
    """An exported network in its runtime."""
    run = session(file, name)
    return measured(lambda images: run(images.numpy()), SIZE, rounds)


def runtime(backbone: str, name: str, rounds: int) -> dict[str, Any]:
    """One way to run Cse.

    What is exported is measured in another process than the one that exports: in a thread in which torch has run, the
    same OpenVINO network took eight times as long here.
    """
    if name in IN_TORCH:
        return in_child(in_torch, backbone, name, rounds)
    with tempfile.TemporaryDirectory() as folder:
        network = in_child(export, backbone, name, Path(folder))
        if "failed" in network:
            return network
        return {**in_child(deployed, network["file"], name, rounds), "exported MB": network["exported MB"]}


def session(file: Path, name: str) -> Callable[[np.ndarray], Any]:
    """Something to call with a batch."""
    if name == "ONNX Runtime":
        onnx = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images: onnx.run(None, {"input": images})
    hints = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_PRECISION_HINT": "f32"} if "f32" in name else {})}
    return openvino.Core().compile_model(file, "CPU", hints)


PEERS: dict[str, Callable[[], AnomalibModule]] = {
    "PatchCore WRN50": lambda: Patchcore(pre_trained=False),
    "FastFlow WRN50": lambda: Fastflow("wide_resnet50_2", pre_trained=False),
    "FastFlow ResNet18": lambda: Fastflow("resnet18", pre_trained=False),
    "ReverseDistillation WRN50": lambda: ReverseDistillation("wide_resnet50_2", pre_trained=False),
    "ReverseDistillation ResNet18": lambda: ReverseDistillation("resnet18", pre_trained=False),
    "EfficientAd": EfficientAd,
    "Padim ResNet18": lambda: Padim(pre_trained=False),
}


def peer(name: str, rounds: int) -> dict[str, Any]:
    """The network of another model of anomalib, eager, at the image size of its own pre-processing."""
    model = PEERS[name]().eval()
    size = tuple(model.pre_processor.transform(torch.rand(1, 3, 300, 300)).shape[-2:])
    network: nn.Module = model.model
    with torch.inference_mode():
        if name.startswith("PatchCore"):  # 10 % of the patches of 280 images, a middling category of MVTec AD
            patches, channels = network.train()(torch.rand(1, 3, *size)).shape
            network.memory_bank = torch.rand(280 * patches // 10, channels)
        if name.startswith("Padim"):
            network.train()(torch.rand(4, 3, *size))
            network.fit()
        network.eval()
    return {**measured(network, size, rounds), "image": f"{size[0]}x{size[1]}"}


def main() -> None:
    """Measure one after the other and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    print(hardware())
    rows = [
        {"model": f"Cse {backbone}", "runtime": name, "image": "224x224", **runtime(backbone, name, rounds)}
        for backbone in BACKBONES
        for name in RUNTIMES
    ]
    rows += [{"model": name, "runtime": "eager", **in_child(peer, name, rounds)} for name in PEERS]
    print(markdown(rows))


if __name__ == "__main__":
    main()
