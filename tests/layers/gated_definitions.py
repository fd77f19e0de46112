"""What the layers of test_gated_layers.py compute: from the state dict, one token and one head at a
time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

D, H = 16, 2  # hidden size and heads of the layers


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
    for token in zip(*(a.unbind(1) for a in args), strict=True):
        state, o = f(state, *token)
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
