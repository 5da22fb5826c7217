"""Images as they come: what anomalib reads gets a finite score, anything else is refused by name."""

import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder, ImageBatch, ImageItem, PredictDataset
from anomalib.engine import Engine
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from anomalib_cse import Cse
from anomalib_cse.image_files import left_out, oddities
from anomalib_cse.image_files import linked as linked_folders
from anomalib_cse.synthesis import load_textures

from tiny import COMMON, MODELS, QUIET, data_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is of Pillow's mode"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Pillow leaves broken files open
]

UNVALIDATED = {**QUIET, "limit_val_batches": 0}


def noise(height=72, width=96, *, seed=0, most=110):
    return Image.fromarray(np.random.default_rng(seed).integers(90, most, (height, width, 3), dtype=np.uint8))


READABLE = {
    "grey.png": lambda: noise().convert("L"),
    "rgba.png": lambda: noise().convert("RGBA"),
    "palette.png": lambda: noise().convert("P"),
    "cmyk.jpg": lambda: noise().convert("CMYK"),
    "binary.png": lambda: noise().convert("1"),
    "sixteen.png": lambda: Image.fromarray(np.full((72, 96), 40000, np.uint16)),
    "float.tif": lambda: Image.fromarray(np.full((72, 96), np.nan, np.float32)),
    "8x8.png": lambda: noise(8, 8),
    "1x4000.png": lambda: noise(1, 4000),
    "4000x1.png": lambda: noise(4000, 1),
    "6000x4000.png": lambda: Image.new("RGB", (6000, 4000), (100, 90, 80)),
    "black.png": lambda: Image.new("RGB", (96, 72)),
    "white.png": lambda: Image.new("RGB", (96, 72), (255, 255, 255)),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """One image of every kind that can be read."""
    folder = tmp_path_factory.mktemp("images")
    for name, image in READABLE.items():
        image().save(folder / name)
    noise().save(folder / "jpeg.jpg")
    (folder / "jpeg.jpg").rename(folder / "mislabelled.png")
    return folder


def datamodule(folder):
    """All the images for training, and none for anything else."""
    nothing = {"val_split_mode": "none", "test_split_mode": "none"}
    return Folder("images", normal_dir=folder, train_batch_size=8, num_workers=0, **nothing)


@pytest.fixture(params=MODELS)
def create(request, dtd):
    """Creates a model of either class."""
    return lambda **options: MODELS[request.param](**COMMON, dtd_dir=str(dtd), **options)


@pytest.fixture(params=MODELS)
def fitted(request, trained):
    return trained[request.param][0]


def engine(folder, **options):
    return Engine(**{"max_epochs": 1, "default_root_dir": folder, **UNVALIDATED, **options})


@pytest.mark.filterwarnings("ignore:images are resized", "ignore:.* is (grey|colour), but", "ignore:.* has an alpha")
@pytest.mark.filterwarnings("ignore:.* is nearly constant", "ignore:.* one side is shortened")
def test_what_anomalib_reads_trains_and_has_a_finite_score(images, create, tmp_path):
    model = create()
    engine(tmp_path).fit(model, datamodule=datamodule(images))
    assert all(value.isfinite().all() for value in model.model.state_dict().values())
    batches = engine(tmp_path).predict(model, data_path=images)
    assert sum(len(batch.pred_score) for batch in batches) == len(READABLE) + 1
    for batch in batches:
        assert batch.pred_score.isfinite().all()
        assert batch.anomaly_map.isfinite().all()


def sixteen_bits(folder):
    for number in (1, 2):
        Image.fromarray(np.asarray(noise(seed=number))[..., 0] * np.uint16(256)).save(folder / f"{number}.png")


def hidden(folder):
    noise(seed=1).save(folder / ".1.png")
    noise(seed=2).save(folder / ".2.png")


def linked(folder):
    for number in (1, 2):
        (folder.parent / f"elsewhere{number}").mkdir(exist_ok=True)
        noise().save(folder.parent / f"elsewhere{number}" / "1.png")
        (folder / f"link{number}").symlink_to(folder.parent / f"elsewhere{number}")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (sixteen_bits, "1.png is of Pillow's mode 'I;16': anomalib clips such images at 255"),
        (hidden, ".1.png is hidden, but counts as an image"),
        (linked, "link1 is a link to a folder, which is not looked into"),
    ],
)
def test_files_that_are_not_what_they_seem_are_warned_of_once_wherever_they_are(place, said, create, tmp_path):
    def warned(use):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use()
        return sum(said in str(warning.message) for warning in caught)

    uses = {
        "images": lambda: engine(tmp_path).fit(create(), datamodule=datamodule(tmp_path / "images")),
        "predicted": lambda: engine(tmp_path).predict(model, data_path=tmp_path / "predicted"),
        "textures": lambda: load_textures(tmp_path / "textures", 8, 32),
    }
    for folder in uses:
        (tmp_path / folder).mkdir()
        for number in (0, 3):  # 0 is read first
            noise(seed=number).save(tmp_path / folder / f"{number}.png")
    model = create()
    engine(tmp_path).fit(model, datamodule=datamodule(tmp_path / "images"))
    assert not any(warned(use) for use in uses.values())
    for folder, use in uses.items():
        place(tmp_path / folder)
        assert warned(use) == 1, folder


