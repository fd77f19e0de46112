"""Block-diagonal attention: definition, and its cache of one block."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lsm_cuda.cache import Cache
from lsm_cuda.layers import DiagAttention


def make(**options) -> DiagAttention:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_heads": 3, "block_size": 4, "layer_idx": 0}
    return DiagAttention(**{**sizes, **options}).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 12, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 3, 4, 5, 12, 15])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_layer_is_its_definition(causal, T, qkv_bias):
    layer, x = make(causal=causal, qkv_bias=qkv_bias), tokens(2, T)
    q, k, v = (p(x).view(2, T, 3, 4) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    t = torch.arange(T)
    allowed = t[:, None] // 4 == t // 4
    if causal:
        allowed = allowed & (t <= t[:, None])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    o = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    close(layer(x)[0], layer.o_proj(o))


@pytest.mark.parametrize("cuts", [[3, 7], [4, 8], [1, 2, 9], [13], []])
@torch.no_grad()
def test_continuing_and_stepping_are_the_whole(cuts):
    layer, x, cache = make(), tokens(2, 19), Cache()
    whole = layer(x)[0]
    bounds = [0, *cuts, *range(max(cuts, default=0) + 1, 20)]
    pieces = []
    for start, end in pairwise(bounds):
        piece = x[:, start:end]
        if cache.layers:
            before = [t.clone() for t in cache[0].tensors()], cache[0].attn_state.length
            close(layer(piece, past_key_values=cache)[0], whole[:, start:end])  # read only
            assert cache[0].attn_state.length == before[1] and cache.get_seq_length() == start
            assert all(
                torch.equal(a, b) for a, b in zip(before[0], cache[0].tensors(), strict=True)
            )
        o, _, returned = layer(piece, past_key_values=cache, use_cache=True)
        assert returned is cache and cache[0].attn_state.length == end % 4
        assert cache[0].attn_state.keys.shape[1] == 4
        pieces.append(o)
    close(torch.cat(pieces, 1), whole)
    assert cache.get_seq_length() == 19


@torch.no_grad()
def test_a_cache_can_be_cloned_and_selected():
    layer, x, cache = make(), tokens(2, 8), Cache()
    layer(x[:, :6], past_key_values=cache, use_cache=True)
    branch = cache.clone()
    layer(tokens(2, 1), past_key_values=cache, use_cache=True)
    branch.select(torch.tensor([1, 0]))
    o, _, _ = layer(x[:, 6:].flip(0), past_key_values=branch, use_cache=True)
    close(o, layer(x)[0][:, 6:].flip(0))


def test_errors():
    x = tokens(2, 5)
    with pytest.raises(ValueError, match="block_size must be positive, got 0"):
        make(block_size=0)
    with pytest.raises(ValueError, match="needs a causal layer"):
        make(causal=False)(x, past_key_values=Cache())
    with pytest.raises(ValueError, match="for inference"):
        make()(x, past_key_values=Cache(), use_cache=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    with torch.no_grad():
        with pytest.raises(ValueError, match="without padding and cu_seqlens"):
            make()(x, attention_mask=mask, past_key_values=Cache())
        with pytest.raises(ValueError, match="construct the layer with layer_idx"):
            make(layer_idx=None)(x, past_key_values=Cache())
