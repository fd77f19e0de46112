"""Random feature attention, gated or not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import RFAFeatureMap
from ..modules.precision import wide
from ..ops import chunk_linear_attn, chunk_rfa, linear_attn_step, rfa_step
from .recurrent import Call, QKVLayer

__all__ = ["RandomFeatureAttention"]


class RandomFeatureAttention(QKVLayer):
    """Attention with random Fourier features, as a moving average if gated.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads H.
        num_kv_heads: key and value heads; each serves ``H // num_kv_heads`` query heads.
            Default: H.
        num_features: random directions m; features 2 m. Default: channels of a head.
        sigma, learn_sigma: of :class:`modules.RFAFeatureMap`.
        use_gate: RFA-Gate: a forget gate per head and token, ``f_proj``, whose complement weighs
            what is written.
        eps: least size of the denominator, which may cross zero, scores having both signs.
        layer_idx: place in the cache; needed to use one.

    The directions are a buffer, ``feature_map.projection``, part of the state dict.

    Raises:
        ValueError: sizes that do not divide.

    Source: Random Feature Attention, arXiv:2103.02143, sections 3.1 and 3.2.

    Example:
        >>> layer = RandomFeatureAttention(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        num_features: int | None = None,
        sigma: float = 1.0,
        learn_sigma: bool = False,
        use_gate: bool = True,
        eps: float = 1e-6,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, layer_idx=layer_idx)
        self.eps = eps
        self.feature_map = RFAFeatureMap(self.head_k_dim, num_features, sigma, learn_sigma)
        self.f_proj = nn.Linear(hidden_size, num_heads) if use_gate else None

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self._qkv(x, call)
        q, k = self.feature_map(q), self.feature_map(k)
        if self.f_proj is None:
            o = call.run(chunk_linear_attn, linear_attn_step, q, k, v, scale=1.0, eps=self.eps)
        else:
            g = F.logsigmoid(wide(self.f_proj(x)))
            o = call.run(chunk_rfa, rfa_step, q, k, v, g, scale=1.0, eps=self.eps)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y
