"""The gated linear attention layer, compatible with FLA's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Cache, LayerState
from ..modules import FusedRMSNormGated, RMSNorm, ShortConvolution, activation
from ..ops import chunk_gla, gla_step
from .common import layer_index, layer_state, repad, split_heads, unpad

__all__ = ["GatedLinearAttention"]

_MODES = ("chunk", "fused_recurrent", "fused_chunk")


class GatedLinearAttention(nn.Module):
    r"""Gated linear attention with low-rank decay gates and a gated output norm.

    Args:
        mode: ``chunk``, ``fused_recurrent`` or ``fused_chunk``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: query heads H.
        num_kv_heads: key, value and gate heads; each serves ``H // num_kv_heads`` query heads.
            Default: H.
        feature_map: activation applied to queries and keys (a name of ``modules.ACT2FN``).
        use_short_conv: put a short causal convolution with SiLU behind the q, k, v projections.
        conv_size, conv_bias: its taps, and whether it has a bias.
        use_output_gate: multiply the normalised output by a gate computed from the input.
        gate_fn: activation of that gate.
        elementwise_affine, norm_eps: of the output norm.
        gate_logit_normalizer: divides the log decay, so that decays start close to 1.
        gate_low_rank_dim: rank of the decay gate's projection.
        clamp_min: lower bound of the log decay.
        fuse_norm: one module for norm and ``swish`` gate (decides the parameter's name only).
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode or activation.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635,
    section 4.4.

    Example:
        >>> layer = GatedLinearAttention(hidden_size=64, num_heads=2)
        >>> o, _, _ = layer(torch.randn(1, 10, 64))
        >>> o.shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 16,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in _MODES:
            raise ValueError(
                f"GatedLinearAttention: mode must be one of {', '.join(_MODES)}, got {mode!r}"
            )
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                "GatedLinearAttention: num_heads must be a multiple of num_kv_heads, "
                f"got {num_heads} and {num_kv_heads}"
            )
        self.mode = mode
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.num_kv_groups = num_heads // num_kv_heads
        self.key_dim = _width("expand_k", hidden_size, expand_k, num_heads)
        self.value_dim = _width("expand_v", hidden_size, expand_v, num_heads)
        self.head_k_dim = self.key_dim // num_heads
        self.head_v_dim = self.value_dim // num_heads
        self.use_short_conv = use_short_conv
        self.use_output_gate = use_output_gate
        self.gate_logit_normalizer = gate_logit_normalizer
        self.clamp_min = clamp_min
        self.layer_idx = layer_idx
        self.feature_map_fn = None if feature_map is None else activation(feature_map)
        self.gate_fn = activation(gate_fn)
        self.fuse_norm_and_gate = fuse_norm and use_output_gate and gate_fn == "swish"

        k_width = self.head_k_dim * num_kv_heads
        v_width = self.head_v_dim * num_kv_heads
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, k_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, v_width, bias=False)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        if use_short_conv:
            self.q_conv1d = ShortConvolution(self.key_dim, conv_size, conv_bias)
            self.k_conv1d = ShortConvolution(k_width, conv_size, conv_bias)
            self.v_conv1d = ShortConvolution(v_width, conv_size, conv_bias)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False),
            nn.Linear(gate_low_rank_dim, k_width, bias=True),
        )
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        if self.fuse_norm_and_gate:
            self.g_norm_swish_gate = FusedRMSNormGated(
                self.head_v_dim, elementwise_affine, norm_eps
            )
        else:
            self.g_norm = RMSNorm(
                self.head_v_dim, elementwise_affine, norm_eps, dtype=torch.float32
            )

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
                are used. Outputs at padding are ``o_proj(0) = 0``, and states skip it.
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
        B, T, _ = hidden_states.shape
        use_cache = use_cache and past_key_values is not None
        state = layer_state(self, self.layer_idx, past_key_values)
        hidden_states, indices, cu_seqlens = unpad(hidden_states, attention_mask, cu_seqlens)

        q, k, v, conv_state = self._qkv(hidden_states, state, use_cache, cu_seqlens)
        g = self._log_decay(hidden_states)
        o, recurrent_state = self._attend(q, k, v, g, state, use_cache, cu_seqlens)
        if past_key_values is not None and use_cache:
            past_key_values.update(
                layer_index(self, self.layer_idx),
                recurrent_state=recurrent_state,
                conv_state=conv_state,
                offset=T,
            )
        o = self.o_proj(self._gate_output(o, hidden_states))
        return repad(o, indices, B, T), None, past_key_values

    def _qkv(
        self,
        x: Tensor,
        state: LayerState | None,
        use_cache: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...] | None]:
        """Queries ``[B, T, H, K]``, keys likewise, values ``[B, T, H, V]``, convolution states."""
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        conv_state = None
        if self.use_short_conv:
            old = None if state is None else state.conv_state
            convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            new = []
            for i, conv in enumerate(convs):
                # Without use_cache the caller's state must survive a step that works in place.
                cache = None if old is None else old[i] if use_cache else old[i].clone()
                projected[i], last = conv(
                    projected[i],
                    cache=cache,
                    output_final_state=use_cache,
                    cu_seqlens=cu_seqlens,
                )
                new.append(last)
            conv_state = tuple(new) if use_cache else None
        q = split_heads(projected[0], self.head_k_dim)
        k = split_heads(projected[1], self.head_k_dim, self.num_kv_groups)
        v = split_heads(projected[2], self.head_v_dim, self.num_kv_groups)
        if self.feature_map_fn is not None:
            q, k = self.feature_map_fn(q), self.feature_map_fn(k)
        return q, k, v, conv_state

    def _log_decay(self, x: Tensor) -> Tensor:
        """``[B, T, H, K]``; fp32, because errors of a log decay add up over time."""
        logits = self.gk_proj(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        g = F.logsigmoid(logits) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            g = g.clamp_min(self.clamp_min)
        return split_heads(g, self.head_k_dim, self.num_kv_groups)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        state: LayerState | None,
        use_cache: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """``o [B, T, H, V]`` and the new state ``[N, H, K, V]`` if asked for."""
        old = None if state is None else state.recurrent_state
        one_token = q.shape[1] == 1 and cu_seqlens is None
        if one_token and use_cache and old is not None and not torch.is_grad_enabled():
            return gla_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], old)[:, None], old
        return chunk_gla(
            q,
            k,
            v,
            g,
            initial_state=old,
            output_final_state=use_cache,
            cu_seqlens=cu_seqlens,
        )

    def _gate_output(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm per head and output gate: ``[B, T, H, V]`` to ``[B, T, H · V]``."""
        if self.fuse_norm_and_gate:
            gate = split_heads(self.g_proj(x), self.head_v_dim)
            y: Tensor = self.g_norm_swish_gate(o, gate)
            return y.flatten(-2)
        y = self.g_norm(o).flatten(-2)
        return y * self.gate_fn(self.g_proj(x)) if self.use_output_gate else y


def _width(argument: str, hidden_size: int, expand: float, num_heads: int) -> int:
    """``hidden_size · expand``, which must be whole and fill whole heads."""
    width = round(hidden_size * expand)
    if abs(width - hidden_size * expand) > 1e-6 or width % num_heads:
        raise ValueError(
            f"GatedLinearAttention: hidden_size * {argument} must be a multiple of num_heads, "
            f"got {hidden_size} * {expand} and {num_heads} heads"
        )
    return width
