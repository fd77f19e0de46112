"""What delta-rule layers do to queries, keys and gates on the way into the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import (
    accumulation_dtype,
    check_device_like,
    check_no_forward_ad,
    check_shape,
    in_dtype,
    no_double_backward,
)

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
    return _decay(g, **scalar_gate("fused_gdn_gate", g, A_log, dt_bias))


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
    return _decay(g, **channel_gate("fused_kda_gate", g, A_log, dt_bias, lower_bound))


L2_EPS = 1e-6  # of the delta rules' queries and keys


def l2norm(x: Tensor, eps: float = L2_EPS) -> Tensor:
    """``x / sqrt(Σ x² + eps)`` over the last dimension, in fp32 for half precision, else in fp64,
    rounded to the dtype of x."""
    rows = x if x.dim() in (3, 4) else x.reshape(-1, 1, x.shape[-1])
    y, *_ = delta_inputs(rows, eps=eps)
    assert y is not None
    return y.view(x.shape)


def unit_rows(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`l2norm` of both."""
    q_unit, k_unit, *_ = delta_inputs(q, k)
    assert q_unit is not None and k_unit is not None
    return q_unit, k_unit


def _decay(g: Tensor, **gate: Any) -> Tensor:
    decay = delta_inputs(g=g, **gate)[2]
    assert decay is not None
    return decay


