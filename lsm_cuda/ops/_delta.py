"""The delta engine's operators as Python sees them: shapes for tracing, formulas for autograd, and
the two calls that every public function makes.

    S ← A_t S + k_t β_t (v_t − S̃ᵀ e_t)ᵀ,        o_t = scale · S_tᵀ q_t

``delta_rule`` has no decay A, ``gated_delta_rule`` one per head, ``kda`` one per key channel, and
all three erase what k itself reads from the decayed state, in several micro-steps per token if
asked to; ``comba`` erases with a key p of its own, before the decay. ``dplr`` is ``S ← A S + b
(Sᵀ a)ᵀ + k vᵀ``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    autocast_dtype,
    check_no_forward_ad,
    check_no_gradient,
    check_same_device,
    no_double_backward,
)

# What each operator takes between v and initial_state. Gates (g, beta) keep their own dtype.
TAKES = {
    "delta_rule": ("beta",),
    "gated_delta_rule": ("g", "beta"),
    "kda": ("g", "beta"),
    "comba": ("p", "g", "beta"),
    "dplr": ("a", "b", "g"),
}
OPERATORS = tuple(TAKES)
IN_STEPS = ("delta_rule", "gated_delta_rule", "kda")  # take num_householder


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _register(name: str) -> None:
    """Fake kernels and autograd of one operator; ``own`` below holds what TAKES lists."""
    namespace = torch.ops.lsm
    takes, tensors = TAKES[name], 3 + len(TAKES[name])
    gate = 3 + takes.index("g") if "g" in takes else None

    def check(kind: str, q: Tensor, *rest: Tensor | None, **named: Tensor | None) -> None:
        names = ("k", "v", *takes)
        check_same_device(f"{name}_{kind}", q, **dict(zip(names, rest, strict=True)), **named)

    def heads_of(q: Tensor, v: Tensor) -> tuple[int, ...]:
        return *q.shape[:-2], *v.shape[-2:]  # [B, T, HV, V] or [B, HV, V]

    def fwd_fake(*args):  # type: ignore[no-untyped-def]
        (q, k, v, *own), (h0, cu_seqlens, _, output_final_state) = (
            args[:tensors],
            args[tensors : tensors + 4],
        )
        check("fwd", q, k, v, *own, initial_state=h0, cu_seqlens=cu_seqlens)
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = (N, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
        return v.new_empty(heads_of(q, v)), q.new_empty(state, dtype=_state_dtype(q))

    def bwd_fake(*args):  # type: ignore[no-untyped-def]
        (q, k, v, *own), (h0, cu_seqlens, *rest) = args[:tensors], args[tensors:]
        need_dg = rest[3] if gate is not None and len(rest) > 3 else True
        check("bwd", q, k, v, *own, initial_state=h0, cu_seqlens=cu_seqlens)
        grads = []
        for i, x in enumerate((q, k, v, *own)):
            absent = x is None or (i == gate and not need_dg)
            grads.append((q if x is None else x).new_empty((0,) if absent else x.shape))
        return (*grads, q.new_empty((0,) if h0 is None else h0.shape, dtype=_state_dtype(q)))

    def step_fake(*args):  # type: ignore[no-untyped-def]
        (q, k, v, *own), state = args[:tensors], args[tensors]
        check("step", q, k, v, *own, state=state)
        return v.new_empty(heads_of(q, v))

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[: tensors + 2])  # with initial_state and cu_seqlens
        ctx.scale, ctx.output_final_state, *ctx.steps = inputs[tensors + 2 :]
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_o, grad_final_state):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        q, v, h0 = saved[0], saved[2], saved[tensors]
        grad_o = v.new_zeros(heads_of(q, v)) if grad_o is None else grad_o
        if not ctx.output_final_state:
            grad_final_state = None
        wanted = ctx.needs_input_grad
        need_dg = () if gate is None else (wanted[gate],)
        *grads, dh0 = getattr(namespace, f"{name}_bwd")(
            *saved, ctx.scale, grad_o, grad_final_state, *need_dg, *ctx.steps
        )
        grads = [d if wanted[i] and saved[i] is not None else None for i, d in enumerate(grads)]
        # initial_state, cu_seqlens, scale, output_final_state, num_householder
        return (*grads, None if h0 is None else dh0, None, None, None, *(None for _ in ctx.steps))

    def refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise RuntimeError(no_double_backward(f"{name}_bwd"))

    torch.library.register_fake(f"lsm::{name}_fwd")(fwd_fake)
    torch.library.register_fake(f"lsm::{name}_bwd")(bwd_fake)
    torch.library.register_fake(f"lsm::{name}_step")(step_fake)
    torch.library.register_autograd(f"lsm::{name}_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(f"lsm::{name}_bwd", refuse_double_backward)


for _name in OPERATORS:
    _register(_name)


def _steps(name: str, num_householder: int) -> tuple[int, ...]:
    return (num_householder,) if name in IN_STEPS else ()


def delta(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: tuple[Tensor | None, ...],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    num_householder: int = 1,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Whole sequences through operator ``name``; ``own``: what TAKES lists for it. Autocast,
    default scale, states as asked for."""
    named = dict(zip(TAKES[name], own, strict=True))
    check_no_forward_ad(f"{name}_fwd", q=q, k=k, v=v, initial_state=initial_state, **named)
    if (dtype := autocast_dtype(q.device.type)) is not None and q.dtype != torch.float64:
        q, k, v = (x.to(dtype) for x in (q, k, v))
        for n, x in named.items():
            if x is not None and not (n in ("g", "beta") and x.dtype == torch.float32):
                named[n] = x.to(dtype)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    if initial_state is not None and initial_state.dtype in (torch.bfloat16, torch.float16):
        initial_state = initial_state.float()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operator = getattr(torch.ops.lsm, f"{name}_fwd")
    o, state = operator(
        q, k, v, *named.values(), initial_state, cu_seqlens, scale, output_final_state,
        *_steps(name, num_householder),
    )  # fmt: skip
    if not output_final_state:
        return o, None
    return o, state.transpose(-1, -2) if state_v_first else state


def delta_step(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: tuple[Tensor | None, ...],
    state: Tensor,
    scale: float | None,
    chunk_name: str,
    num_householder: int = 1,
) -> Tensor:
    """One token through operator ``name``; ``chunk_name`` is what to use where gradients are
    needed."""
    given = (x for x in own if x is not None)
    check_no_gradient(f"{name}_step", chunk_name, q, k, v, *given, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operator = getattr(torch.ops.lsm, f"{name}_step")
    steps = _steps(name, num_householder)
    return operator(q, k, v, *own, state, scale, *steps)  # type: ignore[no-any-return]
