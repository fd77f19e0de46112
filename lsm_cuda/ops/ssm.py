"""State space models that do not change with time: a long convolution to train, a recurrence to
decode, and nothing of size ``[H, N, L]`` in between.

A model of N states per channel, ``x_t = Ā x_{t−1} + B̄ u_t``, ``y_t = C x_t + D u_t``, is the causal
convolution with ``K_l = C Ā^l B̄``. What the functions here differ in is how A is given, and so how
K is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulation_dtype, check_no_gradient, check_rank, check_shape
from .scan import scan

__all__ = [
    "cauchy_kernel",
    "companion",
    "dense_ssm",
    "dense_ssm_step",
    "diagonal_kernel",
    "diagonal_ssm",
    "diagonal_ssm_step",
    "discretize_diagonal",
    "discretize_dplr",
    "dss_kernel",
    "fft_conv",
    "h3",
    "krylov_kernel",
    "liquid_ssm",
    "liquid_ssm_step",
    "s4_kernel",
]

_FREQUENCIES_AT_ONCE = 256  # of a Cauchy product; bounds its memory


def fft_conv(u: Tensor, kernel: Tensor, D: Tensor | None = None) -> Tensor:
    r"""Causal convolution over time with a filter as long as the sequence, by FFT.

    ``y_t = Σ_{l ≤ t} kernel[:, l] ⊙ u_{t−l} + D ⊙ u_t``.

    Args:
        u (Tensor): ``[B, T, H]``, any floating dtype; computed in fp32, fp64 for fp64.
        kernel (Tensor): ``[H, L]``, L ≥ T or shorter, then zero behind.
        D (Tensor, optional): ``[H]``, a skip.

    Returns:
        ``y [B, T, H]`` in the dtype of u.

    Raises:
        RuntimeError: a shape that does not fit.

    Note: differentiable to any order. Rounding errors are relative to the largest term, not to each
        output, as always with an FFT.

    Example:
        >>> fft_conv(torch.tensor([[[1.0], [0.0], [2.0]]]), torch.tensor([[1.0, 0.5]])).flatten()
        tensor([1.0000, 0.5000, 2.0000])
    """
    check_rank("fft_conv", "u", u, "[B, T, H]")
    check_shape("fft_conv", "kernel", kernel, "[H, L]", (u.shape[2], kernel.shape[-1]))
    T, wide = u.shape[1], accumulation_dtype(u)
    x, k = u.to(wide), kernel[:, :T].to(wide)
    if u.numel() == 0:
        return u
    n = 1 << (T + k.shape[1] - 2).bit_length()  # of a full convolution, to a power of two
    y = torch.fft.irfft(torch.fft.rfft(x, n, dim=1) * torch.fft.rfft(k, n).T, n, dim=1)[:, :T]
    y = y if D is None else y + x * D.to(wide)
    result: Tensor = y.to(u.dtype)
    return result


def discretize_diagonal(A: Tensor, dt: Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
    r"""``log Ā`` and the factor that turns B into B̄, element by element.

    Args:
        A (Tensor): eigenvalues ``[H, N]``, real or complex.
        dt (Tensor): step sizes ``[H]``.
        method: ``zoh``: ``Ā = e^{dt·A}``, ``B̄ = (Ā − 1)/A · B``; ``bilinear``: ``Ā = (1 +
            dt·A/2)/(1 − dt·A/2)``, ``B̄ = dt/(1 − dt·A/2) · B``; ``mamba``: ZOH's Ā with Euler's
            ``B̄ = dt · B``.

    Returns:
        two tensors ``[H, N]``; log Ā for ``bilinear`` is complex.

    Raises:
        ValueError: an unknown method.
    """
    step = dt[:, None].to(A.real.dtype)
    z = step * A
    if method == "zoh":
        # (e^z − 1)/z by its series where the difference would cancel; complex expm1 has no kernel.
        small = z.abs() < 1e-2
        safe = torch.where(small, torch.ones_like(z), z)
        series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
        return z, step * torch.where(small, series, (safe.exp() - 1) / safe)
    if method == "mamba":
        return z, step * torch.ones_like(A)
    if method == "bilinear":
        ratio = (1 + z / 2) / (1 - z / 2)
        ratio = ratio if ratio.is_complex() else torch.complex(ratio, torch.zeros_like(ratio))
        return ratio.log(), step / (1 - z / 2)
    raise ValueError(f"discretize_diagonal: method must be zoh, bilinear or mamba, got {method!r}")


def diagonal_kernel(log_A: Tensor, C: Tensor, L: int) -> Tensor:
    r"""The filter of a diagonal system, ``K_l = 2 Re Σ_n C_n Ā_n^l``; ``Σ_n`` alone if all is real.

    Args:
        log_A (Tensor): ``log Ā``, ``[H, N]``; of conjugate pairs one each, hence the 2.
        C (Tensor): output weights times B̄, ``[H, N]`` or ``[C, H, N]`` for several filters.
        L: length.

    Returns:
        ``[H, L]`` or ``[C, H, L]``, real.

    Note: a Vandermonde product. Powers are split, ``Ā^{l' m + l''}``, which makes it a matrix
        product of two factors of size ``[H, N, √L]``; each power is an exponential of its own.

    Source: S4D, arXiv:2206.11893, section 3.2.

    Example:
        >>> diagonal_kernel(torch.tensor([[0.5]]).log(), torch.ones(1, 1), 4)
        tensor([[1.0000, 0.5000, 0.2500, 0.1250]])
    """
    m = max(1, math.isqrt(max(L - 1, 0)) + 1)
    steps = torch.arange(m, device=log_A.device, dtype=log_A.real.dtype)
    fine = (log_A[..., None] * steps).exp()  # [H, N, m]
    coarse = (log_A[..., None] * (steps * m)).exp() * C[..., None]  # [.., H, N, m]
    if fine.is_complex() or coarse.is_complex():
        # The real part of a complex product is one real product of twice the depth.
        fine, coarse = (x.to(torch.complex128 if x.real.dtype == torch.float64 else torch.complex64)
                        for x in (fine, coarse))  # fmt: skip
        left = torch.cat([coarse.real, -coarse.imag], -2)
        right = torch.cat([fine.real, fine.imag], -2)
        K = 2 * left.mT @ right
    else:
        K = coarse.mT @ fine
    return K.flatten(-2)[..., :L]


def dss_kernel(A: Tensor, C: Tensor, dt: Tensor, L: int, variant: str = "softmax") -> Tensor:
    r"""DSS's filters: ``K_l = Re Σ_n w_n · s_{n,l}`` with ``s`` the powers ``e^{l·dt·A_n}``,
    normalised.

    Args:
        A (Tensor): eigenvalues ``[N]`` or ``[H, N]``, complex.
        C (Tensor): ``w [H, N]``, complex.
        dt (Tensor): ``[H]``.
        L: length.
        variant: ``softmax``: each row of powers is divided by its sum over l, which also allows
            eigenvalues with positive real parts; ``exp``: ``(e^{dt·A} − 1)/A`` in its place.

    Returns:
        ``[H, L]``.

    Raises:
        ValueError: an unknown variant.

    Source: Diagonal State Spaces are as Effective as Structured State Spaces, arXiv:2203.14343,
        proposition 1; here of conjugate pairs both are given, or neither (no factor 2).
    """
    A = A.expand(C.shape)
    z = dt[:, None].to(A.real.dtype) * A
    if variant == "exp":
        return diagonal_kernel(z, C * discretize_diagonal(A, dt)[1] / 2, L)
    if variant != "softmax":
        raise ValueError(f"dss_kernel: variant must be softmax or exp, got {variant!r}")
    # Growing rows are run from their end, where they are largest.
    grows = z.real > 0
    decay = torch.where(grows, -z, z)
    total = power_sum(decay, L)
    weight = C / total
    zero = torch.zeros_like(weight)
    forwards = diagonal_kernel(decay, torch.where(grows, zero, weight) / 2, L)
    backwards = diagonal_kernel(decay, torch.where(grows, weight, zero) / 2, L)
    return forwards + backwards.flip(-1)


def power_sum(z: Tensor, L: int) -> Tensor:
    """``Σ_{l<L} e^{l z}`` by doubling, ``S_{2n} = S_n (1 + e^{n z})``; fine where ``e^z`` is near
    1."""
    total, count = torch.ones_like(z), 1
    for bit in bin(L)[3:]:
        total = total * (1 + (z * count).exp())
        count *= 2
        if bit == "1":
            total = total + (z * count).exp()
            count += 1
    return total


def cauchy_kernel(v: Tensor, z: Tensor, lam: Tensor) -> Tensor:
    r"""``Σ_n v_n / (z_l − λ_n)``, ``[..., L]``, a few frequencies at a time.

    Args:
        v (Tensor): ``[..., N]``, complex.
        z (Tensor): ``[H, L]``, complex.
        lam (Tensor): ``[H, N]``, complex; conjugate pairs both given.
    """
    parts = []
    for piece in torch.split(z, _FREQUENCIES_AT_ONCE, -1):
        inverse = 1 / (piece[:, None] - lam[..., None])  # [H, N, l]
        parts.append((v[..., None, :] @ inverse).squeeze(-2))
    return torch.cat(parts, -1)


def s4_kernel(lam: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, L: int) -> Tensor:
    r"""S4's filter: ``A = diag(λ) − Pᵀ P̄`` in its eigenbasis, by the bilinear rule.

    The filter's generating function at the roots of unity is a sum of Cauchy products, the low rank
    taken in by Woodbury's identity, and an FFT gives the filter.

    Args:
        lam (Tensor): ``[N]`` or ``[H, N]``, complex, conjugate pairs both given.
        P (Tensor): ``[rank, N]``.
        B (Tensor): ``[N]`` or ``[H, N]``.
        C (Tensor): ``[H, N]``: the output is ``Re(C x)``. S4's code trains ``C (1 − Ā^L)`` in its
            place; here that product is taken.
        dt (Tensor): ``[H]``.
        L: length.

    Returns:
        ``[H, L]``.

    Note: memory is of order ``H · N · 256`` for each Cauchy product, and ``[H, N, N]`` for ``Ā^L``.

    Source: S4, arXiv:2111.00396, algorithm 1.
    """
    H, N = C.shape
    lam, B = lam.expand(H, N), B.expand(H, N)
    step = dt.to(lam.real.dtype)[:, None]
    Ab, _ = discretize_dplr(lam, P, B, dt)
    # A little inside the unit circle, where no eigenvalue can meet a root of unity.
    radius = 0.5 ** (1 / L)
    C = C - 0.5 * (C[:, None] @ torch.linalg.matrix_power(Ab, L)).squeeze(1)
    steps = torch.arange(L, device=C.device, dtype=step.dtype)
    z = radius * torch.exp(-2j * math.pi / L * steps)
    g = 2 / step * (1 - z) / (1 + z)  # [H, L]: K(z) = 2 / (1 + z) C (g - A)^-1 B
    rank = P.shape[0]
    left = torch.cat([C[None], P.conj()[:, None].expand(rank, H, N)])  # [1 + r, H, N]
    right = torch.cat([B[None], P[:, None].expand(rank, H, N)])
    r = cauchy_kernel((left[:, None] * right[None]), g, lam)  # [1 + r, 1 + r, H, L]
    core = r[1:, 1:].permute(2, 3, 0, 1) + torch.eye(rank, device=C.device, dtype=r.dtype)
    inner = torch.linalg.solve(core, r[1:, 0].permute(1, 2, 0)[..., None]).squeeze(-1)
    response = r[0, 0] - (r[0, 1:].permute(1, 2, 0) * inner).sum(-1)
    K: Tensor = torch.fft.ifft(2 / (1 + z) * response, L).real / radius**steps
    return K


def discretize_dplr(lam: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """S4's Ā ``[H, N, N]`` and B̄ ``[H, N]``, by the bilinear rule; arguments as
    :func:`s4_kernel`."""
    A = torch.diag_embed(lam) - P.mT @ P.conj()
    step = dt.to(lam.real.dtype)[:, None, None]
    eye = torch.eye(lam.shape[-1], dtype=A.dtype, device=A.device)
    solved = torch.linalg.solve(
        eye - step / 2 * A, torch.cat([eye + step / 2 * A, step * B[..., None]], -1)
    )
    return solved[..., :-1], solved[..., -1]


def krylov_kernel(A: Tensor, B: Tensor, C: Tensor, L: int) -> Tensor:
    r"""The filter of a dense system, ``K_l = C A^l B`` (LSSL; A and B discretised already).

    Args:
        A, B, C (Tensor): ``[..., N, N]``, ``[..., N]``, ``[..., N]``.
        L: length.

    Returns:
        ``[..., L]``.

    Note: by doubling: with the first 2^i columns ``A^l B`` and the power ``A^{2^i}``, one product
        makes as many more.

    Source: LSSL, arXiv:2110.13985, section 3.

    Example:
        >>> A, B, C = torch.tensor([[0.5]]), torch.ones(1), torch.ones(1)
        >>> krylov_kernel(A, B, C, 4)
        tensor([1.0000, 0.5000, 0.2500, 0.1250])
    """
    return (C[..., None, :] @ _krylov(A, B, L)).squeeze(-2)


def _krylov(A: Tensor, B: Tensor, L: int) -> Tensor:
    """``A^l B`` as columns, ``[..., N, L]``."""
    columns, power = B[..., None], A
    while columns.shape[-1] < L:
        columns = torch.cat([columns, power @ columns], -1)
        power = power @ power
    return columns[..., :L]


def companion(a: Tensor) -> Tensor:
    r"""SpaceTime's state matrix ``[..., N, N]``: a shift down, with ``a [..., N]`` as its last
    column.

    Its filter is :func:`krylov_kernel`'s. With ``a`` learned it holds any autoregression of order
    N.

    Source: Effectively Modeling Time Series with Simple Discrete State Spaces, arXiv:2303.09489,
        section 3.2.

    Example:
        >>> companion(torch.tensor([2.0, 3.0]))
        tensor([[0., 2.],
                [1., 3.]])
    """
    N = a.shape[-1]
    shift = torch.eye(N, device=a.device, dtype=a.dtype)[:, 1:]
    return torch.cat([shift.expand(*a.shape[:-1], N, N - 1), a[..., None]], -1)


def _each_sequence(
    system: Callable[..., tuple[Tensor, Tensor | None]],
    u: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """``system`` over packed sequences, one convolution each; reads the boundaries to the host."""
    runs = []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state = None if initial_state is None else initial_state[n, None]
        runs.append(system(u[:, start:end], initial_state=state))
    y = torch.cat([y for y, _ in runs], 1) if runs else u
    finals = [s for _, s in runs if s is not None]
    return y, torch.cat(finals) if finals else None


def diagonal_ssm(
    u: Tensor,
    log_A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""A diagonal system over whole sequences: ``x_t = Ā ⊙ x_{t−1} + B̄ u_t``, ``y_t = 2 Re(C x_t)
    + D u_t`` (without the 2 if all is real), N states for each channel.

    Args:
        u (Tensor): ``[B, T, H]``.
        log_A (Tensor): ``log Ā``, ``[H, N]``, real or complex.
        B, C (Tensor): B̄ and C, ``[H, N]``.
        D (Tensor, optional): ``[H]``.
        initial_state (Tensor, optional): ``[B, H, N]`` in the dtype of log_A.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences; one convolution
            for each.

    Returns:
        ``y [B, T, H]`` and the state ``[B, H, N]`` or None.

    Note: one long convolution; the initial state adds its free response, the final state is a
        product with the reversed powers. Differentiable.

    Source: S4D, arXiv:2206.11893.

    Example:
        >>> log_A = torch.complex(-torch.rand(8, 4), torch.randn(8, 4))
        >>> B, C = torch.ones(8, 4), torch.randn(8, 4, dtype=torch.complex64)
        >>> diagonal_ssm(torch.randn(1, 100, 8), log_A, B, C)[0].shape
        torch.Size([1, 100, 8])
    """
    if cu_seqlens is not None:
        system = partial(
            diagonal_ssm, log_A=log_A, B=B, C=C, D=D, output_final_state=output_final_state
        )
        return _each_sequence(system, u, initial_state, cu_seqlens)
    T = u.shape[1]
    y = fft_conv(u, diagonal_kernel(log_A, C * B, T), D)
    if initial_state is not None and T:
        free = diagonal_kernel(log_A, C * log_A.exp() * initial_state, T)
        y = y + free.transpose(1, 2).to(y.dtype)
    if not output_final_state:
        return y, None
    age = torch.arange(T - 1, -1, -1, device=u.device, dtype=log_A.real.dtype)
    x = u.to(accumulation_dtype(u))
    # Sums of Ā^age u in pieces of time, so that powers are never all there at once.
    state = torch.zeros(u.shape[0], *log_A.shape, dtype=log_A.dtype, device=u.device)
    if initial_state is not None:
        state = state + initial_state * (log_A * T).exp()
    for piece, ages in zip(torch.split(x, 256, 1), torch.split(age, 256), strict=True) if T else ():
        powers = (log_A[..., None] * ages).exp()
        state = state + B * torch.einsum("bth,hnt->bhn", piece.to(powers.dtype), powers)
    return y, state


def diagonal_ssm_step(
    u: Tensor, log_A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """One token of :func:`diagonal_ssm`: ``u [B, H]``; ``state [B, H, N]`` is updated in place.

    Example:
        >>> log_A, (B, C), state = -torch.rand(8, 4), torch.rand(2, 8, 4), torch.zeros(2, 8, 4)
        >>> diagonal_ssm_step(torch.randn(2, 8), log_A, B, C, None, state).shape
        torch.Size([2, 8])
    """
    check_no_gradient("diagonal_ssm_step", "diagonal_ssm", u, log_A, B, C, state)
    state.mul_(log_A.exp()).add_(B * u[..., None].to(B.real.dtype))
    read = (C * state).sum(-1)
    y = 2 * read.real if read.is_complex() else read
    y = y if D is None else y + D * u
    return y.to(u.dtype)


def dense_ssm(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    kernel: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""A system with a dense matrix over whole sequences: ``x_t = Ā x_{t−1} + B̄ u_t``, ``y_t =
    Re(C x_t) + D u_t``, N states for each channel: LSSL, S4, SpaceTime, LMU.

    Args:
        u (Tensor): ``[B, T, H]``.
        A, B, C (Tensor): Ā ``[H, N, N]``, B̄ and C ``[H, N]``, real or complex.
        D (Tensor, optional): ``[H]``.
        kernel (Tensor, optional): the filter ``[H, T]`` or longer, where it is known in another way
            (:func:`s4_kernel`). Default: :func:`krylov_kernel`'s.
        initial_state (Tensor, optional): ``[B, H, N]`` in the dtype of A.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences; one convolution
            for each.

    Returns:
        ``y [B, T, H]`` and the state ``[B, H, N]`` or None.

    Note: states in or out take ``[H, N, T]`` of memory each. Differentiable.

    Example:
        >>> A, B, C = torch.eye(4).expand(8, 4, 4) / 2, torch.ones(8, 4), torch.randn(8, 4)
        >>> dense_ssm(torch.randn(1, 100, 8), A, B, C)[0].shape
        torch.Size([1, 100, 8])
    """
    if cu_seqlens is not None:
        system = partial(
            dense_ssm, A=A, B=B, C=C, D=D, kernel=kernel, output_final_state=output_final_state
        )
        return _each_sequence(system, u, initial_state, cu_seqlens)
    T = u.shape[1]
    if T == 0:
        empty = A.new_zeros(u.shape[0], *B.shape) if initial_state is None else initial_state
        return u, empty if output_final_state else None
    if kernel is None:
        kernel = krylov_kernel(A, B, C, T)
    y = fft_conv(u, kernel.real, D)
    if initial_state is not None:
        reads = _krylov(A.mT, (C[:, None] @ A).squeeze(1), T)  # C A^{t+1}, [H, N, T]
        free = torch.einsum("bhn,hnt->bth", initial_state, reads)
        y = y + free.real.to(y.dtype)
    if not output_final_state:
        return y, None
    writes = _krylov(A, B, T).flip(-1)
    state = torch.einsum("bth,hnt->bhn", u.to(writes.dtype), writes)
    if initial_state is not None:
        power = torch.linalg.matrix_power(A, T)
        state = state + torch.einsum("hmn,bhn->bhm", power, initial_state)
    return y, state


def dense_ssm_step(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """One token of :func:`dense_ssm`: ``u [B, H]``; ``state [B, H, N]`` is updated in place.

    Example:
        >>> A, B, C = torch.eye(4).expand(8, 4, 4) / 2, torch.ones(8, 4), torch.randn(8, 4)
        >>> dense_ssm_step(torch.randn(2, 8), A, B, C, None, torch.zeros(2, 8, 4)).shape
        torch.Size([2, 8])
    """
    check_no_gradient("dense_ssm_step", "dense_ssm", u, A, B, C, state)
    state.copy_(torch.einsum("hmn,bhn->bhm", A, state) + B * u[..., None].to(B.dtype))
    y = (C * state).sum(-1).real
    return (y if D is None else y + D * u).to(u.dtype)


def h3(
    q: Tensor, k: Tensor, v: Tensor, shift: Tensor, kernel: Tensor, D_shift: Tensor, D: Tensor
) -> Tensor:
    r"""H3 with heads of one channel: ``q ⊙ SSM_diag(SSM_shift(k) ⊙ v)``.

    Args:
        q, k, v (Tensor): ``[B, T, H]``.
        shift (Tensor): the shift system's filter, ``[H, N]``: it remembers N tokens.
        kernel (Tensor): the diagonal system's filter, ``[H, T]``.
        D_shift, D (Tensor): their skips, ``[H]``.

    Returns:
        ``[B, T, H]``.

    Source: Hungry Hungry Hippos, arXiv:2212.14052, section 3.
    """
    remembered = fft_conv(k, shift, D_shift)
    return q * fft_conv(remembered * v, kernel, D)


def liquid_ssm(
    u: Tensor,
    log_A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    order: int | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Liquid-S4, ``x_t = (Ā + B̄ u_t) ⊙ x_{t−1} + B̄ u_t``, diagonal; ``y_t = 2 Re(C x_t) + D u_t``.

    Args:
        u (Tensor): ``[B, T, H]``.
        log_A, B, C (Tensor): as :func:`diagonal_ssm`.
        D (Tensor, optional): ``[H]``.
        order (int, optional): None for the recurrence itself, by :func:`scan`. p ≥ 2: the published
            approximation (KB): S4's convolution, plus for each m = 2 … p the one with ``C B̄^m
            Ā^l`` of the products of m successive inputs; it has no states and takes one sequence
            per row.
        initial_state, output_final_state, cu_seqlens: as :func:`diagonal_ssm`.

    Returns:
        ``y [B, T, H]`` and the state ``[B, H, N]`` or None.

    Raises:
        ValueError: an order below 2, or one together with states or packed sequences.

    Note: the recurrence makes states ``[B, T, H, N]``, which its gradient needs.

    Source: Liquid Structural State-Space Models, arXiv:2209.12951, section 3.

    Example:
        >>> log_A = torch.complex(-torch.rand(8, 4), torch.randn(8, 4))
        >>> B, C = torch.full((8, 4), 0.1), torch.randn(8, 4, dtype=torch.complex64)
        >>> liquid_ssm(torch.randn(1, 100, 8), log_A, B, C)[0].shape
        torch.Size([1, 100, 8])
    """
    if order is not None:
        if order < 2:
            raise ValueError(f"liquid_ssm: order must be at least 2, or None, got {order}")
        if initial_state is not None or output_final_state or cu_seqlens is not None:
            raise ValueError("liquid_ssm: an order comes without states and without cu_seqlens")
        T = u.shape[1]
        y = fft_conv(u, diagonal_kernel(log_A, C * B, T), D)
        product, power = u, B
        for m in range(1, min(order, T)):
            product = product * F.pad(u[:, :-m], (0, 0, m, 0))
            power = power * B
            y = y + fft_conv(product, diagonal_kernel(log_A, C * power, T))
        return y, None
    drive = (B * u[..., None].to(B.real.dtype)).to(log_A.dtype)
    if initial_state is not None:
        initial_state = initial_state.flatten(-2)
    x, state = scan(
        drive.flatten(-2), (log_A.exp() + drive).flatten(-2), initial_state, output_final_state,
        cu_seqlens,
    )  # fmt: skip
    y = _read(x.view(*u.shape, log_A.shape[1]), C, D, u)
    return y, None if state is None else state.view(-1, *log_A.shape)


def liquid_ssm_step(
    u: Tensor, log_A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> Tensor:
    """One token of :func:`liquid_ssm`: ``u [B, H]``; ``state [B, H, N]`` is updated in place.

    Example:
        >>> log_A, B, C = -torch.rand(8, 4), torch.ones(8, 4), torch.randn(8, 4)
        >>> liquid_ssm_step(torch.randn(2, 8), log_A, B, C, None, torch.zeros(2, 8, 4)).shape
        torch.Size([2, 8])
    """
    check_no_gradient("liquid_ssm_step", "liquid_ssm", u, log_A, B, C, state)
    drive = B * u[..., None].to(B.real.dtype)
    state.copy_((log_A.exp() + drive) * state + drive)
    return _read(state, C, D, u)


def _read(x: Tensor, C: Tensor, D: Tensor | None, u: Tensor) -> Tensor:
    """What states ``x [..., H, N]`` show, and the skip, in the dtype of u."""
    read = (C * x).sum(-1)
    y = 2 * read.real if read.is_complex() else read
    return (y if D is None else y + D * u).to(u.dtype)
