"""Learning on: the same as a fit to all images at once, by the command, and what is refused."""

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from anomalib.data.utils import read_image

from anomalib_cse import CseGaussian, CseGaussianModel
from anomalib_cse.cse_gaussian.fit import fit, fit_by
from anomalib_cse.cse_gaussian.known import KnownDefect, known_moments
from anomalib_cse.cse_gaussian.learning import learn
from anomalib_cse.cse_gaussian.sample import TrainingSample
from anomalib_cse.cse_gaussian.sums import Sums
from anomalib_cse.deployment.good_scores import GoodScores
from anomalib_cse.learn.__main__ import main

SIZE = (64, 96)


class Patch:
    """Brightens the same place of every image."""

    mask = torch.zeros(8, 1, *SIZE)
    mask[..., 8:40, 24:57] = 1

    def sample(self, shape, generator):
        return self

    def apply(self, images, params):
        return images + 0.2 * self.mask[: len(images)]


def new_model():
    torch.manual_seed(0)
    return CseGaussianModel("test_efficientnet", layers=(2, 3), pre_trained=False, embedding_dim=6)


@torch.no_grad()
def sample_of(model, images):
    sample = TrainingSample(2**30, torch.Generator().manual_seed(0))
    for part in images.split(5):
        sample.add(part, model.smoothed_features(part), ["an image"] * len(part))
    return sample


@pytest.fixture
def images():
    return (255 * torch.rand(18, 3, *SIZE)).round() / 255


@pytest.fixture
def known():
    return [
        KnownDefect((image + 0.5 * Patch.mask[:1]).clamp(0, 1), Patch.mask[:1]) for image in torch.rand(4, 3, *SIZE)
    ]


@pytest.mark.parametrize("own", [True, False], ids=["own covariances", "in common"])
@torch.no_grad()
def test_learning_equals_a_fit_to_all_images_at_once(images, known, own, monkeypatch):
    monkeypatch.setattr("anomalib_cse.cse_gaussian.fit.LEAST_OWN", 0 if own else 1)
    model, at_once = new_model(), new_model()
    sample = sample_of(model, images[:10])
    fitted = fit(model, sample, Patch(), ("blur",), 0, known[:1])
    assert math.isfinite(fitted.strengths[0]) == own
    sums = Sums.unpacked(Sums.of(sample, fitted, 0).packed())
    new = sample_of(model, images[10:])
    learnt, scores = learn(model, sums, new, known[1:], 0.0, ("blur",), 0)
    assert (learnt.good, learnt.known, len(learnt.images)) == (18, 4, 18)
    assert [len(s.images) for s in scores] == [10, 10, 8]

    everything = sample_of(at_once, images)
    all_known = known_moments(at_once, known, everything.moments)
    expected = fit_by(at_once, everything, fitted._replace(known=all_known))
    assert learnt.fitted.strengths == pytest.approx(expected.strengths)
    features = model.smoothed_features(torch.rand(2, 3, *SIZE))
    for mine, other, f in zip(model.maps, at_once.maps, features, strict=True):
        assert mine.roots.shape == other.roots.shape
        assert torch.allclose(mine.distances(f), other.distances(f), rtol=1e-4)
        # of kept images, which are all of them here, so that scales are nearly those of all at once
        assert torch.allclose(mine.scale, other.scale, rtol=0.02)


@torch.no_grad()
def test_all_that_is_forgotten_counts_no_more(images, known):
    model, fresh = new_model(), new_model()
    sample = sample_of(model, images[:9])
    fitted = fit(model, sample, Patch(), (), 0)
    new = sample_of(model, images[9:])
    learnt, _ = learn(model, Sums.of(sample, fitted, 0), new, (), 1.0, (), 0)
    assert learnt.good == 9
    fit_by(fresh, sample_of(fresh, images[9:]), fitted)
    scored, expected = (own(images[:3]).pred_score for own in (model, fresh))
    assert torch.allclose(scored, expected, rtol=1e-3)


def test_spreads_join_to_that_of_all_scores():
    few, many = torch.rand(7) + 1, torch.rand(30) + 2
    joined = GoodScores.of(few).joined(GoodScores.of(many))
    assert joined == pytest.approx(GoodScores.of(torch.cat([few, many])))


