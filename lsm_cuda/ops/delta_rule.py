"""The delta rule: what a key holds is corrected, not added to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ._common import accumulation_dtype
from ._delta import delta, delta_step
from .gates import unit_rows

__all__ = [
    "chunk_delta_rule",
    "chunk_fwp",
    "delta_rule_step",
    "fused_chunk_delta_rule",
    "fused_recurrent_delta_rule",
    "fwp_step",
]


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""The delta rule over whole sequences.

    ``S_t = S_{t-1} + k_t (β_t (v_t − S_{t-1}ᵀ k_t))ᵀ``,   ``o_t = scale · S_tᵀ q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``. The rule is stable for ``β |k|² ≤ 2``; it is computed as
            written for any others.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        beta (Tensor): writing strength ``[B, T, HV]``, or ``[B, T, HV, V]`` for one per value
            channel, in the dtype of q or fp32.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        use_qk_l2norm_in_kernel (bool): divide q and k by ``sqrt(|·|² + 1e-6)`` first.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in q, k, v, beta and initial_state; deterministic.

    Source: Parallelizing Linear Transformers with the Delta Rule over Sequence Length,
        arXiv:2406.06484; DeltaNet itself: arXiv:2102.11174.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> beta = torch.rand(1, 100, 2)
        >>> o, state = chunk_delta_rule(
        ...     q, k, v, beta, output_final_state=True, use_qk_l2norm_in_kernel=True
        ... )
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    if use_qk_l2norm_in_kernel:
        q, k = unit_rows(q, k)
    return delta(
        "delta_rule", q, k, v, (beta,), scale, initial_state, output_final_state, cu_seqlens
    )


def fused_chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """FLA's third name for :func:`chunk_delta_rule`; one kernel serves them all."""
    return chunk_delta_rule(
        q, k, v, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_delta_rule` under FLA's recurrent name; without beta, it is 1."""
    return chunk_delta_rule(
        q, k, v, ones_like_heads(v) if beta is None else beta, scale, initial_state,
        output_final_state, use_qk_l2norm_in_kernel, cu_seqlens,
    )  # fmt: skip


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    r"""One token of :func:`chunk_delta_rule`; ``state`` is updated in place.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        beta (Tensor): ``[B, HV]`` or ``[B, HV, V]``, in the dtype of q or fp32.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.
        use_qk_l2norm_in_kernel (bool): as in :func:`chunk_delta_rule`.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> delta_rule_step(q, k, v, torch.ones(1, 2), state).shape
        torch.Size([1, 2, 32])
    """
    if use_qk_l2norm_in_kernel:
        q, k = unit_rows(q, k)
    return delta_step("delta_rule", q, k, v, (beta,), state, scale, "chunk_delta_rule")


def chunk_fwp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    nu: int = 1,
) -> tuple[Tensor, Tensor | None]:
    r"""Fast weight programmer: the delta rule on deterministic parameter-free projections (DPFP) of
    queries and keys, each divided by its sum.

    Args:
        q, k (Tensor): ``[B, T, H, K]``, mapped to ``2 · nu · K`` channels that are not negative.
        v, beta, initial_state, output_final_state, cu_seqlens: as in :func:`chunk_delta_rule`.
        scale (float, optional): None for the root of the mapped width. Default: 1.
        nu (int): products of neighbours at distances 1 to nu.

    Returns:
        ``o [B, T, HV, V]``, and the final state ``[N, HV, 2 · nu · K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: a token none of whose products is positive is a zero row, which reads and writes nothing.

    Source: Linear Transformers Are Secretly Fast Weight Programmers, arXiv:2102.11174.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> chunk_fwp(q, k, v, torch.rand(1, 100, 2))[0].shape
        torch.Size([1, 100, 2, 16])
    """
    return chunk_delta_rule(
        sum_normalized_dpfp(q, nu), sum_normalized_dpfp(k, nu), v, beta, scale, initial_state,
        output_final_state, False, cu_seqlens,
    )  # fmt: skip


def fwp_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = 1.0,
    nu: int = 1,
) -> Tensor:
    """One token of :func:`chunk_fwp`: q, k ``[B, H, K]``, v ``[B, HV, V]``, beta ``[B, HV]``, state
    ``[B, HV, 2 · nu · K, V]``, updated in place. Returns ``[B, HV, V]``."""
    q, k = sum_normalized_dpfp(q, nu), sum_normalized_dpfp(k, nu)
    return delta_step("delta_rule", q, k, v, (beta,), state, scale, "chunk_fwp")


def sum_normalized_dpfp(x: Tensor, nu: int) -> Tensor:
    """DPFP features over their sum, computed in fp32, in the dtype of x."""
    r = x.to(accumulation_dtype(x))
    r = torch.cat([r, -r], -1).relu()
    y = torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)
    return normalize(y, p=1.0, dim=-1, eps=1e-6).to(x.dtype)


def ones_like_heads(v: Tensor) -> Tensor:
    """A beta of 1 for every value head, without memory of its own."""
    return torch.ones((), dtype=accumulation_dtype(v), device=v.device).expand(v.shape[:-1])
