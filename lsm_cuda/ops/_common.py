"""What every operator module shares: argument rules that only Python can state, and autograd's
fine print."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_no_forward_ad(op: str, **tensors: Tensor | None) -> None:
    """Forward-mode AD through a custom operator would silently give zero tangents; say so
    instead."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
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


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks for on this device, or None outside autocast."""
    # meta has no autocast and raises; is_autocast_available() would say so, but torch 2.11 cannot
    # trace it
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def check_same_device(op: str, q: Tensor, **tensors: Tensor | None) -> None:
    """For fake kernels: a meta tensor among real ones is dispatched here, where kernels cannot
    object."""
    for name, t in tensors.items():
        if t is not None and t.device != q.device:
            raise RuntimeError(f"lsm::{op}: {name} must be on {q.device} like q, got {t.device}")


def no_double_backward(op: str) -> str:
    return (
        f"lsm::{op}: the backward pass is itself not differentiable (double backward is not "
        "supported); use lsm_cuda.reference for higher derivatives"
    )
