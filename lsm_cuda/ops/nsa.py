"""Native sparse attention: compressed, selected and recent keys, mixed by gates."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import check_last_queries, check_rank, check_shape
from .attn_mask import AttnMask
from .block_lists import BlockLists
from .kv_cache import sparse_attn_decode
from .pooling import block_pool, row_boundaries
from .selection import BlockChoice, ScoreRule, block_select
from .sparse_attn import block_sparse_attn

__all__ = ["nsa_compression", "nsa_topk", "parallel_nsa"]

_FEW = 8  # queries of a step


def nsa_compression(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    block_size: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    stride: int | None = None,
    tokens: int | None = None,
    cu_seqlens_cmp: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The compressed branch: attention over the windows that lie wholly in a query's past.

    Args:
        q: ``[B, T, HQ, K]``.
        k_cmp, v_cmp: a key and a value of every window, ``[B, TC, H, K]`` and ``[B, TC, H, V]``.
        block_size: tokens of a window.
        scale: default ``K ** -0.5``.
        cu_seqlens: ``[N + 1]`` of the queries, packed into one row.
        stride: tokens from one window to the next; default ``block_size``.
        tokens: keys of a batch row before compression, of which the queries are the last; default
            T.
        cu_seqlens_cmp: of the windows, beside ``cu_seqlens``.

    Returns:
        o ``[B, T, HQ, V]`` and log-sum-exp ``[B, HQ, T]``, 0 and -inf where no window is visible.

    Source: Native Sparse Attention, arXiv:2502.11089, eq. 7.

    Example:
        >>> q, k = torch.randn(1, 64, 2, 16), torch.randn(1, 4, 1, 16)
        >>> nsa_compression(q, k, k, 16)[1][0, 0, 14:16].isfinite().tolist()
        [False, True]
    """
    T = q.shape[1]
    offset = 0 if tokens is None else tokens - T
    stride = block_size if stride is None else stride
    past = AttnMask(
        causal=True, align_end=False, offset=offset, key_stride=stride, key_length=block_size
    )
    return _attend(q, k_cmp, v_cmp, None, past, scale, cu_seqlens, cu_seqlens_cmp)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists | None,
    mask: AttnMask,
    scale: float | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp; a few queries behind their keys are a decoding step's."""
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[1] <= _FEW and cu_seqlens is None and not trained:
        o, lse = sparse_attn_decode(q, k, v, None, None, lists, mask, scale, return_lse=True)
    else:
        o, lse = block_sparse_attn(
            q, k, v, lists, mask, scale,
            cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, return_lse=True,
        )  # fmt: skip
    return o, lse


def nsa_topk(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    block_counts: int | Tensor = 16,
    block_size: int = 64,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    length: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    first: int = 1,
    local: int = 2,
) -> Tensor:
    """The blocks that a group of heads gives the most of its compressed attention.

    A window's probability counts for the blocks it overlaps, by how far. The first block, and the
    query's own with the one before it, come before all others. No gradient passes.

    Args:
        q, k_cmp, scale, cu_seqlens, tokens: as :func:`nsa_compression`.
        lse: what it returns, ``[B, HQ, T]``.
        block_counts: blocks of each query, or ``[B, T, H]`` of each query and group.
        block_size: tokens of a block.
        length, stride: of the windows; default ``block_size``.
        first, local: blocks that come first.

    Returns:
        ``[B, H, T, S]`` int32: ascending, -1 at the end; S is the largest count, or as many as come
        before all others, or as many as there are.

    Source: Native Sparse Attention, arXiv:2502.11089, eq. 8-12.

    Example:
        >>> q, k = torch.randn(1, 64, 2, 16), torch.randn(1, 4, 1, 16)
        >>> lse = nsa_compression(q, k, k, 16)[1]
        >>> nsa_topk(q, k, lse, 2, 16, local=1)[0, 0, 40].tolist()
        [0, 2]
    """
    counts = (
        [block_counts] if isinstance(block_counts, int) else torch.unique(block_counts).tolist()
    )
    lists = [
        _select(
            q, k_cmp, lse, n, block_size, scale, cu_seqlens, length, stride, tokens, first, local
        ).index[:, :, : q.shape[1]]  # packed sequences have rows to spare
        for n in counts
    ]
    if isinstance(block_counts, int):
        return lists[0]
    check_shape("nsa", "block_counts", block_counts, "[B, T, H]", (*q.shape[:2], k_cmp.shape[2]))
    width = max(x.shape[-1] for x in lists)
    every = torch.stack([F.pad(x, (0, width - x.shape[-1]), value=-1) for x in lists])
    which = torch.bucketize(block_counts, torch.unique(block_counts)).transpose(1, 2)
    return every.gather(0, which[None, ..., None].expand(1, *every.shape[1:]))[0]


