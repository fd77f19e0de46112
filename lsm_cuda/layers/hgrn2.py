"""HGRN2: keys are what the forget gate lets in; compatible with FLA's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Cache
from ..modules import RMSNorm
from ..modules.precision import wide
from ..ops import chunk_hgrn2, hgrn2_step
from ._gated import add_convs, heads_and_ratio, project
from .recurrent import Call, RecurrentLayer, check_mode

__all__ = ["HGRN2Attention"]


class HGRN2Attention(RecurrentLayer):
    """Gated linear RNN whose state is expanded by outer products.

    Args:
        mode: ``chunk``, ``fused_recurrent`` or ``fused_chunk``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        num_heads: heads; used only with ``expand_ratio=None``.
        expand_ratio: key channels per head; ``hidden_size // expand_ratio`` heads. None: as many
            as value channels.
        use_short_conv: put a short causal convolution behind the projections.
        conv_size, conv_bias: its taps, and whether it has a bias.
        elementwise_affine, norm_eps: of the output norm.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode.

    Source: HGRN2: Gated Linear RNNs with State Expansion, arXiv:2404.07904.

    Example:
        >>> layer = HGRN2Attention(hidden_size=64, expand_ratio=16)
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
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.mode = check_mode(self, mode)
        if expand_ratio is not None:
            num_heads = None
        self.num_heads, self.expand_ratio = heads_and_ratio(
            self, hidden_size, num_heads, expand_ratio
        )
        self.head_i_dim = hidden_size // self.num_heads
        forget_dim = self.num_heads * self.expand_ratio
        self.q_proj = nn.Linear(hidden_size, forget_dim, bias=False)
        self.f_proj = nn.Linear(hidden_size, forget_dim, bias=False)
        self.i_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if use_short_conv:
            widths = {"q": forget_dim, "f": forget_dim, "i": hidden_size}
            add_convs(self, widths, conv_size, conv_bias, None)
        self.g_norm = RMSNorm(hidden_size, elementwise_affine, norm_eps, dtype=torch.float32)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
        lower_bound: Tensor | None = None,
    ) -> tuple[Tensor, None, Cache | None]:
        """Mix along time; arguments, results and errors as :class:`GatedLinearAttention`.

        ``lower_bound [num_heads · expand_ratio]``, in [0, 1): forget gates stay above it, except in
        layer 0.
        """
        call = Call(self, hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens)
        return call.finish(self._mix(call.x, call, lower_bound)), None, past_key_values

    def _mix(self, x: Tensor, call: Call, lower_bound: Tensor | None = None) -> Tensor:
        dims = {"q": self.expand_ratio, "f": self.expand_ratio, "i": self.head_i_dim}
        q, f, v = project(self, x, call, dims)
        g = F.logsigmoid(wide(f))
        if lower_bound is not None and self.layer_idx != 0:
            low = lower_bound.to(g.dtype).view(self.num_heads, self.expand_ratio)
            g = torch.logaddexp(low.log(), (-low).log1p() + g)
        o = call.run(chunk_hgrn2, hgrn2_step, F.silu(q), v, g)
        y: Tensor = self.o_proj(self.g_norm(o.flatten(-2)))
        return y
