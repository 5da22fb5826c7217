"""Images as they come: what anomalib reads gets a finite score, anything else is refused by name."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder, ImageBatch, ImageItem, MVTecAD, PredictDataset
from anomalib.engine import Engine
from PIL import Image
from torch.utils.data import DataLoader, Subset

from anomalib_cse import Cse

from tiny import LINEAR, QUIET, TINY

pytestmark = pytest.mark.filterwarnings("ignore:.* is of Pillow's mode")

UNVALIDATED = {**QUIET, "limit_val_batches": 0}


def noise(height=72, width=96):
    return Image.fromarray(np.random.default_rng(0).integers(90, 110, (height, width, 3), dtype=np.uint8))


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
    "8000x6000.png": lambda: Image.new("RGB", (8000, 6000), (100, 90, 80)),
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
    return Folder("images", normal_dir=folder, val_split_mode="none", test_split_mode="none", num_workers=0)


@pytest.fixture(scope="module", params=[LINEAR, TINY], ids=["linear", "network"])
def trained(request, images, tmp_path_factory):
    """A model trained with all of them."""
    model = Cse(**request.param)
    engine = Engine(max_epochs=1, default_root_dir=tmp_path_factory.mktemp("results"), **UNVALIDATED)
    engine.fit(model, datamodule=datamodule(images))
    return model


def test_what_anomalib_reads_trains_and_has_a_finite_score(images, trained, tmp_path):
    assert trained.embedder is None or trained.best_loss.isfinite()
    assert all(value.isfinite().all() for value in trained.model.state_dict().values())
    batches = Engine(default_root_dir=tmp_path, **UNVALIDATED).predict(trained, data_path=images)
    assert sum(len(batch.pred_score) for batch in batches) == len(READABLE) + 1
    for batch in batches:
        assert batch.pred_score.isfinite().all()
        assert batch.anomaly_map.isfinite().all()


def test_images_of_more_than_eight_bits_are_warned_of(trained, tmp_path):
    def warned(use):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use()
        return sum("mode 'I;16': anomalib clips such images at 255" in str(warning.message) for warning in caught)

    engine = Engine(max_epochs=2, default_root_dir=tmp_path / "results", **UNVALIDATED)
    for number in range(3):
        Image.fromarray(np.full((72, 96), 40000, np.uint16)).save(tmp_path / f"{number}.png")
    assert warned(lambda: engine.predict(trained, data_path=tmp_path)) == 1
    assert warned(lambda: engine.fit(Cse(**TINY, memory_budget=0), datamodule=datamodule(tmp_path))) == 1
    for number in range(3):
        noise().save(tmp_path / f"{number}.png")
    assert warned(lambda: engine.predict(trained, data_path=tmp_path)) == 0


class OwnFiles(torch.utils.data.Dataset):
    """Images that are not kept as anomalib's datasets keep them."""

    samples = pd.DataFrame({"frame": range(4)})

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return ImageItem(image=torch.rand(3, 64, 64), image_path=f"{index}.raw")


def test_images_of_the_users_own_without_validation(tmp_path):
    loader = DataLoader(OwnFiles(), batch_size=2)
    model = Cse(**TINY, visualizer=False)
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    engine.fit(model, train_dataloaders=loader)
    scored = engine.predict(model, dataloaders=DataLoader(OwnFiles(), batch_size=2, collate_fn=ImageBatch.collate))
    assert len(scored) == 2


class Dark(OwnFiles):
    def __getitem__(self, index):
        return ImageItem(image=torch.full((3, 64, 64), torch.nan if index == 2 else 0.0), image_path=f"{index}.raw")


def test_images_of_the_users_own_have_numbers(tmp_path):
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="training image number 2 holds NaN"):
        engine.fit(Cse(**TINY), train_dataloaders=DataLoader(Dark(), batch_size=2))


UNREADABLE = ("truncated_whole.png", "truncated_whole.jpg", "empty.png", "text.png")


