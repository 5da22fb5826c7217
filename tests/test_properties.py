"""What holds for every size, type and batch: loss and resizing under hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as TF

from anomalib_cse.cse.loss import contrastive_cosine_loss, decoder_loss
from anomalib_cse.deployment.pre_processing import ExactResize

EXAMPLES = settings(max_examples=100, derandomize=True, deadline=None, database=None)
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def rand(seed, *shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@EXAMPLES
@given(
    seed=SEEDS,
    batch=st.integers(1, 5),
    dim=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    exponent=st.integers(-15, 15),
    zero=st.booleans(),
    dtype=DTYPES,
)
def test_losses_are_finite_within_their_range_and_blind_to_length(
    seed, batch, dim, height, width, exponent, zero, dtype
):
    scale = 2.0 ** (max(exponent, -8) if dtype == torch.float16 else exponent)
    first, second = (2 * rand(seed, 2, batch, dim, height, width) - 1).mul(scale).to(dtype).unbind(0)
    if zero:
        second = second * 0
    second.requires_grad_()
    corrupted = rand(seed + 1, batch) < 0.5
    slack = 1e-5
    losses = contrastive_cosine_loss(first, second, corrupted), decoder_loss([first], [second])
    for loss in losses:
        assert -slack <= loss <= 2 + slack
        if dtype.itemsize > 2:  # at a zero vector it is of the order of 1e12, beyond what 16 bits hold
            [gradient] = torch.autograd.grad(loss, second, retain_graph=True)
            assert gradient.isfinite().all()
    assert torch.equal(decoder_loss([first, first], [second, second]), losses[1])
    again = contrastive_cosine_loss(2 * first, second, corrupted)
    assert torch.allclose(again, losses[0], atol=slack + 1e-6)
    cosine = torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=1).mean()
    both = contrastive_cosine_loss(first, second, ~corrupted) + losses[0]  # every pair once as clean, once as corrupted
    assert torch.allclose(both.double(), 1.5 - cosine / 2, atol=8 * slack)


@EXAMPLES
@given(
    seed=SEEDS,
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    target=st.tuples(
        st.integers(2, 120), st.integers(2, 120)
    ),  # to one column torch's own is wrong: all rows are alike
    dtype=DTYPES,
)
def test_resizing_equals_torchvisions_and_stays_in_range(seed, batch, channels, size, target, dtype):
    images = rand(seed, batch, channels, *size, dtype=dtype)
    resized = ExactResize(target)(images)
    assert (resized.shape, resized.dtype) == ((batch, channels, *target), dtype)
    expected = TF.resize(images.double(), list(target), antialias=True)
    roundings = 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6  # of weights, rows and columns, in [0, 1]
    assert torch.allclose(resized.double(), expected, rtol=0, atol=max(roundings, 1e-5))
    assert resized.min() >= images.min() - roundings
    assert resized.max() <= images.max() + roundings
