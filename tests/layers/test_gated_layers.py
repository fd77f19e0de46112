"""Layers with gates, slots and token shifts: FLA's names, plain definitions, modes, padding."""

from __future__ import annotations

import inspect

import gated_definitions as definitions
import pytest
import torch
import torch.nn.functional as F
from gated_layers import LAYERS, RANKS, D, make, tokens
from parameter_shapes import GATED

from lsm_cuda import layers
from lsm_cuda.layers import GatedDeltaNet, HGRN2Attention, KimiDeltaAttention, MesaNet


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
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


@pytest.mark.parametrize("name", GATED)
def test_parameter_names_and_shapes(name):
    assert {n: list(p.shape) for n, p in make(name).state_dict().items()} == GATED[name]


@pytest.mark.parametrize("name", LAYERS)
def test_widths_and_unknown_options(name):
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
