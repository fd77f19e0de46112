"""The chunk engine: linear attention with a diagonal decay, whole sequences and single tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _chunk
from ._common import backwards

__all__ = ["chunk_gla", "fused_chunk_gla", "fused_recurrent_gla", "gla_step"]


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    gv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Gated linear attention over whole sequences.

    ``S_t = Diag(exp g_t) S_{t-1} Diag(exp gv_t) + k_t v_tᵀ``,   ``o_t = scale · S_tᵀ q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        g (Tensor, optional): log decay of the key channels ``[B, T, HV, K]``, natural log, ≤ 0, in
            the dtype of q or fp32; ``-inf`` resets. Default: none.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        state_v_first (bool): states are ``[N, HV, V, K]`` instead.
        cu_seqlens (Tensor, optional): ``[N + 1]`` int32 or int64 boundaries of N sequences packed
            into one row (``B == 1``), on the device of q: starts at 0, never decreases, ends at T.
            On a GPU it is checked on the device, without synchronising: outputs of a call whose
            boundaries are wrong are NaN.
        gv (Tensor, optional): log decay of the value channels ``[B, T, HV, V]``, like g. Default:
            none.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in q, k, v, the gates and initial_state; deterministic. Under autocast
        q, k and v are cast, gates and state keep their dtype. With both gates CUDA runs the exact
        recurrence in every dtype: tensor cores take gates on one side only.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635;
    both gates: Fine-Tuning Pre-trained Transformers into Decaying Fast Weights, arXiv:2210.04243.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 2, 32)) / 16
        >>> o, state = chunk_gla(q, k, v, g, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    name, first, second = _gates(g, gv)
    return _chunk.chunk(
        name, q, k, v, first, scale, initial_state, output_final_state, cu_seqlens, state_v_first,
        gv=second,
    )  # fmt: skip


def _gates(g: Tensor | None, gv: Tensor | None) -> tuple[str, Tensor | None, Tensor | None]:
    """The operator for these gates, and its own."""
    if gv is None:
        return ("linear_attn" if g is None else "gla"), g, None
    if g is None:
        return "gla_value", gv, None
    if g.dtype != gv.dtype:  # what rounds neither; the operator tells q's dtype or fp32
        g, gv = g.to(dtype := torch.promote_types(g.dtype, gv.dtype)), gv.to(dtype)
    return "gla_both", g, gv


def fused_chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """FLA's third name for :func:`chunk_gla`; one kernel serves them all."""
    return chunk_gla(q, k, v, g, scale, initial_state, output_final_state)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gla` under FLA's recurrent name; ``reverse`` runs time backwards.

    Args: as :func:`chunk_gla`; ``gk`` is its ``g``.
    """
    if not reverse:
        return chunk_gla(
            q, k, v, gk, scale, initial_state, output_final_state, state_v_first, cu_seqlens, gv
        )

    def run(q, k, v, gk, gv, **rest):  # type: ignore[no-untyped-def]
        return chunk_gla(q, k, v, gk, scale, gv=gv, state_v_first=state_v_first, **rest)

    return backwards(
        run, (q, k, v, gk, gv), initial_state, cu_seqlens, output_final_state=output_final_state
    )


def gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float | None = None,
    gv: Tensor | None = None,
) -> Tensor:
    r"""One token of gated linear attention; ``state`` is updated in place, nothing else is
    allocated but the output.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        g (Tensor, optional): log decay of the key channels ``[B, HV, K]``, natural log, in the
            dtype of q or fp32.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.
        gv (Tensor, optional): log decay of the value channels ``[B, HV, V]``, like g.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`chunk_gla` where gradients are needed.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> gla_step(q, k, v, torch.zeros(1, 2, 32), state).shape
        torch.Size([1, 2, 32])
    """
    name, first, second = _gates(g, gv)
    return _chunk.step(name, q, k, v, first, state, scale, "chunk_gla", second)
