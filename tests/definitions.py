"""Second definitions of the operators, as far from lsm_cuda.reference as the mathematics allows.

A recurrence and a masked matrix product share no line, so an error in one reading of the
equations shows here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quadratic_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with a decay: ``o_t = scale · Σ_{s≤t} (Σ_c q_tc k_sc exp(G_tc − G_sc)) v_s``.

    The decay between two tokens is a sum of gates over a window, taken directly (a difference of
    running sums loses what a strong gate leaves); the initial state is one more key and value row
    per channel before the first token.
    """
    if cu_seqlens is not None:
        pieces = []
        for n, (start, end) in enumerate(cu_seqlens.unfold(0, 2, 1).tolist()):
            state = None if initial_state is None else initial_state[n, None]
            pieces.append(quadratic_gla(*(x[:, start:end] for x in (q, k, v, g)), scale, state))
        return torch.cat([o for o, _ in pieces], 1), torch.cat([s for _, s in pieces])
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    group = torch.arange(HV, device=q.device) // (HV // H)
    q, k = q[:, :, group], k[:, :, group]
    # between[b, h, t, s, c] = Σ of g over tokens s+1 .. t, by a running sum that starts anew at
    # every s
    ahead = torch.ones(T, T, dtype=torch.bool, device=q.device).tril(-1)  # t > s
    window = torch.where(ahead[..., None], g.transpose(1, 2)[:, :, :, None], 0.0)
    between = window.cumsum(2)
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    decay = torch.where(causal[..., None], between, -torch.inf).exp()
    scores = torch.einsum("bthk,bshk,bhtsk->bhts", q, k, decay)
    o = torch.einsum("bhts,bshv->bthv", scores, v)
    from_start = g.cumsum(1).exp()  # decay from before the first token to t
    state = v.new_zeros(B, HV, K, V)
    if T:
        state = torch.einsum("bhsk,bshk,bshv->bhkv", decay[:, :, -1], k, v)
    if initial_state is not None:
        o = o + torch.einsum("bthk,bthk,bhkv->bthv", q, from_start, initial_state)
        to_end = from_start[:, -1] if T else torch.ones_like(initial_state[..., 0])
        state = state + to_end[..., None] * initial_state
    return o * (K**-0.5 if scale is None else scale), state
