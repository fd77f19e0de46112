"""Diagonal plus low rank transitions, and RWKV-7, which has one."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ._common import backwards
from ._delta import delta, delta_step

__all__ = [
    "chunk_dplr_delta_rule",
    "chunk_iplr_delta_rule",
    "chunk_rwkv7",
    "dplr_delta_rule_step",
    "fused_mul_recurrent_rwkv7",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_iplr_delta_rule",
    "fused_recurrent_rwkv7",
    "iplr_delta_rule_step",
    "rwkv7_step",
]


def chunk_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""A decay per key channel and a rank-one term, over whole sequences.

    ``S_t = (Diag(exp gk_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``,   ``o_t = scale · S_tᵀ q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            head ``h // (HV // H)`` of q, k, a and b.
        a (Tensor): what is read from the state before the decay, ``[B, T, H, K]``.
        b (Tensor): where it is written to, ``[B, T, H, K]``.
        gk (Tensor): log decay ``[B, T, HV, K]``, natural log, ≤ 0, in the dtype of q or fp32.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        safe_gate (bool), chunk_size (int, optional), lower_bound (float, optional): what FLA's
            kernels may assume; without meaning here, where any gate is safe.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in all tensors but cu_seqlens; deterministic. The gated delta rule is
        this with ``a = −e^{g} k``, ``b = β k`` and ``β v`` for v: it reads the decayed state.

    Source: RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv:2503.14456, section 3.

    Example:
        >>> q, k, v, a, b = (torch.randn(1, 100, 2, 32) / 6 for _ in range(5))
        >>> o, state = chunk_dplr_delta_rule(q, k, v, -a, a, -b.abs(), output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    return delta("dplr", q, k, v, (a, b, gk), scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_dplr_delta_rule` under FLA's recurrent name; ``reverse`` runs time backwards."""
    if reverse:
        return backwards(
            partial(chunk_dplr_delta_rule, scale=scale), (q, k, v, a, b, gk), initial_state,
            cu_seqlens, output_final_state=output_final_state,
        )  # fmt: skip
    return chunk_dplr_delta_rule(
        q, k, v, a, b, gk, scale, initial_state, output_final_state, cu_seqlens
    )


def dplr_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gk: Tensor,
    state: Tensor,
    scale: float | None = None,
) -> Tensor:
    r"""One token of :func:`chunk_dplr_delta_rule`; ``state`` is updated in place.

    Args:
        q, k, a, b (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        gk (Tensor): log decay ``[B, HV, K]``, natural log, in the dtype of q or fp32.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v, a, b = (torch.randn(1, 2, 32) for _ in range(5))
        >>> dplr_delta_rule_step(q, k, v, a, b, -torch.ones(1, 2, 32), state).shape
        torch.Size([1, 2, 32])
    """
    return delta_step("dplr", q, k, v, (a, b, gk), state, scale, "chunk_dplr_delta_rule")


def chunk_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_dplr_delta_rule` without a decay: identity plus low rank.

    Example:
        >>> q, k, v, a = (torch.randn(1, 100, 2, 32) / 6 for _ in range(4))
        >>> chunk_iplr_delta_rule(q, k, v, -a, a)[0].shape
        torch.Size([1, 100, 2, 32])
    """
    own = (a, b, None)
    return delta("dplr", q, k, v, own, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_iplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_iplr_delta_rule` under FLA's recurrent name; one kernel serves both."""
    return chunk_iplr_delta_rule(
        q, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens
    )


def iplr_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    scale: float | None = None,
) -> Tensor:
    """:func:`dplr_delta_rule_step` without a decay."""
    return delta_step("dplr", q, k, v, (a, b, None), state, scale, "chunk_iplr_delta_rule")


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""RWKV-7 over whole sequences: :func:`chunk_dplr_delta_rule` under its names.

    ``S_t = (Diag(exp w_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ``,   ``o_t = scale · S_tᵀ r_t``; in the
    model ``a = −κ̂`` and ``b = κ̂ ⊙ η``, with the unit key κ̂ and the learning rates η of channels.

    Args:
        r (Tensor): receptances ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        w (Tensor): log decay ``[B, T, HV, K]``, natural log, ≤ 0, in the dtype of r or fp32.
        k, a, b (Tensor): ``[B, T, H, K]``.
        v (Tensor): ``[B, T, HV, V]``, HV a multiple of H.
        scale (float, optional): None for ``K ** -0.5``. Default: 1.
        initial_state, output_final_state, cu_seqlens, safe_gate, chunk_size, lower_bound: as in
            :func:`chunk_dplr_delta_rule`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Source: RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv:2503.14456.

    Example:
        >>> r, k, v, kk = (torch.randn(1, 100, 2, 32) / 6 for _ in range(4))
        >>> w = -0.6 * torch.rand(1, 100, 2, 32)
        >>> chunk_rwkv7(r, w, k, v, -kk, kk * 0.5)[0].shape
        torch.Size([1, 100, 2, 32])
    """
    return chunk_dplr_delta_rule(
        r, k, v, a, b, w, scale, initial_state, output_final_state, cu_seqlens
    )


def fused_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_rwkv7` under FLA's recurrent name, whose scale is ``K ** -0.5`` by default."""
    return chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens)


def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_rwkv7` with ``−kk`` for a and ``kk ⊙ a`` for b; ``reverse`` runs time
    backwards."""
    return fused_recurrent_dplr_delta_rule(
        r, k, v, -kk, kk * a, w, scale, initial_state, output_final_state, reverse, cu_seqlens
    )


def rwkv7_step(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    scale: float | None = 1.0,
) -> Tensor:
    """One token of :func:`chunk_rwkv7`: r, k, a, b ``[B, H, K]``, w ``[B, HV, K]``, v ``[B, HV,
    V]``, state ``[B, HV, K, V]``, updated in place. Returns ``[B, HV, V]``."""
    return delta_step("dplr", r, k, v, (a, b, w), state, scale, "chunk_rwkv7")
