"""How long one image takes: Cse in torch, ONNX Runtime and OpenVINO, beside its bare backbone and anomalib's models.

Cse in torch and its backbone take turns in one process, every other row has its own; milliseconds are medians of
rounds. Weights are random (latency does not depend on them), images too, of the size that the model's own
pre-processing asks for. Run by ``make bench-latency``.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
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
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import CenterCrop

from anomalib_cse import Cse

from common import exported_size, hardware, in_child, markdown

BACKBONES = ("efficientnet_b3", "tf_efficientnet_lite0")
OWN = "linear, own covariances"  # of every position; without, one for all
SIZES = {"linear": (256, 256), OWN: (256, 256), "network": (224, 224)}  # what each embedder gets to see by default
IN_TORCH = ("bare backbone, eager, channels last", "eager, channels last", "eager")
RUNTIMES = ("ONNX Runtime", "OpenVINO f32", "OpenVINO default", "OpenVINO FP16", "OpenVINO INT8")


def milliseconds(runs: Sequence[Callable[[Any], Any]], image: Any, rounds: int) -> list[float]:
    """Medians of ``rounds`` runs of each, in turns, after two that are not counted."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 2):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run(image)
            times.append(time.perf_counter() - start)
    return [statistics.median(times[2:]) * 1000 for times in seconds]


def in_turns(runs: Sequence[Callable[[Tensor], Any]], size: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds for one image and, per image, for a batch of 8."""
    with torch.inference_mode():
        one = milliseconds(runs, torch.rand(1, 3, *size), rounds)
        eight = milliseconds(runs, torch.rand(8, 3, *size), max(3, rounds // 4))
    return [{"ms, one image": a, "ms, batch of 8": b / 8} for a, b in zip(one, eight, strict=True)]


def measured(run: Callable[[Tensor], Any], size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The same of one function."""
    [row] = in_turns([run], size, rounds)
    return row


def cse(backbone: str, embedder: str) -> Cse:
    """Cse with random numbers for all that is fitted, without resizing."""
    whole = PreProcessor(CenterCrop(SIZES[embedder]))
    kind: Any = embedder.split(",")[0]
    model = Cse(backbone=backbone, pre_trained=False, embedder=kind, pre_processor=whole, seed=0).eval()
    for values in model.model.buffers():
        if values.isnan().any():
            values.copy_(torch.rand_like(values))
    for gaussian in model.model.maps if embedder == "linear" else ():
        gaussian.roots.copy_(gaussian.roots[0, 0].clone())
    return model


def in_torch(backbone: str, embedder: str, rounds: int) -> dict[str, Any]:
    """Cse at the size that it sees, its backbone alone, and Cse as torch lays out images."""
    network = cse(backbone, embedder).model
    contiguous = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    measured = in_turns([network.backbone, network, contiguous], SIZES[embedder], rounds)
    return dict(zip(IN_TORCH, measured, strict=True))


def export(backbone: str, embedder: str, name: str, folder: Path) -> dict[str, Any]:
    """Export Cse for one runtime."""
    kind = "onnx" if name == "ONNX Runtime" else "openvino"
    compression = next((kind for kind in CompressionType if name.endswith(kind.name)), None)
    network = Engine(default_root_dir=folder).export(
        cse(backbone, embedder),
        kind,
        export_root=folder,
        input_size=SIZES[embedder],
        compression_type=compression,
    )
    return {"file": Path(network), "exported MB": exported_size(Path(network))}


def deployed(file: Path, embedder: str, name: str, rounds: int) -> dict[str, Any]:
    """An exported network in its runtime."""
    run = session(file, name)
    return measured(lambda images: run(images.numpy()), SIZES[embedder], rounds)


def runtime(backbone: str, embedder: str, name: str, rounds: int) -> dict[str, Any]:
    """Cse exported to one runtime.

    It is measured in another process than the one that exports: in a thread in which torch had run, the same OpenVINO
    network took eight times as long.
    """
    with tempfile.TemporaryDirectory() as folder:
        network = in_child(export, backbone, embedder, name, Path(folder))
        if "failed" in network:
            return network
        return {**in_child(deployed, network["file"], embedder, name, rounds), "exported MB": network["exported MB"]}


def rows_of(backbone: str, embedder: str, rounds: int) -> Iterator[dict[str, Any]]:
    """All rows of Cse with one backbone."""
    height, width = SIZES[embedder]
    first = {"model": f"Cse {embedder} {backbone}", "image": f"{height}x{width}"}
    eager = in_child(in_torch, backbone, embedder, rounds)
    shared = {name: value for name, value in eager.items() if name not in IN_TORCH}  # memory, or why there is nothing
    yield from ({**first, "runtime": name, **eager.get(name, {}), **shared} for name in IN_TORCH)
    yield from ({**first, "runtime": name, **runtime(backbone, embedder, name, rounds)} for name in RUNTIMES)


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
    ours = (row for backbone in BACKBONES for embedder in SIZES for row in rows_of(backbone, embedder, rounds))
    peers = ({"model": name, "runtime": "eager", **in_child(peer, name, rounds)} for name in PEERS)
    rows = []
    for row in chain(ours, peers):  # shown as they come: all of them take twenty minutes
        print(row, flush=True)
        rows.append(row)
    print(markdown(rows))


if __name__ == "__main__":
    main()
