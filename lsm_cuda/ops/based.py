"""Based and ReBased: linear attention with polynomial weights of degree two.

A weight of degree two in ``q · k`` is a product of features that are products of two channels each,
``φ_m(x) = w_m x_i x_j`` with i ≤ j: half of all pairs suffice, the others are equal.

Kernels make them of a few tokens at a time, where the state needs them, so that none are ever in
memory. On the CPU the weights between the tokens of a block are computed from ``q · k`` instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    accumulation_dtype,
    autocast,
    check_in_place,
    check_no_forward_ad,
    check_no_gradient,
    check_rank,
    check_same_device,
    check_shape,
    check_state,
    in_dtype,
    no_double_backward,
)

__all__ = [
    "based_step",
    "chunk_based",
    "chunk_rebased",
    "fused_chunk_based",
    "parallel_based",
    "parallel_rebased",
    "rebased_step",
]

State = tuple[Tensor, Tensor]

_EPS = 1e-6  # of Based
_WIDEST = 256  # features in a part of the state


def cut_features(K: int, taylor: bool) -> tuple[int, int, int]:
    """How many products, parts of them, and features in a part, as in csrc/policy/features.h."""
    channels = K + 1 if taylor else K
    pairs = channels * (channels + 1) // 2
    parts = -(-pairs // _WIDEST)
    return pairs, parts, 8 * -(-pairs // (8 * parts))


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Half precision in fp32: without the Taylor polynomial's constant, a sum of weights close to 0
    may divide outputs that would be rounded."""
    half = (torch.float16, torch.bfloat16)
    return tuple(x.float() for x in tensors) if tensors[0].dtype in half else tensors


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, taylor: bool, state: State | None) -> None:
    named = {"q": q, "k": k, "v": v}
    check_no_forward_ad(op, **named)
    for name, x in named.items():
        check_rank(op, name, x, "[B, T, H, K]" if name != "v" else "[B, T, HV, V]")
    check_shape(op, "k", k, "[B, T, H, K]", q.shape)
    check_state(op, state, "S", "z")
    if state is not None:
        S, z = state
        _, parts, width = cut_features(q.shape[-1], taylor)
        shape = (S.shape[0], v.shape[2], parts * width)
        check_shape(op, "S", S, "[N, HV, F, V]", (*shape, v.shape[3]))
        check_shape(op, "z", z, "[N, HV, F]", shape)


def _average(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    taylor: bool,
    eps: float | None,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State | None]:
    """The weighted sum over the sum of the weights plus eps, or undivided if that is None."""
    _check(op, q, k, v, taylor, initial_state)
    dtype = v.dtype
    if not taylor:
        q, k, v = _widened(q, k, v)
    S, z = (None, None) if initial_state is None else initial_state
    S, z = (None if s is None else s.to(accumulation_dtype(q)) for s in (S, z))
    o, S, z, _ = torch.ops.lsm.polynomial_attn_fwd(
        q, k, v, S, z, cu_seqlens, scale, eps or 0.0, taylor, eps is not None, output_final_state
    )
    return in_dtype(o, dtype), (S, z) if output_final_state else None


def _fwd_fake(*inputs):  # type: ignore[no-untyped-def]
    q, k, v, S, z, cu_seqlens, _, _, taylor, _, output_final_state = inputs
    states = {"S": S, "z": z, "cu_seqlens": cu_seqlens}
    check_same_device("polynomial_attn_fwd", q, k=k, v=v, **states)
    B, T, HV, V = v.shape
    _, parts, width = cut_features(q.shape[-1], taylor)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    F, wide = parts * width, accumulation_dtype(q)
    last = ((N, HV, F, V), (N, HV, F)) if output_final_state else ((0,),) * 2
    return v.new_empty(v.shape), *(q.new_empty(s, dtype=wide) for s in (*last, (4, B, HV, T)))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, scale, eps, taylor, normalize, output_final_state = inputs
    o, _, _, tokens = output
    ctx.mark_non_differentiable(tokens)
    ctx.save_for_backward(*tensors, o, tokens)
    ctx.options = scale, eps, taylor, normalize
    ctx.output_final_state = output_final_state
    ctx.set_materialize_grads(False)


