"""The benchmarks: what the comparison runs, what it leaves out, its arithmetic; what the variants start from."""

import importlib
import math
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from anomalib.models import Patchcore
from torchvision.transforms.v2 import Normalize

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = "layers=[2,3] image_size=[64,64]"
ROWS = [f"Cse embedder=network {TINY}", "Patchcore coreset_sampling_ratio=0", f"BinaryClassifier {TINY}", "Cfa"]


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A tiny network in a folder, with means of its own."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    net = timm.create_model("test_efficientnet", pretrained_cfg_overlay={"mean": [0.1, 0.2, 0.3]})
    timm.models.save_for_hf(net, folder)
    return f"local-dir:{folder}"


@pytest.fixture
def compare():
    return importlib.import_module("compare")


def in_this_process(function, *arguments, **limits):
    """What ``in_child`` does, without the seconds that a process takes to start."""
    try:
        return {**function(*arguments), "peak MB": 0}
    except ValueError as error:
        return {"failed": str(error)}


def test_every_cell_runs_once_and_a_failed_one_stops_nothing(
    compare, mvtec_root, backbone, texture_folder, monkeypatch
):
    ran, output = [], texture_folder / "output"

    def note(function, *arguments, **limits):
        ran.append((function.__name__, *(arguments[0].values() if function is compare.run_cell else ())))
        return in_this_process(function, *arguments, **limits)

    monkeypatch.setattr(compare, "in_child", note)
    arguments = ["--root", str(mvtec_root), "--categories", "tiny", "--backbone", backbone, "--offline"]
    arguments += ["--dtd-dir", str(texture_folder), "--output", str(output), "--rounds", "2"]
    arguments += ["--models", *ROWS, "--seeds", "0", "--epochs", "1"]
    compare.main(arguments)
    lines = pd.read_csv(output / "results.csv").fillna({"failed": ""})
    assert lines["model"].tolist() == ROWS
    assert lines["image_AUROC"].notna().tolist() == [True, False, True, False]
    assert "coreset_size" in lines["failed"][1]
    assert "download" in lines["failed"][3]
    assert (lines.loc[[0, 2], ["fit_s", "exported_MB", "peak_MB", "image_F1Score"]] > 0).all(axis=None)
    assert lines.loc[[0, 2], "pixel_AUPRO"].between(0, 1).all()
    assert "1 epochs instead of 100" in lines["deviations"][0]
    assert pd.read_csv(output / "latency.csv")["ms"].gt(0).tolist() == [True, True]
    assert {file.name for file in output.glob("*.png")} == {"maps_tiny.png", "trade_off.png"}

    ran.clear()
    compare.main(arguments)
    assert ran == []
    assert len(pd.read_csv(output / "results.csv")) == len(ROWS)

    compare.main([*arguments, "--retry-failed"])
    assert [row[1] for row in ran] == [ROWS[1]]  # what cannot run is not tried
    assert len(pd.read_csv(output / "results.csv")) == len(ROWS)

    ran.clear()
    compare.main([*arguments, "--retry-failed", "--models", ROWS[0]])
    assert ran == []
    assert len(pd.read_csv(output / "results.csv")) == len(ROWS)  # failures that were not asked about are kept


def test_a_process_that_dies_is_a_result(compare):
    common = importlib.import_module("common")
    start = time.monotonic()
    assert "not done after 4 s" in common.in_child(time.sleep, 60, time_limit=4)["failed"]
    assert time.monotonic() - start < 30
    assert "MemoryError" in common.in_child(bytearray, 2**33, memory_limit=1)["failed"]


def test_table_gives_mean_and_spread_over_the_seeds(compare):
    key = {"model": "Cse", "category": "grid", "deviations": "tiny"}
    costs = {"image_F1Score": 1.0, "pixel_AUROC": 1.0, "pixel_AUPRO": 1.0, "exported_MB": 1.0, "peak_MB": 1.0}
    lines = pd.DataFrame(
        [
            {**key, "seed": 0, "image_AUROC": 0.5, "fit_s": 10.0, **costs, "remark": "", "failed": ""},
            {**key, "seed": 1, "image_AUROC": 0.9, "fit_s": 30.0, **costs, "remark": "", "failed": ""},
            {**key, "seed": 2, "failed": "no memory"},
        ]
    )
    report = importlib.import_module("report")
    text = report.table(lines, pd.DataFrame([{**key, "ms": 12.34}]))
    [row] = [line for line in text.splitlines() if line.startswith("| Cse")]
    spread = math.sqrt((0.2**2 + 0.2**2) / 1)  # of a sample of two
    assert row.startswith(f"| Cse | 0.700 ± {spread:.3f} | 1.000 ± 0.000 |")
    assert row.endswith("| 12.3 | 20 | 1 | 1 | 2 | tiny |")
    assert "| Cse | grid | 2 | no memory |" in report.not_run(lines)


