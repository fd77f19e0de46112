"""Longhorn: the block of Mamba around an online learner."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ShortConvolution
from ..modules.precision import wide
from ..ops import chunk_longhorn, longhorn_step
from .common import split_heads
from .recurrent import Call, RecurrentLayer

__all__ = ["Longhorn"]

_WIDEST = 128


class Longhorn(RecurrentLayer):
    r"""Longhorn between two projections, with a gate beside it.

    Args:
        hidden_size: width of input and output.
        state_size: channels of queries and keys, which all channels share.
        conv_kernel: taps of the short convolution.
        expand: inner width in units of ``hidden_size``.
        time_step_rank: rank of the step sizes' projection. Default: ``hidden_size / 16``, rounded
            up.
        use_conv_bias, use_bias: biases in the convolution and the projections.
        num_heads: heads that the inner channels are split into, which makes no difference to the
            result. Default: so many that each has up to 128.
        diagonal: the released models' form, else the exact one of :func:`chunk_longhorn`.
        layer_idx: place in the cache; needed to use one.

    ``in_proj``, ``conv1d``, ``x_proj``, ``dt_head``, ``D`` and ``out_proj`` are the parameters of
    the authors' code.

    Raises:
        ValueError: an inner width that is no positive integer.

    Source: Longhorn: State Space Models are Amortized Online Learners, arXiv:2407.14207.

    Example:
        >>> layer = Longhorn(hidden_size=64)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: float = 2,
        time_step_rank: int | None = None,
        use_conv_bias: bool = True,
        use_bias: bool = False,
        num_heads: int | None = None,
        diagonal: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        inner = round(expand * hidden_size)
        if inner < 1 or abs(inner - expand * hidden_size) > 1e-6:
            raise ValueError(
                f"Longhorn: hidden_size * expand must be a multiple of 1, got {hidden_size} * "
                f"{expand}"
            )
        rank = math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank
        self.intermediate_size = inner
        if num_heads is None:
            widest = next(d for d in range(min(_WIDEST, inner), 0, -1) if inner % d == 0)
            num_heads = inner // widest
        if num_heads < 1 or inner % num_heads:
            raise ValueError(
                f"Longhorn: hidden_size * expand must be a multiple of num_heads, got {hidden_size}"
                f" * {expand} and {num_heads}"
            )
        self.head_dim = inner // num_heads
        self.widths = [rank, state_size, state_size]
        self.diagonal = diagonal
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=use_bias)
        self.conv1d = ShortConvolution(inner, conv_kernel, use_conv_bias)
        self.x_proj = nn.Linear(inner, sum(self.widths), bias=False)
        self.dt_head = nn.Linear(rank, inner, bias=True)
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden_size, bias=use_bias)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)
        x = call.convolve(self.conv1d, x)
        dt, k, q = torch.split(self.x_proj(x), self.widths, -1)
        beta = split_heads(wide(self.dt_head(dt)).sigmoid(), self.head_dim)
        q, k, v = q.unsqueeze(2), k.unsqueeze(2), split_heads(x, self.head_dim)
        o = call.run(chunk_longhorn, longhorn_step, q, k, v.to(q), beta, diagonal=self.diagonal)
        o = o.flatten(-2) + self.D.to(o.dtype) * x
        y: Tensor = self.out_proj(o * F.silu(z))
        return y
