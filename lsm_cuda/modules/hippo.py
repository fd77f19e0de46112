"""State matrices of state space models: HiPPO and its kin, made diagonal or stable.

A state follows ``x'(t) = A x(t) + B u(t)``. HiPPO chooses A and B such that x holds the
coefficients of the input's past on a basis of functions; the name says which one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "BASES",
    "DIAGONALS",
    "diagonal_init",
    "discretize",
    "hippo",
    "legs_basis",
    "lmu",
    "log_steps",
    "nplr",
    "perturbed_diagonal",
    "softplus_inverse",
    "stable_rate",
    "stable_rate_inverse",
]

BASES = ("legs", "legt", "lagt", "fout", "foud")


def hippo(basis: str, N: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A ``[N, N]`` and B ``[N]`` of a HiPPO operator.

    Args:
        basis: ``legs``, Legendre polynomials over all of the past, scaled; ``legt``, over a sliding
            window of length 1; ``lagt``, Laguerre functions, an exponentially fading past;
            ``fout``, sines and cosines over a sliding window; ``foud``, those fading exponentially.
        N: states; even for the Fourier bases.
        dtype: of the result.

    Raises:
        ValueError: an unknown basis, or an odd number of Fourier states.

    Source: HiPPO, arXiv:2008.07669; How to Train Your HiPPO, arXiv:2206.12037.

    Example:
        >>> A, B = hippo("legs", 3)
        >>> A[1]
        tensor([-1.7321, -2.0000,  0.0000], dtype=torch.float64)
    """
    n = torch.arange(N, dtype=torch.float64)
    if basis == "legs":
        root = (2 * n + 1).sqrt()
        A = torch.tril(-root[:, None] * root, -1) - torch.diag(n + 1)
        B = root
    elif basis == "legt":
        root = (2 * n + 1).sqrt()
        sign = torch.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1.0)
        A, B = -root[:, None] * sign * root, root
    elif basis == "lagt":
        A = -torch.tril(torch.ones(N, N, dtype=torch.float64), -1) - 0.5 * torch.eye(
            N, dtype=torch.float64
        )
        B = torch.ones(N, dtype=torch.float64)
    elif basis in ("fout", "foud"):
        if N % 2:
            raise ValueError(f"hippo: {basis} needs an even number of states, got N = {N}")
        A = torch.zeros(N, N, dtype=torch.float64)
        frequency = 2 * math.pi * torch.arange(N // 2, dtype=torch.float64)
        even = torch.arange(0, N, 2)
        A[even, even + 1], A[even + 1, even] = frequency, -frequency
        B = torch.zeros(N, dtype=torch.float64)
        B[0::2] = math.sqrt(2)
        B[0] = 1
        A = A - (1.0 if basis == "fout" else 0.5) * B[:, None] * B
    else:
        raise ValueError(f"hippo: basis must be one of {', '.join(BASES)}, got {basis!r}")
    return A.to(dtype), B.to(dtype)


def lmu(N: int, theta: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A and B of a Legendre memory unit, which keeps a sliding window of length ``theta``.

    Source: Legendre Memory Units, NeurIPS 2019, eq. 2.

    Example:
        >>> lmu(2)[0]
        tensor([[-1., -1.],
                [ 3., -3.]], dtype=torch.float64)
    """
    i = torch.arange(N, dtype=torch.float64)
    sign = torch.where(i[:, None] < i, -1.0, (-1.0) ** (i[:, None] - i + 1))
    A, B = (2 * i + 1)[:, None] * sign, (2 * i + 1) * (-1.0) ** i
    return (A / theta).to(dtype), (B / theta).to(dtype)


def legs_basis(N: int, age: Tensor) -> Tensor:
    """What the LegS system with a constant measure answers to an impulse ``age`` ago, ``[..., N]``:
    ``√(2n+1) P_n(2 e^{−age} − 1) · e^{−age}``, Legendre polynomials of an exponentially warped
    past.

    Source: How to Train Your HiPPO, arXiv:2206.12037, corollary 3.3 (a closed form of
    ``e^{A·age} B``, which the tests compare with the matrix exponential).
    """
    z = 2 * torch.exp(-age) - 1
    P = [torch.ones_like(z), z]
    for n in range(1, N - 1):
        P.append(((2 * n + 1) * z * P[n] - n * P[n - 1]) / (n + 1))
    root = (2 * torch.arange(N, dtype=z.dtype, device=z.device) + 1).sqrt()
    return torch.stack(P[:N], -1) * root * torch.exp(-age)[..., None]


def discretize(
    A: Tensor, B: Tensor, dt: Tensor | float, method: str = "zoh"
) -> tuple[Tensor, Tensor]:
    """``x_t = Ā x_{t−1} + B̄ u_t`` from ``x' = A x + B u``, for a dense A ``[..., N, N]``.

    Args:
        A, B: ``[..., N, N]`` and ``[..., N]``.
        dt: step, ``[...]``.
        method: ``zoh`` holds the input over a step; ``bilinear`` is the trapezoidal rule; ``euler``
            and ``backward_euler`` are the generalised bilinear transform at 0 and 1.

    Raises:
        ValueError: an unknown method.
    """
    dt = torch.as_tensor(dt, dtype=A.real.dtype, device=A.device)[..., None, None]
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    if method == "zoh":
        # e^{[A B; 0 0] dt} = [Ā B̄; 0 1], which holds for a singular A too.
        N = A.shape[-1]
        block = A.new_zeros(*A.shape[:-2], N + 1, N + 1)
        block[..., :N, :N], block[..., :N, N] = A * dt, B * dt[..., 0]
        e = torch.linalg.matrix_exp(block)
        return e[..., :-1, :-1], e[..., :-1, -1]
    alphas = {"euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0}
    if method not in alphas:
        raise ValueError(f"discretize: method must be zoh, {', '.join(alphas)}, got {method!r}")
    alpha = alphas[method]
    right = torch.cat([eye + (1 - alpha) * dt * A, dt * B[..., None]], -1)
    solved = torch.linalg.solve(eye - alpha * dt * A, right)
    return solved[..., :-1], solved[..., -1]


def nplr(basis: str, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A HiPPO matrix as normal plus low rank, in the basis where the normal part is diagonal.

    ``A = V (Λ − P P*) V*`` and ``V* B``: every HiPPO matrix here is skew-symmetric plus a multiple
    of the identity after adding ``P Pᵀ``.

    Returns:
        Λ ``[N]`` with conjugate pairs, sorted by imaginary part; P and B in its basis, ``[rank,
        N]`` and ``[N]``; V ``[N, N]``; all complex128.

    Raises:
        ValueError: a basis that is none of legs, legt, lagt, fout and foud.

    Source: S4, arXiv:2111.00396, theorem 1.
    """
    A, B = hippo(basis, N)
    n = torch.arange(N, dtype=torch.float64)
    if basis == "legs":
        P = (0.5 + n).sqrt()[None]
    elif basis == "lagt":
        P = 0.5**0.5 * torch.ones(1, N, dtype=torch.float64)
    elif basis == "legt":
        # Symmetric part: entries with n + k even, which is a rank-one matrix for either parity.
        root = (2 * n + 1).sqrt()
        P = torch.stack([torch.where(n % 2 == parity, root, 0.0) for parity in (0, 1)])
    else:
        P = B[None] * (1.0 if basis == "fout" else 0.5**0.5)
    normal = A + P.mT @ P
    shift = normal.diagonal().mean()
    skew = normal - shift * torch.eye(N, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(skew * -1j)
    lam = shift + 1j * frequency
    return lam, P.to(V.dtype) @ V.conj(), V.mH @ B.to(V.dtype), V


def perturbed_diagonal(
    basis: str, N: int, size: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-PTD: the eigenvalues of ``A + E``, E a small random matrix, and B in that basis.

    A itself has eigenvectors too ill-conditioned to use; a perturbation of norm ``size`` relative
    to A makes them usable and changes the system by as little.

    Returns:
        Λ ``[N]``, B ``[N]`` and the eigenvectors V ``[N, N]`` (C becomes ``C V``), complex128.

    Source: Robustifying State-space Models for Long Sequences via Approximate Diagonalization,
    arXiv:2310.01698.
    """
    A, B = hippo(basis, N)
    E = torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=A.dtype)
    E = E * (size * torch.linalg.matrix_norm(A, 2) / torch.linalg.matrix_norm(E, 2))
    lam, V = torch.linalg.eig(A + E)
    return lam, torch.linalg.solve(V, B.to(V.dtype)), V


DIAGONALS = ("lin", "inv", "legs", "real", "legt", "fout")


def diagonal_init(kind: str, N: int) -> Tensor:
    """Eigenvalues of a diagonal state matrix, ``[N]`` complex128; of a conjugate pair only one.

    ``lin``: ``−½ + iπn``; ``inv``: ``−½ + i N'/π (N'/(2n+1) − 1)`` with N' = 2N; ``real``:
    ``−(n+1)``; ``legs``, ``legt``, ``fout``: the normal part of that HiPPO matrix of 2N states.

    Raises:
        ValueError: an unknown kind.

    Source: S4D, arXiv:2206.11893, section 4.

    Example:
        >>> diagonal_init("real", 3)
        tensor([-1.+0.j, -2.+0.j, -3.+0.j], dtype=torch.complex128)
    """
    n = torch.arange(N, dtype=torch.float64)
    if kind == "lin":
        return torch.complex(torch.full_like(n, -0.5), math.pi * n)
    if kind == "inv":
        return torch.complex(torch.full_like(n, -0.5), 2 * N / math.pi * (2 * N / (2 * n + 1) - 1))
    if kind == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if kind in BASES:
        return nplr(kind, 2 * N)[0][N:]
    raise ValueError(f"diagonal_init: kind must be one of {', '.join(DIAGONALS)}, got {kind!r}")


def log_steps(H: int, dt_min: float = 0.001, dt_max: float = 0.1) -> Tensor:
    """Logarithms of H step sizes, drawn log-uniformly: timescales from 1/dt_max to 1/dt_min."""
    return torch.empty(H).uniform_(math.log(dt_min), math.log(dt_max))


def softplus_inverse(dt: Tensor) -> Tensor:
    """What softplus makes ``dt`` of, precise for small ones.

    Example:
        >>> torch.nn.functional.softplus(softplus_inverse(torch.tensor([0.5])))
        tensor([0.5000])
    """
    return dt + (-torch.expm1(-dt)).log()


def stable_rate(w: Tensor, a: float = 1.0, b: float = 0.5) -> Tensor:
    """StableSSM's reparameterisation of a decay rate, ``λ = −1 / (a w² + b)``: negative for every
    w, and with a gradient that is bounded relative to λ, so that no weight is unstable or stuck.

    Source: StableSSM, arXiv:2311.14495, section 3.4.

    Example:
        >>> stable_rate(torch.tensor([0.0]))
        tensor([-2.])
    """
    return -1 / (a * w.square() + b)


def stable_rate_inverse(rate: Tensor, a: float = 1.0, b: float = 0.5) -> Tensor:
    """The ``w ≥ 0`` of a rate in ``[−1/b, 0)``."""
    return ((-1 / rate - b) / a).clamp(min=0).sqrt()
