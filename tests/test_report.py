"""The page after a test and after a prediction: what it says is what the model has scored."""

import base64
import csv
import hashlib
import json
import resource
import signal
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

from anomalib_cse.deployment.post_processing import MidwayPostProcessor
from anomalib_cse.report import Report, pictures
from anomalib_cse.report.callback import joined
from anomalib_cse.report.origin import KEY, Origin, mark, threshold_source
from anomalib_cse.report.page import Record

from tiny import COMMON, MODELS, QUIET, data_of

both = pytest.mark.parametrize("name", MODELS)


class Page(HTMLParser):
    """A page's text, its scripts by their id, and all that it would load."""

    def __init__(self, path):
        super().__init__()
        self.text, self.scripts, self.loaded, self.script = "", {}, [], None
        self.feed(path.read_text(encoding="utf-8"))
        self.data, self.pictures = (json.loads(self.scripts[name]) for name in ("data", "pictures"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.script = attributes.get("id", f"script {len(self.scripts)}") if tag == "script" else None
        self.loaded += [attributes[name] for name in ("src", "href", "srcset", "action") if name in attributes]

    def handle_endtag(self, tag):
        self.script = None if tag == "script" else self.script

    def handle_data(self, text):
        if self.script:
            self.scripts[self.script] = self.scripts.get(self.script, "") + text
        else:
            self.text += text


def post_processor(low=0.0, threshold=0.5, high=1.0, **options):
    """One that has validated scores of a range; with that of [0, 1] it leaves scores to 0.5 as they are."""
    own = MidwayPostProcessor(**options)
    for name, value in own.named_buffers():
        value.fill_({"min": low, "max": high, "threshold": threshold}.get(name.rpartition("_")[2], 0))
    return own


def batch(scores, labels, paths, size=(40, 30)):
    torch.manual_seed(0)
    scores = torch.tensor(scores)
    maps = scores[:, None, None].expand(-1, *size).clone()
    maps[:, :2] = 0
    return ImageBatch(
        image=torch.rand(len(scores), 3, *size),
        image_path=paths,
        gt_label=None if labels is None else torch.tensor(labels),
        pred_score=scores,
        anomaly_map=maps,
    )


def page_of(folder, *batches, own=None, run="test"):
    """The page of batches as a post-processor leaves them."""
    own, report = own or post_processor(), Report()
    model = SimpleNamespace(post_processor=own, device=torch.device("cpu"))
    trainer = SimpleNamespace(
        default_root_dir=folder,
        fast_dev_run=False,
        ckpt_path=None,
        callbacks=[],
        checkpoint_callback=None,
        callback_metrics={},
        test_dataloaders=[],
        predict_dataloaders=[],
    )
    getattr(report, f"on_{run}_start")(trainer, model)
    for number, outputs in enumerate(batches):
        own.post_process_batch(outputs)
        getattr(report, f"on_{run}_batch_end")(trainer, model, outputs, outputs, number, 0)
    getattr(report, f"on_{run}_end")(trainer, model)
    file, table = sorted(folder.iterdir())
    suffix = "-predict" if run == "predict" else ""
    assert (file.name, table.name) == (f"report{suffix}.html", f"scores{suffix}.csv")
    return Page(file)


def table_of(file):
    """The lines of a table, one mapping each."""
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
        return list(csv.DictReader(opened))


@both
def test_page_says_what_the_model_has_scored(name, trained, mvtec_root, tmp_path, capsys):
    model, data = MODELS[name].load_from_checkpoint(trained[name][1], report=True), data_of(mvtec_root)
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    [metrics] = engine.test(model, datamodule=data, verbose=False)
    predictions = engine.predict(model, data_path=mvtec_root / "tiny" / "test")
    of = {path: score for b in predictions for path, score in zip(b.image_path, b.pred_score.tolist(), strict=True)}
    expected = {"/".join(path.split("/")[-2:]): pytest.approx(score, abs=1e-6) for path, score in of.items()}
    [tested, predicted] = map(Page, sorted(tmp_path.rglob("*.html"), key=lambda file: -len(file.name))[::-1])
    for page in (tested, predicted):
        assert dict(zip(page.data["names"], page.data["scores"], strict=True)) == expected
        assert len(expected) == 8 == len(page.pictures)
        assert (page.data["threshold"], page.data["normalised"]) == (0.5, True)
        assert not [file for file in page.loaded if not file.startswith("data:")]
    kinds = [tested.data["kinds"][kind] for kind in tested.data["kind"]]
    assert kinds == [name.split("/")[0] for name in tested.data["names"]]
    assert f"Test of {name} on MVTecAD, tiny" in tested.text
    assert "8 images: 4 good, 4 with defects (4 square)" in tested.text
    for metric, value in metrics.items():
        assert f"{metric.replace('_', ' ')}{value:.3f}" in tested.text.replace(" <", "<")
    assert "test_efficientnet" in tested.text
    labels, scores = [kind != "good" for kind in kinds], tested.data["scores"]
    false_rejects, found, _ = roc_curve(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores, drop_intermediate=True)
    assert tested.data["roc"] == {"x": list(false_rejects), "y": list(found)}
    assert tested.data["precision_recall"] == {"x": list(recall), "y": list(precision)}
    # cut as anomalib does
    cut = {path: label for b in predictions for path, label in zip(b.image_path, b.pred_label.tolist(), strict=True)}
    above = dict(zip(predicted.data["names"], (s > 0.5 for s in predicted.data["scores"]), strict=True))
    assert above == {"/".join(path.split("/")[-2:]): label for path, label in cut.items()}
    assert (predicted.data["labelled"], predicted.data["roc"]) == (False, None)
    assert predicted.data["kinds"] == ["good", "square"]  # folders
    assert f"Prediction of {name}" in predicted.text
    assert "8 images, without labels (4 in good, 4 in square)" in predicted.text


def test_page_and_table_tell_what_made_them(trained, mvtec_root, tmp_path):
    model, path = trained["CseGaussian"]
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    raw = {}
    model = type(model).load_from_checkpoint(path, report=True)
    score = model.score

    def scored(images, paths=None):
        found = score(images, paths)
        raw.update(zip(paths, found.pred_score.tolist(), strict=True))
        return found

    model.score = scored
    engine.test(model, datamodule=data_of(mvtec_root), ckpt_path=path, verbose=False)
    [page], [table] = (list(tmp_path.rglob(name)) for name in ("report.html", "scores.csv"))
    text, root = Page(page).text, mvtec_root / "tiny"
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    for words in (
        f"CheckpointPATH, SHA-256 {digest}".replace("PATH", str(path)),
        f"Training images{root}/train/good (10)",
        f"These images{root}/test: good (4), square (4)",
        "images of 64x64 pixels, seed 0",
        f"It gave the best F1 on 8 validation images ({root}/test: good (4), square (4)).",
        "All of these 8 images set the threshold themselves",
    ):
        assert words in text.replace(" <", "<").replace("> ", ">"), words
    lines = table_of(table)
    assert list(lines[0]) == ["path", "kind", "label", "score", "raw score", "verdict"]
    assert [line["path"] for line in lines] == sorted(map(str, (root / "test").rglob("*.png")))
    assert {line["path"]: float(line["raw score"]) for line in lines} == {k: pytest.approx(v) for k, v in raw.items()}
    for line in lines:
        is_defect = "square" in line["path"]
        assert (line["kind"], line["label"]) == (("square", "defect") if is_defect else ("good", "good"))
        assert line["verdict"] == ("rejected" if float(line["score"]) > 0.5 else "accepted")
    assert {line["verdict"] for line in lines} == {"rejected", "accepted"}


def test_threshold_of_good_images_is_said_to_be_so(mvtec_root, tmp_path):
    model = MODELS["CseGaussian"](**{**COMMON, "report": True, "reject_rate": 0.1})
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    engine.train(model, datamodule=data_of(mvtec_root))
    [page] = tmp_path.rglob("report.html")
    text = Page(page).text
    assert "It is to reject 10 % of good images, by scores of 10 training images" in text
    assert "set the threshold themselves" not in text


def test_source_of_the_threshold_is_what_set_it(tmp_path):
    paths = [str(tmp_path / "good" / f"{number}.png") for number in range(3)]
    (tmp_path / "good").mkdir()
    for number, path in enumerate(paths):
        Path(path).write_bytes(bytes(number))
    origin = Origin({}, {str(tmp_path / "good"): 3}, frozenset(map(mark, paths)))
    own, moved = post_processor(), tmp_path / "moved" / "good"
    moved.mkdir(parents=True)
    for path in paths[:2]:
        (moved / Path(path).name).write_bytes(Path(path).read_bytes())
    elsewhere = [str(moved / Path(path).name) for path in paths[:2]]
    Path(paths[2]).write_bytes(bytes(9))  # of the same name, and another image
    source, warning = threshold_source(own, origin, [*elsewhere, paths[2], None])
    assert source == f"It gave the best F1 on 3 validation images ({tmp_path}/good (3))."
    assert warning.startswith("2 of these 3 images set the threshold themselves")
    assert threshold_source(own, origin, paths[2:])[1] == ""
    assert "no best F1" in threshold_source(own, origin._replace(has_both=False), paths)[0]
    assert threshold_source(MidwayPostProcessor(), origin, paths)[0].startswith("There is none")
    assert Origin.of({KEY: origin.as_plain()}) == origin
    assert Origin.of({}) == Origin()


@pytest.fixture
def limited_files():
    """No file may become larger than 64 KiB, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_results_are_returned_without_a_page_that_cannot_be_written(trained, mvtec_root, tmp_path, limited_files):
    model = MODELS["CseGaussian"].load_from_checkpoint(trained["CseGaussian"][1], report=True)
    engine, data = Engine(default_root_dir=tmp_path, **QUIET), data_of(mvtec_root)
    with pytest.warns(UserWarning, match=r"report.html cannot be written .*too large"):
        [found] = engine.test(model, datamodule=data)
    assert found["image_AUROC"] == 1
    with pytest.warns(UserWarning, match=r"report-predict.html cannot be written"):
        assert len(engine.predict(model, data_path=mvtec_root / "tiny" / "test" / "good")) == 4
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".html", ".unfinished")]
    assert len([*tmp_path.rglob("scores*.csv")]) == 2


def test_runs_write_to_folders_of_their_own(trained, mvtec_root, dtd, tmp_path):
    """Not into that of the latest training, which may be of another model."""

    def engine():
        return Engine(default_root_dir=tmp_path, **QUIET)

    model = MODELS["CseGaussian"].load_from_checkpoint(trained["CseGaussian"][1], report=True)
    fitting = engine()
    fitting.fit(MODELS["CseGaussian"](**COMMON, dtd_dir=str(dtd)), datamodule=data_of(mvtec_root))
    run = Path(fitting.trainer.default_root_dir)
    before = sorted(run.rglob("*"))
    for _ in range(2):
        engine().test(model, datamodule=data_of(mvtec_root), ckpt_path=trained["CseGaussian"][1])
    engine().predict(model, data_path=mvtec_root / "tiny" / "test" / "good")
    assert sorted(run.rglob("*")) == before
    for own in (run.parent / "test" / "v0", run.parent / "test" / "v1"):
        assert {path.name for path in own.iterdir()} == {"images", "report.html", "scores.csv"}
        assert trained["CseGaussian"][1] in (own / "report.html").read_text()
    predicted = tmp_path / "CseGaussian" / "predict" / "v0"
    assert {path.name for path in predicted.iterdir()} == {"images", "report-predict.html", "scores-predict.csv"}
    assert len(list((predicted / "images").rglob("*.jpg"))) == 4


LINES = {
    "report.html": "scores and images, to choose a threshold by",
    "scores.csv": "score and verdict of each image",
    "images": "a picture of each image",
    "weights/lightning/model.ckpt": "the model",
}


@pytest.mark.parametrize("tests", [True, False])
def test_run_ends_with_where_its_results_are(tests, mvtec_root, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("anomalib_cse.report.callback.rank_zero_info", said.append)
    good = {"normal_dir": mvtec_root / "tiny" / "train" / "good", "num_workers": 0}
    data = data_of(mvtec_root) if tests else Folder("tiny", val_split_mode="none", test_split_mode="none", **good)
    model = MODELS["CseGaussian"](**{**COMMON, "report": True, "reject_rate": None if tests else 0.1})
    engine = Engine(default_root_dir=tmp_path, limit_val_batches=float(tests), **QUIET)
    engine.train(model, datamodule=data)
    found = list(LINES) if tests else ["weights/lightning/model.ckpt"]
    folder, width = engine.trainer.default_root_dir, max(map(len, found))
    [closing] = said
    untested = [] if tests else ["No images were tested."]
    *lines, following = closing.splitlines()
    shape = "--model.backbone=test_efficientnet '--model.layers=[2,3]' '--model.image_size=[64,64]'"
    checkpoint = f"{folder}/weights/lightning/model.ckpt"
    assert following == f"Next: anomalib predict --model CseGaussian {shape} --data FOLDER --ckpt_path {checkpoint}"
    assert lines == [
        *untested,
        f"Results in {folder}",
        *(f"  {file:{width}}  {LINES[file]}" for file in found),
    ]


@both
def test_page_is_not_written_where_it_is_not_wanted(name, trained, mvtec_root, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("anomalib_cse.report.callback.rank_zero_info", said.append)
    data, path = data_of(mvtec_root), trained[name][1]
    for options, report in (({}, False), ({"fast_dev_run": True}, True)):
        model = MODELS[name].load_from_checkpoint(path, report=report)
        engine = Engine(default_root_dir=tmp_path, **QUIET, **options)
        engine.test(model, datamodule=data, verbose=False)
        engine.predict(model, data_path=mvtec_root / "tiny" / "test")
    assert not list(tmp_path.rglob("*.html"))
    assert sorted(file.name for file in tmp_path.rglob("*.csv")) == ["scores-predict.csv", "scores.csv"]
    assert len(said) == 2
    (tmp_path / "report.html").write_text("of an earlier run, whose table is written over")
    Trainer(default_root_dir=tmp_path, **QUIET).test(
        MODELS[name].load_from_checkpoint(path, report=False), datamodule=data, verbose=False
    )
    assert not list(tmp_path.rglob("*.html"))


def test_names_are_shown_as_they_are(tmp_path):
    odd = ["</script><b>.png", "good/'\"&lt;.png", "</面ü {{ x }}.png", "a'b/\udce4.png"]  # the folder of two is <
    paths = [f"/x/{file}" for file in odd]
    page = page_of(tmp_path, batch([0.1, 0.2, 0.6, 0.7], [1, 0, 1, 1], paths), batch([0.3, 0.9], [0, 1], None))
    assert page.data["names"][:4] == odd
    assert page.data["names"][4:] == ["image 5", "image 6"]
    assert page.data["kinds"] == ["good", "<", "a'b", "defect"]
    assert [page.data["kinds"][kind] for kind in page.data["kind"]] == ["<", "good", "<", "a'b", "good", "defect"]
    assert "6 images: 2 good, 4 with defects (2 <, 1 a'b, 1 defect)" in page.text
    assert [line["path"] for line in table_of(tmp_path / "scores.csv")] == [*paths, "", ""]


def test_pictures_are_those_nearest_to_the_threshold(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST", 5)
    scores = np.random.default_rng(0).random((6, 10), dtype=np.float32)
    page = page_of(tmp_path, *(batch(list(s), None, None, size=(400, 200)) for s in scores), run="predict")
    every = np.where(scores < 0.5, scores, 1 - 0.25 / scores).flatten().astype(float)
    assert page.data["scores"] == pytest.approx(list(every), abs=1e-6)
    assert sorted(number for number, *_ in page.pictures) == sorted(np.argsort(np.abs(every - 0.5))[:5])
    assert "5 of 60 images are shown, those nearest to the threshold" in page.text
    for number, *files in page.pictures:
        image, drawn = (Image.open(BytesIO(base64.b64decode(file))) for file in files)
        assert (image.size, drawn.size, drawn.mode) == ((128, 256), (48, 96), "L")
        assert abs(int(np.asarray(drawn)[60, 20]) - 255 * every[number]) < 4
        assert np.asarray(drawn)[0, 20] < np.asarray(drawn)[60, 20]


def test_without_thresholds_the_highest_scores_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST", 2)
    page = page_of(tmp_path, batch([1.0, 5.0, 3.0, 2.0], None, None), own=MidwayPostProcessor(), run="predict")
    assert (page.data["threshold"], page.data["normalised"]) == (None, False)
    assert sorted(number for number, *_ in page.pictures) == [1, 2]
    for words in ("This run has no threshold", "those of the highest scores", "not normalised to [0, 1]"):
        assert words in page.text


@pytest.mark.parametrize(
    ("options", "threshold"), [({"image_sensitivity": 0.25}, 0.75), ({"enable_normalization": False}, 3.0)]
)
def test_threshold_is_that_of_the_post_processor(options, threshold, tmp_path):
    page = page_of(tmp_path, batch([1.0, 5.0, 3.5], [0, 1, 1], None), own=post_processor(1.0, 3.0, 5.0, **options))
    assert page.data["threshold"] == threshold
    assert page.data["normalised"] is (threshold == 0.75)
    assert page.data["scores"] == pytest.approx([1 / 6, 0.7, 4 / 7] if threshold == 0.75 else [1, 5, 3.5])


@pytest.mark.parametrize(("label", "words"), [(0, "There are no defective ones"), (1, "There are no good ones")])
def test_what_one_class_cannot_show_is_said(label, words, tmp_path):
    page = page_of(tmp_path, batch([0.2, 0.7], [label, label], ["/x/a/1.png", "/x/b/2.png"]))
    assert page.data["kinds"] == (["good", "a", "b"] if label else ["good"])
    assert (page.data["roc"], page.data["precision_recall"]) == (None, None)
    assert words in page.text


def test_nothing_is_written_without_scores(tmp_path):
    report, outputs = Report(), batch([0.5], [0], None)
    options = {"fast_dev_run": False, "ckpt_path": None, "test_dataloaders": [], "callback_metrics": {}}
    trainer = SimpleNamespace(default_root_dir=tmp_path, **options)
    report.on_test_start(trainer, SimpleNamespace())
    for nothing in (None, torch.zeros(2), outputs.update(pred_score=None)):
        report.on_test_batch_end(trainer, None, nothing, None, 0)
    report.on_test_end(trainer, None)
    assert not list(tmp_path.iterdir())


def test_processes_share_one_page():
    """Lightning fills up the last share with images of others."""
    first = [Record("a", label=False, score=0.1), Record(None, label=True, score=0.9)]
    second = [
        Record("a", label=False, score=0.1),
        Record("b", label=True, score=0.6),
        Record(None, label=False, score=0.2),
    ]
    shares = [(first, [(-0.4, 0, b"a", b""), (-0.4, -1, b"none", b"")])]
    shares += [(second, [(-0.4, 0, b"a", b""), (-0.1, -1, b"b", b""), (-0.3, -2, b"other", b"")])]
    records, kept = joined(shares)
    assert records == [first[0], first[1], *second[1:]]
    assert {(-number, image) for _, number, image, _ in kept} == {(0, b"a"), (1, b"none"), (2, b"b"), (3, b"other")}
