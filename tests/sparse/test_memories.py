"""Attention with memories: each against its formula on the whole map."""

from __future__ import annotations

import pytest
import torch
from dense import dense_attention, qkv, same

from lsm_cuda import sparse

B, T, HQ, HKV, K = 2, 43, 4, 2, 8
G = HQ // HKV
F64 = torch.float64


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("memory", [0, 17])
def test_transformer_xl(memory):
    S, R = T + memory, 6
    q, k, v = leaf(B, T, HQ, K), leaf(B, S, HQ, K), leaf(B, S, HQ, 5)
    w_r, u, w = leaf(HQ, K, R), leaf(HQ, K), leaf(HQ, K)
    i, j = torch.arange(memory, S)[:, None], torch.arange(S)
    angle = (i - j)[..., None] / 10000 ** (torch.arange(0, R, 2, dtype=F64) / R)
    position = torch.cat([angle.sin(), angle.cos()], -1)  # [T, S, R]
    score = torch.einsum("bthk,bshk->bhts", q + u, k)
    score = score + torch.einsum("bthk,hkr,tsr->bhts", q + w, w_r, position)
    p = (score / K**0.5).masked_fill(j > i, -torch.inf).softmax(-1)
    want = torch.einsum("bhts,bshv->bthv", p, v)
    got = sparse.transformer_xl_attn(q, k, v, w_r, u, w)
    same(got, want, q, k, v, w_r, u, w)


