"""Griffin's recurrent block; compatible with transformers' RecurrentGemma."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ShortConvolution
from ..ops import rg_lru, rg_lru_step
from .common import split_heads
from .recurrent import Call, RecurrentLayer

__all__ = ["RGLRUBlock"]


class RGLRU(nn.Module):
    """The unit's parameters: Λ, and the gates' weights, block-diagonal over heads."""

    def __init__(self, lru_width: int, num_heads: int) -> None:
        super().__init__()
        width = lru_width // num_heads
        decay = torch.empty(lru_width).uniform_(0.9**2, 0.999**2).log() / 2  # log a, a open
        self.recurrent_param = nn.Parameter((-decay / 8).expm1().log())
        for name in ("input_gate", "recurrent_gate"):
            weight = torch.randn(num_heads, width, width) * width**-0.5
            self.register_parameter(f"{name}_weight", nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(num_heads, width)))

    def gate(self, name: str, x: Tensor) -> Tensor:
        """Logits ``[B, T, lru_width]``."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        heads = split_heads(x, weight.shape[1])
        logits: Tensor = torch.einsum("...hd,hde->...he", heads, weight) + bias
        return logits.flatten(-2)


class RGLRUBlock(RecurrentLayer):
    """Two branches: one through a short convolution and the RG-LRU, one through a GELU, multiplied.

    Args:
        hidden_size: width of input and output.
        lru_width: width of the recurrence. Default: ``hidden_size``.
        num_heads: blocks of the gates' weights (transformers' ``num_attention_heads``).
        conv1d_width: taps of the convolution.
        layer_idx: place in the cache; needed to use one.

    Parameters are those of transformers' ``RecurrentGemmaRecurrentBlock``: ``linear_x``,
    ``linear_y``, ``linear_out``, ``conv_1d`` and ``rg_lru``.

    Raises:
        ValueError: sizes that do not divide.

    Note: the unit's rule for first tokens holds in a sequence's first call with a cache, also where
        that call had no tokens of it (a row of nothing but padding).

    Source: Griffin, arXiv:2402.19427, section 2.4.

    Example:
        >>> RGLRUBlock(hidden_size=64, num_heads=2)(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        lru_width: int | None = None,
        num_heads: int = 8,
        conv1d_width: int = 4,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        width = hidden_size if lru_width is None else lru_width
        if width % num_heads:
            raise ValueError(
                "RGLRUBlock: lru_width must be a multiple of num_heads, "
                f"got {width} and {num_heads}"
            )
        self.linear_y = nn.Linear(hidden_size, width)
        self.linear_x = nn.Linear(hidden_size, width)
        self.linear_out = nn.Linear(width, hidden_size)
        self.conv_1d = ShortConvolution(width, conv1d_width, bias=True, activation=None)
        self.rg_lru = RGLRU(width, num_heads)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        gate = F.gelu(self.linear_y(x), approximate="tanh")
        u = call.convolve(self.conv_1d, self.linear_x(x))
        i, r = self.rg_lru.gate("input_gate", u), self.rg_lru.gate("recurrent_gate", u)
        h = call.run(_begun, rg_lru_step, u, i, r, param=self.rg_lru.recurrent_param)
        o: Tensor = self.linear_out(h * gate)
        return o


def _begun(x: Tensor, i: Tensor, r: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`rg_lru`, except that a call without tokens begins no sequence: it leaves no state, so
    that the first token is yet to come."""
    h, state = rg_lru(x, i, r, **options)
    return h, state if x.shape[1] or options["initial_state"] is not None else None
