"""GatedLinearAttention: FLA's names, an independent definition, its modes against each other."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lsm_cuda.cache import Cache
from lsm_cuda.layers import GatedLinearAttention
from lsm_cuda.modules import ACT2FN
from lsm_cuda.reference import gated_linear_attention

PROJECTIONS = [
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "gk_proj.0.weight",
    "gk_proj.1.weight",
    "gk_proj.1.bias",
    "o_proj.weight",
]
CONVOLUTIONS = ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"]
CONV_BIASES = ["q_conv1d.bias", "k_conv1d.bias", "v_conv1d.bias"]
GATED = ["g_proj.weight", "g_norm_swish_gate.weight"]

OPTIONS = {
    "plain": {},
    "conv": {"use_short_conv": True},
    "conv bias": {"use_short_conv": True, "conv_bias": True, "conv_size": 3},
    "shared heads": {"num_kv_heads": 2, "use_short_conv": True},
    "one head": {"num_kv_heads": 1, "feature_map": "relu"},
    "no gate": {"use_output_gate": False},
    "other gate": {"gate_fn": "sigmoid", "feature_map": "elu"},
    "unfused": {"fuse_norm": False, "elementwise_affine": False},
    "learned map": {"feature_map": "regla", "num_kv_heads": 2},
    "clamped": {"clamp_min": -0.05, "gate_logit_normalizer": 2, "expand_k": 1.0, "expand_v": 2.0},
}


def make(**options) -> GatedLinearAttention:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 4, "layer_idx": 0}
    layer = GatedLinearAttention(**{**sizes, **options}).double()
    with torch.no_grad():  # away from the trivial values that norms and biases start with
        for name, p in layer.named_parameters():
            if "norm" in name or "bias" in name:
                p.uniform_(0.5, 1.5)
    return layer


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 32, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, PROJECTIONS + GATED),
        ({"elementwise_affine": False}, [*PROJECTIONS, "g_proj.weight"]),
        ({"use_short_conv": True}, PROJECTIONS + GATED + CONVOLUTIONS),
        (
            {"use_short_conv": True, "conv_bias": True},
            PROJECTIONS + GATED + CONVOLUTIONS + CONV_BIASES,
        ),
        ({"fuse_norm": False}, [*PROJECTIONS, "g_proj.weight", "g_norm.weight"]),
        ({"gate_fn": "sigmoid"}, [*PROJECTIONS, "g_proj.weight", "g_norm.weight"]),
        ({"use_output_gate": False}, [*PROJECTIONS, "g_norm.weight"]),
    ],
)
def test_state_dict_has_fla_names(options, names):
    assert sorted(make(**options).state_dict()) == sorted(names)


def test_parameter_shapes():
    layer = GatedLinearAttention(
        hidden_size=64, num_heads=4, num_kv_heads=2, use_short_conv=True, gate_low_rank_dim=8
    )
    assert {name: list(p.shape) for name, p in layer.named_parameters()} == {
        "q_proj.weight": [32, 64],
        "k_proj.weight": [16, 64],
        "v_proj.weight": [32, 64],
        "g_proj.weight": [64, 64],
        "q_conv1d.weight": [32, 1, 4],
        "k_conv1d.weight": [16, 1, 4],
        "v_conv1d.weight": [32, 1, 4],
        "gk_proj.0.weight": [8, 64],
        "gk_proj.1.weight": [16, 8],
        "gk_proj.1.bias": [16],
        "o_proj.weight": [64, 64],
        "g_norm_swish_gate.weight": [16],
    }


def test_constructor_has_fla_arguments_and_defaults():
    parameters = inspect.signature(GatedLinearAttention).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "mode": "chunk",
        "hidden_size": 1024,
        "expand_k": 0.5,
        "expand_v": 1.0,
        "num_heads": 4,
        "num_kv_heads": None,
        "feature_map": None,
        "use_short_conv": False,
        "conv_size": 4,
        "conv_bias": False,
        "use_output_gate": True,
        "gate_fn": "swish",
        "elementwise_affine": True,
        "norm_eps": 1e-5,
        "gate_logit_normalizer": 16,
        "gate_low_rank_dim": 16,
        "clamp_min": None,
        "fuse_norm": True,
        "layer_idx": None,
    }


def definition(layer: GatedLinearAttention, x: torch.Tensor, options: dict) -> torch.Tensor:
    """The layer from its state dict, the paper and the reference recurrence."""
    w = dict(layer.named_parameters())
    H = 4
    groups = H // options.get("num_kv_heads", H)

    def project(name: str) -> torch.Tensor:
        y = x @ w[f"{name}_proj.weight"].T
        if options.get("use_short_conv"):
            taps = w[f"{name}_conv1d.weight"].squeeze(1)  # [D, W]
            W = taps.shape[1]
            padded = F.pad(y, (0, 0, W - 1, 0))
            y = sum(padded[:, i : i + y.shape[1]] * taps[:, i] for i in range(W))
            y = F.silu(y + w.get(f"{name}_conv1d.bias", 0))
        return y

    def heads(y: torch.Tensor, count: int) -> torch.Tensor:
        return y.view(*y.shape[:2], count, -1).repeat_interleave(H // count, 2)

    q, k, v = heads(project("q"), H), project("k"), project("v")
    k, v = heads(k, H // groups), heads(v, H // groups)
    gate = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    g = heads(gate, H // groups).sigmoid().log() / options.get("gate_logit_normalizer", 16)
    if "clamp_min" in options:
        g = g.clamp_min(options["clamp_min"])
    if (name := options.get("feature_map")) == "regla":
        q, k = (y @ w["feature_map_fn.layer.weight"].T for y in (q, k))
        q, k = (q - q.amax(-1, keepdim=True)).exp(), k.exp()
    elif name:
        q, k = ACT2FN[name](q), ACT2FN[name](k)
    o, _ = gated_linear_attention(q, k, v, g)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    o = o * w.get("g_norm_swish_gate.weight", w.get("g_norm.weight", 1))
    o = o.flatten(-2)
    if options.get("use_output_gate", True):
        o = o * ACT2FN[options.get("gate_fn", "swish")](x @ w["g_proj.weight"].T)
    return o @ w["o_proj.weight"].T


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_is_its_definition(options):
    layer = make(**options)
    x = tokens(2, 19).requires_grad_()
    o, attentions, cache = layer(x)
    assert attentions is None and cache is None
    expected = definition(layer, x, options)
    close(o, expected)
    wanted = torch.randn_like(o)
    inputs = [x, *layer.parameters()]
    for got, want in zip(
        torch.autograd.grad((o * wanted).sum(), inputs),
        torch.autograd.grad((expected * wanted).sum(), inputs),
        strict=True,
    ):
        close(got, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_continuing_and_stepping_are_the_whole(options):
    layer, x = make(**options), tokens(2, 21)
    whole, _, _ = layer(x)
    cache = Cache()
    pieces = [layer(x[:, :2], past_key_values=cache, use_cache=True)[0]]
    pieces.append(layer(x[:, 2:13], past_key_values=cache, use_cache=True)[0])
    for t in range(13, 21):
        o, _, returned = layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)
        assert returned is cache
        pieces.append(o)
    close(torch.cat(pieces, 1), whole)
    assert cache.get_seq_length() == 21
    fresh = Cache()
    layer(x, past_key_values=fresh, use_cache=True)
    close(cache[0].recurrent_state, fresh[0].recurrent_state)


@torch.no_grad()
def test_a_step_updates_the_state_in_place():
    layer, cache = make(use_short_conv=True), Cache()
    layer(tokens(2, 5), past_key_values=cache, use_cache=True)
    before = [t.data_ptr() for t in cache[0].tensors()]
    layer(tokens(2, 1), past_key_values=cache, use_cache=True)
    assert [t.data_ptr() for t in cache[0].tensors()] == before


@pytest.mark.parametrize("new_tokens", [1, 4])
@torch.no_grad()
def test_without_use_cache_the_cache_is_only_read(new_tokens):
    layer, cache, x = make(use_short_conv=True), Cache(), tokens(2, 6 + new_tokens)
    layer(x[:, :6], past_key_values=cache, use_cache=True)
    before = [t.clone() for t in cache[0].tensors()]
    o, _, _ = layer(x[:, 6:], past_key_values=cache)
    close(o, layer(x)[0][:, 6:])
    assert all(torch.equal(a, b) for a, b in zip(before, cache[0].tensors(), strict=True))
    assert cache.get_seq_length() == 6


def test_gradients_flow_through_a_cache():
    layer, x = make(use_short_conv=True), tokens(1, 9).requires_grad_()
    cache = Cache()
    first, _, _ = layer(x[:, :5], past_key_values=cache, use_cache=True)
    second, _, _ = layer(x[:, 5:], past_key_values=cache, use_cache=True)
    (split,) = torch.autograd.grad(torch.cat([first, second], 1).square().sum(), x)
    (whole,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    close(split, whole)


@pytest.mark.parametrize("options", [{}, {"use_short_conv": True, "num_kv_heads": 2}])
@torch.no_grad()
def test_padding_is_as_if_not_there(options):
    layer, x = make(**options), tokens(4, 12)
    spans = [(3, 12), (0, 8), (0, 12), (5, 5)]  # left, right, none, nothing but padding
    mask = torch.zeros(4, 12, dtype=torch.long)
    for row, (start, end) in zip(mask, spans, strict=True):
        row[start:end] = 1
    cache = Cache()
    o, _, _ = layer(x, attention_mask=mask, past_key_values=cache, use_cache=True)
    for b, (start, end) in enumerate(spans):
        alone = Cache()
        expected, _, _ = layer(x[b : b + 1, start:end], past_key_values=alone, use_cache=True)
        close(o[b, start:end], expected[0])
        close(cache[0].recurrent_state[b], alone[0].recurrent_state[0])
        assert not o[b][mask[b] == 0].any()


@torch.no_grad()
def test_a_finished_sequence_keeps_its_state():
    """A mask may also silence single tokens while decoding; it may cover the past too."""
    layer, x, cache = make(use_short_conv=True), tokens(2, 6), Cache()
    layer(x[:, :5], past_key_values=cache, use_cache=True)
    before = [t[1].clone() for t in cache[0].tensors()]
    mask = torch.ones(2, 6)
    mask[1, 5] = 0
    o, _, _ = layer(x[:, 5:], attention_mask=mask, past_key_values=cache, use_cache=True)
    close(o[0], layer(x)[0][0, 5:])
    for old, new in zip(before, cache[0].tensors(), strict=True):
        close(new[1], old)


@torch.no_grad()
def test_cu_seqlens_are_separate_sequences():
    layer, x = make(use_short_conv=True), tokens(1, 14)
    bounds = [0, 4, 4, 5, 14]
    cache = Cache()
    o, _, _ = layer(x, past_key_values=cache, use_cache=True, cu_seqlens=torch.tensor(bounds))
    for n, (start, end) in enumerate(pairwise(bounds)):
        alone = Cache()
        expected, _, _ = layer(x[:, start:end], past_key_values=alone, use_cache=True)
        close(o[0, start:end], expected[0])
        close(cache[0].recurrent_state[n], alone[0].recurrent_state[0])
    more = tokens(4, 1)  # decode goes on with one row per sequence
    o, _, _ = layer(more, past_key_values=cache, use_cache=True)
    expected, _, _ = layer(torch.cat([x[:, 5:14], more[3:]], 1))
    close(o[3], expected[0, -1:])


def test_empty_inputs():
    layer = make(use_short_conv=True)
    assert layer(tokens(2, 0))[0].shape == (2, 0, 32)
    assert layer(tokens(0, 3))[0].shape == (0, 3, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_a_wide_state(dtype):
    layer, cache = make(use_short_conv=True).to(dtype), Cache()
    x = tokens(2, 17).to(dtype)
    with torch.no_grad():
        o, _, _ = layer(x, past_key_values=cache, use_cache=True)
        step, _, _ = layer(x[:, :1], past_key_values=cache, use_cache=True)
    assert o.dtype == step.dtype == dtype and o.isfinite().all() and step.isfinite().all()
    assert cache[0].recurrent_state.dtype == torch.float32


def test_autocast():
    layer, cache = make(use_short_conv=True).float(), Cache()
    x = tokens(2, 17).float()
    exact, _, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        o, _, _ = layer(x)
        o.float().sum().backward()
        with torch.no_grad():
            layer(x[:, :16], past_key_values=cache, use_cache=True)
            step, _, _ = layer(x[:, 16:], past_key_values=cache, use_cache=True)
    assert cache[0].recurrent_state.dtype == torch.float32
    torch.testing.assert_close(o.float(), exact, atol=0.05, rtol=0.05)
    torch.testing.assert_close(step.float(), exact[:, 16:], atol=0.05, rtol=0.05)


@pytest.mark.slow
def test_compiles_as_one_graph():
    layer = make(use_short_conv=True).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (9, 17):
        x = tokens(2, T).float()
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(x1)[0].square().sum().backward()
        compiled(x2)[0].square().sum().backward()
        torch.testing.assert_close(x2.grad, x1.grad)


def test_errors():
    x = tokens(2, 5)
    with pytest.raises(ValueError, match=r"\[B, S\] = \[2, 5 or more\].*got \[2, 5, 5\]"):
        make()(x, attention_mask=torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match=r"got \[2, 4\]"):
        make()(x, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask or cu_seqlens, not both"):
        make()(x[:1], attention_mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="B = 1 with cu_seqlens"):
        make()(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="construct the layer with layer_idx"):
        make(layer_idx=None)(x, past_key_values=Cache())
    with pytest.raises(ValueError, match=r"mode must be one of chunk.*got 'parallel'"):
        make(mode="parallel")
    with pytest.raises(ValueError, match="multiple of num_kv_heads, got 4 and 3"):
        make(num_kv_heads=3)
    with pytest.raises(ValueError, match="expand_k must be a multiple of num_heads"):
        make(expand_k=0.3)
    with pytest.raises(ValueError, match="unknown feature map 'reluu'"):
        make(feature_map="reluu")
    with pytest.raises(
        ValueError, match=r"keep the width.*got 'hedgehog', which makes 4 channels 8"
    ):
        make(feature_map="hedgehog")
    with pytest.raises(TypeError, match="use_sort_conv"):
        GatedLinearAttention(use_sort_conv=True)
