"""The delta engine: the state forgets along a direction before it takes in a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import each_token, outer, rank_one, sequences, stack


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
        B, _, _, K = q.shape
        S = q.new_zeros(B, HV, K, V) if states is None else states[0].to(q.dtype)
        outputs = []
        for q_t, g_t, *steps in each_token(q, g, k, v, beta):
            if g is not None:
                S = S * g_t.exp()
            for key, value, rate in each_token(*steps):
                error = value - (key.unsqueeze(-1) * S).sum(-2)
                S = S + outer(key, rate * error)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, S))
        return stack(outputs, v[:, :, 0]), (S,)

    states = None if initial_state is None else (initial_state,)
    o, (S,) = sequences(definition, (q, k, v, g, beta), states, cu_seqlens)
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
        return S * g[..., None, None].exp() + outer(k, beta * error)

    return rank_one(update, q, (v, k, p, g, beta), scale, initial_state, cu_seqlens)


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
        return kept + outer(b, read) + outer(k, v)

    return rank_one(update, q, (v, k, a, b, g), scale, initial_state, cu_seqlens)


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
        B, _, HV, K = q.shape
        S = q.new_zeros(B, HV, K, v.shape[-1]) if states is None else states[0]
        outputs = []
        for q_t, k_t, v_t, beta_t in each_token(q, k, v, beta):
            key = k_t.unsqueeze(-1)
            rate = beta_t / (1 + beta_t * (key**2).sum(-2))
            held = key * S if diagonal else (key * S).sum(-2, keepdim=True)
            S = S + key * rate.unsqueeze(-2) * (v_t.unsqueeze(-2) - held)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, S))
        return stack(outputs, v), (S,)

    states = None if initial_state is None else (initial_state,)
    o, (S,) = sequences(definition, (q, k, v, beta), states, cu_seqlens)
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
        B, _, H, K = q.shape
        kk, kv = q.new_zeros(B, H, K, K), q.new_zeros(B, H, K, v.shape[-1])
        if states is not None:
            kk, kv = states
        outputs = []
        for q_t, k_t, v_t, g_t, beta_t in each_token(q, k, v, g, beta):
            decay, key = g_t[..., None, None].exp(), beta_t[..., None] * k_t
            kk = decay * kk + outer(k_t, key)
            kv = decay * kv + outer(key, v_t)
            x = torch.linalg.solve(kk.mT + torch.diag_embed(lamb), q_t)
            outputs.append(torch.einsum("bhk,bhkv->bhv", x, kv))
        return stack(outputs, v), (kk, kv)

    return sequences(definition, (q, k, v, g, beta), initial_state, cu_seqlens)
