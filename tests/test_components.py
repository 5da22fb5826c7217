"""anomalib's components of a user's own: with them a model trains, is loaded and is exported, or refuses before."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.metrics import Evaluator, F1Score
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from PIL import Image, ImageColor
from torchvision.transforms.v2 import (
    CenterCrop,
    Compose,
    GaussianBlur,
    Grayscale,
    InterpolationMode,
    Normalize,
    Pad,
    Resize,
)
from torchvision.transforms.v2.functional import resize

from anomalib_cse.deployment.post_processing import MidwayPostProcessor
from anomalib_cse.deployment.visualizer import ACCEPTED, GAP, OUTLINE, REJECTED

from tiny import COMMON, MODELS, QUIET, data_of

UNSIZED = {name: value for name, value in COMMON.items() if name != "image_size"}
both = pytest.mark.parametrize("name", MODELS)


def engine(folder, **options):
    return Engine(**{"max_epochs": 1, "default_root_dir": folder, **QUIET, **options})


def scores(batches):
    return torch.cat([batch.pred_score for batch in batches])


@both
@pytest.mark.parametrize(
    "transform",
    [
        Compose([CenterCrop(50), Resize((64, 64))]),  # anomalib's datamodules resize first
        Compose([Resize((64, 64)), Pad(2)]),
        Compose([Resize((64, 64)), GaussianBlur(3)]),  # which anomalib does not keep in checkpoints
        Compose([Resize((64, 64)), CenterCrop(48), Normalize([0.0] * 3, [1.2] * 3)]),
        Grayscale(3),
    ],
    ids=["crop", "pad", "blur", "normalize", "grey"],
)
def test_transform_other_than_resize_and_crop_is_refused_by_name(transform, name):
    kinds = ", ".join(type(step).__name__ for step in getattr(transform, "transforms", [transform]))
    with pytest.raises(ValueError, match=rf"transform must be Resize of torchvision.*CenterCrop .*, got {kinds}$"):
        MODELS[name](**UNSIZED, pre_processor=PreProcessor(transform))


def test_checkpoint_of_a_transform_that_is_not_taken_any_more_is_refused(trained, tmp_path):
    checkpoint = torch.load(trained["CseGaussian"][1], weights_only=False)
    checkpoint["pre_processor_transform"] = {"name": "GaussianBlur(3)", "gives": [0.0]}
    checkpoint["anomalib_pre_processor_config"]["transform"] = None
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"the checkpoint is of GaussianBlur\(3\), which is not taken any more"):
        MODELS["CseGaussian"].load_from_checkpoint(tmp_path / "old.ckpt")


@both
def test_resizing_that_cannot_be_exported_is_warned_of_before_training(name, dtd, mvtec_root, tmp_path):
    bicubic = PreProcessor(Resize((64, 64), interpolation=InterpolationMode.BICUBIC))
    model = MODELS[name](**UNSIZED, dtd_dir=str(dtd), pre_processor=bicubic)
    with pytest.warns(UserWarning, match=r"can be exported to torch alone: export needs Resize\(\(height, width\)\)"):
        engine(tmp_path, fast_dev_run=True).fit(model, datamodule=data_of(mvtec_root))


@both
def test_settings_of_a_post_processor_that_a_checkpoint_overrules_are_refused(name, trained, mvtec_root, tmp_path):
    path, images = trained[name][1], mvtec_root / "tiny" / "test"
    for settings in ({"image_sensitivity": 0.95}, {"enable_normalization": False}):
        [(setting, value)] = settings.items()
        wrong = (
            rf"post_processor was given {setting}={value}, but .* of the checkpoint .* model.post_processor.{setting}"
        )
        with pytest.raises(ValueError, match=wrong):
            MODELS[name].load_from_checkpoint(path, post_processor=MidwayPostProcessor(**settings))
        model = MODELS[name](**COMMON, post_processor=PostProcessor(**settings))
        with pytest.raises(ValueError, match=wrong):
            engine(tmp_path).predict(model, data_path=images, ckpt_path=path)
    model = MODELS[name].load_from_checkpoint(path, post_processor=MidwayPostProcessor())
    model.post_processor.image_sensitivity = 0.0  # which calls nothing anomalous
    assert not any(batch.pred_label.any() for batch in engine(tmp_path).predict(model, data_path=images))


@both
def test_without_validation_there_are_scores_but_no_labels(name, dtd, mvtec_root, tmp_path):
    model, data = MODELS[name](**COMMON, dtd_dir=str(dtd)), data_of(mvtec_root)
    run = engine(tmp_path, limit_val_batches=0)
    run.fit(model, datamodule=data)
    [metrics] = run.test(model, datamodule=data, verbose=False)
    assert set(metrics) == {"image_AUROC", "pixel_AUROC"}
    for batch in run.predict(model, data_path=mvtec_root / "tiny" / "test"):
        assert batch.pred_label is None
        assert batch.pred_mask is None
        assert batch.pred_score.isfinite().all()
    engine(tmp_path).validate(model, datamodule=data)
    [metrics] = engine(tmp_path).test(model, datamodule=data, verbose=False)
    assert metrics["image_F1Score"] == 1


def metric(fields, strict=True):
    return F1Score(fields, strict=strict)


@both
def test_metrics_that_cannot_be_had_are_refused_before_training(name, dtd, mvtec_root, tmp_path):
    def fit(**metrics):
        model = MODELS[name](**COMMON, dtd_dir=str(dtd), evaluator=Evaluator(**metrics), **options)
        run = engine(tmp_path, **trainer)
        run.fit(model, datamodule=data)
        return run.test(model, datamodule=data, verbose=False)

    def folder(**masks):
        tiny = mvtec_root / "tiny" / "test"
        return Folder("tiny", root=tiny, normal_dir="good", abnormal_dir="square", num_workers=0, **masks)

    label, mask = ["pred_label", "gt_label"], ["pred_mask", "gt_mask"]
    data, options, trainer = data_of(mvtec_root), {}, {}
    with pytest.raises(
        ValueError, match="the evaluator's val metric F1Score is of pred_label, which there will not be"
    ):
        fit(val_metrics=[metric(label)])
    assert fit(val_metrics=[metric(label, strict=False)], test_metrics=[metric(label)]) == [{"F1Score": 1}]
    trainer = {"limit_val_batches": 0}
    with (
        pytest.warns(UserWarning, match="the evaluator's test metric F1Score is of pred_mask, which"),
        pytest.raises(ValueError, match="the evaluator's test metric F1Score is of pred_mask, which"),
    ):
        fit(test_metrics=[metric(mask)])
    options = {"post_processor": PostProcessor()}  # which gives labels whatever has been validated
    assert fit(test_metrics=[metric(label)])[0].keys() == {"F1Score"}
    data = folder()
    with (
        pytest.warns(UserWarning, match="the evaluator's test metric F1Score is of gt_mask, which"),
        pytest.raises(ValueError, match="the evaluator's test metric F1Score is of gt_mask, which"),
    ):
        fit(test_metrics=[metric(mask)])


@pytest.mark.parametrize(("size", "crop"), [((64, 64), (32, 32)), ((64, 48), (33, 40))], ids=str)
def test_map_of_a_centre_crop_is_drawn_where_it_belongs(size, crop, tmp_path):
    """The same is drawn of maps of the whole image."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, *size, 3), dtype=np.uint8)
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    least = torch.tensor([0.1, 0.3])[:, None]  # of each image, and outside
    centre = least[..., None] + 0.5 * torch.rand(2, *crop)
    centre[:, :1, :1] = least[..., None]
    inside = CenterCrop(crop)(torch.arange(size[0] * size[1]).view(1, *size)).flatten()
    whole = least.repeat(1, size[0] * size[1])
    whole[:, inside] = centre.flatten(1)
    pictures = []
    for cropped, maps in ((True, centre), (False, whole.view(2, *size))):
        model = MODELS["Cse"](**{**COMMON, "image_size": size}, center_crop_size=crop if cropped else None)
        model.post_processor.get_buffer("_pixel_threshold").fill_(1.0)
        trainer = SimpleNamespace(default_root_dir=tmp_path / str(cropped))
        batch = ImageBatch(
            image=torch.zeros(2, 3, *crop) if cropped else torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255,
            image_path=paths,
            anomaly_map=maps,
            gt_mask=maps > 0.5,
            pred_mask=maps > 0.4,
            pred_score=torch.ones(2),
        )
        model.visualizer.on_predict_batch_end(trainer, model, None, batch, 0)
        files = sorted((tmp_path / str(cropped)).rglob("*.jpg"))
        assert [file.name for file in files] == ["0.png.jpg", "1.png.jpg"]
        pictures.append(np.stack([np.asarray(Image.open(file)) for file in files]))
    assert np.array_equal(*pictures)