def test_peers_get_the_backbone_its_normalisation_and_layers_of_their_strides(compare, mvtec_root, backbone):
    contenders = importlib.import_module("contenders")
    options = compare.parse(["--root", str(mvtec_root), "--categories", "tiny", "--backbone", backbone])
    model = contenders.contender("Patchcore num_neighbors=3", 0, options).build()
    assert isinstance(model, Patchcore)
    assert model.model.num_neighbors == 3
    shapes = [tuple(f.shape[-2:]) for f in model.model.feature_extractor(torch.rand(1, 3, 64, 64)).values()]
    assert shapes == [(8, 8), (4, 4)]  # strides 8 and 16
    [normalise] = [t for t in model.pre_processor.transform.transforms if isinstance(t, Normalize)]
    assert normalise.mean == [0.1, 0.2, 0.3]
    chosen = contenders.contender("Patchcore layers=[blocks.2]", 0, options)
    assert chosen.build().model.layers == ["blocks.2"]
    assert "layers" not in " ".join(chosen.deviations)


def test_what_a_row_asks_for_is_no_deviation(compare, mvtec_root, texture_folder):
    contenders = importlib.import_module("contenders")
    options = ["--root", str(mvtec_root), "--categories", "tiny", "--backbone", "resnet18", "--dtd-dir"]
    options = compare.parse([*options, str(texture_folder)])
    textures = f"textures of {texture_folder.name}"
    expected = {
        "Padim": ["resnet18 with its normalisation, layers of the default's strides", "100 features"],
        "Padim n_features=50": ["resnet18 with its normalisation, layers of the default's strides"],
        "Padim backbone=resnet34": ["resnet34 with its normalisation, layers of the default's strides", "100 features"],
        "Cse": [textures, "resnet18"],
        "Cse dtd_dir=builtin backbone=resnet34": ["textures of builtin", "resnet34"],
        "Draem": [textures, "batches of 8, its paper's number"],
    }
    for row, deviations in expected.items():
        model = contenders.contender(row, 0, options)
        assert model.deviations == deviations
        assert model.backbone in (None, model.arguments.get("backbone"))


def test_categories_must_be_datasets(compare, mvtec_root, monkeypatch, capsys):
    arguments = ["--root", str(mvtec_root), "--categories", "tiny", "square"]
    monkeypatch.setattr("sys.argv", ["variants.py", *arguments])
    for run in (lambda: compare.parse(arguments), importlib.import_module("variants").main):
        with pytest.raises(SystemExit):
            run()
        assert "square has no train/good" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["Nothing", "Cse decoder"])
def test_rows_must_name_models_and_arguments(compare, mvtec_root, row):
    with pytest.raises(ValueError, match="--models"):
        compare.cells_of(compare.parse(["--root", str(mvtec_root), "--categories", "tiny", "--models", row]))


def test_binary_classifier_is_trained_with_the_cross_entropy_of_all_images(compare):
    classifier = importlib.import_module("classifier").BinaryClassifier(
        backbone="test_efficientnet", layers=[2, 3], pre_trained=False, seed=0
    )
    classifier.eval()
    images, corrupt = torch.rand(4, 3, 64, 64), torch.tensor([True, False])
    first, second = (classifier.model.backbone(half) for half in images.chunk(2))
    classifier.model.embedder.load_state_dict(classifier.embedder.state_dict())
    scores = classifier.model(images).pred_score
    expected = -(torch.log(1 - scores[:2]).sum() + torch.log(scores[2]) + torch.log(1 - scores[3])) / 4
    assert torch.isclose(classifier.pair_loss(first, second, corrupt), expected, atol=1e-5)


def test_binary_classifier_takes_no_argument_that_it_has_no_use_for(compare):
    with pytest.raises(ValueError, match="num_centres"):
        importlib.import_module("classifier").BinaryClassifier(num_centres=2)


def test_variants_start_from_what_ships_and_change_it(compare, mvtec_root, backbone, texture_folder, monkeypatch):
    variants = importlib.import_module("variants")
    arguments = ["--root", str(mvtec_root), "--categories", "tiny", "--backbone", backbone]
    arguments += ["--dtd-dir", str(texture_folder)]
    for module in (variants, importlib.import_module("anomalib_cse.lightning_model")):
        monkeypatch.setattr(module, "CORRUPTED_IMAGES", 16)
    options = compare.parse([*arguments, "--output", str(texture_folder / "output")])
    shipped = compare.run_cell({"model": "Cse", "category": "tiny", "seed": 0}, options, None)
    options.seed = 0
    features = variants.Features(options, "tiny", "256")
    image, pixel = variants.evaluate(features, options, "as it is")
    assert image == pytest.approx(shipped["image_AUROC"])
    assert pixel == pytest.approx(shipped["pixel_AUPRO"], abs=1e-4)
    replaced = [name for name, (_, _, parts) in variants.VARIANTS.items() if parts and "score" not in name]
    found = {name: variants.evaluate(features, options, name)[1] for name in [*replaced, variants.NOT_SCALED]}
    same = {name for name, other in found.items() if other == pixel}
    assert len(same) == 1
    assert same < {"one covariance for all positions", "positions' own covariances"}


