import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_cse.pairs import PairSampler, generator_for
from anomalib_cse.synthesis import AnomalySynthesis
from anomalib_cse.training_data import TrainingData

DEVICE = torch.device("cpu")


class Item:
    def __init__(self, image):
        self.image = image


class Images(torch.utils.data.Dataset):
    """Images of one grey value each, so that an index can be read off any image."""

    def __init__(self, count):
        self.count = count
        self.reads = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        return Item(torch.full((3, 32, 32), index / self.count))


def extract(images):
    """Stands for the backbone: something that depends on every pixel."""
    return [torch.nn.functional.avg_pool2d(images, 4)]


def training_data(count=20, load=True, **options):
    synthesis = AnomalySynthesis(torch.full((2, 3, 32, 32), 255, dtype=torch.uint8))
    loader = DataLoader(Images(count), batch_size=6)
    data = TrainingData(loader, None, synthesis=synthesis, **{"batch_size": 4, **options})
    if load:
        data.load(extract, DEVICE)
    return data


def pairs_of(sampler):
    return [pair for batch in sampler for pair in batch]


def test_pairs_of_an_epoch():
    sampler = PairSampler(range(100, 1100), 8, seed=3)
    pairs = pairs_of(sampler)
    assert sorted(p.first for p in pairs) == list(range(100, 1100))
    assert all(100 <= p.second < 1100 for p in pairs)
    assert abs(sum(p.corrupt for p in pairs) - 500) < 3 * 250**0.5
    assert 400 < len({p.second for p in pairs}) < 800  # with replacement: 632 expected
    assert pairs == pairs_of(sampler)
    sampler.set_epoch(1)
    assert pairs != pairs_of(sampler)


def test_a_training_step_in_16_bits_paints_the_defects_of_one_in_32():
    data, images = training_data(), torch.rand(16, 3, 64, 64)
    expected = data.corrupt(images, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(data.corrupt(images, 1), expected)


@pytest.mark.parametrize(("count", "processes", "share"), [(10, 3, 4), (2, 5, 1)])
def test_processes_share_the_pairs(count, processes, share):
    whole = set(pairs_of(PairSampler(range(count), 3, seed=5)))
    shares = [PairSampler(range(count), 3, seed=5, num_replicas=processes, rank=rank) for rank in range(processes)]
    assert {len(pairs_of(s)) for s in shares} == {share}
    assert {len(list(s)) for s in shares} == {len(shares[0])}  # as many steps in every process
    assert set().union(*map(pairs_of, shares)) == whole


def test_generators_are_independent_streams():
    drawn = {torch.randint(2**60, (), generator=generator_for(*s)).item() for s in [(0, 1), (1, 0), (0, 0), (1,), (0,)]}
    assert len(drawn) == 5
    assert torch.equal(torch.rand(3, generator=generator_for(4, 2)), torch.rand(3, generator=generator_for(4, 2)))


def test_the_hold_out_is_a_share_of_the_images():
    data = training_data(holdout_ratio=0.3, seed=1)
    assert len(data.holdout) == 6
    assert sorted(data.holdout + data.training) == list(range(20))
    assert training_data(seed=1).holdout == data.holdout
    assert training_data(seed=2).holdout != data.holdout
    assert training_data(holdout_ratio=0).holdout == []


def grey_values(pixels):
    return (pixels * 20).round().long().flatten()


def batches(data):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    for step, batch in enumerate(loader):
        yield batch, data.pair_features(batch, 2, step)


FEATURES_ONLY = 4 * (3 * 8 * 8) * (20 + 64 + 2) + 100


@pytest.mark.parametrize("budget", [0, FEATURES_ONLY, 2**30])
def test_features_are_those_of_the_pairs(budget):
    data = training_data(memory_budget=budget)
    data.synthesis = AnomalySynthesis(torch.full((2, 3, 32, 32), 255, dtype=torch.uint8), kinds=["textural"])
    assert data.needs == {0: "both", FEATURES_ONLY: "corrupted", 2**30: "none"}[budget]
    firsts = []
    for batch, ([first], [second], corrupt) in batches(data):
        assert torch.equal(grey_values(first[:, 0, 0, 0]), batch.first)
        clean = ~batch.corrupt
        assert torch.equal(grey_values(second[clean][:, 0, 0, 0]), batch.second[clean])
        assert torch.equal(corrupt, batch.corrupt)
        assert batch.corrupt.nonzero().flatten().tolist() == batch.rows
        for row in batch.rows:  # most pixels are still those of the second image
            assert grey_values(second[row]).mode().values == batch.second[row]
            assert second[row].std() > 0
        firsts += batch.first.tolist()
    assert sorted(firsts) == data.training


def test_memory_does_not_change_the_features():
    for other in (FEATURES_ONLY, 2**30):
        for (_, without), (_, with_memory) in zip(
            batches(training_data(memory_budget=0)), batches(training_data(memory_budget=other)), strict=True
        ):
            for a, b in zip((*without[0], *without[1]), (*with_memory[0], *with_memory[1]), strict=True):
                assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [5, 6, 6]), (17, [17]), (100, [17]), (4, [3, 3, 4, 3, 4])])
