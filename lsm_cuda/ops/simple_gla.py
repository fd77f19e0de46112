"""One decay per head and token, or one per head: the scalar form of gated linear attention."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _chunk
from ._common import accumulation_dtype, backwards, check_shape

__all__ = [
    "chunk_simple_gla",
    "fused_chunk_simple_gla",
    "fused_recurrent_simple_gla",
    "parallel_simple_gla",
    "simple_gla_step",
]


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Gated linear attention with one decay per head, over whole sequences.

    ``S_t = e^{g_t} S_{t-1} + k_t v_tᵀ``,   ``o_t = scale · S_tᵀ q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        g (Tensor, optional): log decay ``[B, T, HV]``, natural log, ≤ 0, in the dtype of q or
            fp32; ``-inf`` resets. Default: no decay.
        g_gamma (Tensor, optional): log decay ``[HV]``, the same for every token, instead of g.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        state_v_first (bool): states are ``[N, HV, V, K]`` instead.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of N sequences packed into one row,
            as in :func:`chunk_gla`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        ValueError: both g and g_gamma.
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in q, k, v, g, g_gamma and initial_state; deterministic.

    Source: Mamba-2, arXiv:2405.21060 (g of the token); RetNet, arXiv:2307.08621 (g of the head).

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 2))
        >>> o, state = chunk_simple_gla(q, k, v, g, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    gate = decay_of("chunk_simple_gla", q, v, g, g_gamma)
    name = "linear_attn" if gate is None else "simple_gla"
    return _chunk.chunk(
        name, q, k, v, gate, scale, initial_state, output_final_state, cu_seqlens, state_v_first
    )


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """FLA's second name for :func:`chunk_simple_gla`."""
    return chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, False, cu_seqlens
    )


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_simple_gla` under FLA's recurrent name; ``reverse`` runs time backwards in every
    sequence, from its end, which reads and writes q, k, v, g and o once more."""

    if reverse:
        return backwards(
            chunk_simple_gla, (q, k, v, g), initial_state, cu_seqlens, g_gamma=g_gamma,
            scale=scale, output_final_state=output_final_state, state_v_first=state_v_first,
        )  # fmt: skip
    return chunk_simple_gla(
        q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens
    )


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_simple_gla` under FLA's quadratic name; the matrix that o is a product with is
    formed only if asked for.

    Args: as :func:`chunk_simple_gla`;
        output_attentions (bool): also return ``[B, HV, T, T]``, ``scale · q_t·k_s e^{G_t − G_s}``
            for s ≤ t, else 0.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the matrix or None.

    Raises:
        ValueError: output_attentions with cu_seqlens.
    """
    o, _ = chunk_simple_gla(q, k, v, g, None, scale, cu_seqlens=cu_seqlens)
    if not output_attentions:
        return o, None
    if cu_seqlens is not None:
        raise ValueError(
            "lsm::parallel_simple_gla: output_attentions with cu_seqlens is not supported; "
            "call it per sequence"
        )
    (T, H, K), HV = q.shape[1:], v.shape[2]
    scale = K**-0.5 if scale is None else scale
    scores = torch.einsum("bthk,bshk->bhts", q, k).repeat_interleave(HV // H, 1) * scale
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if g is not None:
        # sums over windows: differences of running sums lose what a strong gate leaves
        steps = g.transpose(1, 2)[..., None].masked_fill(~seen.tril(-1), 0)
        scores = scores * steps.cumsum(2).exp()
    return o, scores.masked_fill(~seen, 0).to(v.dtype)


def simple_gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float | None = None,
) -> Tensor:
    r"""One token of :func:`chunk_simple_gla`; ``state`` is updated in place, nothing else is
    allocated but the output.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        g (Tensor, optional): log decay ``[B, HV]``, natural log, in the dtype of q or fp32; None
            for no decay.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> simple_gla_step(q, k, v, torch.zeros(1, 2), state).shape
        torch.Size([1, 2, 32])
    """
    name = "linear_attn" if g is None else "simple_gla"
    return _chunk.step(name, q, k, v, g, state, scale, "chunk_simple_gla")


def decay_of(
    op: str, q: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None
) -> Tensor | None:
    """The gate of the engine: g, or g_gamma seen from every token (strides 0), or None."""
    if g_gamma is None:
        return g
    if g is not None:
        raise ValueError(f"lsm::{op}: pass g or g_gamma, not both")
    check_shape(op, "g_gamma", g_gamma, "[HV]", v.shape[-2:-1])
    return g_gamma.to(q.device, accumulation_dtype(q)).expand(v.shape[:-1])
