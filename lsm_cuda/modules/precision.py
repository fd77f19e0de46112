"""Where half precision would cost too much: exponents, inverses, positions."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

__all__ = ["no_autocast", "wide"]


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 if that is what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast leaves the matrix products of ``x``'s device alone."""
    if not torch.amp.is_autocast_available(x.device.type):  # e.g. meta
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
