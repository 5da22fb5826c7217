"""The benchmark of changed images: the changes against other computations of them, scores and figures by hand."""

import math
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.pre_processing import PreProcessor
from scipy import ndimage
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_cse.synthesis import generator_for

from tiny import COMMON, data_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KINDS = ["light", "noise", "blur", "gamma", "cast", "jpeg", "geometry", "sharpen"]
TINY = {key: list(v) if isinstance(v, tuple) else v for key, v in COMMON.items() if key != "seed"}


@pytest.fixture(scope="module", autouse=True)
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def image():
    """Smooth, away from black and white, and not square."""
    noise = np.random.default_rng(0).random((3, 40, 56))
    return torch.from_numpy(0.5 + ndimage.gaussian_filter(noise - 0.5, (0, 2, 2)) * 2).float()


def drawn(kind, count, seed=3, place=5):
    """The numbers from -1 to 1 by which that image is changed."""
    return (2 * torch.rand(count, generator=generator_for(seed, zlib.crc32(kind.encode()), place)) - 1).tolist()


def changed(image, kind, strength=1):
    from robustness import changed

    return changed(image, (kind, strength), seed=3, place=5)


def test_light_is_brightness_then_contrast_then_a_slope():
    from robustness import lit

    # times 1.5: 0.3 and 0.9, of mean 0.6; half the contrast: 0.45 and 0.75; the left edge times 0.8, the right 1.2
    found = lit(torch.tensor([0.2, 0.6]).expand(3, 1, 2), brightness=1.5, contrast=0.5, slope=1.2)
    assert torch.allclose(found, torch.tensor([0.36, 0.9]).expand(3, 1, 2))
    assert lit(torch.tensor([0.2, 0.8]).expand(3, 1, 2), 1.5, 1, 1).max() == 1  # and not 1.2


@pytest.mark.parametrize("strength", [1, 0.5])
def test_factors_of_light_are_within_20_per_cent(image, strength):
    from robustness import lit

    factors = [1 + 0.2 * strength * number for number in drawn("light", 3)]
    assert torch.allclose(changed(image, "light", strength), lit(image, *factors).clamp(0, 1))


def test_noise_has_its_deviation():
    found = [changed(torch.full((3, 128, 128), 0.5), "noise", strength) - 0.5 for strength in (1, 0.25)]
    assert [part.std().item() for part in found] == pytest.approx([0.02, 0.005], rel=0.02)
    assert found[0].mean().abs() < 3 * 0.02 / math.sqrt(3 * 128 * 128)
    assert torch.allclose(found[0], 4 * found[1], atol=1e-6)  # a strength draws the same numbers
    assert np.corrcoef(found[0].flatten(1))[0, 1] < 0.05  # each channel has its own


@pytest.mark.parametrize("strength", [1, 0.5])
def test_blur_is_that_of_scipy(image, strength):
    deviation = strength * (0.75 + 0.45 * drawn("blur", 1)[0])
    expected = ndimage.gaussian_filter(image.numpy(), (0, deviation, deviation), mode="mirror", radius=(0, 3, 3))
    np.testing.assert_allclose(changed(image, "blur", strength), expected, atol=1e-5)


def test_gamma_and_cast_are_powers_and_factors(image):
    power = 1.25 ** drawn("gamma", 1)[0]
    np.testing.assert_allclose(changed(image, "gamma"), image.numpy() ** power, rtol=1e-5)
    factors = 1 + 0.1 * np.array(drawn("cast", 3))
    expected = (image.numpy() * factors[:, None, None]).clip(0, 1)
    np.testing.assert_allclose(changed(image, "cast"), expected, rtol=1e-5)


def test_jpeg_is_that_of_opencv(image):
    pixels = (255 * image).round().byte().movedim(0, -1).numpy()
    _, file = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 50])
    expected = cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) / 255
    found = changed(image, "jpeg").movedim(0, -1).numpy()
    assert np.abs(found - expected).mean() < 1 / 255 < np.abs(found - pixels / 255).mean()


def test_sharpening_adds_what_smoothing_takes_away(image):
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])[None] / 13
    expected = (2 * image.numpy() - ndimage.convolve(image.numpy(), kernel)).clip(0, 1)
    np.testing.assert_allclose(changed(image, "sharpen")[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1e-5)


def test_geometry_is_that_of_scipy(image):
    scale, angle, right, down = drawn("geometry", 4)
    turn = math.radians(3 * angle)  # clockwise, from (row, column) of the result to that of the image
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) / (1 + 0.03 * scale)
    middle = (np.array(image.shape[1:]) - 1) / 2
    offset = middle - matrix @ (middle + 0.03 * np.array([down, right]) * image.shape[1:])
    options = {"order": 1, "mode": "reflect"}
    expected = [ndimage.affine_transform(channel, matrix, offset, **options) for channel in image.numpy()]
    np.testing.assert_allclose(changed(image, "geometry"), expected, atol=1e-4)


