import cv2
import numpy as np
import pytest
from skimage import data

from anomalib_cse.data import SurfaceDemo
from anomalib_cse.data.demo import CROP, DEFECTS, TEST_ROWS, TRAIN_ROWS


def read(file):
    return cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)


def test_crops_come_from_disjoint_regions_and_defects_lie_in_their_masks(tmp_path):
    demo = SurfaceDemo(root=tmp_path, category="gravel")
    demo.prepare_data()
    demo.setup()
    assert (len(demo.train_data), len(demo.test_data)) == (40, 20 + 8 * len(DEFECTS))
    photograph = data.gravel()
    for split, rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        for file in sorted((tmp_path / "gravel" / split / "good").iterdir())[:5]:
            found = cv2.matchTemplate(photograph[rows], read(file), cv2.TM_SQDIFF)
            assert found.min() < 1000  # of squared grey values over 25600 pixels
    for kind in DEFECTS:
        image = read(tmp_path / "gravel" / "test" / kind / "000.png")
        mask = read(tmp_path / "gravel" / "ground_truth" / kind / "000_mask.png") > 0
        assert 20 < mask.sum() < 0.2 * CROP**2
        intact = np.where(mask, 0, 255).astype(np.uint8)
        match = cv2.matchTemplate(photograph[TEST_ROWS], image, cv2.TM_SQDIFF, mask=intact)
        top, left = np.unravel_index(match.argmin(), match.shape)
        original = photograph[TEST_ROWS][top : top + CROP, left : left + CROP].astype(int)
        assert np.abs(image[mask] - original[mask]).mean() > 3 * np.abs(image[~mask] - original[~mask]).mean()


def test_images_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        SurfaceDemo(root=tmp_path / name).prepare_data()
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 40 + 20 + 2 * 8 * len(DEFECTS)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_a_disk_that_is_full_leaves_no_dataset(tmp_path, monkeypatch):
    whole = cv2.imwrite
    monkeypatch.setattr(cv2, "imwrite", lambda path, image: "hole" not in path and whole(path, image))
    for _ in range(2):  # the second time, too
        with pytest.raises(OSError, match=r"hole.000\.png cannot be written"):
            SurfaceDemo(root=tmp_path, category="gravel").prepare_data()
