"""Log-linear attention: what is its own beyond test_families.py."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from families import FAMILIES, assert_rule, draw, gradients, operator
from peers import fla_module
from torch import Tensor

from lsm_cuda import ops, reference

(FAMILY,) = (f for f in FAMILIES if f.name == "log_linear_attn")


def test_signature_is_flas() -> None:
    names = "q k v g level_scales initial_state output_final_state cu_seqlens scale"
    parameters = inspect.signature(ops.chunk_log_linear_attn).parameters
    assert list(parameters) == names.split()
    assert parameters["scale"].default == 1.0


def arguments(T: int, L: int = 9) -> list[Tensor]:
    shapes = (2, 6), (2, 6), (4, 5), (4,), (4, L)
    q, k, v, g, scales = (torch.randn(2, T, *s, dtype=torch.float64) for s in shapes)
    return [q, k, v, torch.nn.functional.logsigmoid(g), scales]


def quadratic(q, k, v, g, level_scales, **rest):  # type: ignore[no-untyped-def]
    """Scores weighted by the level of their pair, ``bit_length(t xor s)``."""
    T, group = q.shape[1], v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(group, 2) for x in (q, k))
    t = torch.arange(T)
    level = torch.tensor([[(int(a) ^ int(b)).bit_length() for b in t] for a in t])
    seen = t[:, None] >= t
    weights = level_scales.transpose(1, 2).gather(
        -1, torch.where(seen, level, 0).expand(v.shape[0], v.shape[2], T, T)
    )
    steps = g.transpose(1, 2)[..., None].masked_fill(~(t[:, None] > t), 0)
    decay = steps.cumsum(2).masked_fill(~seen, -torch.inf).exp()
    return torch.einsum("bthk,bshk,bhts,bshv->bthv", q, k, weights * decay, v), None


def test_is_a_sum_over_pairs() -> None:
    """As far from a tree as can be; all gradients."""
    x = draw(FAMILY, gate="-inf", T=70)
    expected = tuple(gradients(quadratic, FAMILY, x, d) for d in (torch.float64, torch.float32))
    assert_rule(gradients(operator(FAMILY), FAMILY, x), expected, x)


@pytest.mark.parametrize("T", [2, 37, 64, 65])
def test_is_what_fla_computes(T: int) -> None:
    naive = fla_module("ops/log_linear_attn/naive.py").naive_log_linear_attn
    q, k, v, g, scales = arguments(T)
    for scale in (1.0, None):
        o, _ = ops.chunk_log_linear_attn(q, k, v, g, scales, scale=scale)
        torch.testing.assert_close(o, naive(q, k, v, g, scales, scale))


@pytest.mark.parametrize("T", [0, 1, 15, 16, 17, 40])
def test_final_state(T: int) -> None:
    """Levels whose bit of the length is set hold the buckets of the Fenwick tree, whole."""
    x = arguments(T, L=8)
    _, (levels, length) = ops.chunk_log_linear_attn(*x, output_final_state=True)
    assert levels.shape == (2, 7, 4, 6, 5) and length.tolist() == [T, T]
    _, (buckets,) = reference.log_linear_attention(*x)
    for level in range(7):
        if (T >> level) & 1:
            torch.testing.assert_close(levels[:, level], buckets[:, level])


@pytest.mark.parametrize("cuts", [(1,), (16,), (3, 4, 29), (31, 33)])
def test_continued_anywhere(cuts: tuple[int, ...]) -> None:
    """Not only at multiples of a block; with the states' gradient."""
    x = [t.requires_grad_() for t in arguments(40)]
    whole, last = ops.chunk_log_linear_attn(*x, output_final_state=True)
    outputs, state = [], None
    for a, b in zip((0, *cuts), (*cuts, 40), strict=True):
        part = (t[:, a:b] for t in x)
        o, state = ops.chunk_log_linear_attn(*part, initial_state=state, output_final_state=True)
        outputs.append(o)
    parts = torch.cat(outputs, 1)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(tuple(state), tuple(last))
    weights = torch.randn_like(whole)
    grads = [torch.autograd.grad((o * weights).sum(), x) for o in (parts, whole)]
    torch.testing.assert_close(*grads)


def test_packed_sequences_continue_at_their_own_places() -> None:
    """Sequences of different lengths so far, one of them empty now."""
    firsts = [arguments(T) for T in (5, 16, 1)]
    begun = [
        ops.chunk_log_linear_attn(*(t[:1] for t in x), output_final_state=True)[1] for x in firsts
    ]
    state = ops.LogLinearAttentionState(
        torch.cat([s.levels for s in begun]), torch.cat([s.length for s in begun])
    )
    x = [t[:1] for t in arguments(30)]
    bounds = [0, 19, 19, 30]
    o, last = ops.chunk_log_linear_attn(
        *x, initial_state=state, output_final_state=True, cu_seqlens=torch.tensor(bounds)
    )
    assert last.length.tolist() == [24, 16, 12]
    for n, (a, b) in enumerate(pairwise(bounds)):
        alone = (t[:, a:b] for t in x)
        p, own = ops.chunk_log_linear_attn(*alone, initial_state=begun[n], output_final_state=True)
        torch.testing.assert_close(o[:, a:b], p)
        torch.testing.assert_close(last.levels[n : n + 1], own.levels)


def test_levels_beyond_the_scales_are_not_read() -> None:
    """A packed row may be longer than any of its sequences needs levels for."""
    x = [t[:1] for t in arguments(24, L=4)]
    bounds = torch.tensor([0, 8, 16, 24])
    o, _ = ops.chunk_log_linear_attn(*x, cu_seqlens=bounds)
    for a in (0, 8, 16):
        alone, _ = ops.chunk_log_linear_attn(*(t[:, a : a + 8] for t in x))
        torch.testing.assert_close(o[:, a : a + 8], alone)


def test_memory_is_not_quadratic() -> None:
    """What autograd keeps grows with T log T."""

    def kept(T: int) -> int:
        x = [t.float().requires_grad_() for t in arguments(T, L=12)]
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ops.chunk_log_linear_attn(*x)
        return total

    assert kept(2048) < 2.6 * kept(1024)


def test_errors() -> None:
    x = arguments(20, L=5)
    with pytest.raises(ValueError) as error:
        ops.chunk_log_linear_attn(*x)
    assert str(error.value) == (
        "lsm::chunk_log_linear_attn: level_scales must have at least 6 levels for T = 20, got L = 5"
    )
    with pytest.raises(ValueError) as error:
        ops.chunk_log_linear_attn(*x[:4], x[4][:, :, :1])
    assert str(error.value) == (
        "lsm::chunk_log_linear_attn: level_scales must have shape [B, T, HV, L] with "
        "B, T, HV = [2, 20, 4], got [2, 20, 1, 5]"
    )
    state = ops.LogLinearAttentionState(
        torch.zeros(2, 3, 4, 6, 5).double(), torch.zeros(2, dtype=torch.int64)
    )
    with pytest.raises(RuntimeError) as error:
        ops.log_linear_attn_step(*(t[:, 0] for t in x), state)
    assert str(error.value) == (
        "lsm::log_linear_attn_step: levels must have shape [B, L - 1, HV, K, V] = "
        "[2, 4, 4, 6, 5], got [2, 3, 4, 6, 5]"
    )