def _select(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    count: int,
    block_size: int,
    scale: float | None,
    cu_seqlens: Tensor | None,
    length: int | None,
    stride: int | None,
    tokens: int | None,
    first: int,
    local: int,
) -> BlockLists:
    length = block_size if length is None else length
    stride = length if stride is None else stride
    tokens = q.shape[1] if tokens is None else tokens
    if length % stride or block_size % stride:
        raise ValueError(
            "nsa_topk: stride must divide length and block_size, got "
            f"{stride}, {length} and {block_size}"
        )
    rule = replace(ScoreRule.compressed(length, stride, block_size), offset=tokens - q.shape[1])
    choice = BlockChoice(top_k=count, first=first, local=local)
    cuts = None if cu_seqlens is None else row_boundaries(cu_seqlens, length, stride, False)
    return block_select(q, k_cmp, rule, choice, scale, lse, None, cu_seqlens, cuts, tokens)


def compress(
    x: Tensor, length: int, stride: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Means of windows wholly inside a sequence, and the windows' boundaries for attention."""
    y = block_pool(x, length, stride, partial=False, cu_seqlens=cu_seqlens)
    if cu_seqlens is None:
        return y, None
    # rows that no sequence has are counted to the last, behind all its tokens
    cuts = row_boundaries(cu_seqlens, length, stride, False)[:-1]
    return y, F.pad(cuts, (0, 1), value=y.shape[1]).to(cu_seqlens.dtype)


def parallel_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: int | Tensor = 16,
    block_size: int = 64,
    window_size: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    cmp_length: int | None = None,
    cmp_stride: int | None = None,
) -> Tensor:
    r"""Native sparse attention: ``o = g_cmp · o_cmp + g_slc · o_slc + g_swa · o_swa``.

    Every query attends to compressed keys, one per window of its past; to the tokens of the blocks
    that its group of heads gives most of that attention (:func:`nsa_topk`); and to its last
    ``window_size`` tokens. All three are trained through; the choice of blocks is not.

    Args:
        q: queries ``[B, TQ, HQ, K]``, bf16, fp16 or fp32 (CUDA), any float (CPU). TQ may be less
            than T: they are the sequence's last tokens then, for decoding from a cache.
        k, v: keys ``[B, T, H, K]`` and values ``[B, T, H, V]``; HQ a multiple of H.
        g_cmp, g_slc, g_swa: gates ``[B, TQ, HQ]``, after their sigmoid. Without ``g_cmp`` there is
            no compressed branch, and ``block_indices`` is needed; without ``g_slc`` or ``g_swa``
            it is 1.
        block_indices: blocks to take instead of the chosen ones, ``[B, TQ, H, S]``, any order, -1
            for none. A block named twice counts once.
        block_counts: blocks of each query, or ``[B, TQ, H]``.
        block_size: tokens of a block, 16, 32, 64 or 128.
        window_size: recent tokens, the query's own among them; 0: no such branch.
        scale: default ``K ** -0.5``.
        cu_seqlens: ``[N + 1]`` boundaries of sequences packed into one row (B = 1, TQ = T).
        k_cmp, v_cmp: compressed keys and values of a layer's own, one per window
            ``[B, TC, H, ·]``; default: means. Not with ``cu_seqlens``.
        cmp_length, cmp_stride: tokens of a window, and from one to the next; default
            ``block_size``, FLA's setting. The paper's: 32 and 16.

    Returns:
        ``[B, TQ, HQ, V]`` in the dtype of v.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: neither ``g_cmp`` nor ``block_indices``; ``k_cmp`` with ``cu_seqlens``;
            ``cmp_stride`` that does not divide ``cmp_length`` and ``block_size``; ``k_cmp`` or
            ``v_cmp`` alone, or of another number of windows.

    Source: Native Sparse Attention, arXiv:2502.11089.

    Example:
        >>> q = torch.randn(1, 100, 16, 32)
        >>> k, v = torch.randn(1, 100, 1, 32), torch.randn(1, 100, 1, 32)
        >>> g = torch.rand(3, 1, 100, 16)
        >>> parallel_nsa(q, k, v, *g, block_counts=2, block_size=16, window_size=32).shape
        torch.Size([1, 100, 16, 32])
    """
    for name, x, dims in (("q", q, "[B, TQ, HQ, K]"), ("k", k, "[B, T, H, K]")):
        check_rank("nsa", name, x, dims)
    for name, g in (("g_cmp", g_cmp), ("g_slc", g_slc), ("g_swa", g_swa)):
        if g is not None:
            check_shape("nsa", name, g, "[B, TQ, HQ]", q.shape[:3])
    if k_cmp is not None and cu_seqlens is not None:
        raise ValueError("parallel_nsa: k_cmp and v_cmp come without cu_seqlens")
    check_last_queries("nsa", q, k)
    if g_cmp is None and block_indices is None:
        raise ValueError("parallel_nsa: needs block_indices where there is no g_cmp to choose by")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    length = block_size if cmp_length is None else cmp_length
    stride = length if cmp_stride is None else cmp_stride
    windows = max(0, (k.shape[1] - length) // stride + 1)
    given = [None if x_cmp is None else x_cmp.shape[1] for x_cmp in (k_cmp, v_cmp)]
    if given not in ([None, None], [windows, windows]):
        raise ValueError(
            f"parallel_nsa: k_cmp and v_cmp come together, {windows} windows each, got {given}"
        )
    o_cmp = None
    if g_cmp is not None:
        cu_cmp = None
        if k_cmp is None or v_cmp is None:
            k_cmp, cu_cmp = compress(k, length, stride, cu_seqlens)
            v_cmp, _ = compress(v, length, stride, cu_seqlens)
        o_cmp, lse = nsa_compression(
            q, k_cmp, v_cmp, length, scale, cu_seqlens,
            stride=stride, tokens=k.shape[1], cu_seqlens_cmp=cu_cmp,
        )  # fmt: skip
        if block_indices is None:
            chosen = nsa_topk(
                q, k_cmp, lse.detach(), block_counts, block_size, scale, cu_seqlens,
                length=length, stride=stride, tokens=k.shape[1],
            )  # fmt: skip
    Tq, Tk = q.shape[1], k.shape[1]
    if block_indices is None:
        shape = (chosen.shape[0], chosen.shape[1], chosen.shape[2])
        lists = BlockLists(chosen, None, shape, Tq, Tk, 1, block_size, None, cu_seqlens, cu_seqlens)
    else:
        indices = block_indices.transpose(1, 2)
        lists = BlockLists.from_indices(indices, Tq, Tk, 1, block_size, cu_seqlens, cu_seqlens)
    causal = AttnMask(causal=True)
    o, _ = _attend(q, k, v, lists, causal, scale, cu_seqlens)
    if g_slc is not None:
        o = gated(o, g_slc)
    if o_cmp is not None:
        o = o + gated(o_cmp, g_cmp)
    if window_size > 0:
        recent = AttnMask(causal=True, left=window_size - 1)
        o_swa, _ = _attend(q, k, v, None, recent, scale, cu_seqlens)
        o = o + (o_swa if g_swa is None else gated(o_swa, g_swa))
    return o


def gated(o: Tensor, g: Tensor | None) -> Tensor:
    assert g is not None
    return o * g[..., None].to(o.dtype)
