"""What the layers of linear_layers.py compute: from the state dict, every token's sum in full."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


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
TOLERANCE = {"retention": 1e-5}