@pytest.mark.parametrize("own", [False, True])
def test_latency_is_that_of_one_covariance_or_of_every_positions_own(own, compare):
    latency = importlib.import_module("latency")
    model = latency.cse("test_efficientnet", latency.OWN if own else "linear").model
    assert model.fitted
    assert {gaussian.roots.dim() for gaussian in model.simplified().maps} == {4 if own else 2}


def test_cells_have_the_means_of_their_positions(compare):
    values = torch.rand(4, 6, 3)
    means = importlib.import_module("variants").in_blocks(values, 2)
    for i in range(4):
        for j in range(6):
            block = values[i // 2 * 2 : i // 2 * 2 + 2, j // 2 * 2 : j // 2 * 2 + 2]
            assert torch.allclose(means[i, j], block.mean(dim=(0, 1)))


def test_surfaces_are_the_first_photographs_that_are_large_enough(compare, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    kinds = {"a": {"1": (470, 600), "2": (480, 600), "3": (600, 600)}, "b": {"1": (530, 520)}, "c": {"1": (300, 300)}}
    for kind, shapes in kinds.items():
        (tmp_path / "photographs" / kind).mkdir(parents=True)
        for name, shape in shapes.items():
            image = rng.integers(0, 256, shape, dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "photographs" / kind / f"{name}.jpg"), image)
    surfaces, parts = (importlib.import_module(name) for name in ("surfaces", "parts"))
    arguments = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "output")]
    monkeypatch.setattr("sys.argv", ["surfaces.py", *arguments])
    surfaces.main()
    assert capsys.readouterr().out.split() == ["a:", "2.jpg", "b:", "1.jpg"]
    others = tmp_path / "output" / "other_photographs"
    assert {str(file.relative_to(others)) for file in others.rglob("*.jpg")} == {"a/1.jpg", "a/3.jpg", "c/1.jpg"}
    sets = {path.name for path in others.parent.iterdir()}
    assert sets == {"a", "b", "brick", "grass", "gravel", others.name, *parts.PARTS}
    cut, small = (cv2.imread(str(tmp_path / "photographs" / kind), 0) for kind in ("b/1.jpg", "a/2.jpg"))
    enlarged = cv2.resize(small, (640, 512), interpolation=cv2.INTER_CUBIC)
    for kind, whole in (("b", cut[9:521, 4:516]), ("a", enlarged[:, 64:576])):
        for split, rows in (("train", whole[:320]), ("test", whole[320:])):
            for file in (tmp_path / "output" / kind / split / "good").iterdir():
                image = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
                assert cv2.matchTemplate(rows, image, cv2.TM_SQDIFF_NORMED).min() < 1e-4
    with pytest.raises(SystemExit):
        surfaces.main()
    assert f"{tmp_path / 'output'} exists" in capsys.readouterr().err


def test_regions_of_parts_lie_about_where_they_belong_and_show_crops_of_photographs(compare):
    parts = importlib.import_module("parts")
    rng = np.random.default_rng(0)
    flat = np.full((512, 512), 90, np.uint8)
    noise = rng.choice(np.array([0, 200], np.uint8), (512, 512))
    layout = [(parts.EVERYWHERE, 60), (parts.box(320, 160, 480, 480), 150)]
    images = np.stack([parts.photograph_part(layout, [flat, noise], slice(0, 320), rng) for _ in range(60)])
    assert images.shape == (60, 160, 160)
    inside, outside = images[:, 45:115, 85:115], images[:, 5:155, 5:75]
    assert abs(inside.mean() - 150) < 3
    assert abs(outside.mean() - 60) < 2
    assert abs(inside.std(axis=0).mean() - np.hypot(parts.CONTRAST * 100, 0.03 * 150)) < 2
    assert outside.std(axis=0).mean() < 4
    edges = (images[:, 80].astype(int) > 75).argmax(axis=1)
    assert abs(edges.mean() - 80) < 1
    assert 0.5 < edges.std() < 2
    upper_dark = np.repeat(np.array([0, 200], np.uint8), [320, 192])[:, None].repeat(512, axis=1)
    upper, lower = (
        parts.photograph_part([(parts.EVERYWHERE, 120)], [upper_dark], rows, rng).mean()
        for rows in (slice(0, 320), slice(320, 512))
    )
    assert abs(lower - upper - parts.CONTRAST * 200) < 20


def test_parts_show_photographs_in_turn(compare, tmp_path, monkeypatch):
    parts = importlib.import_module("parts")
    shown = []
    monkeypatch.setattr(parts, "write_dataset", lambda folder, cut, rng: shown.append(cut.args[1]))
    monkeypatch.setattr(parts, "PARTS", {"a": [(None, 0)] * 2, "b": [(None, 0)] * 3})
    parts.write_parts(["first", "second", "third"], tmp_path)
    assert shown == [["first", "second"], ["third", "first", "second"]]
