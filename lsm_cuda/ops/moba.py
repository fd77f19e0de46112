"""Mixture of block attention: every query head attends to the blocks whose mean key fits best."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_rank
from ._select import Layout, choose_blocks, pool_mean, select, token_lists
from .attn_mask import AttnMask
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
    *,
    cu_seqlens_k: Tensor | None = None,
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
        cu_seqlens_k: of the keys, where the queries are the last of them; default ``cu_seqlens``.

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
    if chunk_size < 16 or chunk_size % 16 or topk < 1:
        raise ValueError(
            "parallel_moba: chunk_size must be a multiple of 16 and topk positive, got "
            f"{chunk_size} and {topk}"
        )
    # A chunk is several of the engine's blocks, the largest that divide it.
    block = min(128, chunk_size & -chunk_size)
    per_chunk = chunk_size // block
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    layout = Layout.of(q, k.shape[1], cu_seqlens, cu_seqlens_k)
    means, _ = pool_mean(k.detach(), layout, chunk_size)
    last = -(-k.shape[1] // block)

    def score(product: Tensor, at: slice, position: Tensor) -> Tensor:
        return product.flatten(2, 3)

    def choose(scores: Tensor, own: Tensor) -> Tensor:
        chunk = choose_blocks(scores, own, topk)
        if per_chunk == 1:
            return chunk
        blocks = chunk[..., None] * per_chunk + torch.arange(
            per_chunk, dtype=torch.int32, device=q.device
        )
        # those of a query's own chunk that lie ahead of it, and may not even exist, are left out
        return blocks.masked_fill(chunk[..., None] < 0, last).flatten(-2)

    chosen = select(q, means, layout, chunk_size, chunk_size, score, choose)
    if per_chunk > 1:
        ahead = chosen > (layout.position // block)[:, None]
        chosen = chosen.masked_fill(ahead, -1)
    lists = token_lists(chosen, k, block, cu_seqlens, cu_seqlens_k)
    return block_sparse_attn(
        q, k, v, lists, AttnMask(causal=True), scale,
        cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
