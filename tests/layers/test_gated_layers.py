"""Layers with gates, slots and token shifts: FLA's names, plain definitions, modes, padding."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

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

D, H = 16, 2
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


def unit(y: torch.Tensor) -> torch.Tensor:
    return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_rule(q, k, v, decay, beta, *, steps=1, erase=None, scale=None):
    """Key heads as many as value heads; decay of heads or key channels, or none; with a key of its
    own to erase, before the decay; ``steps`` rows of k, v and beta in a token's heads."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    decay = torch.ones_like(q[..., 0]) if decay is None else decay

    def step(S, q, k, v, a, beta, p):
        rows = [y.chunk(steps, 1) for y in (k, v, beta)]
        before = torch.zeros_like(outer(rows[0][0], rows[1][0])) if S is None else S
        S = before * a.view(*a.shape, *[1] * (4 - a.dim()))
        for k, v, beta in zip(*rows, strict=True):
            old = read(k, S) if erase is None else read(p, before)
            S = S + outer(k, beta[..., None] * (v - old))
        return S, scale * read(q, S)

    return over_time(step, q, k, v, decay, beta, q if erase is None else erase)


def mamba(w: dict, a: torch.Tensor) -> torch.Tensor:
    return (-w["A_log"].exp() * (1 + (a + w["dt_bias"]).exp()).log()).exp()


def delta_output(w: dict, x: torch.Tensor, o: torch.Tensor, gate=F.silu) -> torch.Tensor:
    o = (rms(o) * w["o_norm.weight"]).flatten(-2)
    return o * gate(x @ w["g_proj.weight"].T) if "g_proj.weight" in w else o


