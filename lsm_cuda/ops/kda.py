"""Kimi delta attention: the delta rule with one decay per key channel."""

from __future__ import annotations

from torch import Tensor

from ._delta import delta, delta_step
from .gates import channel_gate, prepared

__all__ = ["chunk_kda", "fused_recurrent_kda", "kda_step"]


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    *,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Kimi delta attention over whole sequences.

    ``S'_t = Diag(exp g_t) S_{t-1}``,   ``S_t = S'_t + k_t (β_t (v_t − S'_tᵀ k_t))ᵀ``,   ``o_t =
    scale · S_tᵀ q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``. The rule is stable for ``β |k|² ≤ 2``; it is computed as
            written for any others.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        g (Tensor): log decay of the key channels ``[B, T, HV, K]``, natural log, ≤ 0, in the dtype
            of q or fp32; ``-inf`` resets.
        beta (Tensor): writing strength ``[B, T, HV]``, or ``[B, T, HV, V]`` for one per value
            channel, in the dtype of q or fp32.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        use_qk_l2norm_in_kernel (bool): divide q and k by ``sqrt(|·|² + 1e-6)`` first.
        use_gate_in_kernel (bool): g are the logits of :func:`fused_kda_gate`, with A_log, dt_bias
            and lower_bound.
        use_beta_sigmoid_in_kernel (bool): beta is given before its sigmoid.
        allow_neg_eigval (bool): twice that sigmoid.
        safe_gate (bool): without meaning here; every gate is safe.
        lower_bound (float, optional): the least log decay of :func:`fused_kda_gate`.
        state_v_first (bool): states are ``[N, HV, V, K]`` instead.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        A_log (Tensor, optional): ``[HV]``.
        dt_bias (Tensor, optional): ``[HV · K]``.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        ValueError: an option without the one it needs.
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in all tensors but cu_seqlens; deterministic. Norms, gates and
        sigmoids are made in fp32, all of them in one pass before the operator's.

    Source: Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv:2510.26692.

    Example:
        >>> q, k, v, g = (torch.randn(1, 100, 2, 32) for _ in range(4))
        >>> o, state = chunk_kda(
        ...     q, k, v, g, torch.randn(1, 100, 2), output_final_state=True, lower_bound=-5.0,
        ...     use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        ...     use_gate_in_kernel=True, A_log=torch.zeros(2), dt_bias=torch.zeros(64),
        ... )
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    q, k, g, beta = _prepared(
        "chunk_kda", q, k, g, beta, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, A_log, dt_bias,
    )  # fmt: skip
    return delta(
        "kda", q, k, v, (g, beta), scale, initial_state, output_final_state, cu_seqlens,
        state_v_first=state_v_first,
    )  # fmt: skip


def _prepared(
    op: str,
    q: Tensor,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    norm: bool,
    use_gate: bool,
    use_sigmoid: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate = channel_gate(op, g, A_log, dt_bias, lower_bound) if use_gate else None
    q, k, made, beta = prepared(op, q, k, g, beta, norm, gate, use_sigmoid, allow_neg_eigval)
    assert made is not None
    return q, k, made, beta


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_kda` under FLA's recurrent name; one kernel serves both."""
    return chunk_kda(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound=lower_bound,
        state_v_first=state_v_first, cu_seqlens=cu_seqlens, A_log=A_log, dt_bias=dt_bias,
    )  # fmt: skip


def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    r"""One token of :func:`chunk_kda`; ``state`` is updated in place.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        g (Tensor): log decay of the key channels ``[B, HV, K]``, natural log, in the dtype of q or
            fp32.
        beta (Tensor): ``[B, HV]`` or ``[B, HV, V]``, in the dtype of q or fp32.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval,
            lower_bound, A_log, dt_bias: as in :func:`chunk_kda`.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        ValueError: an option without the one it needs.
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v, g = (torch.randn(1, 2, 32) for _ in range(4))
        >>> kda_step(q, k, v, -g.abs(), torch.ones(1, 2), state).shape
        torch.Size([1, 2, 32])
    """
    q, k, g, beta = _prepared(
        "kda_step", q, k, g, beta, use_qk_l2norm_in_kernel, use_gate_in_kernel,
        use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, A_log, dt_bias,
    )  # fmt: skip
    return delta_step("kda", q, k, v, (g, beta), state, scale, "chunk_kda")
