"""The gated delta rule: one decay per head before each correction; and its product form."""

from __future__ import annotations

from torch import Tensor

from ._common import accumulation_dtype, check_rank, check_shape
from ._delta import delta, delta_step
from .delta_rule import ones_like_heads
from .gates import prepared, scalar_gate, unit_rows

__all__ = [
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "gated_delta_product_step",
    "gated_delta_rule_step",
]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""The gated delta rule over whole sequences.

    ``S_t = e^{g_t} S_{t-1} + k_t (β_t (v_t − e^{g_t} S_{t-1}ᵀ k_t))ᵀ``,   ``o_t = scale · S_tᵀ
    q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``. The rule is stable for ``β |k|² ≤ 2``; it is computed as
            written for any others.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        g (Tensor): log decay ``[B, T, HV]``, natural log, ≤ 0, in the dtype of q or fp32; ``-inf``
            resets.
        beta (Tensor): writing strength ``[B, T, HV]``, or ``[B, T, HV, V]`` for one per value
            channel, in the dtype of q or fp32.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        use_qk_l2norm_in_kernel (bool): divide q and k by ``sqrt(|·|² + 1e-6)`` first.
        use_beta_sigmoid_in_kernel (bool): beta is given before its sigmoid.
        allow_neg_eigval (bool): twice that sigmoid.
        state_v_first (bool): states are ``[N, HV, V, K]`` instead.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        use_gate_in_kernel (bool): g are the logits of :func:`fused_gdn_gate`, with these:
        A_log (Tensor, optional): ``[HV]``.
        dt_bias (Tensor, optional): ``[HV]``.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        ValueError: an option without the one it needs.
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in all tensors but cu_seqlens; deterministic. Norms, gates and
        sigmoids are made in fp32, all of them in one pass before the operator's.

    Source: Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> g, beta = (torch.randn(1, 100, 2) for _ in range(2))
        >>> o, state = chunk_gated_delta_rule(
        ...     q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True,
        ...     use_beta_sigmoid_in_kernel=True, use_gate_in_kernel=True, A_log=torch.zeros(2),
        ... )
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    op = "chunk_gated_delta_rule"
    gate = scalar_gate(op, g, A_log, dt_bias) if use_gate_in_kernel else None
    q, k, g, beta = prepared(  # type: ignore[assignment]
        op, q, k, g, beta, use_qk_l2norm_in_kernel, gate, use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
    )  # fmt: skip
    return delta(
        "gated_delta_rule", q, k, v, (g, beta), scale, initial_state, output_final_state,
        cu_seqlens, state_v_first=state_v_first,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r""":func:`chunk_gated_delta_rule` under FLA's recurrent name, with a choice of gates.

    Args: as :func:`chunk_gated_delta_rule`, and
        g (Tensor, optional): log decay of the state ``[B, T, HV]``.
        gk (Tensor, optional): of its key channels ``[B, T, HV, K]``.
        gv (Tensor, optional): of its value channels ``[B, T, HV, V]``. Gates given together are
            multiplied.
        beta (Tensor, optional): default 1.

    Note: gv makes every value channel a head of its own, exact but V times the work on the gates.
    """
    op = "fused_recurrent_gated_delta_rule"
    logits = use_gate_in_kernel and g is not None
    gate = scalar_gate(op, g, A_log, dt_bias) if logits else None  # type: ignore[arg-type]
    use_sigmoid = use_beta_sigmoid_in_kernel and beta is not None
    q, k, g, beta = prepared(
        op, q, k, g, ones_like_heads(v) if beta is None else beta, use_qk_l2norm_in_kernel, gate,
        use_sigmoid, allow_neg_eigval and use_sigmoid,
    )  # fmt: skip
    if gk is not None:
        check_shape(op, "gk", gk, "[B, T, HV, K]", (*v.shape[:3], q.shape[-1]))
        g = gk if g is None else gk.to(g) + g.unsqueeze(-1)
    if gv is not None:
        return _value_gated(
            op, q, k, v, g, gv, beta, scale, initial_state, output_final_state, state_v_first,
            cu_seqlens,
        )  # fmt: skip
    name = "delta_rule" if g is None else "gated_delta_rule" if g.dim() == 3 else "kda"
    own = (beta,) if g is None else (g, beta)
    return delta(
        name, q, k, v, own, scale, initial_state, output_final_state, cu_seqlens,
        state_v_first=state_v_first,
    )  # fmt: skip


# FLA's short names.
chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> Tensor:
    r"""One token of :func:`chunk_gated_delta_rule`; ``state`` is updated in place.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        g (Tensor): log decay ``[B, HV]``, natural log, in the dtype of q or fp32.
        beta (Tensor): ``[B, HV]`` or ``[B, HV, V]``, in the dtype of q or fp32.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.
        use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, use_gate_in_kernel,
            A_log, dt_bias: as in :func:`chunk_gated_delta_rule`.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        ValueError: an option without the one it needs.
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> gated_delta_rule_step(q, k, v, torch.zeros(1, 2), torch.ones(1, 2), state).shape
        torch.Size([1, 2, 32])
    """
    op = "gated_delta_rule_step"
    gate = scalar_gate(op, g, A_log, dt_bias) if use_gate_in_kernel else None
    q, k, g, beta = prepared(  # type: ignore[assignment]
        op, q, k, g, beta, use_qk_l2norm_in_kernel, gate, use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
    )  # fmt: skip
    return delta_step(
        "gated_delta_rule", q, k, v, (g, beta), state, scale, "chunk_gated_delta_rule"
    )


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""DeltaProduct: after one decay, n corrections per token, whose keys and values stand next to
    each other.

    ``S ← e^{g_t} S``, then for j = 0 … n − 1 ``S ← S + k_{tn+j} (β_{tn+j} (v_{tn+j} − Sᵀ
    k_{tn+j}))ᵀ``; ``o_t = scale · Sᵀ q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T · n, H, K]``.
        v (Tensor): values ``[B, T · n, HV, V]``, HV a multiple of H.
        g (Tensor, optional): log decay ``[B, T, HV]``, natural log, ≤ 0, in the dtype of q or fp32;
            None for no decay.
        beta (Tensor): writing strength ``[B, T · n, HV]``, in the dtype of q or fp32.
        num_householder (int): n, at least 1.
        scale, initial_state, output_final_state: as in :func:`chunk_gated_delta_rule`.
        use_qk_l2norm_in_kernel (bool): divide q and k by ``sqrt(|·|² + 1e-6)`` first.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, in tokens.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in all tensors but cu_seqlens; deterministic.

    Source: DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products,
        arXiv:2502.10297.

    Example:
        >>> q, k, v = torch.randn(1, 100, 2, 32), *(torch.randn(1, 300, 2, 32) for _ in range(2))
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 300, 2)
        >>> o, _ = chunk_gated_delta_product(q, k, v, g, beta, 3, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 100, 2, 32])
    """
    if use_qk_l2norm_in_kernel:
        q, k = unit_rows(q, k)
    name, own = ("delta_rule", (beta,)) if g is None else ("gated_delta_rule", (g, beta))
    return delta(
        name, q, k, v, own, scale, initial_state, output_final_state, cu_seqlens, num_householder
    )


def gated_delta_product_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    r"""One token of :func:`chunk_gated_delta_product`; ``state`` is updated in place.

    Args:
        q (Tensor): ``[B, H, K]``.
        k (Tensor): ``[B, n, H, K]``.
        v (Tensor): ``[B, n, HV, V]``, HV a multiple of H.
        g (Tensor, optional): log decay ``[B, HV]``, natural log, in the dtype of q or fp32.
        beta (Tensor): ``[B, n, HV]``, in the dtype of q or fp32.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.
        use_qk_l2norm_in_kernel (bool): as in :func:`chunk_gated_delta_rule`.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v = torch.randn(1, 2, 32), *(torch.randn(1, 3, 2, 32) for _ in range(2))
        >>> gated_delta_product_step(q, k, v, torch.zeros(1, 2), torch.ones(1, 3, 2), state).shape
        torch.Size([1, 2, 32])
    """
    check_rank("gated_delta_product_step", "k", k, "[B, n, H, K]")
    if use_qk_l2norm_in_kernel:
        q, k = unit_rows(q, k)
    name, own = ("delta_rule", (beta,)) if g is None else ("gated_delta_rule", (g, beta))
    n = k.shape[1]
    if n == 1:
        k, v, own = k[:, 0], v[:, 0], (*own[:-1], beta[:, 0])
    return delta_step(name, q, k, v, own, state, scale, "chunk_gated_delta_product", n)


def _value_gated(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gv: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Columns of the state do not meet, so each can be a head with a gate of its own."""
    check_rank(op, "v", v, "[B, T, HV, V]")
    check_shape(op, "gv", gv, "[B, T, HV, V]", v.shape)
    B, T, HV, V = v.shape
    gate = gv.to(accumulation_dtype(gv)).flatten(2)
    if g is not None:
        shared = g.to(gate).repeat_interleave(V, 2)
        gate = gate + shared if g.dim() == 3 else gate.unsqueeze(-1) + shared
    beta = beta.flatten(2) if beta.dim() == 4 else beta.repeat_interleave(V, 2)
    if initial_state is not None:
        initial_state = initial_state if state_v_first else initial_state.mT
        initial_state = initial_state.flatten(1, 2).unsqueeze(-1)
    o, state = delta(
        "gated_delta_rule" if gate.dim() == 3 else "kda", q, k, v.flatten(2).unsqueeze(-1),
        (gate, beta), scale, initial_state, output_final_state, cu_seqlens,
    )  # fmt: skip
    if state is not None:
        state = state.view(state.shape[0], HV, V, q.shape[-1])
        state = state if state_v_first else state.mT
    return o.view(B, T, HV, V), state
