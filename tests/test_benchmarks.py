"""The benchmarks: what the comparison makes and leaves out, its lists of models, costs, and made-up surfaces."""

import argparse
import inspect
import math
import time
from pathlib import Path

import cv2
import numpy as np
import openvino
import pandas as pd
import pytest
import timm
import torch
import yaml
from anomalib.data import ImageBatch, PredictDataset
from anomalib.engine import Engine
from anomalib.metrics import AUPRO
from anomalib.models import AnomalibModule
from torchvision.transforms.v2 import Normalize

from anomalib_cse import Cse, CseGaussian
from anomalib_cse.deployment import MidwayPostProcessor

from tiny import COMMON, QUIET, signal_stack

ROOT = Path(__file__).parents[1]
LISTS = sorted((ROOT / "configs" / "compare").glob("*.yaml"))
TINY = {key: list(v) if isinstance(v, tuple) else v for key, v in COMMON.items() if key != "seed"}
GAUSSIAN = {"name": "Gaussian", "class_path": "anomalib_cse.CseGaussian", "init_args": TINY}
BROKEN = {"name": "Broken", "class_path": "anomalib_cse.Cse", "init_args": {"num_centres": 0}}


@pytest.fixture(scope="module", autouse=True)
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny network in a folder, with means of its own."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    net = timm.create_model("test_efficientnet", pretrained_cfg_overlay={"mean": [0.1, 0.2, 0.3]})
    timm.models.save_for_hf(net, folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def compared(mvtec_root, tmp_path_factory):
    """The arguments of a comparison that has been run, and its output."""
    import compare

    folder = tmp_path_factory.mktemp("compare")
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": [BROKEN, {**GAUSSIAN, "note": "tiny"}]}))
    arguments = ["--config", str(folder / "models.yaml"), "--root", str(mvtec_root), "--categories", "tiny"]
    arguments += ["--seeds", "0", "--rounds", "2", "--output", str(folder / "output")]
    import cells

    child, in_children = cells.in_child, []

    def in_child(run, **limits):
        """The first cell in a process, all else in this one: each imports all again."""
        if limits and not in_children:
            in_children.append(run)
            return child(run, **limits)
        return run()

    with pytest.MonkeyPatch.context() as patch:
        for module in (cells, compare):
            patch.setattr(module, "in_child", in_child)
        compare.main(arguments)
    return arguments, folder / "output"


def test_comparison_makes_a_table_and_a_failed_model_stops_nothing(compared):
    from report import METRICS

    _, output = compared
    broken, gaussian = pd.read_csv(output / "results.csv").fillna({"failed": ""}).to_dict("records")
    assert (broken["model"], gaussian["model"]) == ("Broken", "Gaussian")
    assert "num_centres must be" in broken["failed"]
    assert gaussian["failed"] == ""
    assert all(gaussian[name] > 0 for name in ("fit_s", "exported_MB", "peak_MB", "image_F1Score"))
    assert all(0 <= gaussian[name] <= 1 for name in METRICS)
    [latency] = pd.read_csv(output / "latency.csv")["ms"]
    assert latency > 0
    assert {file.name for file in output.glob("*.png")} == {"maps_tiny.png", "trade_off.png"}
    assert len(list(output.glob("kept/*/exported/model.xml"))) == 1
    [maps] = output.glob("kept/*/maps.npz")
    drawn = np.load(maps)
    assert all(0 <= drawn[name].min() < drawn[name].max() <= 1 for name in ("maps", "scores"))  # scaled by validation
    text = (output / "table.md").read_text()
    assert "| 1 | tiny |" in next(line for line in text.splitlines() if line.startswith("| Gaussian"))
    assert "| Broken | tiny | 0 | ValueError: num_centres must be" in text


def test_comparison_goes_on_where_it_was_broken_off(compared, capsys):
    from compare import main

    arguments, output = compared
    before = (output / "results.csv").read_bytes()
    main(arguments)
    assert "2 cells are done, 0 to do" in capsys.readouterr().out
    main([*arguments, "--models", "Gaussian", "--retry-failed"])  # failures that were not asked about are kept
    assert "2 cells are done, 0 to do" in capsys.readouterr().out
    assert (output / "results.csv").read_bytes() == before


def test_changed_model_wants_another_name(compared, tmp_path):
    from compare import main

    arguments, _ = compared
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"models": [{**GAUSSIAN, "train_batch_size": 3}]}))
    with pytest.raises(SystemExit, match="other settings"):
        main([*arguments, "--config", str(tmp_path / "models.yaml")])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--categories", "tiny", "square"], "square has no train/good"),
        (["--models", "Nothing"], "has the models Broken, Gaussian; got Nothing"),
    ],
)
def test_datasets_and_models_must_exist(wrong, message, compared, capsys):
    from compare import parse

    with pytest.raises(SystemExit):
        parse([*compared[0], *wrong])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_every_list_names_models_that_accept_their_arguments(file):
    from contenders import read_contenders

    contenders = read_contenders(file)
    for contender in contenders.values():
        kind = contender.model_class
        assert issubclass(kind, AnomalibModule)
        inspect.signature(Cse if issubclass(kind, Cse) else kind).bind(**contender.init_args)
    assert any(issubclass(contender.model_class, (Cse, CseGaussian)) for contender in contenders.values())