def test_quarter_turn_is_clockwise_and_shifts_are_right_and_down():
    from robustness import placed

    square = torch.rand(3, 8, 8)
    assert torch.allclose(placed(square, 1, 90, 0, 0), square.rot90(-1, (1, 2)), atol=1e-5)
    assert torch.allclose(placed(square, 1, 0, 0.25, 0.5)[:, 4:, 2:], square[:, :4, :6], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_changes_nothing_and_images_and_seeds_differ(image, kind):
    import robustness

    assert list(robustness.KINDS) == KINDS
    before = image.clone()
    whole = changed(image, kind)
    assert torch.equal(changed(image, kind, 0), image)
    assert torch.equal(image, before)
    assert 0 <= whole.min() < whole.max() <= 1
    assert (changed(image, kind, 0.01) - image).abs().mean() < 0.5 * (whole - image).abs().mean()
    others = [robustness.changed(image, (kind, 1), seed, place) for seed, place in ((3, 6), (4, 5))]
    assert [torch.equal(whole, other) for other in others] == [kind in {"jpeg", "sharpen"}] * 2  # which draw nothing


class Recorder:
    """A model with a crop that keeps what it sees, and whose score is an image's mean."""

    def __init__(self):
        steps = [Resize((32, 48)), CenterCrop((16, 24)), Normalize([0.5] * 3, [0.2] * 3)]
        self.pre_processor, self.seen = PreProcessor(Compose(steps)), []

    def eval(self):
        return self

    def model(self, images):
        self.seen += images
        maps = images.mean(dim=1, keepdim=True)
        return SimpleNamespace(pred_score=images.mean(dim=(1, 2, 3)), anomaly_map=maps)


def test_network_sees_changes_before_crop_and_normalisation_whatever_the_batch(mvtec_root):
    from robustness import CLEAN, changed, scores

    data = data_of(mvtec_root)
    data.setup()
    changes = [CLEAN, ("noise", 1), ("geometry", 1)]
    models = {batch: Recorder() for batch in (1, 3)}
    found = {batch: scores(model, data.test_data, changes, 7, batch) for batch, model in models.items()}
    size = [32, 48]
    for number, change in enumerate(changes):
        assert found[1][0][change] == pytest.approx(found[3][0][change], abs=1e-6)
        for place in (0, 5):
            resized = Resize(size)(data.test_data[place].image.as_subclass(torch.Tensor))
            expected = (changed(resized, change, 7, place)[:, 8:24, 12:36] - 0.5) / 0.2
            assert torch.allclose(models[1].seen[len(changes) * place + number], expected, atol=1e-6)
            assert found[3][0][change][place] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert found[1][1] == found[3][1] == pytest.approx(1, abs=0.01)  # the defects are white


def test_model_without_scores_gets_the_highest_of_its_maps_and_no_masks_no_aupro():
    from robustness import CLEAN, scores

    class Mapping(Recorder):
        def model(self, images):
            return SimpleNamespace(pred_score=None, anomaly_map=images.mean(dim=1, keepdim=True))

    images = torch.rand(3, 3, 32, 48)
    data = [SimpleNamespace(image=image, gt_mask=None) for image in images]
    found, overlap = scores(Mapping(), data, [CLEAN], 0)
    expected = ((images[:, :, 8:24, 12:36] - 0.5) / 0.2).mean(dim=1).amax(dim=(1, 2))
    assert found[CLEAN] == pytest.approx(expected.numpy(), abs=1e-5)
    assert math.isnan(overlap)


def test_shares_and_aurocs_by_hand():
    from robustness import CLEAN, accuracies

    defective = np.array([False] * 5 + [True] * 2)
    clean = np.array([1, 2, 3, 4, 5, 4.5, 6])  # the good ones' 95 % quantile is 4.8
    found = {CLEAN: clean, ("light", 1): clean + 10, ("noise", 1): clean, ("blur", 1): clean, ("light", 0.5): clean + 1}
    row = accuracies(found, defective)
    assert row["AUROC_clean"] == row["AUROC_light"] == 0.9  # one of ten pairs is wrong
    # 9 pairs are right wherever both are of clean, noise or blur, all 10 if only the defective one is of light, none if
    # only the good one is, and 9 if both are
    right = 3 * 3 * 9 + 3 * 10 + 9
    assert row["mixed"] == pytest.approx(right / (20 * 8))
    shares = {"rejected_clean": 0.2, "rejected_light": 1, "rejected_light_0.5": 0.4, "rejected_noise": 0.2}
    assert {name: row[name] for name in shares} == shares


@pytest.fixture(scope="module")
def measured(mvtec_root, dtd, tmp_path_factory):
    """The arguments of a run, and its output."""
    import cells
    import robustness

    folder = tmp_path_factory.mktemp("robustness")
    arguments = {**TINY, "dtd_dir": str(dtd)}
    models = [
        {"name": "Broken", "class_path": "anomalib_cse.Cse", "init_args": {"num_centres": 0}},
        {"name": "Gaussian", "class_path": "anomalib_cse.CseGaussian", "init_args": arguments},
        {"name": "Cse", "class_path": "anomalib_cse.Cse", "init_args": arguments, "max_epochs": 1},
    ]
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": models}))
    options = ["--config", str(folder / "models.yaml"), "--root", str(mvtec_root), "--categories", "tiny"]
    options += ["--models", "Broken", "Gaussian", "Cse", "--strengths", "0.5", "--output", str(folder / "output")]

    def here(run, **limits):  # what a process costs is imports
        try:
            return run()
        except ValueError as error:
            return {"failed": str(error)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "in_child", here)
        robustness.main(options)
    return options, folder / "output"


def test_run_makes_lines_tables_and_a_picture(measured):
    _, output = measured
    lines = pd.read_csv(output / "results.csv").fillna({"failed": ""}).set_index("model")
    assert "num_centres must be" in lines.loc["Broken", "failed"]
    line = lines.loc["Gaussian"]
    assert line["AUROC_clean"] == 1
    assert line["rejected_clean"] == 0.25  # the highest of four is above their quantile
    assert line["AUPRO"] > 0.5
    conditions = ["clean", *KINDS, *(f"{kind}_0.5" for kind in ("light", "noise", "blur"))]
    figures = [f"{figure}_{condition}" for figure in ("AUROC", "rejected") for condition in conditions]
    figures = [*figures[: len(conditions)], "mixed", *figures[len(conditions) :]]
    assert lines.columns[3 : 3 + len(figures)].tolist() == figures
    assert lines.loc[["Gaussian", "Cse"], figures].notna().all(axis=None)
    text = (output / "table.md").read_text()
    assert f"### Image AUROC, mean of tiny\n\n| model | clean | {' | '.join(KINDS)} | mixed | AUPRO | fit s |" in text
    assert f"| Gaussian | 25 | {100 * line['rejected_light']:.3g} | {100 * line['rejected_noise']:.3g} |" in text
    assert f"taken together\n\n| model | tiny |\n| --- | --- |\n| Gaussian | {line['mixed']:.3g} |" in text
    assert "| Broken | tiny | 0 | num_centres must be" in text
    assert (output / "rejected.png").is_file()


def test_run_goes_on_where_it_was_broken_off(measured, capsys):
    from robustness import main

    arguments, output = measured
    before = (output / "results.csv").read_bytes()
    main(arguments)
    assert "3 cells are done, 0 to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other columns"):
        main([*arguments, "--strengths", "0.5", "0.7"])
    with pytest.raises(SystemExit):
        main([*arguments, "--strengths", "0"])
    assert "--strengths must be above 0" in capsys.readouterr().err
    assert (output / "results.csv").read_bytes() == before


