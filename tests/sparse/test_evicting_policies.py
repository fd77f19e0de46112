"""Policies that give tokens up: what they keep, token by token, in plain loops."""

from __future__ import annotations

import pytest
import torch
from caches import HKV, PROMPT, B, G, K, T, chosen, close, generate, scores, softmax_over
from dense import dense_attention

from lsm_cuda import sparse
from lsm_cuda.modules import RotaryEmbedding


def test_streaming_llm(tokens):
    for n, o, cache in generate(sparse.StreamingLLM(7, 2), tokens):
        j = torch.arange(n)
        close(o, softmax_over(((j < 2) | (j >= n - 7))[None, None], tokens, n))
        assert len(cache) == 9


def test_streaming_llm_counts_positions_in_the_cache(tokens):
    rotary = RotaryEmbedding(K)
    q, k, v = tokens
    for n, o, _ in generate(sparse.StreamingLLM(7, 2), tokens, rotary=rotary):
        kept = [0, 1, *range(n - 7, n)]
        want, _ = dense_attention(
            rotary(q[:, n - 1 : n], 8), rotary(k[:, kept]), v[:, kept], torch.ones(1, 9).int()
        )
        close(o, want)


def test_h2o(tokens):
    q, k, _ = tokens
    heavy, recent = 6, 5
    p = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(G, 2)) / K**0.5
    p = p.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    mass = p[:, :, :PROMPT].sum(2).unflatten(1, (HKV, G)).sum(2)  # [B, Hkv, T]
    alive = [[list(range(PROMPT)) for _ in range(HKV)] for _ in range(B)]

    def evict(b, h, n):
        own = alive[b][h]
        old = [j for j in own if j < n - recent]
        best = sorted(old, key=lambda j: -mass[b, h, j])[:heavy]
        alive[b][h] = sorted(best) + [j for j in own if j >= n - recent]

    for b in range(B):
        for h in range(HKV):
            evict(b, h, PROMPT)
    for n, o, cache in generate(sparse.H2O(heavy, recent), tokens):
        read = torch.zeros(B, HKV, n, dtype=torch.bool)
        for b in range(B):
            for h in range(HKV):
                alive[b][h].append(n - 1)
                read[b, h, alive[b][h]] = True
        read = read.repeat_interleave(G, 1)
        close(o, softmax_over(read, tokens, n))
        now = scores(tokens, n).div(K**0.5).masked_fill(~read, -torch.inf).softmax(-1)
        mass[..., :n] += now.unflatten(1, (HKV, G)).sum(2)
        for b in range(B):
            for h in range(HKV):
                evict(b, h, n)
        assert len(cache) == heavy + recent


def test_tova(tokens):
    alive = [[*range(PROMPT)] for _ in range(B)]
    budget = 11

    def evict(n):
        p = torch.stack(
            [scores(tokens, n)[b, :, alive[b]].div(K**0.5).softmax(-1).mean(0) for b in range(B)]
        )
        for b in range(B):
            best = p[b].topk(min(budget, len(alive[b]))).indices.sort().values
            alive[b] = [alive[b][i] for i in best]

    evict(PROMPT)
    for n, o, cache in generate(sparse.TOVA(budget), tokens):
        read = torch.zeros(B, 1, n, dtype=torch.bool)
        for b in range(B):
            alive[b].append(n - 1)
            read[b, 0, alive[b]] = True
        close(o, softmax_over(read, tokens, n))
        evict(n)
        assert len(cache) == budget


@pytest.mark.parametrize(("values", "heads"), [(None, None), (4, None), (None, 3)])
def test_spatten(values, heads, tokens):
    q, k, v = tokens
    budget = 9
    p = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(G, 2)) / K**0.5
    p = p.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    mass = p[:, :, :PROMPT].sum((1, 2))  # [B, T]
    alive = [[*range(PROMPT)] for _ in range(B)]

    def prune(n):
        for b in range(B):
            best = sorted((j for j in alive[b] if j < n - 1), key=lambda j: -mass[b, j])[:budget]
            alive[b] = [*sorted(best), n - 1]

    prune(PROMPT)
    here, output = torch.ones(B, HKV * G, dtype=torch.bool), torch.zeros(B, HKV * G)
    for n, o, cache in generate(sparse.SpAtten(budget, values, heads), tokens):
        read = torch.zeros(B, 1, n, dtype=torch.bool)
        for b in range(B):
            alive[b].append(n - 1)
            read[b, 0, alive[b]] = True
        w = scores(tokens, n).div(K**0.5).masked_fill(~read, -torch.inf).softmax(-1)
        few = w if values is None else w * chosen(w, values)
        whole = torch.einsum("bhs,bshd->bhd", few, v[:, :n].repeat_interleave(G, 2))
        close(o[:, 0], whole * here[..., None])
        mass[:, :n] += (w * here[..., None]).sum(1)
        output += o[:, 0].abs().sum(-1)
        for b in range(B if heads else 0):
            order = sorted(range(HKV * G), key=lambda h: -output[b, h] * here[b, h])
            here[b, order[heads:]] = False
        prune(n)
        assert len(cache) == budget + 1


