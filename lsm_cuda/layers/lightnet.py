"""LightNet's mixer, compatible with FLA's checkpoints."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FusedRMSNormGated
from ..ops import chunk_lightnet, lightnet_step
from ._gated import add_convs, heads_and_ratio, project
from .recurrent import Call, RecurrentLayer, check_mode

__all__ = ["LightNetAttention"]


class LightNetAttention(RecurrentLayer):
    """Linear attention whose keys are a softmax over the tokens so far.

    Args:
        mode: ``chunk`` or ``fused_recurrent``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        num_heads: heads. Default: ``hidden_size // expand_ratio``.
        expand_ratio: key channels per head. None: as many as value channels.
        use_short_conv: put a short causal convolution behind the q, k, v projections.
        conv_size, conv_bias: its taps, and whether it has a bias.
        gate_low_rank_dim: rank of the output gate's projection.
        elementwise_affine, norm_eps: of the output norm.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode.

    Source: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet,
    arXiv:2405.21022.

    Example:
        >>> layer = LightNetAttention(hidden_size=64, expand_ratio=16)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        num_heads: int | None = None,
        expand_ratio: int | None = 128,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        gate_low_rank_dim: int = 128,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.mode = check_mode(self, mode, ("chunk", "fused_recurrent"))
        self.num_heads, self.expand_ratio = heads_and_ratio(
            self, hidden_size, num_heads, expand_ratio
        )
        self.head_i_dim = hidden_size // self.num_heads
        key_dim = self.num_heads * self.expand_ratio
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if use_short_conv:
            widths = {"q": key_dim, "k": key_dim, "v": hidden_size}
            add_convs(self, widths, conv_size, conv_bias, None)
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False),
            nn.Linear(gate_low_rank_dim, hidden_size, bias=False),
        )
        self.g_norm = FusedRMSNormGated(hidden_size, elementwise_affine, norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        K = self.expand_ratio
        q, k, v = project(self, x, call, {"q": K, "k": K, "v": self.head_i_dim})
        o = call.run(chunk_lightnet, lightnet_step, F.silu(q), k, v)
        y: Tensor = self.o_proj(self.g_norm(o.flatten(-2), self.g_proj(x)))
        return y
