"""Based and ReBased: linear attention with polynomial weights of degree two.

A weight of degree two in ``q · k`` is a product of features that are products of two channels each,
``φ_m(x) = w_m x_i x_j`` with i ≤ j: half of all pairs suffice, the others are equal.

On the CPU the engine makes them of a block of tokens at a time, only for the state; between the
tokens of a block it computes the polynomial. On CUDA it is composed: at most 256 features are
computed at a time, forward and again in backward, and handed to the engine of linear attention; the
sum of the weights is one more column of v that is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _chunk
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
from ._operator import FUSED
from ._sums import quotient

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
_WIDEST = 256  # features or value columns in one call of the engine


def cut_features(K: int, taylor: bool) -> tuple[int, int, int]:
    """How many products, parts of them, and features in a part, as in csrc/policy/features.h."""
    channels = K + 1 if taylor else K
    pairs = channels * (channels + 1) // 2
    parts = -(-pairs // _WIDEST)
    return pairs, parts, 8 * -(-pairs // (8 * parts))


class Features:
    """All products of two of K channels; with ``taylor`` of (1, x), so that ``φ(q) · φ(k) =
    1 + q·k + (q·k)²/2``, else ``φ(q) · φ(k) = (q·k)²``.

    Cut into equal slices of a multiple of 8, as kernels like them; what is left over has weight 0.
    Channels are picked by products with matrices of 0 and 1, whose gradients sum in a fixed order.
    """

    def __init__(self, K: int, taylor: bool, like: Tensor) -> None:
        self.taylor = taylor
        channels = K + 1 if taylor else K
        left, right = torch.triu_indices(channels, channels, device=like.device)
        weight = torch.ones(len(left), dtype=torch.float64, device=like.device)
        weight = torch.where(left == right, weight * 0.5**0.5, weight)
        # the constant's weight is 1 too; without the polynomial's half all others are twice as much
        weight = torch.where(right == 0, 1.0, weight) if taylor else weight * 2**0.5
        _, parts, self.width = cut_features(K, taylor)
        self.count = parts * self.width
        one = torch.arange(channels, device=like.device).unsqueeze(-1)
        pad, dtype = (0, self.count - len(left)), accumulation_dtype(like)
        self.left = torch.nn.functional.pad((one == left).to(dtype), pad)  # [channels, F]
        self.right = torch.nn.functional.pad((weight * (one == right)).to(dtype), pad)

    def slices(self) -> Iterator[slice]:
        for start in range(0, self.count, self.width):
            yield slice(start, start + self.width)

    def extend(self, x: Tensor, scale: float) -> Tensor:
        """``scale · x``, behind a channel of 1 if Taylor, in what sums are kept in."""
        x = scale * x.to(self.left.dtype)
        return torch.nn.functional.pad(x, (1, 0), value=1.0) if self.taylor else x

    def __call__(self, x: Tensor, part: slice) -> Tensor:
        """Of an extended x."""
        with torch.autocast(x.device.type, enabled=False):
            return (x @ self.left[:, part]).mul_(x @ self.right[:, part])

    def gradient(self, x: Tensor, part: slice, grad: Tensor) -> Tensor:
        """Of an extended x."""
        left, right, grad = self.left[:, part], self.right[:, part], grad.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return (grad * (x @ right)) @ left.mT + (grad * (x @ left)) @ right.mT

    def shrink(self, grad: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """The gradient of x from that of an extended x."""
        return (scale * (grad[..., 1:] if self.taylor else grad)).to(dtype)


class _Polynomial(torch.autograd.Function):
    """``o_t = Σ_{s≤t} (φ(q_t) · φ(k_s)) v_s``, features never all in memory nor kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        taylor: bool,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, state, cu_seqlens)
        ctx.scale, ctx.taylor, ctx.output_final_state = scale, taylor, output_final_state
        ctx.set_materialize_grads(False)
        f = Features(q.shape[-1], taylor, q)
        xq, xk = f.extend(q, scale), f.extend(k, 1.0)
        o, finals = None, []
        for part in f.slices():
            h0 = None if state is None else state[:, :, part]
            fq, fk = f(xq, part).to(q.dtype), f(xk, part).to(k.dtype)
            summand, final = torch.ops.lsm.linear_attn_fwd(
                fq, fk, v, h0, cu_seqlens, 1.0, output_final_state
            )
            finals.append(final)
            o = summand if o is None else o.to(xq.dtype) + summand
        assert o is not None
        o = in_dtype(o, v.dtype)
        return o, torch.cat(finals, 2) if output_final_state else finals[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, state, cu_seqlens = ctx.saved_tensors
        grad_o, grad_final = grads
        grad_o = torch.zeros_like(v) if grad_o is None else grad_o
        grad_final = grad_final if ctx.output_final_state else None  # traced, it is never None
        f = Features(q.shape[-1], ctx.taylor, q)
        xq, xk = f.extend(q, ctx.scale), f.extend(k, 1.0)
        dq, dk, dv, dstate = torch.zeros_like(xq), torch.zeros_like(xk), None, []
        for part in f.slices():
            fq, fk = f(xq, part).to(q.dtype), f(xk, part).to(k.dtype)
            dfq, dfk, summand, dh0 = torch.ops.lsm.linear_attn_bwd(
                fq, fk, v, None if state is None else state[:, :, part], cu_seqlens, 1.0,
                grad_o, None if grad_final is None else grad_final[:, :, part],
            )  # fmt: skip
            dq += f.gradient(xq, part, dfq)
            dk += f.gradient(xk, part, dfk)
            dv = summand if dv is None else dv.to(xq.dtype) + summand
            dstate.append(dh0)
        assert dv is not None
        return (
            f.shrink(dq, ctx.scale, q.dtype), f.shrink(dk, 1.0, k.dtype), dv.to(v.dtype),
            None if state is None else torch.cat(dstate, 2), None, None, None, None,
        )  # fmt: skip


def _working(taylor: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """In fp32: fp16, whose range the sums leave, and half precision without the Taylor polynomial's
    constant, where a sum of weights close to 0 may divide."""
    half = (torch.float16,) if taylor else (torch.float16, torch.bfloat16)
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
    if q.device.type not in FUSED:
        o, total, state = _sums(
            q, k, v, scale, taylor, eps is not None, initial_state, output_final_state, cu_seqlens
        )
        return _divide(o, total, eps, dtype), state
    if not taylor:
        q, k, v = _working(taylor, q, k, v)
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


def _sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    taylor: bool,
    with_total: bool,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None, State | None]:
    """The weighted sum, the sum of the weights ``[B, T, HV, 1]`` if asked for, the final state;
    by linear_attn, of features."""
    q, k, v = _working(taylor, q, k, v)
    V = v.shape[-1]
    state = None
    if initial_state is not None:
        S, z = (x.to(accumulation_dtype(q)) for x in initial_state)
        state = torch.cat([S, z.unsqueeze(-1)], -1)
    with_total = with_total or output_final_state
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1) if with_total else v
    state = state if with_total or state is None else state[..., :V]
    outputs, finals = [], []
    for start in range(0, values.shape[-1], _WIDEST):
        columns = slice(start, start + _WIDEST)
        o, final = _Polynomial.apply(  # type: ignore[no-untyped-call]
            q, k, values[..., columns], None if state is None else state[..., columns],
            cu_seqlens, scale, taylor, output_final_state,
        )  # fmt: skip
        outputs.append(o)
        finals.append(final)
    o, final_state = torch.cat(outputs, -1), None
    if output_final_state:
        final = torch.cat(finals, -1)
        final_state = (final[..., :V].contiguous(), final[..., V].contiguous())
    return (o[..., :V], o[..., V:], final_state) if with_total else (o, None, final_state)


