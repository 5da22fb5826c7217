"""Centres are k-means over images: each is a map, the mean of a cluster of images' embeddings."""

from itertools import combinations

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from anomalib_cse import Cse
from anomalib_cse.cse.centres import image_centres

from tiny import COMMON, QUIET, data_of


def in_one_order(centres):
    return torch.stack(sorted(centres, key=lambda centre: centre.flatten().tolist()))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_centres_follow_kmeans_over_images(count, generator):
    kinds = torch.randn(count, 1, 6, 3, 4, generator=generator)
    embeddings = (kinds + 0.1 * torch.randn(count, 8, 6, 3, 4, generator=generator)).flatten(0, 1)
    centres = image_centres(embeddings, count, seed=0)
    assert (centres.shape, centres.dtype) == ((count, 6, 3, 4), torch.float32)
    expected = KMeans(count, n_init=10, random_state=1).fit(embeddings.flatten(1).numpy()).cluster_centers_
    expected = torch.from_numpy(expected).view(count, 6, 3, 4)
    assert torch.allclose(in_one_order(centres), in_one_order(expected), atol=1e-5)


def test_vectors_that_change_places_are_two_kinds_of_image():
    """To k-means over positions both images would be the same."""
    dark, bright = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    left, right = torch.stack([dark, bright], dim=1), torch.stack([bright, dark], dim=1)
    embeddings = torch.stack([left, right, left, right, left])[:, :, None]  # (5, 2, 1, 2)
    assert torch.equal(in_one_order(image_centres(embeddings, 2, seed=0)), in_one_order(embeddings[:2]))


def test_one_seed_gives_one_order_of_centres(generator):
    embeddings = torch.randn(30, 4, 2, 2, generator=generator)
    assert torch.equal(image_centres(embeddings, 3, 7), image_centres(embeddings, 3, 7))


def embeddings_of(model, dataset):
    images = [model.pre_processor.transform(dataset[index].image) for index in range(len(dataset))]
    with torch.no_grad():
        return torch.cat([model.model.embed(model.model.backbone(image[None])) for image in images])


def test_two_centres_are_of_two_kinds_of_surface(tmp_path, dtd):
    """Also of the images that were held out."""
    rng = np.random.default_rng(0)
    (tmp_path / "good").mkdir()
    stripes = np.where(np.arange(64) // 8 % 2, 60, 180)[None, :, None]
    for number in range(12):
        image = (stripes if number < 5 else stripes.transpose(1, 0, 2)) + rng.integers(0, 20, (64, 64, 3))
        cv2.imwrite(str(tmp_path / "good" / f"{number:02}.png"), image.astype(np.uint8))
    no_test = {"test_split_mode": "none", "val_split_mode": "none"}
    data = Folder("stripes", root=tmp_path, normal_dir="good", num_workers=0, train_batch_size=4, **no_test)
    model = Cse(**COMMON, num_centres=2, dtd_dir=dtd)
    Engine(max_epochs=3, default_root_dir=tmp_path, limit_val_batches=0, **QUIET).fit(model, datamodule=data)
    paths, embeddings = list(data.train_data.samples.image_path), embeddings_of(model, data.train_data)
    lying = torch.tensor([int(path[-6:-4]) >= 5 for path in paths])
    expected = normalize(torch.stack([embeddings[lying].mean(0), embeddings[~lying].mean(0)]), dim=1)
    assert torch.allclose(in_one_order(model.model.centres), in_one_order(expected), atol=1e-5)
    images = torch.stack([model.pre_processor.transform(item.image) for item in data.train_data])
    two = model.model(images).pred_score
    model.model.set_centres(embeddings.mean(0, keepdim=True), (64, 64))
    assert two.max() < model.model(images).pred_score.min()


def test_centres_of_very_many_images_are_those_of_a_sample(mvtec_root, dtd, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_cse.cse.centres.MOST_CLUSTERED", 4)
    model = Cse(**COMMON, dtd_dir=dtd)
    data = data_of(mvtec_root)
    Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(model, datamodule=data)
    embeddings = embeddings_of(model, data.train_data)
    samples = [normalize(embeddings[list(rows)].mean(0), dim=0) for rows in combinations(range(10), 4)]
    errors = [(model.model.centres[0] - sample).abs().max().item() for sample in samples]
    assert sum(error < 1e-5 for error in errors) == 1
