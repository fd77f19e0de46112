"""Mamba-1's selective scan, under mamba_ssm's name."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _scan
from ._common import (
    accumulation_dtype,
    autocast_dtype,
    check_device_like,
    check_no_forward_ad,
    check_no_gradient,
    check_rank,
    check_shape,
    in_dtype,
    no_double_backward,
)

__all__ = ["selective_scan_fn"]

_TENSORS = (
    "u", "dt", "A", "B", "C", "skip", "z", "dt_bias", "initial_state", "cu_seqlens", "order",
)  # fmt: skip

_TILE = 32  # tokens between the states that CUDA keeps for the backward: selective_tile()


def _same_device(kind: str, tensors: tuple[Tensor | None, ...]) -> None:
    named = dict(zip(_TENSORS, tensors, strict=False))
    u = named.pop("u")
    assert u is not None
    check_device_like(f"selective_scan_{kind}", "u", u, named)


def _like_tokens(u: Tensor, order: Tensor | None) -> Tensor:
    """A tensor like ``u [B, T, D]``; channels lie first where they do in ``u``."""
    if order is None and u.stride(1) == 1 and u.stride(2) != 1:
        return u.new_empty(u.shape[0], u.shape[2], u.shape[1]).transpose(1, 2)
    return u.new_empty(u.shape)


@torch.library.register_fake("lsm::selective_scan_fwd")
def _fwd_fake(*inputs):  # type: ignore[no-untyped-def]
    u, _, A = inputs[:3]
    cu_seqlens, order, _, save_states, output_final_state = inputs[9:]
    _same_device("fwd", inputs[:11])
    (B, T, D), S = u.shape, A.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (N, *A.shape) if output_final_state else (0,)
    tile = _TILE // 2 if A.is_complex() else _TILE
    tiles = N * ((T + tile - 1) // tile) if cu_seqlens is None else T // tile + N
    saved = tiles * D * S if save_states and u.device.type != "cpu" else 0
    return _like_tokens(u, order), A.new_empty(state), A.new_empty((saved,))


@torch.library.register_fake("lsm::selective_scan_bwd")
def _bwd_fake(*inputs):  # type: ignore[no-untyped-def]
    u, _, A, B, C, skip, z, dt_bias, h0, _, order = inputs[:11]
    _same_device("bwd", inputs[:11])

    def like(t: Tensor | None, base: Tensor) -> Tensor:
        return base.new_empty((0,) if t is None else t.shape)

    wide = u.new_empty(0, dtype=accumulation_dtype(u))
    tokens = _like_tokens(u, order), _like_tokens(u, order)
    grads = [*tokens, *(like(t, t) for t in (A, B, C))]
    dz = u.new_empty(0) if z is None else _like_tokens(u, order)
    return (*grads, like(skip, wide), dz, like(dt_bias, wide), like(h0, A))


@torch.library.register_fake("lsm::selective_scan_step")
def _step_fake(*inputs):  # type: ignore[no-untyped-def]
    _same_device("step", (*inputs[:8], inputs[8]))
    return inputs[0].new_empty(inputs[0].shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:11], output[2])
    ctx.softplus, _, ctx.output_final_state = inputs[11:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_final_state, _):  # type: ignore[no-untyped-def]
    *tensors, states = ctx.saved_tensors
    u = tensors[0]
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    if not ctx.output_final_state:
        grad_final_state = None
    if grad_final_state is not None:
        grad_final_state = grad_final_state.resolve_conj()
    grads = torch.ops.lsm.selective_scan_bwd(
        *tensors, ctx.softplus, states, grad_y, grad_final_state
    )
    grads = (None if t is None else g for t, g in zip(tensors[:9], grads, strict=True))
    return (*grads, None, None, None, None, None)


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("selective_scan_bwd"))


torch.library.register_autograd("lsm::selective_scan_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("lsm::selective_scan_bwd", _refuse_double_backward)


def _projection(t: Tensor, A: Tensor) -> Tensor:
    """B or C as mamba_ssm has it, [D, N], [B, N, T] or [B, G, N, T], as the operator wants it."""
    if t.dim() == 2:
        return t.to(A.dtype)
    t = t.unsqueeze(1) if t.dim() == 3 else t
    if A.is_complex() and not t.is_complex():
        t = torch.view_as_complex(t.to(A.real.dtype).reshape(*t.shape[:-1], -1, 2).contiguous())
    return t.permute(0, 3, 1, 2)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Mamba's selective scan over whole sequences; channels first, as mamba_ssm has it.

    ``h_t = exp(δ_t A) ⊙ h_{t-1} + δ_t u_t B_t``,   ``y_t = (C_t · h_t + D u_t) · silu(z_t)``,
    N states per channel.

    Args:
        u (Tensor): ``[B, D, T]``, bf16, fp16 or fp32 (fp64 too on CPU).
        delta (Tensor): step sizes ``[B, D, T]``. delta_bias is added, then softplus taken if
            delta_softplus.
        A (Tensor): ``[D, N]``, real or complex.
        B, C (Tensor): of every token, ``[B, N, T]`` or in groups ``[B, G, N, T]`` (channel d is in
            group ``d // (D // G)``), in the dtype of u; or constant, ``[D, N]``. For complex A they
            are complex, those of tokens given as pairs, ``[.., N, 2T]``, or complex; then
            ``y_t = 2 Re(C_t · h_t)``.
        D (Tensor, optional): ``[D]``.
        z (Tensor, optional): ``[B, D, T]``.
        delta_bias (Tensor, optional): ``[D]``.
        delta_softplus (bool): as above.
        return_last_state (bool): also return the states after the last token.
        initial_state (Tensor, optional): ``[Nseq, D, N]`` in the dtype of A. Default: zeros.
        cu_seqlens (Tensor, optional): ``[Nseq + 1]`` boundaries of sequences packed into one row
            (then B = 1), as in :func:`scan`.
        order (Tensor, optional): ``[T]``, the token of each position of the walk, as in
            :func:`scan` (:func:`scan_order` makes them for images). Results stay at their tokens.

    Returns:
        ``y [B, D, T]`` in the dtype of u; with return_last_state also ``[Nseq, D, N]``, fp32 (fp64,
        complex).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: differentiable once in every floating tensor; deterministic. Nothing of size ``D × N × T``
        is kept: backward walks the sequence forwards again, on the CPU with the states of every
        16th token in a workspace, on CUDA from those of every 32nd (16th if complex), which the
        forward keeps where a gradient is asked for. Channels may lie first, or last as in a
        ``[B, T, D]`` tensor passed as ``x.transpose(1, 2)``: neither is copied, nor any mixture on
        the CPU. On CUDA what lies first is where u lies last, or if there is an order.

    Source: Mamba, arXiv:2312.00752.

    Example:
        >>> u, delta, z = torch.randn(3, 1, 64, 100)
        >>> B, C = torch.randn(2, 1, 16, 100)
        >>> A = -torch.rand(64, 16)
        >>> y, state = selective_scan_fn(
        ...     u, delta, A, B, C, torch.ones(64), z, None, True, return_last_state=True)
        >>> y.shape, state.shape
        (torch.Size([1, 64, 100]), torch.Size([1, 64, 16]))
    """
    op = "selective_scan_fn"
    check_no_forward_ad(op, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, initial_state=initial_state)
    check_rank(op, "u", u, "[B, D, T]")
    for name, t in {"delta": delta, "z": z}.items():
        if t is not None:
            check_shape(op, name, t, "[B, D, T]", u.shape)
    dtype = autocast_dtype(u.device.type)
    if dtype is not None and u.dtype != torch.float64 and not A.is_complex():
        u = u.to(dtype)
    wide = accumulation_dtype(u)
    A = A.to(torch.promote_types(wide, torch.complex64) if A.is_complex() else wide).resolve_conj()
    tokens = [None if t is None else t.to(u.dtype).transpose(1, 2) for t in (u, delta, z)]
    projections = [_projection(t, A).resolve_conj() for t in (B, C)]
    if not A.is_complex():
        projections = [t if t.dim() == 2 else t.to(u.dtype) for t in projections]
    D, delta_bias = (None if t is None else t.to(wide) for t in (D, delta_bias))
    if initial_state is not None:
        initial_state = initial_state.to(A.dtype).resolve_conj()
    tensors = (*tokens[:2], A, *projections, D, tokens[2], delta_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, state, _ = torch.ops.lsm.selective_scan_fwd(
        *tensors, cu_seqlens, order, delta_softplus, save, return_last_state
    )
    y = y.transpose(1, 2)
    return (y, state) if return_last_state else y


_STEP = torch.ops.lsm.selective_scan_step.default


def selective_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """One token, ``[B, D]``; ``state [B, D, N]`` is updated in place. What
    ``selective_state_update`` does where decays differ from channel to channel."""
    if torch.is_grad_enabled():
        check_no_gradient("selective_state_update", "selective_scan_fn", state, x, dt, A, B, C)
    narrow, wide = x.dtype, accumulation_dtype(x)
    is_complex = A.is_complex()
    A = in_dtype(A, _scan.state_dtype(A) if is_complex else wide)
    if not is_complex:
        B, C = in_dtype(B, narrow), in_dtype(C, narrow)
    return _STEP(  # type: ignore[no-any-return]
        x, in_dtype(dt, narrow), A, B, C, None if D is None else in_dtype(D, wide),
        None if z is None else in_dtype(z, narrow),
        None if dt_bias is None else in_dtype(dt_bias, wide), state, dt_softplus,
    )  # fmt: skip
