"""MetaLA's mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FusedRMSNormGated, ShortConvolution
from ..modules.precision import wide
from ..ops import chunk_metala, metala_step
from ._gated import project
from .common import split_heads
from .recurrent import Call, RecurrentLayer, width_of

__all__ = ["MetaLA"]


class MetaLA(RecurrentLayer):
    """Linear attention without keys: a dynamic decay, and the own token's augmentation.

    Args:
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: heads.
        use_short_conv: mix neighbouring tokens by a short causal convolution before everything
            else, ``conv1d``.
        conv_size, conv_bias: its taps, and whether it has a bias.
        gate_low_rank_dim: rank of the decay gate's projection.
        gate_logit_normalizer: divides the log decay, so that decays start close to 1.
        elementwise_affine, norm_eps: of the output norm.
        layer_idx: place in the cache; needed to use one.

    FLA has no such layer; parameters are named as in its gated linear attention, and ``w_aug
    [num_heads, K]`` weighs the augmentation.

    Raises:
        ValueError: sizes that do not divide.

    Source: MetaLA: Unified Optimal Linear Approximation to Softmax Attention Map, arXiv:2411.10741.

    Example:
        >>> layer = MetaLA(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: int = 16,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.num_heads = num_heads
        self.key_dim = width_of(self, "expand_k", hidden_size, expand_k, num_heads)
        self.value_dim = width_of(self, "expand_v", hidden_size, expand_v, num_heads)
        self.head_k_dim = self.key_dim // num_heads
        self.head_v_dim = self.value_dim // num_heads
        self.gate_logit_normalizer = gate_logit_normalizer
        self.conv1d = None
        if use_short_conv:
            self.conv1d = ShortConvolution(hidden_size, conv_size, conv_bias)
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False),
            nn.Linear(gate_low_rank_dim, self.key_dim, bias=True),
        )
        self.w_aug = nn.Parameter(torch.zeros(num_heads, self.head_k_dim))
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.g_norm_swish_gate = FusedRMSNormGated(self.head_v_dim, elementwise_affine, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        if self.conv1d is not None:
            x = call.convolve(self.conv1d, x)
        dims = {"q": self.head_k_dim, "gk": self.head_k_dim, "v": self.head_v_dim}
        q, f, v = project(self, x, call, dims)
        g = F.logsigmoid(wide(f)) / self.gate_logit_normalizer
        o = call.run(chunk_metala, metala_step, q, v, g, w_aug=self.w_aug)
        gate = split_heads(self.g_proj(x), self.head_v_dim)
        y: Tensor = self.o_proj(self.g_norm_swish_gate(o, gate).flatten(-2))
        return y
