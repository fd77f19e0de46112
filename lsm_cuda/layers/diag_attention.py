"""Block-diagonal softmax attention: the local layers of TransNormer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Cache, KVBuffer
from .common import as_rows, layer_index, layer_state, split_heads

__all__ = ["DiagAttention"]


class DiagAttention(nn.Module):
    """Softmax attention within blocks that do not overlap.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        block_size: tokens of a block; the first starts at the first token of its sequence.
        causal: attend only to earlier tokens of the block, and the token itself.
        qkv_bias: biases in the q, k, v projections.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide, or ``block_size`` not positive.

    Source: The Devil in Linear Transformer (TransNormer), arXiv:2210.10340, section 4.2.

    Example:
        >>> layer = DiagAttention(hidden_size=64, num_heads=2, block_size=16)
        >>> layer(torch.randn(1, 100, 64))[0].shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 8,
        block_size: int = 64,
        causal: bool = True,
        qkv_bias: bool = False,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                "DiagAttention: hidden_size must be a multiple of num_heads, "
                f"got {hidden_size} and {num_heads}"
            )
        if block_size < 1:
            raise ValueError(f"DiagAttention: block_size must be positive, got {block_size}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.block_size = block_size
        self.causal = causal
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, Cache | None]:
        """Mix along time within blocks; arguments and results as :class:`GatedLinearAttention`.

        The cache holds the keys and values of the block that is not full yet. It is for inference
        and for sequences without padding: blocks of padded ones would not begin together.

        Raises:
            ValueError: ``attention_mask`` of a wrong shape or beside ``cu_seqlens``; a cache in a
                layer that is not causal, beside ``cu_seqlens`` or padding, or while autograd
                records.
        """
        x, valid, back = as_rows(hidden_states, attention_mask, cu_seqlens)
        q, k, v = (
            split_heads(projection(x), self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        past = None
        if past_key_values is not None:
            self._check_cache(k, valid is not None)
            state = layer_state(self, self.layer_idx, past_key_values)
            past = None if state is None else state.attn_state
        length = 0 if past is None else past.length
        if past is not None:
            k = torch.cat([past.keys[:, :length], k], 1)
            v = torch.cat([past.values[:, :length], v], 1)
        o = self._attend(q, k, v, valid)
        if past_key_values is not None and use_cache:
            self._remember(k, v, past, past_key_values, new_tokens=q.shape[1])
        return back(self.o_proj(o)), None, past_key_values

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """``q [N, T, H, D]`` of the last T tokens of ``k``, ``v [N, S, H, D]``: ``[N, T, H D]``."""
        N, T, S, C = q.shape[0], q.shape[1], k.shape[1], self.block_size
        if S <= C and T == 1:  # a step: its block ends here
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v)
            return o.transpose(1, 2).flatten(2)
        end = -(-S // C) * C
        q = F.pad(q, (0, 0, 0, 0, S - T, end - S))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, end - S)) for x in (k, v))
        mask = None
        if not self.causal and (valid is not None or end > S):
            valid = q.new_ones(N, S, dtype=torch.bool) if valid is None else valid
            mask = F.pad(valid, (0, end - S)).view(-1, 1, 1, C)
            # A block of nothing but padding: its queries are padding too.
            mask = mask | ~mask.any(-1, keepdim=True)
        q, k, v = (x.reshape(-1, C, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return o.transpose(1, 2).reshape(N, end, self.hidden_size)[:, S - T : S]

    def _check_cache(self, k: Tensor, padded: bool) -> None:
        if not self.causal:
            raise ValueError("DiagAttention: past_key_values needs a causal layer")
        if padded:
            raise ValueError("DiagAttention: pass past_key_values without padding and cu_seqlens")
        if torch.is_grad_enabled() and k.requires_grad:
            raise ValueError("DiagAttention: past_key_values is for inference; use torch.no_grad()")

    def _remember(
        self, k: Tensor, v: Tensor, past: KVBuffer | None, cache: Cache, new_tokens: int
    ) -> None:
        """Keeps the block that is not full; a step within it writes one row in place."""
        rest = k.shape[1] % self.block_size
        if past is not None and past.length + new_tokens == rest:
            past.append(k[:, past.length :], v[:, past.length :])
        else:
            tail = slice(k.shape[1] - rest, None)
            past = KVBuffer.start(k[:, tail], v[:, tail])
            past.reserve(self.block_size)  # copies: rest < block_size
        cache.update(layer_index(self, self.layer_idx), attn_state=past, offset=new_tokens)
