"""RWKV-4's time mixing, compatible with transformers' Rwkv, and the attention-free transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import aft_simple, wkv4, wkv4_step
from ._gated import TokenShift
from .recurrent import Call, RecurrentLayer

__all__ = ["AFTSimple", "RWKV4Attention"]


class RWKV4Attention(RecurrentLayer):
    """RWKV-4: shifted tokens, an average of values with fading weights, and a gate.

    Args:
        hidden_size: width of input and output.
        attention_hidden_size: width of keys and values. Default: ``hidden_size``.
        layer_idx: place in the cache; needed to use one.

    Parameters are those of transformers' ``RwkvSelfAttention``: ``time_decay``, ``time_first``,
    ``time_mix_key``, ``time_mix_value``, ``time_mix_receptance``, ``key``, ``value``,
    ``receptance`` and ``output``.

    Source: RWKV: Reinventing RNNs for the Transformer Era, arXiv:2305.13048, section 3.

    Example:
        >>> RWKV4Attention(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        attention_hidden_size: int | None = None,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        width = hidden_size if attention_hidden_size is None else attention_hidden_size
        # Memories from a hundred tokens to less than one.
        self.time_decay = nn.Parameter(torch.linspace(-5, 3, width))
        self.time_first = nn.Parameter(torch.full((width,), 0.3).log())
        for name in ("key", "value", "receptance"):
            mix = torch.linspace(0, 1, hidden_size)[None, None]
            self.register_parameter(f"time_mix_{name}", nn.Parameter(mix))
        self.time_shift = TokenShift()
        self.key = nn.Linear(hidden_size, width, bias=False)
        self.value = nn.Linear(hidden_size, width, bias=False)
        self.receptance = nn.Linear(hidden_size, width, bias=False)
        self.output = nn.Linear(width, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        delta = call.convolve(self.time_shift, x) - x
        k = self.key(x + delta * (1 - self.get_parameter("time_mix_key")))
        v = self.value(x + delta * (1 - self.get_parameter("time_mix_value")))
        r = self.receptance(x + delta * (1 - self.get_parameter("time_mix_receptance")))
        o = call.run(_wkv4, _wkv4_step, k, v, w=self.time_decay, u=self.time_first)
        y: Tensor = self.output(r.sigmoid() * o)
        return y


def _wkv4(k: Tensor, v: Tensor, **rest: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    return wkv4(k=k, v=v, **rest)  # type: ignore[arg-type]


def _wkv4_step(k: Tensor, v: Tensor, **rest: Tensor) -> Tensor:
    return wkv4_step(k=k, v=v, **rest)  # type: ignore[arg-type]


class AFTSimple(RecurrentLayer):
    """The attention-free transformer without position weights: a running softmax per channel.

    Args:
        hidden_size: width of input and output.
        layer_idx: place in the cache; needed to use one.

    Source: An Attention Free Transformer, arXiv:2105.14103, section 3.

    Example:
        >>> AFTSimple(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(self, hidden_size: int = 1024, layer_idx: int | None = None) -> None:
        super().__init__(hidden_size, layer_idx)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        y: Tensor = self.o_proj(call.run(aft_simple, _aft_step, q, k, v))
        return y


def _aft_step(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """A token is a sequence of one; its state is written over the old one."""
    o, after = aft_simple(q[:, None], k[:, None], v[:, None], state, True)  # type: ignore[arg-type]
    for old, new in zip(state, after or (), strict=True):
        old.copy_(new)
    return o[:, 0]