def test_transformer_xl_is_that_of_xlnet():
    """XLNet's attention with memory: the same scores, whose masks are the caller's."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.xlnet.modeling_xlnet import XLNetModel, XLNetRelativeAttention

    config = transformers.XLNetConfig(d_model=HQ * K, n_head=HQ, dropout=0.0)
    theirs = XLNetRelativeAttention(config).double().eval()
    memory, S = 9, T + 9
    q, k, v = leaf(B, T, HQ, K), leaf(B, S, HQ, K), leaf(B, S, HQ, K)
    position = torch.arange(S, -T, -1.0)
    frequency = 1 / 10000 ** (torch.arange(0, HQ * K, 2.0) / (HQ * K))
    embedding = XLNetModel.positional_embedding(position, frequency, 1).double()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    heads = torch.einsum("ibh,hnd->ibnd", embedding, theirs.r)
    mask = (torch.arange(S) > torch.arange(memory, S)[:, None]).double()[:, :, None, None]
    first = [x.transpose(0, 1) for x in (q, k, v)]
    want = theirs.rel_attn_core(*first, heads, attn_mask=mask).transpose(0, 1)
    w_r = theirs.r.permute(1, 2, 0)  # [H, K, R]
    got = sparse.transformer_xl_attn(q, k, v, w_r, theirs.r_w_bias, theirs.r_r_bias)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # its sinusoids are fp32


def test_compressive_memory():
    memory = sparse.CompressiveMemory(5, 3, rate=2)
    assert memory.states() is None
    seen, old = torch.zeros(1, 0, 4), torch.zeros(1, 0, 4)
    for n in (4, 3, 6, 1):
        segment = torch.randn(1, n, 4, requires_grad=True)
        pushed = memory.update(segment)
        seen = torch.cat([seen, segment.detach()], 1)
        over = max(seen.shape[1] - 5, 0) // 2 * 2
        start = max(seen.shape[1] - 5, 0) - over
        if over:
            torch.testing.assert_close(pushed, seen[:, start : start + over])
            made = pushed.unflatten(1, (-1, 2)).mean(2)
            old = torch.cat([old, made], 1)[:, -3:]
        seen = seen[:, start + over :]
        torch.testing.assert_close(memory.states(), torch.cat([old, seen], 1))
        assert not memory.states().requires_grad


def test_compressive_memory_learns_to_compress():
    compress = torch.nn.Conv1d(4, 4, 2, 2)
    memory = sparse.CompressiveMemory(
        2, 4, 2, lambda x: compress(x.transpose(1, 2)).transpose(1, 2)
    )
    pushed = memory.update(torch.randn(1, 8, 4))
    x = torch.randn(1, 3, 4)

    def attend(states):
        return (x @ states.mT).softmax(-1) @ states

    memory.reconstruction_loss(pushed, attend).backward()
    assert all(p.grad is not None and p.grad.any() for p in compress.parameters())


def test_adaptive_span():
    leaves = q, k, v = qkv(T, HQ, HKV)
    span = torch.tensor([-3.0, 2.5, 9.25, 99.0], dtype=F64, requires_grad=True)
    z = span.clamp(0, 20)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    ramp = ((6 + z[:, None, None] - distance) / 6).clamp(0, 1) * (distance >= 0)
    score = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(G, 2)) / K**0.5
    weight = score.exp() * ramp
    p = weight / weight.sum(-1, keepdim=True)
    want = torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(G, 2))
    same(sparse.adaptive_span_attn(q, k, v, span, 6.0, 20), want, *leaves, span)


def test_memorizing():
    leaves = q, k, v = qkv(T, HQ, HKV)
    _, mk, mv = (x.detach() for x in qkv(60, HQ, HKV))
    gate = leaf(HQ)
    score = torch.einsum("bthd,bshd->bhts", q, mk.repeat_interleave(G, 2))
    best = torch.zeros_like(score).scatter(-1, score.topk(7, -1).indices, 1)
    far, _ = dense_attention(q, mk, mv, best)
    near, _ = dense_attention(q, k, v, torch.ones(T, T).tril())
    share = gate.sigmoid()[:, None]
    got = sparse.memorizing_attn(q, k, v, mk, mv, gate, 7)
    same(got, share * far + (1 - share) * near, *leaves, gate)


def test_unlimiformer():
    q, states = leaf(B, 5, HQ, K), leaf(B, T, 12)
    w_k, w_v = leaf(HQ, 12, K), leaf(HQ, 12, 6)
    k, v = (torch.einsum("bsd,hdk->bshk", states, w) for w in (w_k, w_v))
    score = torch.einsum("bthd,bshd->bhts", q, k)
    best = torch.zeros_like(score).scatter(-1, score.topk(9, -1).indices, 1)
    want, _ = dense_attention(q, k, v, best)
    same(sparse.unlimiformer_attn(q, states, w_k, w_v, 9), want, q, states, w_k, w_v)


@pytest.mark.parametrize("topk", [None, 1])
def test_landmarks_are_softmax_in_softmax(topk):
    leaves = q, k, v = qkv(T, HQ, HKV)
    block, blocks = 16, -(-T // 16)
    marks = leaf(B, blocks, HKV, K)
    score = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(G, 2)) / K**0.5
    gate = torch.einsum("bthd,bnhd->bhtn", q, marks.repeat_interleave(G, 2)) / K**0.5
    t, own = torch.arange(T)[:, None], torch.arange(T)[:, None] // block
    inside = (torch.arange(T) // block == own) & (torch.arange(T) <= t)
    past = (torch.arange(blocks) < own).expand_as(gate)
    if topk is not None:
        best = gate.masked_fill(~past, -torch.inf).topk(topk, -1).indices
        past = past & torch.zeros_like(past).scatter(-1, best, True)
    both = torch.cat(
        [score.masked_fill(~inside, -torch.inf), gate.masked_fill(~past, -torch.inf)], -1
    ).softmax(-1)
    p = both[..., :T]
    for n in range(blocks):
        here = slice(n * block, (n + 1) * block)
        weight = torch.zeros_like(p)
        weight[..., here] = score[..., here].softmax(-1)
        p = p + both[..., T + n, None] * weight
    want = torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(G, 2))
    got = sparse.landmark_attn(q, k, v, marks, block, topk)
    same(got, want, *leaves, marks)


def test_errors():
    q, k, v = qkv(T, HQ, HKV)
    with pytest.raises(ValueError, match="a landmark for each of 2 whole blocks, got 1"):
        sparse.landmark_attn(q, k, v, k[:, :1], 16)
    with pytest.raises(RuntimeError, match="q must be the last tokens of the T = 9 of k, got TQ ="):
        sparse.transformer_xl_attn(q, q[:, :9], q[:, :9], torch.randn(HQ, K, 6))
    with pytest.raises(ValueError, match="rate positive, got 4, 2 and 0"):
        sparse.CompressiveMemory(4, 2, 0)
    with pytest.raises(ValueError, match="R must be even, got 5"):
        sparse.transformer_xl_attn(q, q, q, torch.randn(HQ, K, 5))
    with pytest.raises(RuntimeError, match=r"w_r must have shape \[H, K, R\] = \[4, 8, 6\]"):
        sparse.transformer_xl_attn(q, q, q, torch.randn(HQ, 3, 6))


def test_no_tokens():
    x, marks = torch.randn(2, 0, HQ, K), torch.randn(2, 3, HQ, K)
    assert sparse.landmark_attn(x, x, x, marks, 16).shape == x.shape
    assert sparse.memorizing_attn(x, x, x, marks, marks, torch.zeros(HQ), 2).shape == x.shape
    w = torch.randn(HQ, 5, K)
    assert sparse.unlimiformer_attn(x, torch.randn(2, 4, 5), w, w, 2).shape == x.shape


def test_more_landmarks_than_blocks():
    q, k, v = qkv(40, HQ, HKV)
    marks = torch.randn(k.shape[0], 5, HKV, K, dtype=k.dtype)
    few = sparse.landmark_attn(q, k, v, marks[:, :2], 16)
    torch.testing.assert_close(sparse.landmark_attn(q, k, v, marks, 16), few)