@pytest.fixture
def folders(mvtec_root):
    root = mvtec_root / "tiny"
    return {
        "good": root / "test" / "good",
        "defects": root / "test" / "square",
        "masks": root / "ground_truth" / "square",
    }


def flags_of(folders):
    return [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]


def test_the_command_writes_what_has_learnt_and_leaves_the_old(trained, folders, tmp_path, capsys):
    _, path = trained["CseGaussian"]
    before, output = Path(path).read_bytes(), tmp_path / "new.ckpt"
    assert main([str(path), *flags_of(folders), "--dry-run"]) == 0
    assert not output.exists()
    said = capsys.readouterr().out
    assert "Learnt 4 good images and 4 defects, to 10 and 0 of before.\nThreshold: " in said
    assert "known defects " in said
    assert "Nothing has been written." in said
    assert main([str(path), *flags_of(folders), "--output", str(output)]) == 0
    assert Path(path).read_bytes() == before
    old, new = (CseGaussian.load_from_checkpoint(file) for file in (path, output))
    assert (new.sums.good, new.sums.known) == (14, 4)
    assert not torch.equal(old.model.maps[0].directions, new.model.maps[0].directions)
    with pytest.raises(SystemExit):
        main([str(path), *flags_of(folders), "--output", str(output)])
    assert "is there already" in capsys.readouterr().err


def test_a_new_threshold_alone_is_of_the_new_images(trained, mvtec_root, tmp_path, capsys):
    _, path = trained["CseGaussian"]
    folder, output = mvtec_root / "tiny" / "train" / "good", tmp_path / "new.ckpt"
    assert main([str(path), "--good", str(folder), "--threshold-only", "--output", str(output)]) == 0
    assert "Set thresholds by 10 good images; all else is as it was.\n" in capsys.readouterr().out
    old, new = (CseGaussian.load_from_checkpoint(file).eval() for file in (path, output))
    assert torch.equal(old.model.maps[0].roots, new.model.maps[0].roots)
    files = sorted(folder.glob("*.png"))
    scores = torch.cat([old.model(old.pre_processor(read_image(f, as_tensor=True)[None])).pred_score for f in files])
    assert new.post_processor.image_threshold.item() == pytest.approx(GoodScores.of(scores).threshold(0.01), rel=1e-4)


def test_what_cannot_be_learnt_is_refused_and_changes_nothing(trained, folders, tmp_path, capsys):
    model = CseGaussian.load_from_checkpoint(trained["CseGaussian"][1]).eval()
    before = copy.deepcopy(model.state_dict())
    broken = shutil.copytree(folders["good"], tmp_path / "broken")
    next(iter(sorted(broken.glob("*.png")))).write_bytes(b"no image")
    one = shutil.copytree(folders["good"], tmp_path / "one")
    for path in sorted(one.glob("*.png"))[1:]:
        path.unlink()
    refused = [
        ({}, "there is nothing to learn"),
        ({"masks": folders["masks"], "good": folders["good"]}, "masks are of defects, got none"),
        ({"defects": folders["defects"], "forget": 0.5}, "forget is for new good images"),
        ({"good": one, "forget": 1}, "forget 1 leaves the new good images alone, which must be at least 5, got 1"),
        ({"good": folders["good"], "forget": 2}, r"forget must be a number in \[0, 1\]"),
        ({"good": broken}, "cannot be read as an image"),
        ({"good": folders["good"], "defects": folders["good"]}, "counts as a known defect, but"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            model.learn(**arguments)
    assert main([str(trained["CseGaussian"][1]), "--good", str(tmp_path / "none"), "--dry-run"]) == 1
    assert "none is not a folder" in capsys.readouterr().err
    model.sums = None
    with pytest.raises(ValueError, match="the model has no sums to learn on from"):
        model.learn(good=folders["good"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_export_holds_nothing_of_the_training_images(trained, tmp_path):
    model, _ = trained["CseGaussian"]
    exported = torch.load(model.to_torch(tmp_path), weights_only=False)["model"]
    assert exported.sums is None
    assert len(model.sums.images) == 10
