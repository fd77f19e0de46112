"""The gated linear attention layer, compatible with FLA's checkpoints."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.precision import wide
from ..ops import chunk_gla, gla_step
from .common import split_heads
from .recurrent import Call, QKVLayer, check_mode

__all__ = ["GatedLinearAttention"]


class GatedLinearAttention(QKVLayer):
    r"""Gated linear attention with low-rank decay gates and a gated output norm.

    Args:
        mode: ``chunk``, ``fused_recurrent`` or ``fused_chunk``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: query heads H.
        num_kv_heads: key, value and gate heads; each serves ``H // num_kv_heads`` query heads.
            Default: H.
        feature_map: name of the feature map of queries and keys (``modules.FEATURE_MAPS``), one
            that keeps their width.
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
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            expand_k,
            expand_v,
            use_short_conv,
            conv_size,
            conv_bias,
            layer_idx,
        )
        self.mode = check_mode(self, mode)
        self.gate_logit_normalizer = gate_logit_normalizer
        self.clamp_min = clamp_min
        self._add_feature_map(feature_map)
        self._add_output_gate(use_output_gate, gate_fn, elementwise_affine, norm_eps, fuse_norm)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False),
            nn.Linear(gate_low_rank_dim, self.head_k_dim * self.num_kv_heads, bias=True),
        )

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self._qkv(x, call)
        return self._gate_output(call.run(chunk_gla, gla_step, q, k, v, self._log_decay(x)), x)

    def _log_decay(self, x: Tensor) -> Tensor:
        """``[B, T, H, K]``; fp32, because errors of a log decay add up over time."""
        g = F.logsigmoid(wide(self.gk_proj(x))) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            g = g.clamp_min(self.clamp_min)
        return split_heads(g, self.head_k_dim, self.num_kv_groups)
