"""What delta-rule layers do to queries, keys and gates on the way into the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._common import accumulation_dtype, check_shape, in_dtype

__all__ = ["fused_gdn_gate", "fused_kda_gate"]


def fused_gdn_gate(g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    r"""Log decay of a head from its logits: ``−exp(A_log) · softplus(g + dt_bias)``.

    Args:
        g (Tensor): logits ``[..., HV]``.
        A_log (Tensor): log of the decay's rate ``[HV]``.
        dt_bias (Tensor, optional): ``[HV]``, added to g.

    Returns:
        ``[..., HV]`` in fp32 (fp64 for fp64 g): errors of a log decay add up over time.

    Raises:
        RuntimeError: a shape that does not fit.

    Source: Gated Delta Networks, arXiv:2412.06464, section 3.4, after Mamba-2.

    Example:
        >>> fused_gdn_gate(torch.zeros(1, 100, 2), torch.zeros(2)).shape
        torch.Size([1, 100, 2])
    """
    op, dtype = "fused_gdn_gate", accumulation_dtype(g)
    g = g.to(dtype)
    check_shape(op, "A_log", A_log, "[HV]", g.shape[-1:])
    if dt_bias is not None:
        check_shape(op, "dt_bias", dt_bias, "[HV]", g.shape[-1:])
        g = g + dt_bias.to(dtype)
    return A_log.to(dtype).exp() * logsigmoid(-g)


def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
) -> Tensor:
    r"""Log decay of key channels from their logits: ``−exp(A_log) · softplus(g + dt_bias)``, or
    with a lower bound ``lower_bound · σ(exp(A_log) · (g + dt_bias))``.

    Args:
        g (Tensor): logits ``[..., HV, K]``.
        A_log (Tensor, optional): log of the decay's rate ``[HV]``; None for zeros, which only the
            bounded form takes.
        dt_bias (Tensor, optional): ``[HV · K]``, added to g.
        lower_bound (float, optional): the least log decay, below 0.

    Returns:
        ``[..., HV, K]`` in fp32 (fp64 for fp64 g).

    Raises:
        ValueError: no A_log and no lower bound, or a bound that is not negative.
        RuntimeError: a shape that does not fit.

    Source: Kimi Linear, arXiv:2510.26692, section 3.

    Example:
        >>> fused_kda_gate(torch.zeros(1, 100, 2, 16), torch.zeros(2), lower_bound=-5.0).shape
        torch.Size([1, 100, 2, 16])
    """
    op, dtype = "fused_kda_gate", accumulation_dtype(g)
    heads = g.shape[-2:]
    g = g.to(dtype)
    if dt_bias is not None:
        check_shape(op, "dt_bias", dt_bias, "[HV * K]", (heads.numel(),))
        g = g + dt_bias.to(dtype).view(heads)
    rate = None
    if A_log is not None:
        check_shape(op, "A_log", A_log, "[HV]", heads[:1])
        rate = A_log.to(dtype).exp().unsqueeze(-1)
    if lower_bound is not None:
        if lower_bound >= 0:
            raise ValueError(f"lsm::{op}: lower_bound must be below 0, got {lower_bound}")
        return lower_bound * (g if rate is None else rate * g).sigmoid()
    if rate is None:
        raise ValueError(f"lsm::{op}: A_log must be given where lower_bound is not")
    return rate * logsigmoid(-g)


L2_EPS = 1e-6  # of the delta rules' queries and keys


class _L2Norm(torch.autograd.Function):
    """Keeps x as it came and one number per row for backward, instead of wide copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        # what a length is off by is common to a whole row, and sums over tokens collect it
        y = x.to(torch.float32 if x.itemsize < 4 else torch.float64)
        inverse = (y.square().sum(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, inverse.to(accumulation_dtype(x)))
        return in_dtype(y * inverse, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, inverse = ctx.saved_tensors
        y, grad = x * inverse, grad.to(inverse.dtype)
        return (inverse * (grad - y * (y * grad).sum(-1, keepdim=True))).to(x.dtype), None


def l2norm(x: Tensor, eps: float = L2_EPS) -> Tensor:
    """``x / sqrt(Σ x² + eps)`` over the last dimension, in fp32 for half precision, else in fp64,
    rounded to the dtype of x."""
    return _L2Norm.apply(x, eps)  # type: ignore[no-any-return, no-untyped-call]


def beta_sigmoid(op: str, beta: Tensor, use_sigmoid: bool, allow_neg_eigval: bool) -> Tensor:
    """The writing strength: as given, or a sigmoid of it, or twice that."""
    if use_sigmoid:
        beta = beta.to(accumulation_dtype(beta)).sigmoid()
        return 2 * beta if allow_neg_eigval else beta
    if allow_neg_eigval:
        raise ValueError(f"lsm::{op}: allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")
    return beta