def test_list_with_a_misspelt_key_is_refused(tmp_path):
    from contenders import read_contenders

    (tmp_path / "models.yaml").write_text("models: [{name: Cse, class_path: anomalib_cse.Cse, epochs: 3}]")
    with pytest.raises(ValueError, match="epochs"):
        read_contenders(tmp_path / "models.yaml")


def test_peers_get_the_normalisation_of_their_backbone(backbone):
    from contenders import Contender

    arguments = {"backbone": backbone, "layers": ["blocks.1", "blocks.2"]}
    model = Contender("Patchcore", "anomalib.models.Patchcore", arguments).build(seed=0)
    [normalise] = [t for t in model.pre_processor.transform.transforms if isinstance(t, Normalize)]
    assert normalise.mean == [0.1, 0.2, 0.3]


def test_process_that_dies_is_a_result():
    from functools import partial

    from common import in_child

    start = time.monotonic()
    assert in_child(partial(time.sleep, 60), time_limit=4)["failed"] == "not done after 4 s"
    assert time.monotonic() - start < 40
    assert "MemoryError" in in_child(partial(bytearray, 2**33), memory_limit=1)["failed"]


def test_network_that_fails_does_not_spoil_the_others(monkeypatch):
    import common

    def broken(*_):
        raise RuntimeError

    images = np.zeros((2, 3, 4, 4), np.float32)
    monkeypatch.setattr(common, "in_turns", lambda runs, rounds: dict.fromkeys(runs, 30.0))
    opened = {"unreadable": broken, "fails": lambda: (broken, images), "runs": lambda: (np.sum, images)}
    assert common.per_image(opened, rounds=3) == {"runs": 15.0}  # of two images


def test_networks_that_end_in_the_order_of_their_beginning_leave_signal_handlers_their_stack(tmp_path):
    """With a core for each they would run on the first one's, which is unmapped by then."""
    from common import compiled

    value = openvino.opset13.parameter([1, 3], np.float32)
    openvino.save_model(openvino.Model([openvino.opset13.relu(value)], [value]), tmp_path / "model.xml")
    opened = [compiled(tmp_path / "model.xml", {}) for _ in range(2)]
    before = signal_stack().raw
    while opened:
        del opened[0]
    assert signal_stack().raw == before


def test_table_gives_mean_and_spread_over_the_seeds():
    from report import METRICS, not_run, table

    key = {"model": "Cse", "category": "grid"}
    costs = dict.fromkeys([*METRICS[1:], "exported_MB", "peak_MB"], 1.0)
    notes = {"deviations": "tiny", "remark": "", "failed": ""}
    lines = pd.DataFrame(
        [
            {**key, "seed": 0, "image_AUROC": 0.5, "fit_s": 10.0, **costs, **notes},
            {**key, "seed": 1, "image_AUROC": 0.9, "fit_s": 30.0, **costs, **notes},
            {**key, "seed": 2, **notes, "failed": "no memory"},
        ]
    )
    [row] = [line for line in table(lines, pd.DataFrame([{**key, "ms": 12.34}])).splitlines() if "| Cse" in line]
    spread = math.sqrt((0.2**2 + 0.2**2) / 1)  # of a sample of two
    assert row.startswith(f"| Cse | 0.700 ± {spread:.3f} | 1.000 ± 0.000 |")
    assert row.endswith("| 12.3 | 20 | 1 | 1 | 2 | tiny |")
    assert "| Cse | grid | 2 | no memory |" in not_run(lines)