def _divide(o: Tensor, total: Tensor | None, eps: float | None, dtype: torch.dtype) -> Tensor:
    """``o / (total + eps)``, or o where there is no eps."""
    if eps is None or total is None:
        return o.to(dtype)
    wide = accumulation_dtype(o)
    return quotient(o.to(wide), total.to(wide) + eps).to(dtype)


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
    """Composed, slices of features are heads of the engine's step."""
    S, z = state
    dtype = v.dtype
    check_no_gradient(op, chunk_name, q, k, v, S, z)
    check_rank(op, "q", q, "[B, H, K]")
    check_shape(op, "k", k, "[B, H, K]", q.shape)
    check_rank(op, "v", v, "[B, HV, V]")
    B, HV, V = v.shape
    _, parts, width = cut_features(q.shape[-1], taylor)
    check_in_place(op, "S", S, "[B, HV, F, V]", (B, HV, parts * width, V), q)
    check_in_place(op, "z", z, "[B, HV, F]", (B, HV, parts * width), q)
    if q.device.type in FUSED:
        return torch.ops.lsm.polynomial_attn_step(  # type: ignore[no-any-return]
            q, k, v, S, z, scale, eps or 0.0, taylor, eps is not None
        )
    q, k, v = _working(taylor, q, k, v)
    f = Features(q.shape[-1], taylor, q)
    every = slice(0, f.count)
    xq, xk = f.extend(q, scale), f.extend(k, 1.0)
    fq, fk = (f(x, every).to(q.dtype).repeat_interleave(HV // q.shape[1], 1) for x in (xq, xk))
    sq, sk = (x.view(B, HV * parts, width) for x in (fq, fk))
    o = _chunk.step(
        "linear_attn", sq, sk, v.repeat_interleave(parts, 1), None,
        S.view(B, HV * parts, width, V), 1.0, chunk_name,
    )  # fmt: skip
    z += fk
    total = (fq * z).sum(-1, keepdim=True)
    return _divide(o.view(B, HV, parts, V).sum(2, dtype=S.dtype), total, eps, dtype)


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

    Note: differentiable once in q, k, v and the state; deterministic. On the CPU forward and
        backward are a pass of the engine each, which makes the F features of q and k where it needs
        them and keeps sums in fp32. On CUDA they are written and read at most 256 at a time, in
        forward and again in backward, never all of them unless K ≤ 21, and never kept; v is copied
        once, to add the column that counts weights, and fp16 runs in fp32.

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
        RuntimeError: a shape, dtype or device that does not fit, V over 256 on CUDA, or an argument
            that requires grad.

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
    if q.device.type in FUSED:
        q, k, v = _working(False, q, k, v)
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        o, _ = _average("parallel_rebased", q, k, v, scale, False, None, None, False, None)
        o, total = o[..., :-1], o[..., -1:]
    else:
        o, weights, _ = _sums(q, k, v, scale, False, True, None, False, None)
        assert weights is not None
        total = weights
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
