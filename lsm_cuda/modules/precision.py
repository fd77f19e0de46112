"""Where half precision would cost too much: exponents, inverses, positions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._common import no_autocast

__all__ = ["no_autocast", "wide"]


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 if that is what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
