"""Star-Transformer: a ring of satellites around one relay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._common import accumulation_dtype
from ..ops.attn_mask import AttnMask
from ..ops.sparse_attn import block_sparse_attn, merge_attn_states

__all__ = ["star_attn"]


def star_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    embedding: tuple[Tensor, Tensor],
    relay: tuple[Tensor, Tensor],
    scale: float | None = None,
) -> Tensor:
    """Every satellite over itself, its two neighbours on the ring, its embedding and the relay.

    The relay's own update is attention of one query over all satellites and itself.

    Args:
        q, k, v: ``[B, T, H, K]``, ``[B, T, H, K]`` and ``[B, T, H, V]``, T at least 3.
        embedding: keys and values of the tokens' embeddings, as k and v.
        relay: key and value of the relay, ``[B, 1, H, K]`` and ``[B, 1, H, V]``.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, H, V]``.

    Source: Star-Transformer, arXiv:1902.09113, section 3.2.

    Example:
        >>> x, s = torch.randn(1, 5, 2, 8), torch.randn(1, 1, 2, 8)
        >>> star_attn(x, x, x, (x, x), (s, s)).shape
        torch.Size([1, 5, 2, 8])
    """
    T = q.shape[1]
    if T < 3:
        raise ValueError(f"star_attn: a ring needs 3 tokens, got T = {T}")
    ring = [torch.cat([x[:, -1:], x, x[:, :1]], 1) for x in (k, v)]
    around = AttnMask(left=0, right=2, align_end=False)
    parts = [
        block_sparse_attn(q, *ring, None, around, scale, return_lse=True),
        block_sparse_attn(q, *relay, scale=scale, return_lse=True),
        _each(q, *embedding, scale),
    ]
    o, _ = merge_attn_states(*zip(*parts, strict=True))
    return o


def _each(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Every query over the one key at its place."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    acc = accumulation_dtype(q)
    return v, (scale * (q.to(acc) * k.to(acc)).sum(-1)).transpose(1, 2).contiguous()
