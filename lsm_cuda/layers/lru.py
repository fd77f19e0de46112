"""Layers around linear recurrences with constant complex gates: the LRU and S5."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.hippo import diagonal_init, log_steps
from ..modules.precision import wide
from ..ops import scan, scan_step
from ..ops.ssm import discretize_diagonal
from .recurrent import Call, RecurrentLayer

__all__ = ["LRU", "S5"]


def _complex_linear(x: Tensor, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
    """A real input through a complex matrix, as two real products."""
    return F.linear(x, real), F.linear(x, imag)


def _recur(call: Call, real: Tensor, imag: Tensor, log_A: Tensor) -> Tensor:
    """States ``[B, T, P]``, complex."""
    x = torch.complex(wide(real), wide(imag))
    gate = (wide(log_A.real), wide(log_A.imag))

    def whole(x: Tensor, **states: Any) -> tuple[Tensor, Tensor | None]:
        return scan(x, gate, **states)

    def step(x: Tensor, state: Tensor) -> Tensor:
        return scan_step(x, gate, state)

    return call.run(whole, step, x)


class LRU(RecurrentLayer):
    """The linear recurrent unit: ``h_t = λ ⊙ h_{t−1} + γ ⊙ (B x_t)``, ``y_t = Re(C h_t) + D ⊙
    x_t``.

    Args:
        hidden_size: width of input and output.
        state_size: complex states. Default: ``hidden_size``.
        r_min, r_max: moduli of λ start uniformly on the ring between them.
        max_phase: phases start uniformly up to it.
        layer_idx: place in the cache; needed to use one.

    Parameters have the paper's names: ``nu_log``, ``theta_log``, ``gamma_log``, ``B_re``, ``B_im``,
    ``C_re``, ``C_im`` and ``D``.

    Source: Resurrecting Recurrent Neural Networks for Long Sequences, arXiv:2303.06349, appendix A.

    Example:
        >>> LRU(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        state_size: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        P = hidden_size if state_size is None else state_size
        modulus = (torch.rand(P) * (r_max**2 - r_min**2) + r_min**2).sqrt().clamp(1e-6, 1 - 1e-6)
        self.nu_log = nn.Parameter((-modulus.log()).log())
        self.theta_log = nn.Parameter((max_phase * torch.rand(P)).clamp(min=1e-6).log())
        self.gamma_log = nn.Parameter((1 - modulus.square()).sqrt().log())
        std = 1 / math.sqrt(2 * hidden_size)
        self.B_re = nn.Parameter(std * torch.randn(P, hidden_size))
        self.B_im = nn.Parameter(std * torch.randn(P, hidden_size))
        self.C_re = nn.Parameter(torch.randn(hidden_size, P) / math.sqrt(P))
        self.C_im = nn.Parameter(torch.randn(hidden_size, P) / math.sqrt(P))
        self.D = nn.Parameter(torch.randn(hidden_size))

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        gamma = self.gamma_log.exp()
        real, imag = (gamma * u for u in _complex_linear(x, self.B_re, self.B_im))
        log_A = torch.complex(-wide(self.nu_log).exp(), wide(self.theta_log).exp())
        h = _recur(call, real, imag, log_A)
        y = F.linear(h.real.to(x.dtype), self.C_re) - F.linear(h.imag.to(x.dtype), self.C_im)
        return y + self.D * x


class S5(RecurrentLayer):
    """S5: one diagonal system with many inputs and outputs, then GELU and a gate.

    Args:
        hidden_size: width of input and output, H.
        state_size: complex states P, of conjugate pairs one each.
        init: eigenvalues to start from, as :class:`S4D`'s.
        discretization: ``zoh`` or ``bilinear``.
        dt_min, dt_max: step sizes start log-uniformly between them.
        layer_idx: place in the cache; needed to use one.

    Parameters have the published names: ``Lambda_re``, ``Lambda_im``, ``B``, ``C``, ``D`` and
    ``log_step``; the gate is ``out2``.

    Source: Simplified State Space Layers for Sequence Modeling, arXiv:2208.04933.

    Example:
        >>> S5(hidden_size=16, state_size=8)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        state_size: int = 64,
        init: str = "legs",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.discretization = discretization
        lam = diagonal_init(init, state_size).to(torch.complex64)
        self.Lambda_re, self.Lambda_im = nn.Parameter(lam.real), nn.Parameter(lam.imag)
        self.B = nn.Parameter(torch.randn(state_size, hidden_size, 2) / math.sqrt(2 * hidden_size))
        self.C = nn.Parameter(torch.randn(hidden_size, state_size, 2) / math.sqrt(2 * state_size))
        self.D = nn.Parameter(torch.randn(hidden_size))
        self.log_step = nn.Parameter(log_steps(state_size, dt_min, dt_max)[:, None])
        self.out2 = nn.Linear(hidden_size, hidden_size)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        lam = torch.complex(wide(self.Lambda_re), wide(self.Lambda_im))
        log_A, factor = discretize_diagonal(
            lam[:, None], wide(self.log_step)[:, 0].exp(), self.discretization
        )
        log_A, factor = log_A[:, 0], factor[:, 0]
        real, imag = _complex_linear(x, *self.B.unbind(-1))
        driven = torch.complex(wide(real), wide(imag)) * factor
        h = _recur(call, driven.real, driven.imag, log_A)
        C_re, C_im = self.C.unbind(-1)
        y = F.linear(h.real.to(x.dtype), C_re) - F.linear(h.imag.to(x.dtype), C_im)
        y = F.gelu(2 * y + self.D * x)
        o: Tensor = y * self.out2(y).sigmoid()
        return o
