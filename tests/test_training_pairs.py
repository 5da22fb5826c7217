"""Pairs of images by their features, the features that are kept, and the pairs that are held out."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset

from anomalib_cse.cse.hold_out import HoldOut
from anomalib_cse.cse.training_pairs import Pairing, draw_partners
from anomalib_cse.features import FeatureCache
from anomalib_cse.synthesis import AnomalySynthesis

COUNT, HELD_OUT = 20, (3, 8, 11, 12, 15, 19)
FEATURE_BYTES = 4 * 3 * 8 * 8
MEMORY = [0, 7 * FEATURE_BYTES, 2**30]


class Images(Dataset):
    """Images of one grey value each, so that it can be seen in any features which image they are of."""

    def __init__(self, numbers=range(COUNT)):
        self.numbers = numbers
        self.samples = pd.DataFrame({"image_path": [f"{number}.png" for number in numbers]})

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return torch.full((3, 32, 32), self.numbers[index] / COUNT), f"{self.numbers[index]}.png"


class ReadOnce(Images):
    """Images whose files are gone once they have been read."""

    def __init__(self, numbers=range(COUNT)):
        super().__init__(numbers)
        self.gone = set()

    def __getitem__(self, index):
        assert index not in self.gone
        self.gone.add(index)
        return super().__getitem__(index)


def batch_of(items):
    images, paths = zip(*items, strict=True)
    return SimpleNamespace(image=torch.stack(images), image_path=list(paths))


def extract(images):
    """Stands for the backbone: something that depends on every pixel."""
    return [avg_pool2d(images, 4)]


def pairing(memory_budget=2**30, seed=0, images=Images):
    textures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    hold_out = HoldOut(0.3)
    hold_out.all_images, hold_out.held_out = images(), images(HELD_OUT)
    loader = DataLoader(hold_out.all_images, batch_size=6, collate_fn=batch_of)
    synthesis = AnomalySynthesis(textures, kinds=["textural"])
    return Pairing(extract, synthesis, memory_budget, seed, hold_out, loader, None)


def numbers_of(features):
    """Which image each of some features is of, by the pixels that are as they were."""
    return (features * COUNT).flatten(1).mode(dim=1).values.round().long().tolist()


def a_batch(numbers):
    return batch_of([Images()[number] for number in numbers])


def equal(some, others):
    return all(
        torch.allclose(a, b, atol=1e-6)
        for first, second in zip(list(some), list(others), strict=True)  # all of them: what reads shows its progress
        for a, b in zip((*first[0], *first[1], first[2]), (*second[0], *second[1], second[2]), strict=True)
    )


def test_partners_are_other_images_half_of_them_corrupted(generator):
    draws = [draw_partners(5, generator) for _ in range(2000)]
    partners, corrupted = torch.stack([d[0] for d in draws]), torch.stack([d[1] for d in draws])
    counts = torch.stack([(partners == image).sum(dim=0) for image in range(5)])  # (partner, image)
    assert counts.diagonal().sum() == 0
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert (others - 500).abs().max() < 4 * (2000 * 3 / 16) ** 0.5
    assert abs(corrupted.float().mean() - 0.5) < 3 * (0.25 / 10000) ** 0.5
    assert draw_partners(1, generator)[0].tolist() == [0]


@pytest.mark.parametrize("memory_budget", MEMORY)
def test_training_pairs_are_features_of_the_batch(memory_budget):
    batch, pairs_of = a_batch(range(1, 17)), pairing(memory_budget)
    for step in range(3):
        first, second, corrupted = pairs_of.training_pairs(batch.image, batch.image_path, 0, step)
        assert torch.allclose(first[0], extract(batch.image)[0], atol=1e-6)
        partners = numbers_of(second[0])
        assert set(partners) <= set(range(1, 17))
        assert all(partner != image for image, partner in zip(range(1, 17), partners, strict=True))
        changed = (second[0] - extract(a_batch(partners).image)[0]).abs().amax(dim=(1, 2, 3)) > 1e-6
        assert torch.equal(changed, corrupted)
        assert 0 < corrupted.sum() < 16


def test_pairs_follow_from_seed_epoch_and_step():
    batch = a_batch(range(6))

    def pairs(seed, *numbers):
        return [pairing(seed=seed).training_pairs(batch.image, batch.image_path, *numbers)]

    assert equal(pairs(0, 2, 1), pairs(0, 2, 1))
    assert not any(equal(pairs(0, 2, 1), others) for others in (pairs(0, 1, 2), pairs(0, 2, 0), pairs(1, 2, 1)))


def test_training_step_in_16_bits_paints_the_defects_of_one_in_32():
    batch = a_batch(range(16))
    expected = pairing().training_pairs(batch.image, batch.image_path, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal([pairing().training_pairs(batch.image, batch.image_path, 0)], [expected])


@pytest.mark.parametrize("memory_budget", MEMORY[1:])
def test_held_out_pairs_are_the_same_every_time(memory_budget):
    kept = pairing(memory_budget)
    first, again = list(kept.held_out_pairs()), list(kept.held_out_pairs())
    assert sum(len(pairs.corrupted) for pairs in first) >= 64  # several pairs to an image, as these are few
    assert {number for pairs in first for number in numbers_of(pairs.first[0])} == set(HELD_OUT)
    assert {number for pairs in first for number in numbers_of(pairs.second[0])} == set(HELD_OUT)
    assert equal(first, again)
    assert equal(first, pairing(0).held_out_pairs())
    assert not equal(first, pairing(memory_budget, seed=1).held_out_pairs())
    assert len({tuple(pairs.corrupted.tolist()) for pairs in first}) > 1  # and drawn anew for each


def test_files_are_read_once_where_memory_allows():
    kept = pairing(images=ReadOnce)
    first = list(kept.held_out_pairs())
    assert equal(kept.held_out_pairs(), first)
    for _ in range(2):
        features = [layer for [layer] in kept.clean_features(kept.defect_free)]
        assert numbers_of(torch.cat(features)) == list(range(COUNT))


@pytest.mark.parametrize("memory", [0, 1, 3.5, 8])
def test_feature_cache_keeps_what_fits_its_bytes(memory):
    cache, batch = FeatureCache(int(memory * FEATURE_BYTES)), a_batch(range(1, 7))
    first = cache(batch.image, batch.image_path, extract)
    assert torch.equal(first[0], extract(batch.image)[0])
    again = cache(batch.image, batch.image_path, lambda images: extract(-images))  # what is computed now is negative
    kept = min(int(memory), 6)
    assert torch.equal(again[0], torch.cat([first[0][:kept], -first[0][kept:]]))


def test_on_a_gpu_half_of_what_is_free_is_kept_and_the_rest_computed_together(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * FEATURE_BYTES, 0))
    cache, batch = FeatureCache(100 * FEATURE_BYTES, torch.device("cuda")), a_batch(range(1, 7))
    calls = []

    def counted(images):
        calls.append(len(images))
        return extract(images)

    for _ in range(2):
        assert torch.equal(cache(batch.image, batch.image_path, counted)[0], extract(batch.image)[0])
    assert calls == [1] * 6 + [4]
    assert len(cache.features) == 2
