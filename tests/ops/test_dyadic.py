"""Piecewise polynomials from level to level: least squares, and back."""

from __future__ import annotations

import pytest
import torch

from lsm_cuda.ops import dyadic_projections, dyadic_reconstruction

N, POINTS = 3, 400


def values(c: torch.Tensor) -> torch.Tensor:
    """Of polynomials on T intervals of [0, 1], at POINTS midpoints of each: ``[T, POINTS]``."""
    T = c.shape[1]
    x = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS * 2 - 1
    legendre = torch.stack([torch.ones_like(x), x, (3 * x.square() - 1) / 2])
    norm = (T * (2 * torch.arange(N, dtype=torch.float64) + 1)).sqrt()
    return torch.einsum("tn,np->tp", c[0, :, 0] * norm, legendre)


def test_projections_are_least_squares() -> None:
    c = torch.randn(1, 8, 1, N, dtype=torch.float64)
    fine = values(c).flatten()
    for coarse in dyadic_projections(c, 3)[1:]:
        T = coarse.shape[1]
        x = torch.linspace(-1, 1, fine.numel() // T, dtype=torch.float64)
        powers = torch.stack([x**n for n in range(N)], 1)
        target = fine.view(T, -1).T
        fitted = powers @ torch.linalg.lstsq(powers, target).solution
        got = values(coarse).repeat_interleave(8 // T, 1).T
        torch.testing.assert_close(got, fitted, rtol=0, atol=0.05)


def test_smooth_polynomials_survive() -> None:
    """One polynomial over everything is every level's; coarse levels alone lead back to it."""
    whole = torch.randn(1, 1, 2, N, dtype=torch.float64)
    zeros = [torch.zeros(1, 2**k, 2, N, dtype=torch.float64) for k in (3, 2, 1)]
    c = dyadic_reconstruction([*zeros, whole])
    levels = dyadic_projections(c, 3)
    torch.testing.assert_close(levels[3], whole)
    torch.testing.assert_close(dyadic_reconstruction([zeros[0], zeros[1], levels[2]]), c)
    torch.testing.assert_close(dyadic_reconstruction(levels[:1]), c)


def test_errors() -> None:
    with pytest.raises(ValueError, match="got T = 6 and levels = 2"):
        dyadic_projections(torch.randn(1, 6, 1, 2), 2)
