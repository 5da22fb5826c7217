"""The models that are compared, as a YAML file lists them; see ``configs/compare``."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import timm
import torch
import yaml
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder
from anomalib.models import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize

from anomalib_cse import Cse, CseGaussian

CONFIG = Path(__file__).parents[1] / "configs" / "compare" / "offline.yaml"


@dataclass(frozen=True)
class Contender:
    """A model as it takes part.

    Attributes:
        name: What the table calls it.
        class_path: Of its class, an ``AnomalibModule``.
        init_args: What its constructor gets, beside the seed.
        weights: Folders, each of a timm network, by the submodule that they are loaded into: for classes which take
            weights from the hub alone.
        max_epochs: How long it trains; needed unless the model knows that itself.
        train_batch_size: Training images to a step; 32 is anomalib's.
        image_size: Height and width that images of a model with a timm backbone are resized to; 256x256 if not given.
        tile_size: Side of the tiles that anomalib's Tiler cuts images into; 0 for none.
        note: In what it differs from its defaults, for the table.
    """

    name: str
    class_path: str
    init_args: Mapping[str, object] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    max_epochs: int | None = None
    train_batch_size: int = 32
    image_size: Sequence[int] | None = None
    tile_size: int = 0
    note: str = ""

    @property
    def settings(self) -> str:
        """All that decides its results, as JSON."""
        unset = {"name", "note"} | {key for key in ("image_size", "tile_size", "weights") if not getattr(self, key)}
        return json.dumps({key: value for key, value in asdict(self).items() if key not in unset})

    @property
    def model_class(self) -> type[AnomalibModule]:
        """The class that ``class_path`` names."""
        module, _, name = self.class_path.rpartition(".")
        return getattr(import_module(module), name)

    def build(self, seed: int, **components: nn.Module | bool) -> AnomalibModule:
        """Return the model, with anomalib's ``components``; a timm backbone gets images as it was trained with them."""
        arguments = {**self.init_args, **components}
        if issubclass(self.model_class, (Cse, CseGaussian)):
            arguments |= {"seed": seed, "report": False}
        elif "backbone" in self.init_args:
            own = normalised(self.model_class, str(self.init_args["backbone"]), self.image_size)
            arguments.setdefault("pre_processor", own)
        model = self.model_class(**arguments)
        for name, folder in self.weights.items():
            part, whole = model.get_submodule(name), load_file(Path(folder) / "model.safetensors")
            part.load_state_dict({key: whole[key] for key in part.state_dict()})
        return model

    @property
    def callbacks(self) -> list[Callback]:
        """What its trainer needs."""
        return (
            [TilerConfigurationCallback(enable=True, tile_size=self.tile_size, stride=self.tile_size)]
            if self.tile_size
            else []
        )

    def epochs(self, model: AnomalibModule) -> int:
        """Return how many epochs its model trains.

        Raises:
            ValueError: If neither says so.
        """
        epochs = 1 if isinstance(model, CseGaussian) else model.trainer_arguments.get("max_epochs", self.max_epochs)
        if epochs is None:
            msg = f"{self.name}: give max_epochs, as {self.class_path} knows no number itself"
            raise ValueError(msg)
        return epochs


def read_contenders(file: Path) -> dict[str, Contender]:
    """Return the models of a YAML file, by their names.

    Raises:
        ValueError: If an entry has other keys than a :class:`Contender`, or two have the same name.
    """
    contenders: dict[str, Contender] = {}
    for entry in yaml.safe_load(file.read_text())["models"]:
        try:
            contender = Contender(**entry)
        except TypeError as error:
            msg = f"{file}, {entry}: {error}"
            raise ValueError(msg) from None
        if contender.name in contenders:
            msg = f"{file}: two models are called {contender.name!r}"
            raise ValueError(msg)
        contenders[contender.name] = contender
    return contenders


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what all comparisons take: a list of models, and datasets."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="list of models; see configs/compare")
    parser.add_argument("--root", type=Path, required=True, help="folder of datasets in MVTec AD's layout")
    parser.add_argument("--categories", nargs="+", required=True, help="folders in it")
    return parser


def chosen(parser: argparse.ArgumentParser, config: Path, names: Sequence[str] | None) -> list[Contender]:
    """Return the models of a YAML file that were asked for on the command line, or all of them."""
    known = read_contenders(config)
    if unknown := set(names or ()) - known.keys():
        parser.error(f"{config} has the models {', '.join(known)}; got {', '.join(sorted(unknown))}")
    return [known[name] for name in names or known]


def images_of(dataset: Path, batch_size: int, **validation: object) -> Folder:
    """Return a dataset in MVTec AD's layout, with or without masks; by default the test images validate too."""
    kinds = sorted(folder.name for folder in (dataset / "test").iterdir() if folder.name != "good")
    masks = [f"ground_truth/{kind}" for kind in kinds] if (dataset / "ground_truth").is_dir() else None
    return Folder(
        name=dataset.name,
        root=dataset,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds],
        mask_dir=masks,
        train_batch_size=batch_size,
        eval_batch_size=batch_size,
        num_workers=0,
        **{"val_split_mode": "same_as_test", **validation},
    )


def normalised(model: type[AnomalibModule], backbone: str, size: Sequence[int] | None = None) -> PreProcessor:
    """Return a model's own pre-processing, with the mean and deviation that a timm backbone was trained with."""
    with torch.device("meta"):
        net = timm.create_model(backbone, pretrained=False)
    config = timm.data.resolve_data_config({}, model=net)
    normalise = Normalize(config["mean"], config["std"])
    transforms = model.configure_pre_processor(tuple(size) if size else None).transform.transforms
    return PreProcessor(Compose([normalise if isinstance(t, Normalize) else t for t in transforms]))
