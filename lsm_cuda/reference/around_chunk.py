"""Operators around the chunk engine: own tokens, gates made of keys, slots, denominators, levels.

States are tuples where there are several; every definition takes cu_seqlens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu, softplus

from ._common import each_token, outer, recurrence, sequences, stack
from .chunk import gated_linear_attention, linear_attention


def finch(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""RWKV-6: ``o_t = scale · (S_{t-1} + Diag(u) k_t v_tᵀ)ᵀ r_t``, ``S_t = Diag(exp w_t) S_{t-1} +
    k_t v_tᵀ``.

    Args:
        r, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``; value head ``h`` uses head ``h // (HV // H)`` of r and k.
        w: ``[B, T, HV, K]``, natural log of the decay; ``[HV, K]`` is RWKV-5.
        u: bonus of the own token, ``[HV, K]`` or ``[B, HV, K]``.

    Source: Eagle and Finch, arXiv:2404.05892, section 4.
    """
    scale = r.shape[-1] ** -0.5 if scale is None else scale
    if w.dim() == 2:
        w = w.expand(*r.shape[:2], -1, -1)
    u = (u if u.dim() == 3 else u[None]).expand(r.shape[0], -1, -1)

    def definition(r, k, v, w, states):  # type: ignore[no-untyped-def]
        group = v.shape[2] // r.shape[2]
        r, k = (x.repeat_interleave(group, 2) for x in (r, k))
        B, _, H, K = r.shape
        S = r.new_zeros(B, H, K, v.shape[-1]) if states is None else states[0].to(r.dtype)
        outputs = []
        for r_t, k_t, v_t, w_t in each_token(r, k, v, w):
            kv = outer(k_t, v_t)
            read = S + u.unsqueeze(-1) * kv
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", r_t, read))
            S = S * w_t.exp().unsqueeze(-1) + kv
        return stack(outputs, v), (S,)

    states = None if initial_state is None else (initial_state,)
    o, (S,) = sequences(definition, (r, k, v, w), states, cu_seqlens)
    return o, S


def hgrn2(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""HGRN2: ``S_t = Diag(a_t) S_{t-1} + (1 - a_t) v_tᵀ`` with ``a_t = exp g_t``, ``o_t = scale ·
    S_tᵀ q_t``.

    Args: as :func:`gated_linear_attention` with as many heads everywhere.

    Source: HGRN2, arXiv:2404.07904.
    """
    return gated_linear_attention(q, 1 - g.exp(), v, g, scale, initial_state, cu_seqlens)


def metala(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    w_aug: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""MetaLA: the state of :func:`hgrn2`, and each token's own value added to what it reads:
    ``o_t = scale · S_tᵀ q_t + σ((q_t · (w_aug ⊙ (1 - a_t))) v_t)``, the sigmoid element-wise.

    Args: as :func:`hgrn2`, and w_aug ``[H, K]``.

    Source: MetaLA, arXiv:2411.10741; the sigmoid's place and the unscaled query are those of the
    authors' code, github.com/BICLab/MetaLA.
    """
    o, state = hgrn2(q, v, g, scale, initial_state, cu_seqlens)
    own = (q * w_aug * (1 - g.exp())).sum(-1, keepdim=True)
    return o + torch.sigmoid(own * v), state


def lightnet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""LightNet: each key channel holds a softmax over the tokens so far,
    ``S_t = Diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_tᵀ`` with ``exp z_t = exp z_{t-1} +
    exp k_t``; ``o_t = scale · S_tᵀ q_t``.

    Args:
        q, k: ``[B, T, H, K]``; k are logits.
        v: ``[B, T, H, V]``.
        initial_state: S ``[N, H, K, V]`` and z ``[N, 1, H, K]``.

    Returns:
        ``o [B, T, H, V]`` and the final (S, z).

    Source: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet,
    arXiv:2405.21022.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def definition(q, k, v, states):  # type: ignore[no-untyped-def]
        B, _, H, K = q.shape
        S = q.new_zeros(B, H, K, v.shape[-1])
        z = q.new_full((B, H, K), -torch.inf)
        if states is not None:
            S, z = states[0].to(q.dtype), states[1][:, 0].to(q.dtype)
        outputs = []
        for q_t, k_t, v_t in each_token(q, k, v):
            new = torch.logaddexp(z, k_t)
            write = outer((k_t - new).exp(), v_t)
            S, z = (z - new).exp().unsqueeze(-1) * S + write, new
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, S))
        return stack(outputs, v), (S, z.unsqueeze(1))

    o, (S, z) = sequences(definition, (q, k, v), initial_state, cu_seqlens)
    return o, (S, z)


