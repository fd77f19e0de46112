"""What tests of cache policies share: a generation, its definition, and a policy of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from dense import dense_attention

from lsm_cuda import sparse
from lsm_cuda.sparse import KVCache, Policy

B, PROMPT, T, HQ, HKV, K = 2, 45, 57, 4, 2, 8
G = HQ // HKV


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
