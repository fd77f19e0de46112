"""What every layer keeps: steps, pieces, caches, padding, packing, gradients, dtypes, errors."""

from __future__ import annotations

from itertools import pairwise

import gated_layers
import linear_layers
import pytest
import recurrent_layers
import torch
from torch import Tensor, nn

from lsm_cuda.cache import Cache

ROOMS = (linear_layers, gated_layers, recurrent_layers)


class Case:
    """A layer as one of the rooms makes it."""

    def __init__(self, room, name: str):
        self.name, self.D, self.tokens = name, room.D, room.tokens
        self.kind, _ = room.LAYERS[name]
        self.tolerance = getattr(room, "TOLERANCE", {}).get(name, 1e-9)
        self._make = room.make

    def make(self, **options) -> nn.Module:
        return self._make(self.name, **options)

    def close(self, a, b):
        torch.testing.assert_close(a, b, atol=self.tolerance, rtol=self.tolerance)


CASES = [Case(room, name) for room in ROOMS for name in room.LAYERS]
every_layer = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def states(cache: Cache) -> list[Tensor]:
    return list(cache[0].tensors())


def recurrent_states(cache: Cache) -> list[Tensor]:
    state = cache[0].recurrent_state
    return list(state) if isinstance(state, tuple) else [state]


@every_layer
@torch.no_grad()
def test_continuing_and_stepping_are_the_whole(case):
    layer, x = case.make(), case.tokens(2, 13)
    whole, attentions, none = layer(x)
    assert attentions is None and none is None and whole.shape == x.shape
    cache, pieces = Cache(), []
    for start, end in pairwise((0, 2, 3, 8, 9, 10, 11, 12, 13)):
        o, _, returned = layer(x[:, start:end], past_key_values=cache, use_cache=True)
        assert returned is cache
        pieces.append(o)
    case.close(torch.cat(pieces, 1), whole)
    assert cache.get_seq_length() == 13
    fresh = Cache()
    layer(x, past_key_values=fresh, use_cache=True)
    for stepped, at_once in zip(states(cache), states(fresh), strict=True):
        case.close(stepped, at_once)


@every_layer
@torch.no_grad()
def test_a_step_updates_the_state_in_place(case):
    layer, cache = case.make(), Cache()
    layer(case.tokens(2, 5), past_key_values=cache, use_cache=True)
    before = [t.data_ptr() for t in recurrent_states(cache)]
    old = [t.clone() for t in recurrent_states(cache)]
    layer(case.tokens(2, 1), past_key_values=cache, use_cache=True)
    now = recurrent_states(cache)
    assert [t.data_ptr() for t in now] == before
    assert not torch.equal(now[0], old[0])


@every_layer
@pytest.mark.parametrize("new_tokens", [1, 4])
@torch.no_grad()
def test_without_use_cache_the_cache_is_only_read(case, new_tokens):
    layer, cache, x = case.make(), Cache(), case.tokens(2, 6 + new_tokens)
    layer(x[:, :6], past_key_values=cache, use_cache=True)
    before = [t.clone() for t in states(cache)]
    o, _, _ = layer(x[:, 6:], past_key_values=cache)
    case.close(o, layer(x)[0][:, 6:])
    assert all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))
    assert cache.get_seq_length() == 6


@every_layer
@torch.no_grad()
def test_padding_is_as_if_not_there(case):
    layer, x = case.make(), case.tokens(4, 8)
    # left, right, none, nothing but padding
    spans = [(3, 8), (0, 6), (0, 8), (5, 5)]
    mask = torch.zeros(4, 8, dtype=torch.long)
    for row, (start, end) in zip(mask, spans, strict=True):
        row[start:end] = 1
    cache, more = Cache(), case.tokens(4, 2)
    o, _, _ = layer(x, attention_mask=mask, past_key_values=cache, use_cache=True)
    one, _, _ = layer(more[:, :1], past_key_values=cache, use_cache=True)
    two, _, _ = layer(more[:, 1:], past_key_values=cache, use_cache=True)
    for b, (start, end) in enumerate(spans):
        expected, _, _ = layer(torch.cat([x[b : b + 1, start:end], more[b : b + 1]], 1))
        case.close(torch.cat([o[b, start:end], one[b], two[b]]), expected[0])
        assert not o[b][mask[b] == 0].any()


@every_layer
@torch.no_grad()
def test_cu_seqlens_are_separate_sequences(case):
    layer, x, y, last = case.make(), case.tokens(1, 12), case.tokens(1, 6), case.tokens(4, 1)
    # with sequences of no tokens
    bounds, again = [0, 4, 4, 6, 12], [0, 0, 2, 2, 6]
    cache = Cache()

    def packed(tokens: Tensor, bounds: list[int]) -> Tensor:
        cu = torch.tensor(bounds)
        return layer(tokens, past_key_values=cache, use_cache=True, cu_seqlens=cu)[0]

    first, second = packed(x, bounds), packed(y, again)
    step, _, _ = layer(last, past_key_values=cache, use_cache=True)  # a row per sequence
    for n in range(4):
        here, there = slice(bounds[n], bounds[n + 1]), slice(again[n], again[n + 1])
        expected, _, _ = layer(torch.cat([x[:, here], y[:, there], last[n : n + 1]], 1))
        case.close(torch.cat([first[0, here], second[0, there], step[n]]), expected[0])


