"""GateLoop: linear attention with data-controlled complex gates, one channel per head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.precision import wide
from ..ops import gateloop, scan_step
from .recurrent import Call, RecurrentLayer

__all__ = ["GateLoop"]


class GateLoop(RecurrentLayer):
    """``o_t = Re(q_t h_t)``, ``h_t = a_t h_{t−1} + k_t v_t`` with ``a_t = σ(m_t) e^{iθ_t}``, then
    a gate.

    Args:
        hidden_size: width of input and output.
        layer_idx: place in the cache; needed to use one.

    Source: GateLoop: Fully Data-Controlled Linear Recurrence, arXiv:2311.01927, section 3.

    Example:
        >>> GateLoop(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(self, hidden_size: int = 1024, layer_idx: int | None = None) -> None:
        super().__init__(hidden_size, layer_idx)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.a_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.g_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        # Memories from a few to a thousand tokens long, turning at all rates.
        with torch.no_grad():
            self.a_proj.bias[:hidden_size] = torch.linspace(1, 7, hidden_size)
            self.a_proj.bias[hidden_size:] = torch.rand(hidden_size) * math.pi / 8

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        magnitude, phase = wide(self.a_proj(x)).chunk(2, -1)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        o = call.run(gateloop, _step, q, k, v, F.logsigmoid(magnitude), phase)
        y: Tensor = self.o_proj(o.to(x.dtype) * F.silu(self.g_proj(x)))
        return y


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_magnitude: Tensor, phase: Tensor, state: Tensor
) -> Tensor:
    h = scan_step(k * v, (log_magnitude, phase), state)
    return (q * h).real.to(q.dtype)
