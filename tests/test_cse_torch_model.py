import pytest
import torch
from anomalib.data import InferenceBatch
from torch.nn import functional as F

from anomalib_cse import CseModel
from anomalib_cse.cse.torch_model import Decoder, Embedder
from anomalib_cse.features import fuse, pool

TINY = {"backbone": "test_efficientnet", "layers": (2, 3), "pre_trained": False}


def fitted(images, num_centres=1, **options):
    """A model for images of that size, with random centres, whose embeddings differ from image to image."""
    model = CseModel(**{**TINY, **options}, num_centres=num_centres).train()
    for _, _, norm in model.embedder:
        norm.momentum = 1.0
    shape = embedding_of(model, images).shape[1:]  # and BatchNorm has these images' statistics
    model.set_centres(torch.randn(num_centres, *shape), images.shape[-2:])
    return model.eval()


def embedding_of(model, images):
    return model.embed(model.backbone(images)).detach()


def test_fuse_upsamples_to_the_largest_and_concatenates():
    fine, coarse = torch.rand(2, 3, 7, 9), torch.rand(2, 5, 4, 5)
    expected = torch.cat([fine, F.interpolate(coarse, size=(7, 9), mode="bilinear")], dim=1)
    assert torch.allclose(fuse([fine, coarse]), expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (7, 5), (1, 1)])
