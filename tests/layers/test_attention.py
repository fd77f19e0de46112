"""The softmax baseline: definition, cache, padding and packing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lsm_cuda.cache import Cache
from lsm_cuda.layers import Attention


def make(**options) -> Attention:
    torch.manual_seed(0)
    return Attention(hidden_size=32, num_heads=4, layer_idx=0, **options).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 32, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)  # the rotary table is fp32


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_its_definition(kv_heads):
    layer, x = make(num_kv_heads=kv_heads), tokens(2, 7)
    q, k, v = (p(x).view(2, 7, -1, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = layer.rotary(q), layer.rotary(k)
    k, v = (y.repeat_interleave(4 // kv_heads, 2) for y in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    o = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(-2)
    close(layer(x)[0], layer.o_proj(o))


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_continuing_and_stepping_are_the_whole(kv_heads):
    layer, x, cache = make(num_kv_heads=kv_heads), tokens(2, 15), Cache()
    whole, _, _ = layer(x)
    pieces = [layer(x[:, :3], past_key_values=cache, use_cache=True)[0]]
    pieces.append(layer(x[:, 3:9], past_key_values=cache, use_cache=True)[0])
    close(layer(x[:, 9:10], past_key_values=cache)[0], whole[:, 9:10])  # read only
    for t in range(9, 15):
        pieces.append(layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)[0])
    close(torch.cat(pieces, 1), whole)
    assert cache.get_seq_length() == 15 and cache[0].attn_state.length == 15


@torch.no_grad()
def test_left_padding_is_as_if_not_there():
    layer, x, cache = make(), tokens(2, 10), Cache()
    mask = torch.ones(2, 10)
    mask[0, :4] = 0
    o, _, _ = layer(x[:, :9], attention_mask=mask[:, :9], past_key_values=cache, use_cache=True)
    last, _, _ = layer(x[:, 9:], attention_mask=mask, past_key_values=cache, use_cache=True)
    alone, _, _ = layer(x[:1, 4:])
    close(torch.cat([o, last], 1)[0, 4:], alone[0])
    assert o.isfinite().all()


@torch.no_grad()
def test_cu_seqlens_are_separate_sequences():
    layer, x = make(), tokens(1, 9)
    bounds = [0, 4, 4, 9]
    o, _, _ = layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in pairwise(bounds):
        close(o[:, start:end], layer(x[:, start:end])[0])


def test_errors():
    layer, x = make(), tokens(1, 4)
    with pytest.raises(ValueError, match="for inference"):
        layer(x, past_key_values=Cache(), use_cache=True)
    with pytest.raises(ValueError, match="without attention_mask and cache"):
        layer(x, cu_seqlens=torch.tensor([0, 4]), past_key_values=Cache())
    with pytest.raises(ValueError, match="got 32, 5 and 5"):
        Attention(hidden_size=32, num_heads=5)
