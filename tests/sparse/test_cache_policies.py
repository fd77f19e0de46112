"""Policies of a key/value cache: what they keep and read, token by token, in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from dense import dense_attention, qkv

from lsm_cuda import sparse
from lsm_cuda.modules import RotaryEmbedding
from lsm_cuda.sparse import KVCache, Policy, kv_tokens
from lsm_cuda.sparse.kv_cache import attend_taken

B, PROMPT, T, HQ, HKV, K = 2, 45, 57, 4, 2, 8
G = HQ // HKV


@pytest.fixture
def tokens() -> list[torch.Tensor]:
    return [x.detach() for x in qkv(T, HQ, HKV, K, K, B)]


def generate(
    policy: Policy | None, tokens, **options
) -> Iterator[tuple[int, torch.Tensor, KVCache]]:
    """Length, output and cache after every step behind the prompt."""
    cache = KVCache(policy, **options)
    cache.prefill(*(x[:, :PROMPT] for x in tokens))
    for t in range(PROMPT, T):
        yield t + 1, cache.step(*(x[:, t : t + 1] for x in tokens)), cache


def softmax_over(read: torch.Tensor, tokens, n: int) -> torch.Tensor:
    """The n-th token over the first n under ``read [B or 1, Hq or 1, n]``."""
    q, k, v = tokens
    return dense_attention(q[:, n - 1 : n], k[:, :n], v[:, :n], read[:, :, None].int())[0]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def scores(tokens, n: int) -> torch.Tensor:
    q, k, _ = tokens
    return torch.einsum("bhd,bshd->bhs", q[:, n - 1], k[:, :n].repeat_interleave(G, 2))


def chosen(score: torch.Tensor, count: int) -> torch.Tensor:
    read = torch.zeros_like(score, dtype=torch.bool)
    return read.scatter_(-1, score.topk(min(count, score.shape[-1])).indices, True)


NONE = torch.zeros(B, PROMPT, dtype=torch.bool)
EVERYTHING: dict[str, Callable[[], Policy]] = {
    "all": Policy,
    "StreamingLLM": lambda: sparse.StreamingLLM(T, 0),
    "H2O": lambda: sparse.H2O(T, 0),
    "TOVA": lambda: sparse.TOVA(T),
    "SnapKV": lambda: sparse.SnapKV(T),
    "SpAtten": lambda: sparse.SpAtten(T),
    "FastGen": lambda: sparse.FastGen(NONE, NONE, recovery=1.1),
    "Quest": lambda: sparse.Quest(T + 16),
    "ReSA": lambda: sparse.ReSA(T + 16),
    "LongHeads": lambda: sparse.LongHeads(4, 16),
    "DoubleSparsity": lambda: sparse.DoubleSparsity(torch.zeros(HKV, 1, dtype=torch.long), T),
    "RetrievalAttention": lambda: sparse.RetrievalAttention(T, 3, 4),
    "ClusterKV": lambda: sparse.ClusterKV(5, T, 3, 9),
    "PQCache": lambda: sparse.PQCache(T, codes=4),
    "ShadowKV": lambda: sparse.ShadowKV(rank=16, budget=T, outliers=2),
    "DuoAttention": lambda: sparse.DuoAttention([True, False], T, 0),
    "LServe": lambda: sparse.LServe([True, False], 64, 32, 16, 3, T, 0),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_large_budget_is_dense_attention(name, tokens):
    whole, _ = dense_attention(*tokens, torch.ones(T, T).tril().int())
    cache = KVCache(EVERYTHING[name]())
    close(cache.prefill(*(x[:, :PROMPT] for x in tokens)), whole[:, :PROMPT])
    for t in range(PROMPT, T):
        close(cache.step(*(x[:, t : t + 1] for x in tokens)), whole[:, t : t + 1])


STEPWISE = [
    n for n in EVERYTHING if n not in ("SnapKV", "FastGen", "ShadowKV", "DuoAttention", "LServe")
]


@pytest.mark.parametrize("name", STEPWISE)
def test_a_cache_may_begin_without_a_prompt(name, tokens):
    whole, _ = dense_attention(*tokens, torch.ones(T, T).tril().int())
    cache = KVCache(EVERYTHING[name]())
    for t in range(3):
        close(cache.step(*(x[:, t : t + 1] for x in tokens)), whole[:, t : t + 1])


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


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize(bits):
    x = torch.randn(3, 5, 2, 8)
    x[0, 0, 0] = 1.5  # all the same
    codes, affine = sparse.quantize(x, bits)
    assert codes.shape[-1] * 8 == 8 * bits and affine.shape == (3, 5, 2, 2)
    whole = codes if bits == 8 else torch.cat([codes & 15, codes >> 4], -1)
    step, low = affine.split(1, -1)
    back = whole * step + low
    assert ((back - x).abs() <= step / 2 + 1e-6).all() and whole.max() == 2**bits - 1
    close(back[0, 0, 0], x[0, 0, 0])
    with pytest.raises(ValueError, match="bits must be 8, or 4 for an even D, got 2 and D = 8"):
        sparse.quantize(x, 2)


SMALL: dict[str, Callable[[], Policy]] = {
    "StreamingLLM 7+2": lambda: sparse.StreamingLLM(7, 2),
    "StreamingLLM 20+17": lambda: sparse.StreamingLLM(20, 17),
    "Quest 32": lambda: sparse.Quest(32, 16),
    "Quest 32 in parts": lambda: sparse.Quest(32, 16, 8, 2, True),
    "ReSA": lambda: sparse.ReSA(32, 16),
    "H2O": lambda: sparse.H2O(8, 8),
    "TOVA": lambda: sparse.TOVA(20),
    "LongHeads": lambda: sparse.LongHeads(2, 16),
    "LServe": lambda: sparse.LServe([False, True], 32, 32, 16, 2, 6, 2),
}


@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize("name", [*EVERYTHING, *SMALL])
def test_pages_of_a_pool_are_the_same_cache(name, page_size, tokens):
    """Two caches that take pages in turns, beside two of their own memory."""
    pool = sparse.PagePool(64, page_size)
    make = (EVERYTHING | SMALL)[name]
    both = tokens, [x.flip(1) for x in tokens]

    def generated(caches: list[KVCache]) -> list[torch.Tensor]:
        torch.manual_seed(1)  # some policies draw
        cuts = [slice(PROMPT), *(slice(n, n + 1) for n in range(PROMPT, T))]
        calls = [[c.step] * len(cuts) for c in caches]
        for own, cache in zip(calls, caches, strict=True):
            own[0] = cache.prefill
        return [
            own[i](*(x[:, cut] for x in t))
            for i, cut in enumerate(cuts)
            for own, t in zip(calls, both, strict=True)
        ]

    paged: list[KVCache] = [sparse.PagedKVCache(pool, make()) for _ in both]
    plain = [KVCache(make()) for _ in both]
    for ours, theirs in zip(generated(paged), generated(plain), strict=True):
        close(ours, theirs)
    for cache in paged:
        cache.release()
    for kind in pool._kinds.values():
        assert sorted(kind.free) == [*range(64)]


def near(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # tables of angles are fp32


def steps_of(cache: KVCache, tokens) -> list[torch.Tensor]:
    first = cache.prefill(*(x[:, :PROMPT] for x in tokens))
    return [first, *(cache.step(*(x[:, t : t + 1] for x in tokens)) for t in range(PROMPT, T))]


@pytest.mark.parametrize("rotary", [None, RotaryEmbedding(K)], ids=["plain", "rotary"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "name", ["all", "H2O", "Quest 32", "Quest 32 in parts", "LServe", "DuoAttention"]
)
def test_a_quantized_cache_is_one_of_rounded_tokens(name, bits, rotary, tokens):
    """Behind the prompt, whose own attention is exact."""
    make = (SMALL if name in SMALL and name != "H2O" else EVERYTHING)[name]

    def rounded(x):
        codes, affine = sparse.quantize(x, bits)
        codes = codes if bits == 8 else torch.cat([codes & 15, codes >> 4], -1)
        return codes * affine[..., :1] + affine[..., 1:]

    rough = [tokens[0], *(rounded(x) for x in tokens[1:])]
    cache = sparse.QuantizedKVCache(make(), rotary=rotary, bits=bits)
    ours, theirs = steps_of(cache, tokens), steps_of(KVCache(make(), rotary=rotary), rough)
    near(ours[0], steps_of(KVCache(make(), rotary=rotary), tokens)[0])
    near(torch.cat(ours[1:], 1), torch.cat(theirs[1:], 1))
    assert all(x.dtype == torch.float64 for x in cache.raw())


def test_a_quantized_cache_is_small(tokens):
    cache = sparse.QuantizedKVCache(bits=4)
    cache.prefill(*tokens)
    rows = 2 * B * T * HKV  # of keys and values: K / 2 bytes, and two numbers
    assert cache.bytes() == rows * (K // 2 + 2 * 8)
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        sparse.QuantizedKVCache(bits=3)


@pytest.mark.parametrize("page_size", [8, 32])
@pytest.mark.parametrize(
    "name", ["all", "StreamingLLM 7+2", "Quest 32 in parts", "H2O", "LServe", "DuoAttention"]
)
def test_pages_are_turned_by_places(name, page_size, tokens):
    make, rotary = (SMALL | EVERYTHING)[name], RotaryEmbedding(K)
    pool = sparse.PagePool(64, page_size)
    cache, plain = sparse.PagedKVCache(pool, make(), rotary=rotary), KVCache(make(), rotary=rotary)
    for ours, theirs in zip(steps_of(cache, tokens), steps_of(plain, tokens), strict=True):
        near(ours, theirs)
    if name == "StreamingLLM 7+2":
        # a page at a time is given back, so that some more are kept
        assert 9 <= len(cache) <= 9 + 2 * page_size
        k, _ = cache.raw()
        near(k[:, :2], tokens[1][:, :2])
        near(k[:, -7:], tokens[1][:, -7:])
        near(cache.kept()[0], rotary(k))
        near(cache.newest(), rotary(k)[:, -1])


def test_a_stream_keeps_its_angles_small(tokens, monkeypatch):
    monkeypatch.setattr(sparse.PagedKVCache, "_FARTHEST", 20)
    pool, rotary = sparse.PagePool(64, 4), RotaryEmbedding(K)
    cache = sparse.PagedKVCache(pool, sparse.StreamingLLM(7, 2), rotary=rotary)
    plain = KVCache(sparse.StreamingLLM(7, 2), rotary=rotary)
    for t in range(80):
        now = [x[:, t % T : t % T + 1] for x in tokens]
        near(cache.step(*now), plain.step(*now))
        assert cache.gap <= 20


def test_a_window_gives_its_pages_back(tokens):
    pool = sparse.PagePool(32, 4)
    cache = sparse.PagedKVCache(pool, sparse.StreamingLLM(8, 2))
    cache.prefill(*tokens)
    for t in range(T):
        cache.step(*(x[:, t : t + 1] for x in tokens))
        assert 32 - pool.free(*tokens[1:]) <= B * 4  # of the sinks, and of 8 tokens in a row
    assert len(cache) <= 16


def test_a_pool_runs_dry(tokens):
    pool = sparse.PagePool(7, 16)  # 57 tokens are 4 pages, of two sequences
    cache = sparse.PagedKVCache(pool)
    with pytest.raises(RuntimeError, match="needs 8 more pages, the pool has 7 of 7 left"):
        cache.prefill(*tokens)
    cache.prefill(*(x[:, :PROMPT] for x in tokens))
    other = sparse.PagedKVCache(pool)
    with pytest.raises(RuntimeError, match="needs 2 more pages, the pool has 1 of 7 left"):
        other.step(*(x[:, :1] for x in tokens))
    cache.release()
    other.step(*(x[:, :1] for x in tokens))
    with pytest.raises(ValueError, match="pages and page_size must be positive, got 0 and 16"):
        sparse.PagePool(0, 16)


def test_errors(tokens):
    cache = KVCache()
    cache.prefill(*tokens)
    with pytest.raises(RuntimeError, match="prefill comes first, once"):
        cache.prefill(*tokens)
    with pytest.raises(RuntimeError, match=r"a step is one token, q \[B, 1, Hq, K\], got \[2, 57"):
        cache.step(*tokens)
    with pytest.raises(ValueError, match="logical must divide page_size, got 10 and 16"):
        sparse.Quest(logical=10)
    with pytest.raises(ValueError, match="budget must exceed window"):
        sparse.SnapKV(8, 8)
    with pytest.raises(ValueError, match="chunks must be at least 2, got 1"):
        sparse.LongHeads(1)
