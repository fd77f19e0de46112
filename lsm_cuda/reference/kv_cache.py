"""Attention from a KV cache, sequence by sequence, and writing to one, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sparse_attn import block_sparse_attention

if TYPE_CHECKING:
    from lsm_cuda.ops import AttnMask, BlockLists


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    lists: BlockLists | None = None,
    mask: AttnMask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    ramp: Tensor | None = None,
    ramp_length: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Row b's queries against the first ``cache_seqlens[b]`` tokens of its cache, by
    :func:`block_sparse_attention`.

    Args: as :func:`lsm_cuda.ops.sparse_attn_decode`.

    Returns:
        ``o [B, Tq, Hq, V]``, ``lse [B, Hq, Tq]``.
    """
    parts = []
    for b in range(q.shape[0]):
        caches = [
            (cache[b] if block_table is None else cache[block_table[b].clamp(min=0).long()])
            for cache in (k_cache, v_cache)
        ]
        if block_table is not None:
            caches = [cache.flatten(0, 1) for cache in caches]
        length = len(caches[0]) if cache_seqlens is None else int(cache_seqlens[b])
        k, v = (cache[None, :length] for cache in caches)
        own = lists
        if lists is not None:
            whole = lists.expand(q.shape[0])
            blocks = -(-length // lists.block_k)
            bitmap = whole.to_bitmap()[b, ..., :blocks]
            bias = None if lists.bias is None else whole.dense_bias()[b, ..., :blocks]
            own = type(lists).from_bitmap(bitmap, q.shape[1], length, 1, lists.block_k, bias=bias)
        parts.append(
            block_sparse_attention(
                q[b : b + 1], k, v, own, mask, scale, softcap, sink_logits, alibi_slopes, ramp,
                ramp_length,
            )
        )  # fmt: skip
    o, lse = zip(*parts, strict=True)
    return torch.cat(o), torch.cat(lse)


def kv_cache_update(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    ring_sinks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The caches with token t of row b at place ``cache_seqlens[b] + t``, copies.

    Args: as :func:`lsm_cuda.ops.kv_cache_update`.
    """
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    size = k_cache.shape[1]
    capacity = size if block_table is None else size * block_table.shape[1]
    for b in range(k.shape[0]):
        for t in range(k.shape[1]):
            place = int(cache_seqlens[b]) + t
            if place >= capacity:
                assert ring_sinks is not None
                place = ring_sinks + (place - ring_sinks) % (capacity - ring_sinks)
            at = (b, place)
            if block_table is not None:
                at = (int(block_table[b, place // size]), place % size)
            k_cache[at], v_cache[at] = k[b, t], v[b, t]
    return k_cache, v_cache