def regla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    shift: float | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""ReGLA: ``S_t = Diag(F_t) S_{t-1} + φ(k_t) v_tᵀ``, ``o_t = scale · S_tᵀ exp(q_t - max q_t)``
    with the refined gate ``F_t = (1 - r) g² + r (1 - (1 - g)²)``.

    ``φ(k_s) = exp(k_s - c_t)`` for a reader at ``t``: c_t is the least integer that no channel of
    a key up to ``t`` exceeds, or ``shift``. No shift has a gradient.

    Args:
        q, k: ``[B, T, H, K]``, v: ``[B, T, H, V]``.
        g, r: ``[B, T, H, K]``, both gates before their sigmoid.
        initial_state: S ``[N, H, K, V]`` and c ``[N, H]``.

    Source: ReGLA, arXiv:2502.01578. There c is the maximum over the whole sequence,
    which no causal model has; the norm behind this layer cancels the difference.
    """
    K = q.shape[-1]
    scale = 1 / (math.e * (K * (math.e**2 - 1)) ** 0.5) if scale is None else scale
    q = (q - q.detach().amax(-1, keepdim=True)).exp()
    g, r = g.sigmoid(), r.sigmoid()
    decay = (1 - r) * g**2 + r * (1 - (1 - g) ** 2)

    def definition(q, k, v, decay, states):  # type: ignore[no-untyped-def]
        B, _, H, K = q.shape
        S = q.new_zeros(B, H, K, v.shape[-1])
        c = q.new_full((B, H), -torch.inf if shift is None else shift)
        if states is not None:
            S, c = states[0].to(q.dtype), states[1].detach().to(q.dtype)
        outputs = []
        for q_t, k_t, v_t, decay_t in each_token(q, k, v, decay):
            new = c if shift is not None else c.maximum(k_t.detach().amax(-1).ceil())
            S = S * (decay_t * (c - new).exp().unsqueeze(-1)).unsqueeze(-1)
            c = new
            S = S + outer((k_t - c.unsqueeze(-1)).exp(), v_t)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, S))
        return stack(outputs, v), (S, c)

    o, (S, c) = sequences(definition, (q, k, v, decay), initial_state, cu_seqlens)
    return o, (S, c)


_BETWEEN = {
    "softmax": lambda x: x.softmax(-1),
    "swish": lambda x: x * x.sigmoid(),
    "relu": lambda x: x.relu(),
    "relu2": lambda x: x.relu() ** 2,
    "none": lambda x: x,
}


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str = "softmax",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""Gated slot attention: M slots that decay and take in each token, and softmax over them.

    ``Kᵗ = Diag(exp g_t) Kᵗ⁻¹ + s_t k_tᵀ``, ``Vᵗ = Diag(exp g_t) Vᵗ⁻¹ + s_t v_tᵀ``,
    ``o_t = Vᵗᵀ softmax(scale · Kᵗ q_t)``.

    Args:
        q: ``[B, T, HQ, K]``; query head ``h`` reads the slots of head ``h // (HQ // H)``.
        k, v: ``[B, T, H, K]``, ``[B, T, H, V]``.
        s, g: writing strength and log decay of the slots, ``[B, T, H, M]``.
        initial_state: the slots' keys, transposed, ``[N, H, K, M]``, and values ``[N, H, M, V]``.
        activation: in the place of softmax: swish, relu, relu2 (its square) or none.

    Source: Gated Slot Attention, arXiv:2409.07146.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def definition(q, k, v, s, g, states):  # type: ignore[no-untyped-def]
        B, T, H, M = s.shape
        q = q.unflatten(2, (H, -1))
        hk, hv = q.new_zeros(B, H, k.shape[-1], M), q.new_zeros(B, H, M, v.shape[-1])
        if states is not None:
            hk, hv = (x.to(q.dtype) for x in states)
        outputs = []
        for q_t, k_t, v_t, s_t, g_t in each_token(q, k, v, s, g):
            decay = g_t.exp()
            hk = hk * decay.unsqueeze(-2) + outer(k_t, s_t)
            hv = hv * decay.unsqueeze(-1) + outer(s_t, v_t)
            p = _BETWEEN[activation](scale * torch.einsum("bhgk,bhkm->bhgm", q_t, hk))
            outputs.append(torch.einsum("bhgm,bhmv->bhgv", p, hv).flatten(1, 2))
        like = v.new_empty(B, T, q.shape[2] * q.shape[3], v.shape[-1])
        return stack(outputs, like), (hk, hv)

    o, (hk, hv) = sequences(definition, (q, k, v, s, g), initial_state, cu_seqlens)
    return o, (hk, hv)


def abc(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    r"""Attention with bounded memory: slot ``m`` holds the mean of all keys (values) so far,
    weighted by ``exp s_m``; each token reads the slots by softmax.

    Args: as :func:`gsa`, with s the logarithm of the weights. initial_state has in third place the
        logarithm of the slots' total weight, ``[N, 1, H, M]``.

    Source: ABC: Attention with Bounded-memory Control, arXiv:2110.02488.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def definition(q, k, v, s, states):  # type: ignore[no-untyped-def]
        B, T, H, M = s.shape
        q = q.unflatten(2, (H, -1))
        hk, hv = q.new_zeros(B, H, k.shape[-1], M), q.new_zeros(B, H, M, v.shape[-1])
        z = q.new_full((B, H, M), -torch.inf)
        if states is not None:
            hk, hv, z = (x.to(q.dtype) for x in states)
            z = z[:, 0]
        outputs = []
        for q_t, k_t, v_t, s_t in each_token(q, k, v, s):
            new = torch.logaddexp(z, s_t)
            keep, write, z = (z - new).exp(), (s_t - new).exp(), new
            hk = hk * keep.unsqueeze(-2) + outer(k_t, write)
            hv = hv * keep.unsqueeze(-1) + outer(write, v_t)
            p = (scale * torch.einsum("bhgk,bhkm->bhgm", q_t, hk)).softmax(-1)
            outputs.append(torch.einsum("bhgm,bhmv->bhgv", p, hv).flatten(1, 2))
        like = v.new_empty(B, T, q.shape[2] * q.shape[3], v.shape[-1])
        return stack(outputs, like), (hk, hv, z.unsqueeze(1))

    o, (hk, hv, z) = sequences(definition, (q, k, v, s), initial_state, cu_seqlens)
    return o, (hk, hv, z)


