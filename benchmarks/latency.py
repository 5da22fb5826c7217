"""How long exported models take for an image, beside anomalib's and the bare backbones. Run by ``make bench-latency``.

Every model is exported to ONNX and, as it is and compressed, to OpenVINO. What stands in the output folder is not
exported again, so that exports may be made while the machine is busy, and the measurement repeated when it is not.
After a change of code take another folder. Weights are random, as latency does not depend on them; images have the
size that the network takes, so that nothing is resized.
"""

import argparse
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import nncf
import numpy as np
import onnxruntime
import openvino
import pandas as pd
import timm
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, EfficientAd, Fastflow, Padim, Patchcore, ReverseDistillation, Stfpm
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchvision.io import write_png
from torchvision.transforms.v2 import Resize

from anomalib_cse import Cse, CseGaussian
from anomalib_cse.deployment import fixed_size

from common import (
    OPSET,
    QUIET,
    SINGLE_PRECISION,
    Network,
    compiled,
    exported_size,
    hardware,
    in_child,
    markdown,
    per_image,
)

WHOLE_224, WHOLE_256 = (PreProcessor(Resize((size, size))) for size in (224, 256))  # which changes nothing here
LITE0, B3 = "tf_efficientnet_lite0", "efficientnet_b3"


@dataclass(frozen=True)
class Runtime:
    """A way to run an exported model.

    Attributes:
        format: anomalib's name of the export.
        compression: Of the exported file.
        config: OpenVINO's; compressed models may round further, as they do by default.
    """

    format: str
    compression: CompressionType | None = None
    config: Mapping[str, str] = field(default_factory=dict)


RUNTIMES = {
    "ONNX Runtime": Runtime("onnx"),
    "OpenVINO f32": Runtime("openvino", config=SINGLE_PRECISION),
    "OpenVINO INT8": Runtime("openvino", CompressionType.INT8),
    "OpenVINO INT8_PTQ": Runtime("openvino", CompressionType.INT8_PTQ),
}


@dataclass(frozen=True)
class Bare:
    """A backbone alone, up to the coarsest layer that a model takes, and the size of that model's images."""

    net: nn.Module
    size: int


def set_thresholds(model: AnomalibModule) -> None:
    """Give a model thresholds, without which scores are not scaled."""
    values = {"min": 0, "max": 1, "threshold": 0.5}
    state = model.post_processor.state_dict()
    found = {name: values.get(name.rpartition("_")[2]) for name in state}
    scaled = {name: torch.full_like(state[name], value) for name, value in found.items() if value is not None}
    model.post_processor.load_state_dict({**state, **scaled})


def cse(backbone: str) -> Cse:
    """Return Cse with a random centre."""
    model = Cse(backbone, pre_trained=False, seed=0, pre_processor=WHOLE_224)
    embedding = model.model.embed(model.model.backbone(torch.rand(1, 3, 224, 224)))
    model.model.set_centres(torch.randn_like(embedding), (224, 224))
    return model


def cse_gaussian(backbone: str, *, own: bool = False) -> CseGaussian:
    """Return CseGaussian with random maps, of one covariance for all positions or of their own."""
    model = CseGaussian(backbone, pre_trained=False, seed=0, pre_processor=WHOLE_256)
    state = {name: torch.rand_like(v) if v.isnan().any() else v for name, v in model.model.state_dict().items()}
    for number, features in enumerate(model.model.smoothed_features(torch.rand(1, 3, 256, 256))):
        grid, roots = features.shape[-2:], state[f"maps.{number}.roots"]
        state[f"maps.{number}.scale"] = torch.ones(grid)
        state[f"maps.{number}.roots"] = roots.repeat(*grid, 1, 1) if own else roots
    model.model.load_state_dict({**state, "image_size": torch.tensor([256, 256])})
    return model