def scalar_gate(op: str, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> dict[str, Any]:
    """What :func:`delta_inputs` needs for :func:`fused_gdn_gate`."""
    if A_log is None:
        raise ValueError(f"lsm::{op}: use_gate_in_kernel=True needs A_log")
    dtype = accumulation_dtype(g)
    check_shape(op, "A_log", A_log, "[HV]", g.shape[-1:])
    if dt_bias is not None:
        check_shape(op, "dt_bias", dt_bias, "[HV]", g.shape[-1:])
        dt_bias = in_dtype(dt_bias, dtype)
    return {"A_log": in_dtype(A_log, dtype), "dt_bias": dt_bias}


def channel_gate(
    op: str,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
) -> dict[str, Any]:
    """What :func:`delta_inputs` needs for :func:`fused_kda_gate`."""
    dtype, heads = accumulation_dtype(g), g.shape[-2:]
    if dt_bias is not None:
        check_shape(op, "dt_bias", dt_bias, "[HV * K]", (heads.numel(),))
        dt_bias = in_dtype(dt_bias, dtype)
    if A_log is not None:
        check_shape(op, "A_log", A_log, "[HV]", heads[:1])
        A_log = in_dtype(A_log, dtype)
    if lower_bound is not None and lower_bound >= 0:
        raise ValueError(f"lsm::{op}: lower_bound must be below 0, got {lower_bound}")
    if lower_bound is None and A_log is None:
        raise ValueError(f"lsm::{op}: A_log must be given where lower_bound is not")
    return {"A_log": A_log, "dt_bias": dt_bias, "by_channel": True, "lower_bound": lower_bound}


def prepared(
    op: str,
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    beta: Tensor,
    norm: bool,
    gate: dict[str, Any] | None,
    use_sigmoid: bool,
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """q, k, g and beta as the operator takes them, whatever is to be done to them in one pass:
    ``gate`` is what makes log decays of g, if that is logits."""
    if allow_neg_eigval and not use_sigmoid:
        raise ValueError(f"lsm::{op}: allow_neg_eigval=True needs use_beta_sigmoid_in_kernel=True")
    given = (q if norm else None, k if norm else None, None if gate is None else g)
    logits = beta if use_sigmoid else None
    if all(x is None for x in (*given, logits)):
        return q, k, g, beta
    strength = 2.0 if allow_neg_eigval else 1.0
    made = delta_inputs(*given, logits, strength=strength, **gate or {})
    q, k, g, beta = (  # type: ignore[assignment]
        x if y is None else y for x, y in zip((q, k, g, beta), made, strict=True)
    )
    return q, k, g, beta


def strengths(beta: Tensor, allow_neg_eigval: bool = False) -> Tensor:
    """The sigmoid of beta, or twice that, in fp32 (fp64 for fp64)."""
    made = delta_inputs(beta=beta, strength=2.0 if allow_neg_eigval else 1.0)[3]
    assert made is not None
    return made


def decays_and_strengths(
    op: str,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`fused_gdn_gate` and :func:`strengths` in one pass."""
    gate = scalar_gate(op, g, A_log, dt_bias)
    made = delta_inputs(g=g, beta=beta, strength=2.0 if allow_neg_eigval else 1.0, **gate)
    assert made[2] is not None and made[3] is not None
    return made[2], made[3]


def delta_inputs(
    q: Tensor | None = None,
    k: Tensor | None = None,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    by_channel: bool = False,
    lower_bound: float | None = None,
    strength: float = 1.0,
    eps: float = L2_EPS,
) -> tuple[Tensor | None, ...]:
    """One pass over what is given: q and k over their lengths, log decays of g, strengths of beta.

    csrc/params/delta_inputs.h has the formulas; None for what is not given.
    """
    tensors = {"q": q, "k": k, "g": g, "beta": beta, "A_log": A_log, "dt_bias": dt_bias}
    check_no_forward_ad("delta_inputs_fwd", **tensors)
    results = torch.ops.lsm.delta_inputs_fwd(
        *tensors.values(), by_channel, lower_bound, strength, eps
    )
    given = (q, k, g, beta)
    return tuple(None if x is None else y for x, y in zip(given, results, strict=True))


_NAMES = ("q", "k", "g", "beta", "A_log", "dt_bias")


def _first(tensors: tuple[Tensor | None, ...]) -> Tensor:
    return next(x for x in tensors if x is not None)


def _check_devices(kind: str, tensors: tuple[Tensor | None, ...]) -> None:
    named = dict(zip(_NAMES, tensors, strict=True))
    first = next(name for name, x in named.items() if x is not None)
    check_device_like(f"delta_inputs_{kind}", first, _first(tensors), named)


def _fwd_fake(*inputs):  # type: ignore[no-untyped-def]
    _check_devices("fwd", inputs[:6])
    absent = _first(inputs)
    return tuple(
        absent.new_empty((0,))
        if x is None
        else x.new_empty(x.shape, dtype=accumulation_dtype(x) if i >= 2 else x.dtype)
        for i, x in enumerate(inputs[:4])
    )


def _bwd_fake(*inputs):  # type: ignore[no-untyped-def]
    _check_devices("bwd", inputs[:6])
    absent, grads = _first(inputs), inputs[10:]
    wanted = [grad is not None for grad in (*grads, grads[2], grads[2])]
    return tuple(
        x.new_empty(x.shape) if x is not None and want else absent.new_empty((0,))
        for x, want in zip(inputs[:6], wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(*(y for x, y in zip(inputs[:4], output, strict=True) if x is None))
    ctx.set_materialize_grads(False)


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
    needed = (wanted[0], wanted[1], wanted[2] or wanted[4] or wanted[5], wanted[3])
    grads = tuple(
        d if x is not None and need else None
        for d, x, need in zip(grads, saved, needed, strict=False)
    )
    none = (None,) * len(ctx.options)
    if all(d is None for d in grads):
        return (None,) * 6 + none
    made = torch.ops.lsm.delta_inputs_bwd(*saved, *ctx.options, *grads)
    of = (*grads, grads[2], grads[2])
    return *(
        d if want and x is not None and up is not None else None
        for d, want, x, up in zip(made, wanted, saved, of, strict=False)
    ), *none


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("delta_inputs_bwd"))


torch.library.register_fake("lsm::delta_inputs_fwd")(_fwd_fake)
torch.library.register_fake("lsm::delta_inputs_bwd")(_bwd_fake)
torch.library.register_autograd("lsm::delta_inputs_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("lsm::delta_inputs_bwd", _refuse_double_backward)
