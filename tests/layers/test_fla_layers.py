"""FLA's own layers, where FLA is installed: the arguments they are made with, and what a checkpoint
of theirs holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType

import gated_layers
import linear_layers
import pytest
import recurrent_layers
from peers import fla_layers
from torch import nn

from lsm_cuda import layers

ROOMS = (linear_layers, gated_layers, recurrent_layers)
CASES = {name: (room, *room.LAYERS[name]) for room in ROOMS for name in room.LAYERS}
# Mamba's arguments are named as mamba_ssm's, and softmax attention has some of its own.
OF_THEIR_OWN = ("Attention", "Mamba", "MoBA", "NativeSparseAttention")
# What FLA refuses: feature maps that only we have, and MoM without its convolution.
OUR_MAPS = [
    "cosformer",
    "exp",
    "focused",
    "gelu",
    "logsigmoid",
    "outer_product",
    "performer",
    "polysketch",
    "rebased",
    "regla",
    "rfa",
    "sigmoid",
    "silu",
    "softmax",
    "sqrelu",
    "swish",
    "taylor",
]
REFUSED = {"delta_net dpfp", "mom single", *(f"linear {name}" for name in OUR_MAPS)}


@pytest.fixture(scope="module")
def fla() -> Iterator[ModuleType]:
    with fla_layers() as module:
        yield module


def shapes(layer: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in layer.state_dict().items()}


def test_constructors_take_the_same_arguments(fla: ModuleType) -> None:
    """In the same order, what only we have aside."""
    compared = []
    for name in (set(layers.__all__) & set(fla.__all__)).difference(OF_THEIR_OWN):
        ours, theirs = (
            [p for p in inspect.signature(getattr(module, name)).parameters if p != "kwargs"]
            for module in (layers, fla)
        )
        assert [p for p in ours if p in theirs] == theirs, name
        compared.append(name)
    assert len(compared) > 20


def test_parameters_are_named_and_shaped_alike(fla: ModuleType) -> None:
    compared, refused = [], set()
    for name, (room, kind, options) in CASES.items():
        base = next(c for c in kind.__mro__ if c.__name__ in layers.__all__)
        if base.__name__ not in fla.__all__ or base.__name__ in OF_THEIR_OWN:
            continue
        levels = {"num_levels": 15} if "num_levels" in options else {}  # which theirs always has
        ours, theirs = room.make(name, **levels), getattr(fla, base.__name__)
        given = {"hidden_size": room.D, "layer_idx": 0, "num_hidden_layers": 2} | options
        known = inspect.signature(theirs).parameters
        for n, parameter in known.items():
            if parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL,
            ):  # fmt: skip
                given.setdefault(n, getattr(ours, n))
        try:
            layer = theirs(**{n: x for n, x in given.items() if n in known})
        except (AssertionError, NotImplementedError, UserWarning):
            refused.add(name)
            continue
        assert shapes(ours) == shapes(layer), name
        compared.append(name)
    assert len(compared) > 20
    assert refused == REFUSED
