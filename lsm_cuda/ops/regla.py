"""ReGLA: gated linear attention with exponential feature maps and a gate that does not saturate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import _chunk
from ._common import (
    accumulation_dtype,
    check_in_place,
    check_no_forward_ad,
    check_no_gradient,
    check_rank,
    check_shape,
    check_state,
)
from ._running import bounds

__all__ = ["chunk_regla", "log_refined_gate", "regla_step"]

_SATURATED = 60.0  # e^-60 is nothing beside what any of the formats resolves


class _LogRefinedGate(torch.autograd.Function):
    """Both directions in closed form: all terms positive, and nothing but g and r is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, r: Tensor) -> Tensor:
        dtype = accumulation_dtype(g)
        a, b = (x.to(dtype).clamp(-_SATURATED, _SATURATED) for x in (g, r))
        on, off = a.sigmoid(), (-a).sigmoid()
        lost = off * (off + 2 * on * (-b).sigmoid())  # 1 - F
        kept = logsigmoid(a) + (on + 2 * b.sigmoid() * off).log()  # log F
        return torch.where(lost < 0.5, (-lost).log1p(), kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        g, r = ctx.saved_tensors
        a, b = (x.to(grad.dtype).clamp(-_SATURATED, _SATURATED) for x in (g, r))
        on, off, refine, keep = a.sigmoid(), (-a).sigmoid(), b.sigmoid(), (-b).sigmoid()
        by = 2 * grad * off / (on + 2 * refine * off)
        return (by * (on * keep + refine * off)).to(g.dtype), (by * refine * keep).to(r.dtype)


def log_refined_gate(g: Tensor, r: Tensor) -> Tensor:
    r"""``log F`` of ReGLA's gate ``F = (1 - r) g² + r (1 - (1 - g)²)``, g and r before their
    sigmoids.

    Args:
        g, r (Tensor): of one shape; any floating dtype.

    Returns:
        ``log F``, natural log, ≤ 0, in fp32 (fp64 for fp64). Relatively exact at both ends; logits
        beyond ±60 count as ±60.

    Source: ReGLA: Refining Gated Linear Attention, arXiv:2502.01578.

    Example:
        >>> log_refined_gate(torch.zeros(1), torch.zeros(1)).exp()
        tensor([0.5000])
    """
    check_shape("log_refined_gate", "r", r, "that of g", g.shape)
    check_no_forward_ad("log_refined_gate", g=g, r=r)
    return _LogRefinedGate.apply(g, r)  # type: ignore[no-any-return, no-untyped-call]


def _query_map(q: Tensor, K: int, scale: float | None) -> tuple[Tensor, float]:
    """``exp(q - max q)`` and the scale that gives products of two such maps unit variance."""
    default = 1 / (math.e * (K * (math.e**2 - 1)) ** 0.5)
    x = q.to(accumulation_dtype(q))
    mapped = (x - x.detach().amax(-1, keepdim=True)).exp().to(q.dtype)
    return mapped, default if scale is None else scale


def chunk_regla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    shift: float | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    r"""ReGLA over whole sequences, up to the norm that follows it.

    ``S_t = Diag(F_t) S_{t-1} + φ(k_t) v_tᵀ``,   ``o_t = scale · S_tᵀ exp(q_t - max q_t)``,
    ``F_t = (1 - r_t) g_t² + r_t (1 - (1 - g_t)²)``, g and r after their sigmoids.

    The paper's ``φ(k) = exp(k - c)`` subtracts the maximum c of all keys of the sequence, later
    ones too. Here c_t runs: it is the least integer that no channel of a key up to t exceeds, and
    when it rises, what the state holds is decayed to it. So o_t is the paper's up to a positive
    factor per token and head, which the norm behind it cancels; no gradient flows into c. Or
    ``shift`` fixes c, and keys must stay below it by themselves.

    Args:
        q (Tensor): queries before their feature map ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too
            on CPU).
        k (Tensor): keys before their feature map ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, H, V]``.
        g (Tensor): gate before its sigmoid ``[B, T, H, K]``.
        r (Tensor): refining gate before its sigmoid ``[B, T, H, K]``.
        scale (float, optional): default ``1 / (e sqrt(K (e² - 1)))``, the paper's.
        initial_state (tuple, optional): S ``[N, H, K, V]`` and c ``[N, H]``, fp32 (fp64 for fp64
            inputs). Default: zeros, and a c below every key.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        shift (float, optional): a fixed c instead of a running one.

    Returns:
        ``o [B, T, H, V]`` in the dtype of v, and the final (S, c) or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in q, k, v, g, r and S; deterministic. Outside the kernel the two
        feature maps and the log of the gate (fp32) are written once, ``[B, T, H, K]`` each; the
        running shift scans one number per token and head.

    Source: ReGLA: Refining Gated Linear Attention, arXiv:2502.01578.

    Example:
        >>> q, k, v, g, r = torch.randn(5, 1, 100, 2, 32)
        >>> o, (S, c) = chunk_regla(q, k, v, g, r, output_final_state=True)
        >>> o.shape, S.shape, c.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]), torch.Size([1, 2]))
    """
    op = "chunk_regla"
    check_rank(op, "q", q, "[B, T, H, K]")
    for name, x in (("k", k), ("g", g), ("r", r)):
        check_shape(op, name, x, "[B, T, H, K]", q.shape)
    check_shape(op, "v", v, "[B, T, H, V]", (*q.shape[:-1], v.shape[-1]))
    check_state(op, initial_state, "S", "c")
    S, c = (None, None) if initial_state is None else initial_state
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if c is not None:
        check_shape(op, "c", c, "[N, H]", (N, q.shape[2]))
    decay = log_refined_gate(g, r)
    if shift is None:
        bound, fall, _, last = bounds(k.detach().amax(-1), c, cu_seqlens)
        decay = decay + fall.unsqueeze(-1)
        keys = (k.to(decay.dtype) - bound.unsqueeze(-1)).exp()
    else:
        keys, last = (k.to(decay.dtype) - shift).exp(), decay.new_full((N, q.shape[2]), shift)
    mapped, scale = _query_map(q, q.shape[-1], scale)
    o, S = _chunk.chunk(
        "gla", mapped, keys.to(k.dtype), v, decay, scale, S, output_final_state, cu_seqlens
    )
    return o, None if S is None else (S, last)


def regla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r: Tensor,
    state: tuple[Tensor, Tensor],
    scale: float | None = None,
    shift: float | None = None,
) -> Tensor:
    r"""One token of ReGLA; ``state`` is updated in place.

    Args:
        q, k, g, r (Tensor): ``[B, H, K]``, before feature maps and sigmoids.
        v (Tensor): ``[B, H, V]``.
        state (tuple): S ``[B, H, K, V]``, contiguous, and c ``[B, H]`` (``-inf`` before the first
            token; unused with ``shift``), fp32 (fp64 for fp64 inputs), updated in place.
        scale (float, optional): as in :func:`chunk_regla`.
        shift (float, optional): as in :func:`chunk_regla`.

    Returns:
        ``o [B, H, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`chunk_regla` where gradients are needed.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32), torch.full((1, 2), -torch.inf)
        >>> q, k, v, g, r = torch.randn(5, 1, 2, 32)
        >>> regla_step(q, k, v, g, r, state).shape
        torch.Size([1, 2, 32])
    """
    op = "regla_step"
    S, c = state
    check_no_gradient(op, "chunk_regla", q, k, v, g, r, S, c)
    check_rank(op, "q", q, "[B, H, K]")
    for name, x in (("k", k), ("g", g), ("r", r)):
        check_shape(op, name, x, "[B, H, K]", q.shape)
    decay = log_refined_gate(g, r)
    if shift is None:
        check_in_place(op, "c", c, "[B, H]", q.shape[:2], q)
        bound, fall, _, c_t = bounds(k.amax(-1).unsqueeze(1), c, None)
        decay = decay + fall[:, 0].unsqueeze(-1)
        keys = (k.to(decay.dtype) - bound[:, 0].unsqueeze(-1)).exp()
    else:
        keys, c_t = (k.to(decay.dtype) - shift).exp(), c
    mapped, scale = _query_map(q, q.shape[-1], scale)
    o = _chunk.step("gla", mapped, keys.to(k.dtype), v, decay, S, scale, "chunk_regla")
    c.copy_(c_t)
    return o