def test_links_that_mislead_nobody_are_not_warned_of(tmp_path):
    """To folders that are read, or that hold no images."""
    for place in ("real/good", "other/bad", "elsewhere"):
        (tmp_path / place).mkdir(parents=True)
        noise().save(tmp_path / place / "0.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "real" / "given").symlink_to(tmp_path / "other" / "bad")
    (tmp_path / "real" / "good" / "up").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "notes").symlink_to(tmp_path / "notes")
    real, given = tmp_path / "real" / "good", tmp_path / "real" / "given"
    assert not list(linked_folders([tmp_path / "real", real, given], [real, given]))
    assert not list(linked_folders([tmp_path / "real", tmp_path / "nowhere"], [real]))
    [found] = linked_folders([tmp_path / "real"], [real])
    assert f"{given} is a link to a folder" in found
    assert not list(left_out([given, real], {".png"}))
    [found] = oddities({tmp_path / ".ipynb_checkpoints" / "0.png": ()})
    assert ".ipynb_checkpoints/0.png is hidden" in found


class Own(Dataset):
    """Images of the user's own, not kept as anomalib's datasets keep them; in number 3 one pixel has a given value."""

    samples = pd.DataFrame({"frame": range(6)})
    collate_fn = staticmethod(ImageBatch.collate)

    def __init__(self, value=0.5):
        self.value = value

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = torch.rand(3, 64, 64)
        image[1, 5, 7] = self.value if index == 3 else 0.5
        return ImageItem(image=image, image_path=f"{index}.raw")


def loader(dataset, **options):
    return DataLoader(dataset, collate_fn=getattr(dataset, "dataset", dataset).collate_fn, **options)


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_size": 1}], ids=str)
def test_images_of_the_users_own_train_and_have_scores(options, create, tmp_path):
    model = create(visualizer=False)
    if isinstance(model, Cse):
        with pytest.raises(ValueError, match=r"holds out images of an anomalib datamodule.* or set holdout_ratio to 0"):
            engine(tmp_path).fit(model, train_dataloaders=loader(Own(), **options))
        model = create(visualizer=False, holdout_ratio=0)
    engine(tmp_path).fit(model, train_dataloaders=loader(Own(), **options))
    scores = torch.cat([batch.pred_score for batch in engine(tmp_path).predict(model, dataloaders=loader(Own()))])
    assert len(scores) == 6
    assert scores.isfinite().all()


