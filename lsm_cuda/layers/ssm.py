"""State space layers: S4, S4D, DSS, Liquid-S4 and Legendre memories, GELU and a gate behind them;
H3."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ShortConvolution
from ..modules.hippo import diagonal_init, discretize, lmu, log_steps, nplr
from ..modules.precision import no_autocast, wide
from ..ops.ssm import (
    dense_ssm,
    dense_ssm_step,
    diagonal_ssm,
    diagonal_ssm_step,
    discretize_diagonal,
    discretize_dplr,
    krylov_kernel,
    liquid_ssm,
    liquid_ssm_step,
    power_sum,
    s4_kernel,
)
from .recurrent import Call, RecurrentLayer

__all__ = ["DSS", "H3", "LMU", "S4", "S4D", "LiquidS4"]


def _real_pairs(x: Tensor) -> nn.Parameter:
    """Complex numbers as a parameter ``[..., 2]``, which moves between real dtypes."""
    return nn.Parameter(torch.view_as_real(x.resolve_conj().to(torch.complex64)).contiguous())


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(wide(x).contiguous())


def _left_half(log_rate: Tensor, imag: Tensor) -> Tensor:
    """Eigenvalues, their real parts −exp(log_rate)."""
    return torch.complex(-wide(log_rate).exp(), wide(imag))


class DiagonalKernel(nn.Module):
    """A diagonal system per channel; parameters as in S4D's published code.

    ``A = −exp(log_A_real) + i A_imag`` ``[H, N/2]``, of conjugate pairs one each.
    """

    def __init__(
        self, hidden_size: int, d_state: int, init: str, dt_min: float, dt_max: float
    ) -> None:
        super().__init__()
        lam = diagonal_init(init, d_state // 2).to(torch.complex64)
        lam = lam.expand(hidden_size, -1)
        self.C = _real_pairs(torch.randn(lam.shape, dtype=torch.complex64))
        self.log_dt = nn.Parameter(log_steps(hidden_size, dt_min, dt_max))
        self.log_A_real = nn.Parameter(lam.real.neg().clamp(min=1e-4).log())
        self.A_imag = nn.Parameter(lam.imag.clone())

    def eigenvalues(self) -> Tensor:
        return _left_half(self.log_A_real, self.A_imag)


class _SSMLayer(RecurrentLayer):
    """A system per channel, GELU, and a gated output projection, as in S4's code."""

    def __init__(self, hidden_size: int, layer_idx: int | None) -> None:
        super().__init__(hidden_size, layer_idx)
        self.D = nn.Parameter(torch.randn(hidden_size))
        self.output_linear = nn.Sequential(
            nn.Conv1d(hidden_size, 2 * hidden_size, kernel_size=1), nn.GLU(dim=-2)
        )

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        y = F.gelu(self._system(x, call))
        weight, bias = self.output_linear[0].parameters()
        return F.glu(F.linear(y, weight[..., 0], bias), dim=-1)

    @abstractmethod
    def _system(self, x: Tensor, call: Call) -> Tensor: ...


