"""Known defects: their moments against naive loops, what they change, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from PIL import Image, ImageOps
from torch.nn import functional as F

from anomalib_cse import CseGaussian, CseGaussianModel
from anomalib_cse.cse_gaussian.fit import fit, over_folds
from anomalib_cse.cse_gaussian.known import SYNTHETIC, KnownDefect, known_moments, located, with_known
from anomalib_cse.cse_gaussian.sample import TrainingSample

from tiny import COMMON, QUIET, data_of

SIZE = (64, 96)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CseGaussianModel("test_efficientnet", layers=(2, 3), pre_trained=False, embedding_dim=6)


def known_of(count, *, masked):
    images, mask = torch.rand(count, 1, 3, *SIZE), torch.zeros(1, 1, *SIZE)
    mask[..., 8:40, 24:57] = 1
    for image in images:
        image[..., 8:40, 24:57] += 0.5
    return [KnownDefect(image.clamp(0, 1), mask if masked else None) for image in images]


class Patch:
    """Brightens the same place of every image."""

    def sample(self, shape, generator):
        return self

    @property
    def mask(self):
        return known_of(1, masked=True)[0].mask.expand(8, -1, -1, -1)

    def apply(self, images, params):
        return images + 0.2 * params.mask[: len(images)]


@torch.no_grad()
def sample_of(model, count=8):
    sample = TrainingSample(2**30, torch.Generator().manual_seed(0))
    images = torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    sample.add(images, model.smoothed_features(images))
    return sample


@torch.no_grad()
def test_known_defects_count_by_image_and_synthetic_ones_for_ten(model):
    known, sample = known_of(2, masked=True), sample_of(model)
    fitted = fit(model, sample, Patch(), (), 0, known)
    synthetic = over_folds(fitted.defects)
    joined = with_known(synthetic, fitted.known)
    for layer, (painted, both) in enumerate(zip(synthetic, joined, strict=True)):
        expected = SYNTHETIC * painted.second / painted.weight
        for image, mask in known:
            features = model.smoothed_features(image)[layer][0].double()
            cover = F.adaptive_avg_pool2d(mask, features.shape[1:])[0, 0].double()
            total = sum(
                cover[i, j] * features[:, i, j].outer(features[:, i, j]) for i, j in np.ndindex(*features.shape[1:])
            )
            expected = expected + total / cover.sum()
        assert torch.allclose(both.second, expected)
        assert both.weight.item() == pytest.approx(SYNTHETIC + 2)


@torch.no_grad()
def test_without_masks_a_fit_without_known_ones_says_where_they_are(model):
    known, sample = known_of(3, masked=False), sample_of(model)
    found = fit(model, sample, Patch(), (), 0, known)
    fit(model, sample, Patch(), (), 0)
    masks = [located(model, model.smoothed_features(image)) for image, _ in known]
    large = [F.interpolate(mask, SIZE, mode="nearest") for mask in masks]
    of_masks = known_moments(
        model, [KnownDefect(k.image, m) for k, m in zip(known, large, strict=True)], sample.moments
    )
    assert all(torch.allclose(a.second, b.second) for a, b in zip(found.known, of_masks, strict=True))
    assert masks[0].mean().item() == pytest.approx(0.05, abs=0.01)


def run_with(folder, root, dtd, **options):
    model = CseGaussian(**COMMON, dtd_dir=str(dtd), **options)
    engine = Engine(default_root_dir=folder, **QUIET)
    engine.fit(model, datamodule=data_of(root))
    return model, engine


@pytest.fixture
def known_folders(mvtec_root, tmp_path):
    """Two defects that are in no other set, and their masks."""
    for part, name in (("test", "{}.png"), ("ground_truth", "{}_mask.png")):
        (tmp_path / part / "spot").mkdir(parents=True)
        for number in ("000", "001"):
            file = mvtec_root / "tiny" / part / "square" / name.format(number)
            shutil.copy(file, tmp_path / part / "spot" / name.format(number))
    for image in (tmp_path / "test" / "spot").glob("*.png"):
        ImageOps.invert(Image.open(image)).save(image)
    return {"known_defects": tmp_path / "test", "known_masks": tmp_path / "ground_truth"}


def test_a_run_learns_from_them_and_its_checkpoint_does_without(mvtec_root, dtd, tmp_path, known_folders, trained):
    model, engine = run_with(tmp_path / "run", mvtec_root, dtd, **known_folders)
    without, _ = trained["CseGaussian"]
    assert not torch.equal(model.model.maps[0].directions, without.model.maps[0].directions)
    shutil.rmtree(known_folders["known_defects"])
    loaded = CseGaussian.load_from_checkpoint(engine.best_model_path)
    assert loaded.hparams["known_defects"] is loaded.hparams["known_masks"] is None
    assert torch.equal(loaded.model.maps[0].roots, model.model.maps[0].roots)


def test_images_that_test_and_masks_that_lack_are_refused_before_the_fit(mvtec_root, dtd, tmp_path, known_folders):
    with pytest.raises(ValueError, match=r"is a known defect, and .*the same image, is to validate or test with"):
        run_with(tmp_path / "a", mvtec_root, dtd, known_defects=mvtec_root / "tiny" / "test" / "square")
    with pytest.raises(ValueError, match=r"counts as a known defect, but .* as good"):
        run_with(tmp_path / "b", mvtec_root, dtd, known_defects=mvtec_root / "tiny" / "train" / "good")
    (known_folders["known_masks"] / "spot" / "000_mask.png").unlink()
    with pytest.raises(ValueError, match=r"000.png has no mask in .*: give one, spot/000.png or spot/000_mask.png"):
        run_with(tmp_path / "c", mvtec_root, dtd, **known_folders)
    with pytest.raises(FileNotFoundError, match=r"known_defects: .*nowhere is not a folder"):
        run_with(tmp_path / "d", mvtec_root, dtd, known_defects=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="known_masks are of known_defects, got none"):
        CseGaussian(**COMMON, known_masks=tmp_path)
