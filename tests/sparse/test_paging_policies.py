"""Policies that read some pages, or pages and streams: which, token by token, in plain loops."""

from __future__ import annotations

import pytest
import torch
from caches import HKV, HQ, PROMPT, G, K, T, chosen, close, generate, scores, softmax_over
from dense import dense_attention

from lsm_cuda import sparse
from lsm_cuda.sparse import KVCache


@pytest.mark.parametrize(("logical", "shared"), [(16, False), (8, True), (16, True)])
def test_quest(logical, shared, tokens):
    for n, o, _ in generate(sparse.Quest(32, 16, logical, 1, shared), tokens):
        q, k = tokens[0][:, n - 1], tokens[1][:, :n].repeat_interleave(G, 2)
        parts = [k[:, a : a + logical] for a in range(0, n, logical)]
        bound = torch.stack(
            [torch.maximum(q * p.amax(1), q * p.amin(1)).sum(-1) for p in parts], -1
        )  # [B, Hq, parts]
        exact = scores(tokens, n)
        for i in range(len(parts)):
            here = exact[..., i * logical : (i + 1) * logical]
            assert (bound[..., i, None] >= here - 1e-12).all()
        if shared:
            bound = bound.unflatten(1, (HKV, G)).sum(2).repeat_interleave(G, 1)
        pages = -(-n // 16)
        score = torch.stack(
            [
                bound[..., i * 16 // logical : (i + 1) * 16 // logical].amax(-1)
                for i in range(pages)
            ],
            -1,
        )
        score[..., -1] = torch.inf
        read = chosen(score, 2).repeat_interleave(16, -1)[..., :n]
        close(o, softmax_over(read, tokens, n))


def test_quest_reuses_its_choice(tokens):
    policy, fresh = sparse.Quest(16, 16, reuse=4), sparse.Quest(16, 16)
    pairs = zip(generate(policy, tokens), generate(fresh, tokens), strict=True)
    for i, ((n, ours, _), (_, theirs, _)) in enumerate(pairs):
        if i % 4 == 0:
            close(ours, theirs)
            page = policy.chosen[..., 0].clone()
        read = (torch.arange(n) // 16 == page[..., None]) | (torch.arange(n) // 16 == (n - 1) // 16)
        close(ours, softmax_over(read, tokens, n))


def test_resa_is_dense_after_a_correction(tokens):
    q, k, v = tokens
    policy = sparse.ReSA(32, 16, frequency=6)
    wrong = [q, *(torch.where(torch.arange(T)[:, None, None] < PROMPT, x, 0) for x in (k, v))]
    due = []
    for n, _, cache in generate(policy, wrong):
        due.append(policy.due)
        if policy.due:
            policy.rectify(k[:, n - 6 : n], v[:, n - 6 : n])
            keys, values = cache.kept()
            assert torch.equal(keys, k[:, :n]) and torch.equal(values, v[:, :n])
            close(policy.low, torch.stack([p.amin(1) for p in keys.split(16, 1)], 1))
    assert due == [i % 6 == 5 for i in range(T - PROMPT)]


def test_longheads(tokens):
    q, k, v = tokens
    size, every = 16, {}
    for c in range(T // size):
        at = slice(c * size, (c + 1) * size)
        inner, _ = dense_attention(q[:, at], k[:, at], v[:, at], torch.ones(size, size).int())
        keys = k[:, at].repeat_interleave(G, 2)
        p = (torch.einsum("bhd,bshd->bhs", inner.mean(1), keys) / K**0.5).softmax(-1)
        every[c] = torch.einsum("bhs,bshd->bhd", p, keys)
    for n, o, _ in generate(sparse.LongHeads(3, size), tokens):
        full, last = n // size, (n - 1) // size
        score = torch.stack([(q[:, n - 1] * every[c]).sum(-1) for c in range(full)], -1)
        score[..., 0] = torch.inf
        if last < full:
            score[..., last] = torch.inf
        read = chosen(score, 3 - (last == full))
        read = torch.nn.functional.pad(read, (0, last + 1 - full), value=True)
        close(o, softmax_over(read.repeat_interleave(size, -1)[..., :n], tokens, n))


def test_duo_attention(tokens):
    policy = sparse.DuoAttention([False, True], 6, 2)
    prompt = KVCache(policy).prefill(*tokens)
    t, j = torch.arange(T)[:, None], torch.arange(T)
    read = ((j <= t) & ((j < 2) | (j > t - 6)), j <= t)  # streaming heads read no more of a prompt
    close(prompt, dense_attention(*tokens, torch.stack(read).repeat_interleave(G, 0).int())[0])
    for n, o, _ in generate(sparse.DuoAttention([False, True], 6, 2), tokens):
        j = torch.arange(n)
        read = torch.ones(1, HQ, n, dtype=torch.bool)
        read[:, :G] = (j < 2) | (j >= n - 6)
        close(o, softmax_over(read, tokens, n))


def test_lserve(tokens):
    quest = generate(
        sparse.Quest(32, 32, 16, 2, True),
        [x[:, :, -G:] if x is tokens[0] else x[:, :, 1:] for x in tokens],
    )
    ours = generate(sparse.LServe([False, True], 32, 32, 16, 2, 6, 2), tokens)
    for (n, o, _), (_, pages, _) in zip(ours, quest, strict=True):
        j = torch.arange(n)
        stream = ((j < 2) | (j >= n - 6))[None, None]
        close(o[:, :, G:], pages)
        close(o[:, :, :G], softmax_over(stream, tokens, n)[:, :, :G])