def test_progressive_bits(tokens):
    """A head that has no large weight by the first bits of queries and keys reads all of them."""
    few, bits, threshold = 3, 8, 0.2
    q = tokens[0] * torch.tensor([0.1, 0.1, 6, 6])[:, None]  # flat rows, and others
    again = 0
    for n, o, _ in generate(
        sparse.SpAtten(T, progressive=(few, bits, threshold)), [q, *tokens[1:]]
    ):
        rows, weights = [], []
        for kept in (few, bits):
            rough = []
            for x in (q[:, n - 1 : n], tokens[1][:, :n]):
                step = x.abs().amax((1, 3), keepdim=True) / 127
                code = (x / step).round()
                rough.append((code / 2 ** (bits - kept)).floor() * 2 ** (bits - kept) * step)
            score = torch.einsum("bthd,bshd->bhts", rough[0], rough[1].repeat_interleave(G, 2))
            p = (score / K**0.5).softmax(-1)
            weights.append(p[:, :, 0])
            rows.append(
                torch.einsum("bhts,bshd->bthd", p, tokens[2][:, :n].repeat_interleave(G, 2))
            )
        flat = weights[0].amax(-1) < threshold
        again += flat.double().mean()
        close(o, rows[1].where(flat[:, None, :, None], rows[0]))
    assert 0.2 < again / (T - PROMPT) < 0.8


def test_snapkv(tokens):
    budget, window, kernel = 15, 6, 5
    q, k, _ = (x[:, :PROMPT] for x in tokens)
    p = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(G, 2)) / K**0.5
    p = p.masked_fill(torch.ones(PROMPT, PROMPT).triu(1).bool(), -torch.inf).softmax(-1)
    mass = p[:, :, -window:].sum(2).unflatten(1, (HKV, G)).sum(2)[..., : PROMPT - window]
    smooth = torch.stack(
        [
            mass[..., max(j - kernel // 2, 0) : j + kernel // 2 + 1].amax(-1)
            for j in range(PROMPT - window)
        ],
        -1,
    )
    read = torch.ones(B, HKV, T, dtype=torch.bool)
    read[..., : PROMPT - window] = chosen(smooth, budget - window)
    read = read.repeat_interleave(G, 1)
    for n, o, cache in generate(sparse.SnapKV(budget, window, kernel), tokens):
        close(o, softmax_over(read[..., :n], tokens, n))
        assert len(cache) == budget + n - PROMPT


@pytest.mark.parametrize(("recovery", "expected"), [(0.0, 0), (1.1, 4), (0.5, None)])
def test_fastgen(recovery, expected, tokens):
    special, punctuation = torch.zeros(2, B, PROMPT, dtype=torch.bool)
    special[:, 0], punctuation[:, ::6] = True, True
    q, k, _ = (x[:, :PROMPT] for x in tokens)
    q = q * torch.tensor([0.1, 0.1, 6, 6])[:, None]  # heads that look everywhere, or at few
    p = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(G, 2)) / K**0.5
    p = p.masked_fill(torch.ones(PROMPT, PROMPT).triu(1).bool(), -torch.inf).softmax(-1)
    share = p.mean(2).unflatten(1, (HKV, G)).mean(2)
    window = round(0.3 * PROMPT)
    sets = [special[:, None].expand(B, HKV, -1), punctuation[:, None], chosen(share, window)]
    sets += [torch.arange(PROMPT) >= PROMPT - window, torch.ones(PROMPT, dtype=torch.bool)]
    tokens = [torch.cat([q, tokens[0][:, PROMPT:]], 1), *tokens[1:]]
    policy = sparse.FastGen(special, punctuation, recovery)
    for n, o, _ in generate(policy, tokens):
        if expected is not None:
            assert (policy.chosen == expected).all()
        read = torch.zeros(B, HKV, n, dtype=torch.bool)
        for b in range(B):
            for h in range(HKV):
                own = int(policy.chosen[b, h])
                for i in range(own + 1):
                    kept = sets[i].expand(B, HKV, -1)[b, h]
                    if i == 3:
                        read[b, h, max(n - window, 0) :] = True
                    else:
                        read[b, h, :PROMPT] |= kept
                if own == 4:
                    read[b, h] = True
                if n == PROMPT + 1 and own < 4:  # not before it was enough
                    covered = sum(share[b, h][read[b, h, :PROMPT] | (sets[3] & (own == 3))])
                    assert covered >= recovery
        read[..., n - 1] = True
        close(o, softmax_over(read.repeat_interleave(G, 1), tokens, n))
