"""Layers of sparse softmax attention: definitions, checkpoints, caches, padding, packing."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from lsm_cuda.cache import Cache
from lsm_cuda.layers import Attention, MoBA, NativeSparseAttention
from lsm_cuda.models import DecoderLM, ModelConfig
from lsm_cuda.sparse import Quest, StreamingLLM

D = 32
LAYERS = {
    "window": (Attention, {"num_heads": 4, "num_kv_heads": 2, "window_size": 5, "qk_norm": True}),
    "sink logits": (Attention, {"num_heads": 4, "sinks": True, "head_dim": 6, "softcap": 3.0}),
    "sink tokens": (Attention, {"num_heads": 4, "window_size": 5, "sink_tokens": 2}),
    "nsa": (
        NativeSparseAttention,
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, "block_counts": 3}
        | {"window_size": 6, "cmp_length": 8, "cmp_stride": 4},
    ),
    "nsa mlp": (
        NativeSparseAttention,
        {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "block_size": 16, "block_counts": 3}
        | {"window_size": 6, "cmp_length": 8, "cmp_stride": 4, "cmp_mlp": True},
    ),
    "moba": (MoBA, {"num_heads": 4, "moba_chunk_size": 16, "moba_topk": 2, "full_decode": False}),
    "moba gate": (MoBA, {"num_heads": 2, "moba_topk": 2, "use_output_gate": True}),
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    cls, options = LAYERS[name]
    layer = cls(hidden_size=D, layer_idx=0, **options).double()
    for parameter, p in layer.named_parameters():
        if "norm" in parameter or parameter == "sinks":
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return layer


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)  # the rotary table is fp32


@pytest.mark.parametrize("name", ["nsa", "nsa mlp"])
@torch.no_grad()
def test_steps_compress_what_is_new(name, monkeypatch):
    layer, x, cache = make(name), tokens(1, 60), Cache()
    compressed, compress = [], layer._compress

    def count(k, v):
        new = compress(k, v)
        compressed.append((k.shape[1], new[0].shape[1]))
        return new

    monkeypatch.setattr(layer, "_compress", count)
    layer(x[:, :41], past_key_values=cache, use_cache=True)
    copy = cache.clone()
    for t in range(41, 60):
        layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)
    # Windows of 8 tokens, 4 apart; one more is whole at every fourth token.
    assert compressed == [(41, 9), *[(8, 1)] * 5]
    assert copy[0].windows.length == 9 and cache[0].windows.length == 14


@pytest.mark.parametrize("name", ["nsa", "nsa mlp"])
@torch.no_grad()
def test_padded_steps_compress_what_is_new(name, monkeypatch):
    """Padding on the left of one row, at the end of another, and nowhere."""
    layer, x, cache = make(name), tokens(3, 60), Cache()
    mask = torch.ones(3, 60)
    mask[0, :7], mask[1, 50:] = 0, 0
    new, compress = [], layer._compress

    def count(k, v):
        made = compress(k, v)
        new.append(made[0].shape[1])
        return made

    monkeypatch.setattr(layer, "_compress", count)
    cuts = [0, 41, 42, 45, *range(46, 61)]
    pieces = [
        layer(x[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)[0]
        for a, b in pairwise(cuts)
    ]
    o = torch.cat(pieces, 1)
    assert sum(new) == (53 - 8) // 4 + 1 + (50 - 8) // 4 + 1 + (60 - 8) // 4 + 1
    assert max(new[3:]) == 1  # behind the prompt
    for row, own in enumerate((slice(7, 60), slice(50), slice(60))):
        close(o[row, own], layer(x[row : row + 1, own])[0][0])
    assert not o[1, 50:].any()


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_continuing_and_stepping_are_the_whole(name):
    layer, x, cache = make(name), tokens(2, 53), Cache()
    whole, _, _ = layer(x)
    pieces = [layer(x[:, :30], past_key_values=cache, use_cache=True)[0]]
    pieces.append(layer(x[:, 30:50], past_key_values=cache, use_cache=True)[0])
    for t in range(50, 53):
        pieces.append(layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)[0])
    close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_left_padding_is_as_if_not_there(name):
    layer, x, cache = make(name), tokens(2, 40), Cache()
    mask = torch.ones(2, 40)
    mask[0, :7] = 0
    o, _, _ = layer(x[:, :39], attention_mask=mask[:, :39], past_key_values=cache, use_cache=True)
    last, _, _ = layer(x[:, 39:], attention_mask=mask, past_key_values=cache, use_cache=True)
    both = torch.cat([o, last], 1)
    close(both[0, 7:], layer(x[:1, 7:])[0][0])
    close(both[1], layer(x[1:])[0][0])
    assert both.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_cu_seqlens_are_separate_sequences(name):
    layer, x, bounds = make(name), tokens(1, 41), [0, 4, 4, 41]
    o, _, _ = layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in pairwise(bounds):
        close(o[:, start:end], layer(x[:, start:end])[0])


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_has_a_gradient(name):
    layer = make(name)
    layer(tokens(2, 40))[0].square().mean().backward()
    for parameter, p in layer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), parameter


@pytest.mark.parametrize("name", ["window", "sink logits", "sink tokens"])
@torch.no_grad()
def test_attention_is_its_definition(name):
    layer, x, T = make(name), tokens(2, 23), 23
    q, k, v = (
        p(x).view(2, T, -1, layer.head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if layer.qk_norm:
        q, k = layer.q_norm(q), layer.k_norm(k)
    q, k = layer.rotary(q), layer.rotary(k)
    k, v = (y.repeat_interleave(layer.num_heads // layer.num_kv_heads, 2) for y in (k, v))
    score = torch.einsum("bthd,bshd->bhts", q, k) / layer.head_dim**0.5
    if layer.softcap:
        score = layer.softcap * (score / layer.softcap).tanh()
    t, j = torch.arange(T)[:, None], torch.arange(T)
    seen = j <= t
    if layer.window_size is not None:
        seen &= (j > t - layer.window_size) | (j < layer.sink_tokens)
    score = score.masked_fill(~seen, -torch.inf)
    if layer.sinks is not None:
        extra = layer.sinks.view(1, -1, 1, 1).expand(2, -1, T, 1)
        score = torch.cat([score, extra], -1)
    p = score.softmax(-1)[..., :T]
    o = torch.einsum("bhts,bshd->bthd", p, v).flatten(-2)
    close(layer(x)[0], layer.o_proj(o))


def test_parameter_shapes():
    """FLA's names and shapes."""
    shapes = {name: list(p.shape) for name, p in make("window").named_parameters()}
    assert shapes == {
        "q_proj.weight": [32, 32], "k_proj.weight": [16, 32], "v_proj.weight": [16, 32],
        "o_proj.weight": [32, 32], "q_norm.weight": [8], "k_norm.weight": [8],
    }  # fmt: skip
    shapes = {name: list(p.shape) for name, p in make("nsa").named_parameters()}
    assert shapes == {
        "q_proj.weight": [32, 32], "k_proj.weight": [16, 32], "v_proj.weight": [16, 32],
        "o_proj.weight": [32, 32], "g_proj.weight": [12, 32],
    }  # fmt: skip
    shapes = {name: list(p.shape) for name, p in make("moba gate").named_parameters()}
    assert shapes == {
        "q_proj.weight": [32, 32], "k_proj.weight": [32, 32], "v_proj.weight": [32, 32],
        "o_proj.weight": [32, 32], "o_norm.weight": [16],
        "g_proj.0.weight": [16, 32], "g_proj.1.weight": [32, 16],
    }  # fmt: skip


