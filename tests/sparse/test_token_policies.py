"""Policies that read some tokens by estimates of their scores, held to plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from caches import HKV, HQ, PROMPT, B, G, K, T, chosen, close, generate, scores, softmax_over
from dense import dense_attention

from lsm_cuda import sparse
from lsm_cuda.modules import RotaryEmbedding
from lsm_cuda.sparse import KVCache, kv_tokens
from lsm_cuda.sparse.kv_cache import attend_taken


def test_double_sparsity(tokens):
    q, k, _ = tokens
    channels = sparse.DoubleSparsity.calibrate(q, k, 3)
    size = q.abs().mean((0, 1)).view(HKV, G, K).mean(1) * k.abs().mean((0, 1))
    assert torch.equal(channels, size.topk(3).indices.sort().values)
    few = torch.zeros(HKV, K).scatter_(-1, channels, 1.0)
    part = [q * few.repeat_interleave(G, 0), k, k]
    for n, o, _ in generate(sparse.DoubleSparsity(channels, 5, 2, 4), tokens):
        score = scores(part, n)
        always = (torch.arange(n) < 2) | (torch.arange(n) >= n - 4)
        read = chosen(score.masked_fill(always, torch.inf), 5 + 6)
        close(o, softmax_over(read, tokens, n))


def test_retrieval_attention(tokens):
    for n, o, _ in generate(sparse.RetrievalAttention(5, 3, 4), tokens):
        always = (torch.arange(n) < 3) | (torch.arange(n) >= n - 4)
        read = chosen(scores(tokens, n).masked_fill(always, torch.inf), 5 + 7)
        close(o, softmax_over(read, tokens, n))


def test_retrieval_attention_takes_an_index(tokens):
    """That finds every fourth key, whatever the query."""
    asked = []

    def search(q, k, count):
        asked.append((q.shape, k.shape, count))
        found = torch.arange(-1, k.shape[1], 4)  # -1 is none
        return found.expand(B, HQ, -1)

    for n, o, _ in generate(sparse.RetrievalAttention(5, 3, 4, search), tokens):
        assert asked[-1] == ((B, HQ, K), (B, n - 7, HKV, K), 5)
        j = torch.arange(n)
        read = (j < 3) | (j >= n - 4) | ((j - 3) % 4 == 3)
        close(o, softmax_over(read[None, None], tokens, n))


def pq_scores(policy, q, n: int) -> torch.Tensor:
    """Products with keys made of the nearest entries of the codebooks."""
    code = policy.code.all().long()  # [B, n, Hkv, parts]
    parts = [
        policy.book[:, :, i].gather(
            2, code[..., i].transpose(1, 2)[..., None].expand(-1, -1, -1, 4)
        )
        for i in range(2)
    ]
    made = torch.cat(parts, -1).repeat_interleave(G, 1)  # [B, Hq, n, K]
    return torch.einsum("bhd,bhsd->bhs", q[:, n - 1], made)


def test_pq_cache_is_its_definition(tokens):
    q, k, _ = tokens
    policy = sparse.PQCache(9, 2, 4, parts=2, codes=8, iterations=50)
    for n, o, _ in generate(policy, tokens):
        halves = k[:, :n].unflatten(-1, (2, 4)).permute(0, 2, 3, 1, 4)  # [B, Hkv, 2, n, 4]
        far = torch.cdist(halves, policy.book)
        code = policy.code.all().permute(0, 2, 3, 1).long()
        assert torch.equal(far.argmin(-1), code)  # every key, later ones too, has its nearest
        if n == PROMPT + 1:  # and entries are the means of the prompt's that have them
            one = torch.nn.functional.one_hot(code[..., :PROMPT], 8).to(k.dtype)
            mean = one.mT @ halves[..., :PROMPT, :] / one.sum(-2)[..., None]
            close(policy.book, mean)
        always = (torch.arange(n) < 2) | (torch.arange(n) >= n - 4)
        read = chosen(pq_scores(policy, q, n).masked_fill(always, torch.inf), 9 + 6)
        close(o, softmax_over(read, tokens, n))


def test_cluster_kv_is_its_definition(tokens):
    """Whole clusters in order of their means' scores, the last one's first tokens as they fit."""
    q, k, _ = tokens
    sinks, budget = 3, 10
    policy = sparse.ClusterKV(6, budget, sinks, every=99, iterations=50)
    for n, o, _ in generate(policy, tokens):
        owner = policy.owner.repeat_interleave(G, 1)  # [B, Hq, PROMPT - sinks]
        read = torch.zeros(B, HQ, n, dtype=torch.bool)
        read[..., :sinks] = read[..., PROMPT:] = True
        for b in range(B):
            for h in range(HQ):
                keys, own = k[b, sinks:PROMPT, h // G], owner[b, h]
                mean = torch.stack([keys[own == c].mean(0) for c in range(6)])
                unit = torch.nn.functional.normalize(keys, dim=-1)
                about = torch.stack([unit[own == c].mean(0) for c in range(6)])
                about = torch.nn.functional.normalize(about, dim=-1)
                assert torch.equal((unit @ about.T).argmax(-1), own)
                order = (mean @ q[b, n - 1, h]).argsort(descending=True)
                taken = torch.cat([(own == c).nonzero()[:, 0] for c in order])[:budget]
                read[b, h, sinks + taken] = True
        close(o, softmax_over(read, tokens, n))


@pytest.mark.parametrize("name", ["ClusterKV", "PQCache"])
def test_estimates_find_what_matters(name, tokens):
    """Keys in few directions: tokens read get far more attention than as many at random."""
    q, k, v = tokens
    generator = torch.Generator().manual_seed(0)
    about = 3 * torch.randn(4, K, dtype=k.dtype, generator=generator)
    k = about[torch.randint(4, (B, T, HKV), generator=generator)] + 0.1 * k
    policy = {
        "ClusterKV": sparse.ClusterKV(12, 12, 0, 5),
        "PQCache": sparse.PQCache(12, 0, 1, 2, 16),
    }[name]
    policy.score, score = (lambda q: taken.append(score(q)) or taken[-1]), policy.score
    taken: list[torch.Tensor] = []
    got, best, random = 0.0, 0.0, 0.0
    for n, _, _ in generate(policy, [q, k, v]):
        p = scores([q, k, v], n).softmax(-1)
        index = policy.choose(taken[-1])
        got += p.gather(-1, index).sum(-1).mean()
        best += p.topk(index.shape[-1]).values.sum(-1).mean()
        random += index.shape[-1] / n
    assert got >= 0.8 * best and got > 2 * random


def test_magic_pig_samples_with_its_probability(tokens, monkeypatch):
    q, k, _ = tokens
    hits, n, draws = torch.zeros(B, HKV, G, PROMPT + 1), PROMPT + 1, 300
    values = tokens[2][:, :n].repeat_interleave(G, 2)
    outputs, estimates = [], []
    policies = [sparse.MagicPIG(3, 4, 0, 0, torch.Generator().manual_seed(i)) for i in range(draws)]
    total = mass = 0
    for policy in policies:
        cache = KVCache(policy)
        read = []

        def attend(*given, read=read):
            read.append((given[3], given[5]))
            return attend_taken(*given)

        monkeypatch.setattr(kv_tokens, "attend_taken", attend)
        cache.prefill(*(x[:, :PROMPT] for x in tokens))
        outputs.append(cache.step(*(x[:, PROMPT:n] for x in tokens)))
        index, weight = read[0]
        seen = torch.zeros(B, HQ, n + 1).scatter_(-1, index.where(index >= 0, n), 1.0)[..., :n]
        hits += seen.unflatten(1, (HKV, G))
        e = (scores(tokens, n) / K**0.5).exp()
        sampled = e.gather(-1, index.clamp(min=0)) * weight.exp() * (index >= 0)
        total, mass = total + sampled.sum(-1), e.sum(-1)
        taken = values.transpose(1, 2).gather(
            2, index.clamp(min=0)[..., None].expand(-1, -1, -1, K)
        )
        estimates.append((sampled[..., None] * taken).sum(2) / e.sum(-1, keepdim=True))
    u = policies[0].probability(q[:, PROMPT:n], k[:, :n])
    sigma = (u * (1 - u) / draws).sqrt() + 1e-3
    assert ((hits / draws - u).abs() < 5 * sigma).all()
    assert math.isclose((total / draws / mass).mean(), 1, abs_tol=0.1)  # unbiased denominator
    # and numerator: the mean of all draws is dense attention, within what draws differ by
    whole = softmax_over(torch.ones(1, HQ, n, dtype=torch.bool), tokens, n)[:, 0]
    drawn = torch.stack(estimates)
    error = (drawn.mean(0) - whole) / (drawn.std(0) / draws**0.5 + 1e-3)
    assert error.abs().max() < 5
    # one output divides the one by the other, and comes near with it
    far = (torch.stack(outputs)[:, :, 0] - whole).norm() / draws**0.5
    alone = dense_attention(
        q[:, n - 1 : n], *(x[:, n - 1 : n] for x in tokens[1:]), torch.ones(1, 1)
    )
    assert far < (alone[0][:, 0] - whole).norm()


def test_shadow_kv(tokens):
    """Full rank: exactly the chunks of the largest means, the odd ones, and what came later."""
    size, rotary = 4, RotaryEmbedding(K)
    q, k, v = (x if i != 0 else rotary(x) for i, x in enumerate(tokens))
    turned = rotary(k)
    chunks = PROMPT // size
    rows = turned[:, : chunks * size].unflatten(1, (chunks, size))
    mean = rows.mean(2)
    fit = torch.nn.functional.cosine_similarity(rows, mean[:, :, None], dim=-1).amin(2)
    odd = chosen(-fit.transpose(1, 2), 2)  # [B, Hkv, chunks]
    policy = sparse.ShadowKV(HKV * K, 12, size, 2, rotary)
    before, fetched = torch.zeros(B, HKV, chunks, dtype=torch.bool), 0
    for n, o, cache in generate(policy, [q, k, v]):
        qs = q[:, n - 1].unflatten(1, (HKV, G))
        p = (torch.einsum("bhgd,bchd->bhgc", qs, mean) / K**0.5).softmax(-1).sum(2)
        best = chosen(p.masked_fill(odd, -1), 3)
        fetched += int((best & ~before).sum())  # the others were read in the step before
        assert policy.fetched == fetched and len(cache) == n - chunks * size
        read, before = odd | best, best
        read = read.repeat_interleave(size, -1)
        read = torch.nn.functional.pad(read, (0, n - chunks * size), value=True)
        want = softmax_over(read.repeat_interleave(G, 1), [q, turned, v], n)
        torch.testing.assert_close(o, want, atol=1e-5, rtol=1e-5)  # the rotary table is fp32
