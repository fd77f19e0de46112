"""Layers around element-wise recurrences: definitions, steps, padding, other people's code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recurrent_layers import D, assert_same_layer, close, make, tokens

from lsm_cuda.cache import Cache
from lsm_cuda.layers import (
    AFT,
    HGRNAttention,
    RGLRUBlock,
)


def over_time(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = a.expand(x.shape)[:, t] * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1)


def test_lru_is_its_definition():
    layer, x = make("lru"), tokens(2, 9)
    w = layer.state_dict()
    lam = torch.exp(-w["nu_log"].exp() + 1j * w["theta_log"].exp())
    assert (lam.abs() < 1).all()
    B, C = w["B_re"] + 1j * w["B_im"], w["C_re"] + 1j * w["C_im"]
    h = over_time(lam, w["gamma_log"].exp() * (x.to(B.dtype) @ B.T))
    close(layer(x)[0], (h @ C.T).real + w["D"] * x)
    expected = (1 - lam.abs().square()).sqrt()
    torch.testing.assert_close(w["gamma_log"].exp(), expected, atol=1e-6, rtol=0)  # made in fp32


def test_s5_is_its_definition():
    layer, x = make("s5"), tokens(2, 9)
    w = layer.state_dict()
    lam, dt = w["Lambda_re"] + 1j * w["Lambda_im"], w["log_step"][:, 0].exp()
    A = (lam * dt).exp()
    B = torch.view_as_complex(w["B"]) * ((A - 1) / lam)[:, None]
    h = over_time(A, x.to(B.dtype) @ B.T)
    y = F.gelu(2 * (h @ torch.view_as_complex(w["C"]).T).real + w["D"] * x)
    close(layer(x)[0], y * torch.sigmoid(y @ w["out2.weight"].T + w["out2.bias"]))


@torch.no_grad()
def test_a_call_without_tokens_begins_no_sequence():
    """RG-LRU's first token follows another rule, which a first call of none leaves for the next."""
    layer, x, cache = make("rg-lru"), tokens(2, 5), Cache()
    layer(x[:, :0], past_key_values=cache, use_cache=True)
    pieces = [layer(p, past_key_values=cache, use_cache=True)[0] for p in x.split([1, 3, 1], 1)]
    close(torch.cat(pieces, 1), layer(x)[0])


def test_hgrn_is_its_definition():
    layer, x = make("hgrn"), tokens(2, 9)
    w = layer.state_dict()
    i, f, g = (x @ w[f"{n}_proj.weight"].T for n in "ifg")
    low = torch.rand(2 * D, dtype=torch.float64)
    for bound in (None, low):
        a = f.sigmoid() if bound is None else bound + (1 - bound) * f.sigmoid()
        h = over_time(a, (1 - a) * F.silu(i))
        h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["g_norm.weight"] * F.silu(g)
        layer.layer_idx = 1
        close(layer(x, lower_bound=bound)[0], h @ w["o_proj.weight"].T)
    assert set(w) == {f"{n}_proj.weight" for n in "ifgo"} | {"g_norm.weight"}


def test_gateloop_is_its_definition():
    layer, x = make("gateloop"), tokens(2, 9)
    w = layer.state_dict()
    m, theta = (x @ w["a_proj.weight"].T + w["a_proj.bias"]).chunk(2, -1)
    q, k, v, g = (x @ w[f"{n}_proj.weight"].T for n in "qkvg")
    h = over_time(m.sigmoid() * torch.exp(1j * theta), (k * v).to(torch.complex128))
    close(layer(x)[0], ((q * h).real * F.silu(g)) @ w["o_proj.weight"].T)


def test_rg_lru_block_is_that_of_transformers():
    module = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = module.RecurrentGemmaConfig(
        hidden_size=D, lru_width=12, num_attention_heads=3, conv1d_width=4, num_hidden_layers=1,
        block_types=["recurrent"], attention_window_size=8, head_dim=4, num_key_value_heads=1,
    )  # fmt: skip
    theirs, ours = module.RecurrentGemmaRecurrentBlock(config, 0).double(), make("rg-lru")
    theirs.load_state_dict(ours.state_dict())
    x = tokens(2, 11)
    places = torch.arange(11).expand(2, 11)
    # they sum in fp32
    assert_same_layer(ours, theirs, x, lambda: theirs(x, places, None, use_cache=False)[0])


def test_rwkv4_is_the_attention_of_transformers():
    module = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    config = module.RwkvConfig(hidden_size=D, attention_hidden_size=12, num_hidden_layers=1)
    theirs, ours = module.RwkvSelfAttention(config), make("rwkv4").float()
    theirs.load_state_dict(ours.state_dict())
    x = tokens(2, 11).float()
    assert_same_layer(ours, theirs, x, lambda: theirs(x)[0])


def test_aft_is_its_definition():
    layer, x = make("aft"), tokens(2, 9)
    w = layer.state_dict()
    q, k, v = (x @ w[f"{n}_proj.weight"].T for n in "qkv")
    rows = [(k[:, : t + 1].softmax(1) * v[:, : t + 1]).sum(1) for t in range(9)]
    close(layer(x)[0], (q.sigmoid() * torch.stack(rows, 1)) @ w["o_proj.weight"].T)


@pytest.mark.parametrize("name", ["aft full", "aft full rank"])
def test_aft_full_is_its_definition(name):
    layer, x = make(name), tokens(2, 9)
    w = layer.state_dict()
    own = {"wbias"} if name == "aft full" else {"u", "v"}
    assert set(w) == {f"{n}_proj.weight" for n in "qkvo"} | own
    q, k, v = (x @ w[f"{n}_proj.weight"].T for n in "qkv")
    pairs = w["wbias"] if "wbias" in w else w["u"] @ w["v"].T
    assert pairs.shape == (40, 40)
    rows = [
        ((k[:, : t + 1] + pairs[t, : t + 1, None]).softmax(1) * v[:, : t + 1]).sum(1)
        for t in range(9)
    ]
    close(layer(x)[0], (q.sigmoid() * torch.stack(rows, 1)) @ w["o_proj.weight"].T)


@torch.no_grad()
def test_aft_full_ends_with_its_positions():
    layer, cache = make("aft full", max_seqlen=9), Cache()
    layer(tokens(2, 8), past_key_values=cache, use_cache=True)
    layer(tokens(2, 1), past_key_values=cache, use_cache=True)
    message = r"AFT: a sequence of 10 tokens is longer than max_seqlen = 9"
    for x, past in ((tokens(2, 10), None), (tokens(2, 1), cache), (tokens(2, 1), cache.clone())):
        with pytest.raises(ValueError, match=message):
            layer(x, past_key_values=past, use_cache=True)
    with pytest.raises(ValueError, match="rank is of the weights of positions"):
        AFT(D, rank=2)


def test_errors():
    with pytest.raises(ValueError, match="multiple of num_heads, got 8 and 3"):
        RGLRUBlock(D, num_heads=3)
    with pytest.raises(ValueError, match="HGRNAttention: mode must be one of"):
        HGRNAttention("fused_chunk", D)
