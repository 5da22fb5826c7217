"""Strips and images of several sizes: fitted, scored, exported and drawn as they are, in bounded memory."""

from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import openvino
import pytest
import timm
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from onnxruntime import InferenceSession
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from anomalib_cse import CseGaussian, CseGaussianModel
from anomalib_cse.cse_gaussian.fit import distances
from anomalib_cse.cse_gaussian.sample import PIXELS, SampledBatch, TrainingSample, in_passes
from anomalib_cse.cse_gaussian.torch_model import from_border
from anomalib_cse.deployment.visualizer import CAPTION, GAP, TITLE
from anomalib_cse.features import FrozenBackbone
from anomalib_cse.report.pictures import Pictures, folded

from tiny import COMMON, QUIET

SIZES = [(48, 320), (56, 120), (101, 67)]  # strips, and what no stride divides
NATIVE = {**COMMON, "image_size": None, "pre_processor": False}


@pytest.fixture(scope="session")
def strips(tmp_path_factory):
    return strips_of(SIZES, tmp_path_factory.mktemp("strips"))


def strips_of(sizes, root):
    """Grey noise in images of several sizes, 9 to train and 6 to test with; defects are white squares."""
    rng = np.random.default_rng(0)
    for kind, count in (("train", 9), ("good", 6), ("square", 6)):
        (root / kind).mkdir()
        for number in range(count):
            image = rng.integers(90, 110, (*sizes[number % len(sizes)], 3), dtype=np.uint8)
            if kind == "square":
                image[20:40, 30:50] = 255
            cv2.imwrite(str(root / kind / f"{number}.png"), image)
    return root


def data_of(root, batch_size):
    return Folder(
        "strips",
        root=root,
        normal_dir="train",
        normal_test_dir="good",
        abnormal_dir="square",
        train_batch_size=batch_size,
        eval_batch_size=batch_size,
        num_workers=0,
        val_split_mode="same_as_test",
    )


@pytest.fixture(scope="session")
def native(strips, dtd, tmp_path_factory):
    """A model fitted to images as they are, with a backbone that came from TensorFlow, and its engine."""
    options = {"backbone": "tf_efficientnet_lite0", "layers": (1, 2), "dtd_dir": str(dtd)}
    model = CseGaussian(**{**NATIVE, **options, "report": True})
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("native"), **QUIET)
    engine.fit(model, datamodule=data_of(strips, 1))
    return model, engine