def test_picture_and_means_are_of_sets_that_all_models_have(tmp_path, monkeypatch):
    import report
    import robustness

    strengths = [0.5, 1]
    columns = robustness.columns_of(robustness.changes_of(strengths))
    results = [("A", "grid", 0.2), ("A", "leather", 0.9), ("B", "grid", 0.4), ("B", "leather", np.nan)]
    lines = pd.DataFrame(results, columns=["model", "category", "rejected_light"]).reindex(columns=columns)
    lines = lines.assign(rejected_clean=0.05, failed=["", "", "", "no memory"]).assign(
        **{"rejected_light_0.5": lines["rejected_light"] / 2, "mixed": [0.5, 0.6, 0.7, np.nan]}
    )
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, file: figures.append(figure))
    robustness.rejects(robustness.curves(lines, strengths), tmp_path / "picture.png")
    light, noise, blur = figures[0].axes
    points = [line.get_xydata() for line in light.lines]
    np.testing.assert_allclose(points, [[(0, 5), (10, 10), (20, 20)], [(0, 5), (10, 20), (20, 40)]])
    assert [axis.lines[0].get_xdata()[-1] for axis in (noise, blur)] == [5.1, 1.2]
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["A", "B"]
    text = robustness.table(lines)
    assert "mean of grid\n" in text
    assert "| A | 5 | 20 |" in text
    assert "| model | grid | leather |\n| --- | --- | --- |\n| A | 0.5 | 0.6 |\n| B | 0.7 |  |" in text
