"""Feature maps as functions: from queries or keys ``[..., D]`` to features ``[..., F]``.

Computed in fp32, or fp64, and given in the dtype of the input. With weights ``f(q) · f(k)`` linear
attention becomes attention with the kernel that each docstring names. Where that divides the score
by √D, linear attention must not scale queries again. ``modules.feature_map`` has the papers, and
the maps with parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import no_autocast, wide
from .rotary import linear_phase, token_positions

__all__ = [
    "cosine_reweighting",
    "dpfp",
    "exp_over_largest",
    "favor_exponents",
    "focused",
    "hedgehog",
    "pairs",
    "quadratic",
    "random_fourier",
    "random_projection",
    "saturating_exp",
    "taylor",
]


def exp_over_largest(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``exp(x − max x)``, the maximum taken over ``dims``."""
    return (x - x.amax(dims, keepdim=True)).exp() if x.numel() else x


def saturating_exp(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``e^x`` in ``dtype``, up to ``e^32`` (fp16: ``e^10``): sums of products stay finite."""
    dtype = x.dtype if dtype is None else dtype
    limit = min(32.0, math.log(torch.finfo(dtype).max) - 1)
    return wide(x).clamp(max=limit).exp().to(dtype)


def hedgehog(x: Tensor, softmax: bool = True) -> Tensor:
    """``softmax([2x, −2x])``, or ``[e^x, e^−x]`` without ``softmax``: ``[..., D]`` to ``2 D``."""
    both = torch.cat([x, -x], -1)
    return (2 * wide(both)).softmax(-1).to(x.dtype) if softmax else saturating_exp(both)


def dpfp(x: Tensor, nu: int = 4) -> Tensor:
    """Products ``r_i r_{i−j}``, j = 1..ν, of ``r = relu([x, −x])``: ``[..., D]`` to ``2 ν D``."""
    r = torch.cat([x, -x], -1).relu()
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)


def taylor(x: Tensor) -> Tensor:
    """``f(q) · f(k) = 1 + s + s²/2`` with ``s = q · k / √D``: to ``1 + D + D (D + 1) / 2``."""
    y = wide(x) / math.sqrt(math.sqrt(x.shape[-1]))
    squares = y.square() / math.sqrt(2)
    return torch.cat([torch.ones_like(y[..., :1]), y, squares, pairs(y, y, 1)], -1).to(x.dtype)


def quadratic(x: Tensor) -> Tensor:
    """``f(q) · f(k) = (q · k)² / D``: ``[..., D]`` to ``D (D + 1) / 2``."""
    y = wide(x) / math.sqrt(math.sqrt(x.shape[-1]))
    return torch.cat([y.square(), math.sqrt(2) * pairs(y, y, 1)], -1).to(x.dtype)


def focused(x: Tensor, power: float = 3.0) -> Tensor:
    """``|r| / |r^p| · r^p`` with ``r = relu(x)``: keeps the norm, sharpens the direction."""
    r = wide(x).relu()
    # Dividing by the largest entry changes nothing but the range of r^p; hence no gradient.
    top = r.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)
    r = r / top
    norm: Tensor = top * torch.linalg.vector_norm(r, dim=-1, keepdim=True)
    return (norm * F.normalize(r.pow(power), dim=-1)).to(x.dtype)


def cosine_reweighting(x: Tensor, max_len: int, offset: int | Tensor = 0) -> Tensor:
    """Weights with ``cos(π (i − j) / 2M)``: ``x [B, T, H, D]`` to ``[B, T, H, 2 D]``.

    Args:
        x: non-negative queries or keys.
        max_len: M; weights of tokens further apart than M are negative.
        offset: position of the first token, or of every token, ``[T]`` or ``[B, T]``.
    """
    return linear_phase(x, token_positions(x, offset) * (math.pi / 2 / max_len))


def pairs(x: Tensor, y: Tensor, diagonal: int) -> Tensor:
    """``x_i y_j`` for ``j − i ≥ diagonal``, without the whole outer product."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], diagonal, device=x.device)
    return x.index_select(-1, i) * y.index_select(-1, j)


def favor_exponents(x: Tensor, projection: Tensor) -> Tensor:
    """Logs, in fp32, of positive random features ``f_i(x) = exp(w_i · y − |y|²/2) / √m``.

    With ``y = x / K^(1/4)`` and the m rows w of ``projection [m, K]`` normal, the expectation of
    ``f(q) · f(k)`` is ``exp(q · k / √K)``.
    """
    y = wide(x) / math.sqrt(math.sqrt(x.shape[-1]))
    with no_autocast(x):
        along = y @ projection.to(y.dtype).T
    return along - y.square().sum(-1, keepdim=True) / 2 - math.log(projection.shape[0]) / 2


def random_fourier(x: Tensor, projection: Tensor) -> Tensor:
    """``[sin(w_i · y), cos(w_i · y)] / √m`` of ``y = x / |x|``: ``[..., K]`` to ``2 m``.

    With the m rows w of ``projection [m, K]`` normal with covariance Σ, the expectation of
    ``f(q) · f(k)`` is ``exp(−d' Σ d / 2)`` for d the difference of the two y.
    """
    y = F.normalize(wide(x), dim=-1)
    with no_autocast(x):
        phase = y @ projection.to(y.dtype).T
    features = torch.cat([phase.sin(), phase.cos()], -1)
    return (features / math.sqrt(projection.shape[0])).to(x.dtype)


def random_projection(rows: int, columns: int, orthogonal: bool = True) -> Tensor:
    """Normal rows ``[rows, columns]``, each block of ``columns`` of them orthogonal if wanted."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    w = torch.randn(rows, columns, dtype=dtype)
    if not orthogonal:
        return w
    blocks = -(-rows // columns)
    q, r = torch.linalg.qr(torch.randn(blocks, columns, columns, dtype=dtype))
    # With R's diagonal positive Q is uniformly distributed, so that every row is exactly normal.
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    directions: Tensor = q.mT.flatten(0, 1)[:rows]
    lengths: Tensor = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    return directions * lengths
