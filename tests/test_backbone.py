import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage import data

from anomalib_cse.features import FrozenBackbone
from anomalib_cse.features.weights import lite0_state_dict

TINY = "test_efficientnet"


@pytest.mark.parametrize("architecture", [TINY, "mobilenetv3_small_050", "resnet10t"])
def test_features_are_timms_of_the_normalised_image_and_later_layers_are_cut_off(architecture):
    backbone = FrozenBackbone(architecture, (0, 2), pre_trained=False)
    whole = timm.create_model(architecture, pretrained=False, features_only=True).eval()
    whole.load_state_dict(backbone.net.state_dict(), strict=False)
    images = torch.rand(2, 3, 64, 64)
    config = timm.data.resolve_data_config({}, model=whole)
    mean, std = config["mean"], config["std"]
    levels = whole(torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1))
    for feature, expected, channels in zip(backbone(images), (levels[0], levels[2]), backbone.channels, strict=True):
        assert torch.allclose(feature, expected, atol=1e-5)
        assert feature.shape[1] == channels
    later = tuple(f"{name}." for name in whole.feature_info.module_name()[3:])
    assert not any(name.startswith(later) for name in backbone.net.state_dict())


TRANSFORMERS = ["test_vit", "test_vit3", "swin_tiny_patch4_window7_224"]  # class token, none, channels last


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_transformers_give_maps_of_any_block_for_images_of_any_size(architecture):
    backbone = FrozenBackbone(architecture, (0, 2), pre_trained=False)
    filled = torch.rand(1, 3, 64, 80)
    filled[:, :, 50:] = filled[:, :, 49:50]
    filled[..., 75:] = filled[..., 74:75]
    whole = timm.create_model(architecture, features_only=True, out_indices=(0, 2), dynamic_img_size=True).eval()
    whole.load_state_dict(backbone.net.state_dict())
    expected = whole((filled - backbone.mean) / backbone.std)
    for found, level, channels in zip(backbone(filled[..., :50, :75]), expected, backbone.channels, strict=True):
        maps = level.movedim(-1, 1) if level.shape[-1] == channels else level
        assert torch.allclose(found, maps, atol=1e-5)


def test_positions_resampled_once_are_those_resampled_for_every_image():
    backbone = FrozenBackbone("test_vit", (3,), pre_trained=False)
    images = torch.rand(1, 3, 70, 100)
    [expected] = backbone(images)
    backbone.fit_to((70, 100))
    assert backbone.net.model.pos_embed.shape[1] == 1 + 5 * 7  # a class token, and patches of 16 pixels
    assert torch.allclose(backbone(images)[0], expected, atol=1e-5)


def test_a_network_of_one_image_size_says_so():
    assert FrozenBackbone("beit_base_patch16_224", (0,), pre_trained=False).only_size == (224, 224)
    assert FrozenBackbone("test_vit", (0,), pre_trained=False).only_size is None


