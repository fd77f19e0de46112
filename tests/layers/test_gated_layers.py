"""Layers with gates, slots and token shifts: FLA's names, plain definitions, modes, padding."""

from __future__ import annotations

import inspect
from itertools import pairwise

import gated_definitions as definitions
import pytest
import torch
import torch.nn.functional as F
from gated_definitions import D, H
from parameter_shapes import PARAMETERS

from lsm_cuda import layers
from lsm_cuda.cache import Cache
from lsm_cuda.layers import (
    ABCAttention,
    Comba,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    GatedSlotAttention,
    HGRN2Attention,
    KimiDeltaAttention,
    LightNetAttention,
    Longhorn,
    MesaNet,
    MetaLA,
    MomAttention,
    ReGLA,
    RWKV5Attention,
    RWKV6Attention,
)

CONV = {"use_short_conv": True, "conv_bias": True, "conv_size": 3}
HEADS = {"num_heads": H}
MOM = {**HEADS, "head_dim": 4, "num_memories": 3, "conv_size": 3}
DELTA = {**HEADS, "head_dim": 4, "conv_size": 3}
RANKS = {f"{name}_low_rank_dim": 3 for name in ("decay", "gate", "a", "v")}
RWKV6 = {**HEADS, "proj_low_rank_dim": 3, "gate_low_rank_dim": 5}


