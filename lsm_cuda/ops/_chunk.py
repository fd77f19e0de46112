"""The chunk engine's operators as Python sees them: shapes for tracing, formulas for autograd, and
the two calls that every public function makes.

    S_t = decay(S_{t-1}) + k_t v_tᵀ,        o_t = scale · S_tᵀ q_t

``linear_attn`` has no decay, ``simple_gla`` one per head, ``gla`` one per key channel,
``gla_value`` one per value channel, ``gla_both`` one per channel of either; ``rwkv6`` decays like
``gla`` but reads ``S_{t-1}``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import (
    autocast_dtype,
    check_no_forward_ad,
    check_no_gradient,
    check_same_device,
    no_double_backward,
)

# Operators and the names of their gates, as in csrc/params/operators.h.
OPERATORS: dict[str, tuple[str, ...]] = {
    "linear_attn": (),
    "simple_gla": ("g",),
    "gla": ("g",),
    "gla_value": ("g",),
    "gla_both": ("g", "gv"),
    "rwkv6": ("g",),
}


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _register(name: str) -> None:
    """Fake kernels and autograd of one operator; ``gate`` below holds its gates, 0 to 2."""
    namespace = torch.ops.lsm
    gates = len(OPERATORS[name])

    def same_device(
        kind: str, q: Tensor, k: Tensor, v: Tensor, gate: Sequence[Tensor], **rest: Tensor | None
    ) -> None:
        named = dict(zip(OPERATORS[name], gate, strict=True))
        check_same_device(f"{name}_{kind}", q, k=k, v=v, **named, **rest)

    def fwd_fake(q, k, v, *rest):  # type: ignore[no-untyped-def]
        gate, (h0, cu_seqlens, _, output_final_state) = rest[:gates], rest[gates:]
        same_device("fwd", q, k, v, gate, initial_state=h0, cu_seqlens=cu_seqlens)
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = (N, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
        return v.new_empty(v.shape), q.new_empty(state, dtype=_state_dtype(q))

    def bwd_fake(q, k, v, *rest):  # type: ignore[no-untyped-def]
        gate, (h0, cu_seqlens, *_) = rest[:gates], rest[gates:]
        need_dg = rest[-1] if len(rest) == gates + 6 else True
        same_device("bwd", q, k, v, gate, initial_state=h0, cu_seqlens=cu_seqlens)
        dg = tuple(g.new_empty(g.shape if need_dg else (0,)) for g in gate)
        dh0 = q.new_empty((0,) if h0 is None else h0.shape, dtype=_state_dtype(q))
        return (*(x.new_empty(x.shape) for x in (q, k, v)), *dg, dh0)

    def step_fake(q, k, v, *rest):  # type: ignore[no-untyped-def]
        gate, (state, _, *u) = rest[:gates], rest[gates:]
        same_device("step", q, k, v, gate, state=state, **dict(zip("u", u, strict=False)))
        return v.new_empty(v.shape)

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, scale, output_final_state = inputs  # q, k, v, gate, initial_state, cu_seqlens
        ctx.save_for_backward(*tensors)
        ctx.scale, ctx.output_final_state = scale, output_final_state
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_o, grad_final_state):  # type: ignore[no-untyped-def]
        tensors = ctx.saved_tensors
        v, h0 = tensors[2], tensors[-2]
        grad_o = torch.zeros_like(v) if grad_o is None else grad_o
        if not ctx.output_final_state:
            grad_final_state = None
        wanted = ctx.needs_input_grad[3 : 3 + gates]
        need_dg: tuple[bool, ...] = (any(wanted),) if gates else ()
        *grads, dh0 = getattr(namespace, f"{name}_bwd")(
            *tensors, ctx.scale, grad_o, grad_final_state, *need_dg
        )
        for i, want in enumerate(wanted):
            if not want:
                grads[3 + i] = None
        return (*grads, None if h0 is None else dh0, None, None, None)

    def refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise RuntimeError(no_double_backward(f"{name}_bwd"))

    torch.library.register_fake(f"lsm::{name}_fwd")(fwd_fake)
    torch.library.register_fake(f"lsm::{name}_bwd")(bwd_fake)
    torch.library.register_fake(f"lsm::{name}_step")(step_fake)
    torch.library.register_autograd(f"lsm::{name}_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(f"lsm::{name}_bwd", refuse_double_backward)


for _name in OPERATORS:
    _register(_name)


def chunk(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    state_v_first: bool = False,
    as_given: bool = False,
    gv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Whole sequences through operator ``name``: autocast, default scale, states as asked for.

    ``as_given``: whoever calls has looked at autocast and may have widened q, k and v since: they
    stay, and gates follow them.
    """
    gate = tuple(x for x in (g, gv) if x is not None)
    named = {"q": q, "k": k, "v": v, "initial_state": initial_state}
    check_no_forward_ad(f"{name}_fwd", **named, **dict(zip(OPERATORS[name], gate, strict=True)))
    dtype = q.dtype if as_given else autocast_dtype(q.device.type)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = (x.to(dtype) for x in (q, k, v))
        gate = tuple(x if x.dtype == torch.float32 else x.to(dtype) for x in gate)
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    if initial_state is not None and initial_state.dtype in (torch.bfloat16, torch.float16):
        initial_state = initial_state.float()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operator = getattr(torch.ops.lsm, f"{name}_fwd")
    o, state = operator(q, k, v, *gate, initial_state, cu_seqlens, scale, output_final_state)
    if not output_final_state:
        return o, None
    return o, state.transpose(-1, -2) if state_v_first else state


def step(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float | None,
    chunk_name: str,
    gv: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """One token through operator ``name``; ``chunk_name`` is what to use where gradients are
    needed. ``u``: how much of its own write a token reads that reads before it writes."""
    gate = tuple(x for x in (g, gv) if x is not None)
    check_no_gradient(f"{name}_step", chunk_name, q, k, v, *gate, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operator = getattr(torch.ops.lsm, f"{name}_step")
    bonus = () if u is None else (u,)
    return operator(q, k, v, *gate, state, scale, *bonus)  # type: ignore[no-any-return]