UNREADABLE = ("truncated_whole.png", "truncated_whole.jpg", "empty.png", "text.png")


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory):
    """A folder of two images, and of files with an image's suffix that hold none, or a part of one."""
    folder = tmp_path_factory.mktemp("unreadable")
    for name in ("whole.png", "whole.jpg"):
        noise().save(folder / name)
        content = (folder / name).read_bytes()
        (folder / f"truncated_{name}").write_bytes(content[: len(content) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    return folder


@pytest.mark.parametrize("name", UNREADABLE)
def test_training_files_that_cannot_be_read_stop_before_training(name, unreadable, create, tmp_path):
    for number in range(8):
        noise(seed=number).save(tmp_path / f"{number}.png")
    shutil.copy(unreadable / name, tmp_path)
    with pytest.raises(ValueError, match=rf"training file \S*{name} cannot be read as an image: .* take it out"):
        engine(tmp_path / "results").fit(create(), datamodule=datamodule(tmp_path))


def test_training_names_the_file_that_cannot_be_read_and_was_not_looked_at(create, tmp_path):
    for number in range(8):
        noise(seed=number).save(tmp_path / f"{number}.png")
    noise(most=250).save(tmp_path / "torn.png")  # more bytes than the others, though some are missing
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:-30])
    with pytest.raises(OSError, match="truncated") as caught:
        engine(tmp_path / "results").fit(create(), datamodule=datamodule(tmp_path))
    [note] = caught.value.__notes__
    assert f"{tmp_path / 'torn.png'} cannot be read as an image" in note


@pytest.mark.parametrize(("name", "num_workers"), [*((name, 0) for name in UNREADABLE), ("empty.png", 1)])
def test_prediction_names_the_file_that_cannot_be_read(name, num_workers, unreadable, fitted, tmp_path):
    files = PredictDataset(unreadable)
    numbers = {file.name: number for number, file in enumerate(files.image_filenames)}
    chosen = Subset(files, [numbers["whole.png"], numbers[name]])
    with pytest.raises(Exception, match=rf"\S*{name} cannot be read as an image: .* take it out"):
        engine(tmp_path).predict(fitted, dataloaders=loader(chosen, num_workers=num_workers))


@pytest.fixture
def broken_data(mvtec_root, tmp_path):
    """Breaks one file of the tiny dataset and returns the datamodule."""

    def make(place):
        shutil.copytree(mvtec_root, tmp_path / "data")
        file = tmp_path / "data" / "tiny" / place
        file.write_bytes(file.read_bytes()[:-30])
        return data_of(tmp_path / "data")

    return make


IMAGE, MASK = "test/square/001.png", "ground_truth/square/001_mask.png"


@pytest.mark.parametrize(("use", "place"), [(Engine.validate, IMAGE), (Engine.test, IMAGE), (Engine.test, MASK)])
def test_evaluation_names_the_file_that_cannot_be_read(use, place, broken_data, fitted, tmp_path):
    with pytest.raises(Exception, match=rf"\S*{place} cannot be read as an image: .* take it out"):
        use(engine(tmp_path, **QUIET, limit_val_batches=1.0), fitted, datamodule=broken_data(place))


@pytest.mark.parametrize("place", [IMAGE, MASK])
def test_validation_files_that_cannot_be_read_stop_before_training(place, broken_data, create, tmp_path):
    data = broken_data(place)
    with pytest.raises(ValueError, match=rf"evaluation file \S*{place} cannot be read as an image: .* take it out"):
        engine(tmp_path, limit_val_batches=1.0).fit(create(), datamodule=data)
    assert not list(tmp_path.rglob("*.ckpt"))
    engine(tmp_path, limit_test_batches=0).fit(create(), datamodule=data)  # without validation


class Faulty(PredictDataset):
    def __getitem__(self, index):
        raise RuntimeError("of the user's own")


def test_other_errors_stay_as_they_are(images, fitted, tmp_path):
    with pytest.raises(RuntimeError, match="of the user's own") as caught:
        engine(tmp_path).predict(fitted, dataloaders=loader(Faulty(images)))
    assert not getattr(caught.value, "__notes__", [])