@every_layer
@torch.no_grad()
def test_a_cache_can_be_reordered_and_cloned(case):
    layer, x, cache = case.make(), case.tokens(3, 7), Cache()
    layer(x[:, :5], past_key_values=cache, use_cache=True)
    branch = cache.clone()
    order = torch.tensor([2, 0])
    cache.select(order)
    for t in (5, 6):
        o, _, _ = layer(x[order, t : t + 1], past_key_values=cache, use_cache=True)
        kept, _, _ = layer(x[:, t : t + 1], past_key_values=branch, use_cache=True)
    whole, _, _ = layer(x)
    case.close(o, whole[order, -1:])
    case.close(kept, whole[:, -1:])


@every_layer
def test_gradients_flow_to_everything_and_through_a_cache(case):
    layer, x = case.make(), case.tokens(2, 9).requires_grad_()
    wanted = {"x": x, **{n: p for n, p in layer.named_parameters() if p.requires_grad}}
    inputs, weight = list(wanted.values()), case.tokens(2, 9)
    whole = torch.autograd.grad((layer(x)[0] * weight).sum(), inputs)
    for name, grad in zip(wanted, whole, strict=True):
        assert grad.isfinite().all() and grad.any(), name
    cache = Cache()
    first, _, _ = layer(x[:, :5], past_key_values=cache, use_cache=True)
    second, _, _ = layer(x[:, 5:], past_key_values=cache, use_cache=True)
    split = torch.autograd.grad((torch.cat([first, second], 1) * weight).sum(), inputs)
    for name, a, b in zip(wanted, split, whole, strict=True):
        assert (a - b).abs().max() < 1e-7 * (1 + b.abs().max()), name


# Quotients of sums amplify roundings.
QUOTIENTS = ("rfa", "rfa without gate", "linear rfa", "rebased")


@every_layer
def test_autocast(case):
    layer, cache, x = case.make().float(), Cache(), case.tokens(2, 9).float()
    exact, _, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        o, _, _ = layer(x)
        o.float().square().sum().backward()
        with torch.no_grad():
            layer(x[:, :8], past_key_values=cache, use_cache=True)
            step, _, _ = layer(x[:, 8:], past_key_values=cache, use_cache=True)
    for name, p in layer.named_parameters():
        assert not p.requires_grad or p.grad.isfinite().all(), name
    for state in recurrent_states(cache):
        assert state.dtype in (torch.float32, torch.complex64, torch.int64)
    # a few roundings of 2^-9 each, relative to the output's size
    limit = (0.1 if case.name in QUOTIENTS else 0.05) * exact.abs().max().item()
    torch.testing.assert_close(o.float(), exact, atol=limit, rtol=0)
    torch.testing.assert_close(step.float(), exact[:, 8:], atol=limit, rtol=0)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_keeps_a_wide_state(case, dtype):
    layer, cache, x = case.make().to(dtype), Cache(), case.tokens(2, 9).to(dtype)
    o, _, _ = layer(x, past_key_values=cache, use_cache=True)
    step, _, _ = layer(x[:, :1], past_key_values=cache, use_cache=True)
    assert o.dtype == step.dtype == dtype and o.isfinite().all() and step.isfinite().all()
    for state in recurrent_states(cache):
        assert state.dtype in (torch.float32, torch.complex64, torch.int64)


@every_layer
def test_empty_inputs(case):
    layer = case.make()
    assert layer(case.tokens(2, 0))[0].shape == (2, 0, case.D)
    assert layer(case.tokens(0, 3))[0].shape == (0, 3, case.D)
    cache = Cache()
    for T in (3, 1, 2):
        o, _, _ = layer(case.tokens(0, T), past_key_values=cache, use_cache=True)
        assert o.shape == (0, T, case.D)


@every_layer
def test_bad_input(case):
    layer, x = case.make(), case.tokens(2, 5)
    with pytest.raises(ValueError, match=r"\[B, S\] = \[2, 5 or more\].*got \[2, 5, 5\]"):
        layer(x, attention_mask=torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match=r"\[B, S\] = \[2, 5 or more\].*got \[2, 4\]"):
        layer(x, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask or cu_seqlens, not both"):
        layer(x[:1], attention_mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="B = 1 with cu_seqlens"):
        layer(x, cu_seqlens=torch.tensor([0, 5]))
    match = f"{case.kind.__name__}: .* construct the layer with layer_idx"
    with pytest.raises(ValueError, match=match):
        case.make(layer_idx=None)(x, past_key_values=Cache())
