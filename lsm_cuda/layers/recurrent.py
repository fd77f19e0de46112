"""What the layers around a recurrent operator share: a call with its states, and projections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Cache
from ..modules import FusedRMSNormGated, RMSNorm, ShortConvolution, activation, feature_dim
from ..modules.feature_map import FeatureMap
from ..modules.feature_map import feature_map as feature_map_by_name
from ..modules.rotary import packed_positions
from .common import layer_index, layer_state, repad, split_heads, unpad

__all__ = ["CachedLayer", "Call", "QKVLayer", "RecurrentLayer", "check_mode", "width_of"]

MODES = ("chunk", "fused_recurrent", "fused_chunk")


class Call:
    """One call of a layer: its tokens without padding, and its states before and after.

    Args: as :meth:`RecurrentLayer.forward`.

    Attributes:
        x: ``[B, T, D]``, or all tokens in one row where there was padding.
        cu_seqlens: boundaries of packed sequences, the caller's or those that padding made.
        cache: the caller's, or None.
        fresh: whether every row is a whole sequence from its first token on.
    """

    def __init__(
        self,
        layer: CachedLayer,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        use_cache: bool,
        cu_seqlens: Tensor | None,
    ) -> None:
        self._layer, self.cache = layer, cache
        self._shape = hidden_states.shape[:2]
        self._use_cache = use_cache and cache is not None
        self._old = layer_state(layer, layer.layer_idx, cache)
        self._recurrent_state: Any = None
        self._conv_state: list[Any] = []
        self._lengths: Tensor | None = None
        self.x, self._indices, self.cu_seqlens = unpad(hidden_states, attention_mask, cu_seqlens)
        self.fresh = self._old is None and self.cu_seqlens is None

    def convolve(self, conv: Callable[..., Any], x: Tensor, **options: Any) -> Tensor:
        """``conv(x)`` after what the sequences had before; in the same order in every call."""
        cache = None
        if self._old is not None and self._old.conv_state is not None:
            cache = self._old.conv_state[len(self._conv_state)]
            # Without use_cache the caller's state must survive a step that works in place.
            cache = cache if self._use_cache else cache.clone()
        y: Tensor
        y, state = conv(
            x,
            cache=cache,
            output_final_state=self._use_cache,
            cu_seqlens=self.cu_seqlens,
            **options,
        )
        self._conv_state.append(state)
        return y

    def run(
        self,
        chunk: Callable[..., tuple[Tensor, Any]],
        step: Callable[..., Tensor],
        *tensors: Tensor,
        **options: Any,
    ) -> Tensor:
        """``chunk`` over the tokens of ``tensors [B, T, ...]``, or ``step`` for a single one.

        A single-token call without autograd updates the cached state in place.
        """
        old = None if self._old is None else self._old.recurrent_state
        one_token = tensors[0].shape[1] == 1 and self.cu_seqlens is None
        if one_token and self._use_cache and old is not None and not torch.is_grad_enabled():
            self._recurrent_state = old
            return step(*(x[:, 0] for x in tensors), state=old, **options)[:, None]
        o, self._recurrent_state = chunk(
            *tensors,
            initial_state=old,
            output_final_state=self._use_cache,
            cu_seqlens=self.cu_seqlens,
            **options,
        )
        return o

    def positions(self) -> Tensor:
        """Place of every token in its sequence, cached tokens counted: ``[T]`` or ``[B, T]``."""
        T, device = self.x.shape[1], self.x.device
        old = None if self._old is None else self._old.lengths
        if self.cu_seqlens is None:
            place = torch.arange(T, device=device)
            new = place.new_full(self.x.shape[:1], T)
        else:
            place = packed_positions(self.cu_seqlens, T)
            new = self.cu_seqlens.diff().long()
        before = torch.zeros_like(new) if old is None else old
        self._lengths = before + new
        if old is None:
            return place
        if self.cu_seqlens is None:
            return before[:, None] + place
        return place + before.repeat_interleave(new, output_size=T)

    def yet_to_begin(self) -> Tensor | None:
        """``[N]``, whether a sequence in the cache has had no token so far.

        None where nothing is cached, or what is began with a call that had tokens of every row.
        """
        before = None if self._old is None else self._old.lengths
        if before is not None or (self._old is None and self.cu_seqlens is not None):
            self.positions()
        return None if before is None else before == 0

    def finish(self, o: Tensor) -> Tensor:
        """Leave the new states in the cache, if asked for, and put padding back."""
        if self.cache is not None and self._use_cache:
            self.cache.update(
                layer_index(self._layer, self._layer.layer_idx),
                recurrent_state=self._recurrent_state,
                conv_state=tuple(self._conv_state) or None,
                lengths=self._lengths,
                offset=self._shape[1],
            )
        return self.repad(o)

    def repad(self, x: Tensor) -> Tensor:
        """``x`` of the tokens in the caller's layout, zeros at padding."""
        return repad(x, self._indices, *self._shape)


