"""The scan engine's operators as Python sees them: shapes for tracing and formulas for autograd.

    h_t = a_t ⊙ h_{t-1} + x_t

``scan`` takes the gate as it is or as its logarithm; ``rg_lru`` makes gate and input from logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import (
    below_autograd,
    call,
    check_device_like,
    check_no_forward_ad,
    no_double_backward,
    plain,
)


def state_dtype(x: Tensor) -> torch.dtype:
    """Of states and of what is per channel."""
    return x.dtype if x.is_complex() or x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Operator:
    """The schema of ``<name>_fwd``: ``tensors``, initial_state, cu_seqlens, order, ``options``
    (bool), output_final_state."""

    name: str
    tensors: tuple[str, ...]
    options: tuple[str, ...]
    optional_gradient: str | None = None  # of the tensors; backward's last argument asks for it


OPERATORS = (
    Operator("scan", ("x", "a"), ("log", "reverse"), "a"),
    Operator("rg_lru", ("x", "i", "r", "c"), ("reverse",)),
)


def _register(op: Operator) -> None:
    """Fake kernels and autograd of one operator."""
    name, count = op.name, len(op.tensors)
    backward_op = f"{name}_bwd"

    def same_device(kind: str, tensors, **rest: Tensor | None) -> None:  # type: ignore[no-untyped-def]
        named = dict(zip(op.tensors, tensors, strict=True))
        x = named.pop("x")
        check_device_like(f"{name}_{kind}", "x", x, named | rest)

    def fwd_fake(*inputs):  # type: ignore[no-untyped-def]
        tensors, (h0, cu_seqlens, order, *_, output_final_state) = inputs[:count], inputs[count:]
        x = tensors[0]
        same_device("fwd", tensors, initial_state=h0, cu_seqlens=cu_seqlens, order=order)
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = (N, x.shape[2]) if output_final_state else (0,)
        return x.new_empty(x.shape), x.new_empty(state, dtype=state_dtype(x))

    def bwd_fake(*inputs):  # type: ignore[no-untyped-def]
        tensors, (h0, cu_seqlens, order, *rest) = inputs[:count], inputs[count:]
        x = tensors[0]
        same_device("bwd", tensors, initial_state=h0, cu_seqlens=cu_seqlens, order=order)
        grads = [t.new_empty(t.shape) for t in tensors]
        if op.optional_gradient and len(rest) == len(op.options) + 4 and not rest[-1]:
            at = op.tensors.index(op.optional_gradient)
            grads[at] = tensors[at].new_empty((0,))
        dh0 = x.new_empty((0,) if h0 is None else h0.shape, dtype=state_dtype(x))
        return (*grads, dh0)

    def step_fake(*inputs):  # type: ignore[no-untyped-def]
        tensors, state = inputs[:count], inputs[count]
        same_device("step", tensors, state=state)
        return tensors[0].new_empty(tensors[0].shape)

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        tensors, options = inputs[: count + 3], inputs[count + 3 : -1]
        ctx.save_for_backward(*tensors, output[0])
        ctx.options, ctx.output_final_state = options, inputs[-1]
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_h, grad_final_state):  # type: ignore[no-untyped-def]
        *tensors, h = ctx.saved_tensors
        h0 = tensors[count]
        grad_h = torch.zeros_like(h) if grad_h is None else grad_h.resolve_conj()
        if not ctx.output_final_state or grad_final_state is None:
            grad_final_state = None
        else:
            grad_final_state = grad_final_state.resolve_conj()
        at = op.tensors.index(op.optional_gradient) if op.optional_gradient else None
        wanted: tuple[bool, ...] = () if at is None else (ctx.needs_input_grad[at],)
        *grads, dh0 = getattr(torch.ops.lsm, backward_op)(
            *tensors, *ctx.options, h, grad_h, grad_final_state, *wanted
        )
        if at is not None and not wanted[0]:
            grads[at] = None
        nothing = (None,) * (3 + len(op.options))  # cu_seqlens, order, options, output_final_state
        return (*grads, None if h0 is None else dh0, *nothing)

    def refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise RuntimeError(no_double_backward(backward_op))

    torch.library.register_fake(f"lsm::{name}_fwd")(fwd_fake)
    torch.library.register_fake(f"lsm::{name}_bwd")(bwd_fake)
    torch.library.register_fake(f"lsm::{name}_step")(step_fake)
    torch.library.register_autograd(f"lsm::{name}_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(f"lsm::{name}_bwd", refuse_double_backward)


for _operator in OPERATORS:
    _register(_operator)
_FORWARD = {op.name: getattr(torch.ops.lsm, f"{op.name}_fwd").default for op in OPERATORS}


def run(
    op: str,
    tensors: tuple[Tensor, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    order: Tensor | None,
    options: tuple[bool, ...],
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Whole sequences through operator ``op``."""
    x = tensors[0]
    forward = below_autograd
    if not plain():
        forward = call
        check_no_forward_ad(f"{op}_fwd", x=x, gate=tensors[1], initial_state=initial_state)
    if x.is_complex():
        tensors = tuple(t.resolve_conj() for t in tensors)
    if initial_state is not None:
        if initial_state.dtype in (torch.bfloat16, torch.float16):
            initial_state = initial_state.float()
        initial_state = initial_state.resolve_conj()
    h, state = forward(
        _FORWARD[op], *tensors, initial_state, cu_seqlens, order, *options, output_final_state
    )
    return h, state if output_final_state else None
