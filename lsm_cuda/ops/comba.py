"""Comba: the delta rule with a key of its own for what is erased, read before the decay."""

from __future__ import annotations

from torch import Tensor

from ._delta import delta, delta_step
from .delta_rule import ones_like_heads
from .gates import l2norm, unit_rows

__all__ = ["chunk_comba", "comba_step", "fused_recurrent_comba"]


def chunk_comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Comba over whole sequences.

    ``S_t = e^{g_t} S_{t-1} + k_t (β_t (v_t − S_{t-1}ᵀ p_t))ᵀ``,   ``o_t = scale · S_tᵀ q_t``.

    The erased value is read from the state before its decay. The paper's output correction is a
    matter of the query: ``q − D p``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        p (Tensor): keys of what is erased, ``[B, T, H, K]``.
        g (Tensor): log decay ``[B, T, HV]``, natural log, ≤ 0, in the dtype of q or fp32.
        beta (Tensor, optional): writing strength ``[B, T, HV]``, in the dtype of q or fp32.
            Default: 1.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        use_qk_l2norm_in_kernel (bool): divide q, k and p by ``sqrt(|·|² + 1e-6)`` first. As in FLA
            this is all three, so a p that is k times a factor erases as k does.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in all tensors but cu_seqlens; deterministic.

    Source: Comba: Improving Bilinear RNNs with Closed-loop Control, arXiv:2506.02475.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 100, 2)
        >>> o, _ = chunk_comba(q, k, v, 0.9 * k, g, beta, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 100, 2, 32])
    """
    if use_qk_l2norm_in_kernel:
        (q, k), p = unit_rows(q, k), l2norm(p)
    beta = ones_like_heads(v) if beta is None else beta
    return delta(
        "comba", q, k, v, (p, g, beta), scale, initial_state, output_final_state, cu_seqlens
    )


def fused_recurrent_comba(
    q: Tensor,
    k: Tensor,
    p: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_comba` under FLA's recurrent name, which takes p before v."""
    return chunk_comba(
        q, k, v, p, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        cu_seqlens,
    )  # fmt: skip


def comba_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    r"""One token of :func:`chunk_comba`; ``state`` is updated in place.

    Args:
        q, k, p (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        g (Tensor): log decay ``[B, HV]``, natural log, in the dtype of q or fp32.
        beta (Tensor): ``[B, HV]``, in the dtype of q or fp32.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.
        use_qk_l2norm_in_kernel (bool): as in :func:`chunk_comba`.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> comba_step(q, k, v, 0.9 * k, torch.zeros(1, 2), torch.ones(1, 2), state).shape
        torch.Size([1, 2, 32])
    """
    if use_qk_l2norm_in_kernel:
        (q, k), p = unit_rows(q, k), l2norm(p)
    return delta_step("comba", q, k, v, (p, g, beta), state, scale, "chunk_comba")
