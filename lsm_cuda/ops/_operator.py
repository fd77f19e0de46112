"""What the operators of the chunk and delta engines have in common as Python sees them: shapes for
tracing, formulas for autograd, and the two calls that every public function makes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._common import (
    accumulation_dtype,
    autocast_dtype,
    call,
    check_no_forward_ad,
    check_no_gradient,
    check_same_device,
    no_double_backward,
)

GATES = ("g", "gv")  # their gradients are only made if asked for
KEEP_FLOAT32 = (*GATES, "beta", "w")  # where everything else follows autocast

# The most values of a head that kernels of whole sequences take; wider heads come in slices.
VALUES = {"cuda": 256}
BY_VALUE = {"gla_value": "g", "gla_both": "gv"}  # whose gates stand by values' channels, not keys'

# Devices whose kernels weigh values and divide outputs themselves; elsewhere that is composed.
FUSED = {"cpu"}

# Devices whose bf16 kernels weigh values and finish outputs as Mamba-2 has it, or divide them.
FINISHED = {"cuda"}


def register(name: str, takes: tuple[str, ...], step: bool = True) -> None:
    """Fake kernels and autograd of one operator, with the arguments ``takes`` between v and
    initial_state; ``own`` below holds them. ``step``: whether it has one."""
    namespace = torch.ops.lsm
    tensors = 3 + len(takes)
    gates = [3 + i for i, x in enumerate(takes) if x in GATES]

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
        return v.new_empty(heads_of(q, v)), q.new_empty(state, dtype=accumulation_dtype(q))

    def bwd_fake(*args):  # type: ignore[no-untyped-def]
        (q, k, v, *own), (h0, cu_seqlens, *rest) = args[:tensors], args[tensors:]
        need_dg = rest[3] if gates and len(rest) > 3 else True
        check("bwd", q, k, v, *own, initial_state=h0, cu_seqlens=cu_seqlens)
        grads = []
        for i, x in enumerate((q, k, v, *own)):
            absent = x is None or (i in gates and not need_dg)
            grads.append((q if x is None else x).new_empty((0,) if absent else x.shape))
        h0_shape = (0,) if h0 is None else h0.shape
        return (*grads, q.new_empty(h0_shape, dtype=accumulation_dtype(q)))

    def step_fake(*args):  # type: ignore[no-untyped-def]
        (q, k, v, *own), (state, _, *more) = args[:tensors], args[tensors:]
        u = next((x for x in more if isinstance(x, Tensor)), None)
        check("step", q, k, v, *own, state=state, u=u)
        return v.new_empty(heads_of(q, v))

    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[: tensors + 2])  # with initial_state and cu_seqlens
        ctx.scale, ctx.output_final_state, *ctx.more = inputs[tensors + 2 :]
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_o, grad_final_state):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        q, v, h0 = saved[0], saved[2], saved[tensors]
        grad_o = v.new_zeros(heads_of(q, v)) if grad_o is None else grad_o
        if not ctx.output_final_state:
            grad_final_state = None
        wanted = ctx.needs_input_grad
        need_dg = (any(wanted[i] for i in gates),) if gates else ()
        *grads, dh0 = getattr(namespace, f"{name}_bwd")(
            *saved, ctx.scale, grad_o, grad_final_state, *need_dg, *ctx.more
        )
        grads = [d if wanted[i] and saved[i] is not None else None for i, d in enumerate(grads)]
        # initial_state, cu_seqlens, scale, output_final_state and what else there is
        return (*grads, None if h0 is None else dh0, None, None, None, *(None for _ in ctx.more))

    def refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise RuntimeError(no_double_backward(f"{name}_bwd"))

    torch.library.register_fake(f"lsm::{name}_fwd")(fwd_fake)
    torch.library.register_fake(f"lsm::{name}_bwd")(bwd_fake)
    if step:
        torch.library.register_fake(f"lsm::{name}_step")(step_fake)
    torch.library.register_autograd(f"lsm::{name}_fwd", backward, setup_context=setup_context)
    torch.library.register_autograd(f"lsm::{name}_bwd", refuse_double_backward)


def sequences(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: Mapping[str, Tensor | None],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    state_v_first: bool = False,
    as_given: bool = False,
    more: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    """Whole sequences through operator ``name``: autocast, default scale, states as asked for.

    ``as_given``: whoever calls has looked at autocast and may have widened q, k and v since: they
    stay, and the others follow them. ``more``: arguments after output_final_state.
    """
    check_no_forward_ad(f"{name}_fwd", q=q, k=k, v=v, initial_state=initial_state, **own)
    dtype = q.dtype if as_given else autocast_dtype(q.device.type)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = (x.to(dtype) for x in (q, k, v))
        own = {
            n: x if x is None or (n in KEEP_FLOAT32 and x.dtype == torch.float32) else x.to(dtype)
            for n, x in own.items()
        }
    if state_v_first and initial_state is not None:
        initial_state = initial_state.transpose(-1, -2)
    if initial_state is not None and initial_state.dtype in (torch.bfloat16, torch.float16):
        initial_state = initial_state.float()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operator = getattr(torch.ops.lsm, f"{name}_fwd").default

    def run(v: Tensor, own: Mapping[str, Tensor | None], h0: Tensor | None):  # type: ignore[no-untyped-def]
        return call(
            operator, q, k, v, *own.values(), h0, cu_seqlens, scale, output_final_state, *more
        )

    most = VALUES.get(q.device.type)
    if most is None or v.shape[-1] <= most:
        o, state = run(v, own, initial_state)
    else:
        o, state = _in_slices(run, most, v, own, initial_state, BY_VALUE.get(name))  # type: ignore[no-untyped-call]
    if not output_final_state:
        return o, None
    return o, state.transpose(-1, -2) if state_v_first else state


def _in_slices(run, most, v, own, initial_state, by_value):  # type: ignore[no-untyped-def]
    """Columns of a state know nothing of each other: heads of more than ``most`` values, a slice of
    them after another, each a multiple of 8 wide."""
    V = v.shape[-1]
    width = -(-V // -(-V // most) // 8) * 8

    def cut(n: str, x: Tensor | None, c: slice) -> Tensor | None:
        wide = x is not None and (n == by_value or (n == "beta" and x.dim() == v.dim()))
        return x[..., c] if wide else x  # type: ignore[index]

    parts = []
    for first in range(0, V, width):
        c = slice(first, first + width)
        h0 = None if initial_state is None else initial_state[..., c]
        parts.append(run(v[..., c], {n: cut(n, x, c) for n, x in own.items()}, h0))
    outputs, states = zip(*parts, strict=True)
    return torch.cat(outputs, -1), torch.cat(states, -1)


def one_token(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: tuple[Tensor | None, ...],
    state: Tensor,
    scale: float | None,
    chunk_name: str,
    more: tuple[int | Tensor, ...] = (),
) -> Tensor:
    """One token through operator ``name``; ``chunk_name`` is what to use where gradients are
    needed."""
    given = (x for x in own if x is not None)
    check_no_gradient(f"{name}_step", chunk_name, q, k, v, *given, state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    operator = getattr(torch.ops.lsm, f"{name}_step")
    return operator(q, k, v, *own, state, scale, *more)  # type: ignore[no-any-return]
