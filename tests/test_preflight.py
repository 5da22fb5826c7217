"""What is said of images before training: each planted fault by its name, and nothing of a clean folder."""

import builtins
import io
import logging
import re
import runpy
import shutil
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_cse.data import MVTec
from anomalib_cse.preflight.__main__ import main
from anomalib_cse.preflight.dataset import alike, inspect, summary
from anomalib_cse.preflight.findings import messages
from anomalib_cse.preflight.images import (
    IN_A_ROW,
    Sample,
    nearly_constant,
    read_header,
    samples_of,
    shows_nothing,
)

from tiny import COMMON, MODELS, QUIET

SUMMARY = "10 training images, 96x72 pixels, colour, 8 bits; 4 good and 4 defective ones to {} with; all with masks"


def noise(seed, shape=(72, 96, 3), low=90, high=110):
    return Image.fromarray(np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8))


def flat(value=20, shape=(72, 96, 3)):
    """A covered lens: what noise there is has a standard deviation of half a grey value."""
    return Image.fromarray(np.random.default_rng(0).integers(value, value + 2, shape, dtype=np.uint8))


@pytest.fixture
def category(mvtec_root, tmp_path):
    """A clean dataset in MVTec AD's layout, to plant faults in."""
    shutil.copytree(mvtec_root / "tiny", tmp_path / "data" / "tiny")
    return tmp_path / "data" / "tiny"


def good(category, name):
    return category / "train" / "good" / name


def cut_off(category):
    file = good(category, "003.png")
    file.write_bytes(file.read_bytes()[:-2000])


def no_header(category):
    for number in range(7):
        good(category, f"torn{number}.png").write_text("no image")


def contrary(category):
    shutil.copy(category / "test" / "square" / "001.png", good(category, "defect.png"))


def contrary_in_the_test(category):
    shutil.copy(category / "test" / "square" / "001.png", category / "test" / "good" / "defect.png")


def repeated(category):
    for number in (20, 21):
        shutil.copy(good(category, "003.png"), good(category, f"0{number}.png"))


def leaked(category):
    shutil.copy(good(category, "003.png"), category / "test" / "good" / "009.png")
    good(category, "linked.png").symlink_to(category / "test" / "good" / "000.png")


def wide(category):
    noise(1, (72, 106, 3)).save(category / "test" / "good" / "wide.png")


def grey(category):
    for number in (1, 2):
        noise(number, (72, 96)).save(good(category, f"grey{number}.png"))


def alpha(category):
    noise(1, (72, 96, 4)).save(category / "test" / "good" / "alpha.png")
    noise(2).quantize().save(good(category, "alpha.png"), transparency=3)


def black(category):
    flat(0).save(good(category, "black.png"))
    flat().save(good(category, "cap.png"))


def deep(category):
    values = np.random.default_rng(0).integers(0, 2**16, (72, 96), dtype=np.uint16)
    Image.fromarray(values).save(good(category, "deep.png"))


ERRORS = {
    cut_off: r"training file \S*train/good/003\.png cannot be read as an image: .*; replace it or take it out",
    no_header: r"(training file \S*torn\d\.png cannot be read as an image: .*\n){5}",
    contrary: r"test/square/001\.png counts as defective, but \S*train/good/defect\.png, the same image, as good",
    contrary_in_the_test: r"test/square/001\.png counts as defective, but \S*test/good/defect\.png, the same image",
}
WARNINGS = {
    repeated: r"020\.png is the same image as \S*003\.png, which trains twice \(1 others too\)$",
    leaked: r"test/good/009\.png is to test with, but \S*train/good/003\.png, .* flatters \(1 others too\)$",
    wide: r"images are resized to one shape, .*/\d+\.png has 96x72 pixels, \S*wide\.png 106x72$",
    grey: r"grey1\.png is grey, but \S*\d+\.png colour: .* \(1 others too\)$",
    alpha: r"train/good/alpha\.png has an alpha channel: anomalib drops it.* \(1 others too\)$",
    black: r"black\.png is nearly constant.* \(1 others too\)$",
    deep: r"deep\.png is of Pillow's mode 'I;16'",
}


