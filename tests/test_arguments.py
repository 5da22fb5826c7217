"""Arguments outside their range: the constructor says which, what is allowed and what it was given."""

import inspect
import math
import re

import pytest
import timm
import torch
from anomalib.pre_processing import PreProcessor
from safetensors.torch import save_file
from torchvision.transforms.v2 import CenterCrop, Compose, Identity, Resize

from anomalib_cse import AnomalySynthesis, Cse

from tiny import LINEAR, TINY

NAN, INF = math.nan, math.inf

OUT_OF_RANGE = {
    "backbone": ("no timm model", ["nope", None, 3, "swin_tiny_patch4_window7_224"]),
    "layers": (r"0\.\.4 or names", [(), 3, (2, 2), (-1, 2), (2, "blocks.2"), (2.0, 3), (True, 3), "blocks.2"]),
    "pre_trained": ("True or False", ["no", None]),
    "embedding_dim": (r"whole number in \[1, inf\)", [0, -1, 1.5, NAN, "8", True, None]),
    "embedder": ("'linear' or 'network'", ["cnn", None, 3]),
    "pool_size": (r"whole number in \[1, inf\)", [0, 1.5, NAN, "2", None]),
    "num_centres": (r"whole number in \[1, inf\)", [0, 1.5, NAN, "2", None]),
    "decoder": ("'random', 'joint', 'pretrained' or 'none'", ["frozen", None, ["random"]]),
    "contrast_weight": (r"number in \(0, inf\)", [0, -1.0, NAN, INF, "1", None]),
    "dtd_dir": ("'builtin' or a folder", ["", None, 3]),
    "download_dtd": ("True or False", ["yes", None]),
    "defects": ("some of", [[], "blur", None, 3, ["scratch"], ["blur", 3], ["blur", "blur"], [["blur"]]]),
    "batch_size": (r"whole number in \[1, inf\)", [0, -1, 1.5, NAN, INF, "4", None, True]),
    "learning_rate": (r"number in \(0, inf\)", [0, -1e-3, NAN, INF, "x", None]),
    "holdout_ratio": (r"number in \[0, 1\)", [-0.1, 1, 1.5, NAN, "x", None]),
    "image_size": (r"\(height, width\)", [(0, 64), (-1, 64), (64,), 64, (64, 64, 3), (64.5, 64), ("a", 64), ()]),
    "center_crop_size": (r"\(height, width\)|within image_size", [(0, 64), (64,), 32, (65, 64), (8, 64), (32.5, 32)]),
    "memory_budget": (r"whole number in \[0, inf\)", [-1, NAN, INF, "1", None, 1.5]),
    "half_precision_memory": ("True or False", ["x", None]),
    "seed": (r"whole number in \[0, 4294967296\)", [-1, 1.5, NAN, "a", 2**32]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, (allowed, values) in OUT_OF_RANGE.items() for value in values],
)
def test_cse_refuses(name, value, allowed):
    with pytest.raises(ValueError, match=allowed) as error:
        Cse(**{**TINY, name: value})
    assert name in str(error.value)
    assert (str(list(value)) if isinstance(value, tuple) else str(value)).strip("[]") in str(error.value)


def test_every_argument_of_cse_is_among_them():
    others = {"weights", "pre_processor", "post_processor", "evaluator", "visualizer"}  # below, and anomalib's own
    assert set(OUT_OF_RANGE) | others == set(inspect.signature(Cse).parameters)


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "pool_size": 1,
        "num_centres": 2,
        "decoder": "none",
        "contrast_weight": 1.0,
        "learning_rate": 1e-3,
        "holdout_ratio": 0,
    }.items(),
)
def test_the_linear_embedder_refuses_arguments_of_the_networks(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r} .* set embedder='network', or leave it out"):
        Cse(**{**LINEAR, name: value})