def unreadable(folder):
    """Files with an image's suffix that hold none, or a part of one."""
    noise().save(folder / "whole.png")
    noise().save(folder / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        content = (folder / name).read_bytes()
        (folder / f"truncated_{name}").write_bytes(content[: len(content) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    return [folder / name for name in UNREADABLE]


def test_training_names_the_file_that_cannot_be_read(images, tmp_path):
    broken = unreadable(tmp_path)
    training = tmp_path / "training"
    training.mkdir()
    for number in range(3):
        noise().save(training / f"{number}.png")
    for file in broken:
        at = training / f"9_{file.name}"
        at.write_bytes(file.read_bytes())
        with pytest.raises(ValueError, match=f"training image .*{at.name} cannot be read"):
            Engine(max_epochs=1, default_root_dir=tmp_path, **UNVALIDATED).fit(
                Cse(**TINY), datamodule=datamodule(training)
            )
        at.unlink()


@pytest.mark.parametrize(("name", "num_workers"), [*((name, 0) for name in UNREADABLE), ("truncated_whole.png", 2)])
def test_prediction_names_the_file_that_cannot_be_read(name, num_workers, trained, tmp_path):
    unreadable(tmp_path)
    files = PredictDataset(tmp_path)
    numbers = {file.name: number for number, file in enumerate(files.image_filenames)}
    chosen = Subset(files, [numbers["whole.png"], numbers[name]])
    loader = DataLoader(chosen, collate_fn=files.collate_fn, num_workers=num_workers)
    with pytest.raises(ValueError, match=rf"image \S*{name} cannot be read"):
        Engine(default_root_dir=tmp_path, **UNVALIDATED).predict(trained, dataloaders=loader)


@pytest.mark.parametrize(
    ("use", "place", "num_workers"),
    [
        (Engine.validate, "test/square/001.png", 0),
        (Engine.test, "test/square/001.png", 2),
        (Engine.test, "ground_truth/square/001_mask.png", 0),
        (Engine.fit, "ground_truth/square/001_mask.png", 0),  # and before any training
    ],
)
def test_evaluation_names_the_file_that_cannot_be_read(use, place, num_workers, mvtec_root, tmp_path):
    shutil.copytree(mvtec_root, tmp_path / "data")
    broken = tmp_path / "data" / "tiny" / place
    broken.write_bytes(broken.read_bytes()[:-30])
    kind = "mask" if "mask" in place else "image"
    model = Cse(**TINY)
    model.model.set_centres(torch.ones_like(model.model.centres))
    data = MVTecAD(root=tmp_path / "data", category="tiny", num_workers=num_workers)
    with pytest.raises(ValueError, match=rf"{kind} \S*{place} cannot be read: .* take it out"):
        use(Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET), model, datamodule=data)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_only_files_that_validation_reads_are_read_before_training(mvtec_root, tmp_path):
    shutil.copytree(mvtec_root, tmp_path / "data")
    data = MVTecAD(root=tmp_path / "data", category="tiny", num_workers=0, eval_batch_size=1)
    data.setup()
    last = Path(data.val_data.samples.image_path.iloc[-1])
    last.write_bytes(last.read_bytes()[:-30])
    others = DataLoader(
        data.val_data, sampler=range(len(data.val_data) - 1), collate_fn=data.val_data.collate_fn, num_workers=0
    )
    loaders = {"train_dataloaders": data.train_dataloader(), "val_dataloaders": others}
    for options, images in (({"limit_val_batches": 1}, {"datamodule": data}), ({}, loaders)):
        engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET, **options)
        engine.fit(Cse(**TINY), **images)
        assert Path(engine.best_model_path).is_file()
    with pytest.raises(ValueError, match=rf"image \S*{last.name} cannot be read"):
        Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(Cse(**TINY), datamodule=data)


class OwnLoader(DataLoader):
    """A dataloader as a user may write one: its own arguments, and what it needs taken from the dataset."""

    def __init__(self, dataset, *, times, **options):
        self.times = times
        super().__init__(dataset, **{"collate_fn": dataset.collate_fn, **options})


def test_naming_files_leaves_loaders_and_errors_as_they_are(images, trained, tmp_path):
    files = PredictDataset(images)
    engine = Engine(default_root_dir=tmp_path, **UNVALIDATED)
    loader = OwnLoader(files, times=1, batch_size=4)
    scored = engine.predict(trained, dataloaders=loader)
    assert sum(len(batch.pred_score) for batch in scored) == len(files)
    assert loader.dataset is files
    [inside] = engine.trainer.predict_dataloaders
    assert inside.dataset.image_filenames == files.image_filenames
    assert "process_dataloader" not in vars(engine.trainer.strategy)

    class Faulty(PredictDataset):
        def __getitem__(self, index):
            raise RuntimeError("of the user's own")

    faulty = Faulty(images)
    with pytest.raises(RuntimeError, match="of the user's own"):
        engine.predict(trained, dataloaders=DataLoader(faulty, collate_fn=faulty.collate_fn))


def test_workers_that_are_already_there_name_the_file_too(trained, tmp_path):
    noise().save(tmp_path / "0.png")
    files = PredictDataset(tmp_path)
    loader = DataLoader(files, collate_fn=files.collate_fn, num_workers=1, persistent_workers=True)
    next(iter(loader))
    (tmp_path / "0.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"image \S*0.png cannot be read"):
        Engine(default_root_dir=tmp_path, **UNVALIDATED).predict(trained, dataloaders=loader)


class Spoilt(torch.utils.data.Dataset):
    """Images of one grey value, and one of them with one pixel that is not a number."""

    def __init__(self, value):
        self.value = value

    def __len__(self):
        return 6

    def __getitem__(self, index):
        image = torch.full((3, 64, 64), 0.5)
        if index == 3:
            image[1, 5, 7] = self.value
        return ImageItem(image=image, image_path=f"{index}.png")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused_by_name(value, trained, tmp_path):
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **UNVALIDATED)
    with pytest.raises(ValueError, match=r"no finite score for 3\.png: it holds NaN or infinite pixels"):
        engine.predict(trained, dataloaders=DataLoader(Subset(Spoilt(value), [3]), collate_fn=ImageBatch.collate))
    for dataset in (Spoilt(value), Subset(Spoilt(value), [0, 1, 2, 3, 4, 5])):
        with pytest.raises(ValueError, match="training image number 3 holds NaN or infinite pixels"):
            engine.fit(Cse(**TINY), train_dataloaders=DataLoader(dataset, batch_size=1))
