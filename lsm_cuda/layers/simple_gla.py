"""Gated linear attention with one decay per head and token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.precision import wide
from ..ops import chunk_simple_gla, simple_gla_step
from .recurrent import Call, QKVLayer, check_mode

__all__ = ["SimpleGatedLinearAttention"]


class SimpleGatedLinearAttention(QKVLayer):
    """Gated linear attention whose decay is one number per head and token.

    Args:
        mode: ``chunk``, ``fused_recurrent`` or ``fused_chunk``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: query heads H.
        num_kv_heads: key and value heads; each serves ``H // num_kv_heads`` query heads.
            Default: H.
        feature_map: name of a feature map of queries and keys that keeps their width.
        use_short_conv: put a short causal convolution with SiLU behind the q, k, v projections.
        conv_size, conv_bias: its taps, and whether it has a bias.
        gate_fn: activation of the output gate.
        elementwise_affine, norm_eps: of the output norm.
        gate_logit_normalizer: divides the log decay, so that decays start close to 1.
        fuse_norm: one module for norm and ``swish`` gate (decides the parameter's name only).
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode, map or activation.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635,
    with the decay of Mamba-2, arXiv:2405.21060.

    Example:
        >>> layer = SimpleGatedLinearAttention(hidden_size=64, num_heads=2)
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
        feature_map: str | None = None,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 16,
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
        self._add_feature_map(feature_map)
        self._add_output_gate(True, gate_fn, elementwise_affine, norm_eps, fuse_norm)
        self.gk_proj = nn.Linear(hidden_size, num_heads)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self._qkv(x, call)
        g = F.logsigmoid(wide(self.gk_proj(x))) / self.gate_logit_normalizer
        return self._gate_output(call.run(chunk_simple_gla, simple_gla_step, q, k, v, g), x)
