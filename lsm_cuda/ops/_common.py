"""What every operator module shares: argument rules that only Python can state, and autograd's
fine print."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_transform = torch._C._functorch.peek_interpreter_stack
_autocasts = torch._C._is_any_autocast_enabled
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def functional() -> bool:
    """Whether one of torch.func's transforms is at work."""
    return _transform() is not None


def plain() -> bool:
    """Whether nothing traces, differentiates, transforms or casts what is called. Asked once, it
    spares a call the single questions: what a kernel streams drives Python out of the caches, and
    every line of it then takes several times as long."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or _autocasts()
        or forward_ad._current_level >= 0
        or _transform() is not None
    )


def check_no_forward_ad(op: str, **tensors: Tensor | None) -> None:
    """Forward-mode AD through a custom operator would silently give zero tangents, and torch.func's
    gradients end in words about autograd.Function; say so instead."""
    if torch.compiler.is_compiling():
        return
    if functional():
        _check_no_functional_gradient(op, tensors)
    if forward_ad._current_level < 0:
        return
    for name, t in tensors.items():
        if t is None:
            continue
        tangent = forward_ad.unpack_dual(t).tangent  # type: ignore[no-untyped-call]
        if tangent is not None:
            raise RuntimeError(
                f"lsm::{op}: forward-mode AD (jvp) is not supported, got a dual tensor for {name}; "
                "use reverse mode, or lsm_cuda.reference, which any mode can differentiate"
            )


def _check_no_functional_gradient(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    functorch = torch._C._functorch
    for name, t in tensors.items():
        while t is not None and functorch.is_functorch_wrapped_tensor(t):
            if functorch.is_gradtrackingtensor(t) and t.requires_grad:
                raise RuntimeError(
                    f"lsm::{op}: torch.func's grad, vjp and jacrev are not supported, got a tensor "
                    f"of theirs for {name}; use torch.autograd.grad or backward()"
                )
            t = functorch.get_unwrapped(t)


def call(op: Callable[..., Any], *arguments: Any) -> Any:
    """An operator with a registered gradient. Where none is asked for, below autograd, whose Python
    is a third of a short call's time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or functional():
        return op(*arguments)
    return below_autograd(op, *arguments)


def below_autograd(op: Callable[..., Any], *arguments: Any) -> Any:
    with _BelowAutograd():
        return op(*arguments)


# meta has no autocast and raises; is_autocast_available() would say so, but torch 2.11 cannot trace
# it.
_AUTOCAST = ("cpu", "cuda")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks for on this device, or None outside autocast."""
    if _autocasts() and device_type in _AUTOCAST and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, not called where it changes nothing: a step has little time for that, and
    torch 2.11 traces it as a second name of one tensor, and loses the gradient of the first."""
    return x if x.dtype == dtype else x.to(dtype)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype autocast asks for; fp64 stays."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(dtype) for x in tensors)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast leaves the matrix products of ``x``'s device alone."""
    if x.device.type not in _AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def check_same_device(op: str, q: Tensor, **tensors: Tensor | None) -> None:
    """For fake kernels: a meta tensor among real ones is dispatched here, where kernels cannot
    object."""
    check_device_like(op, "q", q, tensors)


def check_device_like(op: str, like: str, x: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    """:func:`check_same_device` where the first argument has another name, ``like``."""
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise RuntimeError(
                f"lsm::{op}: {name} must be on {x.device} like {like}, got {t.device}"
            )


def no_double_backward(op: str) -> str:
    return (
        f"lsm::{op}: the backward pass is itself not differentiable (double backward is not "
        "supported); use lsm_cuda.reference for higher derivatives"
    )


def check_shape(op: str, name: str, t: Tensor, dims: str, expected: Sequence[int]) -> None:
    """For what is computed before an operator checks it; ``dims`` as in ``[B, T, H, K]``."""
    if tuple(t.shape) != tuple(expected):
        raise RuntimeError(
            f"lsm::{op}: {name} must have shape {dims} = {[*expected]}, got {[*t.shape]}"
        )


def check_rank(op: str, name: str, t: Tensor, dims: str) -> None:
    if t.dim() != dims.count(",") + 1:
        raise RuntimeError(f"lsm::{op}: {name} must have shape {dims}, got {[*t.shape]}")


def check_last_queries(op: str, q: Tensor, k: Tensor) -> None:
    if q.shape[1] > k.shape[1]:
        raise RuntimeError(
            f"lsm::{op}: q must be the last tokens of the T = {k.shape[1]} of k, got TQ = "
            f"{q.shape[1]}"
        )


def check_state(op: str, state: Sequence[Tensor | None] | None, *names: str) -> None:
    """A state of several tensors comes whole; ``names`` say what its places hold."""
    if state is not None and (isinstance(state, Tensor) or len(state) != len(names)):
        got = "one tensor" if isinstance(state, Tensor) else f"{len(state)} tensors"
        expected = f"{len(names)} tensors ({', '.join(names)})"
        raise RuntimeError(f"lsm::{op}: initial_state must be the {expected}, got {got}")


def check_no_gradient(op: str, chunk_name: str, *tensors: Tensor) -> None:
    """Of a decode step; ``chunk_name`` is what to use where gradients are needed."""
    if not torch.is_grad_enabled():
        return
    for x in tensors:  # a step has no time for a generator
        if x.requires_grad:
            raise RuntimeError(
                f"lsm::{op}: updates the state in place and has no backward, got an argument "
                f"that requires grad; use {chunk_name}, or torch.no_grad()"
            )


def check_in_place(
    op: str, name: str, state: Tensor, dims: str, expected: Sequence[int], like: Tensor
) -> None:
    """For states of several tensors, so that none is changed where another is refused."""
    check_shape(op, name, state, dims, expected)
    dtype = accumulation_dtype(like)
    if state.dtype != dtype:
        wanted, got = (str(d).removeprefix("torch.") for d in (dtype, state.dtype))
        raise RuntimeError(f"lsm::{op}: {name} must have dtype {wanted}, got {got}")
    if not state.is_contiguous():
        raise RuntimeError(
            f"lsm::{op}: {name} is updated in place and must be contiguous, got strides "
            f"{[*state.stride()]}"
        )


def accumulation_dtype(t: Tensor) -> torch.dtype:
    """What states and sums are kept in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def backwards(
    op: Callable[..., tuple[Tensor, Any]],
    tokens: Sequence[Tensor | None],
    initial_state: Any,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """``op`` with time running backwards: tokens are read and outputs written in reverse order.

    A packed row is turned around as a whole, which also puts its last sequence first.
    """

    def turned(state: Any) -> Any:
        if state is None or cu_seqlens is None:
            return state
        return state.flip(0) if isinstance(state, Tensor) else tuple(s.flip(0) for s in state)

    tokens = [None if x is None else x.flip(1) for x in tokens]
    T = tokens[0].shape[1]  # type: ignore[union-attr]
    boundaries = None if cu_seqlens is None else T - cu_seqlens.flip(0)
    o, state = op(*tokens, initial_state=turned(initial_state), cu_seqlens=boundaries, **options)
    return o.flip(1), turned(state)


def one_minus_exp(g: Tensor) -> Tensor:
    """``1 − e^g``, precise near zero, with its gradient ``−e^g`` precise far from zero, where
    expm1's formula for it, ``(e^g − 1) + 1``, is not."""
    return torch.where(g > -0.7, -g.expm1(), 1 - g.exp())