class CachedLayer(nn.Module):
    """A layer with a state, of which a :class:`Call` takes care.

    Args:
        hidden_size: width of input and output.
        layer_idx: place in the cache; needed to use one.
    """

    def __init__(self, hidden_size: int, layer_idx: int | None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.layer_idx = layer_idx


class RecurrentLayer(CachedLayer, ABC):
    """:meth:`_mix` between removing padding and putting it back; arguments as the base's."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, Cache | None]:
        """Mix along time.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: ``[B, S]``, S ≥ T, 0 marks padding on either side; its last T columns
                are used. Outputs at padding are 0, and states skip it.
            past_key_values: cache to continue from.
            use_cache: leave the new state in ``past_key_values``, if given. A single-token call
                without autograd then updates the state in place.
            output_attentions: accepted for FLA's sake; there are no attention weights.
            cu_seqlens: ``[N + 1]`` boundaries of N sequences packed into one row (``B == 1``).

        Returns:
            ``o [B, T, hidden_size]``, None, and ``past_key_values``.

        Raises:
            ValueError: ``attention_mask`` of a wrong shape or beside ``cu_seqlens``, or a cache
                without ``layer_idx``.
        """
        call = Call(self, hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens)
        return call.finish(self._mix(call.x, call)), None, past_key_values

    @abstractmethod
    def _mix(self, x: Tensor, call: Call) -> Tensor:
        """``[B, T, hidden_size]`` to the same, without padding."""


class QKVLayer(RecurrentLayer):
    """Projections to queries, keys and values, short convolutions behind them, and back.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads H.
        num_kv_heads: key and value heads; each serves ``H // num_kv_heads`` query heads.
            Default: H.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        use_short_conv: put a short causal convolution with SiLU behind each projection.
        conv_size, conv_bias: its taps, and whether it has a bias.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{type(self).__name__}: num_heads must be a multiple of num_kv_heads, "
                f"got {num_heads} and {num_kv_heads}"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.num_kv_groups = num_heads // num_kv_heads
        self.key_dim = width_of(self, "expand_k", hidden_size, expand_k, num_heads)
        self.value_dim = width_of(self, "expand_v", hidden_size, expand_v, num_heads)
        self.head_k_dim = self.key_dim // num_heads
        self.head_v_dim = self.value_dim // num_heads
        self.use_short_conv = use_short_conv
        self.feature_map_fn: FeatureMap | None = None

        k_width = self.head_k_dim * num_kv_heads
        v_width = self.head_v_dim * num_kv_heads
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, k_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, v_width, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(k_width, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(v_width, conv_size, conv_bias)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _add_feature_map(self, name: str | None) -> None:
        """One map for queries and keys, of their width, as ``feature_map_fn``."""
        if name is None:
            return
        if (width := feature_dim(name, self.head_k_dim)) != self.head_k_dim:
            raise ValueError(
                f"{type(self).__name__}: feature_map must keep the width of queries and keys, "
                f"got {name!r}, which makes {self.head_k_dim} channels {width}"
            )
        self.feature_map_fn = feature_map_by_name(name, self.head_k_dim)

    def _add_output_gate(
        self,
        use_output_gate: bool,
        gate_fn: str,
        elementwise_affine: bool,
        norm_eps: float,
        fuse_norm: bool,
    ) -> None:
        """``g_proj`` and the norm of every head; fused with a swish gate it has another name."""
        self.use_output_gate = use_output_gate
        self.gate_fn = activation(gate_fn)
        self.fuse_norm_and_gate = fuse_norm and use_output_gate and gate_fn == "swish"
        if use_output_gate:
            self.g_proj = nn.Linear(self.hidden_size, self.value_dim, bias=False)
        if self.fuse_norm_and_gate:
            self.g_norm_swish_gate = FusedRMSNormGated(
                self.head_v_dim, elementwise_affine, norm_eps
            )
        else:
            self.g_norm = RMSNorm(
                self.head_v_dim, elementwise_affine, norm_eps, dtype=torch.float32
            )

    def _qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, T, H, K]``, keys likewise, values ``[B, T, H, V]``."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.use_short_conv:
            q = call.convolve(self.q_conv1d, q)
            k = call.convolve(self.k_conv1d, k)
            v = call.convolve(self.v_conv1d, v)
        q = split_heads(q, self.head_k_dim)
        k = split_heads(k, self.head_k_dim, self.num_kv_groups)
        v = split_heads(v, self.head_v_dim, self.num_kv_groups)
        if self.feature_map_fn is not None:
            q, k = self.feature_map_fn.queries(q), self.feature_map_fn.keys(k)
        return q, k, v

    def _gate_output(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm per head, output gate and ``o_proj``: ``[B, T, H, V]`` to ``[B, T, D]``."""
        if self.fuse_norm_and_gate:
            gate = split_heads(self.g_proj(x), self.head_v_dim)
            y = self.g_norm_swish_gate(o, gate).flatten(-2)
        else:
            y = self.g_norm(o).flatten(-2)
            y = y * self.gate_fn(self.g_proj(x)) if self.use_output_gate else y
        result: Tensor = self.o_proj(y)
        return result


def check_mode(layer: nn.Module, mode: str, modes: tuple[str, ...] = MODES) -> str:
    """``mode``, one of FLA's names for kernels; raises ValueError for another."""
    if mode not in modes:
        raise ValueError(
            f"{type(layer).__name__}: mode must be one of {', '.join(modes)}, got {mode!r}"
        )
    return mode


def width_of(
    layer: nn.Module, argument: str, hidden_size: int, expand: float, num_heads: int
) -> int:
    """``hidden_size · expand``, which must be whole and fill whole heads."""
    width = round(hidden_size * expand)
    if abs(width - hidden_size * expand) > 1e-6 or width % num_heads:
        raise ValueError(
            f"{type(layer).__name__}: hidden_size * {argument} must be a multiple of num_heads, "
            f"got {hidden_size} * {expand} and {num_heads} heads"
        )
    return width