@pytest.fixture
def fit(category, dtd, tmp_path):
    """Fits a model to the dataset."""

    def run(name="CseGaussian"):
        engine = Engine(max_epochs=1, default_root_dir=tmp_path / "results", **QUIET)
        model = MODELS[name](**COMMON, dtd_dir=str(dtd))
        engine.fit(model, datamodule=MVTec(category.parent, "tiny", num_workers=0))

    return run


def doubts(*images):
    """What may be wrong with images to train, to validate and to test with."""
    _, findings, _ = inspect(*images)
    errors, warnings = messages(findings)
    assert not errors
    return warnings


def written(capsys, *folders):
    """Run the command in this process; return the summary, what is wrong, what may be, and the exit code."""
    code = main([str(folder) for folder in folders])
    summary, *lines = re.split(r"^(?=error: |warning: )", capsys.readouterr().out, flags=re.MULTILINE)
    errors, doubts = ([line.strip() for line in lines if line.startswith(kind)] for kind in ("error", "warning"))
    assert len(errors) + len(doubts) == len(lines)
    return summary.strip(), errors, doubts, code


@pytest.mark.parametrize("name", MODELS)
def test_a_fit_says_in_one_line_what_there_is_and_nothing_of_a_clean_folder(name, fit, caplog):
    """Our warnings are errors in tests; of Cse's images some are held out."""
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(name)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if re.match(r"\d+ training images", line)] == [SUMMARY.format("validate and test")]


@pytest.mark.parametrize("plant", ERRORS)
def test_what_makes_results_wrong_is_refused_before_training(plant, category, fit, capsys):
    plant(category)
    with pytest.raises(ValueError, match=ERRORS[plant]):
        fit()
    assert not list(category.parents[1].rglob("*.ckpt"))
    _, errors, doubts, code = written(capsys, category)
    assert re.search(ERRORS[plant], "\n".join(error.removeprefix("error: ") for error in errors))
    assert len(errors) == (7 if plant is no_header else 1)
    assert not doubts
    assert code == 1


