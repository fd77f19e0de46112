"""Second definitions of the operators, as far from lsm_cuda.reference as the mathematics allows.

A recurrence and a masked matrix product share no line, so an error in one reading of the
equations shows here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gv: Tensor | None = None,
    side: str = "key",
    exclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention with a decay: ``o_t = scale · Σ_{s≤t} Σ_c q_tc k_sc e^{G_t − G_s} v_s``.

    The decay between two tokens is a sum of gates over a window, taken directly (a difference of
    running sums loses what a strong gate leaves); the initial state is one more key and value row
    per channel before the first token. ``g`` has the channels of the key or, with ``side`` "value",
    of the value; without channels it is one gate per head; None is no gate. ``gv`` is one more,
    of the value. ``exclusive`` reads the state of the token before: ``s < t`` and ``G_{t-1}``.
    """
    if cu_seqlens is not None:
        pieces = []
        for n, (start, end) in enumerate(cu_seqlens.unfold(0, 2, 1).tolist()):
            state = None if initial_state is None else initial_state[n, None]
            q_, k_, v_, g_, gv_ = (None if x is None else x[:, start:end] for x in (q, k, v, g, gv))
            pieces.append(quadratic(q_, k_, v_, g_, scale, state, None, gv_, side, exclusive))
        return torch.cat([o for o, _ in pieces], 1), torch.cat([s for _, s in pieces])
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    group = torch.arange(HV, device=q.device) // (HV // H)
    q, k = q[:, :, group], k[:, :, group]
    nothing = v.new_zeros(B, T, HV, 1)
    g = nothing if g is None else g[..., None] if g.dim() == 3 else g
    of_keys, of_values = (g, nothing) if side == "key" else (nothing, g)
    if gv is not None:
        of_values = gv
    keys, first_key, last_key = _between(of_keys, exclusive)
    values, first_value, last_value = _between(of_values, exclusive)
    scores = torch.einsum("bthk,bshk,bhtsk->bhts", q, k, keys.expand(-1, -1, -1, -1, K))
    o = torch.einsum("bhts,bshv,bhtsv->bthv", scores, v, values.expand(-1, -1, -1, -1, V))
    state = v.new_zeros(B, HV, K, V)
    if T:
        left, right = (
            k.transpose(1, 2) * last_key[:, :, 1:],
            v.transpose(1, 2) * last_value[:, :, 1:],
        )
        state = torch.einsum("bhsk,bhsv->bhkv", left, right)
    if initial_state is not None:
        o = o + torch.einsum("bthk,bhkv->bthv", q * first_key, initial_state) * first_value
        decay = last_key[:, :, 0, :, None] * last_value[:, :, 0, None, :]
        state = state + initial_state * decay
    return o * (K**-0.5 if scale is None else scale), state


def _between(g: Tensor, exclusive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The decay of what token s wrote until t reads it ``[B, HV, t, s, ·]``, 0 where it is not; of
    the initial state until t reads it ``[B, T, HV, ·]``; of the state before token s until the end,
    for s in 0 .. T ``[B, HV, s, ·]``."""
    T = g.shape[1]
    # window[b, h, t, s] = Σ of g over tokens s .. t-1: what decays the state before token s on its
    # way to the state before token t, s and t in 0 .. T
    inside = torch.ones(T + 1, T + 1, dtype=torch.bool, device=g.device).tril(-1)[1:]  # s < t
    steps = torch.where(inside[..., None], g.transpose(1, 2)[:, :, :, None], 0.0)
    window = torch.nn.functional.pad(steps.cumsum(2), (0, 0, 0, 0, 1, 0))
    upto = window[:, :, :T] if exclusive else window[:, :, 1:]  # the state that token t reads
    # token s writes into the state after it
    seen = torch.ones(T, T, dtype=torch.bool, device=g.device).tril(-1 if exclusive else 0)
    decay = torch.where(seen[..., None], upto[:, :, :, 1:], -torch.inf).exp()
    return decay, upto[:, :, :, 0].transpose(1, 2).exp(), window[:, :, T].exp()


def transition_products(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **own: Tensor,
) -> tuple[Tensor, Tensor]:
    """The delta engine with every ``[K, K]`` transition written out: ``S_t = Σ_s A_t ⋯ A_{s+1} w_s
    v_sᵀ``, where A is ``(I − β k kᵀ) D`` or ``D − β k pᵀ`` or ``D + b aᵀ``, w is ``β k`` or k."""
    if cu_seqlens is not None:
        pieces = []
        for n, (start, end) in enumerate(cu_seqlens.unfold(0, 2, 1).tolist()):
            state = None if initial_state is None else initial_state[n, None]
            part = (x[:, start:end] for x in (q, k, v))
            rest = {key: x[:, start:end] for key, x in own.items()}
            pieces.append(transition_products(name, *part, scale, state, None, **rest))
        return torch.cat([o for o, _ in pieces], 1), torch.cat([s for _, s in pieces])
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    group = torch.arange(HV, device=q.device) // (HV // H)
    q, k = q[:, :, group], k[:, :, group]
    g = own.get("g", v.new_zeros(B, T, HV))
    D = torch.diag_embed((g if g.dim() == 4 else g[..., None].expand(B, T, HV, K)).exp())
    if name == "dplr":
        a, b = own["a"][:, :, group], own["b"][:, :, group]
        A, written = D + b[..., :, None] * a[..., None, :], k
    else:
        written = own["beta"][..., None] * k
        if name == "comba":
            A = D - written[..., :, None] * own["p"][:, :, group][..., None, :]
        else:
            A = (torch.eye(K).to(D) - written[..., :, None] * k[..., None, :]) @ D
    # The state as a product of all factors after a write, summed over writes; the initial state is
    # the first of them.
    terms = [v.new_zeros(B, HV, K, V) if initial_state is None else initial_state]
    outputs = []
    for t in range(T):
        terms = [A[:, t] @ term for term in terms]
        terms.append(written[:, t, :, :, None] * v[:, t, :, None, :])
        outputs.append(torch.stack([q[:, t, :, None] @ term for term in terms]).sum(0)[:, :, 0])
    o = torch.stack(outputs, 1) if outputs else v.new_zeros(v.shape)
    return o * (K**-0.5 if scale is None else scale), torch.stack(terms).sum(0)
