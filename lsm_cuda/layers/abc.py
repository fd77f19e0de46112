"""Attention with bounded memory, compatible with FLA's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FusedRMSNormGated, RMSNorm, RotaryEmbedding
from ..ops import abc_step, chunk_abc
from ._gated import add_convs, project
from .common import split_heads
from .recurrent import Call, RecurrentLayer, width_of

__all__ = ["ABCAttention"]


class ABCAttention(RecurrentLayer):
    """Attention over slots that hold means of keys and values, weighted by learned logits.

    Args:
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: heads.
        use_short_conv: put a short causal convolution with SiLU behind the q, k, v projections.
        conv_size, conv_bias: its taps, and whether it has a bias.
        num_slots: slots per head. Default: key channels per head.
        elementwise_affine, norm_eps: of the output norm.
        gate_low_rank_dim, gate_logit_normalizer: taken for FLA's sake, whose layer heeds neither.
        use_rope: rotate queries and keys by their positions, padding not counted.
        use_input_gate: SiLU on queries, keys and values.
        use_output_gate: multiply the output by SiLU of a projection of the input.
        use_norm: normalise the output of each head.
        clamp_min, clamp_max: bounds of the slots' logits.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide, or an odd head with ``use_rope``.

    Source: ABC: Attention with Bounded-memory Control, arXiv:2110.02488.

    Example:
        >>> layer = ABCAttention(hidden_size=64, num_heads=2, num_slots=16)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        num_slots: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: int = 16,
        use_rope: bool = True,
        use_input_gate: bool = False,
        use_output_gate: bool = True,
        use_norm: bool = True,
        clamp_min: float | None = -32,
        clamp_max: float | None = 32,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.num_heads = num_heads
        self.key_dim = width_of(self, "expand_k", hidden_size, expand_k, num_heads)
        self.value_dim = width_of(self, "expand_v", hidden_size, expand_v, num_heads)
        self.head_k_dim = self.key_dim // num_heads
        self.head_v_dim = self.value_dim // num_heads
        self.num_slots = self.head_k_dim if num_slots is None else num_slots
        self.use_input_gate = use_input_gate
        self.use_output_gate = use_output_gate
        self.use_norm = use_norm
        self.clamp = (clamp_min, clamp_max)
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.s_proj = nn.Linear(hidden_size, num_heads * self.num_slots, bias=False)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        if use_short_conv:
            widths = {"q": self.key_dim, "k": self.key_dim, "v": self.value_dim}
            add_convs(self, widths, conv_size, conv_bias)
        if use_norm and use_output_gate:
            self.g_norm: nn.Module = FusedRMSNormGated(
                self.head_v_dim, elementwise_affine, norm_eps
            )
        elif use_norm:
            self.g_norm = RMSNorm(
                self.head_v_dim, elementwise_affine, norm_eps, dtype=torch.float32
            )
        self.rotary = RotaryEmbedding(self.head_k_dim) if use_rope else None

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        K, V = self.head_k_dim, self.head_v_dim
        q, k, v, s = project(self, x, call, {"q": K, "k": K, "v": V, "s": self.num_slots})
        if self.use_input_gate:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        if self.rotary is not None:
            positions = call.positions()
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if self.clamp != (None, None):
            s = s.clamp(*self.clamp)
        o = call.run(chunk_abc, abc_step, q, k, v, s)
        if self.use_output_gate:
            g = split_heads(self.g_proj(x), V)
            o = self.g_norm(o, g) if self.use_norm else F.silu(g) * o
        elif self.use_norm:
            o = self.g_norm(o)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y
