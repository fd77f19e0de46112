"""Hidden states that no layer can take: each says so in the same words."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from lsm_cuda import layers

WIDTH = 64
# Where WIDTHS and HEADS below do not do.
SIZES = {
    "BasedLinearAttention": {"num_heads": 2, "num_key_value_heads": 2},
    "BiMamba": {"hidden_size": WIDTH},
    "HGRN2Attention": {"expand_ratio": 32},
    "LogLinearMamba2": {"num_heads": 4, "head_dim": 32},
    "Mamba2": {"num_heads": 4, "head_dim": 32},
    "NativeSparseAttention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "ReBasedLinearAttention": {"num_heads": 2, "num_key_value_heads": 2},
    "RWKV7Attention": {"layer_idx": 0},
    "VSSBlock": {"hidden_dim": WIDTH},
}
WIDTHS, HEADS = ("hidden_size", "d_model", "dim"), {"num_heads": 2, "head_dim": 32}
NAMES = [
    name
    for name in layers.__all__
    if isinstance(kind := getattr(layers, name), type) and issubclass(kind, nn.Module)
]


def make(name: str) -> nn.Module:
    kind = getattr(layers, name)
    takes = inspect.signature(kind).parameters
    usual = dict.fromkeys(WIDTHS, WIDTH) | HEADS
    return kind(**{key: usual[key] for key in usual if key in takes} | SIZES.get(name, {}))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_integers_are_refused(name: str) -> None:
    layer = make(name)
    image = name in ("SS2D", "VSSBlock")
    shape = (1, 2, 4, WIDTH) if image else (1, 8, WIDTH)
    layer(torch.randn(shape))
    for wrong in (shape[1:], (1, *shape)):
        with pytest.raises(ValueError, match=r"hidden_states must have shape \[B, .*\], got \["):
            layer(torch.randn(wrong))
    with pytest.raises(ValueError, match=r"must be floating point, got torch\.int64"):
        layer(torch.zeros(shape, dtype=torch.int64))
