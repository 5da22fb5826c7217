"""Regions of interest: what lies outside changes nothing, in the engine and in exported files."""

import copy

import cv2
import numpy as np
import openvino
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from onnxruntime import InferenceSession
from torch.nn import functional as F
from torch.utils.data import DataLoader

from anomalib_cse import CseGaussian
from anomalib_cse.cse_gaussian.torch_model import image_score

from tiny import COMMON, QUIET, data_of

LEFT, SQUARE = (
    (slice(None), slice(0, 24)),
    (slice(8, 60), slice(20, 80)),
)  # of 72x96 pixels; defects are in SQUARE alone


def mask(path, *parts):
    """A mask of images of 72x96 pixels, bright in the parts."""
    image = np.zeros((72, 96), np.uint8)
    for part in parts:
        image[part] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    return path


def fitted(roi, root, dtd, results, **options):
    model = CseGaussian(**{**COMMON, "dtd_dir": str(dtd), **options}, roi=roi)
    engine = Engine(default_root_dir=results, **QUIET)
    engine.fit(model, datamodule=data_of(root))
    return model, engine


def scores_of(engine, model, path, **options):
    loader = DataLoader(PredictDataset(path), batch_size=8, collate_fn=PredictDataset(path).collate_fn)
    return torch.cat([batch.pred_score for batch in engine.predict(model, dataloaders=loader, **options)])


@pytest.fixture(scope="session")
def regions(mvtec_root, dtd, tmp_path_factory):
    """Models with the defects inside and outside, and their engines."""
    folder = tmp_path_factory.mktemp("regions")
    masks = {"hides": mask(folder / "left.png", LEFT), "shows": mask(folder / "square.png", SQUARE)}
    return {name: fitted(roi, mvtec_root, dtd, folder / name) for name, roi in masks.items()}


def outside_changed(images, inside):
    """The images, with noise outside."""
    return torch.where(inside, images, torch.rand(images.shape, generator=torch.Generator().manual_seed(3)))


def test_the_score_is_of_the_largest_half_per_cent_of_the_positions_inside():
    maps, inside = torch.rand(3, 1, 40, 30), torch.rand(3, 1, 40, 30) < torch.tensor([0.9, 0.3, 0.01]).view(3, 1, 1, 1)
    expected = []
    for image, there in zip(maps, inside, strict=True):
        values = sorted(image[there].tolist())
        expected.append(np.mean(values[-max(1, round(len(values) / 200)) :]))
    assert image_score(maps, inside).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("name", "is_found"), [("hides", False), ("shows", True)])
def test_a_region_hides_defects_or_shows_them(name, is_found, regions, mvtec_root):
    model, engine = regions[name]
    [metrics] = engine.test(model, datamodule=data_of(mvtec_root), verbose=False)
    assert (metrics["image_AUROC"] == 1) is is_found
    good, bad = (scores_of(engine, model, mvtec_root / "tiny" / "test" / kind) for kind in ("good", "square"))
    assert bool((bad > good.max()).all()) is is_found


def test_what_lies_outside_changes_neither_score_nor_map_in_any_runtime(regions, tmp_path):
    model, engine = regions["shows"]
    images = torch.rand(2, 3, 64, 64)
    inside = model.model.roi[None, None]
    assert inside.any()
    others = outside_changed(images, inside)
    network = {kind: engine.export(model, kind, export_root=tmp_path) for kind in ("onnx", "openvino")}
    session = InferenceSession(network["onnx"])
    compiled = openvino.Core().compile_model(network["openvino"], "CPU")
    names = [output.name for output in session.get_outputs()]
    with torch.no_grad():
        expected = model(images)
    for given in (images, others):
        in_onnx = dict(zip(names, session.run(None, {"input": given.numpy()}), strict=True))
        in_openvino = {key.any_name: value for key, value in compiled(given.numpy()).items()}
        with torch.no_grad():
            in_torch = {key: value for key, value in model(given)._asdict().items() if value is not None}
        for found, tolerance in ((in_torch, 0), (in_onnx, 1e-4), (in_openvino, 1e-4)):
            for field in ("pred_score", "anomaly_map"):
                wanted = getattr(expected, field).numpy()
                assert np.abs(np.asarray(found[field]).reshape(wanted.shape) - wanted).max() <= tolerance
    outside = ~inside.expand(2, -1, -1, -1)
    raw = model.model(images).anomaly_map
    assert (raw[outside] == 0).all()
    assert (raw[~outside] > 0).all()


def test_what_lies_outside_trains_nothing(mvtec_root, dtd, tmp_path):
    roi = mask(tmp_path / "roi.png", SQUARE)
    noise, rng = tmp_path / "noise" / "tiny", np.random.default_rng(7)
    for file in sorted((mvtec_root / "tiny").rglob("*.png")):
        copied = noise / file.relative_to(mvtec_root / "tiny")
        copied.parent.mkdir(parents=True, exist_ok=True)
        image = cv2.imread(str(file))
        if "ground_truth" not in file.parts:
            shown = np.zeros(image.shape[:2], bool)
            # a pixel more all around: resizing mixes neighbours
            shown[SQUARE] = True
            image = np.where(shown[..., None], image, rng.integers(0, 256, image.shape, dtype=np.uint8))
        cv2.imwrite(str(copied), image)
    states = [fitted(roi, root, dtd, tmp_path / "out")[0].state_dict() for root in (mvtec_root, noise.parent)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.allclose(states[0][name], states[1][name], equal_nan=True) for name in states[0])


