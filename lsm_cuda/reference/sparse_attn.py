"""Sparse attention: softmax over the keys that a mask of positions and lists of key blocks
leave."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lsm_cuda.ops import AttnMask, BlockLists


def visible(mask: AttnMask | None, p: int, x: int, head: int) -> bool:
    """Whether the query at position p sees the key at position x."""
    if mask is None:
        return True
    sink = x < mask.sinks
    causal = not mask.causal or x // mask.causal_block <= p // mask.causal_block or x < mask.prefix
    left = mask.left if mask.head_left is None else int(mask.head_left[head])
    near = (left < 0 or p - left <= x) and (mask.right < 0 or x <= p + mask.right)
    dilated = (p - x) % mask.dilation == 0
    return causal and (near or sink) and (dilated or sink)


def block_sparse_attention(
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
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``o_t = Σ_j p_tj v_j`` over the keys that query t sees and has on its list, p the softmax of
    ``cap(scale q_t·k_j) + bias_block − slope |p − x| + log clamp((R + z − |p − x|) / R, 0, 1)``.

    Args:
        q (Tensor): ``[B, Tq, Hq, K]``.
        k, v (Tensor): ``[B, Tk, Hkv, K]`` and ``[B, Tk, Hkv, V]``; query head h reads head
            ``h // (Hq // Hkv)``.
        lists, mask: as :func:`lsm_cuda.ops.block_sparse_attn`.
        scale: default ``K ** -0.5``.
        softcap: ``cap(s) = softcap tanh(s / softcap)``; 0: none.
        sink_logits: ``[Hq]``, one more key of that score and no value.
        alibi_slopes: ``[Hq]``.
        ramp, ramp_length: z ``[Hq]`` and R.
        cu_seqlens_q, cu_seqlens_k: ``[N + 1]`` boundaries of packed sequences.

    Returns:
        ``o [B, Tq, Hq, V]`` and the logarithm of the softmax's denominator, ``lse [B, Hq, Tq]``:
        0 and −inf (with sink logits: the sink's) for a query without keys.

    Source: FlashAttention, arXiv:2205.14135, section 3.3; GPT-OSS (sinks); Adaptive Attention Span,
        arXiv:1905.07799; ALiBi, arXiv:2108.12409.
    """
    B, Tq, Hq, K = q.shape
    scale = K**-0.5 if scale is None else scale
    bias = None if lists is None or lists.bias is None else lists.dense_bias()
    bitmap = None if lists is None else lists.to_bitmap()
    bounds_q, bounds_k = (
        [0, n] if cu is None else cu.tolist()
        for cu, n in ((cu_seqlens_q, Tq), (cu_seqlens_k, k.shape[1]))
    )
    outputs, logs = [], []
    for b in range(B):
        first = 0  # row of the lists
        for (q0, q1), (k0, k1) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
            for h in range(Hq):
                kv = h // (Hq // k.shape[2])
                scores = scale * q[b, q0:q1, h] @ k[b, k0:k1, kv].T
                if softcap:
                    scores = softcap * (scores / softcap).tanh()
                at = _positions(mask, q1 - q0, k1 - k0)
                pairs = [[visible(mask, p, x, h) for x in at[1]] for p in at[0]]
                seen = torch.tensor(pairs, dtype=torch.bool, device=q.device)
                seen = seen.view(q1 - q0, k1 - k0)
                if bitmap is not None and lists is not None:
                    own = h * bitmap.shape[1] // Hq
                    row = first + torch.arange(q1 - q0) // lists.block_q
                    block = torch.arange(k1 - k0) // lists.block_k
                    seen = seen & bitmap[b, own][row][:, block]
                    if bias is not None:
                        scores = scores + bias[b, own][row][:, block].to(scores.dtype)
                p, x = (torch.tensor(n, dtype=q.dtype, device=q.device) for n in at)
                distance = (p[:, None] - x).abs()
                if alibi_slopes is not None:
                    scores = scores - alibi_slopes[h] * distance
                if ramp is not None:
                    factor = (ramp_length + ramp[h] - distance) / ramp_length
                    seen = seen & (factor > 0)
                    scores = scores + torch.where(factor > 0, factor.clamp(max=1), 1).log()
                sink = None if sink_logits is None else sink_logits[h]
                o, lse = _attend(scores, seen, v[b, k0:k1, kv], sink)
                outputs.append((b, q0, q1, h, o))
                logs.append((b, q0, q1, h, lse))
            if lists is not None:
                first += -(-(q1 - q0) // lists.block_q)
    every_o = v.new_zeros(B, Tq, Hq, v.shape[3])
    every_lse = q.new_full((B, Hq, Tq), -torch.inf)
    for (b, q0, q1, h, o), (*_, lse) in zip(outputs, logs, strict=True):
        every_o[b, q0:q1, h], every_lse[b, h, q0:q1] = o, lse
    return every_o, every_lse


def _positions(mask: AttnMask | None, Tq: int, Tk: int) -> tuple[list[int], list[int]]:
    if mask is None:
        return [t + Tk - Tq for t in range(Tq)], list(range(Tk))
    shift = mask.offset + (Tk - Tq if mask.align_end else 0)
    keys = [j * mask.key_stride + mask.key_length - 1 for j in range(Tk)]
    return [t + shift for t in range(Tq)], keys


def _attend(scores: Tensor, seen: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax of one head's scores where they are seen, times values, and its denominator's
    logarithm."""
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype).expand(len(scores), 1)], 1)
        seen = torch.nn.functional.pad(seen, (0, 1), value=True)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    any_key = seen.any(-1)
    masked = scores.masked_fill(~seen, -torch.inf)
    # A row of −inf has no gradient that autograd could find.
    lse = torch.where(any_key[:, None], masked, 0.0).logsumexp(-1) if seen.shape[1] else None
    if lse is None:
        return scores @ v, scores.new_full((len(scores),), -torch.inf)
    p = torch.where(seen, (scores - lse[:, None]).masked_fill(~seen, -torch.inf).exp(), 0.0)
    return p @ v, torch.where(any_key, lse, -torch.inf)


def merge_attention_states(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    r"""One softmax of its parts over separate keys: ``o = Σ_i w_i o_i``, ``w`` the softmax over i
    of ``lse_i``.

    Args:
        o (Tensor): ``[parts, B, T, H, V]``.
        lse (Tensor): ``[parts, B, H, T]``.

    Returns:
        ``o [B, T, H, V]`` and ``lse [B, H, T]``; 0 and −inf where every part is empty.
    """
    some = (lse > -torch.inf).any(0)
    total = torch.where(some, lse, 0.0).logsumexp(0)
    w = torch.where(some, (lse - total).exp(), 0.0)
    o = (w.transpose(-1, -2)[..., None].to(o.dtype) * o).sum(0)
    return o, torch.where(some, total, -torch.inf)
