"""Focused linear attention: its definition, all pairs of tokens at once."""

from __future__ import annotations

import pytest
import torch

from lsm_cuda.layers import FocusedLinearAttention


def sharpen(x: torch.Tensor, p: float) -> torch.Tensor:
    r = x.relu()
    length = (r**p).norm(dim=-1, keepdim=True)
    return r**p * r.norm(dim=-1, keepdim=True) / torch.where(length > 0, length, 1)


@pytest.mark.parametrize("power", [1.0, 3.0])
@pytest.mark.parametrize("kernel", [None, 1, 5])
@pytest.mark.parametrize("T", [1, 2, 13])
def test_layer_is_its_definition(T, kernel, power):
    torch.manual_seed(0)
    layer = FocusedLinearAttention(
        hidden_size=12, num_heads=3, power=power, conv_kernel_size=kernel, qkv_bias=True
    ).double()
    x = torch.randn(2, T, 12, dtype=torch.float64)
    heads = []
    for h in range(3):
        cut = slice(4 * h, 4 * h + 4)
        q, k, v = (p(x)[..., cut] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        weights = sharpen(q, power) @ sharpen(k, power).mT
        o = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
        if kernel is not None:
            padded = torch.nn.functional.pad(v, (0, 0, kernel // 2, kernel // 2))
            taps = layer.conv.weight[:, 0]  # [D, kernel]
            o = o + layer.conv.bias
            for i in range(kernel):
                o = o + padded[:, i : i + T] * taps[:, i]
        heads.append(o)
    expected = torch.cat(heads, -1) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x)[0], expected)


def test_errors():
    with pytest.raises(ValueError, match=r"power must be at least 1, got 0\.5"):
        FocusedLinearAttention(16, 2, power=0.5)
    with pytest.raises(ValueError, match="conv_kernel_size must be odd, got 4"):
        FocusedLinearAttention(16, 2, conv_kernel_size=4)
