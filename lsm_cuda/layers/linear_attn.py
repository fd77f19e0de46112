"""Linear attention without a decay, behind any feature map."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import RMSNorm
from ..modules.feature_map import feature_map as feature_map_by_name
from ..ops import chunk_linear_attn, linear_attn_step
from .recurrent import Call, QKVLayer, check_mode

__all__ = ["LinearAttention"]


class LinearAttention(QKVLayer):
    """Linear attention with a feature map, and a norm or a denominator or both.

    Args:
        mode: ``chunk``, ``fused_recurrent`` or ``fused_chunk``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: query heads H.
        num_kv_heads: key and value heads; each serves ``H // num_kv_heads`` query heads.
            Default: H.
        feature_map: a name of ``modules.FEATURE_MAPS``.
        tie_feature_map_qk: one map for queries and keys; maps along random directions always are.
        output_norm: ``rmsnorm`` per head, or ``identity``.
        norm_q, norm_k: divide queries, keys by the sum of their features plus 1e-4.
        do_feature_map_norm: divide by the sum of the scores. Scores are scaled by one over the
            root of the number of features, which matters only without this and without a norm.
        elementwise_affine, norm_eps: of the output norm.
        feature_map_options: further arguments of the map, such as cosFormer's ``max_len``.
        layer_idx: place in the cache; needed to use one.

    With ``elu``, ``rmsnorm`` and no denominator this is the NormAttention of TransNormer.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode, map or norm.

    Source: Transformers are RNNs, arXiv:2006.16236; The Devil in Linear Transformer (TransNormer),
    arXiv:2210.10340.

    Example:
        >>> layer = LinearAttention(hidden_size=64, num_heads=2, feature_map="hedgehog")
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str = "elementwise_product",
        tie_feature_map_qk: bool = False,
        output_norm: str = "rmsnorm",
        norm_q: bool = False,
        norm_k: bool = False,
        do_feature_map_norm: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        feature_map_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, num_kv_heads, expand_k, expand_v, layer_idx=layer_idx
        )
        self.mode = check_mode(self, mode)
        self.norm_q = norm_q
        self.norm_k = norm_k
        self.do_feature_map_norm = do_feature_map_norm
        build = functools.partial(
            feature_map_by_name, feature_map, self.head_k_dim, **(feature_map_options or {})
        )
        self.feature_map_q = build()
        tie = tie_feature_map_qk or self.feature_map_q.shared
        self.feature_map_k = self.feature_map_q if tie else build()
        self.norm: nn.Module
        if output_norm == "rmsnorm":
            self.norm = RMSNorm(self.head_v_dim, elementwise_affine, norm_eps, dtype=torch.float32)
        elif output_norm == "identity":
            self.norm = nn.Identity()
        else:
            raise ValueError(
                f"LinearAttention: output_norm must be rmsnorm or identity, got {output_norm!r}"
            )

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self._qkv(x, call)
        offset: int | Tensor = 0
        if self.feature_map_q.positional:
            positions = call.positions()
            offset = 0 if call.fresh else positions
        q, k = self.feature_map_q.queries(q, offset), self.feature_map_k.keys(k, offset)
        if self.norm_q:
            q = q / (q.sum(-1, keepdim=True) + 1e-4)
        if self.norm_k:
            k = k / (k.sum(-1, keepdim=True) + 1e-4)
        chunk = functools.partial(chunk_linear_attn, normalize=self.do_feature_map_norm)
        o = call.run(chunk, linear_attn_step, q.to(v.dtype), k.to(v.dtype), v)
        y: Tensor = self.o_proj(self.norm(o).flatten(-2))
        return y
