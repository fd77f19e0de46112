"""Causal softmax attention, over everything or over a window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Cache, KVBuffer, LayerState
from ..modules import RMSNorm, RotaryEmbedding
from ..ops.attn_mask import AttnMask
from ..ops.sparse_attn import block_sparse_attn
from ..sparse.kv_cache import KVCache, Policy
from .common import check_hidden_states, check_mask, layer_index, layer_state, split_heads

__all__ = ["Attention", "CausalAttention"]


class CausalAttention(nn.Module, ABC):
    """Projections, rotary positions, a key/value cache and padding around a way to attend.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads; default ``num_heads``.
        head_dim: channels of a head; default ``hidden_size // num_heads``.
        qkv_bias: biases in the q, k, v projections.
        qk_norm: RMSNorm of the heads' queries and keys.
        rope_theta: base of the rotary embedding; None: no positions.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        qkv_bias: bool,
        qk_norm: bool,
        rope_theta: float | None,
        layer_idx: int | None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if (head_dim is None and hidden_size % num_heads) or num_heads % num_kv_heads:
            raise ValueError(
                f"{type(self).__name__}: hidden_size must be a multiple of num_heads, and "
                f"num_heads of num_kv_heads, got {hidden_size}, {num_heads} and {num_kv_heads}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.layer_idx = layer_idx
        q_dim, kv_dim = self.head_dim * num_heads, self.head_dim * num_kv_heads
        self.q_proj = nn.Linear(hidden_size, q_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(q_dim, hidden_size, bias=False)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = RMSNorm(self.head_dim)
            self.k_norm = RMSNorm(self.head_dim)
        self.rotary = None if rope_theta is None else RotaryEmbedding(self.head_dim, rope_theta)

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
        name = type(self).__name__
        check_hidden_states(hidden_states)
        T = hidden_states.shape[1]
        state = layer_state(self, self.layer_idx, past_key_values)
        past = None if state is None else state.attn_state
        start = 0 if state is None else state.seen
        if cu_seqlens is not None and (attention_mask is not None or past_key_values is not None):
            raise ValueError(f"{name}: pass cu_seqlens without attention_mask and cache")
        q, k, v = self._project(
            hidden_states, self._positions(T, start, attention_mask, cu_seqlens)
        )
        if past_key_values is not None and self.kv_policy is not None:
            if not self._reads_all:
                raise ValueError(f"{name}: kv_policy is for attention over everything")
            if not use_cache or not (attention_mask is None or bool(attention_mask.all())):
                raise ValueError(
                    f"{name}: kv_policy needs use_cache, and sequences without padding"
                )
            o = self._by_policy(q, k, v, state, past_key_values)
            return self.o_proj(o.flatten(-2)), None, past_key_values
        if past_key_values is not None:
            k, v = self._remember(k, v, past, past_key_values if use_cache else None)
        gates = self._gates(hidden_states)
        if attention_mask is not None:
            check_mask(attention_mask, hidden_states.shape[0], k.shape[1])
            attention_mask = attention_mask[:, -k.shape[1] :] != 0
            if T == 1 and self._reads_all:
                o = self._one_token(q, k, v, attention_mask)
                return self.o_proj(o.flatten(-2)), None, past_key_values
            if bool(attention_mask.all()):
                attention_mask = None
        if attention_mask is None and past_key_values is not None and use_cache:
            index = layer_index(self, self.layer_idx)
            o = self._attend_cached(q, k, v, gates, past_key_values[index])
        elif attention_mask is None:
            o = self._attend(q, k, v, gates, cu_seqlens, cu_seqlens)
        elif past_key_values is not None and use_cache:
            index = layer_index(self, self.layer_idx)
            o = self._attend_padded(q, k, v, gates, attention_mask, past_key_values[index])
        else:
            o = self._unpadded(q, k, v, gates, attention_mask)
        return self.o_proj(self._finish(o, hidden_states).flatten(-2)), None, past_key_values

    kv_policy: Callable[[], Policy] | None = None

    @property
    def _reads_all(self) -> bool:
        """Whether it is nothing but softmax over all earlier tokens."""
        return False

    @abstractmethod
    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
    ) -> Tensor:
        """Queries, the last tokens of the keys' sequences, over them."""

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: LayerState
    ) -> Tensor:
        """The same behind a cache, where ``state`` may keep what is made of keys and values."""
        return self._attend(q, k, v, gates, None, None)

    def _attend_padded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        mask: Tensor,
        state: LayerState,
    ) -> Tensor:
        """The same among what ``mask [B, S]`` says are tokens."""
        return self._unpadded(q, k, v, gates, mask)

    def _gates(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """``[B, T, ...]`` each, what else attention needs of the queries' tokens."""
        return ()

    def _finish(self, o: Tensor, hidden_states: Tensor) -> Tensor:
        return o

    def _positions(
        self, time: int, start: int, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> int | Tensor:
        """Of the first token, or of all: scores depend on distances alone, so left padding and the
        sequences before it in a packed row may count."""
        return start

    def _project(self, hidden_states: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            split_heads(projection(hidden_states), self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, start), self.rotary(k, start)
        return q, k, v

    def _remember(
        self, k: Tensor, v: Tensor, past: KVBuffer | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, old and new; kept in ``cache`` unless it is None."""
        if torch.is_grad_enabled() and k.requires_grad:
            raise ValueError(
                f"{type(self).__name__}: past_key_values is for inference; use torch.no_grad()"
            )
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

    def _by_policy(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState | None, cache: Cache
    ) -> Tensor:
        """A prompt, or one more token, through a cache with a policy."""
        assert self.kv_policy is not None
        kept = None if state is None else state.kv_cache
        if kept is None:
            kept = KVCache(self.kv_policy())
            o = kept.prefill(q, k, v)
        elif q.shape[1] == 1:
            o = kept.step(q, k, v)
        else:
            raise ValueError(
                f"{type(self).__name__}: with kv_policy a prompt comes in one piece, and then "
                f"token by token, got {q.shape[1]} more tokens"
            )
        index = layer_index(self, self.layer_idx)
        cache.update(index, kv_cache=kept, offset=q.shape[1])
        return o

    def _unpadded(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], mask: Tensor
    ) -> Tensor:
        """Attention among what ``mask [B, S]`` says are tokens, zeros at padding."""
        B, T, H = q.shape[:3]
        own = mask[:, mask.shape[1] - T :]
        queries, keys = own.flatten().nonzero().flatten(), mask.flatten().nonzero().flatten()
        cuts = [F.pad(m.sum(1).cumsum(0), (1, 0)).int() for m in (own, mask)]
        q, *gates_ = (x.flatten(0, 1).index_select(0, queries)[None] for x in (q, *gates))
        k, v = (x.flatten(0, 1).index_select(0, keys)[None] for x in (k, v))
        o = self._attend(q, k, v, tuple(gates_), *cuts)
        rows = o.new_zeros(B * T, H, o.shape[3]).index_copy(0, queries, o[0])
        return rows.view(B, T, H, -1)

    def _row_by_row(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor,
    ) -> Tensor:
        """One sequence after another: behind a cache, padded, blocks of each stand elsewhere."""
        bounds = zip(pairwise(cu_seqlens.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
        rows = []
        for (s, e), (t, u) in bounds:
            own = tuple(g[:, s:e] for g in gates)
            rows.append(self._attend(q[:, s:e], k[:, t:u], v[:, t:u], own, None, None))
        return torch.cat(rows, 1)

    @staticmethod
    def _one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The last token over the cache as it is, padding masked instead of taken out."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # A padding query may see itself: a row without any key would become NaN.
        seen = torch.cat([mask[:, :-1], torch.ones_like(mask[:, -1:])], 1)[:, None, None]
        grouped = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
        return o.transpose(1, 2)


class Attention(CausalAttention):
    """Causal multi-head attention, over all earlier tokens or the last few of them.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads; default ``num_heads``.
        qkv_bias: biases in the q, k, v projections.
        qk_norm: RMSNorm of the heads' queries and keys.
        window_size: tokens that a query sees, itself among them; default all.
        rope_theta: base of the rotary embedding; None: no positions.
        layer_idx: place in the cache; needed to use one.
        head_dim: channels of a head; default ``hidden_size // num_heads``.
        sinks: learn ``sinks [num_heads]``, the score of one more key without a value (GPT-OSS).
        sink_tokens: first tokens that are seen beside the window (StreamingLLM).
        softcap: of scores, ``c tanh(s / c)`` (Gemma 2); 0: none.
        kv_policy: makes the policy of a cache (:class:`lsm_cuda.sparse.KVCache`): what a step from
            a cache keeps and reads. An attribute, which may be set later; only for attention over
            everything.

    Raises:
        ValueError: sizes that do not divide.

    Parameter names are FLA's. Attention over everything is PyTorch's
    ``scaled_dot_product_attention``; all else runs on the block-sparse engine.

    Source: Attention Is All You Need, arXiv:1706.03762; Longformer, arXiv:2004.05150 (window).

    Example:
        >>> layer = Attention(hidden_size=64, num_heads=4, num_kv_heads=2, window_size=16)
        >>> layer(torch.randn(1, 100, 64))[0].shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        layer_idx: int | None = None,
        head_dim: int | None = None,
        sinks: bool = False,
        sink_tokens: int = 0,
        softcap: float = 0.0,
        kv_policy: Callable[[], Policy] | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, num_kv_heads, head_dim, qkv_bias, qk_norm, rope_theta, layer_idx
        )
        if window_size is not None and window_size < 1:
            raise ValueError(f"Attention: window_size must be positive, got {window_size}")
        self.window_size = window_size
        self.sink_tokens = sink_tokens
        self.softcap = softcap
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        if kv_policy is not None and not self._reads_all:
            raise ValueError("Attention: kv_policy is for attention over everything")
        self.kv_policy = kv_policy

    @property
    def _reads_all(self) -> bool:
        return self.window_size is None and self.sinks is None and not self.softcap

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
    ) -> Tensor:
        Tq, Tk = q.shape[1], k.shape[1]
        if self._reads_all and cu_seqlens is None and Tq in (1, Tk):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = self.num_heads != self.num_kv_heads
            o = F.scaled_dot_product_attention(q, k, v, is_causal=Tq > 1, enable_gqa=grouped)
            return o.transpose(1, 2)
        left = -1 if self.window_size is None else self.window_size - 1
        if left >= 0 and cu_seqlens is None and not self.sink_tokens:
            k, v = (x[:, max(Tk - Tq - left, 0) :] for x in (k, v))
        mask = AttnMask(causal=True, left=left, sinks=self.sink_tokens)
        return block_sparse_attn(
            q, k, v, None, mask, softcap=self.softcap, sink_logits=self.sinks,
            cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
        )  # fmt: skip
