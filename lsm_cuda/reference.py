"""Executable definitions: each operator as its paper writes it, one token at a time, in plain
PyTorch.

Slow on purpose. They run in any floating dtype (fp64 is the truth the tests compare with), on any
device, and are differentiable to any order. Read this file first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu, softplus

__all__ = [
    "abc",
    "based",
    "bidirectional_linear_attention",
    "causal_conv1d",
    "comba",
    "delta_rule",
    "dplr",
    "finch",
    "gated_delta_rule",
    "gated_linear_attention",
    "gsa",
    "hgrn2",
    "kda",
    "lcsm",
    "lightnet",
    "linear_attention",
    "log_linear_attention",
    "longhorn",
    "mamba2",
    "mesa_net",
    "metala",
    "mlstm",
    "normalized_linear_attention",
    "rebased",
    "regla",
    "rg_lru",
    "rwkv6",
    "scan",
    "selective_scan",
    "simple_gated_linear_attention",
    "slstm",
    "two_sided_gated_linear_attention",
    "value_gated_linear_attention",
    "wkv4",
]


def _recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    exclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """``S_t = e^{g_t} ⊙ S_{t-1} + k_t v_tᵀ`` with ``g_t`` broadcast over ``[K, V]``; ``o_t = scale
    · S_tᵀ q_t``, or of ``S_{t-1}`` if exclusive."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        runs = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            h0 = None if initial_state is None else initial_state[n : n + 1]
            parts = (None if x is None else x[:, start:end] for x in (q, k, v, g))
            runs.append(_recurrence(*parts, scale, h0, None, exclusive))  # type: ignore[arg-type, call-arg]
        if not runs:
            return v.new_empty(v.shape), v.new_empty(0, v.shape[2], q.shape[3], v.shape[3])
        return torch.cat([o for o, _ in runs], 1), torch.cat([s for _, s in runs], 0)

    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    S = q.new_zeros(B, HV, K, V) if initial_state is None else initial_state.to(q.dtype)
    outputs = []
    for t in range(T):
        before = S
        if g is not None:
            S = S * g[:, t].exp()
        S = S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        read = before if exclusive else S
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], read))
    return torch.stack(outputs, 1) if outputs else v.new_empty(v.shape), S


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Linear attention without a decay: ``S_t = S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    Args and returns: as :func:`gated_linear_attention`.

    Source: Transformers are RNNs, arXiv:2006.16236, without feature map and normaliser.
    """
    return _recurrence(q, k, v, None, scale, initial_state, cu_seqlens)


def simple_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One decay per head: ``S_t = e^{g_t} S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    Args: as :func:`gated_linear_attention`, but g ``[B, T, HV]``.

    Source: RetNet, arXiv:2307.08621 (constant g); Mamba-2, arXiv:2405.21060 (g of the token).
    """
    return _recurrence(q, k, v, g[..., None, None], scale, initial_state, cu_seqlens)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gated linear attention: ``S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ
    q_t``.

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``; value head ``h`` uses query/key head ``h // (HV // H)``.
        g: ``[B, T, HV, K]``, natural log of the decay.
        scale: default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, default zeros.
        cu_seqlens: ``[N + 1]`` sequence boundaries inside one packed row (``B == 1``).

    Returns:
        ``o [B, T, HV, V]`` and the final state ``[N, HV, K, V]``.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635,
        eq. 3.
    """
    return _recurrence(q, k, v, g[..., :, None], scale, initial_state, cu_seqlens)


def value_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One decay per channel of the value: ``S_t = S_{t-1} Diag(exp g_t) + k_t v_tᵀ``,
    ``o_t = scale · S_tᵀ q_t``.

    Args: as :func:`gated_linear_attention`, but g ``[B, T, HV, V]``.

    Source: Gated Slot Attention, arXiv:2409.07146, eq. 7 (its first pass; slots are values).
    """
    return _recurrence(q, k, v, g[..., None, :], scale, initial_state, cu_seqlens)


