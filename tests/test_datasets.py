"""Training sets as they come: tiny, all alike, without masks, with nothing to validate on, with broken files."""

import shutil

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder, MVTec
from anomalib.data.utils import DownloadInfo
from anomalib.engine import Engine

from anomalib_cse import Cse

from tiny import LINEAR, QUIET, TINY


def surface(rng, defect=False):
    image = rng.integers(90, 110, (72, 96, 3), dtype=np.uint8)
    if defect:
        image[20:50, 30:60] = 255
    return image


def folder(root, count, *, alike=False, defective=0, **options):
    """A ``Folder`` of ``count`` training images; three good and three defective ones without masks to test with."""
    rng = np.random.default_rng(0)
    images = [surface(rng, number < defective) for number in range(count)]
    test = {"test_good": [surface(rng) for _ in range(3)], "defect": [surface(rng, defect=True) for _ in range(3)]}
    for name, members in {"good": images[:1] * count if alike else images, **test}.items():
        (root / name).mkdir(parents=True)
        for number, image in enumerate(members):
            cv2.imwrite(str(root / name / f"{number}.png"), image)
    places = {"normal_dir": "good", "abnormal_dir": "defect", "normal_test_dir": "test_good"}
    return Folder("tiny", root=root, num_workers=0, **{**places, **options})


def train(data, results, **options):
    model = Cse(**{**TINY, **options})
    engine = Engine(max_epochs=1, default_root_dir=results, **QUIET)
    engine.fit(model, datamodule=data)
    return model, engine


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {}),
        (3, {}),
        (1, {"holdout_ratio": 0}),
        (2, {"batch_size": 1, "image_size": (16, 16), "layers": (3,)}),  # BatchNorm with one pair of one position
        (2, {"num_centres": 32}),  # as many as there are embeddings
        *((count, LINEAR) for count in (1, 2, 3)),  # one has no other half, three are too few to try
    ],
    ids=str,
)
def test_very_few_images(count, options, tmp_path):
    model, engine = train(folder(tmp_path / "data", count), tmp_path, **options)
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    assert model.post_processor.image_threshold.isfinite()
    [batch] = engine.predict(model, data_path=tmp_path / "data" / "defect" / "0.png")
    assert batch.pred_score.isfinite()


@pytest.mark.parametrize("arguments", [{"num_centres": 2}, LINEAR], ids=["network", "linear"])
@pytest.mark.parametrize(("count", "options"), [(6, {"alike": True}), (20, {"defective": 2})])
def test_images_all_alike_and_a_few_defective_ones_among_them(count, options, arguments, tmp_path):
    data = folder(tmp_path / "data", count, **options)
    model, engine = train(data, tmp_path, **arguments)
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    [metrics] = engine.test(model, datamodule=data)
    assert metrics["image_AUROC"] == 1


def test_no_images(tmp_path):
    with pytest.raises(RuntimeError, match=r"Found 0 .*NORMAL images in .*good"):
        train(folder(tmp_path / "data", 0), tmp_path)
    with pytest.raises(ValueError, match="too few training images, 1, to hold out 1"):
        train(folder(tmp_path / "one", 1), tmp_path)


def test_a_layout_of_mvtec_without_training_images_or_masks(mvtec_root, tmp_path):
    shutil.copytree(mvtec_root, tmp_path / "data")
    for file in (tmp_path / "data" / "tiny" / "train" / "good").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="MVTec finds no training images"):
        train(MVTec(tmp_path / "data", "tiny", num_workers=0), tmp_path)
    shutil.copytree(mvtec_root / "tiny" / "train", tmp_path / "data" / "tiny" / "train", dirs_exist_ok=True)
    (tmp_path / "data" / "tiny" / "test" / "square" / "Thumbs.db").touch()  # which is no image
    train(MVTec(tmp_path / "data", "tiny", num_workers=0), tmp_path)
    with pytest.raises(ValueError, match=r"category must be a folder of .*data \(tiny\) or.* leather.*, got 'tinny'"):
        MVTec(tmp_path / "data", "tinny").prepare_data()
    next((tmp_path / "data" / "tiny" / "ground_truth" / "square").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"test.square holds 4 images and .*ground_truth.square 3 masks"):
        MVTec(tmp_path / "data", "tiny", num_workers=0).setup()
    shutil.rmtree(tmp_path / "data" / "tiny" / "test" / "square")
    with pytest.raises(ValueError, match=r"test.square holds 0 images and .*ground_truth.square 3 masks"):
        MVTec(tmp_path / "data", "tiny", num_workers=0).setup()