def _over_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: Callable[[Tensor], Tensor],
    eps: float | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """``o_t = S_tᵀ φ(q_t) / (z_t · φ(q_t) + eps)``: S sums ``φ(k_s) v_sᵀ``, z sums ``φ(k_s)``."""
    q, k = feature_map(q), feature_map(k)
    o, _ = linear_attention(q, k, v, 1.0, cu_seqlens=cu_seqlens)
    if eps is None:
        return o
    total, _ = linear_attention(q, k, torch.ones_like(v[..., :1]), 1.0, cu_seqlens=cu_seqlens)
    return o / (total + eps)


def _products(x: Tensor) -> Tensor:
    """All K² products of two channels: ``_products(q) · _products(k) = (q · k)²``."""
    return (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)


def based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Based: linear attention with ``φ(q) · φ(k) = 1 + x + x²/2``, the second-order Taylor
    polynomial of ``exp x``, ``x = scale · q · k``; the sum of these weights, plus 1e-6, divides
    where ``use_norm``.

    Source: Simple linear attention language models balance the recall-throughput tradeoff,
    arXiv:2402.18668.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def taylor(x: Tensor) -> Tensor:
        return torch.cat([torch.ones_like(x[..., :1]), x, _products(x) / 2**0.5], -1)

    eps = 1e-6 if use_norm else None
    return _over_weights(q * scale, k, v, taylor, eps, cu_seqlens)


def rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""ReBased: linear attention with ``φ(q) · φ(k) = (scale · q · k)²``, ``scale = K ** -0.5`` or
    1; the sum of these weights, plus eps, divides where ``use_normalize``.

    Source: Linear Transformers with Learnable Kernel Functions are Better In-Context Models,
    arXiv:2402.10644.
    """
    scale = q.shape[-1] ** -0.5 if use_scale else 1.0
    return _over_weights(q * scale, k, v, _products, eps if use_normalize else None, cu_seqlens)


def normalized_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-10,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""``S_t = e^{g_t} S_{t-1} + w_t k_t v_tᵀ``, ``z_t = e^{g_t} z_{t-1} + w_t k_t``, ``o_t = S_tᵀ
    q_t / z_t·q_t``; ``|scale z_t·q_t| < eps`` is replaced by eps with its sign, plus at zero.

    Args: as :func:`simple_gated_linear_attention`; g and weight ``[B, T, HV]``, default no decay
        and ones; states S and z ``[N, HV, K]``.

    Source: Transformers are RNNs, arXiv:2006.16236, equations 18 to 20; with ``w = 1 − e^g`` Random
        Feature Attention, arXiv:2103.02143, section 3.2.
    """
    w = v.new_ones(v.shape[:3]) if weight is None else weight
    S, z = (None, None) if initial_state is None else initial_state
    z = None if z is None else z[..., None]
    g = None if g is None else g[..., None, None]
    above, S = recurrence(q, k, v * w[..., None], g, scale, S, cu_seqlens)
    below, z = recurrence(q, k, w[..., None], g, scale, z, cu_seqlens)
    clamped = torch.where(below < 0, -eps, eps).to(below.dtype)
    return above / torch.where(below.abs() < eps, clamped, below), (S, z[..., 0])


def bidirectional_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""``S_t = e^{g_t} S_{t-1} + k_t v_tᵀ``, ``R_t = e^{g_t} R_{t+1} + k_t v_tᵀ``, ``o_t = scale ·
    (S_t + e^{g_t} R_{t+1})ᵀ q_t``: every token of the sequence counts once. ``g [B, T, HV]`` or
    None.

    Source: Transformers are RNNs, arXiv:2006.16236, equation 6 (no g).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g = v.new_zeros(v.shape[:3]) if g is None else g

    def definition(q, k, v, g, states):  # type: ignore[no-untyped-def]
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        tokens = list(each_token(outer(k, v), g.exp()[..., None, None]))
        S: list[Tensor] = []
        for write, decay in tokens:
            S.append(write + (decay * S[-1] if S else 0))
        R: list[tuple[Tensor, Tensor]] = []
        for write, decay in reversed(tokens):
            after = decay * R[-1][1] if R else torch.zeros_like(write)
            R.append((after, after + write))
        outputs = [
            scale * torch.einsum("bhk,bhkv->bhv", q_t, s + r)
            for (q_t,), s, (r, _) in zip(each_token(q), S, reversed(R), strict=True)
        ]
        return stack(outputs, v), ()

    return sequences(definition, (q, k, v, g), None, cu_seqlens)[0]


def mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    r"""``h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_tᵀ``, ``y_t = (h_t C_t + D x_t) · silu(z_t)``, h
    from zero where seq_idx changes.

    Args:
        x: ``[B, T, H, P]``.
        dt: ``[B, T, H]``; dt_bias is added, then softplus taken, then dt_limit applied.
        A: ``[H]``.
        B, C: ``[B, T, G, N]``; head ``h`` uses group ``h // (H // G)``.
        D: ``[H]`` or ``[H, P]``.
        z: ``[B, T, H, P]``.
        initial_states: ``[B, H, P, N]``, one per packed sequence.
        seq_idx: ``[B, T]``.

    Returns:
        ``y [B, T, H, P]`` and the final states ``[B, H, P, N]``.

    Source: Transformers are SSMs, arXiv:2405.21060, equation 16 and the block around it.
    """
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    def definition(x, dt, B, C, z, seq_idx, states):  # type: ignore[no-untyped-def]
        batch, _, H, P = x.shape
        B, C = (t.repeat_interleave(H // t.shape[2], 2) for t in (B, C))
        h = x.new_zeros(batch, H, P, B.shape[3]) if states is None else states[0]
        outputs = []
        before = None
        for x_t, dt_t, B_t, C_t, z_t, own in each_token(x, dt, B, C, z, seq_idx):
            if before is not None:
                h = h * (own == before)[:, None, None, None]
            before = own
            h = (dt_t * A).exp()[..., None, None] * h
            h = h + outer(dt_t[..., None] * x_t, B_t)
            y = torch.einsum("bhpn,bhn->bhp", h, C_t)
            if D is not None:
                y = y + (D if D.dim() == 2 else D[:, None]) * x_t
            outputs.append(y if z is None else y * silu(z_t))
        return stack(outputs, x), (h,)

    states = None if initial_states is None else (initial_states,)
    y, (h,) = sequences(definition, (x, dt, B, C, z, seq_idx), states, cu_seqlens)
    return y, h


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, ...] | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
    input_gate: str = "exp",
    normalize: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""``m_t = max(log σ(f_t) + m_{t-1}, i_t)``, ``f' = σ(f_t) e^{m_{t-1} − m_t}``, ``i' = e^{i_t −
    m_t}``; ``C_t = f' C_{t-1} + i' k_t v_tᵀ``, ``n_t = f' n_{t-1} + i' k_t``; ``h_t = scale · C_tᵀ
    q_t / (max(|scale · n_t·q_t|, e^{−m_t}) + eps)``.

    The sigmoid input gate has no m: ``i' = σ(i)``, and 1 for ``e^{−m_t}``; without normalize ``h_t
    = scale · C_tᵀ q_t``. m cancels in h but for eps: it is a constant to derivatives.

    Args: q, k, v, scale and cu_seqlens as :func:`gated_linear_attention`; i, f ``[B, T, HV]``;
        states C ``[N, HV, K, V]``, n ``[N, HV, K]``, m ``[N, HV]``, default zeros.

    Source: xLSTM, arXiv:2405.04517, equations 19 to 27; sigmoid gate: arXiv:2503.14376.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def definition(q, k, v, i, f, states):  # type: ignore[no-untyped-def]
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        B, _, H, K = q.shape
        C, n = q.new_zeros(B, H, K, v.shape[-1]), q.new_zeros(B, H, K)
        C, n, m = (C, n, q.new_zeros(B, H)) if states is None else states
        outputs = []
        for q_t, k_t, v_t, i_t, f_t in each_token(q, k, v, i, f):
            log_f = logsigmoid(f_t)
            if input_gate == "exp":
                before, m = m.detach(), torch.maximum(log_f + m, i_t).detach()
                forget, write = (log_f + before - m).exp(), (i_t - m).exp()
            else:
                forget, write = log_f.exp(), i_t.sigmoid()
            key = write[..., None] * k_t
            C = forget[..., None, None] * C + outer(key, v_t)
            n = forget[..., None] * n + key
            h = scale * torch.einsum("bhk,bhkv->bhv", q_t, C)
            if normalize:
                size = (scale * (q_t * n).sum(-1)).abs()
                bound = (-m).exp() if input_gate == "exp" else torch.ones_like(m)
                h = h / (torch.maximum(size, bound) + eps)[..., None]
            outputs.append(h)
        return stack(outputs, v), (C, n, m)

    return sequences(definition, (q, k, v, i, f), initial_state, cu_seqlens)


def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    scale: float | None = 1.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""A Fenwick tree of states: ``o_t = scale · Σ_ℓ λ_t^ℓ (S_t^ℓ)ᵀ q_t``. ``S_t^0 = k_t v_tᵀ`` is
    the token itself; after t, levels 0 … z merge into level z + 1, z being the trailing ones of t;
    all levels decay by ``e^{g_t}``.

    Args: q, k, v as :func:`gated_linear_attention`, g ``[B, T, HV]``, level_scales λ ``[B, T, HV,
        L]``; scale None for ``K ** -0.5``.

    Returns:
        ``o [B, T, HV, V]`` and the buckets after the last token: level ℓ ≥ 1 is ``[ℓ − 1]`` of
        ``[N, L, HV, K, V]``.

    Source: Log-Linear Attention, arXiv:2506.04761, section 3.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def definition(q, k, v, g, level_scales, states):  # type: ignore[no-untyped-def]
        HV, L = level_scales.shape[2:]
        q, k = (x.repeat_interleave(HV // x.shape[2], 2) for x in (q, k))
        empty = q.new_zeros(q.shape[0], HV, q.shape[3], v.shape[3])
        buckets = [empty] * L
        outputs = []
        for t, (q_t, k_t, v_t, g_t, scales) in enumerate(each_token(q, k, v, g, level_scales)):
            buckets = [S * g_t[..., None, None].exp() for S in buckets]
            fresh = outer(k_t, v_t)
            own, *rest = scales[..., None, None].unbind(2)
            read = sum((a * S for a, S in zip(rest, buckets, strict=False)), own * fresh)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, read))
            level = 0
            while (t >> level) & 1:
                fresh, buckets[level] = fresh + buckets[level], empty
                level += 1
            buckets[level] = fresh
        return stack(outputs, v), (torch.stack(buckets, 1),)

    return sequences(definition, (q, k, v, g, level_scales), None, cu_seqlens)