def rwkv6(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Read before write: ``o_t = scale · S_{t-1}ᵀ q_t``,
    ``S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ``.

    RWKV-5 and RWKV-6 without the bonus ``scale · (Σ_c q_tc u_c k_tc) v_t`` of the own token.

    Args and returns: as :func:`gated_linear_attention`.

    Source: Eagle and Finch, arXiv:2404.05892, section 4.
    """
    return _recurrence(q, k, v, g[..., :, None], scale, initial_state, cu_seqlens, exclusive=True)


# Vector decays and two passes. States are tuples; every definition takes cu_seqlens.

States = tuple[Tensor, ...]


def _sequences(
    definition: Callable[..., tuple[Tensor, States]],
    tokens: tuple[Tensor | None, ...],
    states: tuple[Tensor | None, ...] | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, States]:
    """``definition(*tokens, states)`` of each packed sequence, or of the batch at once."""
    if cu_seqlens is None:
        return definition(*tokens, states)
    runs = []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        own = None if states is None else tuple(None if s is None else s[n, None] for s in states)
        runs.append(definition(*(None if x is None else x[:, start:end] for x in tokens), own))
    outputs, finals = zip(*runs, strict=True)
    return torch.cat(outputs, 1), tuple(torch.cat(f) for f in zip(*finals, strict=True))


def _stack(outputs: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(outputs, 1) if outputs else like.new_empty(like.shape)


def two_sided_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    gv: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A decay per key channel and one per value channel: ``S_t = Diag(exp g_t) S_{t-1} Diag(exp
    gv_t) + k_t v_tᵀ``.

    Args: as :func:`gated_linear_attention`, with a second gate gv ``[B, T, HV, V]``.

    Source: Fine-Tuning Pre-trained Transformers into Decaying Fast Weights, arXiv:2210.04243.
    """
    g = g[..., :, None] + gv[..., None, :]
    return _recurrence(q, k, v, g, scale, initial_state, cu_seqlens)


def lcsm(
    e: Tensor | None,
    i: Tensor,
    s: Tensor,
    o: Tensor | None = None,
    ov: Tensor | None = None,
    expand: Callable[[Tensor], Tensor] = lambda x: x,
    insert: Callable[[Tensor], Tensor] = lambda x: x,
    shrink: Callable[[Tensor], Tensor] = lambda x: x,
    oscillate: Callable[[Tensor], Tensor] = torch.exp,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Expand, oscillate, shrink: ``m_t = a_t ⊙ m_{t-1} + e_t i_tᵀ``, ``y_t = scale · m_tᵀ s_t``.

    Args: as :func:`lsm_cuda.ops.chunk_lcsm`, but options are functions; ``oscillate`` gives a.

    Source: Unlocking the Secrets of Linear Complexity Sequence Model from A Unified Perspective,
    arXiv:2405.17383.
    """
    of_keys = None if o is None else oscillate(o if o.dim() > 1 else o.expand(i.shape[:3]))
    of_values = None if ov is None else oscillate(ov)
    if e is None:
        assert of_keys is not None
        e = 1 - of_keys
    else:
        e = expand(e)

    def update(S, i, e, of_keys, of_values):  # type: ignore[no-untyped-def]
        if of_keys is not None:
            S = S * (of_keys[..., None] if of_keys.dim() == 3 else of_keys[..., None, None])
        if of_values is not None:
            S = S * of_values[..., None, :]
        return S + _outer(e, i)

    tokens = (insert(i), e, of_keys, of_values)
    return _rank_one(update, shrink(s), tokens, scale, initial_state, cu_seqlens)


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
        B, T, H, K = r.shape
        S = r.new_zeros(B, H, K, v.shape[-1]) if states is None else states[0].to(r.dtype)
        outputs = []
        for t in range(T):
            kv = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            read = S + u.unsqueeze(-1) * kv
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", r[:, t], read))
            S = S * w[:, t].exp().unsqueeze(-1) + kv
        return _stack(outputs, v), (S,)

    states = None if initial_state is None else (initial_state,)
    o, (S,) = _sequences(definition, (r, k, v, w), states, cu_seqlens)
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
        B, T, H, K = q.shape
        S = q.new_zeros(B, H, K, v.shape[-1])
        z = q.new_full((B, H, K), -torch.inf)
        if states is not None:
            S, z = states[0].to(q.dtype), states[1][:, 0].to(q.dtype)
        outputs = []
        for t in range(T):
            new = torch.logaddexp(z, k[:, t])
            write = (k[:, t] - new).exp().unsqueeze(-1) * v[:, t].unsqueeze(-2)
            S, z = (z - new).exp().unsqueeze(-1) * S + write, new
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        return _stack(outputs, v), (S, z.unsqueeze(1))

    o, (S, z) = _sequences(definition, (q, k, v), initial_state, cu_seqlens)
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
        B, T, H, K = q.shape
        S = q.new_zeros(B, H, K, v.shape[-1])
        c = q.new_full((B, H), -torch.inf if shift is None else shift)
        if states is not None:
            S, c = states[0].to(q.dtype), states[1].detach().to(q.dtype)
        outputs = []
        for t in range(T):
            new = c if shift is not None else c.maximum(k[:, t].detach().amax(-1).ceil())
            S = S * (decay[:, t] * (c - new).exp().unsqueeze(-1)).unsqueeze(-1)
            c = new
            S = S + (k[:, t] - c.unsqueeze(-1)).exp().unsqueeze(-1) * v[:, t].unsqueeze(-2)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        return _stack(outputs, v), (S, c)

    o, (S, c) = _sequences(definition, (q, k, v, decay), initial_state, cu_seqlens)
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
        for t in range(T):
            decay = g[:, t].exp()
            hk = hk * decay.unsqueeze(-2) + k[:, t].unsqueeze(-1) * s[:, t].unsqueeze(-2)
            hv = hv * decay.unsqueeze(-1) + s[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            p = _BETWEEN[activation](scale * torch.einsum("bhgk,bhkm->bhgm", q[:, t], hk))
            outputs.append(torch.einsum("bhgm,bhmv->bhgv", p, hv).flatten(1, 2))
        like = v.new_empty(B, T, q.shape[2] * q.shape[3], v.shape[-1])
        return _stack(outputs, like), (hk, hv)

    o, (hk, hv) = _sequences(definition, (q, k, v, s, g), initial_state, cu_seqlens)
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
        for t in range(T):
            new = torch.logaddexp(z, s[:, t])
            keep, write, z = (z - new).exp(), (s[:, t] - new).exp(), new
            hk = hk * keep.unsqueeze(-2) + k[:, t].unsqueeze(-1) * write.unsqueeze(-2)
            hv = hv * keep.unsqueeze(-1) + write.unsqueeze(-1) * v[:, t].unsqueeze(-2)
            p = (scale * torch.einsum("bhgk,bhkm->bhgm", q[:, t], hk)).softmax(-1)
            outputs.append(torch.einsum("bhgm,bhmv->bhgv", p, hv).flatten(1, 2))
        like = v.new_empty(B, T, q.shape[2] * q.shape[3], v.shape[-1])
        return _stack(outputs, like), (hk, hv, z.unsqueeze(1))

    o, (hk, hv, z) = _sequences(definition, (q, k, v, s), initial_state, cu_seqlens)
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
    above, S = _recurrence(q, k, v * w[..., None], g, scale, S, cu_seqlens)
    below, z = _recurrence(q, k, w[..., None], g, scale, z, cu_seqlens)
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
        writes = k.unsqueeze(-1) * v.unsqueeze(-2)
        decays = g.exp()[..., None, None]
        T = q.shape[1]
        S: list[Tensor] = []
        R: list[tuple[Tensor, Tensor]] = []
        for t in range(T):
            S.append(writes[:, t] + (decays[:, t] * S[-1] if S else 0))
            u = T - 1 - t
            after = decays[:, u] * R[-1][1] if R else torch.zeros_like(writes[:, u])
            R.append((after, after + writes[:, u]))
        read = [s + r for s, (r, _) in zip(S, reversed(R), strict=True)]
        outputs = [scale * torch.einsum("bhk,bhkv->bhv", q[:, t], read[t]) for t in range(T)]
        return _stack(outputs, v), ()

    return _sequences(definition, (q, k, v, g), None, cu_seqlens)[0]


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
        batch, T, H, P = x.shape
        B, C = (t.repeat_interleave(H // t.shape[2], 2) for t in (B, C))
        h = x.new_zeros(batch, H, P, B.shape[3]) if states is None else states[0]
        outputs = []
        for t in range(T):
            if seq_idx is not None and t > 0:
                h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
            h = (dt[:, t] * A).exp()[..., None, None] * h
            h = h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            y = torch.einsum("bhpn,bhn->bhp", h, C[:, t])
            if D is not None:
                y = y + (D if D.dim() == 2 else D[:, None]) * x[:, t]
            outputs.append(y if z is None else y * silu(z[:, t]))
        return _stack(outputs, x), (h,)

    states = None if initial_states is None else (initial_states,)
    y, (h,) = _sequences(definition, (x, dt, B, C, z, seq_idx), states, cu_seqlens)
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
        B, T, H, K = q.shape
        C, n = q.new_zeros(B, H, K, v.shape[-1]), q.new_zeros(B, H, K)
        C, n, m = (C, n, q.new_zeros(B, H)) if states is None else states
        outputs = []
        for t in range(T):
            log_f = logsigmoid(f[:, t])
            if input_gate == "exp":
                before, m = m.detach(), torch.maximum(log_f + m, i[:, t]).detach()
                forget, write = (log_f + before - m).exp(), (i[:, t] - m).exp()
            else:
                forget, write = log_f.exp(), i[:, t].sigmoid()
            key = write[..., None] * k[:, t]
            C = forget[..., None, None] * C + key[..., None] * v[:, t, :, None]
            n = forget[..., None] * n + key
            h = scale * torch.einsum("bhk,bhkv->bhv", q[:, t], C)
            if normalize:
                size = (scale * (q[:, t] * n).sum(-1)).abs()
                bound = (-m).exp() if input_gate == "exp" else torch.ones_like(m)
                h = h / (torch.maximum(size, bound) + eps)[..., None]
            outputs.append(h)
        return _stack(outputs, v), (C, n, m)

    return _sequences(definition, (q, k, v, i, f), initial_state, cu_seqlens)


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
        for t in range(q.shape[1]):
            buckets = [S * g[:, t, :, None, None].exp() for S in buckets]
            fresh = k[:, t, :, :, None] * v[:, t, :, None]
            scales = level_scales[:, t, :, :, None, None].unbind(2)
            read = sum(
                (a * S for a, S in zip(scales[1:], buckets, strict=False)), scales[0] * fresh
            )
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], read))
            level = 0
            while (t >> level) & 1:
                fresh, buckets[level] = fresh + buckets[level], empty
                level += 1
            buckets[level] = fresh
        return _stack(outputs, v), (torch.stack(buckets, 1),)

    return _sequences(definition, (q, k, v, g, level_scales), None, cu_seqlens)


# The delta engine: the state forgets along a direction before it takes in a pair.


def _delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    num_householder: int,
) -> tuple[Tensor, Tensor]:
    """``S ← e^{g_t} ⊙ S``, then ``S ← S + k β (v − Sᵀ k)ᵀ`` for each micro-step of the token, with
    ``g_t`` broadcast over ``[K, V]`` and β over ``[V]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v, beta = (
        x.reshape(x.shape[0], q.shape[1], num_householder, *x.shape[2:]) for x in (k, v, beta)
    )
    if beta.dim() < v.dim():
        beta = beta.unsqueeze(-1)

    def definition(q, k, v, g, beta, states):  # type: ignore[no-untyped-def]
        HV, V = v.shape[-2:]
        q, k = (x.repeat_interleave(HV // x.shape[-2], -2) for x in (q, k))
        B, T, _, K = q.shape
        S = q.new_zeros(B, HV, K, V) if states is None else states[0].to(q.dtype)
        outputs = []
        for t in range(T):
            if g is not None:
                S = S * g[:, t].exp()
            for j in range(num_householder):
                key = k[:, t, j].unsqueeze(-1)
                error = v[:, t, j] - (key * S).sum(-2)
                S = S + key * (beta[:, t, j] * error).unsqueeze(-2)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        return _stack(outputs, v[:, :, 0]), (S,)

    states = None if initial_state is None else (initial_state,)
    o, (S,) = _sequences(definition, (q, k, v, g, beta), states, cu_seqlens)
    return o, S


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_householder: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""The delta rule: ``S_t = (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ``, ``o_t = scale · S_tᵀ
    q_t``.

    Args:
        q: ``[B, T, H, K]``.
        k: ``[B, T n, H, K]``, n = num_householder micro-steps per token.
        v: ``[B, T n, HV, V]``; value head ``h`` uses head ``h // (HV // H)`` of q and k.
        beta: ``[B, T n, HV]``, or one per value channel, ``[B, T n, HV, V]``.
        scale: default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, default zeros.
        cu_seqlens: ``[N + 1]`` sequence boundaries in tokens inside one packed row (``B == 1``).
        num_householder: micro-steps per token; the output is read after the last.

    Returns:
        ``o [B, T, HV, V]`` and the final state ``[N, HV, K, V]``.

    Source: Parallelizing Linear Transformers with the Delta Rule, arXiv:2406.06484; several steps:
        DeltaProduct, arXiv:2502.10297.
    """
    return _delta(q, k, v, None, beta, scale, initial_state, cu_seqlens, num_householder)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_householder: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""``S_t = (I − β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ``; with several micro-steps the
    decay comes before the first.

    Args and returns: as :func:`delta_rule`, and g ``[B, T, HV]``, natural log of the decay.

    Source: Gated Delta Networks, arXiv:2412.06464.
    """
    gate = g[..., None, None]
    return _delta(q, k, v, gate, beta, scale, initial_state, cu_seqlens, num_householder)


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_householder: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Kimi Delta Attention: :func:`gated_delta_rule` with a decay per key channel, g ``[B, T, HV,
    K]``.

    Source: Kimi Linear, arXiv:2510.26692.
    """
    gate = g[..., None]
    return _delta(q, k, v, gate, beta, scale, initial_state, cu_seqlens, num_householder)


def _rank_one(
    update: Callable[..., Tensor],
    q: Tensor,
    tokens: tuple[Tensor | None, ...],
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S_t = update(S_{t-1}, *tokens[t])``, ``o_t = scale · S_tᵀ q_t``; tokens start with v, and
    those with as many heads as q are per key head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def definition(q, v, *given):  # type: ignore[no-untyped-def]
        *rest, states = given
        B, T, _, K = q.shape
        HV, V = v.shape[2:]
        q, *own = (
            None if x is None else x.repeat_interleave(HV // x.shape[2], 2) for x in (q, *rest)
        )
        S = q.new_zeros(B, HV, K, V) if states is None else states[0].to(q.dtype)
        outputs = []
        for t in range(T):
            S = update(S, v[:, t], *(None if x is None else x[:, t] for x in own))
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        return _stack(outputs, v), (S,)

    states = None if initial_state is None else (initial_state,)
    o, (S,) = _sequences(definition, (q, *tokens), states, cu_seqlens)
    return o, S


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Comba: ``S_t = e^{g_t} S_{t-1} + β_t k_t (v_t − S_{t-1}ᵀ p_t)ᵀ``: what is erased is read
    with a key of its own, before the decay.

    Args and returns: as :func:`gated_delta_rule` without micro-steps, and p ``[B, T, H, K]``.

    Source: Comba, arXiv:2506.02475, eq. 7. The output's correction, q − D p, is the caller's.
    """

    def update(S, v, k, p, g, beta):  # type: ignore[no-untyped-def]
        error = v - (p.unsqueeze(-1) * S).sum(-2)
        beta = beta if beta.dim() == v.dim() else beta.unsqueeze(-1)
        return S * g[..., None, None].exp() + _outer(k, beta * error)

    return _rank_one(update, q, (v, k, p, g, beta), scale, initial_state, cu_seqlens)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Diagonal plus low rank: ``S_t = (Diag(exp g_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``, ``o_t =
    scale · S_tᵀ q_t``.

    Args and returns: as :func:`delta_rule` without micro-steps and beta; a, b ``[B, T, H, K]``, g
        ``[B, T, HV, K]``, natural log, or None for no decay (IPLR).

    Source: RWKV-7, arXiv:2503.14456, section 3.
    """

    def update(S, v, k, a, b, g):  # type: ignore[no-untyped-def]
        read = (a.unsqueeze(-1) * S).sum(-2)
        kept = S if g is None else S * g.unsqueeze(-1).exp()
        return kept + _outer(b, read) + _outer(k, v)

    return _rank_one(update, q, (v, k, a, b, g), scale, initial_state, cu_seqlens)


def scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log: bool = False,
    reverse: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The element-wise linear recurrence: ``h_t = a_t ⊙ h_{t-1} + x_t``.

    Args:
        x (Tensor): ``[B, T, D]``, real or complex.
        a (Tensor): ``[B, T, D]`` or ``[D]``, or its natural logarithm if ``log``.
        initial_state (Tensor, optional): ``[N, D]``.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences.
        reverse (bool): ``h_t = a_t ⊙ h_{t+1} + x_t``.
        order (Tensor, optional): ``[T]``, the token of each position.

    Returns:
        ``h [B, T, D]`` and the final state ``[N, D]``.
    """
    a = (a.exp() if log else a).expand(x.shape)
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    starts = [(0, x.shape[1])] if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
    tokens = range(x.shape[1]) if order is None else order.tolist()
    h0 = x.new_zeros(N, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    outputs: dict[int, Tensor] = {}
    final = []
    for n, (start, end) in enumerate(starts):
        h = h0 if cu_seqlens is None else h0[n, None]
        for p in reversed(range(start, end)) if reverse else range(start, end):
            t = tokens[p]
            h = a[:, t] * h + x[:, t]
            outputs[t] = h
        final.append(h)
    state = torch.cat(final) if final else h0
    if not outputs:
        return x.new_empty(x.shape), state
    return torch.stack([outputs[t] for t in range(x.shape[1])], 1), state


def rg_lru(
    x: Tensor,
    i: Tensor,
    r: Tensor,
    c: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The real-gated linear recurrent unit: ``h_t = a_t ⊙ h_{t-1} + sqrt(1 − a_t²) ⊙ (σ(i_t) ⊙
    x_t)`` with ``log a_t = c ⊙ σ(r_t)``.

    Without an initial state, the first token of a sequence has the factor 1 for its root. The slope
    of the root ends at 1000.

    Args:
        x, i, r (Tensor): ``[B, T, D]``.
        c (Tensor): ``[D]``, ≤ 0; Griffin has −8 softplus of its parameter.

    Returns: as :func:`scan`.

    Source: Griffin, arXiv:2402.19427, eqs. 1-4, and the authors' code for first tokens and slope.
    """
    log_a = c * r.sigmoid()
    square = -(2 * log_a).expm1()  # 1 − a²
    multiplier = _bounded_sqrt(square)
    if initial_state is None and x.shape[1]:
        positions = torch.arange(x.shape[1], device=x.device)
        bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        firsts = {(b - 1 if reverse else a) for a, b in pairwise(bounds) if b > a}
        first = torch.tensor([int(p) in firsts for p in positions], device=x.device)
        if order is not None:
            first = torch.zeros_like(first).index_put((order.long(),), first)
        multiplier = torch.where(first[None, :, None], 1.0, multiplier)
    return scan(
        multiplier * i.sigmoid() * x, log_a, initial_state, cu_seqlens, True, reverse, order
    )


def _bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt with its slope, ``1 / (2 sqrt x)``, bounded by 1000."""
    root = x.detach().sqrt()
    slope = 0.5 / root.clamp(min=0.5e-3)
    return root + slope * (x - x.detach())


def longhorn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    diagonal: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""``S_t = S_{t-1} + k_t (ε_t ⊙ (v_t − S_{t-1}ᵀ k_t))ᵀ`` with ``ε = β / (1 + β |k|²)``; the
    diagonal form is ``S_t = (1 − (k_t ⊙ k_t) ε_tᵀ) ⊙ S_{t-1} + k_t (ε_t ⊙ v_t)ᵀ``.

    Args: as :func:`gated_linear_attention` without g, and beta ``[B, T, HV, V]``.

    Source: Longhorn, arXiv:2407.14207, equations 9 and 11.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def definition(q, k, v, beta, states):  # type: ignore[no-untyped-def]
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
        B, T, HV, K = q.shape
        S = q.new_zeros(B, HV, K, v.shape[-1]) if states is None else states[0]
        outputs = []
        for t in range(T):
            key = k[:, t].unsqueeze(-1)
            rate = beta[:, t] / (1 + beta[:, t] * (key**2).sum(-2))
            held = key * S if diagonal else (key * S).sum(-2, keepdim=True)
            S = S + key * rate.unsqueeze(-2) * (v[:, t].unsqueeze(-2) - held)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        return _stack(outputs, v), (S,)

    states = None if initial_state is None else (initial_state,)
    o, (S,) = _sequences(definition, (q, k, v, beta), states, cu_seqlens)
    return o, S


def mesa_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""``H_t = e^{g_t} H_{t-1} + β_t k_t k_tᵀ``, ``G_t = e^{g_t} G_{t-1} + β_t k_t v_tᵀ``, ``o_t =
    G_tᵀ (H_t + Diag(λ))⁻¹ q_t``.

    Args:
        q, k: ``[B, T, H, K]``, v: ``[B, T, H, V]``.
        g, beta: ``[B, T, H]``.
        lamb: λ ``[H, K]``.
        initial_state: H ``[N, H, K, K]`` and G ``[N, H, K, V]``, default zeros.

    Source: MesaNet, arXiv:2506.05233, equations 6 to 8.
    """

    def definition(q, k, v, g, beta, states):  # type: ignore[no-untyped-def]
        B, T, H, K = q.shape
        kk, kv = q.new_zeros(B, H, K, K), q.new_zeros(B, H, K, v.shape[-1])
        if states is not None:
            kk, kv = states
        outputs = []
        for t in range(T):
            decay, key = g[:, t, :, None, None].exp(), beta[:, t, :, None] * k[:, t]
            kk = decay * kk + k[:, t].unsqueeze(-1) * key.unsqueeze(-2)
            kv = decay * kv + key.unsqueeze(-1) * v[:, t].unsqueeze(-2)
            x = torch.linalg.solve(kk.mT + torch.diag_embed(lamb), q[:, t])
            outputs.append(torch.einsum("bhk,bhkv->bhv", x, kv))
        return _stack(outputs, v), (kk, kv)

    return _sequences(definition, (q, k, v, g, beta), initial_state, cu_seqlens)


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    r"""RWKV-4's average: weights ``e^{k_i - (t-1-i) r}`` of earlier tokens, ``e^{u + k_t}`` of the
    token itself; ``r = e^w``.

    Args:
        w, u (Tensor): ``[D]``.
        k, v (Tensor): ``[B, T, D]``.
        initial_state (tuple, optional): numerator, denominator and the logarithm of their scale,
            each ``[N, D]``.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences.

    Returns:
        ``o [B, T, D]`` and the state after the last tokens.

    Source: RWKV, arXiv:2305.13048, appendix on the stable form.
    """
    bounds = [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    N = k.shape[0] if cu_seqlens is None else len(bounds) - 1
    zeros = k.new_zeros(N, k.shape[2])
    state = (zeros, zeros, zeros - torch.inf) if initial_state is None else initial_state
    outputs, ends = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        a, b, m = state if cu_seqlens is None else (s[n, None] for s in state)
        for t in range(start, end):
            own = torch.maximum(m, u + k[:, t])
            past, new = (m - own).exp(), (u + k[:, t] - own).exp()
            outputs.append((past * a + new * v[:, t]) / (past * b + new))
            after = torch.maximum(m - w.exp(), k[:, t])
            past, new = (m - w.exp() - after).exp(), (k[:, t] - after).exp()
            a, b, m = past * a + new * v[:, t], past * b + new, after
        ends.append((a, b, m))
    final = tuple(torch.cat(parts) for parts in zip(*ends, strict=True)) if ends else state
    o = torch.stack(outputs, 1) if outputs else v.new_empty(v.shape)
    return o, final  # type: ignore[return-value]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = None,
    state_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Depthwise causal convolution: ``y_t = act(bias + Σ_j weight[:, W − 1 − j] ⊙ x_{t−j})``.

    Args:
        x: ``[B, T, D]``.
        weight: ``[D, W]``; the last tap weighs the current token.
        bias: ``[D]``, default zeros.
        initial_state: ``[N, D, S]``, S ≥ W − 1: the inputs before the first, default zeros.
        cu_seqlens: as :func:`gated_linear_attention`.
        activation: ``silu`` or None.
        state_size: S of the state returned, default W.

    Returns:
        ``y [B, T, D]`` and the last S inputs ``[N, D, S]``.

    Source: Dao-AILab's causal-conv1d; Mamba, arXiv:2312.00752, section 3.4.
    """
    if cu_seqlens is not None:
        runs = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            h0 = None if initial_state is None else initial_state[n : n + 1]
            runs.append(
                causal_conv1d(
                    x[:, start:end], weight, bias, h0, activation=activation, state_size=state_size
                )
            )
        return torch.cat([y for y, _ in runs], 1), torch.cat([s for _, s in runs])
    W = weight.shape[1]
    S = W if state_size is None else state_size
    before = x.new_zeros(x.shape[0], x.shape[2], max(S, W))
    if initial_state is not None:
        before = torch.cat([before, initial_state.to(x.dtype)], 2)
    inputs = torch.cat([before.transpose(1, 2), x], 1)
    outputs = []
    for t in range(inputs.shape[1] - x.shape[1], inputs.shape[1]):
        y = (inputs[:, t - W + 1 : t + 1] * weight.T).sum(1)
        y = y if bias is None else y + bias
        outputs.append(y if activation is None else silu(y))
    return _stack(outputs, x), inputs[:, inputs.shape[1] - S :].transpose(1, 2)


def slstm(
    x: Tensor,
    R: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gates i, f, z, o of ``x_t + h_{t−1} R``: ``m_t = max(log σ(f) + m_{t−1}, i)``,
    ``c_t = e^{log σ(f) + m_{t−1} − m_t} c_{t−1} + e^{i − m_t} tanh z``, n_t the same of 1, ``h_t =
    σ(o) c_t / n_t``; where ``n_{t−1} = 0`` there is no past.

    Args: x ``[B, T, 4, H, D]``, R ``[H, D, 4, D]``, states h, c, n, m ``[N, 4, H, D]``.

    Returns:
        ``h [B, T, H, D]`` and the state after the last token.

    Source: xLSTM, arXiv:2405.04517, eqs. 8-18.
    """

    def definition(x, state):  # type: ignore[no-untyped-def]
        B, T, _, H, D = x.shape
        zero = x.new_zeros(B, H, D)
        h, c, n, m = (zero,) * 4 if state is None else state[0].to(x.dtype).unbind(1)
        outputs = []
        for t in range(T):
            i, f, z, o = (x[:, t] + torch.einsum("bhd,hdge->bghe", h, R)).unbind(1)
            carried = torch.where(n == 0, -torch.inf, logsigmoid(f) + m)
            m = torch.maximum(carried, i)
            keep, write = (carried - m).exp(), (i - m).exp()
            c, n = keep * c + write * z.tanh(), keep * n + write
            h = o.sigmoid() * c / n
            outputs.append(h)
        return _stack(outputs, zero[:, None].expand(B, 0, H, D)), (torch.stack((h, c, n, m), 1),)

    states = None if initial_state is None else (initial_state,)
    h, (state,) = _sequences(definition, (x,), states, cu_seqlens)
    return h, state


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mamba-1: ``h_t = exp(δ_t A) ⊙ h_{t-1} + δ_t u_t B_t``, ``y_t = (C_t · h_t + D u_t)
    silu(z_t)``; time before channels.

    Args:
        u, dt, z (Tensor): ``[B, T, D]``; to dt its bias ``[D]`` is added and softplus applied if
            asked.
        A (Tensor): ``[D, N]``; complex: y has ``2 Re(C_t · h_t)``.
        B, C (Tensor): ``[B, T, G, N]``, channel d in group ``d // (D // G)``; or ``[D, N]``.
        D (Tensor, optional): ``[D]``.
        initial_state (Tensor, optional): ``[Nseq, D, N]``.
        cu_seqlens (Tensor, optional): ``[Nseq + 1]`` boundaries of packed sequences.

    Returns:
        ``y [B, T, D]`` and the final state ``[Nseq, D, N]``.

    Source: Mamba, arXiv:2312.00752.
    """
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    bounds = [0, u.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    channels = u.shape[2]

    def at(t: int, x: Tensor) -> Tensor:
        """B or C of a token, for every channel."""
        return x if x.dim() == 2 else x[:, t].repeat_interleave(channels // x.shape[2], 1)

    outputs, final = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        h = A.new_zeros(u.shape[0], *A.shape)
        if initial_state is not None:
            h = initial_state if cu_seqlens is None else initial_state[n, None]
        for t in range(start, end):
            drive = (dt[:, t] * u[:, t]).unsqueeze(-1)
            h = (dt[:, t].unsqueeze(-1) * A).exp() * h + drive * at(t, B)
            y = (at(t, C) * h).sum(-1)
            outputs.append(2 * y.real if y.is_complex() else y)
        final.append(h)
    y = torch.stack(outputs, 1) if outputs else u.new_empty(u.shape)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * silu(z)
    return y, torch.cat(final) if final else A.new_empty(0, *A.shape)
