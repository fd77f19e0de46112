"""Feature maps as functions: closed forms, and estimates that approach their kernels."""

from __future__ import annotations

import math

import pytest
import torch

from lsm_cuda.modules.features import (
    cosine_reweighting,
    dpfp,
    favor_exponents,
    focused,
    hedgehog,
    quadratic,
    random_fourier,
    random_projection,
    saturating_exp,
    taylor,
)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scores(f, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return f(q) @ f(k).mT


@pytest.mark.parametrize("D", [1, 2, 7, 16])
def test_taylor_and_quadratic_are_polynomials_of_the_score(D):
    q, k = randn(5, D), randn(6, D)
    s = q @ k.T / math.sqrt(D)
    close(scores(taylor, q, k), 1 + s + s**2 / 2)
    close(scores(quadratic, q, k), (q @ k.T) ** 2 / D)
    assert taylor(q).shape[-1] == 1 + D + D * (D + 1) // 2
    assert quadratic(q).shape[-1] == D * (D + 1) // 2


@pytest.mark.parametrize("nu", [1, 3])
def test_dpfp_is_its_definition(nu):
    x = randn(3, 4)
    for row, got in zip(x, dpfp(x, nu), strict=True):
        r = [max(v, 0) for v in row.tolist()] + [max(-v, 0) for v in row.tolist()]
        # Negative indices wrap around, as the paper's do.
        expected = [r[i] * r[i - j] for j in range(1, nu + 1) for i in range(8)]
        close(got, torch.tensor(expected, dtype=torch.float64))


def test_hedgehog_is_its_formula():
    x = randn(3, 5)
    exponentials = torch.cat([(2 * x).exp(), (-2 * x).exp()], -1)
    close(hedgehog(x), exponentials / exponentials.sum(-1, keepdim=True))
    close(hedgehog(x, softmax=False), torch.cat([x.exp(), (-x).exp()], -1))
    assert hedgehog(x * 1e6).isfinite().all()


def test_focused_keeps_the_norm_and_sharpens():
    x = randn(50, 6)
    x[:, 0] = 0.1  # no row without a positive entry: that is another test
    r = x.clamp(min=0)
    cubes = r**3
    close(focused(x), cubes * r.norm(dim=-1, keepdim=True) / cubes.norm(dim=-1, keepdim=True))
    close(focused(x).norm(dim=-1), r.norm(dim=-1))
    close(focused(x, 1.0), r)
    share = r.amax(-1) / r.norm(dim=-1)
    assert (focused(x).amax(-1) / r.norm(dim=-1) >= share - 1e-12).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_focused_at_any_scale(scale):
    """Cubes of either scale would leave fp32's range."""
    x = torch.randn(20, 6)
    torch.testing.assert_close(focused(x * scale) / scale, focused(x))


def test_focused_of_nothing_is_nothing():
    x = torch.tensor([[-1.0, 0.0, -3.0], [0.0, 2.0, 0.0]], requires_grad=True)
    y = focused(x)
    assert torch.equal(y, torch.tensor([[0.0, 0, 0], [0, 2, 0]]))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


def test_cosine_weights():
    M, T, offset = 20, 9, 5
    q, k = randn(2, T, 3, 4).relu(), randn(2, T, 3, 4).relu()
    q_features, k_features = cosine_reweighting(q, M, offset), cosine_reweighting(k, M, offset)
    weights = torch.einsum("bihd,bjhd->bhij", q_features, k_features)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    cosine = torch.cos(math.pi / 2 * (i - j).double() / M)
    close(weights, torch.einsum("bihd,bjhd->bhij", q, k) * cosine)
    assert (weights >= 0).all()


def test_saturating_exp():
    x = torch.linspace(-50, 30, 40)
    torch.testing.assert_close(saturating_exp(x), x.exp())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        huge = saturating_exp(torch.tensor([100.0, 1e4, math.inf]).to(dtype))
        assert huge.dtype == dtype and huge.isfinite().all()
        assert (huge.double().square() * 1e6).float().isfinite().all()
    assert torch.equal(saturating_exp(torch.tensor([-math.inf])), torch.zeros(1))


def samples(which: str, q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``m`` independent estimates of the kernel of q and k ``[K]``, one per direction."""
    m = w.shape[0]
    if which == "favor":
        return m * favor_exponents(q, w).exp() * favor_exponents(k, w).exp()
    products = random_fourier(q, w) * random_fourier(k, w)
    return m * (products[:m] + products[m:])


def kernel(which: str, q: torch.Tensor, k: torch.Tensor) -> float:
    if which == "favor":
        return math.exp((q @ k).item() / math.sqrt(q.numel()))
    d = q / q.norm() - k / k.norm()
    return math.exp(-(d @ d).item() / 2)


@pytest.mark.parametrize("which", ["favor", "fourier"])
def test_random_features_are_unbiased(which):
    """The mean of 2^17 estimates is within 5 of its standard errors."""
    torch.manual_seed(0)
    w = random_projection(2**17, 5, orthogonal=False).double()
    for _ in range(4):
        q, k = randn(5), randn(5)
        drawn = samples(which, q, k, w)
        error = abs(drawn.mean().item() - kernel(which, q, k))
        assert error <= 5 * drawn.std().item() / math.sqrt(w.shape[0])


@pytest.mark.parametrize("which", ["favor", "fourier"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_random_features_converge(which, orthogonal):
    """16 times the directions, a quarter of the error (200 draws, so 2.5 to 6 times)."""
    torch.manual_seed(0)
    q, k = randn(8), randn(8)

    def rms_error(m: int) -> float:
        draws = [
            samples(which, q, k, random_projection(m, 8, orthogonal).double()).mean()
            for _ in range(200)
        ]
        return (torch.stack(draws) - kernel(which, q, k)).square().mean().sqrt().item()

    assert 2.5 <= rms_error(16) / rms_error(256) <= 6


@pytest.mark.parametrize("which", ["favor", "fourier"])
def test_orthogonal_directions_lower_the_variance(which):
    torch.manual_seed(0)
    q, k = randn(8), randn(8)
    variance = {
        orthogonal: torch.stack(
            [
                samples(which, q, k, random_projection(8, 8, orthogonal).double()).mean()
                for _ in range(2000)
            ]
        ).var()
        for orthogonal in (False, True)
    }
    assert variance[True] < 0.9 * variance[False]


def test_random_projection_is_normal_and_orthogonal():
    torch.manual_seed(0)
    w = random_projection(4 * 6 + 2, 6)
    assert w.shape == (26, 6)
    for block in w.split(6):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-5, rtol=1e-5)
    n = 6 * 4000
    w = random_projection(n, 6).double()
    assert abs(w.mean().item()) < 5 / math.sqrt(6 * n)
    assert abs((w**2).mean().item() - 1) < 5 * math.sqrt(2 / (6 * n))
    # Without the signs of R the first rows would favour one side.
    assert (w[::6].mean(0).abs() < 5 / math.sqrt(n / 6)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "f",
    [taylor, quadratic, hedgehog, focused, saturating_exp, dpfp, lambda x: random_fourier(x, W)],
)
def test_functions_round_once(dtype, f):
    x = torch.randn(40, 16).to(dtype)
    got, exact = f(x), f(x.double())
    assert got.dtype == dtype
    # Half an ulp of the result, and 2e-5 for fp32 inside and what lies below the normal numbers.
    assert ((got.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 2e-5).all()


W = random_projection(12, 16)
