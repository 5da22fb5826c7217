"""What is not an image of floats in [0, 1] is refused, wherever it comes in."""

import copy
import re

import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import (
    ColorJitter,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
)

from tiny import COMMON, MODELS, QUIET, data_of

UNSIZED = {name: value for name, value in COMMON.items() if name != "image_size"}
IMAGENET = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
WANTED = re.escape("images must be (B, 3, height, width) of floats in [0, 1]")
both = pytest.mark.parametrize("name", MODELS)


@both
@pytest.mark.filterwarnings("ignore:.* can be exported to torch alone")
def test_pre_processor_that_resizes_otherwise_trains_and_scores(name, mvtec_root, dtd, tmp_path):
    bicubic = PreProcessor(Resize((64, 64), interpolation=InterpolationMode.BICUBIC))
    model = MODELS[name](**UNSIZED, dtd_dir=str(dtd), pre_processor=bicubic, visualizer=False)
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    engine.fit(model, datamodule=data_of(mvtec_root))
    [metrics] = engine.test(model, datamodule=data_of(mvtec_root), verbose=False)
    assert metrics["image_AUROC"] > 0.5


@both
@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_augmentations_that_leave_no_images_are_refused_before_any_is_read(stage, name, trained, mvtec_root, tmp_path):
    data = data_of(mvtec_root, **{f"{stage}_augmentations": Compose([ColorJitter(0.1), IMAGENET])})
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    model, use = (trained[name][0], engine.test) if stage == "test" else (MODELS[name](**COMMON), engine.fit)
    with pytest.raises(ValueError, match=rf"(?s)the {stage} augmentations .*{WANTED}"):
        use(model, datamodule=data)


class Own(Dataset):
    """Images of the user's own; number 1 is another."""

    def __init__(self, other):
        self.other, self.scale = other, 1

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = self.other.clone() if index == 1 else torch.rand(3, 64, 64)
        return ImageItem(image=self.scale * image, image_path=f"{index}.raw")


def with_pixel(value):
    image = torch.rand(3, 64, 64)
    image[1, 5, 7] = value
    return image


OTHERS = {
    "0..255": 255 * torch.rand(3, 64, 64),
    "normalised": IMAGENET(torch.rand(3, 64, 64)),
    "NaN": with_pixel(torch.nan),
    "one pixel above": with_pixel(1.3),
}


@both
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("use", ["fit", "validate", "test", "predict"])
def test_batch_that_holds_no_images_is_refused_by_the_name_of_the_first(use, other, name, trained, dtd, tmp_path):
    loader = DataLoader(Own(other), batch_size=2, collate_fn=ImageBatch.collate)
    new = MODELS[name](**COMMON, dtd_dir=str(dtd), **({"holdout_ratio": 0} if name == "Cse" else {}))
    fitted = copy.deepcopy(trained[name][0])
    model, argument = (new, "train_dataloaders") if use == "fit" else (fitted, "dataloaders")
    run = getattr(Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET), use)
    with pytest.raises(ValueError, match=rf"{WANTED}, 1\.raw has pixels"):
        run(model, **{argument: loader})


@both
def test_validation_that_holds_no_images_is_refused_before_training(name, dtd, tmp_path):
    class NoStep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pytest.fail("an image was read")

    good, bad = (DataLoader(Own(torch.rand(3, 64, 64)), collate_fn=ImageBatch.collate) for _ in range(2))
    bad.dataset.scale = 255
    model = MODELS[name](**COMMON, dtd_dir=str(dtd), **({"holdout_ratio": 0} if name == "Cse" else {}))
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, callbacks=[NoStep()], **QUIET)
    with pytest.raises(ValueError, match=rf"{WANTED}, 0\.raw has pixels"):
        engine.fit(model, train_dataloaders=good, val_dataloaders=bad)


@both
def test_batches_of_another_kind_are_refused(name, trained, tmp_path):
    loader = DataLoader(torch.rand(4, 3, 64, 64), batch_size=2)
    with pytest.raises(ValueError, match=r"dataloaders must give anomalib's ImageBatch, got Tensor"):
        Engine(default_root_dir=tmp_path, **QUIET).predict(trained[name][0], dataloaders=loader)


@both
@pytest.mark.parametrize("inference", [lambda model: model, lambda model: model.model], ids=["module", "torch model"])
@pytest.mark.parametrize(
    ("images", "found"),
    [
        (255 * torch.rand(2, 3, 64, 64), r"image 0 of the batch has pixels in \[0.\d+, 25\d(\.\d)?\]"),
        (IMAGENET(torch.rand(1, 3, 64, 64)), r"image 0 of the batch has pixels in \[-2.\d+, 2.\d+\]"),
        (torch.stack([torch.rand(3, 64, 64), with_pixel(torch.nan)]), "image 1 of the batch has pixels that are NaN"),
        ((255 * torch.rand(1, 3, 64, 64)).to(torch.uint8), "got torch.uint8"),
        (torch.ones(1, 3, 64, 64, dtype=torch.int64), "got torch.int64"),
        (torch.rand(1, 3, 64, 64).double(), "got torch.float64"),
        (torch.rand(1, 1, 64, 64), r"shape \(1, 1, 64, 64\): grey ones need three channels"),
        (torch.rand(1, 4, 64, 64), r"shape \(1, 4, 64, 64\)"),
        (torch.rand(0, 3, 64, 64), r"got none: shape \(0, 3, 64, 64\)"),
    ],
    ids=["0..255", "normalised", "NaN", "bytes", "whole", "double", "grey", "alpha", "none"],
)
def test_tensor_that_holds_no_images_is_refused(images, found, inference, name, trained):
    with pytest.raises(ValueError, match=rf"{WANTED}.*{found}"):
        inference(trained[name][0])(images)


@both
def test_single_image_is_refused_by_the_torch_model(name, trained):
    with pytest.raises(ValueError, match=rf"{WANTED}.*shape \(3, 64, 64\).* a single one images\[None\]"):
        trained[name][0].model(torch.rand(3, 64, 64))


@both
def test_black_and_white_images_have_scores(name, trained):
    for value in (0.0, 1.0):
        assert trained[name][0](torch.full((1, 3, 72, 96), value)).pred_score.isfinite().all()


@both
def test_image_that_gets_no_finite_score_is_an_error(name, trained, mvtec_root, tmp_path):
    model = copy.deepcopy(trained[name][0])
    model.backbone.std.zero_()
    with pytest.raises(ValueError, match=r"no finite score for \S*000\.png.*: the backbone's features of it are NaN"):
        Engine(default_root_dir=tmp_path, **QUIET).test(model, datamodule=data_of(mvtec_root), verbose=False)