def test_trade_off_is_of_sets_that_all_models_have(tmp_path, monkeypatch):
    import report

    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, file: drawn.append(figure))
    results = [("A", "grid", 0.8), ("A", "grid", 0.6), ("A", "leather", 0.9), ("B", "grid", 0.5), ("C", "leather", 0.4)]
    lines = pd.DataFrame(results, columns=["model", "category", "pixel_AUPRO"]).assign(failed="")
    times = [("A", "grid", 10.0), ("A", "leather", 70.0), ("B", "grid", 30.0)]
    report.trade_off(lines, pd.DataFrame(times, columns=["model", "category", "ms"]), tmp_path / "picture.png")
    [axis] = drawn[0].axes
    points = np.concatenate([points.get_offsets() for points in axis.collections])
    np.testing.assert_allclose(points, [(10, 0.7), (30, 0.5)])
    assert [text.get_text() for text in axis.texts] == ["A", "B"]
    assert axis.get_ylabel() == "AUPRO"


def test_binary_classifier_is_trained_with_the_cross_entropy_of_all_images():
    from anomalib_cse.cse.training_pairs import Pairs

    from classifier import BinaryClassifier

    classifier = BinaryClassifier(**TINY).eval()
    images, corrupted = torch.rand(4, 3, 64, 64), torch.tensor([True, False])
    first, second = (classifier.model.backbone(half) for half in images.chunk(2))
    classifier.model.embedder.load_state_dict(classifier.embedder.state_dict())
    classifier.model.set_centres(torch.ones(1, 1, 1, 1), (64, 64))  # without which no model scores
    scores = classifier.model(images).pred_score
    expected = -(torch.log(1 - scores[:2]).sum() + torch.log(scores[2]) + torch.log(1 - scores[3])) / 4
    assert torch.isclose(classifier.pair_loss(Pairs(first, second, corrupted)), expected, atol=1e-5)
    with pytest.raises(ValueError, match="num_centres"):
        BinaryClassifier(num_centres=2)


def test_exported_models_are_measured_beside_their_backbones(tmp_path, monkeypatch):
    import latency

    monkeypatch.setattr(latency, "RUNTIMES", {"OpenVINO f32": latency.RUNTIMES["OpenVINO f32"]})
    monkeypatch.setattr(latency, "in_child", lambda measure: measure())  # what a process costs is imports
    names = ["backbone of CseGaussian, Lite0", "CseGaussian, Lite0"]
    backbone = latency.MODELS[names[0]]()
    monkeypatch.setitem(latency.MODELS, names[0], lambda: backbone)
    arguments = ["--models", *names, "--output", str(tmp_path), "--rounds", "3"]
    latency.main([*arguments, "--export-only"])
    assert not (tmp_path / "results.csv").exists()
    files = {file: file.stat().st_mtime for file in tmp_path.glob("exported/**/*.xml")}
    latency.main(arguments)
    assert files == {file: file.stat().st_mtime for file in tmp_path.glob("exported/**/*.xml")}
    lines = pd.read_csv(tmp_path / "results.csv")
    assert lines["model"].tolist() == names
    assert (lines[["OpenVINO f32, 1", "OpenVINO f32, 8"]] > 0).all(axis=None)
    assert lines["MB"][0] < lines["MB"][1]
    image = np.random.default_rng(0).random((1, 3, 256, 256), dtype=np.float32)
    file = next((tmp_path / "exported").glob("backbone*/**/*.xml"))
    network, shape = latency.opened(file, latency.RUNTIMES["OpenVINO f32"])
    assert shape == [None, 3, 256, 256]
    with torch.no_grad():
        expected = backbone.net(torch.from_numpy(image))
    for found, features in zip(network(image).values(), expected, strict=True):
        np.testing.assert_allclose(found, features, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["Cse", "CseGaussian"])
