"""Luna: attention through a short sequence of pooled tokens that travels between layers."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Cache
from .common import as_rows, refuse_cache, split_heads

__all__ = ["LunaAttention"]


class LunaAttention(nn.Module):
    r"""Pack the tokens into a pool, ``P' = attend(P, X, X)``, and unpack: ``attend(X, P', P')``.

    Args:
        hidden_size: width of tokens and of the pool.
        num_heads: heads of the unpacking attention.
        num_pool_heads: heads of the packing attention. Default: ``num_heads``.
        pool_size: pooled tokens p, learned as ``pool [p, hidden_size]``: for the first layer of a
            stack. None: no pool of its own; calls pass the one that the layer before returned.
        tie_kv: one projection for keys and values, in either attention.
        qkv_bias: biases in all projections but the last.

    Raises:
        ValueError: sizes that do not divide, or ``pool_size`` not positive.

    Source: Luna: Linear Unified Nested Attention, arXiv:2106.01540, section 3.1. Parameters are
    named as the authors name them, but for the output's ``o_proj``.

    Example:
        >>> first = LunaAttention(hidden_size=64, num_heads=2, pool_size=4)
        >>> second = LunaAttention(hidden_size=64, num_heads=2, pool_size=None)
        >>> x, pool, _ = first(torch.randn(1, 100, 64))
        >>> x, pool, _ = second(x, pool=pool)
        >>> x.shape, pool.shape
        (torch.Size([1, 100, 64]), torch.Size([1, 4, 64]))
    """

    pool: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 8,
        num_pool_heads: int | None = None,
        pool_size: int | None = 16,
        tie_kv: bool = False,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        num_pool_heads = num_heads if num_pool_heads is None else num_pool_heads
        if hidden_size % num_heads or hidden_size % num_pool_heads:
            raise ValueError(
                "LunaAttention: hidden_size must be a multiple of num_heads and num_pool_heads, "
                f"got {hidden_size}, {num_heads} and {num_pool_heads}"
            )
        if pool_size is not None and pool_size < 1:
            raise ValueError(f"LunaAttention: pool_size must be positive, got {pool_size}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_pool_heads = num_pool_heads
        self.tie_kv = tie_kv
        linear = functools.partial(nn.Linear, hidden_size, hidden_size, bias=qkv_bias)
        self.pq_proj, self.q_proj = linear(), linear()
        if tie_kv:
            self.pc_proj, self.c_proj = linear(), linear()
        else:
            self.pk_proj, self.pv_proj = linear(), linear()
            self.k_proj, self.v_proj = linear(), linear()
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.pool = None
        if pool_size is not None:
            self.pool = nn.Parameter(torch.randn(pool_size, hidden_size) * hidden_size**-0.5)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
        pool: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None]:
        """Mix along time, in both directions.

        Args:
            hidden_states, attention_mask, past_key_values, use_cache, output_attentions,
                cu_seqlens: as :class:`BidirectionalAttention`.
            pool: ``[N, p, hidden_size]``, one per sequence. Default: the layer's own.

        Returns:
            ``o [B, T, hidden_size]``, the pool after packing ``[N, p, hidden_size]`` in place of
            attention weights, and None.

        Raises:
            ValueError: as :class:`BidirectionalAttention`; no pool, or one of another shape.
        """
        refuse_cache(self, past_key_values)
        x, valid, back = as_rows(hidden_states, attention_mask, cu_seqlens)
        pool = self._pool(pool, x.shape[0])
        mask = None if valid is None else valid[:, None, None, :]
        if x.shape[1]:
            k = self.pc_proj(x) if self.tie_kv else self.pk_proj(x)
            v = k if self.tie_kv else self.pv_proj(x)
            pool = _attend(self.pq_proj(pool), k, v, self.num_pool_heads, mask)
        k = self.c_proj(pool) if self.tie_kv else self.k_proj(pool)
        v = k if self.tie_kv else self.v_proj(pool)
        o = _attend(self.q_proj(x), k, v, self.num_heads, None)
        return back(self.o_proj(o)), pool, None

    def _pool(self, pool: Tensor | None, sequences: int) -> Tensor:
        if pool is None:
            if self.pool is None:
                raise ValueError(
                    "LunaAttention: pass the pool of the layer before, or construct the layer with "
                    "pool_size"
                )
            return self.pool.expand(sequences, -1, -1)
        if pool.dim() != 3 or pool.shape[0] != sequences or pool.shape[2] != self.hidden_size:
            raise ValueError(
                f"LunaAttention: pool must have shape [N, p, hidden_size] = [{sequences}, p, "
                f"{self.hidden_size}], got {list(pool.shape)}"
            )
        return pool


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Softmax attention of ``q [N, S, hidden_size]`` over ``k``, ``v``, cut into heads."""
    q, k, v = (split_heads(x, x.shape[-1] // heads).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o.transpose(1, 2).flatten(2)
