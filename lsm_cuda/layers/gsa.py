"""Gated slot attention, compatible with FLA's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import RMSNorm
from ..modules.feature_map import feature_map as feature_map_by_name
from ..modules.precision import wide
from ..ops import chunk_gsa, gsa_step
from ._gated import add_convs, project
from .recurrent import Call, RecurrentLayer, check_mode, width_of

__all__ = ["GatedSlotAttention"]


class GatedSlotAttention(RecurrentLayer):
    """Attention over a fixed number of slots that forget through gates.

    Args:
        mode: ``chunk`` or ``fused_recurrent``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: query heads H.
        num_kv_heads: heads of keys, values and slots; each serves ``H // num_kv_heads`` query
            heads. Default: H.
        use_short_conv: put a short causal convolution with SiLU behind the q, k, v projections.
        conv_size, conv_bias: its taps, and whether it has a bias.
        num_slots: slots per head. Default: key channels per head.
        elementwise_affine, norm_eps: of the output norm.
        gate_logit_normalizer: divides the log decay, so that decays start close to 1.
        feature_map: ``swish``, ``relu`` or ``t2r``, of queries and keys.
        use_output_gate, use_norm: taken for FLA's sake, whose layer heeds neither: there is always
            the norm and never a gate.
        layer_idx: place in the cache; needed to use one.
        scale: of the slots' scores. None: ``K ** -0.5``.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode or feature map.

    Source: Gated Slot Attention for Efficient Linear-Time Sequence Modeling, arXiv:2409.07146.

    Example:
        >>> layer = GatedSlotAttention(hidden_size=64, num_heads=2, num_slots=16)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        num_slots: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 8,
        feature_map: str = "swish",
        use_output_gate: bool = False,
        use_norm: bool = True,
        layer_idx: int | None = None,
        scale: float | None = 1.0,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.mode = check_mode(self, mode, ("chunk", "fused_recurrent"))
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                "GatedSlotAttention: num_heads must be a multiple of num_kv_heads, "
                f"got {num_heads} and {num_kv_heads}"
            )
        if feature_map not in ("swish", "relu", "t2r"):
            raise ValueError(
                f"GatedSlotAttention: feature_map must be swish, relu or t2r, got {feature_map!r}"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.key_dim = width_of(self, "expand_k", hidden_size, expand_k, num_heads)
        self.value_dim = width_of(self, "expand_v", hidden_size, expand_v, num_heads)
        self.head_k_dim = self.key_dim // num_heads
        self.head_v_dim = self.value_dim // num_heads
        self.num_slots = self.head_k_dim if num_slots is None else num_slots
        self.gate_logit_normalizer = gate_logit_normalizer
        self.scale = scale
        self.feature_map = feature_map_by_name(feature_map, self.head_k_dim)
        k_width, v_width = self.head_k_dim * num_kv_heads, self.head_v_dim * num_kv_heads
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, k_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, v_width, bias=False)
        self.f_proj = nn.Linear(hidden_size, num_kv_heads * self.num_slots, bias=False)
        if use_short_conv:
            add_convs(self, {"q": self.key_dim, "k": k_width, "v": v_width}, conv_size, conv_bias)
        self.g_norm = RMSNorm(self.value_dim, elementwise_affine, norm_eps, dtype=torch.float32)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        K = self.head_k_dim
        dims = {"q": K, "k": K, "v": self.head_v_dim, "f": self.num_slots}
        q, k, v, f = project(self, x, call, dims)
        q, k = self.feature_map.queries(q), self.feature_map.keys(k)
        g = F.logsigmoid(wide(f)) / self.gate_logit_normalizer
        s = (-g.expm1()).to(q.dtype)
        o = call.run(chunk_gsa, gsa_step, q, k, F.silu(v), s, g, scale=self.scale)
        y: Tensor = self.o_proj(self.g_norm(F.silu(o.flatten(-2))))
        return y
