"""The models that are compared: what each is built with here, and in what that differs from its own defaults."""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anomalib.models
import timm
import torch
import yaml
from anomalib.models import AnomalibModule
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize

from anomalib_cse import Cse

from classifier import BinaryClassifier

OURS: dict[str, type[AnomalibModule]] = {"Cse": Cse, "BinaryClassifier": BinaryClassifier}

# Those of the papers. anomalib gives none, save for Patchcore and Padim, which leaves Lightning's 1000.
EPOCHS = {
    "Cse": 100,
    "BinaryClassifier": 100,
    "Patchcore": 1,
    "Padim": 1,
    "Fastflow": 500,
    "ReverseDistillation": 200,
    "Cfa": 30,
    "Stfpm": 100,
    "Draem": 700,
}
EFFICIENT_AD_STEPS = 70_000

BATCH_SIZE = 32  # anomalib's
BATCH_SIZES = {"EfficientAd": 1, "Draem": 8}  # EfficientAd takes no other; 32 take Draem more than 16 GB

# Strides of the layers that these have by default in a ResNet. They take any timm backbone, the others do not.
STRIDES = {"Patchcore": (8, 16), "Padim": (4, 8, 16), "Stfpm": (4, 8, 16)}
PADIM_FEATURES = 100  # as with its ResNet18, as Padim knows no number for other backbones

RANDOM_WEIGHTS = ("Fastflow", "ReverseDistillation")
NEEDS_HUB = {
    "Cfa": "takes one of four torchvision networks, and their weights by download alone",
    "EfficientAd": "its teacher's weights and Imagenette are a download",
}

PAPER = "Cse embedder=network"  # whose epochs are those above; the closed form has none
ABLATIONS = {
    "classifier": [PAPER, "BinaryClassifier"],
    "decoder": [PAPER, *(f"{PAPER} decoder={mode}" for mode in ("joint", "pretrained", "none")), "BinaryClassifier"],
    "centres": [PAPER, *(f"{PAPER} num_centres={k}" for k in (2, 4, 8))],
    "defects": [
        PAPER,
        *(
            f"{PAPER} defects=[{kinds}]"
            for kinds in (
                "structural",
                "textural",
                "blur",
                "structural,textural",
                "structural,blur",
                "textural,blur",
            )
        ),
    ],
    "layers": [PAPER, *(f"{PAPER} layers=[{levels}]" for levels in ("3", "4", "2,3", "2,4", "2,3,4"))],
}


@dataclass
class Contender:
    """A model as it takes part.

    Attributes:
        name: Its class's name.
        arguments: What the constructor gets.
        backbone: A timm name, if it is another one than the model's own pre-processing normalises for.
        epochs: How long it trains; ``None`` for as long as :data:`EFFICIENT_AD_STEPS` takes.
        deviations: In what it differs from its defaults, apart from what its row is named after.
        unavailable: Why it cannot run, or nothing.
    """

    name: str
    arguments: dict[str, Any]
    backbone: str | None = None
    epochs: int | None = None
    deviations: list[str] = field(default_factory=list)
    unavailable: str = ""

    @property
    def batch_size(self) -> int:
        """Training images read at a time."""
        return BATCH_SIZES.get(self.name, BATCH_SIZE)

    def build(self, **components: Any) -> AnomalibModule:
        """The model, with anomalib's ``components``."""
        arguments = dict(self.arguments)
        if self.backbone:
            net = description(self.backbone)
            strides = STRIDES[self.name]
            known = zip(net.feature_info.reduction(), net.feature_info.module_name(), strict=True)
            arguments.setdefault("layers", [name for stride, name in known if stride in strides])
            components["pre_processor"] = normalised(class_of(self.name), net)
        return class_of(self.name)(**arguments, **components)


def class_of(name: str) -> type[AnomalibModule]:
    """Ours, or anomalib's model of that name.

    Raises:
        ValueError: If neither exists.
    """
    if name not in OURS and name not in EPOCHS and name != "EfficientAd":
        msg = f"--models knows {', '.join([*EPOCHS, 'EfficientAd'])}, got {name!r}"
        raise ValueError(msg)
    return OURS.get(name) or getattr(anomalib.models, name)


def description(backbone: str) -> Any:
    """The backbone without weights, for what timm says of it."""
    with torch.device("meta"):
        return timm.create_model(backbone, pretrained=False, features_only=True)


def normalised(model: type[AnomalibModule], net: Any) -> PreProcessor:
    """The model's own pre-processing, with the mean and deviation that a backbone was trained with."""
    config = timm.data.resolve_data_config({}, model=net)
    transforms = model.configure_pre_processor().transform.transforms  # type: ignore[union-attr]
    normalise = Normalize(config["mean"], config["std"])
    return PreProcessor(Compose([normalise if isinstance(t, Normalize) else t for t in transforms]))


def contender(row: str, seed: int, options: Namespace) -> Contender:
    """How a row of the table takes part.

    Args:
        row: A model's name, and arguments of its constructor after it: ``"Cse embedder=network num_centres=2"``.
        seed: Of the model, if it takes one.
        options: Those of ``compare.py``.

    Raises:
        ValueError: If the row does not name a model and arguments.
    """
    name, *pairs = row.split()
    class_of(name)
    if not all("=" in pair for pair in pairs):
        msg = f"--models takes names with NAME=VALUE after them, such as 'Cse embedder=network', got {row!r}"
        raise ValueError(msg)
    given = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    closed_form = name == "Cse" and given.get("embedder") != "network"
    model = Contender(name, {}, epochs=1 if closed_form else EPOCHS.get(name))
    wanted = given.get("backbone", options.backbone)  # what a row asks for goes before what all are to have
    backbone = Path(wanted).name if wanted else ""
    textures = given.get("dtd_dir", options.dtd_dir)
    if textures and (name in OURS or name == "Draem"):
        model.arguments["dtd_dir"] = textures
        model.deviations.append(f"textures of {Path(textures).name}")
    if name in OURS:
        model.arguments["seed"] = seed
        if backbone:
            model.arguments["backbone"] = wanted
            model.deviations.append(backbone)
    elif name in STRIDES and backbone:
        model.arguments, model.backbone = {"backbone": wanted}, wanted
        layers = "" if "layers" in given else ", layers of the default's strides"
        model.deviations.append(f"{backbone} with its normalisation{layers}")
        if name == "Padim" and "n_features" not in given:
            model.arguments["n_features"] = PADIM_FEATURES
            model.deviations.append(f"{PADIM_FEATURES} features")
    elif name in RANDOM_WEIGHTS and options.offline:
        model.arguments = {"pre_trained": False}
        model.deviations.append("random backbone weights: it takes no other backbone, and there is no hub")
    elif name in NEEDS_HUB and options.offline:
        model.unavailable = NEEDS_HUB[name]
    if name == "Draem":
        model.deviations.append(f"batches of {BATCH_SIZES[name]}, its paper's number")
        if options.offline and not textures:
            model.unavailable = "its textures are a download: give --dtd-dir"
    if options.epochs and (model.epochs is None or options.epochs < model.epochs):
        model.deviations.append(f"{options.epochs} epochs instead of {model.epochs or f'{EFFICIENT_AD_STEPS} steps'}")
        model.epochs = options.epochs
    model.arguments |= given
    return model
