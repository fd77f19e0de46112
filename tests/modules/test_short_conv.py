"""ShortConvolution: against a loop, and its ways of cutting a sequence against each other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lsm_cuda.modules import ShortConvolution

D, W = 6, 4


def make(bias: bool = True, activation: str | None = "silu", width: int = W) -> ShortConvolution:
    torch.manual_seed(0)
    return ShortConvolution(D, width, bias, activation).double()


def loop(conv: ShortConvolution, x: torch.Tensor, history: torch.Tensor | None = None):
    """One sequence [T, D], one output at a time."""
    width = conv.kernel_size[0]
    past = x.new_zeros(width, D) if history is None else history.T
    padded = torch.cat([past, x])
    weight = conv.weight.squeeze(1)  # [D, W]
    rows = []
    for t in range(x.shape[0]):
        y = (padded[t + 1 : t + 1 + width] * weight.T).sum(0)
        y = y if conv.bias is None else y + conv.bias
        rows.append(y if conv.activation is None else y * y.sigmoid())
    return torch.stack(rows) if rows else x, padded[-width:].T


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("T", [0, 1, 3, 4, 9])
def test_rows_are_the_loop(bias, activation, width, T):
    conv = make(bias, activation, width)
    x = torch.randn(2, T, D, dtype=torch.float64)
    cache = torch.randn(2, D, width, dtype=torch.float64)
    for history in (None, cache):
        with torch.enable_grad():
            y, state = conv(
                x, cache=None if history is None else history.clone(), output_final_state=True
            )
        for b in range(2):
            expected, last = loop(conv, x[b], None if history is None else history[b])
            close(y[b], expected)
            close(state[b], last)


@pytest.mark.parametrize("with_cache", [False, True])
def test_packed_is_each_sequence_alone(with_cache):
    conv = make()
    bounds = [0, 0, 1, 3, 3, 10, 12, 12]
    x = torch.randn(1, 12, D, dtype=torch.float64)
    N = len(bounds) - 1
    cache = torch.randn(N, D, W, dtype=torch.float64) if with_cache else None
    for dtype in (torch.int32, torch.int64):
        y, state = conv(
            x, cache=cache, output_final_state=True, cu_seqlens=torch.tensor(bounds, dtype=dtype)
        )
        for n, (start, end) in enumerate(pairwise(bounds)):
            expected, last = loop(conv, x[0, start:end], None if cache is None else cache[n])
            close(y[0, start:end], expected)
            close(state[n], last)


def test_steps_and_splits_are_the_whole():
    conv = make()
    x = torch.randn(3, 10, D, dtype=torch.float64)
    whole, final = conv(x, output_final_state=True)
    with torch.no_grad():
        first, state = conv(x[:, :2], output_final_state=True)
        second, state = conv(x[:, 2:7], cache=state, output_final_state=True)
        outputs = [first, second]
        for t in range(7, 10):
            held = state
            y, state = conv(x[:, t : t + 1], cache=state, output_final_state=True)
            assert state is held, "a step works in place"
            outputs.append(y)
    close(torch.cat(outputs, 1), whole)
    close(state, final)


def test_state_does_not_keep_the_sequence_alive():
    _, state = make()(torch.randn(1, 1000, D, dtype=torch.float64), output_final_state=True)
    assert state.untyped_storage().nbytes() == D * W * 8
    assert make()(torch.randn(1, 5, D, dtype=torch.float64))[1] is None


def test_mask_and_residual():
    conv = make()
    x, residual = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(2, 5, D).double()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    y, _ = conv(x, residual=residual, mask=mask)
    close(y, conv(x * mask[..., None])[0] + residual)


def test_gradients_through_packing():
    conv = make(activation=None)
    x = torch.randn(1, 7, D, dtype=torch.float64, requires_grad=True)
    cache = torch.randn(2, D, W, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 2, 7])
    assert torch.autograd.gradcheck(
        lambda x, cache: conv(x, cache=cache, output_final_state=True, cu_seqlens=cu), (x, cache)
    )


def test_parameters_are_those_of_a_convolution():
    assert {n: list(p.shape) for n, p in make().named_parameters()} == {
        "weight": [D, 1, W],
        "bias": [D],
    }
    assert list(make(bias=False).state_dict()) == ["weight"]
    assert make().state_size == D * W


def test_errors():
    conv, x = make(), torch.randn(2, 5, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="mask or cu_seqlens, not both"):
        conv(x, mask=torch.ones(2, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="B = 1 with cu_seqlens"):
        conv(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"\[N, D, W\] = \[2, 6, 4\], got \[1, 6, 4\]"):
        conv(x, cache=torch.zeros(1, D, W).double())
    with pytest.raises(ValueError, match="silu, swish or None, got 'relu'"):
        ShortConvolution(4, 2, activation="relu")