class S4D(_SSMLayer):
    """S4D: a diagonal state space model per channel.

    Args:
        hidden_size: width of input and output, H.
        d_state: states N per channel, conjugate pairs counted twice.
        init: eigenvalues to start from: ``lin``, ``inv``, ``legs``, ``real``, ``legt``, ``fout``
            (:func:`lsm_cuda.modules.hippo.diagonal_init`).
        disc: how time becomes discrete: ``zoh`` or ``bilinear``.
        dt_min, dt_max: step sizes start log-uniformly between them.
        layer_idx: place in the cache; needed to use one.

    Parameters are those of the published ``s4d.py``: ``kernel.C``, ``kernel.log_dt``,
    ``kernel.log_A_real``, ``kernel.A_imag``, ``D`` and ``output_linear``.

    Source: On the Parameterization and Initialization of Diagonal State Space Models,
    arXiv:2206.11893.

    Example:
        >>> S4D(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        d_state: int = 64,
        init: str = "lin",
        disc: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.disc = disc
        self.kernel = DiagonalKernel(hidden_size, d_state, init, dt_min, dt_max)

    def _system(self, x: Tensor, call: Call) -> Tensor:
        kernel = self.kernel
        log_A, factor = discretize_diagonal(
            kernel.eigenvalues(), wide(kernel.log_dt).exp(), self.disc
        )
        C = _complex(kernel.C)
        return call.run(diagonal_ssm, diagonal_ssm_step, x, log_A=log_A, B=factor, C=C, D=self.D)


class LiquidS4(_SSMLayer):
    """Liquid-S4: a diagonal system per channel whose decay the input moves,
    ``x_t = (Ā + B̄ u_t) ⊙ x_{t−1} + B̄ u_t``.

    Args:
        hidden_size: width of input and output, H.
        d_state: states N per channel, conjugate pairs counted twice.
        init: eigenvalues to start from, as in :class:`S4D`.
        dt_min, dt_max: step sizes start log-uniformly between them.
        layer_idx: place in the cache; needed to use one.

    Note: the recurrence itself, not the published approximation by convolutions, which is
        :func:`lsm_cuda.ops.liquid_ssm` with an order.

    Source: Liquid Structural State-Space Models, arXiv:2209.12951.

    Example:
        >>> LiquidS4(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        d_state: int = 64,
        init: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.kernel = DiagonalKernel(hidden_size, d_state, init, dt_min, dt_max)

    def _system(self, x: Tensor, call: Call) -> Tensor:
        kernel = self.kernel
        log_A, factor = discretize_diagonal(kernel.eigenvalues(), wide(kernel.log_dt).exp())
        C = _complex(kernel.C)
        return call.run(liquid_ssm, liquid_ssm_step, x, log_A=log_A, B=factor, C=C, D=self.D)


class LMU(_SSMLayer):
    """Legendre memory units: every channel keeps the coefficients of its last ``theta`` tokens in
    Legendre polynomials, and reads them with weights of its own.

    Args:
        hidden_size: width of input and output, H.
        d_state: coefficients N per channel.
        theta: tokens in the window.
        layer_idx: place in the cache; needed to use one.

    Note: the memory's matrices are no parameters, as in the paper. Its form without a hidden state
        that feeds back, which runs over whole sequences at once. A step costs N² per channel.

    Source: Legendre Memory Units, NeurIPS 2019; Parallelizing Legendre Memory Unit Training,
    arXiv:2102.11417.

    Example:
        >>> LMU(hidden_size=16, d_state=8)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        hidden_size: int = 1024,
        d_state: int = 32,
        theta: float = 128.0,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        A, B = discretize(*lmu(d_state, theta), 1.0)
        self.register_buffer("A", A.float(), persistent=False)
        self.register_buffer("B", B.float(), persistent=False)
        self.C = nn.Parameter(torch.randn(hidden_size, d_state) / d_state**0.5)

    def _system(self, x: Tensor, call: Call) -> Tensor:
        A, B, C, T = wide(self.A), wide(self.B), wide(self.C), x.shape[1]

        def whole(x: Tensor, **states: Any) -> tuple[Tensor, Tensor | None]:
            return dense_ssm(x, A, B, C, self.D, kernel, **states)

        def step(x: Tensor, state: Tensor) -> Tensor:
            return dense_ssm_step(x, A, B, C, self.D, state)

        with no_autocast(x):  # powers
            kernel = krylov_kernel(A, B, C, T) if T > 1 else None  # shared by all channels
            A, B = A.expand(C.shape[0], -1, -1), B.expand(C.shape[0], -1)
            return call.run(whole, step, x)


class DSS(_SSMLayer):
    """DSS: a diagonal system whose filters are normalised.

    Args:
        hidden_size: width of input and output, H.
        d_state: states N per channel, each on its own, not half of a pair.
        variant: ``exp``, or ``softmax``: powers are divided by their sum over ``max_length`` steps.
        max_length: see there.
        dt_min, dt_max: step sizes start log-uniformly between them.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: another variant.

    Note: eigenvalues have negative real parts here, so that tokens can follow one by one; growing
        ones are for :func:`lsm_cuda.ops.dss_kernel`.

    Source: Diagonal State Spaces are as Effective as Structured State Spaces, arXiv:2203.14343.

    Example:
        >>> DSS(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        d_state: int = 64,
        variant: str = "exp",
        max_length: int = 1024,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        if variant not in ("exp", "softmax"):
            raise ValueError(f"DSS: variant must be exp or softmax, got {variant!r}")
        self.variant = variant
        self.max_length = max_length
        self.kernel = DiagonalKernel(hidden_size, 2 * d_state, "legs", dt_min, dt_max)

    def _system(self, x: Tensor, call: Call) -> Tensor:
        A, dt = self.kernel.eigenvalues(), wide(self.kernel.log_dt).exp()
        log_A, factor = discretize_diagonal(A, dt)
        if self.variant == "softmax":
            factor = 1 / power_sum(log_A, self.max_length)
        C = _complex(self.kernel.C) / 2  # no pairs
        return call.run(diagonal_ssm, diagonal_ssm_step, x, log_A=log_A, B=factor, C=C, D=self.D)


class S4(_SSMLayer):
    """S4: a HiPPO matrix per channel, as a diagonal plus a matrix of low rank.

    Args:
        hidden_size: width of input and output, H.
        d_state: states N per channel.
        basis: of the HiPPO matrix to start from: ``legs``, ``legt``, ``lagt``, ``fout`` or
        ``foud``. dt_min, dt_max: step sizes start log-uniformly between them.
        layer_idx: place in the cache; needed to use one.

    Note: λ, P and B are shared by all channels, C and dt are not. A step costs N² per channel.

    Source: Efficiently Modeling Long Sequences with Structured State Spaces, arXiv:2111.00396.

    Example:
        >>> S4(hidden_size=16, d_state=8)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        d_state: int = 64,
        basis: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        lam, P, B, V = nplr(basis, d_state)
        C = torch.randn(hidden_size, d_state, dtype=torch.float64).to(V.dtype) @ V
        self.log_dt = nn.Parameter(log_steps(hidden_size, dt_min, dt_max))
        self.log_A_real = nn.Parameter(lam.real.neg().clamp(min=1e-4).log().float())
        self.A_imag = nn.Parameter(lam.imag.float())
        self.P, self.B, self.C = _real_pairs(P), _real_pairs(B), _real_pairs(C)

    def _system(self, x: Tensor, call: Call) -> Tensor:
        lam = _left_half(self.log_A_real, self.A_imag)
        P, B, C, dt = _complex(self.P), _complex(self.B), _complex(self.C), wide(self.log_dt).exp()
        A, Bd = discretize_dplr(lam, P, B, dt)
        kernel = None
        if x.shape[1] > 1:
            kernel = s4_kernel(lam, P, B, C, dt, x.shape[1])

        def whole(x: Tensor, **states: Any) -> tuple[Tensor, Tensor | None]:
            return dense_ssm(x, A, Bd, C, self.D, kernel, **states)

        def step(x: Tensor, state: Tensor) -> Tensor:
            return dense_ssm_step(x, A, Bd, C, self.D, state)

        return call.run(whole, step, x)


class H3(RecurrentLayer):
    """H3 with heads of one channel: ``q ⊙ SSM_diag(SSM_shift(k) ⊙ v)``.

    Args:
        hidden_size: width of input and output, H.
        d_state: states N of the diagonal system, conjugate pairs counted twice.
        d_shift: tokens that the shift system sees; up to 8 on CUDA, 128 on CPU.
        init: eigenvalues to start from, as in :class:`S4D`.
        dt_min, dt_max: step sizes start log-uniformly between them.
        layer_idx: place in the cache; needed to use one.

    Note: a shift system is a filter of as many taps as it has states; its skip is the last tap.

    Source: Hungry Hungry Hippos, arXiv:2212.14052, section 3.

    Example:
        >>> H3(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        d_state: int = 64,
        d_shift: int = 8,
        init: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.shift = ShortConvolution(hidden_size, d_shift, activation=None)
        self.kernel = DiagonalKernel(hidden_size, d_state, init, dt_min, dt_max)
        self.D = nn.Parameter(torch.randn(hidden_size))
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        kernel = self.kernel
        log_A, factor = discretize_diagonal(kernel.eigenvalues(), kernel.log_dt.exp())
        system = {"log_A": log_A, "B": factor, "C": _complex(kernel.C), "D": self.D}
        remembered = call.convolve(self.shift, k)
        o: Tensor = self.o_proj(
            q * call.run(diagonal_ssm, diagonal_ssm_step, remembered * v, **system)
        )
        return o
