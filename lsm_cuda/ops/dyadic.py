"""Piecewise polynomials on intervals that double from level to level, as Attraos merges them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ._common import check_rank

__all__ = ["dyadic_projections", "dyadic_reconstruction"]


def two_scale(N: int) -> tuple[Tensor, Tensor]:
    """From an interval's halves to the interval, in orthonormal Legendre polynomials of each.

    The best polynomial of degree below N on an interval has the coefficients ``left @ a + right @
    b`` where its halves have a and b; ``left.T @ c`` and ``right.T @ c`` lead back.

    Returns:
        two matrices ``[N, N]``, fp64, with ``left left' + right right' = 1``.

    Source: Alpert's multiwavelets; Attraos, arXiv:2402.11463.
    """
    # Gauss's rule with N points is exact to degree 2 N - 1.
    points, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(N))
    y, norm = (points + 1) / 2, (2 * torch.arange(N, dtype=torch.float64) + 1).sqrt()

    def basis(x: Tensor) -> Tensor:
        """Orthonormal on [0, 1]: ``[N, points]``."""
        values = np.polynomial.legendre.legvander((2 * x - 1).numpy(), N - 1)
        return torch.from_numpy(values).T * norm[:, None]

    children = (basis(y) * weights / 2).T / 2**0.5
    return basis(y / 2) @ children, basis((1 + y) / 2) @ children


def dyadic_projections(c: Tensor, levels: int) -> list[Tensor]:
    r"""The best polynomials on intervals twice, four times, ... as long.

    Args:
        c (Tensor): ``[B, T, H, N]``, for each of T equal intervals the coefficients of a polynomial
            of degree below N in orthonormal Legendre polynomials of that interval.
        levels (int): L; T must be a multiple of ``2^L``.

    Returns:
        L + 1 tensors ``[B, T / 2^l, H, N]``, the first ``c`` itself: least squares on every
        interval, from level to level by two matrices.

    Raises:
        ValueError: a T that does not divide, or no level.

    Note: differentiable to any order; matrix products in the dtype of c.

    Source: Attraos, arXiv:2402.11463 (its upward pass).

    Example:
        >>> [tuple(x.shape) for x in dyadic_projections(torch.randn(1, 8, 2, 3), 2)]
        [(1, 8, 2, 3), (1, 4, 2, 3), (1, 2, 2, 3)]
    """
    check_rank("dyadic_projections", "c", c, "[B, T, H, N]")
    if levels < 0 or c.shape[1] % 2**levels:
        raise ValueError(
            f"lsm::dyadic_projections: T must be a multiple of 2^levels, got T = {c.shape[1]} and "
            f"levels = {levels}"
        )
    left, right = _matrices(c)
    found = [c]
    for _ in range(levels):
        c = c[:, 0::2] @ left.T + c[:, 1::2] @ right.T
        found.append(c)
    return found


def dyadic_reconstruction(levels: Sequence[Tensor]) -> Tensor:
    r"""The sum of all levels, on the finest intervals.

    Args:
        levels (Sequence): tensors as :func:`dyadic_projections` returns them.

    Returns:
        ``[B, T, H, N]``: a coarse polynomial is, on each half of its interval, a polynomial too.

    Note: differentiable to any order.

    Source: Attraos, arXiv:2402.11463 (its downward pass).

    Example:
        >>> c = torch.randn(1, 8, 2, 3)
        >>> dyadic_reconstruction(dyadic_projections(c, 2)).shape
        torch.Size([1, 8, 2, 3])
    """
    left, right = _matrices(levels[-1])
    total = levels[-1]
    for finer in reversed(levels[:-1]):
        halves = torch.stack([total @ left, total @ right], 2)
        total = finer + halves.flatten(1, 2)
    return total


def _matrices(c: Tensor) -> tuple[Tensor, Tensor]:
    left, right = two_scale(c.shape[-1])
    return left.to(c), right.to(c)