def test_pool_equals_naive_loop(height, width):
    x = torch.rand(1, 2, height, width)
    pooled = pool(x, 2)
    assert pooled.shape[-2:] == (-(-height // 2), -(-width // 2))
    for row in range(pooled.shape[2]):
        for column in range(pooled.shape[3]):
            window = x[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.allclose(pooled[0, :, row, column], window.mean(dim=(1, 2)))
    assert torch.equal(pool(x, 1), x)


def test_embedder_equals_matrix_products():
    embedder = Embedder(8, 3).eval()
    for block in embedder:
        block[2].running_mean.uniform_(-1, 1)
        block[2].running_var.uniform_(0.5, 2)
    features = [torch.randn(2, 5, 4, 5), torch.randn(2, 3, 2, 3)]
    x = fuse(features).movedim(1, -1)  # (B, H, W, C)
    for convolution, _, norm in embedder:
        x = (x @ convolution.weight[:, :, 0, 0].T + convolution.bias).clamp(min=0)
        x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    assert torch.allclose(embedder(features), x.movedim(-1, 1), atol=1e-5)
    assert [block[0].weight.shape[:2] for block in Embedder(520)] == [(260, 520), (130, 260), (64, 130)]  # the paper's


def test_decoder_gives_the_features_shapes_and_pools_the_coarser_layer():
    decoder = Decoder([136, 384], 64)
    embedding = torch.randn(2, 64, 14, 14)
    fine, coarse = decoder(embedding, [torch.Size((14, 14)), torch.Size((7, 7))])
    assert (fine.shape, coarse.shape) == ((2, 136, 14, 14), (2, 384, 7, 7))
    expected = decoder.last[1](F.max_pool2d(decoder.first[1](embedding), 2))
    assert torch.allclose(coarse, expected, atol=1e-6)
    assert [head[0].out_channels for head in decoder.first] == [68, 192]


def test_score_equals_naive_loop_over_centres_and_positions():
    images = torch.rand(4, 3, 64, 96)
    model = fitted(images, num_centres=3)
    embedding = embedding_of(model, images)
    centres = torch.stack([embedding[0] + embedding[1], embedding[3], torch.randn_like(embedding[0])])
    model.set_centres(7 * centres, (64, 96))
    result = model(images)
    nearest = []
    for image in range(4):
        maps = []
        for centre in centres:
            pairs = zip(embedding[image].flatten(1).T, centre.flatten(1).T, strict=True)
            maps.append(torch.stack([1 - a @ b / (a.norm() * b.norm()) for a, b in pairs]))
        nearest.append(min(range(3), key=lambda k: maps[k].mean()))
        assert result.pred_score[image].item() == pytest.approx(maps[nearest[-1]].mean().item(), abs=1e-5)
        distances = maps[nearest[-1]].view(1, 1, *embedding.shape[2:])
        expected = F.interpolate(distances, size=(64, 96), mode="bilinear")
        assert torch.allclose(result.anomaly_map[image], expected[0], atol=1e-5)
    assert nearest[0] == nearest[1] != nearest[3]


@pytest.mark.parametrize(("sign", "expected"), [(3, 0), (-3, 2)])
def test_centre_scores_zero_and_its_opposite_two(sign, expected):
    images = torch.rand(1, 3, 48, 80)
    model = fitted(images)
    model.set_centres(sign * embedding_of(model, images), (48, 80))
    result = model(images)
    assert result.pred_score.item() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(result.anomaly_map, torch.full((1, 1, 48, 80), float(expected)), atol=1e-5)


@pytest.mark.parametrize("size", [(65, 97), (32, 32), (33, 200)])
@pytest.mark.parametrize("layers", [(1, 2, 4), ("blocks.0", "blocks.3")])
def test_any_size_and_layers_give_a_score_and_a_map(size, layers):
    images = torch.rand(3, 3, *size)
    result = fitted(images, layers=layers, embedding_dim=5, pool_size=1, num_centres=2)(images)
    assert isinstance(result, InferenceBatch)
    assert result.pred_score.shape == (3,)
    assert result.anomaly_map.shape == (3, 1, *size)
    assert result.pred_score.isfinite().all()


@pytest.mark.parametrize("backbone", ["resnet18", "regnetx_002", "convnext_atto"])
def test_other_backbones_score(backbone):
    images = torch.rand(1, 3, 64, 64)
    assert fitted(images, backbone=backbone)(images).pred_score.isfinite().all()


def test_map_points_at_a_changed_patch():
    images = torch.full((1, 3, 128, 128), 0.5)
    model = fitted(images, pool_size=1)
    model.set_centres(embedding_of(model, images), (128, 128))
    images[:, :, 80:112, 16:48] = torch.rand(1, 3, 32, 32)
    row, column = divmod(model(images).anomaly_map.argmax().item(), 128)
    assert 64 <= row < 128
    assert 0 <= column < 64


def test_forward_changes_nothing_and_batches_do_not_matter():
    images = torch.rand(3, 3, 64, 64)
    model = fitted(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, again = model(images), model(images)
    assert torch.equal(batch.pred_score, again.pred_score)
    assert batch.pred_score[1].item() == pytest.approx(model(images[1:2]).pred_score.item(), abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_state_dict_is_all_that_scoring_needs():
    images = torch.rand(2, 3, 64, 96)
    model, other = fitted(images, num_centres=2), CseModel(**TINY, num_centres=2).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images).pred_score, other(images).pred_score)
    with pytest.raises(ValueError, match=r"images must be \(64, 96\)"):
        other(torch.rand(2, 3, 64, 64))


def test_backbone_is_frozen_and_the_embedder_trains():
    model = CseModel(**TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    embedding_of_batch = model.embed(model.backbone(torch.rand(4, 3, 64, 64)))
    (embedding_of_batch * torch.randn_like(embedding_of_batch)).sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    moved -= {"centres"}  # NaN, which equals nothing
    assert moved == {name for name in before if name.startswith("embedder.")}


def test_unfitted_model_and_other_image_sizes_are_refused():
    images = torch.rand(1, 3, 64, 96)
    with pytest.raises(RuntimeError, match="model is not fitted: train it"):
        CseModel(**TINY).eval()(images)
    model = fitted(images)
    for size in ((96, 64), (64, 97), (128, 192)):
        with pytest.raises(
            ValueError, match=rf"images must be \(64, 96\) pixels high and wide, .* got \({size[0]}, {size[1]}\)"
        ):
            model(torch.rand(1, 3, *size))