@torch.no_grad()
def test_learned_compression_sees_whole_windows():
    layer, x = make("nsa mlp"), torch.randn(2, 30, 1, 8, dtype=torch.float64)
    mlp = layer.k_compress
    torch.nn.init.normal_(mlp.position)
    got = mlp(x, 4)
    assert got.shape == (2, 6, 1, 8)  # the last begins at 20
    for n in range(6):
        window = (x[:, 4 * n : 4 * n + 8, 0] + mlp.position).flatten(1)
        want = mlp.down(torch.nn.functional.silu(mlp.up(window)))
        torch.testing.assert_close(got[:, n, 0], want)
    assert mlp(x[:, :7], 4).shape == (2, 0, 1, 8)


def same_gradients(ours, theirs, a, b):
    """Outputs, and gradients of the tokens' and of every parameter that both have, by name."""
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(b)
    names = [n for n, p in ours.named_parameters() if n in dict(theirs.named_parameters())]
    assert len(names) == len([*ours.parameters()])
    grads = [
        torch.autograd.grad((o * weight).sum(), [layer.get_parameter(n) for n in names])
        for layer, o in ((ours, a), (theirs, b))
    ]
    for name, x, y in zip(names, *grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_window_is_that_of_gemma3():
    config = pytest.importorskip("transformers").Gemma3TextConfig(
        hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=1, sliding_window=5, layer_types=["sliding_attention"],
        query_pre_attn_scalar=8, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

    theirs, ours = Gemma3Attention(config, 0).eval(), make("window").float()
    for norm in ("q_norm", "k_norm"):
        torch.nn.init.uniform_(getattr(theirs, norm).weight)  # added to one there
    weights = {n: w + float("norm" in n) for n, w in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    x, T = tokens(2, 23).float(), 23
    t, j = torch.arange(T)[:, None], torch.arange(T)
    mask = torch.where((j <= t) & (j > t - 5), 0.0, -torch.inf)[None, None]
    angle = ours.rotary._frequencies(x.device) * torch.arange(T)[:, None]
    angle = torch.cat([angle, angle], -1)[None]
    want, _ = theirs(x, (angle.cos(), angle.sin()), mask)
    same_gradients(ours, theirs, ours(x)[0], want)


def test_sink_logits_are_those_of_gpt_oss():
    pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    layer, x = make("sink logits"), tokens(2, 9)
    layer.softcap = 0.0
    q, k, v = (x.transpose(1, 2) for x in layer._project(x, 0))
    mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    module = SimpleNamespace(sinks=layer.sinks, num_key_value_groups=1, training=False)
    want, _ = eager_attention_forward(module, q, k, v, mask, 6**-0.5)
    want = layer.o_proj(want.flatten(-2))
    same_gradients(layer, layer, layer(x)[0], want)


@torch.no_grad()
def test_a_decoder_generates_under_a_policy():
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=D, num_layers=2, num_heads=4, intermediate_size=48, mixer="attention",
        initializer_range=0.3,
    )  # fmt: skip
    model, x = DecoderLM(config).double(), torch.randint(256, (2, 20))
    free = model.generate(x, 8, temperature=0)
    for policy, same in ((lambda: Quest(64), True), (lambda: StreamingLLM(4, 1), False)):
        for layer in model.layers:
            layer.attn.kv_policy = policy
        assert torch.equal(model.generate(x, 8, temperature=0), free) is same
    cache = Cache()
    model(x, past_key_values=cache, use_cache=True)
    assert len(cache[0].kv_cache) == 5 and cache.get_seq_length() == 20
    with pytest.raises(ValueError, match="a prompt comes in one piece"):
        model(x, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot be moved or copied"):
        cache.clone()
    with pytest.raises(ValueError, match="needs use_cache, and sequences without padding"):
        model(x, torch.zeros(2, 20), Cache(), use_cache=True)
    with pytest.raises(ValueError, match="is for attention over everything"):
        Attention(D, 4, window_size=3, kv_policy=policy)


def test_errors():
    with pytest.raises(ValueError, match="window_size must be positive, got 0"):
        Attention(D, 4, window_size=0)
    layer = Attention(D, 4, window_size=3, layer_idx=0)
    layer.kv_policy = StreamingLLM
    with pytest.raises(ValueError, match="kv_policy is for attention over everything"):
        layer(torch.randn(1, 4, D), past_key_values=Cache(), use_cache=True)
    with pytest.raises(ValueError, match=r"NativeSparseAttention: .* got 32, 4 and 3"):
        NativeSparseAttention(D, 4, 3)
    with pytest.raises(ValueError, match="MoBA: pass cu_seqlens without attention_mask and cache"):
        make("moba")(tokens(1, 4), torch.ones(1, 4), cu_seqlens=torch.tensor([0, 4]))