def test_cost_of_training_is_measured(name, mvtec_root, backbone):
    from cost import fit

    dataset = {"root": mvtec_root, "category": "tiny"}
    options = argparse.Namespace(backbone=backbone, dtd_dir="builtin", epochs=2, **dataset)
    row = fit(name, options, budget=1)
    assert row["images"] == 10
    assert row["fit s"] > row.get("epoch s", 0) >= 0


def test_few_images_are_as_many_as_are_asked_for_and_other_ones_in_every_draw(mvtec_root, dtd, tmp_path, monkeypatch):
    import few

    from contenders import read_contenders

    seen = []
    step = CseGaussian.training_step

    def noting(self, batch, batch_idx):
        seen[-1] |= set(batch.image_path)
        return step(self, batch, batch_idx)

    start = CseGaussian.on_train_start
    monkeypatch.setattr(CseGaussian, "on_train_start", lambda self: (seen.append(set()), start(self)))
    monkeypatch.setattr(CseGaussian, "training_step", noting)
    contender = {"name": "Tiny", "class_path": "anomalib_cse.CseGaussian", "init_args": {**TINY, "dtd_dir": str(dtd)}}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"models": [contender]}))
    arguments = ["--config", tmp_path / "list.yaml", "--root", mvtec_root, "--categories", "tiny", "--models", "Tiny"]
    tiny = read_contenders(tmp_path / "list.yaml")["Tiny"]
    rows = [few.measure(tiny, mvtec_root / "tiny", count, draw) for count, draw in ((1, 0), (3, 0), (3, 1))]
    assert [len(images) for images in seen] == [1, 3, 3]
    assert seen[1] != seen[2]
    few.main([*map(str, arguments), "--counts", "3", "--draws", "2", "--output", str(tmp_path / "few")])
    lines = pd.read_csv(tmp_path / "few" / "results.csv")
    assert lines["AUPRO"].tolist() == pytest.approx([row["AUPRO"] for row in rows[1:]], abs=1e-3)
    assert f"| Tiny | 3 | 1 | {lines['AUPRO'].mean():.3g} |" in (tmp_path / "few" / "table.md").read_text()
    with pytest.raises(SystemExit):
        few.main([*map(str, arguments), "--counts", "11", "--output", str(tmp_path / "few")])


def test_thresholds_are_counted_out_on_the_test_images(mvtec_root, dtd, tmp_path):
    import thresholds

    from contenders import read_contenders

    contender = {"name": "Tiny", "class_path": "anomalib_cse.CseGaussian", "init_args": {**TINY, "dtd_dir": str(dtd)}}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"models": [contender]}))
    arguments = ["--config", tmp_path / "list.yaml", "--root", mvtec_root, "--categories", "tiny", "--model", "Tiny"]
    thresholds.main([*map(str, arguments), "--output", str(tmp_path / "out")])
    lines = pd.read_csv(tmp_path / "out" / "results.csv")
    assert lines["way"].tolist() == ["reject_rate"] * 3 + ["from_train", "synthetic"]
    assert lines["images"].tolist() == [10] * 3 + [8, 8]
    assert (lines["defects found %"] == 100).all()
    assert {"light, measured %", "noise, measured %", "blur, measured %"} <= set(lines)
    assert (lines["measured %"] == lines["good ones rejected"].str.split().str[0].astype(int) * 25).all()
    images = thresholds.images_of(mvtec_root / "tiny", 32, val_split_mode="none")
    model = read_contenders(tmp_path / "list.yaml")["Tiny"].build(0, post_processor=MidwayPostProcessor(0.1))
    Engine(default_root_dir=tmp_path, limit_val_batches=0, **QUIET).fit(model, datamodule=images)
    paths = sorted((mvtec_root / "tiny" / "test" / "good").iterdir())
    items = [PredictDataset(path=path)[0] for path in paths]
    scores = [model.model(model.pre_processor(item.image[None])).pred_score.item() for item in items]
    rejected = sum(score > model.post_processor.image_threshold for score in scores)
    assert lines["good ones rejected"][2] == f"{rejected} of 4"
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| tiny | 10 | reject_rate | 10 | {lines['good ones rejected, expected'][2]} | {rejected} of 4 |" in table


