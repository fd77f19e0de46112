"""Linformer: definition, ways of sharing, and softmax attention as a special case."""

from __future__ import annotations

import pytest
import torch

from lsm_cuda.layers import LinformerAttention


def make(**options) -> LinformerAttention:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_heads": 3, "max_len": 9, "proj_dim": 4}
    return LinformerAttention(**{**sizes, **options}).double()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("share", ["none", "heads", "kv"])
@pytest.mark.parametrize("T", [1, 6, 9])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_layer_is_its_definition(share, T, qkv_bias):
    layer = make(share=share, qkv_bias=qkv_bias)
    x = torch.randn(2, T, 12, dtype=torch.float64)
    heads = []
    for h in range(3):
        q, k, v = (p(x)[..., 4 * h : 4 * h + 4] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        E = layer.E[h if share == "none" else 0][:, :T]
        F = E if share == "kv" else layer.F[h if share == "none" else 0][:, :T]
        weights = (q @ (E @ k).mT / 2).softmax(-1)  # sqrt(4) = 2
        heads.append(weights @ (F @ v))
    close(layer(x)[0], torch.cat(heads, -1) @ layer.o_proj.weight.T)


def test_identity_projections_are_softmax_attention():
    layer = make(proj_dim=9, share="kv")
    with torch.no_grad():
        layer.E.copy_(torch.eye(9))
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = (p(x).view(2, 9, 3, 4) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    close(layer(x)[0], layer.o_proj(expected))


def test_parameter_shapes():
    assert list(make().E.shape) == list(make().F.shape) == [3, 4, 9]
    assert list(make(share="heads").F.shape) == [1, 4, 9]


def test_errors():
    x = torch.randn(1, 10, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="at most max_len = 9 tokens, got 10"):
        make()(x)
    assert make()(x, attention_mask=torch.arange(10)[None] > 0)[0].shape == x.shape
    with pytest.raises(ValueError, match="share must be none, heads or kv, got 'layers'"):
        make(share="layers")
    with pytest.raises(ValueError, match="max_len and proj_dim must be positive, got 9 and 0"):
        make(proj_dim=0)