def delta_qkv(layer, w: dict, x: torch.Tensor) -> list[torch.Tensor]:
    """In heads, each key head as often as it has value heads."""
    q, k, v = projected(w, x, "qkv")
    if not layer.use_short_conv:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    q, k, v = (heads(y, n) for y, n in zip((q, k, v), head_counts(layer), strict=True))
    return [y.repeat_interleave(layer.num_v_heads // H, 2) for y in (q, k)] + [v]


def head_counts(layer) -> tuple[int, int, int]:
    n = getattr(layer, "steps", 1)
    return H, n * H, n * layer.num_v_heads


def delta_net(layer, w, x):
    silu = layer.qk_activation == "silu"
    (q, k), (v,) = projected(w, x, "qk", silu), projected(w, x, "v")
    if not layer.use_short_conv:
        v = F.silu(v)
        q, k = (F.silu(q), F.silu(k)) if silu else (q, k)
    q, k, v = heads(q), heads(k), heads(v)
    if layer.qk_activation == "elu":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    elif layer.qk_activation == "dpfp":
        q, k = (torch.cat([y, -y], -1).relu() for y in (q, k))
        q, k = (torch.cat([y * y.roll(j, -1) for j in (1, 2)], -1) for y in (q, k))
    if layer.qk_norm == "sum":
        q, k = (y / y.sum(-1, keepdim=True).clamp(min=1e-6) for y in (q, k))
    else:
        q, k = unit(q), unit(k)
    beta = torch.ones_like(q[..., 0])
    if layer.use_beta:
        beta = (x @ w["b_proj.weight"].T).sigmoid() * (2 if layer.allow_neg_eigval else 1)
    return delta_output(w, x, delta_rule(q, k, v, None, beta))


def gated_deltanet(layer, w, x):
    q, k, v = delta_qkv(layer, w, x)
    beta = (x @ w["b_proj.weight"].T).sigmoid() * (2 if layer.allow_neg_eigval else 1)
    o = delta_rule(unit(q), unit(k), v, mamba(w, x @ w["a_proj.weight"].T), beta)
    return delta_output(w, x, o)


def gated_deltaproduct(layer, w, x):
    q, k, v = delta_qkv(layer, w, x)
    beta = 2 * (x @ w["b_proj.weight"].T).sigmoid()
    decay = mamba(w, x @ w["a_proj.weight"].T) if layer.use_forget_gate else None
    o = delta_rule(unit(q), unit(k), v, decay, beta, steps=layer.steps)
    return delta_output(w, x, o)


def comba(layer, w, x):
    q, k, v = delta_qkv(layer, w, x)
    group = layer.num_v_heads // H
    p = k * w["decay"].repeat_interleave(group).sigmoid()[:, None] if "decay" in w else k
    q = q - w["D"].repeat_interleave(group)[:, None] * p if "D" in w else q
    decay = mamba(w, x @ w["a_proj.weight"].T)
    beta = (x @ w["b_proj.weight"].T).sigmoid()
    o = delta_rule(unit(q), unit(k), v, decay, beta, erase=unit(p))
    return delta_output(w, x, o, torch.sigmoid)


def kda(layer, w, x):
    q, k, v = delta_qkv(layer, w, x)
    f = x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]
    rate, f = w["A_log"].exp()[:, None], heads(f, layer.num_v_heads)
    if layer.lower_bound is None:
        decay = (1 + f.exp()) ** -rate
    else:
        decay = (layer.lower_bound * (rate * f).sigmoid()).exp()
    o = delta_rule(unit(q), unit(k), v, decay, (x @ w["b_proj.weight"].T).sigmoid())
    g = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
    return (rms(o) * w["o_norm.weight"]).flatten(-2) * g.sigmoid()


def rwkv7(layer, w, x, first=None):
    delta = F.pad(x, (0, 0, 1, -1)) - x
    mixed = {name: x + delta * w[f"x_{name}"] for name in "rwkvag"}

    def lora(name, f=lambda y: y):
        y = f(mixed[name] @ w[f"{name}_lora.lora.0.weight"].T)
        return y @ w[f"{name}_lora.lora.2.weight"].T + w.get(f"{name}_lora.lora.2.bias", 0)

    r, k, v = (mixed[name] @ w[f"{name}_proj.weight"].T for name in "rkv")
    if first is not None:
        v = v + lora("v").sigmoid() * (first - v)
    decay = (-math.exp(-0.5) * lora("w", torch.tanh).sigmoid()).exp()
    a = lora("a").sigmoid()
    kk = heads(k * w["k_k"])
    kk = unit(kk) if layer.fuse_norm else kk / kk.norm(dim=-1, keepdim=True)
    k = k * (1 + (a - 1) * w["k_a"])
    r, k, v, a, decay = (heads(y) for y in (r, k, v, a, decay))

    def step(S, r, k, v, a, kk, decay):
        S = torch.zeros_like(outer(k, v)) if S is None else S
        S = decay[..., None] * S - outer(kk * a, read(kk, S)) + outer(k, v)
        return S, read(r, S)

    o = over_time(step, r, k, v, a, kk, decay)
    o = o - o.mean(-1, keepdim=True)
    o = rms(o, layer.head_dim * 1e-5).flatten(-2) * w["g_norm.weight"] + w["g_norm.bias"]
    o = o + ((r * k * w["r_k"]).sum(-1, keepdim=True) * v).flatten(-2)
    return o * lora("g", torch.sigmoid)


def longhorn(layer, w, x):
    x, z = (x @ w["in_proj.weight"].T).chunk(2, -1)
    x = conv(w, "conv1d", x)
    rank = w["dt_head.weight"].shape[1]
    dt, k, q = (x @ w["x_proj.weight"].T).split([rank, 3, 3], -1)
    beta = (dt @ w["dt_head.weight"].T + w["dt_head.bias"]).sigmoid()

    def step(S, q, k, v, beta):
        rate = beta / (1 + beta * k.square().sum(-1, keepdim=True))
        S = torch.zeros_like(outer(k, v)) if S is None else S
        held = k[..., None] * S if layer.diagonal else read(k, S)[..., None, :]
        S = S + outer(k, rate * v) - k[..., None] * rate[..., None, :] * held
        return S, read(q, S)

    return (over_time(step, q, k, x, beta) + w["D"] * x) * F.silu(z)


def mesa_net(layer, w, x):
    q, k, v = (heads(y) for y in projected(w, x, "qkv"))
    decay = (x @ w["a_proj.weight"].T + w["a_proj.bias"]).sigmoid()
    beta = (x @ w["b_proj.weight"].T + w["b_proj.bias"]).sigmoid()
    lamb = (1 + w["lambda_params"].exp()).log() + 0.25

    def step(state, q, k, v, a, beta):
        P, G = (0, 0) if state is None else state
        P = a[..., None, None] * P + outer(beta[..., None] * k, k)
        G = a[..., None, None] * G + outer(beta[..., None] * k, v)
        solution = torch.linalg.solve(P + torch.diag_embed(heads(lamb)), q)
        return (P, G), read(solution, G)

    return delta_output(w, x, over_time(step, unit(q), unit(k), v, decay, beta))


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
            q, k = unit(q), unit(k)
            o = delta_rule(q, k, v, mamba(w, names["a"]), names["b"].sigmoid())
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
    last = w["out_proj.weight"] if "out_proj.weight" in w else w["o_proj.weight"]
    expected = globals()[name.split()[0]](layer, w, x) @ last.T
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


# FLA's names; for RWKV-5, MetaLA and ReGLA, which FLA lacks, ours; for Longhorn its authors'.
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
    "delta_net": shapes(
        q_proj__weight=[16, 16],
        k_proj__weight=[16, 16],
        v_proj__weight=[16, 16],
        b_proj__weight=[2, 16],
        q_conv1d__weight=[16, 1, 3],
        k_conv1d__weight=[16, 1, 3],
        v_conv1d__weight=[16, 1, 3],
        o_norm__weight=[8],
        o_proj__weight=[16, 16],
    ),
    "gated_deltanet": shapes(
        A_log=[4],
        dt_bias=[4],
        q_proj__weight=[8, 16],
        k_proj__weight=[8, 16],
        v_proj__weight=[32, 16],
        q_conv1d__weight=[8, 1, 3],
        k_conv1d__weight=[8, 1, 3],
        v_conv1d__weight=[32, 1, 3],
        b_proj__weight=[4, 16],
        a_proj__weight=[4, 16],
        g_proj__weight=[32, 16],
        o_norm__weight=[8],
        o_proj__weight=[16, 32],
    ),
    "gated_deltaproduct": shapes(
        A_log=[4],
        dt_bias=[4],
        q_proj__weight=[8, 16],
        k_proj__weight=[16, 16],
        v_proj__weight=[64, 16],
        q_conv1d__weight=[8, 1, 3],
        k_conv1d__weight=[16, 1, 3],
        v_conv1d__weight=[64, 1, 3],
        b_proj__weight=[8, 16],
        a_proj__weight=[4, 16],
        g_proj__weight=[32, 16],
        o_norm__weight=[8],
        o_proj__weight=[16, 32],
    ),
    "comba": shapes(
        decay=[2],
        D=[2],
        A_log=[4],
        dt_bias=[4],
        q_proj__weight=[8, 16],
        k_proj__weight=[8, 16],
        v_proj__weight=[32, 16],
        q_conv1d__weight=[8, 1, 3],
        k_conv1d__weight=[8, 1, 3],
        v_conv1d__weight=[32, 1, 3],
        b_proj__weight=[4, 16],
        a_proj__weight=[4, 16],
        g_proj__weight=[32, 16],
        o_norm__weight=[8],
        o_proj__weight=[16, 32],
    ),
    "kda": shapes(
        A_log=[4],
        dt_bias=[16],
        q_proj__weight=[8, 16],
        k_proj__weight=[8, 16],
        v_proj__weight=[32, 16],
        q_conv1d__weight=[8, 1, 3],
        k_conv1d__weight=[8, 1, 3],
        v_conv1d__weight=[32, 1, 3],
        f_proj__0__weight=[8, 16],
        f_proj__1__weight=[16, 8],
        b_proj__weight=[4, 16],
        g_proj__0__weight=[8, 16],
        g_proj__1__weight=[32, 8],
        g_proj__1__bias=[32],
        o_norm__weight=[8],
        o_proj__weight=[16, 32],
    ),
    "rwkv7": shapes(
        x_r=[1, 1, 16],
        x_w=[1, 1, 16],
        x_k=[1, 1, 16],
        x_v=[1, 1, 16],
        x_a=[1, 1, 16],
        x_g=[1, 1, 16],
        k_k=[16],
        k_a=[16],
        r_k=[2, 8],
        r_proj__weight=[16, 16],
        k_proj__weight=[16, 16],
        v_proj__weight=[16, 16],
        o_proj__weight=[16, 16],
        w_lora__lora__0__weight=[3, 16],
        w_lora__lora__2__weight=[16, 3],
        w_lora__lora__2__bias=[16],
        a_lora__lora__0__weight=[3, 16],
        a_lora__lora__2__weight=[16, 3],
        a_lora__lora__2__bias=[16],
        g_lora__lora__0__weight=[3, 16],
        g_lora__lora__2__weight=[16, 3],
        g_norm__weight=[16],
        g_norm__bias=[16],
    ),
    "longhorn": shapes(
        D=[32],
        in_proj__weight=[64, 16],
        conv1d__weight=[32, 1, 4],
        conv1d__bias=[32],
        x_proj__weight=[7, 32],
        dt_head__weight=[32, 1],
        dt_head__bias=[32],
        out_proj__weight=[16, 32],
    ),
    "mesa_net": shapes(
        lambda_params=[8],
        q_proj__weight=[8, 16],
        k_proj__weight=[8, 16],
        v_proj__weight=[8, 16],
        a_proj__weight=[2, 16],
        a_proj__bias=[2],
        b_proj__weight=[2, 16],
        b_proj__bias=[2],
        q_conv1d__weight=[8, 1, 3],
        k_conv1d__weight=[8, 1, 3],
        g_proj__weight=[8, 16],
        o_norm__weight=[4],
        o_proj__weight=[16, 8],
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
    close(o, rwkv7(second, w, x, v) @ w["o_proj.weight"].T)
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