def test_frozen_in_training_mode():
    backbone = FrozenBackbone(TINY, pre_trained=False).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = backbone(torch.rand(4, 3, 64, 64))
    assert not any(feature.requires_grad for feature in features)
    assert not any(module.training for module in backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_layers_by_name_and_number_are_sorted():
    assert FrozenBackbone(TINY, (4, 3), pre_trained=False).levels == [3, 4]
    assert FrozenBackbone(TINY, ("blocks.4", "blocks.2"), pre_trained=False).levels == [2, 4]


def test_layers_of_a_network_that_takes_weights_to_be_described_leave_random_numbers_alone(monkeypatch):
    """regnetx_002 with torch 2.10, whose ``unique`` has no shape without values; timm's function is replaced."""
    create = timm.create_model

    def without_meta(*arguments, **options):
        if torch.get_default_device().type == "meta":
            raise NotImplementedError
        return create(*arguments, **options)

    torch.manual_seed(1)
    expected = FrozenBackbone(TINY, ("blocks.2",), pre_trained=False).state_dict()
    monkeypatch.setattr(timm, "create_model", without_meta)
    torch.manual_seed(1)
    found = FrozenBackbone(TINY, ("blocks.2",), pre_trained=False).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("architecture", [TINY, "test_convnext", "test_resnet"])
def test_weights_come_from_a_file_or_a_folder(architecture, tmp_path):
    source = timm.create_model(architecture, pretrained=False)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    torch.save(source.state_dict(), tmp_path / "model.pth")
    timm.models.save_for_hf(source, tmp_path / "folder")
    images = torch.rand(1, 3, 64, 64)
    expected = source.eval().forward_intermediates(images, intermediates_only=True, norm=False)[-1]
    for arguments in (
        {"name": architecture, "weights": tmp_path / "model.safetensors"},
        {"name": architecture, "weights": tmp_path / "model.pth"},
        {"name": f"local-dir:{tmp_path / 'folder'}"},
    ):
        backbone = FrozenBackbone(**arguments, layers=(len(source.feature_info) - 1,))
        assert torch.allclose(backbone.net(images)[-1], expected, atol=1e-5)


def test_names_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'cientnet_b3' is no timm model.*similar names: efficientnet_b3"):
        FrozenBackbone("cientnet_b3")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        FrozenBackbone(f"local-dir:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist"):
        FrozenBackbone(TINY, weights=tmp_path / "nothing.pth")


def test_weights_of_something_else_and_two_sources_are_refused(tmp_path):
    source = timm.create_model(TINY, pretrained=False)
    file = tmp_path / "x.safetensors"
    save_file({f"model.{name}": value for name, value in source.state_dict().items()}, file)
    with pytest.raises(ValueError, match="not both"):
        FrozenBackbone(TINY, pre_trained=False, weights=file)
    with pytest.raises(ValueError, match="two sources of weights"):
        FrozenBackbone("pypi:tf_efficientnet_lite0", weights=file)
    with pytest.raises(ValueError, match=r"x\.safetensors is not of this backbone"):
        FrozenBackbone(TINY, weights=file)
    timm.models.save_for_hf(source, tmp_path / "folder")
    file.replace(tmp_path / "folder" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not of this backbone"):
        FrozenBackbone(f"local-dir:{tmp_path / 'folder'}")


def test_a_hub_out_of_reach_is_an_error_that_names_three_other_ways_and_cached_weights_do_without(tmp_path):
    """At once: huggingface_hub would ask five times and wait."""
    cached = tmp_path / "hub" / "models--timm--test_efficientnet.r160_in1k"
    timm.models.save_for_hf(timm.create_model(TINY), cached / "snapshots" / "0", safe_serialization=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    code = """
import sys, torch
from safetensors.torch import load_file
from anomalib_cse.features import FrozenBackbone
for name in ("efficientnet_b3", "hf-hub:timm/efficientnet_b3.ra2_in1k"):
    try:
        FrozenBackbone(name)
    except ConnectionError as error:
        print(str(error).replace("\\n", " "))
stem = FrozenBackbone("test_efficientnet", layers=(2, 3)).net.conv_stem.weight
print(torch.equal(stem, load_file(sys.argv[1])["conv_stem.weight"]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, cached / "snapshots" / "0" / "model.safetensors"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr
    *messages, is_cached = run.stdout.splitlines()
    assert len(messages) == 2
    for way in ("local-dir:FOLDER", 'weights="FILE"', "pypi:tf_efficientnet_lite0"):
        assert all(way in message for message in messages)
    assert is_cached == "True"
    assert "Retry" not in run.stderr


def test_lite0_from_pypi_gives_the_known_logits():
    """The five largest of timm's own ``tf_efficientnet_lite0.in1k`` for scikit-image's photograph of a cat."""
    photograph = torch.from_numpy(data.chelsea()[20:276, 100:356]).permute(2, 0, 1)[None] / 255
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    missing, unexpected = classifier.load_state_dict(lite0_state_dict(), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert not unexpected
    with torch.no_grad():
        logits, classes = classifier((photograph - 0.5) / 0.5)[0].topk(5)
    assert classes.tolist() == [282, 285, 281, 287, 284]  # tiger cat, Egyptian cat, tabby, lynx, Siamese cat
    assert logits.tolist() == pytest.approx([8.2077, 8.0314, 7.0195, 4.9575, 3.4911], abs=1e-3)
    backbone = FrozenBackbone("pypi:tf_efficientnet_lite0")
    assert torch.equal(backbone.net.conv_stem.weight, classifier.conv_stem.weight)
    assert torch.equal(backbone.net.blocks[6][0].bn3.running_var, classifier.blocks[6][0].bn3.running_var)