def _bwd_fake(*inputs):  # type: ignore[no-untyped-def]
    q, k, v, S, z, cu_seqlens, _, _, _, _, o, tokens, grad_o, grad_S, grad_z = inputs
    states = {"S": S, "z": z, "cu_seqlens": cu_seqlens, "grad_S": grad_S, "grad_z": grad_z}
    check_same_device(
        "polynomial_attn_bwd", q, k=k, v=v, o=o, tokens=tokens, grad_o=grad_o, **states
    )
    d_states = ((0,) if s is None else s.shape for s in (S, z))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *(
        q.new_empty(s, dtype=accumulation_dtype(q)) for s in d_states
    )


def _backward(ctx, grad_o, grad_S, grad_z, _):  # type: ignore[no-untyped-def]
    q, k, v, S, z, cu_seqlens, o, tokens = ctx.saved_tensors
    grad_o = torch.zeros_like(o) if grad_o is None else grad_o
    if not ctx.output_final_state:
        grad_S = grad_z = None
    *grads, dS, dz = torch.ops.lsm.polynomial_attn_bwd(
        q, k, v, S, z, cu_seqlens, *ctx.options, o, tokens, grad_o, grad_S, grad_z
    )
    return (
        *grads, None if S is None else dS, None if z is None else dz, *(None for _ in range(6))
    )  # fmt: skip


def _step_fake(q, k, v, S, z, *_):  # type: ignore[no-untyped-def]
    check_same_device("polynomial_attn_step", q, k=k, v=v, S=S, z=z)
    return v.new_empty(v.shape)


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("polynomial_attn_bwd"))


torch.library.register_fake("lsm::polynomial_attn_fwd")(_fwd_fake)
torch.library.register_fake("lsm::polynomial_attn_bwd")(_bwd_fake)
torch.library.register_fake("lsm::polynomial_attn_step")(_step_fake)
torch.library.register_autograd("lsm::polynomial_attn_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("lsm::polynomial_attn_bwd", _refuse_double_backward)


def _polynomial_step(
    op: str,
    chunk_name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    scale: float,
    taylor: bool,
    eps: float | None,
) -> Tensor:
    S, z = state
    check_no_gradient(op, chunk_name, q, k, v, S, z)
    check_rank(op, "q", q, "[B, H, K]")
    check_shape(op, "k", k, "[B, H, K]", q.shape)
    check_rank(op, "v", v, "[B, HV, V]")
    B, HV, V = v.shape
    _, parts, width = cut_features(q.shape[-1], taylor)
    check_in_place(op, "S", S, "[B, HV, F, V]", (B, HV, parts * width, V), q)
    check_in_place(op, "z", z, "[B, HV, F]", (B, HV, parts * width), q)
    return torch.ops.lsm.polynomial_attn_step(  # type: ignore[no-any-return]
        q, k, v, S, z, scale, eps or 0.0, taylor, eps is not None
    )


def chunk_based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    r"""Based over whole sequences: softmax attention with its exponential's Taylor polynomial.

    ``o_t = Σ_{s≤t} p(x_ts) v_s / (Σ_{s≤t} p(x_ts) + 10⁻⁶)``,   ``p(x) = 1 + x + x²/2``,
    ``x_ts = scale · q_t · k_s``; without the division unless ``use_norm``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU), any K.
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        scale (float, optional): default ``K ** -0.5``.
        use_norm (bool): divide by the sum of the weights, which is at least half their number.
        initial_state (tuple, optional): S ``[N, HV, F, V]`` and z ``[N, HV, F]``, fp32 (fp64 for
            fp64 inputs); F is (K + 1) (K + 2) / 2, rounded up for the kernels.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final (S, z) or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: differentiable once in q, k, v and the state; deterministic. Forward and backward are a
        pass of the engine each, which makes the F features of q and k where it needs them and keeps
        sums in fp32 (fp64).

    Source: Simple linear attention language models balance the recall-throughput tradeoff,
    arXiv:2402.18668.

    Example:
        >>> q, k = torch.randn(2, 1, 100, 2, 16)
        >>> o, (S, z) = chunk_based(q, k, torch.randn(1, 100, 2, 64), output_final_state=True)
        >>> o.shape, S.shape, z.shape
        (torch.Size([1, 100, 2, 64]), torch.Size([1, 2, 160, 64]), torch.Size([1, 2, 160]))
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = autocast(q, k, v)
    eps = _EPS if use_norm else None
    return _average(
        "chunk_based", q, k, v, scale, True, eps, initial_state, output_final_state, cu_seqlens
    )


def parallel_based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
) -> Tensor:
    """FLA's name for the output of :func:`chunk_based`; linear in T here."""
    return chunk_based(q, k, v, scale, use_norm)[0]


def fused_chunk_based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
) -> Tensor:
    """FLA's other name for the output of :func:`chunk_based`; takes any K."""
    return chunk_based(q, k, v, scale, use_norm)[0]


