"""Training sets as they come: tiny, all alike, without masks, with nothing to validate on, with broken files."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_cse.data import MVTec
from anomalib_cse.preflight.images import read_samples, samples_of

from tiny import COMMON, MODELS, QUIET

both = pytest.mark.parametrize("name", MODELS)


def surface(rng, defect=False):
    image = rng.integers(90, 110, (72, 96, 3), dtype=np.uint8)
    if defect:
        image[20:50, 30:60] = 255
    return image


def folder(root, count, *, alike=False, black=False, defective=0, **options):
    """A ``Folder`` of ``count`` training images; three good and three defective ones without masks to test with."""
    rng = np.random.default_rng(0)
    images = [surface(rng, number < defective) * (not black) for number in range(count)]
    test = {"test_good": [surface(rng) for _ in range(3)], "defect": [surface(rng, defect=True) for _ in range(3)]}
    for name, members in {"good": images[:1] * count if alike else images, **test}.items():
        (root / name).mkdir(parents=True)
        for number, image in enumerate(members):
            cv2.imwrite(str(root / name / f"{number}.png"), image)
    places = {"normal_dir": "good", "abnormal_dir": "defect", "normal_test_dir": "test_good"}
    return Folder("tiny", root=root, num_workers=0, **{**places, **options})


@pytest.fixture
def train(dtd, tmp_path):
    """Trains a model of a name, its results beside the data."""

    def fit(name, data, *, limit=1.0, **options):
        model = MODELS[name](**{**COMMON, "dtd_dir": str(dtd), **options})
        engine = Engine(max_epochs=1, default_root_dir=tmp_path / "results", limit_val_batches=limit, **QUIET)
        engine.fit(model, datamodule=data)
        return model, engine

    return fit


@pytest.mark.parametrize(
    ("name", "count", "options"),
    [
        ("Cse", 2, {}),
        ("Cse", 3, {"num_centres": 3}),  # as many as there are images
        ("Cse", 1, {"holdout_ratio": 0}),
        ("Cse", 2, {"image_size": (16, 16), "layers": (3,)}),  # BatchNorm with one pair of one position
        *(("CseGaussian", count, {}) for count in (1, 2, 3)),
    ],
    ids=str,
)
def test_very_few_images_train(name, count, options, train, tmp_path):
    model, engine = train(name, folder(tmp_path / "data", count, train_batch_size=1), **options)
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    assert model.post_processor.image_threshold.isfinite()
    [batch] = engine.predict(model, data_path=tmp_path / "data" / "defect" / "0.png")
    assert batch.pred_score.isfinite()


@both
@pytest.mark.filterwarnings("ignore:.* (is the same image as|is nearly constant)")
@pytest.mark.parametrize(
    ("count", "options"),
    [(6, {"alike": True}), (4, {"black": True}), (20, {"defective": 2})],
    ids=["alike", "black", "with defects"],
)
def test_defects_are_found_after_images_alike_and_after_a_few_defective_ones(name, count, options, train, tmp_path):
    data = folder(tmp_path / "data", count, **options)
    model, engine = train(name, data)
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    [metrics] = engine.test(model, datamodule=data)
    assert metrics["image_AUROC"] == 1


@both
def test_no_images_are_refused(name, train, tmp_path):
    with pytest.raises(RuntimeError, match=r"Found 0 .*NORMAL images in .*good"):
        train(name, folder(tmp_path / "data", 0))


def test_too_few_images_for_hold_out_and_centres_are_refused(train, tmp_path):
    with pytest.raises(ValueError, match="too few training images, 1, to hold out 1"):
        train("Cse", folder(tmp_path / "one", 1))
    with pytest.raises(ValueError, match=r"num_centres must be a whole number in \[1, 2\], got 3"):
        train("Cse", folder(tmp_path / "two", 2), num_centres=3)
    assert not list(tmp_path.rglob("*.ckpt"))


@both
def test_a_layout_of_mvtec_without_training_images_or_category_is_refused(name, mvtec_root, train, tmp_path):
    with pytest.raises(ValueError, match=r"category must be a folder of .* \(tiny\) or.* leather.*, got 'tinny'"):
        train(name, MVTec(mvtec_root, "tinny"))
    shutil.copytree(mvtec_root, tmp_path / "data")
    for file in (tmp_path / "data" / "tiny" / "train" / "good").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="MVTec finds no training images"):
        train(name, MVTec(tmp_path / "data", "tiny", num_workers=0))


def test_a_layout_of_mvtec_with_other_masks_than_images_is_refused(mvtec_root, tmp_path):
    def set_up():
        MVTec(tmp_path, "tiny", num_workers=0).setup()

    shutil.copytree(mvtec_root / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "test" / "square" / "Thumbs.db").touch()  # which is no image
    set_up()
    next((tmp_path / "tiny" / "ground_truth" / "square").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"test.square holds 4 images .* and .*ground_truth.square 3 masks"):
        set_up()
    shutil.rmtree(tmp_path / "tiny" / "test" / "square")
    with pytest.raises(ValueError, match=r"test.square holds 0 images .* and .*ground_truth.square 3 masks"):
        set_up()


def test_a_layout_of_mvtec_with_links_out_of_it_is_refused(mvtec_root, tmp_path):
    shutil.copytree(mvtec_root / "tiny", tmp_path / "tiny")
    inside = tmp_path / "tiny" / "train" / "good" / "link.png"
    inside.symlink_to(inside.with_name("000.png"))
    MVTec(tmp_path, "tiny").setup()
    outside = tmp_path / "tiny" / "train" / "good" / "outside.png"
    outside.symlink_to(next((mvtec_root / "tiny" / "train" / "good").iterdir()))
    said = "leads to .*: anomalib leaves such links out, copy what they lead to"
    with pytest.raises(ValueError, match=rf"outside\.png {said}"):
        MVTec(tmp_path, "tiny").setup()
    outside.unlink()
    (tmp_path / "tiny" / "test" / "square").rename(tmp_path / "tiny" / "test" / "real")
    (tmp_path / "tiny" / "test" / "square").symlink_to(tmp_path / "tiny" / "test" / "real")
    with pytest.raises(ValueError, match=rf"square {said}"):
        MVTec(tmp_path, "tiny").setup()


def masks(root, height, width, *, empty=()):
    """Give each defective image a mask."""
    (root / "mask").mkdir()
    for number in range(3):
        mask = np.zeros((height, width), np.uint8)
        mask[height // 3 : height // 2, width // 3 : width // 2] = 255 * (number not in empty)
        cv2.imwrite(str(root / "mask" / f"{number}.png"), mask)


@both
def test_masks_that_do_not_fit_are_refused_before_training_and_empty_ones_named(name, train, tmp_path):
    for number, (height, width) in enumerate([(72, 90), (96, 72)]):
        data = folder(tmp_path / f"{number}", 4, mask_dir="mask")
        masks(tmp_path / f"{number}", height, width)
        with pytest.raises(ValueError, match=rf"mask/\d\.png has {width}x{height} pixels, .*/\d\.png 96x72: .*proport"):
            train(name, data)
    assert not list(tmp_path.rglob("*.ckpt"))
    data = folder(tmp_path / "smaller", 4, mask_dir="mask")
    masks(tmp_path / "smaller", 37, 49, empty=(1, 2))  # half the size, but for rounding
    with pytest.warns(UserWarning, match=r"mask/[12]\.png, the mask of a defect, is empty: .* \(1 others too\)"):
        train(name, data)


def test_masks_of_good_images_are_left_alone(tmp_path):
    """anomalib does not read them; its Kolektor lists black ones."""
    for name in ("image", "mask"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    good = {"image_path": [str(tmp_path / "image.png")], "mask_path": [str(tmp_path / "mask.png")], "label_index": [0]}

    def found(samples):
        unreadable, findings = read_samples("evaluation", samples_of(SimpleNamespace(samples=samples)), {}, whole=True)
        return [*unreadable, *findings]

    assert not found(good)
    [warning] = found({**good, "label_index": [1]})
    assert "mask.png, the mask of a defect, is empty" in warning.message


@both
def test_a_test_image_that_cannot_be_read_stops_before_training(name, train, tmp_path):
    data = folder(tmp_path / "data", 4, val_split_mode="from_train", val_split_ratio=0.5)
    (tmp_path / "data" / "defect" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"evaluation file \S*defect/1\.png cannot be read as an image"):
        train(name, data)
    assert not list(tmp_path.rglob("*.ckpt"))


@both
@pytest.mark.parametrize(
    "options", [{}, {"test_split_mode": "none", "abnormal_dir": None, "normal_test_dir": None}], ids=["test", "nothing"]
)
def test_nothing_to_validate_on_stops_before_training(name, options, train, tmp_path):
    data = folder(tmp_path / "data", 4, val_split_mode="none", **options)
    with pytest.raises(ValueError, match=r"tiny has no validation images.*val_split_mode is 'none'.*limit_val_batches"):
        train(name, data)
    assert not list(tmp_path.rglob("*.ckpt"))
    model, engine = train(name, data, limit=0)
    [batch] = engine.predict(model, data_path=tmp_path / "data" / "good" / "0.png")
    assert batch.pred_score.isfinite()
    if options:
        assert not any(engine.test(model, datamodule=data))  # so that training alone is no error


@both
def test_texture_folders_that_hold_no_photographs_are_refused_first(name, train, tmp_path):
    data = folder(tmp_path / "data", 5)
    torn = tmp_path / "data" / "good" / "torn.png"  # which training would come upon: a little, of more than the others
    cv2.imwrite(str(torn), np.random.default_rng(0).integers(0, 255, (72, 96, 3), dtype=np.uint8))
    torn.write_bytes(torn.read_bytes()[:-30])
    (tmp_path / "empty").mkdir()
    for place in ("empty", "missing", "data/good/0.png"):
        with pytest.raises(FileNotFoundError, match=rf"dtd_dir: no photographs .*below .*{place}"):
            train(name, data, dtd_dir=tmp_path / place)
    whole = (tmp_path / "data" / "good" / "0.png").read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        (tmp_path / "empty" / "torn.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"dtd_dir: .*torn\.png cannot be read"):
            train(name, data, dtd_dir=tmp_path / "empty")


@both
def test_download_is_asked_for_once_and_begun_anew_after_it_broke_off(name, dtd, train, tmp_path, monkeypatch):
    """torchvision's download is replaced."""
    attempts = []

    def download(url, download_root, md5):
        attempts.append(url)
        photographs = Path(download_root) / "dtd" / "images" / "striped"
        photographs.mkdir(parents=True)
        if len(attempts) == 1:
            raise ConnectionResetError
        shutil.copy(dtd / "0.png", photographs / "first.png")
        labels = Path(download_root) / "dtd" / "labels"
        labels.mkdir()
        (labels / "train1.txt").write_text("striped/first.png\n")

    monkeypatch.setattr("torchvision.datasets.dtd.download_and_extract_archive", download)
    data = folder(tmp_path / "data", 4)
    options = {"dtd_dir": tmp_path / "downloaded", "download_dtd": True}
    with pytest.raises(ConnectionResetError):
        train(name, data, **options)
    assert not (tmp_path / "downloaded").exists()
    for _ in range(2):
        train(name, data, **options)
    assert len(attempts) == 2
    assert [file.name for file in (tmp_path / "downloaded").rglob("*.png")] == ["first.png"]
