"""HGRN: a gated linear recurrence, channel by channel; compatible with FLA's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Cache
from ..modules import FusedRMSNormGated
from ..modules.precision import wide
from ..ops import chunk_hgrn, hgrn_step
from ._gated import add_convs
from .recurrent import Call, RecurrentLayer, check_mode

__all__ = ["HGRNAttention"]


class HGRNAttention(RecurrentLayer):
    """``h_t = f_t ⊙ h_{t−1} + (1 − f_t) ⊙ silu(i_t)``, with forget gates that grow with depth.

    Args:
        mode: ``fused_recurrent`` or ``chunk``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        expand_ratio: width of the state in units of ``hidden_size``.
        use_short_conv: put a short causal convolution behind the projections.
        conv_size, conv_bias: its taps, and whether it has a bias.
        elementwise_affine, norm_eps: of the output norm.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: an unknown mode.

    Source: Hierarchically Gated Recurrent Neural Network, arXiv:2311.04823.

    Example:
        >>> layer = HGRNAttention(hidden_size=64)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_ratio: int | None = 1,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.mode = check_mode(self, mode, ("chunk", "fused_recurrent"))
        self.input_dim = int(hidden_size * (1 if expand_ratio is None else expand_ratio))
        self.i_proj = nn.Linear(hidden_size, self.input_dim, bias=False)
        self.f_proj = nn.Linear(hidden_size, self.input_dim, bias=False)
        self.g_proj = nn.Linear(hidden_size, self.input_dim, bias=False)
        self.use_short_conv = use_short_conv
        if use_short_conv:
            widths = {"i": self.input_dim, "f": self.input_dim}
            add_convs(self, widths, conv_size, conv_bias, None)
        self.g_norm = FusedRMSNormGated(self.input_dim, elementwise_affine, norm_eps)
        self.o_proj = nn.Linear(self.input_dim, hidden_size, bias=False)

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

        ``lower_bound [width of the state]``, in [0, 1): forget gates stay above it, except in
        layer 0.
        """
        call = Call(self, hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens)
        return call.finish(self._mix(call.x, call, lower_bound)), None, past_key_values

    def _mix(self, x: Tensor, call: Call, lower_bound: Tensor | None = None) -> Tensor:
        i, f = self.i_proj(x), self.f_proj(x)
        if self.use_short_conv:
            convs = self.get_submodule("i_conv1d"), self.get_submodule("f_conv1d")
            i, f = (call.convolve(c, y) for c, y in zip(convs, (i, f), strict=True))
        f = wide(f)
        g, closed = F.logsigmoid(f), (-f).sigmoid()  # log f and 1 − f
        if lower_bound is not None and self.layer_idx != 0:
            low = lower_bound.to(g.dtype)
            g = torch.logaddexp(low.log(), (-low).log1p() + g)
            closed = (1 - low) * closed
        h = call.run(chunk_hgrn, hgrn_step, (F.silu(i) * closed.to(i.dtype)), g)
        o: Tensor = self.o_proj(self.g_norm(h, self.g_proj(x)))
        return o