def predicted(engine, model, path, **options):
    files = PredictDataset(path)
    loader = DataLoader(files, batch_size=1, collate_fn=files.collate_fn)
    return {batch.image_path[0]: batch for batch in engine.predict(model, dataloaders=loader, **options)}


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 12, 13])
@pytest.mark.parametrize("known", [1, 2, 3, 4, 5, 6])
def test_positions_are_those_as_far_from_the_nearer_border(length, known):
    expected = []
    for place in range(length):
        before, after = place, length - 1 - place
        if before <= after:
            expected.append(min(before, (known - 1) // 2))
        else:
            expected.append(known - 1 - min(after, (known - 1) // 2))
    assert from_border(length, known).tolist() == expected
    assert from_border(known, known).tolist() == list(range(known))


@pytest.mark.parametrize("size", [(64, 96), (70, 50), (33, 32)])
def test_a_network_from_tensorflow_sees_images_filled_up_to_whole_strides(size):
    torch.manual_seed(0)
    backbone = FrozenBackbone("tf_efficientnet_lite0", (1, 2, 3), pre_trained=False)
    net = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3)).eval()
    net.load_state_dict(backbone.net.state_dict(), strict=False)
    images = torch.rand(2, 3, *size)
    fill = [-size[1] % 16, -size[0] % 16]  # of width and height
    filled = F.pad((images - backbone.mean) / backbone.std, (0, fill[0], 0, fill[1]), mode="replicate")
    for found, expected in zip(backbone(images), net(filled), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_distances_at_positions_of_images_of_several_sizes_equal_a_naive_loop():
    torch.manual_seed(0)
    model = CseGaussianModel("test_efficientnet", (1, 2), pre_trained=False, embedding_dim=6)
    for gaussian in model.maps:
        for name in ("mean", "directions", "roots"):
            gaussian.set(name, torch.rand_like(getattr(gaussian, name)))
    images = [torch.rand(2, 3, *size) for size in ((64, 88), (48, 128))]
    seen = [SampledBatch(part, model.smoothed_features(part)) for part in images]
    for layer, (total, weight) in enumerate(distances(model, seen)):
        maps = [model.maps[layer].distances(part.features[layer])[:, 0].numpy() for part in seen]
        expected, counts = np.zeros((8, 16)), np.zeros((8, 16))  # of the largest height and width
        for of_size in maps:
            rows, columns = (from_border(n, k) for n, k in zip(of_size.shape[1:], expected.shape, strict=True))
            for image, i, j in np.ndindex(of_size.shape):
                expected[rows[i], columns[j]] += of_size[image, i, j]
                counts[rows[i], columns[j]] += 1
        assert np.allclose(total, expected, rtol=1e-4)
        assert np.allclose(weight, counts)


def test_images_of_several_sizes_are_fitted_and_scored_as_they_are(native, strips):
    model, engine = native
    [metrics] = engine.test(model, datamodule=data_of(strips, 1), verbose=False)
    assert metrics["image_AUROC"] == 1
    found = predicted(engine, model, strips / "square")
    assert {tuple(batch.anomaly_map.shape[-2:]) for batch in found.values()} == set(SIZES)
    for batch in found.values():
        drawn = batch.anomaly_map.reshape(batch.anomaly_map.shape[-2:])
        inside = drawn[22:38, 32:48].mean()
        outside = drawn.clone()
        outside[8:52, 18:62] = torch.nan
        assert inside > outside.nanmean() + 0.2
    means = [predicted_map.anomaly_map.mean() for predicted_map in predicted(engine, model, strips / "good").values()]
    raw = torch.stack(means)
    assert raw.max() - raw.min() < 0.1  # alike, whatever the size


def test_the_sums_are_those_of_all_positions_of_all_sizes(native, strips):
    model, _ = native
    files = sorted((strips / "train").iterdir())
    images = [torch.from_numpy(cv2.imread(str(f))[..., ::-1].copy()).movedim(-1, 0)[None] / 255 for f in files]
    features = [model.model.smoothed_features(image) for image in images]
    for layer, gaussian in enumerate(model.model.maps):
        vectors = torch.cat([of_image[layer].movedim(1, -1).flatten(0, 2) for of_image in features])
        assert torch.allclose(gaussian.mean, vectors.mean(dim=0), atol=1e-4)
        assert not gaussian.has_positions


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_an_exported_file_scores_any_size_as_the_engine_does(kind, native, strips, tmp_path):
    model, engine = native
    network = engine.export(model, kind, export_root=tmp_path)
    if kind == "onnx":
        session = InferenceSession(network)
        names = [output.name for output in session.get_outputs()]
        run = lambda image: dict(zip(names, session.run(None, {"input": image}), strict=True))  # noqa: E731
    else:
        compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        run = lambda image: {key.any_name: value for key, value in compiled(image).items()}  # noqa: E731
    sizes, scores = set(), set()
    for folder in ("good", "square"):
        for path, expected in predicted(engine, model, strips / folder).items():
            image = np.asarray(Image.open(path), np.float32).transpose(2, 0, 1)[None] / 255
            found = run(image)
            for field, tolerance in (("pred_score", 1e-4), ("anomaly_map", 1e-3), ("pred_label", 0)):
                wanted = getattr(expected, field).numpy().astype(float)
                assert np.abs(np.asarray(found[field], float).reshape(wanted.shape) - wanted).max() <= tolerance
            sizes.add(image.shape[-2:])
            scores.add(expected.pred_score.item())
    assert sizes == set(SIZES)
    assert max(scores) - min(scores) > 0.5


def test_a_region_is_resized_to_each_image_in_an_exported_file_too(dtd, tmp_path):
    strips = strips_of([(48, 320), (72, 480)], tmp_path)
    roi = np.zeros((24, 160), np.uint8)
    roi[:, 40:] = 255
    cv2.imwrite(str(tmp_path / "roi.png"), roi)
    model = CseGaussian(**NATIVE, dtd_dir=str(dtd), roi=tmp_path / "roi.png")
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    engine.fit(model, datamodule=data_of(strips, 1))
    session = InferenceSession(engine.export(model, "onnx", export_root=tmp_path))
    names = [output.name for output in session.get_outputs()]
    for path, expected in predicted(engine, model, strips / "square").items():
        image = np.asarray(Image.open(path), np.float32).transpose(2, 0, 1)[None] / 255
        width, drawn = image.shape[-1], expected.anomaly_map.squeeze()
        shown = drawn > drawn.min()  # 0 before scores are scaled
        assert not shown[:, : width // 4 - 2].any()
        assert shown[:, width // 4 + 6 :].all()
        changed = image.copy()
        changed[..., : width // 4 - 6] = 0.5
        for given in (image, changed):
            found = dict(zip(names, session.run(None, {"input": given}), strict=True))
            assert found["pred_score"].item() == pytest.approx(expected.pred_score.item(), abs=1e-4)


def test_a_checkpoint_brings_along_that_sizes_differ(native, strips, tmp_path):
    model, engine = native
    path, files = engine.best_model_path, strips / "square"
    expected = {name: batch.pred_score.item() for name, batch in predicted(engine, model, files).items()}
    again = CseGaussian.load_from_checkpoint(path)
    found = predicted(Engine(default_root_dir=tmp_path, **QUIET), again, files)
    assert {name: batch.pred_score.item() for name, batch in found.items()} == expected


def test_a_checkpoint_is_not_scored_with_images_of_another_size(native, trained, strips, dtd, tmp_path):
    options = {"backbone": "tf_efficientnet_lite0", "layers": (1, 2), "dtd_dir": str(dtd)}
    sized = CseGaussian(**{**COMMON, **options, "image_size": None})
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    with pytest.raises(
        ValueError, match=r"the checkpoint is of images of any number of pixels, the model was made for"
    ):
        engine.test(sized, datamodule=data_of(strips, 1), ckpt_path=native[1].best_model_path)
    with pytest.raises(ValueError, match="the checkpoint has a pre-processor, and the model was given none"):
        predicted(engine, CseGaussian(**NATIVE), strips / "good", ckpt_path=trained["CseGaussian"][1])


@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_images_of_several_sizes_in_one_batch_are_refused(stage, native, strips, dtd, tmp_path):
    model = CseGaussian(**NATIVE, dtd_dir=str(dtd)) if stage == "fit" else native[0]
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    files = PredictDataset(strips / "good")
    run = {
        "fit": lambda: engine.fit(model, datamodule=data_of(strips, 2)),
        "test": lambda: engine.test(model, datamodule=data_of(strips, 2)),
        "predict": lambda: engine.predict(
            model, dataloaders=DataLoader(files, batch_size=2, collate_fn=files.collate_fn)
        ),
    }
    with pytest.raises(
        ValueError, match=r"images have several sizes \(67x101, 320x48, ...\), so each needs a batch of"
    ):
        run[stage]()


def test_too_small_an_image_is_refused(native):
    with pytest.raises(ValueError, match=r"images must be at least 8 pixels high and wide.* got \(7, 90\)"):
        native[0].model(torch.rand(1, 3, 7, 90))


def test_large_batches_pass_the_backbone_in_parts():
    images = torch.zeros(5, 3, 1024, 1024)
    inside = torch.ones(5, 1, 1024, 1024, dtype=torch.bool)
    parts = in_passes(images, inside)
    assert [part.shape[0] for part, _ in parts] == [there.shape[0] for _, there in parts] == [2, 2, 1]
    assert all(part[:, 0].numel() <= PIXELS for part, _ in parts)
    [(small, nothing)] = in_passes(torch.zeros(32, 3, 256, 256), None)
    assert (len(small), nothing) == (32, None)
    assert len(in_passes(torch.zeros(2, 3, 2048, 2048), None)) == 2  # one image, however large


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "test_efficientnet"])
@pytest.mark.parametrize("size", [(96, 96), (97, 97), (104, 101)])
def test_maps_lie_where_the_defect_is_whatever_the_size(size, backbone, dtd, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "good").mkdir()
    for number in range(6):
        cv2.imwrite(str(tmp_path / "good" / f"{number}.png"), rng.integers(90, 110, (*size, 3), dtype=np.uint8))
    options = {"backbone": backbone, "layers": (1, 2), "dtd_dir": str(dtd), "image_size": size, "variations": []}
    model = CseGaussian(**{**COMMON, **options})
    data = Folder(
        "good", root=tmp_path, normal_dir="good", val_split_mode="none", test_split_mode="none", num_workers=0
    )
    engine = Engine(default_root_dir=tmp_path, limit_val_batches=0, limit_test_batches=0, **QUIET)
    engine.fit(model, datamodule=data)
    image = torch.from_numpy(rng.integers(90, 110, (1, 3, *size))).float() / 255
    image[..., 72:88, 70:86] = 1
    with torch.no_grad():
        drawn = model.model(image).anomaly_map[0, 0]
    assert drawn.shape == size
    above = (drawn - drawn.quantile(0.9)).clamp(min=0)
    rows, columns = (torch.arange(n) for n in size)
    centre = (above.sum(dim=1) @ rows.float()) / above.sum(), (above.sum(dim=0) @ columns.float()) / above.sum()
    assert centre[0].item() == pytest.approx(79.5, abs=6)
    assert centre[1].item() == pytest.approx(77.5, abs=6)


def test_images_are_as_likely_to_be_kept_when_larger_ones_take_the_room():
    kept = np.zeros(60)
    for seed in range(100):
        sample = TrainingSample(80_000, torch.Generator().manual_seed(seed), has_positions=False)
        for number in range(60):
            side = 40 if number == 50 else 16
            sample.add(torch.full((1, 3, side, side), float(number)), [torch.zeros(1, 1, 2, 2)])
        for one in sample.kept:
            kept[int(one.image[0, 0, 0])] += 1
    share = kept.sum() / 100 / 60
    assert np.abs(kept - 100 * share).max() < 4.5 * (100 * share * (1 - share)) ** 0.5


def test_what_is_kept_of_growing_images_stays_within_the_budget():
    budget = 2 * 2**22
    sample = TrainingSample(budget, torch.Generator().manual_seed(0), has_positions=False)
    for side in range(32, 132, 2):
        images = torch.rand(2, 3, side, side)
        sample.add(images, [images[:, :1, ::8, ::8]])
    assert sample.count == 100
    used = sum(one.image.nbytes + sum(f.nbytes for f in one.features) for one in sample.kept)
    assert 24 < len(sample.kept) < 100
    assert used <= budget


def test_strips_are_folded_for_pictures():
    strip = torch.arange(3 * 4 * 64.0).view(3, 4, 64)
    picture = folded(strip, gap=-1)
    assert picture.shape == (3, 4 * 4 + 3, 16)
    for part in range(4):
        assert torch.equal(picture[:, 5 * part : 5 * part + 4], strip[..., 16 * part : 16 * part + 16])
        assert part == 3 or (picture[:, 5 * part + 4] == -1).all()
    assert torch.equal(folded(strip.mT, gap=-1), picture.mT)
    odd = folded(torch.ones(1, 2, 13), gap=0)
    assert odd.shape == (1, 5 + 3, 5)
    assert odd.sum() == 26
    square = torch.rand(3, 40, 100)
    assert folded(square, gap=0) is square


def test_pictures_of_a_strip_are_nearly_square_and_larger(native, strips):
    model, engine = native
    kept = Pictures(0.5, normalised=True)
    kept.add(0, 0.7, torch.rand(3, 256, 4096), torch.rand(256, 4096))
    [(*_, image, drawn)] = kept.kept
    for picture in (Image.open(BytesIO(file)) for file in (image, drawn)):
        assert max(picture.size) in (512, 256)
        assert min(picture.size) > 0.85 * max(picture.size)
    engine.test(model, datamodule=data_of(strips, 1), verbose=False)
    files = list(Path(engine.trainer.default_root_dir).rglob("images/**/*.jpg"))
    heights = [Image.open(file).height - CAPTION - TITLE - GAP for file in files]
    assert len(files) == 12
    assert {height > 256 for height in heights} == {True, False}  # strips, others
    assert max(heights) <= 512
