"""What the layers around the delta rule share: projections, decays and the output norm."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FusedRMSNormGated, RMSNorm
from ..ops.gates import unit_rows
from ._gated import add_convs, project
from .common import split_heads
from .recurrent import Call, RecurrentLayer, check_mode, width_of

__all__ = ["DeltaLayer", "mamba_decay"]


class DeltaLayer(RecurrentLayer):
    """Projections to q, k and v with SiLU behind them, and back through a norm per head.

    Args:
        mode: ``chunk`` or ``fused_recurrent``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        expand_v: value channels per head in units of ``head_dim``.
        head_dim: query and key channels per head.
        num_heads: query and key heads.
        num_v_heads: value heads, a multiple of them. Default: as many.
        use_short_conv, conv_size, conv_bias: a short causal convolution before the SiLU.
        layer_idx: place in the cache; needed to use one.
        steps: keys and values per token.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode.
    """

    def __init__(
        self,
        mode: str,
        hidden_size: int,
        expand_v: float,
        head_dim: int,
        num_heads: int,
        num_v_heads: int | None,
        use_short_conv: bool,
        conv_size: int,
        conv_bias: bool,
        layer_idx: int | None,
        steps: int = 1,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        name = type(self).__name__
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        if num_v_heads % num_heads:
            raise ValueError(
                f"{name}: num_v_heads must be a multiple of num_heads, "
                f"got {num_v_heads} and {num_heads}"
            )
        self.mode = check_mode(self, mode, ("chunk", "fused_recurrent"))
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.head_dim = self.head_k_dim = head_dim
        self.key_dim = num_heads * head_dim
        self.value_dim = width_of(self, "expand_v", num_v_heads * head_dim, expand_v, num_v_heads)
        self.head_v_dim = self.value_dim // num_v_heads
        self.steps = steps
        self.use_short_conv = use_short_conv
        widths = {"q": self.key_dim, "k": self.key_dim * steps, "v": self.value_dim * steps}
        for letter, width in widths.items():
            self.add_module(f"{letter}_proj", nn.Linear(hidden_size, width, bias=False))
        if use_short_conv:
            add_convs(self, widths, conv_size, conv_bias)

    def _add_output(self, use_gate: bool, norm_eps: float, activation: str = "swish") -> None:
        """``g_proj``, ``o_norm`` and ``o_proj``."""
        if use_gate:
            self.g_proj: nn.Module = nn.Linear(self.hidden_size, self.value_dim, bias=False)
            self.o_norm: nn.Module = FusedRMSNormGated(
                self.head_v_dim, eps=norm_eps, activation=activation
            )
        else:
            self.o_norm = RMSNorm(self.head_v_dim, eps=norm_eps, dtype=torch.float32)
        self.o_proj = nn.Linear(self.value_dim, self.hidden_size, bias=False)

    def _add_decay(self) -> None:
        """``a_proj``, ``A_log`` and ``dt_bias`` of one decay per value head."""
        self.a_proj = nn.Linear(self.hidden_size, self.num_v_heads, bias=False)
        self.A_log, self.dt_bias = mamba_decay(self.num_v_heads, self.num_v_heads)

    def _qkv(
        self, x: Tensor, call: Call, unit_length: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, H, K]``, ``[B, T, steps · H, K]``, ``[B, T, steps · HV, V]``; q and k of unit
        length, in the pass of the convolution if there is one."""
        K, V = self.head_k_dim, self.head_v_dim
        q, k, v = project(self, x, call, {"q": K, "k": K, "v": V}, unit="qk" if unit_length else "")
        if not self.use_short_conv:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
            if unit_length:
                q, k = unit_rows(q, k)
        return q, k, v

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        if isinstance(self.o_norm, FusedRMSNormGated):
            y = self.o_norm(o, split_heads(self.g_proj(x), self.head_v_dim))
        else:
            y = self.o_norm(o)
        result: Tensor = self.o_proj(y.flatten(-2))
        return result


def mamba_decay(heads: int, channels: int, least: float = 0.0) -> tuple[nn.Parameter, nn.Parameter]:
    """``A_log [heads]`` of rates uniform in ``least`` to 16, and ``dt_bias [channels]`` whose
    softplus is log-uniform in 0.001 to 0.1: Mamba-2's initial values."""
    rate = torch.empty(heads).uniform_(least, 16).clamp(min=1e-4)
    dt = torch.empty(channels).uniform_(math.log(1e-3), math.log(0.1)).exp()
    return nn.Parameter(rate.log()), nn.Parameter(dt + (-(-dt).expm1()).log())
