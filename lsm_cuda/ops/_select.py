"""Pooled keys, and the choice of key blocks by scores against them: what NSA, MoBA, InfLLM-v2 and
others share. Scores live for one stretch of queries at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype
from .block_lists import BlockLists

_SCORES = 1 << 24  # numbers held at a time


@dataclass(frozen=True)
class Layout:
    """Where queries and keys stand: batch rows, or sequences packed into one.

    Attributes:
        tokens: keys of a batch row.
        position: ``[Tq]``, of each query among its sequence's keys.
        start: ``[N]``, first key of each sequence; None: batch rows.
        end: ``[N]``, behind its last key.
        owner: ``[Tq]``, sequence of each query.
        dtype: of boundaries.
    """

    tokens: int
    position: Tensor
    start: Tensor | None = None
    end: Tensor | None = None
    owner: Tensor | None = None
    dtype: torch.dtype = torch.int64

    @classmethod
    def of(
        cls,
        q: Tensor,
        tokens: int,
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Layout:
        """Queries are the last of their sequence's tokens, of which a batch row has ``tokens``."""
        Tq = q.shape[1]
        token = torch.arange(Tq, device=q.device)
        if cu_seqlens is None:
            return cls(tokens, token + (tokens - Tq))
        cu = cu_seqlens.long()
        cu_k = cu if cu_seqlens_k is None else cu_seqlens_k.long()
        owner = torch.searchsorted(cu[1:], token, right=True).clamp(max=max(cu.shape[0] - 2, 0))
        behind = cu_k.diff() - cu.diff()
        position = token - cu[owner] + behind[owner]
        return cls(tokens, position, cu_k[:-1], cu_k[1:], owner, cu_seqlens.dtype)

    def windows(self, stride: int) -> int:
        """Room for the windows of all sequences, one for every ``stride`` tokens begun."""
        if self.start is None:
            return -(-self.tokens // stride)
        return self.tokens // stride + self.start.shape[0]

    def firsts(self, stride: int) -> Tensor:
        """``[N + 1]``: first window of each sequence, and the room for all."""
        assert self.start is not None and self.end is not None
        counts = -((self.start - self.end) // stride)
        firsts = F.pad(counts.cumsum(0), (1, 0))
        # windows that no sequence has go to the last one, behind all its tokens
        firsts[-1] = self.windows(stride)
        return firsts


def pool_mean(
    x: Tensor, layout: Layout, length: int, stride: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Means of windows of ``x [B, T, H, D]``: ``length`` tokens every ``stride``, cut at the end.

    Returns:
        ``[B, windows, H, D]``, and ``cu_seqlens`` of the windows where sequences are packed.
    """
    stride = length if stride is None else stride
    count = layout.windows(stride)
    if layout.start is None:
        cu = None
        first = torch.arange(count, device=x.device) * stride
        end: Tensor | int = x.shape[1]
        parts = torch.unflatten(
            F.pad(x, (0, 0, 0, 0, 0, count * stride - x.shape[1])), 1, (count, stride)
        )
    else:
        assert layout.end is not None
        cu = layout.firsts(stride)
        window = torch.arange(count, device=x.device)
        owner = torch.searchsorted(cu[1:], window, right=True).clamp(max=cu.shape[0] - 2)
        first = layout.start[owner] + (window - cu[owner]) * stride
        end = layout.end[owner]
        token = first[:, None] + torch.arange(stride, device=x.device)
        parts = x[:, token.clamp(max=max(x.shape[1] - 1, 0))]
        parts = parts.masked_fill((token >= end[:, None])[..., None, None], 0)
    sums = parts.sum(2, dtype=accumulation_dtype(x))
    reach = -(-length // stride)
    shifted = F.pad(sums, (0, 0, 0, 0, 0, reach - 1))
    total = sums
    for i in range(1, reach):
        total = total + shifted[:, i : i + count]
    tokens = (end - first).clamp(1, length)[:, None, None]
    return (total / tokens).to(x.dtype), None if cu is None else cu.to(layout.dtype)


def stretches(queries: int, numbers: int) -> Iterator[slice]:
    """Runs of queries that need ``numbers`` scores each."""
    step = max(1, min(queries, _SCORES // max(numbers, 1)))
    return (slice(t, min(t + step, queries)) for t in range(0, queries, step))


def choose_blocks(score: Tensor, own: Tensor, count: int, first: int = 0, local: int = 1) -> Tensor:
    """The ``count`` best of the blocks up to a query's own, its list in the engine's order.

    Args:
        score: ``[..., blocks]``.
        own: ``[...]`` or what broadcasts to it, the query's own block.
        count: entries of a list.
        first, local: blocks at the beginning, and up to the query's own, that come before others;
            its own before all.

    Returns:
        ``[..., count]`` int32, ascending, -1 at the end. Of equal scores the earlier block counts.
    """
    block = torch.arange(score.shape[-1], device=score.device)
    own = own[..., None]
    forced = (block < first) | (block > own - local)
    score = score.masked_fill(forced, torch.finfo(score.dtype).max)
    score = score.masked_fill(block == own, torch.inf).masked_fill(block > own, -torch.inf)
    ranked = torch.sort(score, dim=-1, descending=True, stable=True)
    best = ranked.indices[..., :count]
    none = score.shape[-1]
    best = best.masked_fill(ranked.values[..., :count] == -torch.inf, none).sort(-1).values
    return F.pad(best.masked_fill(best == none, -1), (0, count - best.shape[-1]), value=-1).int()


def select(
    q: Tensor,
    keys: Tensor,
    layout: Layout,
    block: int,
    stride: int,
    score: Callable[[Tensor, slice, Tensor], Tensor],
    choose: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Lists of blocks for every query, from products with pooled keys.

    Args:
        q: ``[B, T, Hq, K]``.
        keys: ``[B, windows, Hkv, K]``, pooled keys, one every ``stride`` tokens.
        layout: of queries and keys.
        block: tokens of a block that is chosen.
        stride: tokens from one pooled key to the next.
        score: from products ``[B, t, Hkv, G, windows of a sequence]`` of a stretch of queries and
            their positions ``[t]`` to scores of blocks ``[B, t, heads, blocks]``.
        choose: from scores and each query's own block ``[t, 1]`` to lists ``[B, t, heads, n]``.

    Returns:
        ``[B, heads, T, n]`` int32, for ``block_q = 1``.
    """
    B, T, Hq, _K = q.shape
    Hkv, windows = keys.shape[2], keys.shape[1]
    lists = []
    with torch.no_grad():
        keys = keys.to(accumulation_dtype(q))
        for at in stretches(T, B * Hq * windows):
            position = layout.position[at]
            qs = torch.unflatten(q[:, at].to(keys.dtype), 2, (Hkv, Hq // Hkv))
            product = torch.einsum("bthgk,bnhk->bthgn", qs, keys)
            if layout.owner is not None:
                base = layout.firsts(stride)[layout.owner[at]]
                column = base[:, None] + torch.arange(-(-layout.tokens // stride), device=q.device)
                column = column.clamp(max=windows - 1)[None, :, None, None]
                product = product.gather(-1, column.expand(*product.shape[:4], -1))
            scores = score(product, at, position)
            lists.append(choose(scores, (position // block)[:, None]))
    if not lists:
        return q.new_empty(B, Hkv, 0, 1, dtype=torch.int32)
    return torch.cat(lists, 1).transpose(1, 2).contiguous()


def token_lists(
    index: Tensor,
    k: Tensor,
    block: int,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> BlockLists:
    """Lists ``[B, heads, T, n]`` in the engine's order, one for every query."""
    B, heads, T, _ = index.shape
    cuts = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
    return BlockLists(index, None, (B, heads, T), T, k.shape[1], 1, block, **cuts)