def patchcore() -> Patchcore:
    """Return Patchcore with 10 % of the patches of 280 images, a middling category of MVTec AD, in its memory."""
    model = Patchcore(pre_trained=False, pre_processor=WHOLE_256)
    patches, channels = model.model.train()(torch.rand(1, 3, 256, 256)).shape
    model.model.memory_bank = torch.rand(280 * patches // 10, channels)
    return model


def padim() -> Padim:
    """Return Padim fitted to random images."""
    model = Padim(pre_trained=False, pre_processor=WHOLE_256)
    model.model.train()(torch.rand(4, 3, 256, 256))
    model.model.fit()
    return model


def stfpm() -> Stfpm:
    """Return STFPM with random weights, which it takes from a folder alone."""
    with TemporaryDirectory() as folder:
        timm.models.save_for_hf(timm.create_model("resnet18"), folder)
        return Stfpm(f"local-dir:{folder}", pre_processor=WHOLE_256)


def bare(model: Callable[[], Cse | CseGaussian], size: int) -> Bare:
    """Return what a model has for a backbone."""
    return Bare(model().model.backbone.net, size)


OURS: dict[str, Callable[[], Cse | CseGaussian]] = {
    "Cse, Lite0": partial(cse, LITE0),
    "Cse, B3": partial(cse, B3),
    "CseGaussian, Lite0": partial(cse_gaussian, LITE0),
    "CseGaussian, Lite0, own covariances": partial(cse_gaussian, LITE0, own=True),
    "CseGaussian, B3": partial(cse_gaussian, B3),
}
BACKBONES = {
    "backbone of Cse, Lite0": partial(bare, OURS["Cse, Lite0"], 224),
    "backbone of Cse, B3": partial(bare, OURS["Cse, B3"], 224),
    "backbone of CseGaussian, Lite0": partial(bare, OURS["CseGaussian, Lite0"], 256),
    "backbone of CseGaussian, B3": partial(bare, OURS["CseGaussian, B3"], 256),
}
MODELS: dict[str, Callable[[], AnomalibModule | Bare]] = {
    **BACKBONES,
    **OURS,
    "Padim, ResNet18": padim,
    "STFPM, ResNet18": stfpm,
    "FastFlow, ResNet18": partial(Fastflow, pre_trained=False, pre_processor=WHOLE_256),
    "ReverseDistillation, ResNet18": partial(
        ReverseDistillation, "resnet18", pre_trained=False, pre_processor=WHOLE_256
    ),
    "EfficientAd-S": partial(EfficientAd, pre_processor=WHOLE_256),
    "PatchCore, WRN50": patchcore,
}


def random_images(folder: Path, height: int, width: int, count: int = 24) -> Folder:
    """Return images of noise, to quantise activations by: latency does not depend on the ranges."""
    (folder / "good").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        write_png(image, str(folder / "good" / f"{number}.png"))
    options = {"num_workers": 0, "eval_batch_size": 1, "test_split_ratio": 0.5, "val_split_mode": "same_as_test"}
    return Folder("noise", root=folder, normal_dir="good", **options)


def export_all(name: str, folders: Mapping[str, Path]) -> dict[str, str]:
    """Export a model for each runtime into a folder, in a process of its own; failures are shown."""
    files = {}
    with torch.no_grad():
        model = MODELS[name]()
        if isinstance(model, AnomalibModule):
            set_thresholds(model)
        for title, folder in folders.items():
            try:
                files[title] = str(export(model, RUNTIMES[title], folder))
            except Exception as error:  # noqa: BLE001  the other runtimes do not depend on it
                traceback.print_exception(error)
    return files


def export(model: AnomalibModule | Bare, runtime: Runtime, folder: Path) -> Path:
    """Export a model; return its file."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, Bare):
        return export_bare(model, runtime, folder)
    size = fixed_size(model.pre_processor)
    with TemporaryDirectory() as images:
        return Path(
            Engine(default_root_dir=folder, **QUIET).export(
                model,
                runtime.format,
                export_root=folder,
                input_size=size,
                compression_type=runtime.compression,
                datamodule=random_images(Path(images), *size),
                onnx_kwargs=OPSET,
            )
        )


def export_bare(backbone: Bare, runtime: Runtime, folder: Path) -> Path:
    """Export a backbone as anomalib exports models."""
    size = backbone.size
    file = folder / "model.onnx"
    images = torch.zeros(2, 3, size, size)
    batch = {0: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        backbone.net, (images,), file, input_names=["input"], dynamo=True, dynamic_shapes=(batch,), **OPSET
    )
    if runtime.format == "onnx":
        return file
    network = openvino.convert_model(file)
    if runtime.compression == CompressionType.INT8:
        network = nncf.compress_weights(network)
    elif runtime.compression == CompressionType.INT8_PTQ:
        generator = np.random.default_rng(0)
        noise = [generator.random((1, 3, size, size), dtype=np.float32) for _ in range(12)]
        network = nncf.quantize(network, nncf.Dataset(noise))
    openvino.save_model(network, file.with_suffix(".xml"), compress_to_fp16=False)
    return file.with_suffix(".xml")


def opened(file: Path, runtime: Runtime) -> tuple[Network, list[int | None]]:
    """Return an exported network, ready to run, and the shape of its input, None where that is open."""
    if runtime.format == "openvino":
        return compiled(file, runtime.config)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    shape = [side if isinstance(side, int) else None for side in session.get_inputs()[0].shape]
    return lambda images: session.run(None, {"input": images}), shape


def with_images(file: Path, runtime: Runtime, count: int) -> tuple[Network, np.ndarray]:
    """Return an exported network and so many images, or as many as its export has fixed."""
    network, (fixed, *shape) = opened(file, runtime)
    return network, np.random.default_rng(0).random((fixed or count, *shape), dtype=np.float32)


def measure(files: Mapping[str, Path], runtime: Runtime, count: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds that each network takes for an image, in batches of so many."""
    return per_image({name: partial(with_images, file, runtime, count) for name, file in files.items()}, rounds)


def exported(options: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """Return the files of each model for the runtimes that it can be exported for; what is there stays."""
    files = {}
    for name in options.models:
        folder = options.output / "exported" / name.replace(", ", "_").replace(" ", "_")
        done = folder / "files.json"
        if not done.exists():
            print(f"Exporting {name} ...", flush=True)
            found = in_child(partial(export_all, name, {title: folder / title for title in RUNTIMES}))
            if "failed" in found:
                continue
            paths = {title: str(Path(found[title]).relative_to(folder)) for title in RUNTIMES if title in found}
            done.write_text(json.dumps(paths))
        files[name] = {title: folder / path for title, path in json.loads(done.read_text()).items()}
    return files


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=50, help="of the measurement; a quarter of it for batches of 8")
    parser.add_argument("--export-only", action="store_true", help="measure nothing, as the machine is busy")
    parser.add_argument("--output", type=Path, default=Path("results/latency"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Export what is not exported, measure all of it in turns, and write a table."""
    options = parse(arguments)
    options.output = options.output.resolve()
    files = exported(options)
    if options.export_only:
        return
    rows = {name: {"model": name} for name in files}
    for name, found in files.items():
        if "OpenVINO f32" in found:
            rows[name]["MB"] = exported_size(found["OpenVINO f32"])
    for title, count in product(RUNTIMES, (1, 8)):
        print(f"Measuring {title}, batches of {count} ...", flush=True)
        of_runtime = {name: found[title] for name, found in files.items() if title in found}
        rounds = max(3, options.rounds // min(count, 4))
        for name, milliseconds in in_child(partial(measure, of_runtime, RUNTIMES[title], count, rounds)).items():
            if name in rows:
                rows[name][f"{title}, {count}"] = milliseconds
    pd.DataFrame(rows.values()).to_csv(options.output / "results.csv", index=False)
    text = f"{markdown(rows.values())}\n\n{hardware()}\n"
    (options.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