def test_all_that_is_wrong_is_said_at_once(category, dtd, tmp_path):
    for plant in (contrary, cut_off):
        plant(category)
    engine = Engine(precision="64-true", min_epochs=2, default_root_dir=tmp_path / "results", **QUIET)
    with pytest.raises(ValueError, match="precision must be") as caught:
        engine.fit(MODELS["CseGaussian"](**COMMON, dtd_dir=str(dtd)), datamodule=MVTec(category.parent, "tiny"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    said = "precision must be", "min_epochs: CseGaussian", "003.png cannot be read", "counts as defective"
    for part in said:
        assert sum(part in line for line in lines) == 1, part


@pytest.fixture
def opened(monkeypatch):
    """How often each file has been opened, also by Pillow."""
    counts = Counter()

    def counted(file, *args, **kwargs):
        counts[str(file)] += 1
        return plain_open(file, *args, **kwargs)

    plain_open = io.open
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", counted)
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_a_fit_opens_each_file_once_before_it_and_once_to_use_it(name, category, fit, opened):
    """Of training images it also decodes the few of the fewest bytes, which may show nothing."""
    for number, path in enumerate(sorted(category.rglob("*.png"))):  # files of one length would be compared
        path.write_bytes(path.read_bytes() + bytes(1000 * number))
    opened.clear()
    fit(name)
    counts = {part: [opened[str(path)] for path in category.glob(f"{part}/*.png")] for part in ("train/good", "test/*")}
    masks = [opened[str(path)] for path in category.glob("ground_truth/*/*.png")]
    assert sorted(counts["train/good"]) == [2] * (10 - IN_A_ROW) + [3] * IN_A_ROW
    assert counts["test/*"] == [2] * 8
    assert masks == [2] * 4


@pytest.mark.parametrize("plant", WARNINGS)
def test_the_command_warns_of_each_fault_alone(plant, category, capsys):
    plant(category)
    _, errors, doubts, code = written(capsys, category)
    assert not errors
    assert sum(bool(re.search(WARNINGS[plant], doubt)) for doubt in doubts) == 1, doubts
    assert len(doubts) == 1 + (plant is deep)  # which is grey, too
    assert code == 0


def test_a_fit_warns_of_each_fault_once(category, fit):
    planted = [plant for plant in WARNINGS if plant is not deep]
    for plant in planted:
        plant(category)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    messages = [str(warning.message) for warning in caught]
    for plant in planted:
        assert sum(bool(re.search(WARNINGS[plant], message)) for message in messages) == 1, messages
    assert sum("anomalib_cse" in warning.filename for warning in caught) == len(planted)


def test_one_image_to_train_and_to_test_with_flatters(category):
    """Not to validate and to test with, which is anomalib's default."""
    train = category / "train" / "good"
    data = Folder("tiny", train, abnormal_dir=category / "test" / "square", normal_test_dir=train, num_workers=0)
    data.setup()
    images = [samples_of(part) for part in (data.train_data, data.val_data, data.test_data)]
    [warning] = doubts(*images)
    assert re.search(r"is to test with, but .* is trained on: the test flatters \(9 others too\)$", warning)
    assert not doubts([], *images[1:])


def test_images_of_several_kinds_are_summed_up(tmp_path):
    samples = [Sample(f"{number}.png", f"{number}.png" * (number < 2), number < 3) for number in range(9)]
    kinds = {"L": (30, 20), "I;16": (30, 20), "P": (9, 99), "RGB": (30, 20)}
    for mode, size in kinds.items():
        Image.new(mode, size).save(tmp_path / f"{mode[0]}.png")
    headers = [read_header(str(path)) for path in tmp_path.iterdir()]
    found = summary(samples[3:], samples[:4], samples[:2], headers)
    assert found == (
        "6 training images, 30x20 to 9x99 pixels, colour and grey and palette, some of more than 8 bits; "
        "1 good and 3 defective ones to validate with; 0 good and 2 defective ones to test with; 2 with masks"
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
@pytest.mark.parametrize("shape", [(256, 256), (256, 256, 3)], ids=["grey", "colour"])
def test_nearly_constant_images_are_found_in_every_format(suffix, shape, tmp_path):
    for number in range(12):
        noise(number, shape).save(tmp_path / f"{number:02}.{suffix}")
    for number in (3, 10):  # several in a row show something before the second
        flat(100, shape).save(tmp_path / f"{number:02}.{suffix}")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    found, unreadable = nearly_constant(map(read_header, paths))
    assert sorted(found) == [paths[3], paths[10]]
    assert not unreadable


def test_few_compressed_images_are_decoded(tmp_path, monkeypatch):
    decoded = []
    place = "anomalib_cse.preflight.images.shows_nothing"
    monkeypatch.setattr(place, lambda path: decoded.append(path) or "flat" in path)
    for number in range(20):
        noise(number).save(tmp_path / f"{number}.png")
    flat().save(tmp_path / "flat.png")
    nearly_constant(read_header(str(path)) for path in tmp_path.iterdir())
    assert len(decoded) == 1 + IN_A_ROW


def test_a_thing_between_the_pixels_looked_at_first_counts(tmp_path):
    image = np.full((1024, 1024), 100, np.uint8)
    image[::8, ::8] = image[1::8, ::8] = 255  # resized to 128x128, one in 8 pixels is left: the fifth
    Image.fromarray(image).save(tmp_path / "dots.png")
    assert not shows_nothing(str(tmp_path / "dots.png"))
    Image.fromarray(np.full((1024, 1024), 100, np.uint8)).save(tmp_path / "none.png")
    assert shows_nothing(str(tmp_path / "none.png"))


def test_files_are_alike_only_if_every_byte_is(tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    contents = [content, content[:-1] + b"x", b"x" + content[1:], content, content + b"x", b"", content]
    for number, written_content in enumerate(contents):
        (tmp_path / f"{number}").write_bytes(written_content)
    assert alike([str(tmp_path / f"{number}") for number in range(len(contents))]) == [[0, 3, 6]]


@pytest.mark.parametrize("command", ["anomalib_cse.preflight", "anomalib_cse.data.check"])
def test_the_command_runs_as_a_module(command, category, capsys, monkeypatch):
    """By its old name too, without Python's warning that the module has been imported before, as its package is."""
    for module in [name for name in sys.modules if name.split(".")[0] == "anomalib_cse"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "argv", ["check", str(category)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
    written = capsys.readouterr()
    assert written.out == SUMMARY.format("test") + "\n"
    assert ("python -m anomalib_cse.preflight now" in written.err) == (command == "anomalib_cse.data.check")
    assert stopped.value.code == 0


def test_folders_without_a_layout_are_all_training_images(category, capsys):
    parts = category / "test" / "good", category / "train"
    assert written(capsys, *parts) == ("14 training images, 96x72 pixels, colour, 8 bits", [], [], 0)


def test_the_command_says_that_images_of_several_folders_are_all_taken_for_good(category, capsys):
    test = category / "test"
    *_, [doubt], code = written(capsys, test)
    told = (
        f"{test} has images in 2 folders, all taken for good ones to train with: 4 in {test}/good, 4 in {test}/square"
    )
    assert doubt.endswith(told)
    assert code == 0


def test_the_command_reads_masks_and_refuses_what_is_no_dataset(category, capsys):
    masks = sorted((category / "ground_truth" / "square").iterdir())
    Image.new("L", (96, 72)).save(masks[0])
    Image.new("L", (96, 96), 255).save(masks[1])
    masks[2].write_bytes(masks[2].read_bytes()[:60])
    masks[3].unlink()
    summary_line, errors, doubts, code = written(capsys, category)
    assert summary_line.endswith("3 with masks")
    for said, error in zip(
        (r"holds 4 images .* 3 masks", r"96x96 .*proport", r"002_mask\.png cannot"), errors, strict=True
    ):
        assert re.search(said, error)
    for said, doubt in zip((r"000_mask\.png, .*, is empty", r"001_mask\.png, .*, covers all"), doubts, strict=True):
        assert re.search(said, doubt)
    assert code == 1
    (category / "empty").mkdir()
    for place, said in (("empty", "empty holds no images"), ("none", "is not a folder"), ("..", "such as .*tiny")):
        with pytest.raises(SystemExit) as stopped:
            main([str(category), str(category / place)])
        assert stopped.value.code == 2
        assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((64, 64), ["resized to 64x64, one side is shortened 16 times more than the other", "(32, 256) (height"]),
        ((32, 512), []),
        ((32, 400), []),
        ((512, 32), ["resized to 32x512, one side is shortened 2.6e+02 times", "(32, 512) (height"]),
    ],
)
def test_strip_that_is_squeezed_is_warned_of(size, said, tmp_path):
    for number in range(3):
        noise(number, (32, 512, 3)).save(tmp_path / f"{number}.png")
    found = doubts([Sample(str(path)) for path in sorted(tmp_path.iterdir())], [], [], size)
    assert len(found) == bool(said)
    assert all(part in found[0] for part in said)


def test_fit_warns_of_squeezed_images_by_the_size_of_its_pre_processor(tmp_path):
    for number in range(6):
        noise(number, (72, 200, 3)).save(tmp_path / f"{number}.png")
    data = Folder(name="strips", normal_dir=tmp_path, test_split_mode="none", val_split_mode="none", num_workers=0)
    model = MODELS["CseGaussian"](**COMMON)
    with pytest.warns(UserWarning, match=r"resized to 64x64, one side is shortened 2.8 times more .*\(32, 96\)"):
        Engine(default_root_dir=tmp_path / "out", limit_val_batches=0, **QUIET).fit(model, datamodule=data)
