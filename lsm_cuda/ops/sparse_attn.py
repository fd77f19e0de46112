"""Softmax attention over lists of key blocks, and dense attention as its special case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from . import _sparse_attn
from ._common import accumulation_dtype, autocast_dtype, check_no_forward_ad
from .attn_mask import AttnMask
from .block_lists import BlockLists

__all__ = [
    "block_sparse_attn",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "merge_attn_states",
]


@overload
def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists | None = None,
    mask: AttnMask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    ramp: Tensor | None = None,
    ramp_length: float = 0.0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: Literal[False] = False,
    pv_threshold: float = 0.0,
) -> Tensor: ...


@overload
def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists | None = None,
    mask: AttnMask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    ramp: Tensor | None = None,
    ramp_length: float = 0.0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    return_lse: Literal[True],
    pv_threshold: float = 0.0,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists | None = None,
    mask: AttnMask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    ramp: Tensor | None = None,
    ramp_length: float = 0.0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    pv_threshold: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention in which each row of queries reads the blocks of keys on its list.

    ``o_t = Σ_j p_tj v_j`` over the keys of listed blocks that ``mask`` lets query t see, p the
    softmax of ``cap(scale q_t·k_j) + bias_block − slope |p − x| + log clamp((R + z − |p − x|) / R,
    0, 1)``; p − x is the distance of query and key (:class:`AttnMask`).

    Args:
        q (Tensor): ``[B, Tq, Hq, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k, v (Tensor): ``[B, Tk, Hkv, K]`` and ``[B, Tk, Hkv, V]`` in the dtype of q; Hkv divides
            Hq, query head h reads head ``h // (Hq // Hkv)``.
        lists (BlockLists, optional): for B batch rows or for one. Default: every block.
        mask (AttnMask, optional): default: everything is seen.
        scale (float, optional): default ``K ** -0.5``.
        softcap (float): ``cap(s) = softcap tanh(s / softcap)``; 0: none.
        sink_logits (Tensor, optional): ``[Hq]``, one more key of that score and no value.
        alibi_slopes (Tensor, optional): ``[Hq]``; no gradient.
        ramp (Tensor, optional): z ``[Hq]`` of adaptive spans, with ramp_length R > 0, in tokens.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of sequences packed into one row
            (then B = 1); of keys too unless given:
        cu_seqlens_k (Tensor, optional): ``[N + 1]`` boundaries of their keys.
        return_lse (bool): also return lse.
        pv_threshold (float): inference only: leave out the values of blocks whose scores are all
            more than this below the largest so far, for the few queries that go through a block
            together (16 or 32; SpargeAttn's λ = −pv_threshold). Their weights stay in the softmax's
            denominator, so lse is exact. Which blocks these are depends on the order kernels
            take them in. 0: none.

    Returns:
        ``o [B, Tq, Hq, V]`` in the dtype of q; with return_lse also the logarithm of the softmax's
        denominator, ``lse [B, Hq, Tq]``, fp32 (fp64). A query without keys has o = 0 and lse = −inf
        (with sink logits: the sink's).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; on CPU tensors also lists that do
            not ascend, repeat a block or name one that is not there. On a GPU values are not read:
            :meth:`BlockLists.check` does.

    Note: differentiable once in q, k, v, the lists' bias, sink_logits and ramp, through o and
        through lse; deterministic. Nothing of size ``Tq × Tk`` is kept.

    Source: FlashAttention, arXiv:2205.14135, section 3.3; pv_threshold: SpargeAttn,
        arXiv:2502.18137, section 3.4.

    Example:
        >>> q, k, v = (torch.randn(1, 128, 4, 32) for _ in range(3))
        >>> lists = BlockLists.from_mask(AttnMask(causal=True, left=31).to_dense(128, 128), 32, 32)
        >>> block_sparse_attn(q, k, v, lists, AttnMask(causal=True, left=31)).shape
        torch.Size([1, 128, 4, 32])
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    o, lse = _sparse_attn.attend(
        q, k, v, lists, mask, scale, softcap, sink_logits, alibi_slopes, ramp, ramp_length,
        cu_seqlens, cu_seqlens_k, pv_threshold,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    r"""Dense attention as flash_attn calls it: :func:`block_sparse_attn` over every block.

    Args:
        q, k, v (Tensor): ``[B, T, H, D]``; fewer heads of k and v for GQA and MQA.
        dropout_p (float): 0.
        softmax_scale (float, optional): default ``D ** -0.5``.
        causal (bool): with fewer queries than keys the last ones are aligned.
        window_size: tokens seen to the left and to the right; below 0: all.
        softcap (float): as :func:`block_sparse_attn`.
        alibi_slopes (Tensor, optional): ``[H]``.
        deterministic (bool): always.
        return_attn_probs (bool): also return lse, and None for probabilities.

    Returns:
        ``[B, T, H, D]``, with return_attn_probs a tuple.

    Raises:
        ValueError: dropout.
        RuntimeError: as :func:`block_sparse_attn`.

    Source: FlashAttention-2, arXiv:2307.08691.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 64)
        >>> flash_attn_func(q, k, v, causal=True, window_size=(31, 0)).shape
        torch.Size([1, 100, 2, 64])
    """
    if dropout_p:
        raise ValueError(f"flash_attn_func: dropout is not supported, got dropout_p = {dropout_p}")
    mask = AttnMask(causal=causal, left=window_size[0], right=window_size[1])
    o, lse = _sparse_attn.attend(
        q, k, v, None, mask, softmax_scale, softcap, None, alibi_slopes, None, 0.0, None, None
    )
    return (o, lse, None) if return_attn_probs else o


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    r""":func:`flash_attn_func` of packed sequences.

    Args:
        q, k, v (Tensor): ``[T, H, D]``.
        cu_seqlens_q, cu_seqlens_k (Tensor): ``[N + 1]`` boundaries.
        max_seqlen_q, max_seqlen_k (int): not needed.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as :func:`flash_attn_func`.

    Returns:
        ``[T, H, D]``, with return_attn_probs a tuple; lse is ``[H, T]``.

    Raises: as :func:`flash_attn_func`.

    Example:
        >>> q, k, v = torch.randn(3, 10, 2, 64)
        >>> bounds = torch.tensor([0, 4, 10])
        >>> flash_attn_varlen_func(q, k, v, bounds, bounds, causal=True).shape
        torch.Size([10, 2, 64])
    """
    if dropout_p:
        raise ValueError(
            f"flash_attn_varlen_func: dropout is not supported, got dropout_p = {dropout_p}"
        )
    mask = AttnMask(causal=causal, left=window_size[0], right=window_size[1])
    o, lse = _sparse_attn.attend(
        q[None], k[None], v[None], None, mask, softmax_scale, softcap, None, alibi_slopes, None,
        0.0, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip
    return (o[0], lse[0], None) if return_attn_probs else o[0]


def merge_attn_states(
    o: Tensor | Sequence[Tensor], lse: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    r"""Joins attention over separate sets of keys into attention over all of them.

    ``o = Σ_i w_i o_i``, ``w`` the softmax over i of ``lse_i``; ``lse = log Σ_i e^{lse_i}``.

    Args:
        o: parts ``[B, T, H, V]``, or stacked ``[parts, B, T, H, V]``.
        lse: their log-sum-exps ``[B, H, T]``, or stacked; fp32 (fp64 for fp64).

    Returns:
        ``o [B, T, H, V]`` and ``lse [B, H, T]``; 0 and −inf where every part is empty.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: differentiable in both; parts are added in the order given.

    Example:
        >>> o, lse = torch.randn(2, 1, 8, 4, 16), torch.randn(2, 1, 4, 8)
        >>> merge_attn_states(o, lse)[0].shape
        torch.Size([1, 8, 4, 16])
    """
    o = o if isinstance(o, Tensor) else torch.stack(tuple(o))
    lse = lse if isinstance(lse, Tensor) else torch.stack(tuple(lse))
    check_no_forward_ad("merge_attn_states", o=o, lse=lse)
    dtype = autocast_dtype(o.device.type)
    if dtype is not None and o.dtype != torch.float64:
        o = o.to(dtype)
    return torch.ops.lsm.merge_attn_states(o, lse.to(accumulation_dtype(o)))  # type: ignore[no-any-return]
