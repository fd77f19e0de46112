"""Layers around decay-free, constant and scalar-decay operators: definitions, names, other people's
code."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from linear_definitions import DEFINITIONS, TOLERANCE
from linear_layers import D, make, tokens
from parameter_shapes import LINEAR
from torch import nn

from lsm_cuda import layers
from lsm_cuda.cache import Cache


def close(a, b, tolerance: float = 1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


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


@pytest.mark.parametrize("case", LINEAR)
def test_state_dict_has_the_names_and_shapes_of_checkpoints(case):
    assert {name: list(t.shape) for name, t in make(case).state_dict().items()} == LINEAR[case]


def test_tied_feature_maps_are_one_module():
    layer = make("linear hedgehog", tie_feature_map_qk=True)
    assert layer.feature_map_q is layer.feature_map_k
    assert sorted(layer.state_dict()) == sorted(LINEAR["linear hedgehog"])


@pytest.mark.parametrize("case", DEFINITIONS)
def test_layer_is_its_definition(case):
    more = {"layer_idx": 1} if case == "lightning" else {}
    layer, x = make(case, **more), tokens(2, 11).requires_grad_()
    w = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    o, _, _ = layer(x)
    expected = DEFINITIONS[case](layer, w, x)
    tolerance = TOLERANCE.get(case, 1e-8)
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
        hidden_size=D, num_heads=4, head_dim=16, state_size=6, n_groups=groups,
        num_hidden_layers=1, chunk_size=8, time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    theirs = modeling.Mamba2Mixer(config, 0).eval()
    ours = layers.Mamba2(hidden_size=D, head_dim=16, state_size=6, n_groups=groups, layer_idx=0)
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
        hidden_size=D, num_attention_heads=4, num_hidden_layers=3, head_dim=8, block_size=16
    )
    theirs = modeling.MiniMaxLightningAttention(config, layer_idx)
    ours = layers.LightningAttention(D, 4, num_layers=3, layer_idx=layer_idx)
    load(ours, theirs)
    x = tokens(2, 45).float()
    torch.testing.assert_close(ours(x)[0], theirs(x, (None, None), None)[0], atol=1e-5, rtol=1e-4)


def transformers_own_xlstm(monkeypatch):
    """The module as it is where the package xlstm, whose layers it prefers, is not installed."""
    name = "transformers.models.xlstm.modeling_xlstm"
    monkeypatch.setattr("transformers.utils.is_xlstm_available", lambda: False)
    monkeypatch.delitem(sys.modules, name, raising=False)
    modeling = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return modeling


def test_mlstm_is_the_layer_of_transformers(monkeypatch):
    pytest.importorskip("transformers")
    modeling = transformers_own_xlstm(monkeypatch)
    config = modeling.xLSTMConfig(
        hidden_size=D,
        num_heads=4,
        num_hidden_layers=1,
        chunk_size=16,
        autocast_kernel_dtype="float32",
    )
    theirs = modeling.xLSTMLayer(config)
    ours = layers.MLSTM(D, 4, layer_idx=0)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items()
    }
    load(ours, theirs)
    x = tokens(2, 32).float()
    torch.testing.assert_close(ours(x)[0], theirs(x, None)[0], atol=1e-4, rtol=1e-3)


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
