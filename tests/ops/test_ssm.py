"""State space models: filters against dense powers of their matrices, convolution against steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lsm_cuda.modules import hippo as hp
from lsm_cuda.ops import ssm

H, N = 3, 6
F64, C128 = torch.float64, torch.complex128


def rand(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def steps() -> Tensor:
    return 0.01 + 0.1 * torch.rand(H, dtype=F64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def dense(A: Tensor, B: Tensor, C: Tensor, L: int) -> Tensor:
    """``C A^l B``, one power after another."""
    x, K = B, []
    for _ in range(L):
        K.append((C * x).sum(-1))
        x = (A @ x[..., None])[..., 0]
    return torch.stack(K, -1)


@pytest.mark.parametrize("L", [1, 2, 16, 37])
def test_diagonal_kernel(L):
    log_A, C = (
        torch.complex(-torch.rand(H, N, dtype=F64), 5 * rand(H, N)),
        rand(2, H, N, dtype=C128),
    )
    powers = (log_A[..., None] * torch.arange(L)).exp()
    close(ssm.diagonal_kernel(log_A, C, L), 2 * (C[..., None] * powers).sum(2).real)
    real, weight = -torch.rand(H, N, dtype=F64), rand(H, N)
    powers = (real[..., None] * torch.arange(L)).exp()
    close(ssm.diagonal_kernel(real, weight, L), (weight[..., None] * powers).sum(1))


def test_diagonal_kernel_near_the_unit_circle_for_long():
    """|Ā| within 1e-6 of 1 over 65536 steps, in fp32, against fp64."""
    log_A = torch.complex(-1e-6 * torch.rand(1, 8), torch.rand(1, 8) * 1e-3)
    C = torch.randn(1, 8, dtype=torch.complex64)
    L = 1 << 16
    K = ssm.diagonal_kernel(log_A, C, L)
    truth = ssm.diagonal_kernel(log_A.to(C128), C.to(C128), L)
    assert (K - truth).abs().max() < 2e-5 * truth.abs().max()


@pytest.mark.parametrize("method", ["zoh", "bilinear", "mamba"])
@pytest.mark.parametrize("complex_", [False, True])
def test_discretize_diagonal_is_the_dense_rule(method, complex_):
    A = -torch.rand(H, N, dtype=F64) - 1e-4
    A[0, 0] = -1e-9  # where (e^z - 1) / z cancels
    A = torch.complex(A, rand(H, N)) if complex_ else A
    dt = steps()
    log_A, factor = ssm.discretize_diagonal(A, dt, method)
    for h in range(H):
        rule = "zoh" if method == "mamba" else method
        Ab, Bb = hp.discretize(torch.diag(A[h]), torch.ones(N, dtype=A.dtype), dt[h], rule)
        close(log_A[h].exp(), Ab.diagonal().to(log_A.dtype))
        close(factor[h], dt[h].to(A.dtype).expand(N) if method == "mamba" else Bb)


@pytest.mark.parametrize("basis", hp.BASES)
@pytest.mark.parametrize("L", [20, 21])
def test_s4_kernel(basis, L):
    A, B = hp.hippo(basis, N)
    lam, P, Bt, V = hp.nplr(basis, N)
    C, dt = rand(H, N), steps()
    Ab, Bb = hp.discretize(A.expand(H, N, N), B.expand(H, N), dt, "bilinear")
    expected = dense(Ab, Bb, C, L)
    close(ssm.s4_kernel(lam, P, Bt, C.to(C128) @ V, dt, L), expected)
    close(ssm.krylov_kernel(Ab, Bb, C, L), expected)


def test_companion():
    a, B, C = 0.3 * rand(H, N), rand(H, N), rand(H, N)
    A = torch.zeros(H, N, N, dtype=F64)
    A[:, range(1, N), range(N - 1)] = 1
    A[:, :, -1] = a
    assert torch.equal(ssm.companion(a), A)
    close(ssm.krylov_kernel(ssm.companion(a), B, C, 30), dense(A, B, C, 30))


def test_dss_kernels():
    """Growing rows too, whose softmax is taken from their end."""
    A = torch.complex(torch.tensor([-1.0, 1.0, -0.01, 0.02, -3.0, 0.0], dtype=F64), rand(N))
    C, dt, L = rand(H, N, dtype=C128), steps(), 40
    z = (dt[:, None] * A)[..., None] * torch.arange(L)
    powers = z.exp()
    expected = (C[..., None] * powers / powers.sum(-1, keepdim=True)).sum(1).real
    close(ssm.dss_kernel(A, C, dt, L), expected)
    factor = ((dt[:, None] * A).exp() - 1) / A
    close(
        ssm.dss_kernel(A[None, :5], C[:, :5], dt, L, "exp"),
        (C[:, :5, None] * factor[:, :5, None] * powers[:, :5]).sum(1).real,
    )
    far = torch.complex(torch.tensor([50.0, -50.0], dtype=F64), torch.zeros(2, dtype=F64))
    assert ssm.dss_kernel(far, rand(H, 2, dtype=C128), 10 * dt, 2000).isfinite().all()


def test_fft_conv_is_a_convolution():
    u, K, D = rand(2, 23, H), rand(H, 23), rand(H)
    expected = torch.stack(
        [sum(K[:, j] * u[:, t - j] for j in range(t + 1)) + D * u[:, t] for t in range(23)], 1
    )
    close(ssm.fft_conv(u, K, D), expected)
    short = torch.cat([K[:, :5], torch.zeros(H, 18, dtype=F64)], 1)
    close(ssm.fft_conv(u, K[:, :5]), ssm.fft_conv(u, short))
    close(ssm.fft_conv(u, torch.cat([K, K], 1)), ssm.fft_conv(u, K))
    assert ssm.fft_conv(u[:, :0], K).shape == (2, 0, H)


@pytest.mark.parametrize("complex_", [False, True])
def test_convolution_is_recurrence(complex_):
    """Step by step, with states in and out, and cut anywhere."""
    log_A = -torch.rand(H, N, dtype=F64)
    log_A = torch.complex(log_A, rand(H, N)) if complex_ else log_A
    B, C, D = rand(H, N, dtype=log_A.dtype), rand(H, N, dtype=log_A.dtype), rand(H)
    u, first = rand(2, 19, H), rand(2, H, N, dtype=log_A.dtype)
    y, final = ssm.diagonal_ssm(u, log_A, B, C, D, first, True)
    state = first.clone()
    stepped = [ssm.diagonal_ssm_step(u[:, t], log_A, B, C, D, state) for t in range(19)]
    close(y, torch.stack(stepped, 1))
    close(final, state)
    a, middle = ssm.diagonal_ssm(u[:, :8], log_A, B, C, D, first, True)
    b, last = ssm.diagonal_ssm(u[:, 8:], log_A, B, C, D, middle, True)
    close(torch.cat([a, b], 1), y)
    close(last, final)


def test_gradients():
    log_A = torch.complex(-torch.rand(1, 3, dtype=F64), rand(1, 3)).requires_grad_()
    B, C = rand(1, 3, dtype=C128).requires_grad_(), rand(1, 3, dtype=C128).requires_grad_()
    u, D = rand(1, 5, 1).requires_grad_(), rand(1).requires_grad_()
    h = rand(1, 1, 3, dtype=C128).requires_grad_()

    def call(u, log_A, B, C, D, h):
        y, state = ssm.diagonal_ssm(u, log_A, B, C, D, h, True)
        return y, state.real, state.imag

    assert torch.autograd.gradcheck(call, (u, log_A, B, C, D, h))
    lam, P, Bt, _ = hp.nplr("legs", 4)
    leaves = [x.clone().requires_grad_() for x in (lam, P, Bt, rand(1, 4, dtype=C128))]
    dt = torch.tensor([0.1], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: ssm.s4_kernel(*x, 7), (*leaves, dt))


def test_gradients_of_filters():
    """By differences: what the layers differentiate through."""
    A = torch.complex(torch.tensor([[-1.0, 0.5]], dtype=F64), rand(1, 2))
    C, dt = rand(1, 2, dtype=C128), torch.tensor([0.3], dtype=F64)
    dense_A, B = 0.4 * rand(1, 2, 2), rand(1, 2)
    u, D, state = rand(1, 5, 1), rand(1), rand(1, 1, 2)
    calls = {
        "dss": (lambda A, C, dt: ssm.dss_kernel(A, C, dt, 5), (A, C, dt)),
        "dss exp": (lambda A, C, dt: ssm.dss_kernel(A, C, dt, 5, "exp"), (A, C, dt)),
        "krylov": (lambda A, B, C: ssm.krylov_kernel(A, B, C, 5), (dense_A, B, rand(1, 2))),
        "companion": (lambda a, B: ssm.krylov_kernel(ssm.companion(a), B, B, 5), (B, rand(1, 2))),
        "dense": (
            lambda u, A, B, C, D, h: ssm.dense_ssm(u, A, B, C, D, None, h, True),
            (u, dense_A, B, rand(1, 2), D, state),
        ),
        "h3": (ssm.h3, (*rand(3, 1, 5, 1), rand(1, 2), rand(1, 5), D, D)),
        "liquid": (
            lambda u, A, B, C, D, h: torch.view_as_real(
                ssm.liquid_ssm(u, A, B, C, D, None, h, True)[1]
            ),
            (u, -A.abs() + 1j, 0.1 * B, C, D, state.to(C128)),
        ),
        "liquid 3": (
            lambda u, A, B, C: ssm.liquid_ssm(u, A, B, C, None, 3)[0],
            (u, -A.abs() + 1j, 0.1 * B, C),
        ),
    }
    for name, (call, inputs) in calls.items():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(call, leaves), name


def test_h3_is_shift_then_diagonal():
    q, k, v, shift = rand(1, 12, H), rand(1, 12, H), rand(1, 12, H), rand(H, 4)
    kernel, D_shift, D = rand(H, 12), rand(H), rand(H)
    remembered = (
        torch.stack(
            [sum(shift[:, j] * k[:, t - j] for j in range(min(4, t + 1))) for t in range(12)], 1
        )
        + D_shift * k
    )
    x = remembered * v
    out = torch.stack([sum(kernel[:, j] * x[:, t - j] for j in range(t + 1)) for t in range(12)], 1)
    close(ssm.h3(q, k, v, shift, kernel, D_shift, D), q * (out + D * x))


def test_liquid():
    """Its approximation is exact where only two successive inputs are not zero."""
    log_A = torch.complex(-torch.rand(H, N, dtype=F64), rand(H, N))
    B, C, D = 0.1 * rand(H, N, dtype=C128), rand(H, N, dtype=C128), rand(H)
    u = rand(1, 15, H)
    x, A, expected = torch.zeros(1, H, N, dtype=C128), log_A.exp(), []
    for t in range(15):
        drive = B * u[:, t, :, None]
        x = (A + drive) * x + drive
        expected.append(2 * (C * x).sum(-1).real + D * u[:, t])
    y, state = ssm.liquid_ssm(u, log_A, B, C, D, output_final_state=True)
    close(y, torch.stack(expected, 1))
    close(state, x)
    pulse = torch.zeros(1, 15, H, dtype=F64)
    pulse[:, 4:6] = rand(1, 2, H)
    exact, _ = ssm.liquid_ssm(pulse, log_A, B, C, D)
    close(ssm.liquid_ssm(pulse, log_A, B, C, D, order=2)[0], exact)
    close(ssm.liquid_ssm(pulse, log_A, B, C, D, order=4)[0], exact)


def test_liquid_steps():
    log_A = torch.complex(-torch.rand(H, N, dtype=F64), rand(H, N))
    B, C, D, u = 0.1 * rand(H, N), rand(H, N, dtype=C128), rand(H), rand(2, 6, H)
    state = torch.zeros(2, H, N, dtype=C128)
    steps = [ssm.liquid_ssm_step(u[:, t], log_A, B, C, D, state) for t in range(6)]
    y, final = ssm.liquid_ssm(u, log_A, B, C, D, output_final_state=True)
    close(y, torch.stack(steps, 1))
    close(final, state)
    a, middle = ssm.liquid_ssm(u[:, :2], log_A, B, C, D, output_final_state=True)
    b, last = ssm.liquid_ssm(u[:, 2:], log_A, B, C, D, None, middle, True)
    close(torch.cat([a, b], 1), y)
    close(last, final)


def test_errors():
    for text, call in {
        "order must be at least 2, or None, got 1": lambda: ssm.liquid_ssm(
            rand(1, 3, H), rand(H, N), rand(H, N), rand(H, N), order=1
        ),
        "variant must be softmax or exp, got 'max'": lambda: ssm.dss_kernel(
            rand(N, dtype=C128), rand(H, N, dtype=C128), steps(), 4, "max"
        ),
        "method must be zoh, bilinear or mamba, got 'euler'": lambda: ssm.discretize_diagonal(
            rand(H, N), steps(), "euler"
        ),
    }.items():
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(
        RuntimeError, match=r"kernel must have shape \[H, L\] = \[3, 5\], got \[2, 5\]"
    ):
        ssm.fft_conv(rand(1, 5, 3), rand(2, 5))


def test_dense_convolution_is_recurrence():
    """Step by step, with states in and out, cut anywhere, packed; and S4's filter is that of its
    Ā."""
    lam, P, B, _ = hp.nplr("legs", N)
    C, dt, D = rand(H, N, dtype=C128), steps(), rand(H)
    Ab, Bb = ssm.discretize_dplr(lam, P, B, dt)
    u, first = rand(2, 19, H), rand(2, H, N, dtype=C128)
    y, final = ssm.dense_ssm(u, Ab, Bb, C, D, None, first, True)
    state = first.clone()
    stepped = [ssm.dense_ssm_step(u[:, t], Ab, Bb, C, D, state) for t in range(19)]
    close(y, torch.stack(stepped, 1))
    close(final, state)
    kernel = ssm.s4_kernel(lam, P, B, C, dt, 19)
    close(ssm.dense_ssm(u, Ab, Bb, C, D, kernel)[0], ssm.dense_ssm(u, Ab, Bb, C, D)[0])
    cu = torch.tensor([0, 8, 8, 19])
    states = torch.cat([first, first[:1]])
    packed, finals = ssm.dense_ssm(u[:1], Ab, Bb, C, D, None, states, True, cu)
    for n, (a, b) in enumerate(((0, 8), (8, 8), (8, 19))):
        alone, last = ssm.dense_ssm(u[:1, a:b], Ab, Bb, C, D, None, states[n, None], True)
        close(packed[:, a:b], alone)
        close(finals[n, None], last)
