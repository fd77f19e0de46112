"""Executable definitions: each operator as its paper writes it, one token at a time, in plain
PyTorch.

Slow on purpose. They run in any floating dtype (fp64 is the truth the tests compare with), on any
device, and are differentiable to any order. Read this file first.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["gated_linear_attention"]


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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        runs = []
        for n, (start, end) in enumerate(pairwise(bounds)):
            h0 = None if initial_state is None else initial_state[n : n + 1]
            qn, kn, vn, gn = (x[:, start:end] for x in (q, k, v, g))
            runs.append(gated_linear_attention(qn, kn, vn, gn, scale, h0))
        if not runs:
            return v.new_empty(v.shape), v.new_empty(0, v.shape[2], q.shape[3], v.shape[3])
        return torch.cat([o for o, _ in runs], 1), torch.cat([s for _, s in runs], 0)

    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    S = q.new_zeros(B, HV, K, V) if initial_state is None else initial_state.to(q.dtype)
    outputs = []
    for t in range(T):
        S = S * g[:, t].exp().unsqueeze(-1) + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, 1) if outputs else v.new_empty(v.shape), S
