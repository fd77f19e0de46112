"""Mixture of block attention: every query head attends to the blocks whose mean key fits best."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import check_last_queries, check_rank
from .attn_mask import AttnMask
from .block_lists import BlockLists
from .pooling import block_pool
from .selection import BlockChoice, ScoreRule, block_select
from .sparse_attn import block_sparse_attn

__all__ = ["parallel_moba"]


def parallel_moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    chunk_size: int = 256,
    topk: int = 4,
    scale: float | None = None,
) -> Tensor:
    r"""Mixture of block attention: softmax over the ``topk`` best blocks of each query and head.

    A block's score is ``q · mean(K_block)``. The query's own block always counts, as one of the
    ``topk``, and is read causally; others lie in its past. The choice has no gradient.

    Args:
        q: queries ``[B, TQ, HQ, K]``, bf16, fp16 or fp32 (CUDA), any float (CPU). TQ may be less
            than T: they are the sequence's last tokens then.
        k, v: keys ``[B, T, H, K]`` and values ``[B, T, H, V]``; HQ a multiple of H.
        cu_seqlens: ``[N + 1]`` boundaries of sequences packed into one row (B = 1).
        max_seqlen: not needed; FLA's callers give it.
        chunk_size: tokens of a block, a multiple of 16.
        topk: blocks of a query, its own among them. With 1 a query sees its own block only (FLA
            then falls back to full attention).
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, TQ, HQ, V]`` in the dtype of v.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: ``chunk_size`` no multiple of 16, or ``topk`` not positive.

    Source: MoBA, arXiv:2502.13189.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> parallel_moba(q, k, v, chunk_size=16, topk=3).shape
        torch.Size([1, 100, 2, 32])
    """
    check_rank("moba", "q", q, "[B, T, HQ, K]")
    check_rank("moba", "k", k, "[B, T, H, K]")
    check_last_queries("moba", q, k)
    if chunk_size < 16 or chunk_size % 16 or topk < 1:
        raise ValueError(
            "parallel_moba: chunk_size must be a multiple of 16 and topk positive, got "
            f"{chunk_size} and {topk}"
        )
    rule = replace(ScoreRule.pooled(chunk_size), offset=k.shape[1] - q.shape[1])
    chosen = block_select(
        q, block_pool(k.detach(), chunk_size, cu_seqlens=cu_seqlens), rule,
        BlockChoice(top_k=topk, local=1), scale, cu_seqlens=cu_seqlens, tokens=k.shape[1],
    )  # fmt: skip
    lists = _split(chosen, min(128, chunk_size & -chunk_size), q, cu_seqlens)
    return block_sparse_attn(q, k, v, lists, AttnMask(causal=True), scale, cu_seqlens=cu_seqlens)


def _split(chosen: BlockLists, block: int, q: Tensor, cu_seqlens: Tensor | None) -> BlockLists:
    """Lists of the engine's blocks, of which a chunk is several."""
    per = chosen.block_k // block
    if per == 1:
        return chosen
    token = torch.arange(q.shape[1], device=q.device)
    place = token + (chosen.Tk - q.shape[1])
    if cu_seqlens is not None:
        cuts = cu_seqlens.long()
        place = token - cuts[torch.searchsorted(cuts[1:], token, right=True)]
    part = torch.arange(per, dtype=torch.int32, device=q.device)
    index = (chosen.index[..., None] * per + part).masked_fill(chosen.index[..., None] < 0, -1)
    index = index.flatten(-2)
    # in a query's own chunk, blocks that lie ahead of it, and may not even exist; they come last
    place = F.pad(place, (0, index.shape[2] - len(place)))  # rows that no query has
    index = index.masked_fill(index > (place // block)[:, None], -1)
    return replace(chosen, index=index, block_k=block)