@pytest.mark.parametrize("transform", [None, Resize(64), Identity()])
def test_the_linear_embedder_needs_images_of_one_size(transform):
    options = {name: value for name, value in LINEAR.items() if name != "image_size"}
    with pytest.raises(ValueError, match="needs all images in one size: give image_size"):
        Cse(**options, pre_processor=PreProcessor(transform) if transform else False)
    model = Cse(**options, pre_processor=PreProcessor(Compose([Resize(96), CenterCrop((64, 80))])))
    assert model.model.image_size == (64, 80)


def test_an_image_smaller_than_the_stride():
    """Level 3 of the tiny backbone has stride 16: less would be a position that is mostly padding."""
    with pytest.raises(
        ValueError, match=r"image_size must .* at least 16, the stride of the coarsest layer, got \(15,"
    ):
        Cse(**{**TINY, "image_size": (15, 64)})
    with pytest.raises(ValueError, match=r"center_crop_size must .* at least 16, the stride of the coarsest layer"):
        Cse(**{**TINY, "center_crop_size": (16, 15)})
    Cse(**{**TINY, "image_size": (16, 16)})
    Cse(**{**TINY, "image_size": (8, 8), "layers": (0, 2)})


SYNTHESIS_OUT_OF_RANGE = {
    "textures": [None, torch.zeros(1, 3, 0, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)],
    "probability": [-0.1, 1.1, NAN, "x", None],
    "kinds": ["blur", [], ["scratch"], 3, None, {"blur": -1}, {"blur": 0}, {"blur": NAN}, {"blur": INF}],
    "generator": [3],
    "max_exponent": [-1, 6, 1.5, NAN],
    "mask_threshold": [-0.1, 0.8, NAN],
    "mask_angle": [-1, 181, NAN],
    "angle": [-1, 181, NAN],
    "grid": [0, 257, 1.5, NAN],
    "brightness": [(1,), 1.0, (-1, 1), (1, NAN), (0, 11), (1.2, 0.8), None],
    "offset": [-1, 2, NAN],
    "hue": [(-1, 1), (1, 20)],
    "saturation": [(-1, 1), (1, 20)],
    "shift": [-1, 2, NAN],
    "gamma": [(0, 1), (1, INF)],
    "sharpness": [(-1, 1), (1, 101)],
    "solarise": [(-0.1, 0.5), (0.5, 1.1)],
    "bits": [(0, 8), (1, 9), (1.5, 3)],
    "kernel_size": [(0, 3), (5, 33), (4, 4), (5.5, 7.5)],
    "sigma": [0, -1, NAN, INF],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in SYNTHESIS_OUT_OF_RANGE.items() for value in values]
)
def test_synthesis_refuses(name, value):
    textures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"^{name} must .*, got "):
        AnomalySynthesis(**{"textures": textures, name: value})


def test_every_argument_of_the_synthesis_is_among_them():
    assert set(SYNTHESIS_OUT_OF_RANGE) == set(inspect.signature(AnomalySynthesis).parameters)


def broken_weights(folder):
    """Files that are no weights of ``test_efficientnet``, by what is wrong with them."""
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


def test_weights_that_are_none_of_the_backbone(tmp_path):
    files = broken_weights(tmp_path)
    assert len(files) == 9
    for file in files:
        with pytest.raises(ValueError, match=f"weights: {re.escape(str(file))} "):
            Cse(**{**TINY, "pre_trained": True, "weights": file})
    for value in ("", 3):
        with pytest.raises(ValueError, match=r"weights must be a \.safetensors or \.pth file or None, got "):
            Cse(**{**TINY, "pre_trained": True, "weights": value})


def test_weights_of_cse_are_those_of_the_file(tmp_path):
    network = timm.create_model("test_efficientnet", pretrained=False)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    model = Cse(**{**TINY, "pre_trained": True, "weights": tmp_path / "model.safetensors"})
    assert torch.equal(model.model.backbone.net.conv_stem.weight, network.conv_stem.weight)
