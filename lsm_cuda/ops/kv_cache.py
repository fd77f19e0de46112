"""Attention from a KV cache, contiguous or in pages, and writing to one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _sparse_attn
from ._common import check_device_like, check_no_gradient
from .attn_mask import AttnMask
from .block_lists import BlockLists

__all__ = ["flash_attn_with_kvcache", "kv_cache_update", "sparse_attn_decode"]


@torch.library.register_fake("lsm::kv_cache_update")
def _update_fake(k_cache, v_cache, k, v, cache_seqlens, block_table, ring_sinks=-1):  # type: ignore[no-untyped-def]
    named = {"v": v, "k_cache": k_cache, "v_cache": v_cache}
    named |= {"cache_seqlens": cache_seqlens, "block_table": block_table}
    check_device_like("kv_cache_update", "k", k, named)


def _check_values(
    op: str, lengths: Tensor, capacity: int, block_table: Tensor | None, page_size: int, pages: int
) -> None:
    """What operators check of CPU tensors; on a GPU this waits for it."""
    lengths = lengths.cpu().long()
    if ((lengths < 0) | (lengths > capacity)).any():
        at = int(((lengths < 0) | (lengths > capacity)).nonzero()[0])
        raise RuntimeError(
            f"lsm::{op}: cache_seqlens must be in [0, {capacity}], what the cache has room for, "
            f"got {int(lengths[at])} for sequence {at}"
        )
    if block_table is None:
        return
    table = block_table.cpu().long()
    needed = torch.arange(table.shape[1]) * page_size < lengths[:, None]
    bad = (needed & ((table < 0) | (table >= pages))).nonzero()
    if len(bad):
        b, i = bad[0].tolist()
        raise RuntimeError(
            f"lsm::{op}: block_table must name pages in [0, {pages}), got {int(table[b, i])} for "
            f"page {i} of sequence {b}"
        )


def sparse_attn_decode(
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
    return_lse: bool = False,
    check: bool = False,
    affine: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The last tokens' attention to a KV cache: one new token, or a few to verify at once.

    As :func:`block_sparse_attn`, row b of the batch against the first ``cache_seqlens[b]`` places
    of its cache, which contain the new tokens: query t of Tq stands beside key ``cache_seqlens[b] −
    Tq + t`` (mask.align_end). The heads of a group share what is read. Long caches are cut into
    parts, whose size depends on the sequence's own length alone, joined in order: a sequence's
    result is the same to the last bit whatever else is in the batch.

    Args:
        q (Tensor): ``[B, Tq, Hq, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k_cache, v_cache (Tensor): ``[B, capacity, Hkv, K]`` and ``[.., V]``, or pages ``[pages,
            page_size, Hkv, ..]``, contiguous in the last dimension. v_cache may be a view of
            k_cache (latent attention, K 576 and V 512): it is then read once.
        cache_seqlens (Tensor, optional): ``[B]`` int32. Default: the whole cache.
        block_table (Tensor, optional): ``[B, max_pages]`` int32, each sequence's pages in order.
        lists (BlockLists, optional): blocks of keys to read, block_q = 1: one list per query token,
            for all heads, per key/value head or per query head.
        mask (AttnMask, optional): default: causal. Windows skip what they do not see.
        scale, softcap, sink_logits, alibi_slopes, ramp, ramp_length: as :func:`block_sparse_attn`.
        return_lse (bool): also return lse.
        check (bool): on a GPU, read cache_seqlens, block_table and lists first, and raise what they
            do wrong; for debugging, since it waits for the GPU.
        affine (tuple, optional): the caches hold codes (:func:`lsm_cuda.sparse.quantize`), uint8
            ``[.., Hkv, K]`` for 8 bits or ``[.., Hkv, K / 2]`` for 4, likewise of V; these are step
            and least of keys and of values, ``[.., Hkv, 2]`` in fp32 (fp64 for fp64 queries).
            Numbers are made where they are read. On CUDA K and V are multiples of 16 then.

    Returns:
        ``o [B, Tq, Hq, V]`` in the dtype of q; with return_lse also ``lse [B, Hq, Tq]``.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an argument that requires grad; K
            over 576 or V over 512 on CUDA. On CPU tensors, or with ``check``: a length beyond the
            cache, a page outside of it, lists that do not fit. On a GPU without ``check`` such keys
            are left out, and no memory outside the cache is read.

    Note: inference only.

    Source: Flash-Decoding, pytorch.org/blog/flash-decoding; PagedAttention, arXiv:2309.06180.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 2, 1024, 4, 64)  # B 2, room for 1024 tokens
        >>> lengths = torch.tensor([17, 100], dtype=torch.int32)
        >>> q, k, v = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 4, 64), torch.randn(2, 1, 4, 64)
        >>> kv_cache_update(k_cache, v_cache, k, v, lengths)
        >>> sparse_attn_decode(q, k_cache, v_cache, lengths + 1).shape
        torch.Size([2, 1, 8, 64])
    """
    if check and q.is_cuda:
        paged = block_table is not None
        room = k_cache.shape[1] * (block_table.shape[1] if block_table is not None else 1)
        lengths = cache_seqlens
        if lengths is None:
            lengths = torch.full((q.shape[0],), room)
        sizes = (k_cache.shape[1], k_cache.shape[0]) if paged else (1, 0)
        _check_values("sparse_attn_decode", lengths, room, block_table, *sizes)
        if lists is not None:
            lists.check()
    o, lse = _sparse_attn.decode(
        q, k_cache, v_cache, cache_seqlens, block_table, lists,
        AttnMask(causal=True) if mask is None else mask, scale, softcap, sink_logits, alibi_slopes,
        ramp, ramp_length, affine,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def kv_cache_update(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    ring_sinks: int | None = None,
    check: bool = False,
) -> None:
    r"""Writes new keys and values behind those that a cache holds, in place.

    Token t of row b goes to place ``cache_seqlens[b] + t``; the lengths are left to the caller.

    With ``ring_sinks`` the cache is a ring: a place i ≥ capacity is ``sinks + (i − sinks) mod
    (capacity − sinks)``, so the first tokens stay (attention sinks) and the newest overwrite the
    oldest of the others. A ring of W + sinks places is a sliding window of W with sinks
    (StreamingLLM): decode it with ``cache_seqlens.clamp(max=capacity)`` and ``mask=AttnMask()``.
    Places are not positions then, so rotate keys before they are written.

    Args:
        k_cache, v_cache (Tensor): ``[B, capacity, H, K]`` and ``[B, capacity, H, V]``, or pages
            ``[pages, page_size, H, ..]``, contiguous in the last dimension.
        k, v (Tensor): ``[B, T, H, K]`` and ``[B, T, H, V]`` in the cache's dtype.
        cache_seqlens (Tensor): ``[B]`` int32, tokens before the new ones.
        block_table (Tensor, optional): ``[B, max_pages]`` int32.
        ring_sinks (int, optional): as above; 0 is a plain ring. Default: no ring.
        check (bool): on a GPU, as in :func:`sparse_attn_decode`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; an argument that requires grad. On
            CPU tensors, or with ``check``: tokens that do not fit, a page outside the cache. On a
            GPU without ``check`` such tokens are not written.

    Note: inference only. Two tokens for one place leave either, undefined. Under torch.compile
        before torch 2.13, k_cache and v_cache must not be views of one tensor: its inductor
        miscompiles any operator that writes to both.

    Source: PagedAttention, arXiv:2309.06180; StreamingLLM, arXiv:2309.17453.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 1, 6, 1, 1)
        >>> for i in range(9):
        ...     k = torch.full((1, 1, 1, 1), 1.0 + i)
        ...     kv_cache_update(k_cache, v_cache, k, k, torch.tensor([i], dtype=torch.int32),
        ...                     ring_sinks=2)
        >>> k_cache.flatten()
        tensor([1., 2., 7., 8., 9., 6.])
    """
    check_no_gradient("kv_cache_update", "block_sparse_attn", k_cache, v_cache, k, v)
    sinks = -1 if ring_sinks is None else ring_sinks
    if check and k.is_cuda:
        room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        lengths = cache_seqlens + k.shape[1]
        if sinks >= 0:
            lengths = lengths.clamp(max=room)
        sizes = (1, 0) if block_table is None else (k_cache.shape[1], k_cache.shape[0])
        _check_values("kv_cache_update", lengths, room, block_table, *sizes)
    torch.ops.lsm.kv_cache_update(k_cache, v_cache, k, v, cache_seqlens, block_table, sinks)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Decode as flash_attn calls it: new keys and values, if any, are written to the cache, then
    :func:`sparse_attn_decode`.

    Args:
        q (Tensor): ``[B, Tq, Hq, D]``.
        k_cache, v_cache, block_table: as :func:`sparse_attn_decode`.
        k, v (Tensor, optional): ``[B, T, Hkv, D]``, written from place cache_seqlens on, in place.
        cache_seqlens (Tensor or int, optional): tokens before the new ones. Default: a full cache.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as :func:`flash_attn_func`.
        return_softmax_lse (bool): also return lse ``[B, Hq, Tq]``.

    Returns:
        ``[B, Tq, Hq, D]``, with return_softmax_lse a tuple.

    Raises: as :func:`sparse_attn_decode` and :func:`kv_cache_update`.

    Source: FlashAttention-2, arXiv:2307.08691.

    Example:
        >>> cache = torch.randn(2, 2, 32, 4, 64)
        >>> k, v = torch.randn(2, 2, 1, 4, 64)
        >>> flash_attn_with_kvcache(torch.randn(2, 1, 8, 64), *cache, k, v, cache_seqlens=9).shape
        torch.Size([2, 1, 8, 64])
    """
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if (k is None) != (v is None):
        raise RuntimeError("lsm::kv_cache_update: new keys and values come together, got one")
    if k is not None and v is not None:
        if cache_seqlens is None:
            raise RuntimeError(
                "lsm::kv_cache_update: new keys and values need cache_seqlens, got None"
            )
        kv_cache_update(k_cache, v_cache, k, v, cache_seqlens, block_table)
        cache_seqlens = cache_seqlens + k.shape[1]
    mask = AttnMask(causal=causal, left=window_size[0], right=window_size[1])
    return sparse_attn_decode(
        q, k_cache, v_cache, cache_seqlens, block_table, None, mask, softmax_scale, softcap,
        alibi_slopes=alibi_slopes, return_lse=return_softmax_lse,
    )  # fmt: skip