def based_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    scale: float | None = None,
    use_norm: bool = True,
) -> Tensor:
    r"""One token of Based; ``state`` is updated in place.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        state (tuple): S ``[B, HV, F, V]`` and z ``[B, HV, F]``, fp32 (fp64 for fp64 inputs),
            contiguous, zero before the first token; F as :func:`chunk_based` returns it.
        scale (float, optional): default ``K ** -0.5``.
        use_norm (bool): divide by the sum of the weights.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`chunk_based` where gradients are needed.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 16)
        >>> state = torch.zeros(1, 2, 160, 16), torch.zeros(1, 2, 160)
        >>> based_step(q, k, v, state).shape
        torch.Size([1, 2, 16])
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    eps = _EPS if use_norm else None
    return _polynomial_step("based_step", "chunk_based", q, k, v, state, scale, True, eps)


def chunk_rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    r"""ReBased over whole sequences: linear attention with weights ``(scale · q_t · k_s)²``.

    ``o_t = Σ_{s≤t} x_ts² v_s / (Σ_{s≤t} x_ts² + eps)``,   ``x_ts = scale · q_t · k_s``; without the
    division unless ``use_normalize``. The learnable affine map and norm of q and k come before.

    Args:
        q, k, v, initial_state, output_final_state, cu_seqlens: as :func:`chunk_based`; F is
            K (K + 1) / 2, rounded up for the kernels.
        eps (float): keeps the division finite where a query is orthogonal to all keys.
        use_scale (bool): ``scale = K ** -0.5``, else 1.
        use_normalize (bool): divide by the sum of the weights.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final (S, z) or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: costs and derivatives as :func:`chunk_based`, but bf16 runs in fp32 too: the sum that
        divides may be close to 0, as where a first query is nearly orthogonal to its key, and
        squares are then small sums of large features. fp32 calls lose some digits there.

    Source: Linear Transformers with Learnable Kernel Functions are Better In-Context Models,
    arXiv:2402.10644.

    Example:
        >>> q, k = torch.randn(2, 1, 100, 2, 16)
        >>> o, (S, z) = chunk_rebased(q, k, torch.randn(1, 100, 2, 64), output_final_state=True)
        >>> o.shape, S.shape, z.shape
        (torch.Size([1, 100, 2, 64]), torch.Size([1, 2, 136, 64]), torch.Size([1, 2, 136]))
    """
    scale = q.shape[-1] ** -0.5 if use_scale else 1.0
    q, k, v = autocast(q, k, v)
    return _average(
        "chunk_rebased", q, k, v, scale, False, eps if use_normalize else None, initial_state,
        output_final_state, cu_seqlens,
    )  # fmt: skip


def parallel_rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
    return_both: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """FLA's name for the output of :func:`chunk_rebased`; linear in T here. ``return_both``: the
    undivided ``o [B, HV, T, V]`` and the sums of the weights ``[B, HV, T]``, heads first as there.
    """
    if not return_both:
        return chunk_rebased(q, k, v, eps, use_scale, use_normalize)[0]
    scale = q.shape[-1] ** -0.5 if use_scale else 1.0
    q, k, v = autocast(q, k, v)
    dtype = v.dtype
    _check("parallel_rebased", q, k, v, False, None)
    q, k, v = _widened(q, k, v)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    o, _ = _average("parallel_rebased", q, k, v, scale, False, None, None, False, None)
    o, total = o[..., :-1], o[..., -1:]
    return o.to(dtype).transpose(1, 2), total.squeeze(-1).transpose(1, 2)


def rebased_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
) -> Tensor:
    r"""One token of ReBased; ``state`` is updated in place.

    Args:
        q, k, v, state: as :func:`based_step`, with the F of :func:`chunk_rebased`.
        eps, use_scale, use_normalize: as :func:`chunk_rebased`.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 16)
        >>> state = torch.zeros(1, 2, 136, 16), torch.zeros(1, 2, 136)
        >>> rebased_step(q, k, v, state).shape
        torch.Size([1, 2, 16])
    """
    scale = q.shape[-1] ** -0.5 if use_scale else 1.0
    return _polynomial_step(
        "rebased_step", "chunk_rebased", q, k, v, state, scale, False,
        eps if use_normalize else None,
    )  # fmt: skip
