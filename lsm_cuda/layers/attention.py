"""Causal softmax attention: the baseline that linear layers are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Cache, KVBuffer
from ..modules import RotaryEmbedding
from .common import check_mask, layer_index, layer_state, split_heads

__all__ = ["Attention"]


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and a key/value cache.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads; default ``num_heads``.
        qkv_bias: biases in the q, k, v projections.
        rope_theta: base of the rotary embedding.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide.

    Source: Attention Is All You Need, arXiv:1706.03762.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        rope_theta: float = 10000.0,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if hidden_size % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                "Attention: hidden_size must be a multiple of num_heads, and num_heads of "
                f"num_kv_heads, got {hidden_size}, {num_heads} and {num_kv_heads}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads
        self.layer_idx = layer_idx
        kv_dim = self.head_dim * num_kv_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.rotary = RotaryEmbedding(self.head_dim, rope_theta)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, Cache | None]:
        """Mix along time; arguments and results as :class:`GatedLinearAttention`.

        ``attention_mask [B, S]`` covers the cached tokens too: S is their number plus T. The cache
        is for inference: it is written in place.

        Raises:
            ValueError: a mask of another shape, ``cu_seqlens`` with a mask or a cache, or a cache
                while autograd records.
        """
        B, T, _ = hidden_states.shape
        state = layer_state(self, self.layer_idx, past_key_values)
        past = None if state is None else state.attn_state
        start = 0 if past is None else past.length
        if cu_seqlens is not None and (attention_mask is not None or past_key_values is not None):
            raise ValueError("Attention: pass cu_seqlens without attention_mask and cache")
        # Rotation makes scores depend on distances alone, so left padding may count as positions.
        q = self.rotary(split_heads(self.q_proj(hidden_states), self.head_dim), start)
        k = self.rotary(split_heads(self.k_proj(hidden_states), self.head_dim), start)
        v = split_heads(self.v_proj(hidden_states), self.head_dim)
        if past_key_values is not None:
            k, v = self._remember(k, v, past, past_key_values if use_cache else None)

        mask = self._mask(B, T, k.shape[1], attention_mask, cu_seqlens, q.device)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.o_proj(o.transpose(1, 2).flatten(-2)), None, past_key_values

    def _remember(
        self, k: Tensor, v: Tensor, past: KVBuffer | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, old and new; kept in ``cache`` unless it is None."""
        if torch.is_grad_enabled() and k.requires_grad:
            raise ValueError("Attention: past_key_values is for inference; use torch.no_grad()")
        if cache is None:
            if past is None:
                return k, v
            n = past.length
            return torch.cat([past.keys[:, :n], k], 1), torch.cat([past.values[:, :n], v], 1)
        new_tokens = k.shape[1]
        if past is None:
            past = KVBuffer.start(k, v)
        else:
            k, v = past.append(k, v)
        index = layer_index(self, self.layer_idx)
        cache.update(index, attn_state=past, offset=new_tokens)
        return k, v

    @staticmethod
    def _mask(
        batch: int,
        time: int,
        keys: int,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        device: torch.device,
    ) -> Tensor | None:
        """``[B or 1, 1, T, S]``, True where attention is allowed; None where causality says all."""
        if attention_mask is None and cu_seqlens is None and (time == 1 or time == keys):
            return None
        row = torch.arange(keys - time, keys, device=device)[:, None]
        column = torch.arange(keys, device=device)
        allowed = (column <= row)[None]
        if cu_seqlens is not None:
            owner = torch.searchsorted(cu_seqlens[1:].long(), column, right=True)
            allowed = allowed & (owner[:, None] == owner)
        if attention_mask is not None:
            check_mask(attention_mask, batch, keys)
            # A padding query may see itself: a row without any key would become NaN.
            allowed = allowed & ((attention_mask[:, None, :] != 0) | (column == row))
        return allowed[:, None]
