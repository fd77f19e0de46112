"""Layers with gates, slots and token shifts: FLA's names, plain definitions, modes, padding."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from lsm_cuda.cache import Cache
from lsm_cuda.layers import (
    ABCAttention,
    GatedSlotAttention,
    HGRN2Attention,
    LightNetAttention,
    MetaLA,
    MomAttention,
    ReGLA,
    RWKV5Attention,
    RWKV6Attention,
)

D, H = 16, 2
CONV = {"use_short_conv": True, "conv_bias": True, "conv_size": 3}
HEADS = {"num_heads": H}
MOM = {**HEADS, "head_dim": 4, "num_memories": 3, "conv_size": 3}
RWKV6 = {**HEADS, "proj_low_rank_dim": 3, "gate_low_rank_dim": 5}

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


# Definitions: from the state dict, one token and one head at a time.


def conv(w: dict, name: str, y: torch.Tensor, silu: bool = True) -> torch.Tensor:
    if f"{name}.weight" not in w:
        return y
    taps = w[f"{name}.weight"].squeeze(1)
    padded = F.pad(y, (0, 0, taps.shape[1] - 1, 0))
    y = sum(padded[:, i : i + y.shape[1]] * tap for i, tap in enumerate(taps.unbind(1)))
    y = y + w.get(f"{name}.bias", 0)
    return F.silu(y) if silu else y


def projected(w: dict, x: torch.Tensor, names: str, silu: bool = True) -> list[torch.Tensor]:
    return [conv(w, f"{n}_conv1d", x @ w[f"{n}_proj.weight"].T, silu) for n in names]


def heads(y: torch.Tensor, count: int = H) -> torch.Tensor:
    return y.unflatten(-1, (count, -1))


def rms(y: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return y / (y.square().mean(-1, keepdim=True) + eps).sqrt()


def over_time(f, *args: torch.Tensor) -> torch.Tensor:
    """``f(state, *tokens [B, H, ..])`` returns a new state and an output."""
    state, outputs = None, []
    for t in range(args[0].shape[1]):
        state, o = f(state, *(a[:, t] for a in args))
        outputs.append(o)
    return torch.stack(outputs, 1)


def outer(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return k[..., :, None] * v[..., None, :]


def read(q: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    return (q[..., None] * S).sum(-2)


def hgrn2(layer, w, x):
    q, f, v = projected(w, x, "qfi", silu=False)
    q, a, v = heads(F.silu(q)), heads(f.sigmoid()), heads(v)

    def step(S, q, a, v):
        S = outer(1 - a, v) + (0 if S is None else a[..., None] * S)
        return S, read(q, S) / q.shape[-1] ** 0.5

    o = over_time(step, q, a, v).flatten(-2)
    return rms(o) * w["g_norm.weight"]


def group_norm(w, o):
    o = o - o.mean(-1, keepdim=True)
    return rms(o).flatten(-2) * w["g_norm.weight"] + w["g_norm.bias"]


def rwkv(layer, w, r, k, v, decay, g):
    def step(S, r, k, v, a):
        S = torch.zeros_like(outer(k, v)) if S is None else S
        o = read(r, S + outer(w["bonus"] * k, v))
        return a[..., None] * S + outer(k, v), o

    o = over_time(step, heads(r), heads(k), heads(v), decay)
    return group_norm(w, o) * layer.gate_fn(g)


def rwkv6(layer, w, x):
    delta = F.pad(x, (0, 0, 1, -1)) - x
    low = ((x + delta * w["x_proj.0.mu"]) @ w["x_proj.0.linear.weight"].T).tanh()
    up = w["x_proj.2.weight"]
    rank = low.shape[-1] // 5
    mixed = {}
    for i, name in enumerate("rwkvg"):
        part = slice(i * rank, (i + 1) * rank)
        mixed[name] = x + delta * (low[..., part] @ up[:, part].T + w["x_bias"][i])
    r, k, v, g = (mixed[n] @ w[f"{n}_proj.linear.weight"].T for n in "rkvg")
    lora = "w_proj.linear.lora"
    omega = (mixed["w"] @ w[f"{lora}.0.weight"].T).tanh() @ w[f"{lora}.2.weight"].T
    decay = heads((-(omega + w[f"{lora}.2.bias"]).exp()).exp())
    return rwkv(layer, w, r, k, v, decay, g)


def rwkv5(layer, w, x):
    delta = F.pad(x, (0, 0, 1, -1)) - x
    r, k, v, g = ((x + delta * w[f"{n}_proj.mu"]) @ w[f"{n}_proj.linear.weight"].T for n in "rkvg")
    decay = (-w["decay"].exp()).exp().expand(*x.shape[:2], -1, -1)
    return rwkv(layer, w, r, k, v, decay, g)


def gsa(layer, w, x):
    q, k, v = projected(w, x, "qkv")
    kv = layer.num_kv_heads
    q, k, v = heads(q), heads(k, kv), heads(v, kv)
    if "feature_map.layer.weight" in w:
        q, k = ((y @ w["feature_map.layer.weight"].T).relu() for y in (q, k))
    else:
        q, k = F.silu(q), F.silu(k)
    a = heads((x @ w["f_proj.weight"].T).sigmoid() ** (1 / 8), kv)
    k, v, a = (y.repeat_interleave(H // kv, 2) for y in (k, F.silu(v), a))

    def step(slots, q, k, v, a):
        Ks, Vs = (0, 0) if slots is None else slots
        Ks = a[..., None] * Ks + outer(1 - a, k)
        Vs = a[..., None] * Vs + outer(1 - a, v)
        p = (Ks * q[..., None, :]).sum(-1).softmax(-1)
        return (Ks, Vs), read(p, Vs)

    o = F.silu(over_time(step, q, k, v, a).flatten(-2))
    return rms(o) * w["g_norm.weight"]


def abc(layer, w, x):
    q, k, v = projected(w, x, "qkv")
    if layer.use_input_gate:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    q, k, v = heads(q), heads(k), heads(v)
    K = q.shape[-1]
    if layer.rotary is not None:
        pair = torch.arange(K // 2, dtype=torch.float32)
        angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-2 * pair / K)
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[:, None]
        q, k = (
            torch.cat([z.real, z.imag], -1)
            for z in (torch.complex(*y.chunk(2, -1)) * turn for y in (q, k))
        )
    s = heads((x @ w["s_proj.weight"].T).clamp(-32, 32))

    def step(slots, q, k, v, s):
        Ks, Vs, n = (0, 0, 0) if slots is None else slots
        e = s.exp()
        Ks, Vs, n = Ks + outer(e, k), Vs + outer(e, v), n + e
        p = ((Ks / n[..., None]) * q[..., None, :] / K**0.5).sum(-1).softmax(-1)
        return (Ks, Vs, n), read(p, Vs / n[..., None])

    o = over_time(step, q, k, v, s)
    if layer.use_norm:
        o = rms(o) * w["g_norm.weight"]
    o = o.flatten(-2)
    return o * F.silu(x @ w["g_proj.weight"].T) if layer.use_output_gate else o


def lightnet(layer, w, x):
    q, k, v = projected(w, x, "qkv", silu=False)
    q, k, v = heads(F.silu(q)), heads(k), heads(v)

    def step(state, q, k, v):
        S, n = (0, 0) if state is None else state
        S, n = S + outer(k.exp(), v), n + k.exp()
        return (S, n), read(q, S / n[..., None]) / q.shape[-1] ** 0.5

    o = over_time(step, q, k, v).flatten(-2)
    gate = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T
    return rms(o) * w["g_norm.weight"] * F.silu(gate)


def metala(layer, w, x):
    x = conv(w, "conv1d", x)
    f = x @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    q, v = (heads(y) for y in projected(w, x, "qv"))
    a = heads(f.sigmoid() ** (1 / 16))

    def step(S, q, a, v):
        S = outer(1 - a, v) + (0 if S is None else a[..., None] * S)
        own = (q * w["w_aug"] * (1 - a)).sum(-1, keepdim=True)
        return S, read(q, S) / q.shape[-1] ** 0.5 + (own * v).sigmoid()

    o = rms(over_time(step, q, a, v)) * w["g_norm_swish_gate.weight"]
    return o.flatten(-2) * F.silu(x @ w["g_proj.weight"].T)


def regla(layer, w, x):
    q, k, v = (heads(y) for y in projected(w, x, "qkv"))
    q, k = (q @ w["q_map.weight"].T).exp(), (k @ w["k_map.weight"].T).exp()
    g, r = ((x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"]).sigmoid() for n in "gr")
    a = heads((1 - r) * g**2 + r * (1 - (1 - g) ** 2))

    def step(S, q, k, v, a):
        S = outer(k, v) + (0 if S is None else a[..., None] * S)
        return S, read(q, S)

    return (rms(over_time(step, q, k, v, a), 0) * w["norm.weight"]).flatten(-2)


def mom(layer, w, x):
    """Every memory by itself, over the tokens that chose it."""
    M, total = layer.num_memories, torch.zeros_like(x @ w["q_proj.weight"].T).repeat(1, 1, 2)
    chance = (x @ w["gate.weight"].T).softmax(-1)
    for b in range(x.shape[0]):
        best = chance[b].argsort(-1, descending=True)[:, : layer.topk]
        for m in range(M + layer.shared_mem):
            place = [t for t in range(x.shape[1]) if m == M or m in best[t]]
            y, names = x[b : b + 1, place], {}
            for n in "kvba":
                own = f"shared_{n}" if m == M or layer.single_kv_proj else f"{n}_proj.{m}"
                names[n] = y @ w[f"{own}.weight"].T
            names["q"] = y @ w["q_proj.weight"].T
            if layer.use_short_conv:
                q, k, v = (heads(conv(w, f"{n}_conv1d", names[n])) for n in "qkv")
            else:
                q, k, v = (heads(F.silu(names[n])) for n in "qkv")
            q, k = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
            dt = (1 + (names["a"] + w["dt_bias"]).exp()).log()
            decay = (-w["A_log"].exp() * dt).exp()[..., None]

            def step(S, q, k, v, a, beta):
                S = outer(k, beta * v) + (0 if S is None else a[..., None] * S)
                return S, read(q, S) / q.shape[-1] ** 0.5

            o = over_time(step, q, k, v, decay, names["b"].sigmoid()[..., None])
            if m < M:
                weight = chance[b, place, m] / chance[b, place].gather(1, best[place]).sum(-1)
                o = o * weight[None, :, None, None]
            total = total.index_add(
                1, torch.tensor(place), F.pad(o.flatten(-2), (0, 0, 0, 0, b, x.shape[0] - b - 1))
            )
    o = (rms(heads(total)) * w["o_norm.weight"]).flatten(-2)
    return o * F.silu(x @ w["g_proj.weight"].T) if layer.use_output_gate else o


@every_layer
def test_layer_is_its_definition(name):
    layer, x = make(name), tokens(2, 9).requires_grad_()
    w = dict(layer.named_parameters())
    o, attentions, cache = layer(x)
    assert attentions is None and cache is None
    expected = globals()[name.split()[0]](layer, w, x) @ w["o_proj.weight"].T
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
    expected = hgrn2(layer, {**w, "f_proj.weight": eye.T}, x) @ w["o_proj.weight"].T
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


def shapes(**given: list[int]) -> dict[str, list[int]]:
    return {name.replace("__", "."): shape for name, shape in given.items()}


# FLA's names; for RWKV-5, MetaLA and ReGLA, which FLA lacks, ours.
PARAMETERS = {
    "hgrn2": shapes(
        q_proj__weight=[16, 16],
        f_proj__weight=[16, 16],
        i_proj__weight=[16, 16],
        g_norm__weight=[16],
        o_proj__weight=[16, 16],
    ),
    "hgrn2 conv": shapes(
        q_proj__weight=[16, 16],
        f_proj__weight=[16, 16],
        i_proj__weight=[16, 16],
        q_conv1d__weight=[16, 1, 3],
        q_conv1d__bias=[16],
        f_conv1d__weight=[16, 1, 3],
        f_conv1d__bias=[16],
        i_conv1d__weight=[16, 1, 3],
        i_conv1d__bias=[16],
        g_norm__weight=[16],
        o_proj__weight=[16, 16],
    ),
    "rwkv6": shapes(
        x_proj__0__linear__weight=[15, 16],
        x_proj__0__mu=[16],
        x_proj__2__weight=[16, 15],
        x_bias=[5, 16],
        r_proj__linear__weight=[8, 16],
        w_proj__linear__lora__0__weight=[5, 16],
        w_proj__linear__lora__2__weight=[8, 5],
        w_proj__linear__lora__2__bias=[8],
        k_proj__linear__weight=[8, 16],
        v_proj__linear__weight=[16, 16],
        g_proj__linear__weight=[16, 16],
        bonus=[2, 4],
        g_norm__weight=[16],
        g_norm__bias=[16],
        o_proj__weight=[16, 16],
    ),
    "rwkv5": shapes(
        r_proj__linear__weight=[8, 16],
        r_proj__mu=[16],
        k_proj__linear__weight=[8, 16],
        k_proj__mu=[16],
        v_proj__linear__weight=[16, 16],
        v_proj__mu=[16],
        g_proj__linear__weight=[16, 16],
        g_proj__mu=[16],
        decay=[2, 4],
        bonus=[2, 4],
        g_norm__weight=[16],
        g_norm__bias=[16],
        o_proj__weight=[16, 16],
    ),
    "gsa": shapes(
        q_proj__weight=[16, 16],
        k_proj__weight=[16, 16],
        v_proj__weight=[16, 16],
        f_proj__weight=[10, 16],
        g_norm__weight=[16],
        o_proj__weight=[16, 16],
    ),
    "gsa conv": shapes(
        q_proj__weight=[16, 16],
        k_proj__weight=[8, 16],
        v_proj__weight=[8, 16],
        f_proj__weight=[8, 16],
        q_conv1d__weight=[16, 1, 3],
        q_conv1d__bias=[16],
        k_conv1d__weight=[8, 1, 3],
        k_conv1d__bias=[8],
        v_conv1d__weight=[8, 1, 3],
        v_conv1d__bias=[8],
        feature_map__layer__weight=[8, 8],
        g_norm__weight=[16],
        o_proj__weight=[16, 16],
    ),
    "abc": shapes(
        q_proj__weight=[8, 16],
        k_proj__weight=[8, 16],
        v_proj__weight=[16, 16],
        g_proj__weight=[16, 16],
        s_proj__weight=[10, 16],
        g_norm__weight=[8],
        o_proj__weight=[16, 16],
    ),
    "abc bare": shapes(
        q_proj__weight=[8, 16],
        k_proj__weight=[8, 16],
        v_proj__weight=[16, 16],
        s_proj__weight=[8, 16],
        g_norm__weight=[8],
        o_proj__weight=[16, 16],
    ),
    "lightnet": shapes(
        q_proj__weight=[16, 16],
        k_proj__weight=[16, 16],
        v_proj__weight=[16, 16],
        g_proj__0__weight=[3, 16],
        g_proj__1__weight=[16, 3],
        g_norm__weight=[16],
        o_proj__weight=[16, 16],
    ),
    "metala": shapes(
        conv1d__weight=[16, 1, 4],
        q_proj__weight=[8, 16],
        v_proj__weight=[16, 16],
        gk_proj__0__weight=[3, 16],
        gk_proj__1__weight=[8, 3],
        gk_proj__1__bias=[8],
        w_aug=[2, 4],
        g_proj__weight=[16, 16],
        g_norm_swish_gate__weight=[8],
        o_proj__weight=[16, 16],
    ),
    "regla": shapes(
        q_proj__weight=[16, 16],
        k_proj__weight=[16, 16],
        v_proj__weight=[16, 16],
        g_proj__weight=[16, 16],
        g_proj__bias=[16],
        r_proj__weight=[16, 16],
        r_proj__bias=[16],
        q_map__weight=[8, 8],
        k_map__weight=[8, 8],
        norm__weight=[8],
        o_proj__weight=[16, 16],
    ),
}
PARAMETERS["mom shared"] = shapes(
    q_proj__weight=[8, 16],
    gate__weight=[3, 16],
    A_log=[2],
    dt_bias=[2],
    q_conv1d__weight=[8, 1, 3],
    k_conv1d__weight=[8, 1, 3],
    v_conv1d__weight=[16, 1, 3],
    o_norm__weight=[8],
    o_proj__weight=[16, 16],
    shared_k__weight=[8, 16],
    shared_v__weight=[16, 16],
    shared_b__weight=[2, 16],
    shared_a__weight=[2, 16],
    **{f"k_proj__{m}__weight": [8, 16] for m in range(3)},
    **{f"v_proj__{m}__weight": [16, 16] for m in range(3)},
    **{f"b_proj__{m}__weight": [2, 16] for m in range(3)},
    **{f"a_proj__{m}__weight": [2, 16] for m in range(3)},
)


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
    if "head_dim" in options:  # widths of their own
        options = {**options, "expand_v": 0.3}
    with pytest.raises(ValueError, match=f"{cls.__name__}: hidden_size.* must be a multiple of"):
        cls(hidden_size=17, **options)
    with pytest.raises(TypeError, match="use_sort_conv"):
        cls(use_sort_conv=True)


@pytest.mark.parametrize("name", ["hgrn2", "rwkv6", "rwkv5", "gsa", "lightnet", "mom"])
def test_unknown_mode(name):
    with pytest.raises(ValueError, match=r"mode must be one of chunk.*got 'parallel'"):
        make(name, mode="parallel")


def test_errors_of_single_layers():
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads, got 2 and"):
        make("gsa", num_kv_heads=3)
    with pytest.raises(ValueError, match="feature_map must be swish, relu or t2r, got 'elu'"):
        make("gsa", feature_map="elu")
    with pytest.raises(ValueError, match="topk must be in 1 to num_memories = 3, got 4"):
        make("mom", topk=4)
    with pytest.raises(ValueError, match="give num_heads or expand_ratio, got neither"):
        HGRN2Attention(hidden_size=16, expand_ratio=None)
