"""RWKV-5 and RWKV-6: tokens read the state before their own write, plus a bonus of their own."""

from __future__ import annotations

from functools import partial

from torch import Tensor, addcmul, einsum

from . import _chunk
from ._common import accumulation_dtype, backwards, check_no_gradient, check_rank, check_shape

__all__ = [
    "chunk_rwkv5",
    "chunk_rwkv6",
    "fused_recurrent_rwkv5",
    "fused_recurrent_rwkv6",
    "rwkv5_step",
    "rwkv6_step",
]


def _add_bonus(
    op: str, o: Tensor, r: Tensor, k: Tensor, v: Tensor, u: Tensor, scale: float | None
) -> Tensor:
    """``o + scale · (Σ_c r_c u_c k_c) v``; two tensors of r's size are written and read on the
    way, o and v read once more."""
    H, K, HV = r.shape[-2], r.shape[-1], v.shape[-2]
    scale = K**-0.5 if scale is None else scale
    if u.dim() == 3:
        check_shape(op, "u", u, "[B, HV, K]", (r.shape[0], HV, K))
    else:
        check_shape(op, "u", u, "[HV, K]", (HV, K))
    u = scale * u.to(r.dtype).reshape(*u.shape[:-2], H, HV // H, K)
    weight = einsum("b...hk,bhgk->b...hg" if u.dim() == 4 else "b...hk,hgk->b...hg", r * k, u)
    return addcmul(o, weight.flatten(-2).unsqueeze(-1).to(o.dtype), v.to(o.dtype))


def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""RWKV-6 (Finch) over whole sequences.

    ``o_t = scale · (S_{t-1} + Diag(u) k_t v_tᵀ)ᵀ r_t``,
    ``S_t = Diag(exp w_t) S_{t-1} + k_t v_tᵀ``.

    Args:
        r (Tensor): receptance, the queries, ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            head ``h // (HV // H)`` of r and k.
        w (Tensor): log decay ``[B, T, HV, K]``, natural log, ≤ 0 (the layer's ``-exp(...)``), in
            the dtype of r or fp32.
        u (Tensor): bonus of the own token, ``[HV, K]``, or ``[B, HV, K]``.
        scale (float, optional): default ``K ** -0.5``; the layer uses 1.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in r, k, v, w, u and initial_state; deterministic. The bonus is added
        outside the kernel: it writes and reads two tensors of r's size and passes over o again.

    Source: Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence,
    arXiv:2404.05892.

    Example:
        >>> r, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> w, u = -torch.randn(1, 100, 2, 32).exp(), torch.randn(2, 32)
        >>> o, state = chunk_rwkv6(r, k, v, w, u, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    o, state = _chunk.chunk(
        "rwkv6", r, k, v, w, scale, initial_state, output_final_state, cu_seqlens
    )
    return _add_bonus("chunk_rwkv6", o, r, k, v, u, scale), state


def fused_recurrent_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_rwkv6` under FLA's recurrent name; ``reverse`` runs time backwards."""
    run = partial(chunk_rwkv6, u=u, scale=scale, output_final_state=output_final_state)
    if reverse:
        return backwards(run, (r, k, v, w), initial_state, cu_seqlens)
    return run(r, k, v, w, initial_state=initial_state, cu_seqlens=cu_seqlens)


def rwkv6_step(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    scale: float | None = None,
) -> Tensor:
    r"""One token of RWKV-6; ``state`` is updated in place.

    Args:
        r, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        w (Tensor): log decay ``[B, HV, K]``, natural log.
        u (Tensor): bonus, ``[HV, K]`` or ``[B, HV, K]``, any floating dtype.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`chunk_rwkv6` where gradients are needed.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> r, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> rwkv6_step(r, k, v, -torch.ones(1, 2, 32), torch.ones(2, 32), state).shape
        torch.Size([1, 2, 32])
    """
    check_no_gradient("rwkv6_step", "chunk_rwkv6", r, k, v, w, u, state)
    if u.dtype not in (r.dtype, accumulation_dtype(r)):
        u = u.to(accumulation_dtype(r))
    return _chunk.step("rwkv6", r, k, v, w, state, scale, "chunk_rwkv6", u=u)


def _constant_decay(op: str, w: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``w [HV, K]`` at every token, without a copy."""
    check_rank(op, "w", w, "[HV, K]")
    return w.expand(*shape, -1, -1)


def chunk_rwkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""RWKV-5 (Eagle): :func:`chunk_rwkv6` with a decay that is constant in time.

    Args:
        r, k, v, u, scale, initial_state, output_final_state, cu_seqlens: as :func:`chunk_rwkv6`.
        w (Tensor): log decay ``[HV, K]``, natural log, ≤ 0 (the layer's ``-exp(...)``), in the
            dtype of r or fp32; read at stride 0, never repeated in memory. Its gradient is: with
            gradients, backward writes one ``[B, T, HV, K]`` tensor and sums it.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Source: Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence,
    arXiv:2404.05892.

    Example:
        >>> r, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> o, _ = chunk_rwkv5(r, k, v, -torch.ones(2, 32), torch.ones(2, 32))
        >>> o.shape
        torch.Size([1, 100, 2, 32])
    """
    w = _constant_decay("chunk_rwkv5", w, r.shape[:2])
    return chunk_rwkv6(r, k, v, w, u, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_rwkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_rwkv5` with the arguments of :func:`fused_recurrent_rwkv6`."""
    w = _constant_decay("fused_recurrent_rwkv5", w, r.shape[:2])
    return fused_recurrent_rwkv6(
        r, k, v, w, u, scale, initial_state, output_final_state, reverse, cu_seqlens
    )


def rwkv5_step(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    scale: float | None = None,
) -> Tensor:
    """One token of RWKV-5: :func:`rwkv6_step` with a log decay ``w [HV, K]``.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> r, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> rwkv5_step(r, k, v, -torch.ones(2, 32), torch.ones(2, 32), state).shape
        torch.Size([1, 2, 32])
    """
    return rwkv6_step(r, k, v, _constant_decay("rwkv5_step", w, r.shape[:1]), u, state, scale)
