"""ReGLA's mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import RMSNorm
from ..ops import chunk_regla, regla_step
from ._gated import add_convs, project
from .recurrent import Call, RecurrentLayer, width_of

__all__ = ["ReGLA"]


class ReGLA(RecurrentLayer):
    """Gated linear attention with exponential feature maps and a gate that does not saturate.

    Args:
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: heads.
        use_short_conv: put a short causal convolution with SiLU behind the q, k, v projections.
        conv_size, conv_bias: its taps, and whether it has a bias.
        elementwise_affine, norm_eps: of the norm of each head's output. It also cancels the
            feature map's shift of keys, which makes outputs small: ``norm_eps`` must be smaller.
        layer_idx: place in the cache; needed to use one.

    FLA has no such layer. ``g_proj`` makes the gate, ``r_proj`` the one that refines it, and
    ``q_map``, ``k_map`` are the feature maps' matrices, shared by all heads.

    Raises:
        ValueError: sizes that do not divide.

    Source: ReGLA: Refining Gated Linear Attention, arXiv:2502.01578.

    Example:
        >>> layer = ReGLA(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-8,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.num_heads = num_heads
        self.key_dim = width_of(self, "expand_k", hidden_size, expand_k, num_heads)
        self.value_dim = width_of(self, "expand_v", hidden_size, expand_v, num_heads)
        self.head_k_dim = self.key_dim // num_heads
        self.head_v_dim = self.value_dim // num_heads
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.g_proj = nn.Linear(hidden_size, self.key_dim, bias=True)
        self.r_proj = nn.Linear(hidden_size, self.key_dim, bias=True)
        self.q_map = nn.Linear(self.head_k_dim, self.head_k_dim, bias=False)
        self.k_map = nn.Linear(self.head_k_dim, self.head_k_dim, bias=False)
        if use_short_conv:
            widths = {"q": self.key_dim, "k": self.key_dim, "v": self.value_dim}
            add_convs(self, widths, conv_size, conv_bias)
        self.norm = RMSNorm(self.head_v_dim, elementwise_affine, norm_eps, dtype=torch.float32)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        K = self.head_k_dim
        dims = {"q": K, "k": K, "v": self.head_v_dim, "g": K, "r": K}
        q, k, v, g, r = project(self, x, call, dims)
        o = call.run(chunk_regla, regla_step, self.q_map(q), self.k_map(k), v, g, r)
        y: Tensor = self.o_proj(self.norm(o).flatten(-2))
        return y
