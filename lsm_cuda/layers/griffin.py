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
        param, beginning = self.rg_lru.recurrent_param, call.yet_to_begin()

        def chunk(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
            return _run(*tensors, beginning=beginning, **options)

        def step(x: Tensor, i: Tensor, r: Tensor, *, state: Tensor, **options: Any) -> Tensor:
            if beginning is not None:
                start = _before_first(x, i, r, param, state)
                state.copy_(torch.where(beginning[:, None], start, state))
            return rg_lru_step(x, i, r, state=state, **options)

        h = call.run(chunk, step, u, i, r, param=param)
        o: Tensor = self.linear_out(h * gate)
        return o


def _run(
    x: Tensor,
    i: Tensor,
    r: Tensor,
    *,
    param: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    beginning: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`rg_lru`, with the rule for first tokens in the sequences that are ``beginning`` too.

    A call without tokens begins none: it leaves no state.
    """
    T = x.shape[1]
    if beginning is not None and initial_state is not None and T:
        first: Any
        if cu_seqlens is None:
            first = (slice(None), 0)
        else:
            first = (0, cu_seqlens[:-1].clamp(max=T - 1))
            beginning = beginning & (cu_seqlens.diff() > 0)
        start = _before_first(x[first], i[first], r[first], param, initial_state)
        initial_state = torch.where(beginning[:, None], start, initial_state)
    h, state = rg_lru(x, i, r, param, initial_state, output_final_state, cu_seqlens)
    return h, state if T or initial_state is not None else None


def _before_first(x: Tensor, i: Tensor, r: Tensor, param: Tensor, like: Tensor) -> Tensor:
    """The state before a first token that makes the general rule give what the rule for first
    tokens does: with m the root, ``a h + m σ(i) x = σ(i) x`` for ``h = a / (1 + m) σ(i) x``."""
    x, i, r, param = (t.to(like.dtype) for t in (x, i, r, param))
    log_a = -8.0 * F.softplus(param) * r.sigmoid()
    m = (-torch.expm1(2 * log_a)).clamp(min=1e-30).sqrt()  # a slope, if masked, must be finite
    return log_a.exp() / (1 + m) * i.sigmoid() * x
