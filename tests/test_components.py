"""anomalib's components of a user's own: with them a model trains, is loaded and is exported, or refuses before."""

import copy
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from anomalib.metrics import Evaluator, F1Score
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, GaussianBlur, InterpolationMode, Pad, Resize

from anomalib_cse.deployment.post_processing import MidwayPostProcessor
from anomalib_cse.deployment.visualizer import WholeImageVisualizer

from tiny import COMMON, MODELS, QUIET, data_of

UNSIZED = {name: value for name, value in COMMON.items() if name != "image_size"}
both = pytest.mark.parametrize("name", MODELS)


def engine(folder, **options):
    return Engine(**{"max_epochs": 1, "default_root_dir": folder, **QUIET, **options})


def scores(batches):
    return torch.cat([batch.pred_score for batch in batches])


@both
@pytest.mark.parametrize("first", [CenterCrop(50), Pad(20), GaussianBlur(9, 4.0)], ids=["crop", "pad", "blur"])
def test_pre_processor_that_does_not_resize_first_is_refused(first, name):
    """anomalib's datamodules resize first."""
    resize = Resize((64, 64))
    with pytest.raises(ValueError, match="Resize must come first in the pre_processor's transform"):
        MODELS[name](**UNSIZED, pre_processor=PreProcessor(Compose([first, resize])))
    MODELS[name](**UNSIZED, pre_processor=PreProcessor(Compose([resize, first])))
    MODELS[name](**UNSIZED, pre_processor=PreProcessor(CenterCrop(64)))  # nothing to resize


@both
def test_transform_that_anomalib_does_not_keep_is_to_be_given_again(name, dtd, mvtec_root, tmp_path):
    def model(**options):
        return MODELS[name](**UNSIZED, dtd_dir=str(dtd), **options)

    def own(width):
        return PreProcessor(Compose([Resize((64, 64)), GaussianBlur(width, 1.0)]))

    trained, run, images = model(pre_processor=own(3)), engine(tmp_path), mvtec_root / "tiny" / "test"
    run.fit(trained, datamodule=data_of(mvtec_root))
    path, expected = run.best_model_path, scores(run.predict(trained, data_path=images))
    same = model(pre_processor=own(3))
    assert torch.equal(scores(engine(tmp_path).predict(same, data_path=images, ckpt_path=path)), expected)
    loaded = MODELS[name].load_from_checkpoint(path, pre_processor=own(3))
    assert torch.equal(scores(engine(tmp_path).predict(loaded, data_path=images)), expected)
    for options in ({}, {"pre_processor": own(5)}):
        with pytest.raises(ValueError, match=r"(?s)give the pre_processor of the run, with .*GaussianBlur.*3, 3"):
            engine(tmp_path).predict(model(**options), data_path=images, ckpt_path=path)
        with pytest.raises(ValueError, match="does not keep this transform in checkpoints"):
            MODELS[name].load_from_checkpoint(path, **options)


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
    network = onnx.load(run.export(model, "onnx", export_root=tmp_path))
    assert [output.name for output in network.graph.output] == ["pred_score", "anomaly_map"]
    engine(tmp_path).validate(model, datamodule=data)
    [metrics] = engine(tmp_path).test(model, datamodule=data, verbose=False)
    assert metrics["image_F1Score"] == 1
    network = onnx.load(engine(tmp_path).export(model, "onnx", export_root=tmp_path))
    assert {output.name for output in network.graph.output} >= {"pred_label", "pred_mask"}


@both
@pytest.mark.parametrize(
    ("metrics", "options", "missing"),
    [
        ({"val_metrics": [F1Score(["pred_label", "gt_label"])]}, {}, "val metric F1Score is of pred_label"),
        ({"test_metrics": [F1Score(["pred_mask", "gt_mask"])]}, {"limit_val_batches": 0}, "test metric .* pred_mask"),
    ],
    ids=["label", "mask"],
)
def test_metrics_that_cannot_be_had_are_refused_before_training(metrics, options, missing, name, mvtec_root, tmp_path):
    model = MODELS[name](**COMMON, evaluator=Evaluator(**copy.deepcopy(metrics)))
    with pytest.raises(ValueError, match=rf"the evaluator's {missing}, which there will not be: .* strict=False"):
        engine(tmp_path, **options).fit(model, datamodule=data_of(mvtec_root))
    for metric in (*model.evaluator.val_metrics, *model.evaluator.test_metrics):
        metric.strict = False
    engine(tmp_path, fast_dev_run=True).fit(model, datamodule=data_of(mvtec_root))


@pytest.mark.parametrize(("size", "crop"), [((64, 64), (32, 32)), ((64, 48), (33, 40))], ids=str)
def test_map_of_a_centre_crop_is_drawn_where_it_belongs(size, crop, tmp_path):
    """anomalib draws the same of maps of the whole image."""
    options = {"fields": ["image", "gt_mask"], "field_size": size[::-1], "text_config": {"enable": False}}
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    centre = 0.1 + 0.9 * torch.rand(crop)
    centre[0, 0] = 0.1  # the least, as outside
    inside = CenterCrop(crop)(torch.arange(size[0] * size[1]).view(1, *size)).flatten()
    whole = torch.full((size[0] * size[1],), 0.1)
    whole[inside] = centre.flatten()
    model = MODELS["Cse"](**{**COMMON, "image_size": size}, center_crop_size=crop)
    pictures = []
    for visualizer, anomaly_map in ((WholeImageVisualizer, centre), (ImageVisualizer, whole.view(size))):
        trainer = SimpleNamespace(default_root_dir=tmp_path / visualizer.__name__)
        maps = anomaly_map[None]
        batch = ImageBatch(
            image=torch.zeros(1, 3, *maps.shape[1:]),
            image_path=[str(path)],
            anomaly_map=maps,
            gt_mask=maps > 0.9,
            pred_mask=maps > 0.6,
        )
        visualizer(**options).on_predict_batch_end(trainer, model, None, batch, 0)
        [file] = (tmp_path / visualizer.__name__).rglob("*.png")
        pictures.append(np.asarray(Image.open(file)))
    assert np.array_equal(*pictures)
    assert type(model.visualizer) is WholeImageVisualizer