def test_a_mask_of_another_size_is_resized(mvtec_root, dtd, tmp_path, regions):
    image = cv2.imread(str(mask(tmp_path / "square.png", SQUARE)))[..., 0].repeat(3, axis=0).repeat(3, axis=1)
    cv2.imwrite(str(tmp_path / "large.png"), image)
    found = CseGaussian(**COMMON, dtd_dir=str(dtd), roi=tmp_path / "large.png").model.roi
    [[expected]] = F.interpolate(torch.from_numpy(image / 255)[None, None], (64, 64), mode="bilinear", antialias=True)
    assert torch.equal(found, expected > 0.999)
    assert (found != regions["shows"][0].model.roi).sum() <= 2 * (32 + 40)  # at its border alone


def test_a_crop_is_of_the_mask_too(dtd, tmp_path):
    roi = mask(tmp_path / "roi.png", SQUARE)
    whole = CseGaussian(**COMMON, dtd_dir=str(dtd), roi=roi).model.roi
    cropped = CseGaussian(**COMMON, dtd_dir=str(dtd), roi=roi, center_crop_size=(48, 40)).model.roi
    assert torch.equal(cropped, whole[8:56, 12:52])


def test_checkpoints_keep_the_region(regions, trained, mvtec_root, dtd, tmp_path):
    model, engine = regions["hides"]
    path, files = engine.best_model_path, mvtec_root / "tiny" / "test" / "square"
    expected = scores_of(engine, model, files)
    again = CseGaussian.load_from_checkpoint(path)
    assert torch.equal(scores_of(Engine(default_root_dir=tmp_path, **QUIET), again, files), expected)
    same = CseGaussian(**COMMON, dtd_dir=str(dtd), roi=mask(tmp_path / "left.png", LEFT))
    assert torch.equal(scores_of(Engine(default_root_dir=tmp_path, **QUIET), same, files, ckpt_path=path), expected)
    other = mask(tmp_path / "other.png", SQUARE)
    for checkpoint, wants in ((path, "one region"), (trained["CseGaussian"][1], "no region")):
        wrong = CseGaussian(**COMMON, dtd_dir=str(dtd), roi=other)
        with pytest.raises(ValueError, match=f"the checkpoint is of {wants}.* the model was given another roi"):
            scores_of(Engine(default_root_dir=tmp_path, **QUIET), wrong, files, ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("roi", "error", "message"),
    [
        (
            "nowhere.png",
            FileNotFoundError,
            "roi: .*nowhere.png does not exist: give a mask image, bright where to look",
        ),
        ("", ValueError, "roi must be a mask image, got ''"),
        (7, ValueError, "roi must be a mask image, got 7"),
        ("text.png", ValueError, "text.png cannot be read as an image"),
        ("black.png", ValueError, "roi: .*black.png is black, so there is nowhere to look"),
        ("clear.png", ValueError, "roi: .*clear.png has transparency"),
        ("masks", ValueError, "roi: masks is a folder: give one mask image"),
        ("dot.png", ValueError, r"roi: nothing is left of .*dot.png at \(64, 64\) pixels"),
    ],
)
def test_wrong_regions_are_refused(roi, error, message, tmp_path, dtd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    mask(tmp_path / "black.png")
    cv2.imwrite(str(tmp_path / "clear.png"), np.full((9, 9, 4), 255, np.uint8))
    mask(tmp_path / "masks" / "0.png", SQUARE)
    mask(tmp_path / "dot.png", (slice(5, 6), slice(5, 6)))
    with pytest.raises(error, match=message):
        CseGaussian(**COMMON, dtd_dir=str(dtd), roi=roi)


def test_too_narrow_a_region_is_refused_before_anything_is_fitted(mvtec_root, dtd, tmp_path):
    line = mask(tmp_path / "line.png", (slice(30, 33), slice(None)))
    with pytest.raises(ValueError, match=r"the region of interest \(roi\) is too narrow: no position of the map"):
        fitted(line, mvtec_root, dtd, tmp_path)


def test_a_region_on_its_own_torch_model_is_that_of_the_call(regions):
    network = copy.deepcopy(regions["shows"][0].model)
    images, inside = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    inside[0, :, :32], inside[1, :, :, 20:] = True, True
    with torch.no_grad():
        found = network(images, inside)
        for number in range(2):
            network.roi.copy_(inside[number, 0])
            alone = network(images[number : number + 1])
            assert torch.allclose(found.anomaly_map[number], alone.anomaly_map[0])
            assert torch.allclose(found.pred_score[number], alone.pred_score[0])
