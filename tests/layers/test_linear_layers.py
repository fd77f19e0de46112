"""Layers around decay-free, constant and scalar-decay operators: definitions, modes, names."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsm_cuda import layers
from lsm_cuda.cache import Cache
from lsm_cuda.modules import FEATURE_MAPS

HIDDEN = 32

LINEAR = layers.LinearAttention
MAP_OPTIONS = {
    "cosformer": {"max_len": 64},
    "outer_product": {"feature_dim": 5},
}

# a name, the layer, and options beside hidden_size, layer_idx
CASES: dict[str, tuple[type[nn.Module], dict]] = {
    **{
        f"linear {name}": (
            LINEAR,
            {
                "num_heads": 4,
                "feature_map": name,
                "feature_map_options": MAP_OPTIONS.get(name),
            },
        )
        for name in FEATURE_MAPS
    },
    "linear normalised": (
        LINEAR,
        {"num_heads": 4, "feature_map": "elu", "do_feature_map_norm": True, "num_kv_heads": 2},
    ),
    "linear sums": (
        LINEAR,
        {
            "num_heads": 4, "feature_map": "dpfp", "norm_q": True, "norm_k": True,
            "output_norm": "identity", "expand_k": 0.5, "expand_v": 2.0,
        },
    ),
    "retention": (layers.MultiScaleRetention, {"num_heads": 4}),
    "retention shared": (
        layers.MultiScaleRetention,
        {"num_heads": 4, "num_kv_heads": 2, "use_short_conv": True, "feature_map": "relu"},
    ),
    "retention ungated": (layers.MultiScaleRetention, {"num_heads": 4, "use_output_gate": False}),
    "lightning": (layers.LightningAttention, {"num_heads": 4, "num_layers": 3}),
    "transnormer": (layers.TransNormerAttention, {"num_heads": 4, "num_layers": 3}),
    "transnormer plain": (
        layers.TransNormerAttention,
        {"num_heads": 4, "head_dim": 6, "num_layers": 3, "use_lrpe": False, "bias": True},
    ),
    "simple gla": (layers.SimpleGatedLinearAttention, {"num_heads": 4}),
    "simple gla shared": (
        layers.SimpleGatedLinearAttention,
        {
            "num_heads": 4, "num_kv_heads": 2, "use_short_conv": False, "gate_fn": "sigmoid",
            "feature_map": "elu", "gate_logit_normalizer": 2,
        },
    ),
    "based": (
        layers.BasedLinearAttention, {"num_heads": 4, "num_key_value_heads": 4, "feature_dim": 5}
    ),
    "rebased": (
        layers.ReBasedLinearAttention, {"num_heads": 4, "num_key_value_heads": 4, "feature_dim": 5}
    ),
    "mamba2": (layers.Mamba2, {"head_dim": 16, "state_size": 6}),
    "mamba2 groups": (
        layers.Mamba2,
        {
            "head_dim": 16, "state_size": 6, "n_groups": 2, "D_has_hdim": True, "use_bias": True,
            "dt_limit": (1.0, 1.6), "norm_before_gate": True,
        },
    ),
    "mamba2 without norm": (
        layers.Mamba2, {"head_dim": 16, "state_size": 6, "rmsnorm": False, "use_conv_bias": False}
    ),
    "log-linear mamba2": (
        layers.LogLinearMamba2, {"head_dim": 16, "state_size": 6, "n_groups": 2, "num_levels": 6}
    ),
    "mlstm": (layers.MLSTM, {"num_heads": 4}),
    "mlstm biased": (
        layers.MLSTM, {"num_heads": 4, "use_bias": True, "gate_soft_cap": None, "v_dim_factor": 2.0}
    ),
    "rfa": (layers.RandomFeatureAttention, {"num_heads": 4, "num_features": 32, "sigma": 0.3}),
    "rfa without gate": (
        layers.RandomFeatureAttention,
        {
            "num_heads": 4, "num_kv_heads": 2, "num_features": 32, "use_gate": False,
            "learn_sigma": True, "sigma": 0.3,
        },
    ),
}  # fmt: skip

every_layer = pytest.mark.parametrize("case", CASES)


def make(case: str, **more) -> nn.Module:
    torch.manual_seed(0)
    layer, options = CASES[case]
    made = layer(hidden_size=HIDDEN, **{"layer_idx": 0, **options, **more}).double()
    with torch.no_grad():  # away from the trivial values that norms, gates and biases start with
        for name, p in made.named_parameters():
            if name in ("igate_preact.bias", "fgate_preact.bias"):
                p.uniform_(-1, 2)
            elif "norm" in name or "bias" in name or name in ("D", "L"):
                p.uniform_(0.5, 1.5)
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, dtype=torch.float64)


def close(a, b, tolerance: float = 1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# Where random features' denominators come near zero, fp64 loses digits too.
LOOSE = {"rfa": 1e-7, "rfa without gate": 1e-7, "linear rfa": 1e-7}


@every_layer
@torch.no_grad()
def test_continuing_and_stepping_are_the_whole(case):
    layer, x = make(case), tokens(2, 21)
    whole, attentions, none = layer(x)
    assert attentions is None and none is None and whole.shape == x.shape
    splits = sorted({0, *torch.randint(1, 14, (3,)).tolist(), 14, *range(15, 22)})
    cache, pieces = Cache(), []
    for start, end in pairwise(splits):
        o, _, returned = layer(x[:, start:end], past_key_values=cache, use_cache=True)
        assert returned is cache
        pieces.append(o)
    close(torch.cat(pieces, 1), whole, LOOSE.get(case, 1e-9))
    assert cache.get_seq_length() == 21
    fresh = Cache()
    layer(x, past_key_values=fresh, use_cache=True)
    for stepped, at_once in zip(cache[0].tensors(), fresh[0].tensors(), strict=True):
        close(stepped, at_once)


@every_layer
@torch.no_grad()
def test_a_step_updates_the_state_in_place(case):
    layer, cache = make(case), Cache()
    layer(tokens(2, 5), past_key_values=cache, use_cache=True)
    states = cache[0].recurrent_state
    states = states if isinstance(states, tuple) else (states,)
    before = [t.data_ptr() for t in states]
    old = [t.clone() for t in states]
    layer(tokens(2, 1), past_key_values=cache, use_cache=True)
    now = cache[0].recurrent_state
    now = now if isinstance(now, tuple) else (now,)
    assert [t.data_ptr() for t in now] == before
    assert not torch.equal(now[0], old[0])


@every_layer
@pytest.mark.parametrize("new_tokens", [1, 4])
@torch.no_grad()
def test_without_use_cache_the_cache_is_only_read(case, new_tokens):
    layer, cache, x = make(case), Cache(), tokens(2, 6 + new_tokens)
    layer(x[:, :6], past_key_values=cache, use_cache=True)
    before = [t.clone() for t in cache[0].tensors()]
    o, _, _ = layer(x[:, 6:], past_key_values=cache)
    close(o, layer(x)[0][:, 6:], LOOSE.get(case, 1e-9))
    assert all(torch.equal(a, b) for a, b in zip(before, cache[0].tensors(), strict=True))


@every_layer
@torch.no_grad()
def test_padding_is_as_if_not_there(case):
    layer, x = make(case), tokens(4, 12)
    spans = [(3, 12), (0, 8), (0, 12), (5, 5)]  # left, right, none, nothing but padding
    mask = torch.zeros(4, 12, dtype=torch.long)
    for row, (start, end) in zip(mask, spans, strict=True):
        row[start:end] = 1
    cache = Cache()
    o, _, _ = layer(x, attention_mask=mask, past_key_values=cache, use_cache=True)
    next_tokens = tokens(4, 1)
    next_o, _, _ = layer(next_tokens, past_key_values=cache, use_cache=True)
    for b, (start, end) in enumerate(spans):
        alone = torch.cat([x[b : b + 1, start:end], next_tokens[b : b + 1]], 1)
        expected, _, _ = layer(alone)
        close(o[b, start:end], expected[0, :-1], LOOSE.get(case, 1e-9))
        close(next_o[b], expected[0, -1:], LOOSE.get(case, 1e-9))
        assert not o[b][mask[b] == 0].any()


@every_layer
@torch.no_grad()
def test_cu_seqlens_are_separate_sequences(case):
    layer, x = make(case), tokens(1, 14)
    bounds = [0, 4, 4, 5, 14]
    cache = Cache()
    o, _, _ = layer(x, past_key_values=cache, use_cache=True, cu_seqlens=torch.tensor(bounds))
    for start, end in pairwise(bounds):
        close(o[:, start:end], layer(x[:, start:end])[0], LOOSE.get(case, 1e-9))
    more = tokens(1, 7)  # packed again, then one row per sequence
    starts = [0, 2, 3, 3, 7]
    o, _, _ = layer(more, past_key_values=cache, use_cache=True, cu_seqlens=torch.tensor(starts))
    last = tokens(4, 1)
    step, _, _ = layer(last, past_key_values=cache, use_cache=True)
    for n in range(4):
        first, second = x[:, bounds[n] : bounds[n + 1]], more[:, starts[n] : starts[n + 1]]
        expected, _, _ = layer(torch.cat([first, second, last[n : n + 1]], 1))
        expected = expected[:, first.shape[1] :]
        close(o[:, starts[n] : starts[n + 1]], expected[:, :-1], LOOSE.get(case, 1e-9))
        close(step[n : n + 1], expected[:, -1:], LOOSE.get(case, 1e-9))


@every_layer
@torch.no_grad()
def test_a_cache_can_be_reordered_and_cloned(case):
    layer, x, cache = make(case), tokens(3, 7), Cache()
    layer(x[:, :5], past_key_values=cache, use_cache=True)
    branch = cache.clone()
    order = torch.tensor([2, 0])
    cache.select(order)
    for t in (5, 6):
        o, _, _ = layer(x[order, t : t + 1], past_key_values=cache, use_cache=True)
        kept, _, _ = layer(x[:, t : t + 1], past_key_values=branch, use_cache=True)
    whole, _, _ = layer(x)
    close(o, whole[order, -1:], LOOSE.get(case, 1e-9))
    close(kept, whole[:, -1:], LOOSE.get(case, 1e-9))


@every_layer
def test_gradients_flow_to_everything_and_through_a_cache(case):
    layer, x = make(case), tokens(2, 9).requires_grad_()
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    weight = tokens(2, 9)
    whole = torch.autograd.grad((layer(x)[0] * weight).sum(), inputs)
    for name, grad in zip(["x", *names], whole, strict=True):
        assert grad.isfinite().all() and grad.any(), name
    cache = Cache()
    first, _, _ = layer(x[:, :5], past_key_values=cache, use_cache=True)
    second, _, _ = layer(x[:, 5:], past_key_values=cache, use_cache=True)
    split = torch.autograd.grad((torch.cat([first, second], 1) * weight).sum(), inputs)
    for name, a, b in zip(["x", *names], split, whole, strict=True):
        scale = 1 + b.abs().max()
        assert (a - b).abs().max() < 1e-7 * scale, name


@every_layer
def test_autocast(case):
    layer, cache = make(case).float(), Cache()
    x = tokens(2, 17).float()
    exact, _, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        o, _, _ = layer(x)
        o.float().sum().backward()
        with torch.no_grad():
            layer(x[:, :16], past_key_values=cache, use_cache=True)
            step, _, _ = layer(x[:, 16:], past_key_values=cache, use_cache=True)
    states = cache[0].recurrent_state
    for state in states if isinstance(states, tuple) else (states,):
        assert state.dtype in (torch.float32, torch.int64)
    # a few roundings of 2^-9 each, relative to the output's size; quotients of sums amplify them
    limit = 0.1 if case in LOOSE or "rebased" in case else 0.04
    size = exact.abs().max()
    assert (o.float() - exact).abs().max() < limit * size
    assert (step.float() - exact[:, 16:]).abs().max() < limit * size


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_keeps_a_wide_state(case, dtype):
    layer, cache, x = make(case).to(dtype), Cache(), tokens(2, 17).to(dtype)
    o, _, _ = layer(x, past_key_values=cache, use_cache=True)
    step, _, _ = layer(x[:, :1], past_key_values=cache, use_cache=True)
    assert o.dtype == step.dtype == dtype and o.isfinite().all() and step.isfinite().all()
    states = cache[0].recurrent_state
    for state in states if isinstance(states, tuple) else (states,):
        assert state.dtype in (torch.float32, torch.int64)


@every_layer
def test_empty_inputs(case):
    layer = make(case)
    assert layer(tokens(2, 0))[0].shape == (2, 0, HIDDEN)
    assert layer(tokens(0, 3))[0].shape == (0, 3, HIDDEN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["retention shared", "linear cosformer", "transnormer", "mamba2", "log-linear mamba2"]
)
def test_compiles_as_one_graph(case):
    layer = make(case).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (9, 17):
        x = tokens(2, T).float()
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer(x1)[0].square().sum().backward()
        compiled(x2)[0].square().sum().backward()
        torch.testing.assert_close(x2.grad, x1.grad, atol=1e-4, rtol=1e-3)


# --- names -----------------------------------------------------------------------------------

QKVO = {"q_proj.weight": [32, 32], "k_proj.weight": [32, 32], "v_proj.weight": [32, 32],
        "o_proj.weight": [32, 32]}  # fmt: skip
MAMBA2 = {
    "dt_bias": [4], "A_log": [4], "D": [4], "in_proj.weight": [144, 32],
    "conv1d.weight": [76, 1, 4], "conv1d.bias": [76], "norm.weight": [64],
    "out_proj.weight": [32, 64],
}  # fmt: skip
NAMES = {
    "linear elementwise_product": QKVO | {"norm.weight": [8]} | {
        f"feature_map_{x}.layer{i}.{p}": [8, 8] if p == "weight" else [8]
        for x in "qk" for i in (1, 2) for p in ("weight", "bias")
    },
    "linear hedgehog": QKVO | {"norm.weight": [8]} | {
        f"feature_map_{x}.layer.{p}": [8, 8] if p == "weight" else [8]
        for x in "qk" for p in ("weight", "bias")
    },
    "linear t2r": QKVO | {
        "norm.weight": [8], "feature_map_q.layer.weight": [8, 8],
        "feature_map_k.layer.weight": [8, 8],
    },
    "linear sums": {
        "q_proj.weight": [16, 32], "k_proj.weight": [16, 32], "v_proj.weight": [64, 32],
        "o_proj.weight": [32, 64],
    },
    "retention": {
        "q_proj.weight": [32, 32], "k_proj.weight": [32, 32], "v_proj.weight": [64, 32],
        "g_proj.weight": [64, 32], "o_proj.weight": [32, 64], "g_norm_swish_gate.weight": [16],
    },
    "retention shared": {
        "q_proj.weight": [32, 32], "k_proj.weight": [16, 32], "v_proj.weight": [32, 32],
        "g_proj.weight": [64, 32], "o_proj.weight": [32, 64], "g_norm_swish_gate.weight": [16],
        "q_conv1d.weight": [32, 1, 4], "k_conv1d.weight": [16, 1, 4], "v_conv1d.weight": [32, 1, 4],
    },
    "retention ungated": {
        "q_proj.weight": [32, 32], "k_proj.weight": [32, 32], "v_proj.weight": [64, 32],
        "o_proj.weight": [32, 64], "g_norm.weight": [16],
    },
    "lightning": {
        "qkv_proj.weight": [96, 32], "output_gate.weight": [32, 32], "norm.weight": [32],
        "out_proj.weight": [32, 32],
    },
    "transnormer": {
        "qkvu_proj.weight": [128, 32], "out_proj.weight": [32, 32], "lrpe.theta": [4, 1, 8],
    },
    "simple gla": QKVO | {
        "g_proj.weight": [32, 32], "gk_proj.weight": [4, 32], "gk_proj.bias": [4],
        "g_norm_swish_gate.weight": [8],
    } | {f"{x}_conv1d.weight": [32, 1, 4] for x in "qkv"},
    "simple gla shared": {
        "q_proj.weight": [32, 32], "k_proj.weight": [16, 32], "v_proj.weight": [16, 32],
        "g_proj.weight": [32, 32], "gk_proj.weight": [4, 32], "gk_proj.bias": [4],
        "g_norm.weight": [8], "o_proj.weight": [32, 32],
    },
    "based": {
        "q_proj.weight": [20, 32], "k_proj.weight": [20, 32], "v_proj.weight": [32, 32],
        "o_proj.weight": [32, 32],
    },
    "rebased": {
        "q_proj.weight": [20, 32], "k_proj.weight": [20, 32], "v_proj.weight": [32, 32],
        "o_proj.weight": [32, 32], "feature_map.gamma": [5], "feature_map.beta": [5],
    },
    "mamba2": MAMBA2,
    "mamba2 groups": MAMBA2 | {
        "D": [64], "in_proj.weight": [156, 32], "in_proj.bias": [156], "conv1d.weight": [88, 1, 4],
        "conv1d.bias": [88], "out_proj.bias": [32],
    },
    "log-linear mamba2": {
        "dt_bias": [4], "A_log": [4], "D": [4], "L": [4, 6], "in_proj.weight": [180, 32],
        "in_proj.bias": [180], "conv1d.weight": [88, 1, 4], "norm.weight": [64],
        "out_proj.weight": [32, 64], "out_proj.bias": [32],
    },
    "mlstm": {
        "q.weight": [16, 32], "k.weight": [16, 32], "v.weight": [32, 32],
        "ogate_preact.weight": [32, 32], "igate_preact.weight": [4, 32], "igate_preact.bias": [4],
        "fgate_preact.weight": [4, 32], "fgate_preact.bias": [4], "multihead_norm.weight": [32],
        "out_proj.weight": [32, 32],
    },
    "rfa": QKVO | {
        "f_proj.weight": [4, 32], "f_proj.bias": [4], "feature_map.sigma": [8],
        "feature_map.projection": [32, 8],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_state_dict_has_the_names_and_shapes_of_checkpoints(case):
    assert {name: list(t.shape) for name, t in make(case).state_dict().items()} == NAMES[case]


def test_tied_feature_maps_are_one_module():
    layer = make("linear hedgehog", tie_feature_map_qk=True)
    assert layer.feature_map_q is layer.feature_map_k
    assert sorted(layer.state_dict()) == sorted(NAMES["linear hedgehog"])


# --- definitions -----------------------------------------------------------------------------


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1))


def weighted(weights: Callable[[int, int], Tensor], v: Tensor) -> Tensor:
    """``o_t = Σ_{s≤t} w(t, s) v_s`` with ``w [B, H]``."""
    rows = []
    for t in range(v.shape[1]):
        rows.append(sum(weights(t, s)[..., None] * v[:, s] for s in range(t + 1)))
    return torch.stack(rows, 1)


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def dot(q: Tensor, k: Tensor) -> Callable[[int, int], Tensor]:
    return lambda t, s: (q[:, t] * k[:, s]).sum(-1)


def conv(x: Tensor, taps: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    W = taps.shape[-1]
    padded = F.pad(x, (0, 0, W - 1, 0))
    y = sum(padded[:, i : i + x.shape[1]] * taps[:, 0, i] for i in range(W))
    return F.silu(y + bias)


def define_linear(layer, w, x):
    q, k, v = (heads(x @ w[f"{n}_proj.weight"].T, 4) for n in "qkv")
    q, k = (
        (y @ w[f"feature_map_{n}.layer1.weight"].T + w[f"feature_map_{n}.layer1.bias"])
        * (y @ w[f"feature_map_{n}.layer2.weight"].T + w[f"feature_map_{n}.layer2.bias"])
        for n, y in (("q", q), ("k", k))
    )
    score = dot(q, k)
    o = weighted(lambda t, s: score(t, s) / math.sqrt(8), v)
    return rms(o, w["norm.weight"], 1e-5).flatten(-2) @ w["o_proj.weight"].T


def define_normalised(layer, w, x):
    q, k, v = (x @ w[f"{n}_proj.weight"].T for n in "qkv")
    q = heads(q, 4)
    k, v = (heads(y, 2).repeat_interleave(2, 2) for y in (k, v))
    q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))
    score = dot(q, k)
    o = weighted(score, v) / weighted(score, torch.ones_like(v))
    return rms(o, w["norm.weight"], 1e-5).flatten(-2) @ w["o_proj.weight"].T


def define_sums(layer, w, x):
    q, k, v = (heads(x @ w[f"{n}_proj.weight"].T, 4) for n in "qkv")

    def dpfp(y):
        r = torch.cat([y, -y], -1).relu()
        f = torch.cat([r * r.roll(j, -1) for j in range(1, 5)], -1)
        return f / (f.sum(-1, keepdim=True) + 1e-4)

    score = dot(dpfp(q), dpfp(k))
    o = weighted(lambda t, s: score(t, s) / math.sqrt(32), v)  # 4 channels, 32 features
    return o.flatten(-2) @ w["o_proj.weight"].T


def define_retention(layer, w, x):
    q, k, v = (heads(x @ w[f"{n}_proj.weight"].T, 4) for n in "qkv")
    turn = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    q, k = (torch.complex(y[..., :4], y[..., 4:]) for y in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))

    def weight(t, s):
        turned = q[:, t] * k[:, s].conj() * torch.exp(1j * (t - s) * turn)
        return turned.real.sum(-1) * gamma ** (t - s) / math.sqrt(8)

    o = rms(weighted(weight, v), w["g_norm_swish_gate.weight"], 1e-5).flatten(-2)
    return (o * F.silu(x @ w["g_proj.weight"].T)) @ w["o_proj.weight"].T


def define_lightning(layer, w, x):
    qkv = heads(F.silu(x @ w["qkv_proj.weight"].T), 4)
    q, k, v = qkv[..., :8], qkv[..., 8:16], qkv[..., 16:]
    slopes = 2.0 ** (-2 * torch.arange(1, 5, dtype=torch.float64)) * (1 - 1 / (2 + 1e-5) + 1e-5)
    score = dot(q, k)
    o = weighted(lambda t, s: score(t, s) * (-slopes * (t - s)).exp(), v).flatten(-2)
    o = rms(o, w["norm.weight"], 1e-6) * (x @ w["output_gate.weight"].T).sigmoid()
    return o @ w["out_proj.weight"].T


def define_transnormer(layer, w, x):
    q, k, v, u = (x @ w["qkvu_proj.weight"].T).split(32, -1)
    q, k, v = heads(F.silu(q), 4), heads(F.silu(k), 4), heads(v, 4)
    theta = w["lrpe.theta"].squeeze(1)
    slopes = 2.0 * torch.arange(4, dtype=torch.float64)  # 8 / H, in the first layer

    def weight(t, s):
        score = (q[:, t] * k[:, s] * (theta * (t - s)).cos()).sum(-1)
        return score * (-slopes * (t - s)).exp()

    return (u * rms(weighted(weight, v).flatten(-2), 1.0, 1e-6)) @ w["out_proj.weight"].T


def define_simple_gla(layer, w, x):
    q, k, v = (heads(conv(x @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]), 4) for n in "qkv")
    g = (x @ w["gk_proj.weight"].T + w["gk_proj.bias"]).sigmoid().log() / 16
    score = dot(q, k)
    o = weighted(lambda t, s: score(t, s) / math.sqrt(8) * g[:, s + 1 : t + 1].sum(1).exp(), v)
    o = rms(o, w["g_norm_swish_gate.weight"], 1e-5).flatten(-2)
    return (o * F.silu(x @ w["g_proj.weight"].T)) @ w["o_proj.weight"].T


def define_based(layer, w, x):
    q, k, v = (heads(x @ w[f"{n}_proj.weight"].T, 4) for n in "qkv")
    score = dot(q, k)

    def weight(t, s):
        y = score(t, s) / math.sqrt(5)
        return 1 + y + y.square() / 2

    o = weighted(weight, v) / (weighted(weight, torch.ones_like(v)) + 1e-6)
    return o.flatten(-2) @ w["o_proj.weight"].T


def define_rebased(layer, w, x):
    q, k, v = (heads(x @ w[f"{n}_proj.weight"].T, 4) for n in "qkv")
    q, k = (
        (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        * w["feature_map.gamma"] + w["feature_map.beta"]
        for y in (q, k)
    )  # fmt: skip
    score = dot(q, k)
    o = weighted(lambda t, s: score(t, s).square() / 5, v)
    total = weighted(lambda t, s: score(t, s).square() / 5, torch.ones_like(v))
    return (o / (total + 1e-5)).flatten(-2) @ w["o_proj.weight"].T


def ssd(w, x, groups):
    """Gate, heads, decay sums, scores and skip of a Mamba-2 layer, and what else in_proj gives."""
    n = 6 * groups
    projected = x @ w["in_proj.weight"].T + w.get("in_proj.bias", 0.0)
    z, xBC, dt, extra = projected.split([64, 64 + 2 * n, 4, projected.shape[-1] - 132 - 2 * n], -1)
    u, B, C = conv(xBC, w["conv1d.weight"], w.get("conv1d.bias", 0.0)).split([64, n, n], -1)
    B, C = (heads(y, groups).repeat_interleave(4 // groups, 2) for y in (B, C))
    dt = (1 + (dt + w["dt_bias"]).exp()).log()
    return z, heads(u, 4), dt, -w["A_log"].exp(), dot(C, B), extra


def define_mamba2(layer, w, x):
    z, u, dt, A, score, _ = ssd(w, x, 1)

    def weight(t, s):
        return score(t, s) * dt[:, s] * (A * dt[:, s + 1 : t + 1].sum(1)).exp()

    y = (weighted(weight, u) + w["D"][:, None] * u).flatten(-2)
    return rms(y * F.silu(z), w["norm.weight"], 1e-5) @ w["out_proj.weight"].T


def define_mamba2_groups(layer, w, x):
    z, u, dt, A, score, _ = ssd(w, x, 2)
    dt = dt.clamp(1.0, 1.6)

    def weight(t, s):
        return score(t, s) * dt[:, s] * (A * dt[:, s + 1 : t + 1].sum(1)).exp()

    y = weighted(weight, u).flatten(-2) + w["D"] * u.flatten(-2)
    y = rms(heads(y, 2), 1.0, 1e-5).flatten(-2) * w["norm.weight"] * F.silu(z)
    return y @ w["out_proj.weight"].T + w["out_proj.bias"]


def define_log_linear(layer, w, x):
    z, u, dt, A, score, extra = ssd(w, x, 2)
    scales = (1 + (w["L"] * heads(extra, 4)).exp()).log()

    def weight(t, s):
        decay = (A * dt[:, s + 1 : t + 1].sum(1)).exp()
        return score(t, s) * dt[:, s] * decay * scales[:, t, :, (t ^ s).bit_length()]

    y = (weighted(weight, u) + w["D"][:, None] * u).flatten(-2) * F.silu(z)
    y = rms(heads(y, 2), 1.0, 1e-5).flatten(-2) * w["norm.weight"]
    return y @ w["out_proj.weight"].T + w["out_proj.bias"]


def define_mlstm(layer, w, x):
    q, k, v = (heads(x @ w[f"{n}.weight"].T, 4) for n in "qkv")
    i, f = (
        15 * ((x @ w[f"{n}gate_preact.weight"].T + w[f"{n}gate_preact.bias"]) / 15).tanh()
        for n in "if"
    )
    f, score = f.sigmoid().log(), dot(q, k)

    def weight(t, s):
        return score(t, s) / math.sqrt(4) * (i[:, s] + f[:, s + 1 : t + 1].sum(1)).exp()

    # max(|n q|, 1) before the stabiliser scales both sides; its eps of 1e-6 is relative to it
    total = weighted(weight, torch.ones_like(v[..., :1])).abs().clamp(min=1)
    m, stabiliser = torch.zeros_like(i[:, 0]), []
    for t in range(x.shape[1]):
        m = torch.maximum(f[:, t] + m, i[:, t])
        stabiliser.append(m)
    total = total + 1e-6 * torch.stack(stabiliser, 1).exp()[..., None]
    h = weighted(weight, v) / total
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    h = h.flatten(-2) * w["multihead_norm.weight"] * (x @ w["ogate_preact.weight"].T).sigmoid()
    return h @ w["out_proj.weight"].T


def define_rfa(layer, w, x):
    q, k, v = (heads(x @ w[f"{n}_proj.weight"].T, 4) for n in "qkv")
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    directions = w["feature_map.projection"] * w["feature_map.sigma"]
    g = (x @ w["f_proj.weight"].T + w["f_proj.bias"]).sigmoid()

    def weight(t, s):
        score = ((q[:, t] - k[:, s]) @ directions.T).cos().mean(-1)
        return score * (1 - g[:, s]) * g[:, s + 1 : t + 1].prod(1)

    o = weighted(weight, v) / weighted(weight, torch.ones_like(v))
    return o.flatten(-2) @ w["o_proj.weight"].T


DEFINITIONS = {
    "linear elementwise_product": define_linear,
    "linear normalised": define_normalised,
    "linear sums": define_sums,
    "retention": define_retention,
    "lightning": define_lightning,
    "transnormer": define_transnormer,
    "simple gla": define_simple_gla,
    "based": define_based,
    "rebased": define_rebased,
    "mamba2": define_mamba2,
    "mamba2 groups": define_mamba2_groups,
    "log-linear mamba2": define_log_linear,
    "mlstm": define_mlstm,
    "rfa": define_rfa,
}
# The rotation's frequencies are kept in fp32.
DEFINITION_TOLERANCE = {"retention": 1e-5}


@pytest.mark.parametrize("case", DEFINITIONS)
def test_layer_is_its_definition(case):
    more = {"layer_idx": 1} if case == "lightning" else {}
    layer, x = make(case, **more), tokens(2, 11).requires_grad_()
    w = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    o, _, _ = layer(x)
    expected = DEFINITIONS[case](layer, w, x)
    tolerance = DEFINITION_TOLERANCE.get(case, 1e-8)
    close(o, expected, tolerance)
    weight = tokens(2, 11)
    parameters = [(n, p) for n, p in layer.named_parameters() if p.requires_grad]
    inputs = [x, *(p for _, p in parameters)]
    for got, want in zip(
        torch.autograd.grad((o * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        close(got, want, 10 * tolerance)


@pytest.mark.parametrize("case", ["based", "rebased"])
def test_without_causality_every_token_reads_all(case):
    layer, x = make(case, causal=False), tokens(2, 9)
    o, _, _ = layer(x)
    causal, _, _ = make(case)(x)
    close(o[:, -1:], causal[:, -1:], 1e-4)  # Based's eps is another one then
    back, _, _ = layer(x.flip(1))
    close(back.flip(1), o)
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    close(layer(x, attention_mask=mask)[0][0, 4:], layer(x[:1, 4:])[0][0])
    with pytest.raises(ValueError, match="cannot continue a sequence"):
        layer(x, past_key_values=Cache())


# --- other implementations -------------------------------------------------------------------


def load(layer: nn.Module, theirs: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    names = layer.state_dict().keys()
    layer.load_state_dict({n: t for n, t in theirs.state_dict().items() if n in names})
    return layer


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_the_mixer_of_transformers(groups):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = modeling.Mamba2Config(
        hidden_size=HIDDEN, num_heads=4, head_dim=16, state_size=6, n_groups=groups,
        num_hidden_layers=1, chunk_size=8, time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    theirs = modeling.Mamba2Mixer(config, 0).eval()
    ours = layers.Mamba2(
        hidden_size=HIDDEN, head_dim=16, state_size=6, n_groups=groups, layer_idx=0
    )
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items()
    }
    load(ours, theirs)
    x = tokens(2, 21).float()
    torch.testing.assert_close(ours(x)[0], theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer_idx", [0, 2])
def test_lightning_is_the_attention_of_minimax(layer_idx):
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = modeling.MiniMaxConfig(
        hidden_size=HIDDEN, num_attention_heads=4, num_hidden_layers=3, head_dim=8, block_size=16
    )
    theirs = modeling.MiniMaxLightningAttention(config, layer_idx)
    ours = layers.LightningAttention(HIDDEN, 4, num_layers=3, layer_idx=layer_idx)
    load(ours, theirs)
    x = tokens(2, 45).float()
    torch.testing.assert_close(ours(x)[0], theirs(x, (None, None), None)[0], atol=1e-5, rtol=1e-4)


def test_mlstm_is_the_layer_of_transformers():
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    config = modeling.xLSTMConfig(
        hidden_size=HIDDEN,
        num_heads=4,
        num_hidden_layers=1,
        chunk_size=16,
        autocast_kernel_dtype="float32",
    )
    theirs = modeling.xLSTMLayer(config)
    ours = layers.MLSTM(HIDDEN, 4, layer_idx=0)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items()
    }
    load(ours, theirs)
    x = tokens(2, 32).float()
    torch.testing.assert_close(ours(x)[0], theirs(x, None)[0], atol=1e-4, rtol=1e-3)


# --- errors ----------------------------------------------------------------------------------


@every_layer
def test_bad_input(case):
    layer, x = make(case), tokens(2, 5)
    name = CASES[case][0].__name__
    with pytest.raises(ValueError, match=r"\[B, S\] = \[2, 5 or more\].*got \[2, 5, 5\]"):
        layer(x, attention_mask=torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match="attention_mask or cu_seqlens, not both"):
        layer(x[:1], attention_mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="B = 1 with cu_seqlens"):
        layer(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=f"{name}: .* construct the layer with layer_idx"):
        make(case, layer_idx=None)(x, past_key_values=Cache())


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("linear elu", {"mode": "parallel"}, r"mode must be one of chunk.*got 'parallel'"),
        ("linear elu", {"feature_map": "eluu"}, "unknown feature map 'eluu'"),
        ("linear elu", {"output_norm": "layer"}, "output_norm must be rmsnorm or identity"),
        ("linear elu", {"num_kv_heads": 3}, "multiple of num_kv_heads, got 4 and 3"),
        ("linear elu", {"expand_v": 0.3}, "expand_v must be a multiple of num_heads"),
        ("retention", {"expand_k": 0.375}, "must be even, got 3"),
        ("retention", {"feature_map": "dpfp"}, "keep the width"),
        ("simple gla", {"gate_fn": "gate"}, "unknown activation 'gate'"),
        ("based", {"num_key_value_heads": 2}, "must equal num_heads, got 2 and 4"),
        ("based", {"feature_name": "exp"}, "feature_name must be taylor_exp, got 'exp'"),
        ("rebased", {"feature_dim": 0}, "feature_dim positive, got 32, 4 and 0"),
        ("lightning", {"layer_idx": 3}, "from 0 to num_layers - 1 = 2, got 3"),
        ("lightning", {"num_heads": 5}, "multiple of num_heads, got 32 and 5"),
        ("mamba2", {"num_heads": 3}, r"expand \* hidden_size = 64, got 3 \* 16"),
        ("mamba2", {"n_groups": 3}, "multiple of n_groups, got 4 and 3"),
        ("mamba2", {"hidden_act": "relu"}, "activation must be silu, swish or None, got 'relu'"),
        ("log-linear mamba2", {"num_levels": 0}, "num_levels must be positive, got 0"),
        ("mlstm", {"gate_soft_cap": 0.0}, "gate_soft_cap must be positive"),
        ("mlstm", {"qk_dim_factor": 0.3}, "qk_dim_factor must be a multiple"),
    ],
)
def test_bad_options(case, options, message):
    with pytest.raises(ValueError, match=message):
        make(case, **options)


def test_more_tokens_than_the_levels_or_the_map_allow():
    with pytest.raises(ValueError, match="at least 7 levels for T = 33"):
        make("log-linear mamba2")(tokens(1, 33))
    with pytest.raises(ValueError, match="at most max_len = 64 tokens, got 65"):
        make("linear cosformer")(tokens(1, 65))