class RWKV7Attention(layers.RWKV7Attention):
    """Without what it hands to later layers."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[:3]


LAYERS = {
    "hgrn2": (HGRN2Attention, {"expand_ratio": 8}),
    "hgrn2 conv": (HGRN2Attention, {"expand_ratio": None, **HEADS, **CONV}),
    "rwkv6": (RWKV6Attention, RWKV6),
    "rwkv6 wide": (RWKV6Attention, {**RWKV6, "expand_k": 1.0, "gate_fn": "sigmoid"}),
    "rwkv5": (RWKV5Attention, {**HEADS, "expand_k": 0.5}),
    "gsa": (GatedSlotAttention, {**HEADS, "num_slots": 5}),
    "gsa conv": (GatedSlotAttention, {**HEADS, "num_kv_heads": 1, "feature_map": "t2r", **CONV}),
    "abc": (ABCAttention, {**HEADS, "num_slots": 5}),
    "abc conv": (
        ABCAttention,
        {**HEADS, **CONV, "use_input_gate": True, "use_norm": False, "expand_v": 2.0},
    ),
    "abc bare": (ABCAttention, {**HEADS, "use_rope": False, "use_output_gate": False}),
    "lightnet": (LightNetAttention, {"expand_ratio": 8, "gate_low_rank_dim": 3}),
    "lightnet conv": (
        LightNetAttention,
        {"expand_ratio": 4, **HEADS, "gate_low_rank_dim": 3, **CONV},
    ),
    "metala": (MetaLA, {**HEADS, "gate_low_rank_dim": 3}),
    "metala bare": (MetaLA, {**HEADS, "gate_low_rank_dim": 3, "use_short_conv": False}),
    # so that the norm cancels the shift of keys entirely
    "regla": (ReGLA, {**HEADS, "norm_eps": 1e-30}),
    "regla conv": (ReGLA, {**HEADS, "norm_eps": 1e-30, "expand_v": 2.0, **CONV}),
    "mom": (MomAttention, {**MOM, "topk": 2}),
    "mom shared": (MomAttention, {**MOM, "topk": 1, "shared_mem": True, "use_output_gate": False}),
    "mom single": (
        MomAttention,
        {**MOM, "topk": 3, "single_kv_proj": True, "shared_mem": True, "use_short_conv": False},
    ),
    "delta_net": (DeltaNet, {**HEADS, "conv_size": 3}),
    "delta_net elu": (
        DeltaNet,
        {**HEADS, **CONV, "qk_activation": "elu", "qk_norm": "sum", "use_gate": True},
    ),
    "delta_net bare": (
        DeltaNet,
        {**HEADS, "use_short_conv": False, "use_beta": False, "expand_k": 0.5},
    ),
    "delta_net dpfp": (
        DeltaNet,
        {**HEADS, **CONV, "qk_activation": "dpfp", "dpfp_nu": 2, "allow_neg_eigval": True}
        | {"qk_norm": "sum"},
    ),
    "gated_deltanet": (GatedDeltaNet, {**DELTA, "num_v_heads": 4}),
    "gated_deltanet bare": (
        GatedDeltaNet,
        {**DELTA, "use_short_conv": False, "use_gate": False, "allow_neg_eigval": True},
    ),
    "gated_deltaproduct": (GatedDeltaProduct, {**DELTA, "num_v_heads": 4}),
    "gated_deltaproduct bare": (
        GatedDeltaProduct,
        {**DELTA, "num_householder": 3, "use_forget_gate": False, "use_output_gate": False},
    ),
    "comba": (Comba, {**DELTA, "num_v_heads": 4}),
    "comba bare": (
        Comba,
        {**DELTA, "use_output_correction": False, "use_inner_decay": False, "conv_bias": True},
    ),
    "kda": (KimiDeltaAttention, {**DELTA, "num_v_heads": 4, "expand_v": 2}),
    "kda bounded": (
        KimiDeltaAttention,
        {**DELTA, "lower_bound": -5.0, "safe_gate": True, "use_short_conv": False},
    ),
    "rwkv7": (RWKV7Attention, {"head_dim": 8, **RANKS}),
    "rwkv7 fused": (
        RWKV7Attention,
        {"head_dim": None, **HEADS, **RANKS, "fuse_norm": True, "value_dim": 12},
    ),
    "longhorn": (Longhorn, {"state_size": 3, "num_heads": 4}),
    "longhorn exact": (Longhorn, {"state_size": 3, "num_heads": 4, "diagonal": False}),
    "mesa_net": (MesaNet, {**DELTA, "use_output_gate": True}),
}

every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    cls, given = LAYERS[name]
    layer = cls(**{"hidden_size": D, "layer_idx": 0, **given, **options}).double()
    with torch.no_grad():  # away from the trivial values that many parameters start with
        for key, p in layer.named_parameters():
            if "norm" in key or "bias" in key or p.dim() == 1:
                p.add_(torch.rand_like(p) - 0.3)
            elif not p.any():
                p.normal_()
    return layer


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def states(cache: Cache) -> list[torch.Tensor]:
    return list(cache[0].tensors())


@every_layer
def test_layer_is_its_definition(name):
    layer, x = make(name), tokens(2, 9).requires_grad_()
    w = dict(layer.named_parameters())
    o, attentions, cache = layer(x)
    assert attentions is None and cache is None
    last = w["out_proj.weight"] if "out_proj.weight" in w else w["o_proj.weight"]
    expected = getattr(definitions, name.split()[0])(layer, w, x) @ last.T
    # angles are in fp32
    tolerance = 1e-6 if getattr(layer, "rotary", None) is not None else 1e-9
    torch.testing.assert_close(o, expected, atol=tolerance, rtol=tolerance)
    inputs, wanted = [x, *w.values()], torch.randn_like(o)
    for got, want in zip(
        torch.autograd.grad((o * wanted).sum(), inputs),
        torch.autograd.grad((expected * wanted).sum(), inputs),
        strict=True,
    ):
        assert got.any()
        torch.testing.assert_close(got, want, atol=10 * tolerance, rtol=10 * tolerance)


def test_lower_bound_of_hgrn2():
    x, low = tokens(1, 7), torch.rand(16, dtype=torch.float64)
    layer = make("hgrn2", layer_idx=1)
    first = make("hgrn2", layer_idx=0)
    close(first(x, lower_bound=low)[0], first(x)[0])
    close(layer(x, lower_bound=torch.zeros_like(low))[0], layer(x)[0])
    w = dict(layer.named_parameters())
    f = x @ w["f_proj.weight"].T
    bounded = low + (1 - low) * f.sigmoid()  # as a projection that the definition can read
    eye = torch.linalg.lstsq(x[0], (bounded / (1 - bounded)).log()[0]).solution
    expected = definitions.hgrn2(layer, {**w, "f_proj.weight": eye.T}, x) @ w["o_proj.weight"].T
    close(layer(x, lower_bound=low)[0], expected)


@every_layer
@pytest.mark.parametrize("splits", [(2, 7), (1, 1, 5), (4, 4)])
@torch.no_grad()
def test_continuing_and_stepping_are_the_whole(name, splits):
    layer, x = make(name), tokens(2, 13)
    whole, _, _ = layer(x)
    cache, pieces, start = Cache(), [], 0
    for size in (*splits, *[1] * (13 - sum(splits))):
        part = x[:, start : start + size]
        o, _, returned = layer(part, past_key_values=cache, use_cache=True)
        assert returned is cache
        pieces.append(o)
        start += size
    close(torch.cat(pieces, 1), whole)
    assert cache.get_seq_length() == 13
    fresh = Cache()
    layer(x, past_key_values=fresh, use_cache=True)
    for a, b in zip(states(cache), states(fresh), strict=True):
        close(a, b)


@every_layer
@pytest.mark.parametrize("new_tokens", [1, 4])
@torch.no_grad()
def test_without_use_cache_the_cache_is_only_read(name, new_tokens):
    layer, cache, x = make(name), Cache(), tokens(2, 6 + new_tokens)
    layer(x[:, :6], past_key_values=cache, use_cache=True)
    before = [t.clone() for t in states(cache)]
    o, _, _ = layer(x[:, 6:], past_key_values=cache)
    close(o, layer(x)[0][:, 6:])
    assert all(torch.equal(a, b) for a, b in zip(before, states(cache), strict=True))
    assert cache.get_seq_length() == 6


@every_layer
def test_gradients_flow_through_a_cache(name):
    layer, x, cache = make(name), tokens(1, 9).requires_grad_(), Cache()
    first, _, _ = layer(x[:, :5], past_key_values=cache, use_cache=True)
    second, _, _ = layer(x[:, 5:], past_key_values=cache, use_cache=True)
    (split,) = torch.autograd.grad(torch.cat([first, second], 1).square().sum(), x)
    (whole,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    close(split, whole)


@every_layer
@torch.no_grad()
def test_padding_is_as_if_not_there(name):
    layer, x = make(name), tokens(4, 8)
    spans = [(3, 8), (0, 6), (0, 8), (5, 5)]  # left, right, none, nothing but padding
    mask = torch.zeros(4, 8, dtype=torch.long)
    for row, (start, end) in zip(mask, spans, strict=True):
        row[start:end] = 1
    cache, more = Cache(), tokens(4, 2)
    o, _, _ = layer(x, attention_mask=mask, past_key_values=cache, use_cache=True)
    after, _, _ = layer(more, past_key_values=cache, use_cache=True)
    for b, (start, end) in enumerate(spans):
        expected, _, _ = layer(torch.cat([x[b : b + 1, start:end], more[b : b + 1]], 1))
        close(torch.cat([o[b, start:end], after[b]]), expected[0])
        assert not o[b][mask[b] == 0].any()


@every_layer
@torch.no_grad()
def test_cu_seqlens_are_separate_sequences(name):
    layer, x = make(name), tokens(1, 12)
    bounds = [0, 4, 4, 5, 12]
    cache = Cache()
    cu = torch.tensor(bounds)
    o, _, _ = layer(x, past_key_values=cache, use_cache=True, cu_seqlens=cu)
    y = tokens(1, 3)  # packed again: nothing, two tokens, nothing, one
    cu = torch.tensor([0, 0, 2, 2, 3])
    again, _, _ = layer(y, past_key_values=cache, use_cache=True, cu_seqlens=cu)
    more, rows = tokens(4, 1), []
    last, _, _ = layer(more, past_key_values=cache, use_cache=True)  # a row per sequence
    for n, (start, end) in enumerate(pairwise(bounds)):
        rows = [x[:, start:end], y[:, cu[n] : cu[n + 1]], more[n : n + 1]]
        expected, _, _ = layer(torch.cat(rows, 1))
        got = torch.cat([o[0, start:end], again[0, cu[n] : cu[n + 1]], last[n]])
        close(got, expected[0])


@every_layer
@torch.no_grad()
def test_cache_rows_can_be_selected(name):
    layer, cache, x = make(name), Cache(), tokens(3, 5)
    layer(x[:, :4], past_key_values=cache, use_cache=True)
    cache.select(torch.tensor([2, 0]))
    o, _, _ = layer(x[[2, 0], 4:], past_key_values=cache, use_cache=True)
    close(o, layer(x)[0][[2, 0], 4:])


@every_layer
def test_empty_inputs(name):
    assert make(name)(tokens(2, 0))[0].shape == (2, 0, D)
    assert make(name)(tokens(0, 3))[0].shape == (0, 3, D)


@every_layer
def test_autocast(name):
    layer, cache, x = make(name).float(), Cache(), tokens(2, 9).float()
    exact, _, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        o, _, _ = layer(x)
        o.float().square().sum().backward()
        with torch.no_grad():
            layer(x[:, :8], past_key_values=cache, use_cache=True)
            step, _, _ = layer(x[:, 8:], past_key_values=cache, use_cache=True)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    state = cache[0].recurrent_state
    for S in state if isinstance(state, tuple) else (state,):
        assert S.dtype == torch.float32
    size = exact.abs().max().item()
    torch.testing.assert_close(o.float(), exact, atol=0.05 * size, rtol=0)
    torch.testing.assert_close(step.float(), exact[:, 8:], atol=0.05 * size, rtol=0)


@every_layer
@torch.no_grad()
def test_low_precision(name):
    layer, cache, x = make(name).bfloat16(), Cache(), tokens(2, 9).bfloat16()
    o, _, _ = layer(x, past_key_values=cache, use_cache=True)
    step, _, _ = layer(x[:, :1], past_key_values=cache, use_cache=True)
    assert o.dtype == step.dtype == torch.bfloat16
    assert o.isfinite().all() and step.isfinite().all()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_names_and_shapes(name):
    assert {n: list(p.shape) for n, p in make(name).state_dict().items()} == PARAMETERS[name]


@every_layer
def test_errors(name):
    layer, x = make(name), tokens(2, 5)
    with pytest.raises(ValueError, match=r"\[B, S\] = \[2, 5 or more\].*got \[2, 4\]"):
        layer(x, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask or cu_seqlens, not both"):
        layer(x[:1], attention_mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="construct the layer with layer_idx"):
        make(name, layer_idx=None)(x, past_key_values=Cache())
    cls, options = LAYERS[name]
    if "head_dim" in options and "expand_v" in inspect.signature(cls).parameters:
        options = {**options, "expand_v": 0.3}  # widths of their own
    if cls is not MesaNet:  # whose widths have nothing to do with each other
        match = f"{cls.__name__}: hidden_size.* must be a multiple of"
        with pytest.raises(ValueError, match=match):
            cls(hidden_size=17, **options)
    with pytest.raises(TypeError, match="use_sort_conv"):
        cls(use_sort_conv=True)


MODES = ["hgrn2", "rwkv6", "rwkv5", "gsa", "lightnet", "mom", "delta_net", "gated_deltanet"]
MODES += ["rwkv7", "mesa_net"]


@pytest.mark.parametrize("name", MODES)
def test_unknown_mode(name):
    with pytest.raises(ValueError, match=r"mode must be one of chunk.*got 'parallel'"):
        make(name, mode="parallel")


def theirs(model: str, config: str, layer: str, **sizes) -> torch.nn.Module:
    """A layer of transformers in fp32, with weights away from trivial values."""
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    torch.manual_seed(0)
    module = getattr(modeling, layer)(getattr(modeling, config)(hidden_size=D, **sizes), 0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.dim() == 2 else 2))
    return module


@torch.no_grad()
def test_gated_deltanet_is_the_layer_of_qwen3_next():
    module = theirs(
        "qwen3_next", "Qwen3NextConfig", "Qwen3NextGatedDeltaNet", linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=9,
        linear_conv_kernel_dim=3, layer_types=["linear_attention"], num_hidden_layers=1,
    )  # fmt: skip
    layer = GatedDeltaNet(
        D, expand_v=1.5, head_dim=6, num_heads=2, num_v_heads=4, conv_size=3, norm_eps=1e-6
    )
    layer.load_state_dict(layer.from_qwen3_next(module.state_dict()))
    x = torch.randn(2, 20, D)
    torch.testing.assert_close(layer(x)[0], module(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_kimi_delta_attention_is_the_layer_of_kimi_linear():
    module = theirs(
        "kimi_linear", "KimiLinearConfig", "KimiLinearDeltaAttention", linear_num_heads=2,
        linear_head_dim=6, linear_conv_kernel_dim=3, layer_types=["linear_attention"],
        num_hidden_layers=1,
    )  # fmt: skip
    eps = module.o_norm.variance_epsilon
    layer = KimiDeltaAttention(D, head_dim=6, num_heads=2, conv_size=3, norm_eps=eps)
    layer.load_state_dict(layer.from_kimi_linear(module.state_dict()))
    x = torch.randn(2, 20, D)
    torch.testing.assert_close(layer(x)[0], module(x), atol=1e-5, rtol=1e-4)


def test_values_of_the_first_rwkv7_layer():
    """Mixed into those of the others, packed and padded like the tokens."""
    torch.manual_seed(0)
    first, second = (
        layers.RWKV7Attention(
            hidden_size=D, head_dim=8, layer_idx=i, num_hidden_layers=2, **RANKS
        ).double()
        for i in (0, 1)
    )
    x = tokens(2, 7)
    with torch.no_grad():  # some start as zeros
        for p in (*first.parameters(), *second.parameters()):
            p.add_(torch.rand_like(p) - 0.5)
    _, _, _, v = first(x)
    close(v, (x + (F.pad(x, (0, 0, 1, -1)) - x) * first.x_v) @ first.v_proj.weight.T)
    w = dict(second.named_parameters())
    o, _, _, same = second(x, v_first=v)
    close(o, definitions.rwkv7(second, w, x, v) @ w["o_proj.weight"].T)
    assert same is v
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    _, _, _, v = first(x, attention_mask=mask)
    o, _, _, _ = second(x, attention_mask=mask, v_first=v)
    for row, part in ((0, slice(2, 7)), (1, slice(0, 4))):
        alone = first(x[row : row + 1, part])[3]
        close(o[row : row + 1, part], second(x[row : row + 1, part], v_first=alone)[0])
    with pytest.raises(ValueError, match="v_first, the values of the layer with layer_idx=0"):
        second(x)


def test_errors_of_single_layers():
    with pytest.raises(ValueError, match="num_v_heads must be a multiple of num_heads, got 3 and"):
        make("gated_deltanet", num_v_heads=3)
    with pytest.raises(ValueError, match=r"qk_activation must be silu, relu.*got 'tanh'"):
        make("delta_net", qk_activation="tanh")
    with pytest.raises(ValueError, match="qk_norm must be l2 or sum, got 'l1'"):
        make("delta_net", qk_norm="l1")
    with pytest.raises(ValueError, match="value_dim must be a multiple of the 2 heads, got 7"):
        make("rwkv7", value_dim=7)
    with pytest.raises(ValueError, match="give head_dim or num_heads, got neither"):
        make("rwkv7", head_dim=None)
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads, got 2 and"):
        make("gsa", num_kv_heads=3)
    with pytest.raises(ValueError, match="feature_map must be swish, relu or t2r, got 'elu'"):
        make("gsa", feature_map="elu")
    with pytest.raises(ValueError, match="topk must be in 1 to num_memories = 3, got 4"):
        make("mom", topk=4)
    with pytest.raises(ValueError, match="give num_heads or expand_ratio, got neither"):
        HGRN2Attention(hidden_size=16, expand_ratio=None)
