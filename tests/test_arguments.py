"""Arguments outside their range: the constructor says which, what is allowed and what it was given."""

import enum
import inspect
import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from anomalib.pre_processing import PreProcessor
from safetensors.torch import save_file
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from tiny import COMMON, MODELS

NAN, INF = math.nan, math.inf

OUT_OF_RANGE = {
    "backbone": ("no timm model", ["nope", None, 3]),
    "layers": (r"0\.\.4 or names", [(), 3, (2, 2), (-1, 2), (2, "blocks.2"), (2.0, 3), (True, 3), "blocks.2"]),
    "pre_trained": ("True or False", ["no", None]),
    "embedding_dim": (r"whole number in \[1, inf\)", [0, -1, 1.5, NAN, "8", True, None]),
    "pool_size": (r"whole number in \[1, inf\)", [0, 1.5, NAN, "2", None]),
    "num_centres": (r"whole number in \[1, inf\)", [0, 1.5, NAN, "2", None]),
    "decoder": ("'random', 'joint', 'pretrained' or 'none'", ["frozen", None, ["random"]]),
    "contrast_weight": (r"number in \(0, inf\)", [0, -1.0, NAN, INF, "1", None]),
    "dtd_dir": ("'builtin' or a folder", ["", None, 3]),
    "download_dtd": ("True or False", ["yes", None]),
    "variations": ("some of", ["blur", None, 3, ["scratch"], ["blur", 3], ["blur", "blur"], [["blur"]]]),
    "defects": ("some of", [[], "blur", None, 3, ["scratch"], ["blur", 3], ["blur", "blur"], [["blur"]]]),
    "known_defects": ("a folder or None", ["", 3, True]),
    "known_masks": ("a folder or None", ["", 3, True]),
    "keep_sums": ("True or False", ["yes", None]),
    "learning_rate": (r"number in \(0, inf\)", [0, -1e-3, NAN, INF, "x", None]),
    "holdout_ratio": (r"number in \[0, 1\)", [-0.1, 1, 1.5, NAN, "x", None]),
    "image_size": (r"\(height, width\)", [(0, 64), (-1, 64), (64,), 64, (64, 64, 3), (64.5, 64), ("a", 64), ()]),
    "center_crop_size": (r"\(height, width\)|within image_size", [(0, 64), (64,), 32, (65, 64), (8, 64), (32.5, 32)]),
    "roi": ("a mask image", ["", 3, True]),
    "memory_budget": (r"whole number in \[0, inf\)", [-1, NAN, INF, "1", None, 1.5]),
    "report": ("True or False", ["no", None, 1]),
    "reject_rate": (r"number in \(0, 0.5\]", [0, 0.6, NAN, "a", True]),
    "seed": (r"whole number in \[0, 4294967296\)", [-1, 1.5, NAN, "a", 2**32]),
}  # fmt: skip
OTHERS = {"weights", "pre_processor", "post_processor", "evaluator", "visualizer"}  # below, and anomalib's own
UNSIZED = {name: value for name, value in COMMON.items() if name != "image_size"}
WEIGHTED = {**COMMON, "pre_trained": True}

both = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        (model, name, value)
        for model in MODELS.values()
        for name in sorted(set(inspect.signature(model).parameters) - OTHERS)
        for value in OUT_OF_RANGE[name][1]
    ],
)
def test_value_out_of_range_is_refused(model, name, value):
    with pytest.raises(ValueError, match=OUT_OF_RANGE[name][0]) as error:
        model(**{**COMMON, name: value})
    assert name in str(error.value)
    assert (str(list(value)) if isinstance(value, tuple) else str(value)).strip("[]") in str(error.value)


def test_every_range_is_of_an_argument():
    assert set(OUT_OF_RANGE) <= {name for model in MODELS.values() for name in inspect.signature(model).parameters}


@pytest.mark.parametrize("pre_processor", [PreProcessor(Resize(64)), PreProcessor(), False], ids=str)
def test_images_of_different_sizes_are_refused_by_the_papers_model(pre_processor):
    with pytest.raises(ValueError, match="needs all images in one size: give image_size"):
        MODELS["Cse"](**UNSIZED, pre_processor=pre_processor)
    assert MODELS["CseGaussian"](**UNSIZED, pre_processor=pre_processor).image_size is None


@both
def test_a_pre_processor_may_crop_to_one_size(model):
    own = model(**UNSIZED, pre_processor=PreProcessor(Compose([Resize(96), CenterCrop((64, 80))])))
    assert own.image_size == (64, 80)


@both
def test_arguments_that_contradict_each_other_are_refused(model):
    for name in ("image_size", "center_crop_size"):
        with pytest.raises(ValueError, match="image_size and center_crop_size describe the model's own pre-processor"):
            model(**{**UNSIZED, name: (64, 64)}, pre_processor=PreProcessor(Resize((64, 64))))
    with pytest.raises(ValueError, match="download_dtd needs a dtd_dir to download to, got dtd_dir='builtin'"):
        model(**COMMON, download_dtd=True)


