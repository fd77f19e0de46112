"""Activations by name, as FLA's layers name them: feature maps and output gates."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACT2FN", "activation"]

Activation = Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


def _elu_plus_one(x: Tensor) -> Tensor:
    # Not elu(x) + 1, whose -1 + 1 leaves few digits of e^x: none in bf16 below x = -6.5.
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# gelu is the tanh form and elu is shifted to stay positive: FLA's meaning of these names.
ACT2FN: dict[str, Activation] = {
    "elu": _elu_plus_one,
    "gelu": _gelu_tanh,
    "identity": _identity,
    "logsigmoid": F.logsigmoid,
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
    "sqrelu": _squared_relu,
    "swish": F.silu,
}


def activation(name: str) -> Activation:
    """The function called ``name``.

    Raises:
        ValueError: an unknown name; the text lists the known ones.
    """
    if name not in ACT2FN:
        raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(ACT2FN)}")
    return ACT2FN[name]
