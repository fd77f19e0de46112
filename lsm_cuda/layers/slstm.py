"""The sLSTM layer of xLSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import ShortConvolution
from ..ops import slstm, slstm_step
from .common import split_heads
from .mlstm import MultiHeadLayerNorm
from .recurrent import Call, RecurrentLayer

__all__ = ["SLSTM"]


class HeadwiseLinear(nn.Module):
    """A linear map of every head on its own, ``weight [H, D, D]``."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))
        nn.init.normal_(self.weight, std=(2 / (5 * hidden_size)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H · D]`` to ``[..., H, D]``."""
        heads = split_heads(x, self.weight.shape[-1])
        return torch.einsum("...hd,hed->...he", heads, self.weight)


class CausalConv1d(nn.Module):
    """xLSTM's name for a short convolution: its parameters lie in ``conv``."""

    def __init__(self, hidden_size: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = ShortConvolution(hidden_size, kernel_size, bias=True)


class SLSTMCell(nn.Module):
    """The recurrent weights and the biases, in the layout of xLSTM's CUDA cells."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self._recurrent_kernel_ = nn.Parameter(torch.zeros(num_heads, head_dim, 4 * head_dim))
        bias = torch.zeros(num_heads, 4, head_dim)
        bias[:, 1] = torch.linspace(3, 6, head_dim)  # memories start long
        self._bias_ = nn.Parameter(bias.flatten())


class SLSTM(RecurrentLayer):
    """xLSTM's scalar memory: a short convolution, gates per head, the cell, and a norm per head.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        conv1d_kernel_size: taps of the convolution in front of the input and forget gates; 0: none.
        norm_eps: of the norm.
        layer_idx: place in the cache; needed to use one.

    Parameters are those of NX-AI's ``sLSTMLayer`` with the CUDA cell, whose ``fgate`` makes the
    input gate and whose ``igate`` the forget gate; its norm's weight is stored without the 1 that
    is added.

    Raises:
        ValueError: sizes that do not divide.

    Source: xLSTM, arXiv:2405.04517, figure 10.

    Example:
        >>> layer = SLSTM(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 4,
        conv1d_kernel_size: int = 4,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        if hidden_size % num_heads:
            raise ValueError(
                f"SLSTM: hidden_size must be a multiple of num_heads, "
                f"got {hidden_size} and {num_heads}"
            )
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.conv1d = CausalConv1d(hidden_size, conv1d_kernel_size) if conv1d_kernel_size else None
        self.fgate = HeadwiseLinear(hidden_size, num_heads)
        self.igate = HeadwiseLinear(hidden_size, num_heads)
        self.zgate = HeadwiseLinear(hidden_size, num_heads)
        self.ogate = HeadwiseLinear(hidden_size, num_heads)
        self.slstm_cell = SLSTMCell(num_heads, self.head_dim)
        self.group_norm = MultiHeadLayerNorm(hidden_size, norm_eps, bias=False, residual=True)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        convolved = x if self.conv1d is None else call.convolve(self.conv1d.conv, x)
        H, D = self.num_heads, self.head_dim
        gates = [
            self.fgate(convolved), self.igate(convolved), self.zgate(x), self.ogate(x)
        ]  # fmt: skip
        bias = self.slstm_cell._bias_.view(H, 4, D).transpose(0, 1)
        raw = torch.stack(gates, 2)
        raw = raw + bias.to(raw.dtype)
        R = self.slstm_cell._recurrent_kernel_.view(H, D, 4, D)
        h = call.run(slstm, slstm_step, raw, R=R)
        o: Tensor = self.group_norm(h)
        return o
