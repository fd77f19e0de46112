"""RWKV-4 and its kin: running averages of values with weights e^k, which must not overflow.

A state holds sums over e^m, m the logarithm of the largest weight in them, so that no exponent is
positive; csrc/params/wkv4.h has the recurrence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    accumulation_dtype,
    check_device_like,
    check_last_queries,
    check_no_forward_ad,
    check_no_gradient,
    check_rank,
    check_shape,
    check_state,
    no_double_backward,
)

__all__ = ["aft_full", "aft_simple", "bi_wkv", "wkv4", "wkv4_step"]

State = tuple[Tensor, Tensor, Tensor]

_TILE = 32  # tokens between the states kept for the backward: kWkv4Tile


def _check_devices(op: str, k: Tensor, tensors) -> None:  # type: ignore[no-untyped-def]
    names = ("r", "u", "k", "v", "numerator", "denominator", "scale", "cu_seqlens")
    check_device_like(op, "k", k, dict(zip(names, tensors, strict=False)))


def _fwd_fake(*inputs):  # type: ignore[no-untyped-def]
    r, _, k, v, _, _, _, cu_seqlens, save_states, output_final_state = inputs
    _check_devices("wkv4_fwd", k, inputs[:8])
    B, T, D = k.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = (T + _TILE - 1) // _TILE
    tiles = N * tiles if cu_seqlens is None else tiles + N
    states = tiles * 3 * ((D + 7) // 8 * 8) if save_states else 0
    final = [r.new_empty((N, D) if output_final_state else (0,)) for _ in range(3)]
    return (v.new_empty(v.shape), *final, r.new_empty((states,)))


def _bwd_fake(*inputs):  # type: ignore[no-untyped-def]
    r, _, k, v, numerator, *_ = inputs
    _check_devices("wkv4_bwd", k, inputs[:8])
    first = [r.new_empty((0,) if numerator is None else numerator.shape) for _ in range(2)]
    return (r.new_empty((2, k.shape[2])), k.new_empty(k.shape), v.new_empty(v.shape), *first)


def _step_fake(*inputs):  # type: ignore[no-untyped-def]
    _check_devices("wkv4_step", inputs[2], inputs)
    return inputs[3].new_empty(inputs[3].shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, _, _, final_scale, states = output
    ctx.output_final_state = inputs[-1]
    ctx.save_for_backward(*inputs[:8], states, final_scale if inputs[-1] else None)
    ctx.mark_non_differentiable(final_scale, states)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_o, grad_numerator, grad_denominator, *_):  # type: ignore[no-untyped-def]
    *tensors, states, final_scale = ctx.saved_tensors
    k, numerator = tensors[2], tensors[4]
    grad_o = torch.zeros_like(k) if grad_o is None else grad_o
    grads = [grad_numerator, grad_denominator]
    if not ctx.output_final_state or grads == [None, None]:
        grads = [None, None]
    else:
        grads = [torch.zeros_like(final_scale) if g is None else g for g in grads]
    channels, dk, dv, *first = torch.ops.lsm.wkv4_bwd(*tensors, states, final_scale, grad_o, *grads)
    first = [None, None] if numerator is None else first
    return channels[0], channels[1], dk, dv, *first, None, None, None, None


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("wkv4_bwd"))


def _both_fwd_fake(*inputs):  # type: ignore[no-untyped-def]
    _check_devices("bi_wkv_fwd", inputs[2], inputs)
    return inputs[3].new_empty(inputs[3].shape)


def _both_bwd_fake(*inputs):  # type: ignore[no-untyped-def]
    r, _, k, v, _ = inputs
    _check_devices("bi_wkv_bwd", k, inputs[:4])
    return r.new_empty((2, k.shape[2])), k.new_empty(k.shape), v.new_empty(v.shape)


def _both_setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _both_backward(ctx, grad_o):  # type: ignore[no-untyped-def]
    channels, dk, dv = torch.ops.lsm.bi_wkv_bwd(*ctx.saved_tensors, grad_o)
    return channels[0], channels[1], dk, dv


def _refuse_both_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("bi_wkv_bwd"))


torch.library.register_fake("lsm::bi_wkv_fwd")(_both_fwd_fake)
torch.library.register_fake("lsm::bi_wkv_bwd")(_both_bwd_fake)
torch.library.register_autograd(
    "lsm::bi_wkv_fwd", _both_backward, setup_context=_both_setup_context
)
torch.library.register_autograd("lsm::bi_wkv_bwd", _refuse_both_double_backward)
torch.library.register_fake("lsm::wkv4_fwd")(_fwd_fake)
torch.library.register_fake("lsm::wkv4_bwd")(_bwd_fake)
torch.library.register_fake("lsm::wkv4_step")(_step_fake)
torch.library.register_autograd("lsm::wkv4_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("lsm::wkv4_bwd", _refuse_double_backward)


def _average(
    op: str,
    r: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State | None]:
    """The operator; r is the rate itself."""
    check_state(op, initial_state, "numerator", "denominator", "scale")
    check_no_forward_ad(op, r=r, u=u, k=k, v=v)
    dtype = torch.promote_types(k.dtype, v.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = (None,) * 3 if initial_state is None else tuple(s.to(wide) for s in initial_state)
    tensors = (r.to(wide), u.to(wide), k.to(dtype), v.to(dtype), *state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    o, *final, _ = torch.ops.lsm.wkv4_fwd(*tensors, cu_seqlens, save, output_final_state)
    return o.to(v.dtype), (final[0], final[1], final[2]) if output_final_state else None


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    r"""RWKV-4's time mixing: an average of values with weights that fade by a constant rate.

    ``o_t = (Σ_{i<t} e^{k_i - (t-1-i) r} v_i + e^{u + k_t} v_t) / (the same with v = 1)``,
    ``r = exp w``.

    Args:
        w (Tensor): logarithm of the rate ``[D]``, as checkpoints hold it (``time_decay``).
        u (Tensor): bonus of the token's own weight ``[D]`` (``time_first``).
        k, v (Tensor): ``[B, T, D]``, any floating dtype.
        initial_state (tuple, optional): numerator, denominator and the logarithm they are scaled
            by, each ``[N, D]`` fp32 (fp64 for fp64 inputs); no gradient for the third.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`scan`.

    Returns:
        ``o [B, T, D]`` in the dtype of v, and the final state or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: differentiable once; deterministic; no exponent is positive, however large k. One pass
        over memory; for the gradient the state before every 32nd token is kept.

    Source: RWKV, arXiv:2305.13048, eqs. 16-19.

    Example:
        >>> w, u = torch.randn(2, 64)
        >>> k, v = torch.randn(2, 1, 100, 64)
        >>> o, state = wkv4(w, u, k, v, output_final_state=True)
        >>> o.shape, len(state)
        (torch.Size([1, 100, 64]), 3)
    """
    _check("wkv4", k, v, w=w, u=u)
    rate = w.to(accumulation_dtype(k)).exp()
    return _average("wkv4", rate, u, k, v, initial_state, output_final_state, cu_seqlens)


def _check(op: str, k: Tensor, v: Tensor, **channels: Tensor) -> None:
    check_rank(op, "k", k, "[B, T, D]")
    check_shape(op, "v", v, "[B, T, D]", k.shape)
    for name, t in channels.items():
        check_shape(op, name, t, "[D]", k.shape[-1:])


def wkv4_step(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
    r"""One token of :func:`wkv4`, ``[B, D]``; the three tensors of ``state`` are updated in place.

    A fresh state is ``(zeros, zeros, full of -inf)``.

    Example:
        >>> state = torch.zeros(1, 64), torch.zeros(1, 64), torch.full((1, 64), -torch.inf)
        >>> w, u = torch.randn(2, 64)
        >>> wkv4_step(w, u, torch.randn(1, 64), torch.randn(1, 64), state).shape
        torch.Size([1, 64])
    """
    check_no_gradient("wkv4_step", "wkv4", w, u, k, v, *state)
    check_state("wkv4_step", state, "numerator", "denominator", "scale")
    wide = accumulation_dtype(k)
    o: Tensor = torch.ops.lsm.wkv4_step(w.to(wide).exp(), u.to(wide), k, v.to(k.dtype), *state)
    return o.to(v.dtype)


def aft_simple(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    r"""The simple attention-free transformer: ``σ(q_t) ⊙ Σ_{s≤t} e^{k_s} v_s / Σ_{s≤t} e^{k_s}``.

    Args:
        q, k, v (Tensor): ``[B, T, D]``.
        initial_state, output_final_state, cu_seqlens: as in :func:`wkv4`.

    Returns:
        ``o [B, T, D]`` in the dtype of v, and the final state or None.

    Source: An Attention Free Transformer, arXiv:2105.14103, section 3.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 64)
        >>> aft_simple(q, k, v)[0].shape
        torch.Size([1, 100, 64])
    """
    _check("aft_simple", k, v)
    check_shape("aft_simple", "q", q, "[B, T, D]", k.shape)
    still = k.new_zeros(k.shape[-1], dtype=accumulation_dtype(k))
    o, state = _average(
        "aft_simple", still, still, k, v, initial_state, output_final_state, cu_seqlens
    )
    return (q.to(still.dtype).sigmoid() * o).to(v.dtype), state


def aft_full(q: Tensor, k: Tensor, v: Tensor, w: Tensor, causal: bool = True) -> Tensor:
    r"""The attention-free transformer: ``σ(q_t) ⊙ Σ_s e^{k_s + w_ts} v_s / Σ_s e^{k_s + w_ts}``.

    Args:
        q (Tensor): ``[B, TQ, D]``, the last of the T positions.
        k, v (Tensor): ``[B, T, D]``.
        w (Tensor): learned biases of pairs of positions, ``[TQ, T]``, or ``[B, TQ, T]`` where rows
            of a batch have their own; ``-inf`` hides a key.
        causal (bool): sum over s ≤ t only.

    Returns:
        ``o [B, TQ, D]`` in the dtype of v.

    Note: two matrix products in fp64, whose exponents reach ±700: a row and a channel share no
        maximum that fp32 could be scaled by. Differentiable to any order.

    Source: An Attention Free Transformer, arXiv:2105.14103, eq. 2.

    Example:
        >>> q, k, v = torch.randn(3, 1, 20, 64)
        >>> aft_full(q, k, v, torch.randn(20, 20)).shape
        torch.Size([1, 20, 64])
    """
    _check("aft_full", k, v)
    check_rank("aft_full", "q", q, "[B, TQ, D]")
    check_last_queries("aft_full", q, k)
    (B, T, D), TQ = k.shape, q.shape[1]
    check_shape("aft_full", "q", q, "[B, TQ, D]", (B, TQ, D))
    if w.dim() == 3:
        check_shape("aft_full", "w", w, "[B, TQ, T]", (B, TQ, T))
    else:
        check_shape("aft_full", "w", w, "[TQ, T]", (TQ, T))
    if TQ == 0:
        return v[:, :0].clone()
    pairs, keys = w.double(), k.double()
    if causal:
        seen = torch.ones_like(pairs, dtype=torch.bool).tril(T - TQ)
        pairs = pairs.masked_fill(~seen, -torch.inf)
    pairs = torch.exp(pairs - pairs.amax(-1, keepdim=True).detach())
    keys = torch.exp(keys - keys.amax(1, keepdim=True).detach())
    o = (pairs @ (keys * v.double())) / (pairs @ keys)
    return (q.double().sigmoid() * o).to(v.dtype)


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Vision-RWKV's attention: :func:`wkv4` in both directions, distances relative to T.

    ``o_t = (Σ_{i≠t} e^{k_i - (|t-i|-1) w / T} v_i + e^{u + k_t} v_t) / (the same with v = 1)``.

    Args:
        w (Tensor): rates ``[D]``, ≥ 0.
        u (Tensor): bonus ``[D]``.
        k, v (Tensor): ``[B, T, D]``.

    Returns:
        ``o [B, T, D]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or a gradient of a gradient.

    Note: k and v are read once, by blocks that tell each other what they have to either side; the
        backward needs nothing else but the gradient of o.

    Source: Vision-RWKV, arXiv:2403.02308, eq. 2.

    Example:
        >>> w, u = torch.rand(2, 64)
        >>> k, v = torch.randn(2, 1, 100, 64)
        >>> bi_wkv(w, u, k, v).shape
        torch.Size([1, 100, 64])
    """
    _check("bi_wkv", k, v, w=w, u=u)
    dtype, T = torch.promote_types(k.dtype, v.dtype), k.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if T == 0:
        return v.clone()
    check_no_forward_ad("bi_wkv", w=w, u=u, k=k, v=v)
    o: Tensor = torch.ops.lsm.bi_wkv_fwd(w.to(wide) / T, u.to(wide), k.to(dtype), v.to(dtype))
    return o.to(v.dtype)
