import pytest
import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F

from anomalib_cse.torch_model import CseModel, Decoder, Embedder, cosine_distances, fold_batch_norm, fuse, pool

TINY = {"backbone": "test_efficientnet", "layers": (2, 3), "pre_trained": False}


def fitted(**options):
    model = CseModel(**{**TINY, **options}).eval()
    model.set_centres(torch.randn_like(model.centres))
    return model


def test_fuse_upsamples_to_the_largest_and_concatenates():
    fine, coarse = torch.rand(2, 3, 7, 9), torch.rand(2, 5, 4, 5)
    expected = torch.cat([fine, F.interpolate(coarse, size=(7, 9), mode="bilinear")], dim=1)
    assert torch.equal(fuse([fine, coarse]), expected)


def test_folding_batch_norm_changes_nothing():
    embedder = Embedder(8, 3).eval()
    for block in embedder:
        for value in (block[2].running_mean, block[2].running_var, block[2].weight.data, block[2].bias.data):
            value.uniform_(0.5, 2)
    before = {name: value.clone() for name, value in embedder.state_dict().items()}
    folded, features = fold_batch_norm(embedder), [torch.rand(2, 8, 5, 4)]
    assert torch.allclose(folded(features), embedder(features), atol=1e-5)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 1
    assert all(torch.equal(value, before[name]) for name, value in embedder.state_dict().items())


def test_embedder_equals_matrix_products():
    embedder = Embedder(8, 3).eval()
    for block in embedder:
        block[2].running_mean.uniform_(-1, 1)
        block[2].running_var.uniform_(0.5, 2)
    features = torch.randn(2, 8, 4, 5)
    x = features.movedim(1, -1)  # (B, H, W, C)
    for convolution, _, norm in embedder:
        x = (x @ convolution.weight[:, :, 0, 0].T + convolution.bias).clamp(min=0)
        x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    assert [block[0].out_channels for block in embedder] == [4, 2, 3]
    assert torch.allclose(embedder([features]), x.movedim(-1, 1), atol=1e-5)


def test_embedder_has_the_papers_widths():
    assert [block[0].weight.shape[:2] for block in Embedder(520, 64)] == [(260, 520), (130, 260), (64, 130)]


def test_decoder_gives_the_features_shapes_and_pools_the_coarser_layer():
    decoder = Decoder([136, 384], 64)
    embedding = torch.randn(2, 64, 14, 14)
    fine, coarse = decoder(embedding, [torch.Size((14, 14)), torch.Size((7, 7))])
    assert (fine.shape, coarse.shape) == ((2, 136, 14, 14), (2, 384, 7, 7))
    expected = decoder.last[1](F.max_pool2d(decoder.first[1](embedding), 2))
    assert torch.allclose(coarse, expected, atol=1e-6)


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


def test_distances_equal_naive_loop():
    embedding, centres = torch.randn(2, 6, 3, 4), F.normalize(torch.randn(3, 6), dim=1)
    distances = cosine_distances(embedding, centres)
    for image in range(2):
        for k in range(3):
            for row in range(3):
                for column in range(4):
                    vector = embedding[image, :, row, column]
                    expected = 1 - vector @ centres[k] / vector.norm()
                    assert distances[image, k, row, column].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_centre_scores_zero_and_its_opposite_two():
    model = fitted()
    centre = torch.randn(64)
    model.set_centres(5 * centre[None])
    for sign, expected in ((3, 0), (-3, 2)):
        model.embed = lambda images, s=sign: s * centre.view(1, 64, 1, 1).expand(len(images), 64, 3, 3)
        result = model(torch.rand(2, 3, 40, 50))
        assert result.pred_score.tolist() == pytest.approx([expected] * 2, abs=1e-5)
        assert torch.allclose(result.anomaly_map, torch.full((2, 1, 40, 50), float(expected)), atol=1e-5)


def test_score_is_the_mean_distance_to_the_closest_centre():
    model = fitted(num_centres=3)
    images = torch.rand(2, 3, 64, 96)
    result = model(images)
    distances = cosine_distances(model.embed(images), model.centres)
    for image in range(2):
        means = [distances[image, k].mean().item() for k in range(3)]
        assert result.pred_score[image].item() == pytest.approx(min(means), abs=1e-6)
    closest = torch.minimum(torch.minimum(distances[:, 0], distances[:, 1]), distances[:, 2])
    expected = F.interpolate(closest[:, None], size=(64, 96), mode="bilinear")
    assert torch.allclose(result.anomaly_map, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (32, 32), (33, 200)])
@pytest.mark.parametrize("layers", [(1, 2, 4), (0, 3)])
def test_any_size_and_layers(size, layers):
    result = fitted(layers=layers, embedding_dim=5, pool_size=1, num_centres=2)(torch.rand(3, 3, *size))
    assert isinstance(result, InferenceBatch)
    assert result.pred_score.shape == (3,)
    assert result.anomaly_map.shape == (3, 1, *size)
    assert result.pred_score.isfinite().all()


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_050", "regnetx_002", "convnext_atto"])
def test_other_backbones(backbone):
    assert fitted(backbone=backbone)(torch.rand(1, 3, 64, 64)).pred_score.isfinite().all()


def test_the_map_points_at_a_changed_patch():
    model = fitted(pool_size=1)
    images = torch.full((1, 3, 128, 128), 0.5)
    model.set_centres(model.embed(images).mean(dim=(2, 3)))
    clean = model(images).anomaly_map
    images[:, :, 80:112, 16:48] = torch.rand(1, 3, 32, 32)
    row, column = divmod((model(images).anomaly_map - clean).argmax().item(), 128)
    assert 64 <= row < 128
    assert 0 <= column < 64


def test_forward_is_pure_and_batches_do_not_matter():
    model = fitted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(3, 3, 64, 64)
    together, again = model(images), model(images)
    single = model(images[1:2])
    assert torch.equal(together.pred_score, again.pred_score)
    assert together.pred_score[1].item() == pytest.approx(single.pred_score.item(), abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_state_dict_round_trip():
    model, other = fitted(num_centres=2), fitted(num_centres=2)
    images = torch.rand(2, 3, 64, 64)
    assert not torch.allclose(model(images).pred_score, other(images).pred_score)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images).pred_score, other(images).pred_score)


def test_unfitted_centres():
    with pytest.raises(RuntimeError, match="model is not fitted"):
        CseModel(**TINY).eval()(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["embedding_dim", "pool_size", "num_centres"])
def test_numbers_below_one(name):
    with pytest.raises(ValueError, match=rf"{name} must be a whole number in \[1, inf\), got 0"):
        CseModel(**TINY, **{name: 0})
