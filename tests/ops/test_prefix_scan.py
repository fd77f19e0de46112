"""All prefixes at once are the binary counter's, whatever the aggregation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lsm_cuda import ops

LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 11, 16, 33]


def network(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Neither associative nor commutative; of whole matrices and a gate."""
    x = torch.tanh(a[0] @ torch.ones(3, 3).tril().to(a[0].dtype) + 2 * b[0])
    return x, a[1] * 0.5 + b[1].square()


def bracket(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Numbers that tell how they were bracketed."""
    return (a[0] * 3 + b[0] * b[0],)


def online(agg, x, initial, N: int):
    state, prefixes = ops.PrefixScanState(), []
    for n in range(N):
        prefixes.append(state.prefix(agg, initial))
        state.push(agg, tuple(t[:, n] for t in x))
        assert len(state.roots) == state.count.bit_count()
    return prefixes, state


@pytest.mark.parametrize("N", LENGTHS)
def test_offline_is_online(N: int) -> None:
    x = torch.randn(2, N, 4, 3, dtype=torch.float64), torch.randn(2, N, 1, dtype=torch.float64)
    initial = tuple(torch.randn_like(t[:, :1].sum(1)) for t in x)
    prefixes, state = ops.prefix_scan(network, x, initial)
    expected, counter = online(network, x, initial, N)
    assert prefixes[0].shape == x[0].shape
    for n, prefix in enumerate(expected):
        for got, want in zip(prefixes, prefix, strict=True):
            torch.testing.assert_close(got[:, n], want)
    assert state.count == counter.count
    for got, want in zip(state.roots, counter.roots, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("N", LENGTHS)
def test_bracketing_is_the_same(N: int) -> None:
    """In integers, to the last digit; another bracketing gives another number."""
    x = (torch.arange(1, N + 1)[None] % 5 + 1,)
    (prefixes,), state = ops.prefix_scan(bracket, x, (torch.tensor([7]),))
    expected, counter = online(bracket, x, (torch.tensor([7]),), N)
    assert [p.item() for p in prefixes[0]] == [p[0].item() for p in expected]
    for _ in range(3):  # and decoding goes on where the tree ended
        for s in (state, counter):
            s.push(bracket, (torch.tensor([2]),))
        assert state.prefix(bracket, (torch.tensor([7]),)) == counter.prefix(
            bracket, (torch.tensor([7]),)
        )


def test_affine_aggregation_is_the_engine() -> None:
    """Chunks' decays and states, aggregated, are simple_gla's states."""
    B, N, C, H, K, V = 1, 6, 5, 2, 4, 3
    q, k = torch.randn(2, B, N * C, H, K, dtype=torch.float64)
    v = torch.randn(B, N * C, H, V, dtype=torch.float64)
    g = -torch.rand(B, N * C, H, dtype=torch.float64)
    chunks = [
        ops.chunk_simple_gla(
            *(t[:, n * C : n * C + C] for t in (q, k, v, g)), None, None, None, True
        )
        for n in range(N)
    ]
    decay = g.unflatten(1, (N, C)).sum(2).exp()[..., None, None]
    states = torch.stack([S for _, S in chunks], 1)
    (_, prefixes), _ = ops.prefix_scan(
        lambda a, b: (b[0] * a[0], b[0] * a[1] + b[1]),
        (decay, states),
        (torch.ones_like(decay[:, 0]), torch.zeros_like(states[:, 0])),
    )
    for n in range(N):
        _, S = ops.chunk_simple_gla(*(t[:, : n * C] for t in (q, k, v, g)), output_final_state=True)
        torch.testing.assert_close(prefixes[:, n], S)


def test_calls_grow_with_the_logarithm() -> None:
    calls = []

    def agg(a, b):
        calls.append(a[0].shape[1])
        return (a[0] + b[0],)

    ops.prefix_scan(agg, (torch.randn(1, 256, 2),), (torch.zeros(1, 2),))
    assert len(calls) == 16 and sum(calls) == 255 + 255


def test_gradients() -> None:
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 6, 1, dtype=torch.float64, requires_grad=True)
    initial = x.new_zeros(1, 2, 3), y.new_zeros(1, 1)
    torch.autograd.gradcheck(lambda *e: ops.prefix_scan(network, e, initial)[0], (x, y))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"elements must have one length, got \[2, 3\]"):
        ops.prefix_scan(bracket, (torch.ones(1, 2), torch.ones(1, 3)), (torch.ones(1),) * 2)
    with pytest.raises(ValueError, match="5 elements have 2 roots, got 1"):
        ops.PrefixScanState(5, ((torch.ones(1),),))