def test_picture_says_what_the_model_said(trained, mvtec_root, tmp_path):
    """The frame tells rejected images; an outline is there with a pixel threshold alone, and lies within the mask."""
    for has_pixel_threshold in (True, False):
        model = MODELS["CseGaussian"].load_from_checkpoint(trained["CseGaussian"][1])
        if not has_pixel_threshold:
            model.post_processor.get_buffer("_pixel_threshold").fill_(torch.nan)
        folder = tmp_path / str(has_pixel_threshold)
        engine = Engine(default_root_dir=folder, **QUIET)
        predictions = engine.predict(model, data_path=mvtec_root / "tiny" / "test")
        for item in (item for batch in predictions for item in batch):
            [file] = folder.rglob(f"{Path(item.image_path).parent.name}/{Path(item.image_path).name}.jpg")
            picture = np.asarray(Image.open(file)).astype(int)
            colour = np.array(ImageColor.getrgb((REJECTED if item.pred_label else ACCEPTED)[0]))
            assert np.abs(picture[-3:, 2:-2] - colour).max() < 20
            side, panels = 256, 3 if has_pixel_threshold else 2
            assert picture.shape[1] == panels * (side + GAP) + GAP
            if has_pixel_threshold:
                found = picture[-side - GAP : -GAP, -side - GAP : -GAP]
                mask = resize(item.pred_mask.reshape(1, 64, 64).float(), [side, side])[0].numpy() > 0.5
                bright = (np.abs(found - OUTLINE).max(axis=-1) < 40) & ~mask
                assert bright.sum() <= 0.02 * side * side  # outside it JPEG alone
                assert (np.abs(found - OUTLINE).max(axis=-1) < 90)[mask].any() == mask.any()
