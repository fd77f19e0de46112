"""Mixture of block attention: definition, packing, decoding, and FLA's own."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from unittest import mock

import pytest
import torch
from dense import dense_attention, qkv
from peers import fla_module

from lsm_cuda.ops import parallel_moba

T = 109


def read(q, k, chunk: int, topk: int) -> torch.Tensor:
    """Which keys each query reads, ``[B, Hq, T, T]``."""
    T = q.shape[1]
    chunks = -(-T // chunk)
    t, own = torch.arange(T)[:, None], (torch.arange(T) // chunk)[:, None]
    means = torch.stack([k[:, c * chunk : (c + 1) * chunk].mean(1) for c in range(chunks)], 1)
    share = q.shape[2] // k.shape[2]
    score = torch.einsum("bthd,bnhd->bhtn", q, means.repeat_interleave(share, 2))
    block = torch.arange(chunks)
    score = score.masked_fill(block >= own, -torch.inf).masked_fill(block == own, torch.inf)
    best = score.topk(min(topk, chunks), -1)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen.scatter_(-1, best.indices, best.values > -torch.inf)
    return chosen.repeat_interleave(chunk, 3)[..., :T] & (t >= t.T)


@pytest.mark.parametrize(("chunk", "topk"), [(16, 3), (48, 2), (16, 1), (16, 99)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_is_its_definition(chunk, topk, heads):
    leaves = qkv(T, *heads)
    o = parallel_moba(*leaves, chunk_size=chunk, topk=topk)
    want, _ = dense_attention(*leaves, read(*leaves[:2], chunk, topk).int())
    weight = torch.randn_like(o)
    ours, theirs = ([x, *torch.autograd.grad((x * weight).sum(), leaves)] for x in (o, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("chunk", [16, 48])
def test_packed_sequences_are_separate(chunk):
    q, k, v = (x[:1] for x in qkv(T))
    cuts = [0, 5, 5, 60, 109]
    o = parallel_moba(q, k, v, torch.tensor(cuts), chunk_size=chunk, topk=2)
    for a, b in pairwise(cuts):
        alone = parallel_moba(q[:, a:b], k[:, a:b], v[:, a:b], chunk_size=chunk, topk=2)
        torch.testing.assert_close(o[:, a:b], alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("last", [1, 7])
def test_last_tokens_are_those_of_the_whole(last):
    q, k, v = qkv(T)
    o = parallel_moba(q, k, v, chunk_size=16, topk=3)
    end = parallel_moba(q[:, -last:], k, v, chunk_size=16, topk=3)
    torch.testing.assert_close(end, o[:, -last:], atol=1e-12, rtol=1e-12)


def flash(q, k, v, cu_q, cu_k, causal, scale):
    """What FLA's code asks of flash_attn: sequences one by one, ``lse [H, T]``."""
    outputs, lses = [], []
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        count = torch.ones(b - a, d - c).int()
        o, lse = dense_attention(
            q[None, a:b], k[None, c:d], v[None, c:d], count.tril() if causal else count, scale
        )
        outputs.append(o[0])
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, 1), None, None


def flash_backward(q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, **rest):
    """Likewise of its backward, which is given the whole softmax's lse."""
    for (a, b), (c, d) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        scale, grad = rest["softmax_scale"], next(iter(rest.values()))[a:b]  # the output's is first
        p = (torch.einsum("thd,shd->hts", q[a:b], k[c:d]) * scale).sub(softmax_lse[:, a:b, None])
        p = p.exp().tril() if rest["causal"] else p.exp()
        delta = (grad * out[a:b]).sum(-1).T[..., None]
        ds = p * (torch.einsum("thd,shd->hts", grad, v[c:d]) - delta) * scale
        dv[c:d] = torch.einsum("hts,thd->shd", p, grad)
        dq[a:b] = torch.einsum("hts,shd->thd", ds, k[c:d])
        dk[c:d] = torch.einsum("hts,thd->shd", ds, q[a:b])


@pytest.mark.parametrize("lengths", [[96], [40, 70]])
def test_is_what_fla_computes(lengths):
    pytest.importorskip("einops")
    index = ModuleType("fla.ops.utils.index")

    def offsets(cu, size):
        return torch.nn.functional.pad(((cu.diff() + size - 1) // size).cumsum(0), (1, 0))

    def split(split_size, cu_seqlens, dtype, device):
        starts = [s for a, b in pairwise(cu_seqlens.tolist()) for s in range(a, b, split_size)]
        return torch.tensor([*starts, int(cu_seqlens[-1])], dtype=dtype)

    def chunks(cu, size):
        counts = (cu.diff() + size - 1) // size
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        return torch.stack([owner, owner], 1)

    index.prepare_lens = torch.diff
    index.prepare_chunk_offsets = offsets
    index.prepare_split_cu_seqlens = split
    index.prepare_chunk_indices = chunks
    index.prepare_cu_seqlens_from_lens = lambda lens: torch.nn.functional.pad(
        lens.cumsum(0), (1, 0)
    )
    with mock.patch.dict(sys.modules, {"fla.ops.utils.index": index}):
        theirs = fla_module("ops/moba/parallel.py")
    theirs.flash_attn_varlen_func = True
    theirs._flash_attn_varlen_forward = lambda q, k, v, cu_seqlens_q, cu_seqlens_k, **rest: flash(
        q, k, v, cu_seqlens_q, cu_seqlens_k, rest["causal"], rest["softmax_scale"]
    )
    theirs._flash_attn_varlen_backward = flash_backward
    leaves = [x.detach().float()[:1].requires_grad_() for x in qkv(sum(lengths), 4, 4, 8, 8)]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    want = theirs.parallel_moba(*leaves, cu, max(lengths), 16, 3)
    ours = parallel_moba(*leaves, cu, max(lengths), 16, 3)
    torch.testing.assert_close(ours, want.view_as(ours), atol=2e-5, rtol=2e-5)
    weight = torch.randn_like(ours)
    grads = (torch.autograd.grad((x.view_as(ours) * weight).sum(), leaves) for x in (ours, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


def test_errors():
    with pytest.raises(ValueError, match=r"chunk_size must be a multiple of 16 .* got 20 and 4"):
        parallel_moba(*qkv(T), chunk_size=20)
    q, k, v = qkv(T)
    with pytest.raises(RuntimeError, match="q must be the last tokens of the T = 9 of k, got TQ ="):
        parallel_moba(q, k[:, :9], v[:, :9])
