"""What all policies have in common: enough room is dense attention, and neither pages of a pool nor
few bits change what a policy does."""

from __future__ import annotations

import re

import pytest
import torch
from caches import EVERYTHING, HKV, NONE, PROMPT, SMALL, B, K, T, close
from dense import dense_attention

from lsm_cuda import sparse
from lsm_cuda.modules import RotaryEmbedding
from lsm_cuda.sparse import KVCache


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_large_budget_is_dense_attention(name, tokens):
    whole, _ = dense_attention(*tokens, torch.ones(T, T).tril().int())
    cache = KVCache(EVERYTHING[name]())
    close(cache.prefill(*(x[:, :PROMPT] for x in tokens)), whole[:, :PROMPT])
    for t in range(PROMPT, T):
        close(cache.step(*(x[:, t : t + 1] for x in tokens)), whole[:, t : t + 1])


STEPWISE = [n for n in EVERYTHING if n not in ("SnapKV", "FastGen", "DuoAttention", "LServe")]


@pytest.mark.parametrize("name", STEPWISE)
def test_a_cache_may_begin_without_a_prompt(name, tokens):
    whole, _ = dense_attention(*tokens, torch.ones(T, T).tril().int())
    cache = KVCache(EVERYTHING[name]())
    assert cache.prefill(*(x[:, :0] for x in tokens)).shape[1] == 0
    for t in range(3):
        close(cache.step(*(x[:, t : t + 1] for x in tokens)), whole[:, t : t + 1])


@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize("name", [n for n in EVERYTHING if n != "FastGen"])
def test_a_prompt_may_be_short(name, prompt, tokens):
    whole, _ = dense_attention(*tokens, torch.ones(T, T).tril().int())
    cache = KVCache(EVERYTHING[name]())
    close(cache.prefill(*(x[:, :prompt] for x in tokens)), whole[:, :prompt])
    for t in range(prompt, prompt + 9):
        close(cache.step(*(x[:, t : t + 1] for x in tokens)), whole[:, t : t + 1])


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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", [n for n in [*EVERYTHING, *SMALL] if n != "ShadowKV"])
def test_pages_of_codes_are_a_quantized_cache(name, bits, tokens):
    pool, make = sparse.PagePool(64, 8), (EVERYTHING | SMALL)[name]
    cache = sparse.PagedKVCache(pool, make(), bits=bits)
    quantized = sparse.QuantizedKVCache(make(), bits=bits)
    ours, theirs = (steps_of(c, tokens) for c in (cache, quantized))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    cache.release()
    for kind in pool._kinds.values():
        assert sorted(kind.free) == [*range(64)] and kind.keys.dtype == torch.uint8


def test_pages_of_codes_that_cannot_be(tokens):
    pool = sparse.PagePool(8)
    for wrong in ({"bits": 3}, {"bits": 8, "rotary": RotaryEmbedding(K)}):
        with pytest.raises(ValueError, match=r"bits must be 8 or 4, .* or 0, got [38]"):
            sparse.PagedKVCache(pool, **wrong)
    with pytest.raises(ValueError, match="an even number of bytes, got K = 6, V = 8 of 4 bits"):
        q, k, v = tokens
        sparse.PagedKVCache(pool, bits=4).prefill(q[..., :6], k[..., :6], v)


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
    with pytest.raises(ValueError, match="window must be positive and sinks not negative, got 0"):
        sparse.StreamingLLM(0)


@pytest.mark.parametrize("paged", [False, True])
def test_tokens_that_do_not_belong(paged, tokens):
    cache = sparse.PagedKVCache(sparse.PagePool(64)) if paged else KVCache()
    cache.prefill(*tokens)
    q, k, v = (x[:, :1] for x in tokens)
    narrow, fewer = (q[..., :4], k[..., :4], v), (q[:1], k[:1], v[:1])
    for other in (narrow, fewer, (q, k.float(), v), (q, k, v[:1])):
        with pytest.raises(RuntimeError, match="B, Hkv, K, V and dtype must be .* as before"):
            cache.step(*other)
    cache.release()
    with pytest.raises(RuntimeError, match="it was released"):
        cache.step(q, k, v)


def test_a_policy_has_one_cache():
    policy = sparse.H2O()
    KVCache(policy)
    with pytest.raises(ValueError, match="H2O has a cache already"):
        KVCache(policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: sparse.DuoAttention([True]), "for each of the Hkv = 2 key heads, got 1"),
        (lambda: sparse.LServe([True] * 3), "for each of the Hkv = 2 key heads, got 3"),
        (
            lambda: sparse.DoubleSparsity(torch.zeros(1, 2, dtype=torch.long)),
            "of Hkv = 2 key heads, got [1, 2]",
        ),
        (
            lambda: sparse.FastGen(torch.zeros(2, 3), torch.zeros(2, 3)),
            "special must have shape [B, T] = [2, 57] of the prompt, got [2, 3]",
        ),
    ],
)
def test_policies_that_do_not_fit(policy, message, tokens):
    with pytest.raises(ValueError, match=re.escape(message)):
        KVCache(policy()).prefill(*tokens)


def test_policies_that_need_a_prompt(tokens):
    for policy in (sparse.FastGen(NONE, NONE), sparse.LServe([True, False])):
        with pytest.raises(RuntimeError, match=r"(FastGen|LServe): needs a prompt before steps"):
            KVCache(policy).step(*(x[:, :1] for x in tokens))