def test_batches_are_of_even_sizes(batch_size, sizes):
    data = training_data(24, batch_size=batch_size)
    assert [len(batch.first) for batch in data.train_dataloader()] == sizes


@pytest.mark.parametrize("budget", [0, 2**30])
def test_hold_out_pairs_are_the_same_every_epoch(budget):
    data = training_data(memory_budget=budget)
    first, again = list(data.holdout_features()), list(data.holdout_features())
    assert sum(len(corrupt) for *_, corrupt in first) >= 64
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[1][0], b[1][0])
    members = {index for a in first for index in grey_values(a[0][0][:, 0, 0, 0]).tolist()}
    assert members == set(data.holdout)


@pytest.mark.parametrize("budget", [0, 2**30])
def test_clean_features_of_all_images(budget):
    data = training_data(memory_budget=budget)
    in_order = torch.cat([layer for [layer] in data.features()])
    assert grey_values(in_order[:, 0, 0, 0]).tolist() == list(range(20))
    shuffled = grey_values(torch.cat([layer for [layer] in data.features(epoch=1)])[:, 0, 0, 0]).tolist()
    assert sorted(shuffled) == list(range(20))
    assert shuffled != list(range(20))


def test_no_file_is_read_twice_where_the_budget_allows():
    data = training_data()
    for _ in range(3):
        list(batches(data))
        list(data.holdout_features())
        list(data.features())
    assert data.images.dataset.reads + data.augmented.dataset.reads == 20


class Augmented(Images):
    augmentations = RandomHorizontalFlip(p=1.0)

    def __getitem__(self, index):
        image = super().__getitem__(index).image.clone()
        image[..., 0] = 1.0
        return Item(self.augmentations(image) if self.augmentations else image)


