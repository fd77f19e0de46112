"""Luna: definition, and pools that travel between layers."""

from __future__ import annotations

import pytest
import torch

from lsm_cuda.layers import LunaAttention


def make(**options) -> LunaAttention:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_heads": 3, "pool_size": 4}
    return LunaAttention(**{**sizes, **options}).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 12, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    D = q.shape[-1] // heads
    results = []
    for h in range(heads):
        cut = slice(h * D, h * D + D)
        weights = (q[..., cut] @ k[..., cut].mT / D**0.5).softmax(-1)
        results.append(weights @ v[..., cut])
    return torch.cat(results, -1)


def definition(layer: LunaAttention, x: torch.Tensor, pool: torch.Tensor):
    w = {name.removesuffix(".weight"): p for name, p in layer.named_parameters()}
    names = (
        ("pc_proj", "pc_proj", "c_proj", "c_proj")
        if layer.tie_kv
        else ("pk_proj", "pv_proj", "k_proj", "v_proj")
    )
    pk, pv, k, v = (w[name] for name in names)
    packed = attend(pool @ w["pq_proj"].T, x @ pk.T, x @ pv.T, layer.num_pool_heads)
    o = attend(x @ w["q_proj"].T, packed @ k.T, packed @ v.T, layer.num_heads)
    return o @ w["o_proj"].T, packed


@pytest.mark.parametrize("options", [{}, {"tie_kv": True}, {"num_pool_heads": 2, "num_heads": 4}])
@pytest.mark.parametrize("T", [1, 9])
def test_layer_is_its_definition(options, T):
    layer, x = make(**options), tokens(2, T)
    o, pool, cache = layer(x)
    expected, packed = definition(layer, x, layer.pool.expand(2, -1, -1))
    close(o, expected)
    close(pool, packed)
    assert cache is None


def test_a_pool_travels_through_a_stack():
    first, second, x = make(), make(pool_size=None), tokens(2, 9)
    y, pool, _ = first(x)
    o, packed, _ = second(y, pool=pool)
    expected = definition(second, y, pool)
    close(o, expected[0])
    close(packed, expected[1])
    assert second.pool is None
    packed.square().sum().backward()
    assert first.pool.grad.any()


def test_a_pool_per_packed_sequence():
    layer, x, pool = make(), tokens(1, 9), tokens(3, 5)
    o, packed, _ = layer(x, cu_seqlens=torch.tensor([0, 2, 6, 9]), pool=pool)
    expected, alone, _ = layer(x[:, 2:6], pool=pool[1:2])
    close(o[:, 2:6], expected)
    close(packed[1:2], alone)


def test_a_pool_of_an_empty_batch_or_sequence():
    layer = make()
    o, pool, _ = layer(tokens(2, 0))
    assert o.shape == (2, 0, 12) and pool.shape == (2, 4, 12)


def test_errors():
    x = tokens(2, 5)
    with pytest.raises(ValueError, match="pass the pool of the layer before"):
        make(pool_size=None)(x)
    with pytest.raises(ValueError, match=r"hidden_size\] = \[2, p, 12\], got \[1, 4, 12\]"):
        make()(x, pool=tokens(1, 4))
    with pytest.raises(ValueError, match="num_heads and num_pool_heads, got 12, 3 and 5"):
        make(num_pool_heads=5)
    with pytest.raises(ValueError, match="pool_size must be positive, got 0"):
        make(pool_size=0)
