import pytest
import torch
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_cse.pre_processing import ExactPreProcessor, ExactResize, exportable


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (300, 517), (1024, 1024), (2000, 600), (7, 1000), (1, 1)])
@pytest.mark.parametrize("target", [(256, 256), (31, 40)])
def test_resize_equals_torchvisions(size, target):
    images = torch.rand(2, 3, *size)
    expected = Resize(target, antialias=True)(images)
    assert torch.allclose(ExactResize(target)(images), expected, atol=1e-5)


def test_exported_transform_equals_the_original_where_anomalibs_does_not():
    transform = Compose([Resize((64, 64), antialias=True), CenterCrop((48, 40)), Normalize([0.5] * 3, [0.2] * 3)])
    images = torch.rand(2, 3, 200, 150)
    expected = transform(images)
    assert torch.allclose(exportable(transform)(images), expected, atol=1e-5)
    assert torch.equal(ExactPreProcessor(transform)(images), expected)
    assert (PreProcessor(transform)(images) - expected).abs().max() > 0.1


def test_exported_transform_is_restored_from_a_checkpoint():
    saved = ExactPreProcessor(Resize((64, 48), antialias=True)).checkpoint_config()
    restored = ExactPreProcessor(Resize((32, 32), antialias=True))
    restored.load_checkpoint_config(saved)
    images = torch.rand(1, 3, 100, 100)
    expected = Resize((64, 48), antialias=True)(images)
    assert torch.equal(restored(images), expected)
    assert torch.allclose(torch.export.export(restored, (images,)).module()(images), expected, atol=1e-5)


@pytest.mark.parametrize("resize", [Resize(64, antialias=True), Resize((64, 64), antialias=False)])
def test_a_resize_that_cannot_be_exported_exactly_is_refused(resize):
    with pytest.raises(ValueError, match="bilinear and antialiased"):
        ExactPreProcessor(resize)
    restored = ExactPreProcessor()
    restored.load_checkpoint_config(PreProcessor(resize).checkpoint_config())  # to score with, not to export
    images = torch.rand(1, 3, 100, 100)
    assert torch.equal(restored(images), resize(images))
    with pytest.raises(ValueError, match="bilinear and antialiased"):
        torch.export.export(restored, (images,))