def test_more_centres_than_embeddings_stop_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"num_centres must be a whole number in \[1, 32\], got 33"):
        train(folder(tmp_path / "data", 2), tmp_path / "results", num_centres=33)
    assert not list((tmp_path / "results").rglob("*.ckpt"))


@pytest.mark.parametrize("options", [{}, {"test_split_mode": "none", "abnormal_dir": None, "normal_test_dir": None}])
def test_nothing_to_validate_on_stops_before_training(options, tmp_path):
    data = folder(tmp_path / "data", 4, val_split_mode="none", **options)
    with pytest.raises(ValueError, match=r"tiny has no validation images.*val_split_mode is 'none'.*limit_val_batches"):
        train(data, tmp_path / "results")
    assert not list((tmp_path / "results").rglob("*.ckpt"))
    model = Cse(**TINY)
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, limit_val_batches=0, **QUIET)
    engine.fit(model, datamodule=data)
    [batch] = engine.predict(model, data_path=tmp_path / "data" / "good" / "0.png")
    assert batch.pred_score.isfinite()
    if options:
        assert not any(engine.test(model, datamodule=data))  # so that training alone is no error


def test_dtd_folders_that_hold_no_photographs(tmp_path):
    data = folder(tmp_path / "data", 4)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing", "data/good/0.png"):
        with pytest.raises(FileNotFoundError, match=rf"dtd_dir: no photographs .*below .*{name}"):
            train(data, tmp_path, dtd_dir=tmp_path / name)
    whole = (tmp_path / "data" / "good" / "0.png").read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        (tmp_path / "empty" / "torn.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"dtd_dir: .*torn\.png cannot be read"):
            train(data, tmp_path, dtd_dir=tmp_path / "empty")


def test_a_download_that_was_broken_off_is_made_again(tmp_path, texture_folder, monkeypatch):
    """anomalib checks the hash of what it has just downloaded, and takes an archive that is there for granted."""
    data = folder(tmp_path / "data", 4)
    attempts = []

    def download(target, info):
        assert isinstance(info, DownloadInfo)
        assert not target.exists()
        attempts.append(target)
        target.mkdir()
        (target / "first.jpg").write_bytes((texture_folder / "images" / "striped" / "0.jpg").read_bytes())
        if len(attempts) == 1:
            raise ConnectionResetError

    monkeypatch.setattr("anomalib_cse.lightning_model.download_and_extract", download)
    options = {"dtd_dir": tmp_path / "downloaded", "download_dtd": True}
    with pytest.raises(ConnectionResetError):
        train(data, tmp_path, **options)
    assert not (tmp_path / "downloaded").exists()
    for _ in range(2):
        train(data, tmp_path, **options)
    assert len(attempts) == 2
    assert [file.name for file in (tmp_path / "downloaded").rglob("*.jpg")] == ["first.jpg"]


@pytest.mark.parametrize("arguments", [TINY, LINEAR], ids=["network", "linear"])
def test_black_images(arguments, tmp_path):
    """Positions of the inside all have one embedding."""
    data = folder(tmp_path / "data", 4)
    for file in (tmp_path / "data" / "good").iterdir():
        cv2.imwrite(str(file), np.zeros((72, 96, 3), np.uint8))
    model, engine = train(data, tmp_path, **arguments)
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    if arguments == TINY:
        assert torch.allclose(model.model.centres.norm(dim=1), torch.ones(1))
    [batch] = engine.predict(model, data_path=tmp_path / "data" / "good" / "0.png")
    assert batch.pred_score.isfinite()
