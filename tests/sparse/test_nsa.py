"""Native sparse attention: definition branch by branch, packing, decoding, and FLA's own."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from unittest import mock

import pytest
import torch
from dense import dense_attention, qkv
from peers import fla_module

from lsm_cuda.ops import nsa_topk, parallel_nsa

B, T, H, G = 2, 77, 2, 2


def gates(T: int = T, heads: int = H * G) -> list[torch.Tensor]:
    return [torch.rand(B, T, heads, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def windows(x: torch.Tensor, length: int, stride: int) -> torch.Tensor:
    """Means of windows, the last ones cut."""
    starts = range(0, x.shape[1], stride)
    return torch.stack([x[:, s : s + length].mean(1) for s in starts], 1)


def definition(q, k, v, gates, block, counts, window, length, stride):
    """Each branch as dense attention under its mask, and the paper's choice of blocks."""
    T, scale = q.shape[1], q.shape[-1] ** -0.5
    t = torch.arange(T)[:, None]
    k_cmp, v_cmp = (windows(x, length, stride) for x in (k, v))
    end = torch.arange(k_cmp.shape[1]) * stride + length - 1
    o_cmp, _ = dense_attention(q, k_cmp, v_cmp, (end <= t)[None].int())
    score = scale * torch.einsum("bthd,bnhd->bthn", q, k_cmp.repeat_interleave(G, 2))
    p = score.masked_fill(~(end <= t)[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    p = p.unflatten(2, (H, G)).sum(3)
    blocks = -(-T // block)
    share = torch.zeros(p.shape[-1], blocks, dtype=p.dtype)  # strides of a window in a block
    for n in range(p.shape[-1]):
        for u in range(n, n + length // stride):
            if u * stride // block < blocks:
                share[n, u * stride // block] += 1
    mass, own = p @ share, t // block
    chosen = torch.zeros(*mass.shape, dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in mass.shape[:3])).tolist():
        b, i, h = index
        last = int(own[i])
        forced = {0, last, max(last - 1, 0)}
        rank = sorted(
            range(last + 1),
            key=lambda j: (j != last, j not in forced, j if j in forced else -mass[b, i, h, j]),
        )
        chosen[b, i, h, rank[:counts]] = True
    read = chosen.transpose(1, 2).repeat_interleave(block, 3)[..., :T] & (t >= t.T)
    o_slc, _ = dense_attention(q, k, v, read.repeat_interleave(G, 1).int())
    o_swa, _ = dense_attention(q, k, v, ((t >= t.T) & (t - window < t.T))[None].int())
    g_cmp, g_slc, g_swa = (g[..., None] for g in gates)
    return g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 8), (8, 4)])
@pytest.mark.parametrize("counts", [3, 4])
def test_is_its_definition(length, stride, counts):
    leaves, gated = qkv(T, H * G, H, 8, 6, B), gates()
    options = {"block_counts": counts, "block_size": 16, "window_size": 10}
    o = parallel_nsa(*leaves, *gated, **options, cmp_length=length, cmp_stride=stride)
    want = definition(*leaves, gated, 16, counts, 10, length, stride)
    torch.testing.assert_close(o, want, atol=1e-10, rtol=1e-8)
    weight = torch.randn_like(o)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), leaves + gated) for x in (o, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_packed_sequences_are_separate():
    q, k, v = (x[:1] for x in qkv(T, H * G, H))
    gated = [g[:1] for g in gates()]
    options = {"block_counts": 3, "block_size": 16, "window_size": 10}
    options |= {"cmp_length": 16, "cmp_stride": 8}
    cuts = [0, 3, 3, 40, 77]
    o = parallel_nsa(q, k, v, *gated, **options, cu_seqlens=torch.tensor(cuts))
    for a, b in pairwise(cuts):
        alone = parallel_nsa(*(x[:, a:b] for x in (q, k, v, *gated)), **options)
        torch.testing.assert_close(o[:, a:b], alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("last", [1, 7])
def test_last_tokens_are_those_of_the_whole(last):
    q, k, v = qkv(T, H * G, H)
    gated = gates()
    options = {"block_counts": 3, "block_size": 16, "window_size": 10}
    o = parallel_nsa(q, k, v, *gated, **options)
    end = parallel_nsa(q[:, -last:], k, v, *(g[:, -last:] for g in gated), **options)
    torch.testing.assert_close(end, o[:, -last:], atol=1e-12, rtol=1e-12)


def test_blocks_given_and_counts_of_their_own():
    q, k, v = qkv(T, H * G, H)
    g_cmp, g_slc, _ = gates()
    given = torch.tensor([3, 0, -1, 0]).expand(B, T, H, -1)
    o = parallel_nsa(q, k, v, None, g_slc, block_indices=given, block_size=16)
    t, j = torch.arange(T)[:, None], torch.arange(T)
    read = (j <= t) & ((j < 16) | (j // 16 == 3))
    want, _ = dense_attention(q, k, v, read[None].int())
    torch.testing.assert_close(o, want * g_slc[..., None], atol=1e-10, rtol=1e-8)
    counts = torch.randint(3, 6, (B, T, H))
    o = parallel_nsa(q, k, v, g_cmp, g_slc, block_counts=counts, block_size=16)
    for n in (3, 4, 5):
        same = parallel_nsa(q, k, v, g_cmp, g_slc, block_counts=n, block_size=16)
        here = (counts == n).repeat_interleave(G, 2)
        torch.testing.assert_close(o[here], same[here], atol=1e-12, rtol=1e-12)


def pooled(x: torch.Tensor, size: int, cu_seqlens=None) -> torch.Tensor:
    return windows(x, size, size)


@pytest.mark.parametrize("T", [64, 77])
def test_is_what_fla_computes(T):
    utils, pooling = ModuleType("fla.ops.utils"), ModuleType("fla.ops.utils.pooling")
    utils.prepare_chunk_offsets = None  # of packed sequences
    pooling.mean_pooling = pooled
    pytest.importorskip("einops")
    with mock.patch.dict(sys.modules, {"fla.ops.utils": utils, "fla.ops.utils.pooling": pooling}):
        naive = fla_module("ops/nsa/naive.py")
    leaves = [x.detach().float().requires_grad_() for x in qkv(T, 32, 2, 8, 8, B)]
    leaves += [g.detach().float().requires_grad_() for g in gates(T, 32)[:2]]
    q, k, v, g_cmp, g_slc = leaves
    theirs, indices = naive.naive_nsa(
        q, k, v, g_cmp, g_slc, None, None, 3, 16, return_block_indices=True
    )
    ours = parallel_nsa(q, k, v, g_cmp, g_slc, None, None, 3, 16)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    weight = torch.randn_like(ours)
    grads = (torch.autograd.grad((x * weight).sum(), leaves) for x in (ours, theirs))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)
    k_cmp, scale = pooled(k, 16), 8**-0.5
    _, lse = naive.naive_nsa_compression(q, k_cmp, pooled(v, 16), 16, scale)
    chosen = nsa_topk(q, k_cmp, lse.transpose(1, 2), 3, 16)
    assert torch.equal(chosen.sort(-1).values.long(), indices.transpose(1, 2).sort(-1).values)


def test_errors():
    q, k, v = qkv(T, H * G, H)
    g = gates()
    with pytest.raises(ValueError, match="needs block_indices where there is no g_cmp"):
        parallel_nsa(q, k, v)
    with pytest.raises(RuntimeError, match=r"g_slc must have shape \[B, TQ, HQ\] = \[2, 77, 4\]"):
        parallel_nsa(q, k, v, g[0], g[1][:, :5])
    with pytest.raises(ValueError, match="stride must divide length and block_size, got 5, 16"):
        parallel_nsa(q, k, v, *g, block_size=16, cmp_length=16, cmp_stride=5)
    for k_cmp, v_cmp in ((k[:, :4], None), (k[:, :4], v[:, :5]), (k[:, :9], v[:, :9])):
        with pytest.raises(ValueError, match="k_cmp and v_cmp come together, 4 windows each, got"):
            parallel_nsa(q, k, v, *g, block_size=16, k_cmp=k_cmp, v_cmp=v_cmp)
    with pytest.raises(RuntimeError, match="q must be the last tokens of the T = 9 of k, got TQ"):
        parallel_nsa(q, k[:, :9], v[:, :9], *g)
