"""The chunk engine: linear attention with a diagonal decay, whole sequences and single tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    autocast_dtype,
    check_no_forward_ad,
    check_same_device,
    no_double_backward,
)

__all__ = ["chunk_gla", "fused_chunk_gla", "fused_recurrent_gla", "gla_step"]


# --- registrations: shapes for tracing, formulas for autograd


@torch.library.register_fake("lsm::gla_fwd")
def _gla_fwd_fake(  # type: ignore[no-untyped-def]
    q, k, v, g, initial_state, cu_seqlens, scale, output_final_state
):
    check_same_device(
        "gla_fwd", q, k=k, v=v, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (N, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    return v.new_empty(v.shape), q.new_empty(state, dtype=_state_dtype(q))


@torch.library.register_fake("lsm::gla_bwd")
def _gla_bwd_fake(  # type: ignore[no-untyped-def]
    q, k, v, g, initial_state, cu_seqlens, scale, grad_o, grad_final_state
):
    check_same_device(
        "gla_bwd", q, k=k, v=v, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    dh0 = (0,) if initial_state is None else initial_state.shape
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        g.new_empty(g.shape),
        q.new_empty(dh0, dtype=_state_dtype(q)),
    )


@torch.library.register_fake("lsm::gla_step")
def _gla_step_fake(q, k, v, g, state, scale):  # type: ignore[no-untyped-def]
    check_same_device("gla_step", q, k=k, v=v, g=g, state=state)
    return v.new_empty(v.shape)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, g, initial_state, cu_seqlens, scale, output_final_state = inputs
    ctx.save_for_backward(q, k, v, g, initial_state, cu_seqlens)
    ctx.scale, ctx.output_final_state = scale, output_final_state
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_o, grad_final_state):  # type: ignore[no-untyped-def]
    q, k, v, g, initial_state, cu_seqlens = ctx.saved_tensors
    grad_o = torch.zeros_like(v) if grad_o is None else grad_o
    if not ctx.output_final_state:
        grad_final_state = None
    dq, dk, dv, dg, dh0 = torch.ops.lsm.gla_bwd(
        q, k, v, g, initial_state, cu_seqlens, ctx.scale, grad_o, grad_final_state
    )
    return dq, dk, dv, dg, None if initial_state is None else dh0, None, None, None


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("gla_bwd"))


torch.library.register_autograd("lsm::gla_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("lsm::gla_bwd", _refuse_double_backward)


# --- public functions


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Gated linear attention over whole sequences.

    ``S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ``,   ``o_t = scale · S_tᵀ q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        g (Tensor): log decay ``[B, T, HV, K]``, natural log, ≤ 0, in the dtype of q or fp32;
            ``-inf`` resets.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        state_v_first (bool): states are ``[N, HV, V, K]`` instead.
        cu_seqlens (Tensor, optional): ``[N + 1]`` int32 or int64 boundaries of N sequences packed
            into one row (``B == 1``), on the device of q: starts at 0, never decreases, ends at T.
            On a GPU it is checked on the device, without synchronising: outputs of a call whose
            boundaries are wrong are NaN.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K or V over 256 on CUDA.

    Note: differentiable once in q, k, v, g and initial_state; deterministic. Under autocast q, k
        and v are cast, the
    gate and the state keep their dtype.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 2, 32)) / 16
        >>> o, state = chunk_gla(q, k, v, g, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    check_no_forward_ad("gla_fwd", q=q, k=k, v=v, g=g, initial_state=initial_state)
    if (dtype := autocast_dtype(q.device.type)) is not None and q.dtype != torch.float64:
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if g.dtype != torch.float32:
            g = g.to(dtype)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    if initial_state is not None and initial_state.dtype in (torch.bfloat16, torch.float16):
        initial_state = initial_state.float()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, final_state = torch.ops.lsm.gla_fwd(
        q, k, v, g, initial_state, cu_seqlens, scale, output_final_state
    )
    if not output_final_state:
        return o, None
    return o, final_state.transpose(-1, -2) if state_v_first else final_state


def fused_chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """FLA's third name for :func:`chunk_gla`; one kernel serves them all."""
    return chunk_gla(q, k, v, g, scale, initial_state, output_final_state)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gla` under FLA's recurrent name; ``reverse`` runs time backwards.

    With no gradient needed, no ``cu_seqlens`` and one token, it is a decode step: the state is
    read and written once.

    Args: as :func:`chunk_gla`; ``gk`` is its ``g``.
    """
    if reverse:
        if cu_seqlens is not None:
            raise ValueError(
                "lsm::fused_recurrent_gla: reverse with cu_seqlens is not supported; "
                "flip each sequence"
            )
        q, k, v, gk = (x.flip(1) for x in (q, k, v, gk))
        o, state = chunk_gla(q, k, v, gk, scale, initial_state, output_final_state, state_v_first)
        return o.flip(1), state
    return chunk_gla(
        q, k, v, gk, scale, initial_state, output_final_state, state_v_first, cu_seqlens
    )


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float | None = None
) -> Tensor:
    r"""One token of gated linear attention; ``state`` is updated in place, nothing else is
    allocated but the output.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        g (Tensor): log decay ``[B, HV, K]``, natural log, in the dtype of q or fp32.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`chunk_gla` where gradients are needed.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> gla_step(q, k, v, torch.zeros(1, 2, 32), state).shape
        torch.Size([1, 2, 32])
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, state)):
        raise RuntimeError(
            "lsm::gla_step: updates the state in place and has no backward, got an argument that "
            "requires grad; use chunk_gla, or torch.no_grad()"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.lsm.gla_step(q, k, v, g, state, scale)  # type: ignore[no-any-return]
