"""HiPPO matrices and their kin, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from lsm_cuda.modules import hippo as hp

F64 = torch.float64


def test_legs_as_printed():
    """A_nk = −√((2n+1)(2k+1)) below the diagonal, −(n+1) on it; B_n = √(2n+1)."""
    A, B = hp.hippo("legs", 7)
    for n in range(7):
        assert B[n] == pytest.approx(math.sqrt(2 * n + 1))
        for k in range(7):
            below = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else 0.0
            assert A[n, k] == pytest.approx(-(n + 1) if n == k else below)


def test_legs_answers_with_warped_legendre_polynomials():
    A, B = hp.hippo("legs", 6)
    ages = torch.tensor([0.0, 0.1, 0.7, 3.0], dtype=F64)
    expected = torch.stack([torch.linalg.matrix_exp(A * age) @ B for age in ages])
    torch.testing.assert_close(hp.legs_basis(6, ages), expected)


def test_lagt_answers_with_laguerre_functions():
    """``e^{A age} B`` is L_n(age) e^{-age / 2}."""
    A, B = hp.hippo("lagt", 5)
    for age in (0.0, 0.3, 2.0, 7.0):
        L = [1.0, 1.0 - age]
        for n in range(1, 4):
            L.append(((2 * n + 1 - age) * L[n] - n * L[n - 1]) / (n + 1))
        expected = math.exp(-age / 2) * torch.tensor(L, dtype=F64)
        torch.testing.assert_close(torch.linalg.matrix_exp(A * age) @ B, expected)


def test_legt_answers_with_legendre_polynomials_of_a_window():
    """``e^{A age} B`` is √(2n+1) P_n(1 − 2 age) inside a window of 1, better with more states."""
    A, B = hp.hippo("legt", 64)
    for age in (0.2, 0.5, 0.8):
        got = (torch.linalg.matrix_exp(A * age) @ B)[:3]
        z = 1 - 2 * age
        P = torch.tensor([1.0, math.sqrt(3) * z, math.sqrt(5) * (1.5 * z * z - 0.5)], dtype=F64)
        torch.testing.assert_close(got, P, atol=0.1, rtol=0.1)


def test_lmu_is_legt_in_another_basis():
    """m = D x with D = diag of signs and roots: both keep a sliding window on Legendre
    polynomials."""
    N = 6
    A, B = hp.lmu(N)
    for i in range(N):
        for j in range(N):
            sign = -1 if i < j else (-1) ** (i - j + 1)
            assert A[i, j] == (2 * i + 1) * sign
    L, b = hp.hippo("legt", N)
    n = torch.arange(N)
    scale = (2 * n + 1.0).to(F64).sqrt() * (-1.0) ** n
    torch.testing.assert_close(scale[:, None] * L / scale, A)
    torch.testing.assert_close(scale * b, B)
    torch.testing.assert_close(hp.lmu(N, theta=2.0)[0], A / 2)


def test_fourier_answers_with_waves():
    """Without the window's term A is a rotation; with it, ``e^{A age} B`` is a wave for age < 1."""
    A, B = hp.hippo("fout", 6)
    free = A + B[:, None] * B
    assert torch.equal(free, -free.mT)
    torch.testing.assert_close(free.pow(1)[2, 3], torch.tensor(2 * math.pi, dtype=F64))
    A, B = hp.hippo("foud", 6)
    torch.testing.assert_close(A + 0.5 * B[:, None] * B, free)


@pytest.mark.parametrize("basis", hp.BASES)
def test_nplr_gives_the_matrix_back(basis):
    A, B = hp.hippo(basis, 8)
    lam, P, Bt, V = hp.nplr(basis, 8)
    back = V @ (torch.diag(lam) - P.mT @ P.conj()) @ V.mH
    torch.testing.assert_close(back, A.to(back.dtype), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(V @ Bt, B.to(V.dtype), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(V.mH @ V, torch.eye(8, dtype=V.dtype), atol=1e-12, rtol=0)


def test_perturbed_diagonal():
    """A usable basis, for a matrix that is off by what was asked."""
    A, B = hp.hippo("legs", 16)
    lam, Bt, V = hp.perturbed_diagonal("legs", 16, 0.1)
    off = torch.linalg.matrix_norm(V @ torch.diag(lam) @ torch.linalg.inv(V) - A, 2)
    assert off / torch.linalg.matrix_norm(A, 2) == pytest.approx(0.1)
    torch.testing.assert_close(V @ Bt, B.to(V.dtype))
    _, exact = torch.linalg.eig(A)
    assert torch.linalg.cond(V) < 1e-3 * torch.linalg.cond(exact)


@pytest.mark.parametrize("kind", hp.DIAGONALS)
def test_diagonal_init(kind):
    lam = hp.diagonal_init(kind, 8)
    assert lam.shape == (8,) and lam.dtype == torch.complex128
    assert (lam.real <= 1e-12).all() and (lam.imag >= -1e-9).all()
    n = torch.arange(8, dtype=F64)
    if kind == "lin":
        torch.testing.assert_close(
            lam, torch.complex(torch.full((8,), -0.5, dtype=F64), math.pi * n)
        )
    if kind == "inv":
        torch.testing.assert_close(lam.imag, 16 / math.pi * (16 / (2 * n + 1) - 1))
        torch.testing.assert_close(lam.real, torch.full((8,), -0.5, dtype=F64))
    if kind == "real":
        torch.testing.assert_close(lam, -(n + 1).to(lam.dtype))
    if kind == "legs":
        torch.testing.assert_close(lam.real, torch.full((8,), -0.5, dtype=F64))


def test_discretize():
    A, B = hp.hippo("legs", 5)
    dt = 0.1
    Ab, Bb = hp.discretize(A, B, dt)
    torch.testing.assert_close(Ab, torch.linalg.matrix_exp(dt * A))
    eye = torch.eye(5, dtype=F64)
    torch.testing.assert_close(Bb, torch.linalg.solve(A, (Ab - eye) @ B))
    for method, alpha in {"euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0}.items():
        Ab, Bb = hp.discretize(A, B, dt, method)
        left = eye - alpha * dt * A
        torch.testing.assert_close(left @ Ab, eye + (1 - alpha) * dt * A)
        torch.testing.assert_close(left @ Bb, dt * B)
    singular, one = torch.zeros(2, 2, dtype=F64), torch.ones(2, dtype=F64)
    torch.testing.assert_close(hp.discretize(singular, one, dt)[1], dt * one)


def test_stable_rate():
    w = torch.linspace(-100, 100, 201, dtype=F64, requires_grad=True)
    rate = hp.stable_rate(w)
    assert (rate < 0).all()
    (grad,) = torch.autograd.grad(rate.sum(), w)
    torch.testing.assert_close(grad, 2 * w.detach() * rate.detach() ** 2)
    # the paper's bound: |f'| over f² is at most linear in w
    assert (grad.abs() <= 2 * (w.abs() + 1) * rate**2).all()
    torch.testing.assert_close(hp.stable_rate(hp.stable_rate_inverse(rate)), rate)


def test_errors():
    with pytest.raises(ValueError, match="basis must be one of legs, .* got 'cosine'"):
        hp.hippo("cosine", 4)
    with pytest.raises(ValueError, match="fout needs an even number of states, got N = 5"):
        hp.hippo("fout", 5)
    with pytest.raises(ValueError, match="kind must be one of lin, .* got 'x'"):
        hp.diagonal_init("x", 4)
    with pytest.raises(ValueError, match="method must be zoh, .* got 'rk4'"):
        hp.discretize(*hp.hippo("legs", 2), 0.1, "rk4")