def test_known_defects_are_not_among_those_told_apart(mvtec_root, dtd, tmp_path, monkeypatch):
    import known

    contender = {"name": "Tiny", "class_path": "anomalib_cse.CseGaussian", "init_args": {**TINY, "dtd_dir": str(dtd)}}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"models": [contender]}))
    arguments = ["--config", tmp_path / "list.yaml", "--root", mvtec_root, "--categories", "tiny", "--model", "Tiny"]
    tested, learnt, measured, learn = [], [], known.measured, known.learnt

    def noting_tests(network, images):
        tested.append((network, {id(one) for one in images}, measured(network, images)))
        return tested[-1][2]

    def noting_known(model, images, *, masked):
        learnt.append({id(one) for one in images})
        return learn(model, images, masked=masked)

    monkeypatch.setattr(known, "measured", noting_tests)
    monkeypatch.setattr(known, "learnt", noting_known)
    known.main([*map(str, arguments), "--counts", "1", "3", "--draws", "2", "--output", str(tmp_path / "known")])
    lines = pd.read_csv(tmp_path / "known" / "results.csv")
    assert lines["known"].tolist() == [1] * 4 + [3] * 4
    assert lines["masks"].tolist() == [True, False] * 4
    befores, afters = tested[::3], [pair for number, pair in enumerate(tested) if number % 3]
    assert len({id(network) for network, *_ in befores}) == 1
    for number, (images, (network, others, scores)) in enumerate(zip(learnt, afters, strict=True)):
        assert network is not befores[0][0]
        assert not images & others
        assert len(images | others) == 4 + 4
        assert lines["AUPRO"][number] == scores["AUPRO"]
        assert lines["AUPRO, none known"][number] == befores[number // 2][2]["AUPRO"]


def test_overlap_is_that_of_anomalib():
    from common import aupro

    masks = torch.zeros(3, 40, 40, dtype=torch.bool)
    masks[0, 3:10, 5:20] = masks[0, 20:22, 1:4] = masks[1, 30:36, 30:35] = True
    maps = torch.rand(3, 40, 40) + 0.5 * masks
    metric = AUPRO(["anomaly_map", "gt_mask"])
    metric.update(ImageBatch(image=torch.zeros(3, 3, 40, 40), anomaly_map=maps[:, None] / 1.5, gt_mask=masks))
    assert aupro(maps.numpy(), masks.numpy()) == pytest.approx(float(metric.compute()), abs=2e-3)


def test_surfaces_are_the_first_photographs_that_are_large_enough_and_the_same_every_time(tmp_path, capsys):
    from surfaces import main

    from parts import PARTS

    rng = np.random.default_rng(0)
    shapes = {"a/1": (470, 600), "a/2": (480, 600), "a/3": (600, 600), "b/1": (530, 520), "c/1": (300, 300)}
    for name, shape in shapes.items():
        file = tmp_path / "photographs" / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), rng.integers(0, 256, shape, dtype=np.uint8))
    written = []
    for output in (tmp_path / "first", tmp_path / "second"):
        main(["--photographs", str(tmp_path / "photographs"), "--output", str(output)])
        assert capsys.readouterr().out.split() == ["a:", "2.jpg", "b:", "1.jpg"]
        assert {path.name for path in output.iterdir()} == {
            "a", "b", "brick", "grass", "gravel", "other_photographs", *PARTS,
        }  # fmt: skip
        files = sorted(path for path in output.rglob("*") if path.is_file())
        written.append({str(file.relative_to(output)): file.read_bytes() for file in files})
    assert written[0] == written[1]
    others = {name for name in written[0] if name.startswith("other_photographs")}
    assert others == {f"other_photographs/{name}.jpg" for name in ("a/1", "a/3", "c/1")}
    photograph = cv2.imread(str(tmp_path / "photographs" / "b" / "1.jpg"), cv2.IMREAD_GRAYSCALE)[9:521, 4:516]
    for split, rows in (("train", photograph[:320]), ("test", photograph[320:])):  # that share no pixel
        image = cv2.imread(str(tmp_path / "first" / "b" / split / "good" / "000.png"), cv2.IMREAD_GRAYSCALE)
        assert cv2.matchTemplate(rows, image, cv2.TM_SQDIFF_NORMED).min() < 1e-4
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "first")])
    assert f"{tmp_path / 'first'} exists" in capsys.readouterr().err
