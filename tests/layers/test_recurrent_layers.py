"""What every layer of recurrent_layers.py keeps: steps, pieces, padding, packing, gradients."""

from __future__ import annotations

import pytest
import torch
from recurrent_layers import LAYERS, close, make, tokens

from lsm_cuda.cache import Cache

every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
@torch.no_grad()
def test_steps_and_pieces_are_the_whole(name):
    layer, x, cache = make(name), tokens(2, 12), Cache()
    whole = layer(x)[0]
    parts = [
        layer(x[:, a:b], past_key_values=cache, use_cache=True)[0]
        for a, b in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 12))
    ]
    close(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 12


@every_layer
@torch.no_grad()
def test_padding_and_packing_change_nothing(name):
    layer, x = make(name), tokens(2, 9)
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    padded, cache = Cache(), Cache()
    y = layer(x, attention_mask=mask, past_key_values=padded, use_cache=True)[0]
    close(y[:1, 4:], layer(x[:1, 4:])[0])
    close(y[1:], layer(x[1:])[0])
    layer(x[1:], past_key_values=cache, use_cache=True)
    for a, b in zip(padded[0].tensors(), cache[0].tensors(), strict=True):
        close(a[1:], b)
    packed = torch.cat([x[:1, 4:], x[1:]], 1)
    out = layer(packed, cu_seqlens=torch.tensor([0, 5, 14]))[0]
    close(out, torch.cat([y[:1, 4:], y[1:]], 1))


@every_layer
def test_gradients_reach_every_parameter(name):
    layer = make(name)
    layer(tokens(2, 7))[0].square().sum().backward()
    for key, p in layer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