@both
def test_images_smaller_than_the_stride_are_refused(model):
    """Level 3 of the tiny backbone has stride 16: less would be a position that is mostly padding."""
    least = "at least 16, the stride of the coarsest layer, got"
    with pytest.raises(ValueError, match=rf"image_size must .* {least} \(15, 64\)"):
        model(**{**COMMON, "image_size": (15, 64)})
    with pytest.raises(ValueError, match=rf"center_crop_size must .* {least} \(16, 15\)"):
        model(**COMMON, center_crop_size=(16, 15))
    model(**{**COMMON, "image_size": (16, 16)})
    model(**{**COMMON, "image_size": (8, 8), "layers": (0, 2)})


@pytest.fixture(scope="module")
def broken_weights(tmp_path_factory):
    """Files that are no weights of ``test_efficientnet``, named by what is wrong with them."""
    folder = tmp_path_factory.mktemp("broken")
    network = timm.create_model("test_efficientnet", pretrained=False)
    save_file(network.state_dict(), folder / "torn.safetensors")
    torch.save(network.state_dict(), folder / "torn.pth")
    for file in list(folder.iterdir()):
        file.write_bytes(file.read_bytes()[:5000])
    (folder / "empty.safetensors").touch()
    (folder / "empty.pth").touch()
    (folder / "text.pth").write_text("hello")
    torch.save(network, folder / "pickled.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), folder / "resnet.pth")
    (folder / "folder").mkdir()
    return sorted(folder.iterdir())


@both
def test_weights_that_are_not_of_the_backbone_are_refused(model, broken_weights):
    assert len(broken_weights) == 9
    for file in broken_weights:
        with pytest.raises(ValueError, match=f"weights: {re.escape(str(file))} "):
            model(**WEIGHTED, weights=file)
    for value in ("", 3):
        with pytest.raises(ValueError, match=r"weights must be a \.safetensors or \.pth file or None, got "):
            model(**WEIGHTED, weights=value)


@both
def test_weights_are_those_of_the_file(model, tmp_path):
    network = timm.create_model("test_efficientnet", pretrained=False)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    model = model(**WEIGHTED, weights=tmp_path / "model.safetensors")
    assert torch.equal(model.model.backbone.net.conv_stem.weight, network.conv_stem.weight)


class Text(str):
    """Text that is printed as something else."""

    __slots__ = ()

    def __str__(self):
        return "something else"


class Kind(enum.StrEnum):
    BLUR = "blur"
    JOINT = "joint"


class Number(enum.IntEnum):
    TWO = 2
    SIZE = 64


UNUSUAL = {  # values that work as arguments, and what they are
    "backbone": (Text("test_efficientnet"), "test_efficientnet"),
    "layers": ([Number.TWO, np.int64(3)], [2, 3]),
    "pre_trained": (np.False_, False),
    "embedding_dim": (Number.SIZE, 64),
    "pool_size": (np.int64(2), 2),
    "num_centres": (Number.TWO, 2),
    "decoder": (Kind.JOINT, "joint"),
    "contrast_weight": (Fraction(5, 2), 2.5),
    "dtd_dir": (Text("builtin"), "builtin"),
    "download_dtd": (np.False_, False),
    "defects": ([Kind.BLUR, np.str_("textural")], ["blur", "textural"]),
    "variations": ((Kind.BLUR, Text("light")), ("blur", "light")),
    "learning_rate": (Decimal("0.0004"), 0.0004),
    "holdout_ratio": (np.float32(0.25), 0.25),
    "image_size": ([Number.SIZE, np.int32(64)], [64, 64]),
    "center_crop_size": (torch.tensor([48, 48]), [48, 48]),
    "roi": (None, None),  # not saved
    "memory_budget": (np.uint8(200), 200),
    "reject_rate": (Fraction(1, 4), 0.25),
    "seed": (Number.TWO, 2),
    "report": (np.False_, False),
    "known_defects": (None, None),  # not saved
    "known_masks": (None, None),
    "keep_sums": (np.False_, False),
}


@both
def test_unusual_types_are_saved_as_pythons_own_and_load(model, tmp_path):
    names = set(inspect.signature(model).parameters) - OTHERS
    built = model(**{name: UNUSUAL[name][0] for name in names})
    assert all(built.hparams[name] == UNUSUAL[name][1] for name in names)
    checkpoint = {"hyper_parameters": dict(built.hparams), "state_dict": built.state_dict(), "epoch": 0}
    built.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    loaded = torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]
    assert all(loaded[name] == UNUSUAL[name][1] for name in names - {"backbone", "layers"})


@both
def test_layers_may_be_named_by_a_subclass_of_text(model):
    named = model(**{**COMMON, "layers": [Text("blocks.2"), np.str_("blocks.4")]})
    assert named.backbone.levels == model(**{**COMMON, "layers": ["blocks.2", "blocks.4"]}).backbone.levels


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtd_dir", b"builtin"), ("defects", {"blur"}), ("weights", b"x"), ("roi", object())],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_values_that_no_checkpoint_may_hold_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        MODELS["CseGaussian"](**{**COMMON, name: value})


def test_argument_of_a_models_subclass_that_no_checkpoint_may_hold_is_refused():
    class Own(MODELS["CseGaussian"]):
        def __init__(self, own, **options):
            super().__init__(**options)

    with pytest.raises(ValueError, match=r"own must be text, a number, True, False, None or a list .*, got \{1\}"):
        Own({1}, **COMMON)