@pytest.mark.parametrize("wrap", [lambda dataset: dataset, lambda dataset: Subset(dataset, range(20))])
def test_augmented_images_train_and_plain_ones_are_held_out(wrap):
    synthesis = AnomalySynthesis(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    data = TrainingData(DataLoader(wrap(Augmented(20))), None, synthesis=synthesis)
    data.load(lambda images: [images], DEVICE)
    assert data.needs == "both"
    for _, ([first], _, _) in batches(data):
        assert (first[..., -1] == 1).all()
    for [first], _, _ in data.holdout_features():
        assert (first[..., 0] == 1).all()
    assert all((layer[..., 0] == 1).all() for [layer] in data.features())


def test_half_precision():
    data = training_data(memory_dtype=torch.float16)
    assert data.kept_images.dtype == torch.float16
    for _, ([first], _, _) in batches(data):
        assert first.dtype == torch.float32


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    data = training_data()
    data.pair_features(next(iter(data.read_pairs(data.images, data.holdout_pairs()))), 0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_trained_with():
    with pytest.raises(ValueError, match="too few training images, 1, to hold out 1"):
        training_data(1)
    with pytest.raises(TypeError, match="one DataLoader"):
        TrainingData([1, 2, 3], None, synthesis=None)


class Gradients(Images):
    """Images that no symmetry leaves as they are; white textures are none of their values."""

    def __getitem__(self, index):
        return Item((torch.arange(3 * 32 * 32) / 4000 + index / 100).reshape(3, 32, 32))


def gradients(count):
    synthesis = AnomalySynthesis(torch.full((2, 3, 32, 32), 255, dtype=torch.uint8))
    data = TrainingData(DataLoader(Gradients(count)), None, synthesis=synthesis, holdout_ratio=0, batch_size=3)
    data.load(lambda images: [images], DEVICE)
    return data, [data.images[index] for index in range(count)]


@pytest.mark.parametrize("half", [0, 1])
def test_corrupted_images_differ_where_their_masks_are(half):
    data, originals = gradients(4)
    found = []
    for [images], masks in data.corrupted_features(10, half):
        assert images.shape[0] == masks.shape[0]
        for image, mask in zip(images, masks, strict=True):
            assert mask.any()
            of = [(image - original)[:, ~mask].abs().max().item() == 0 for original in originals]
            assert of.count(True) == 1
            found.append(of.index(True))
            assert (image - originals[found[-1]])[:, mask].abs().max() > 0
    assert len(found) == 10
    assert set(found) == set(data.halves[half])
    first, second = ([m for _, m in data.corrupted_features(10, half)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = [m for _, m in data.corrupted_features(10, 1 - half)]
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("count", [1, 4, 5])
def test_halves_are_halves(count):
    data, originals = gradients(count)
    sizes = [len(half) for half in data.halves]
    assert sizes == [-(-count // 2), count // 2]
    assert sorted(data.halves[0] + data.halves[1]) == list(range(count))
    for half, images in enumerate(data.halves):
        features = [f for [batch] in data.features(half=half) for f in batch]
        assert len(features) == len(images)
        assert all(torch.equal(f, originals[image]) for f, image in zip(features, images, strict=True))
        shuffled = [f for [batch] in data.features(epoch=1, half=half) for f in batch]
        assert sorted(f.sum().item() for f in shuffled) == sorted(f.sum().item() for f in features)


def test_every_image_is_drawn_before_any_is_drawn_again():
    data, _ = gradients(1)
    drawn = data.draw(10, [2, 5, 6, 8])
    assert sorted(drawn[:4]) == sorted(drawn[4:8]) == [2, 5, 6, 8]
    assert len(drawn) == 10
    assert data.draw(10, []) == []


def test_what_is_needed_again_is_kept_while_there_is_room():
    data, _ = gradients(1)
    made = []

    def make():
        for size in (30, 20):
            made.append(size)
            yield [torch.zeros(size)], torch.zeros(5)

    batch_bytes = 4 * (30 + 5 + 20 + 5)
    for room, times, left in ((batch_bytes, 1, 0), (batch_bytes - 1, 3, batch_bytes - 1)):
        data.room = room
        made.clear()
        again = data.again(make)
        for _ in range(2):
            assert [len(f) for [f], _ in again()] == [30, 20]
        assert len(made) == 2 * times
        assert data.room == left


def test_mirrored_images_are_mirrored():
    data, originals = gradients(4)
    mirrored = torch.cat([images for [images] in data.mirrored_features(9)])
    expected = [o.flip(axes) for o in originals for axes in ((), (1,), (2,), (1, 2))]
    assert len(mirrored) == len(expected) == 16
    assert all(any(torch.equal(image, other) for image in mirrored) for other in expected)
