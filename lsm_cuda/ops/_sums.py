"""Weighted sums over the past with the sum of the weights beside them, and their quotient."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _chunk
from ._common import (
    accumulation_dtype,
    check_in_place,
    check_no_forward_ad,
    check_rank,
    check_shape,
)

_WIDEST = 256  # columns of values that the CUDA kernels take
ROW = 8  # columns that make rows of values whole 16-byte pieces in every dtype


def sums(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    weight: Tensor | None,
    scale: float | None,
    initial_state: tuple[Tensor | None, Tensor | None] = (None, None),
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """``Σ_s a_ts w_s v_s`` and ``Σ_s a_ts w_s``, where ``a_ts`` is the decayed score of operator
    ``name``.

    Args:
        weight: ``w [B, T, HV]``; None for ones.
        initial_state: of the sums of ``w k vᵀ``, ``[N, HV, K, V]``, and of ``w k``,
            ``[N, HV, K]``; None for zeros.

    Returns:
        ``[B, T, HV, V]``, ``[B, T, HV, 1]`` and both final states.

    The weights are one more column of values (eight, for the alignment of rows), so v is read and
    written once more; where that is more columns than kernels take, a second call, which reads q, k
    and g again. fp16 runs in fp32, since its range ends at 65504.
    """
    check_rank(name, "q", q, "[B, T, H, K]")
    check_rank(name, "v", v, "[B, T, HV, V]")
    check_no_forward_ad(f"{name}_fwd", q=q, k=k, v=v, g=g, weight=weight)
    if q.dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    column = v.new_ones(1) if weight is None else weight[..., None].to(v.dtype)
    V, wide = v.shape[-1], accumulation_dtype(q)
    S, z = initial_state
    if S is not None or z is not None:
        N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = N, v.shape[2], q.shape[-1], V
        S = q.new_zeros(shape, dtype=wide) if S is None else S.to(wide)
        z = q.new_zeros(shape[:-1], dtype=wide) if z is None else z.to(wide)
        check_shape(name, "initial_state", S, "[N, HV, K, V]", shape)
        check_shape(name, "the normaliser's initial_state", z, "[N, HV, K]", shape[:-1])
        z = z[..., None]

    run = partial(_chunk.chunk, name, q, k, as_given=True)
    rest = output_final_state, cu_seqlens
    more = ROW - V % ROW
    if V + more > _WIDEST:
        above, S = run(v if weight is None else v * column, g, scale, S, *rest)
        below, z = run(column.expand(*v.shape[:-1], 1), g, scale, z, *rest)
    else:
        v = _with_weights(v, column, more)
        h0 = None if S is None or z is None else torch.cat([S, z.expand(*z.shape[:-1], more)], -1)
        o, h = run(v, g, scale, h0, *rest)
        above, below, _ = torch.split(o, [V, 1, more - 1], -1)
        if h is not None:
            S, z = h[..., :V].contiguous(), h[..., V : V + 1]
    if not output_final_state or S is None or z is None:
        return above, below, None
    return above, below, (S, z[..., 0].contiguous())


def step_sums(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    weight: Tensor | None,
    state: tuple[Tensor, Tensor],
    scale: float | None,
    chunk_name: str,
) -> tuple[Tensor, Tensor]:
    """One token of :func:`sums`; both states are updated in place. Without weight the second has
    one row per head of k, ``[B, H, K]``."""
    op = f"{name}_step"
    check_rank(op, "q", q, "[B, H, K]")
    check_rank(op, "v", v, "[B, HV, V]")
    S, z = state
    (_, H, K), (B, HV, V) = q.shape, v.shape
    dims, rows = ("[B, H, K]", H) if weight is None else ("[B, HV, K]", HV)
    check_in_place(op, "state", S, "[B, HV, K, V]", (B, HV, K, V), q)
    check_in_place(op, "the normaliser's state", z, dims, (B, rows, K), q)
    if q.dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    if weight is None:
        column = v.new_ones(1).expand(*z.shape[:-1], 1)
    else:
        column = weight[..., None].to(v.dtype)
        v = v * column
    above = _chunk.step(name, q, k, v, g, S, scale, chunk_name)
    below = _chunk.step(name, q, k, column, g, z[..., None], scale, chunk_name)
    return above, below.repeat_interleave(HV // rows, 1)


class _WithWeights(torch.autograd.Function):
    """One pass over v where a product and a concatenation are two."""

    @staticmethod
    def forward(v: Tensor, column: Tensor, more: int) -> Tensor:
        V = v.shape[-1]
        out = v.new_empty(*v.shape[:-1], V + more)
        torch.mul(v, column, out=out[..., :V])
        out[..., V:] = column
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], v: Tensor, column: Tensor, more: int
    ) -> tuple[Tensor, int]:
        """One more leading dimension."""
        rows = (
            x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip((v, column), in_dims, strict=False)
        )
        return _WithWeights.apply(*rows, more), 0  # type: ignore[no-untyped-call]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        v, column = ctx.saved_tensors
        of_v, of_column = torch.split(grad, [v.shape[-1], grad.shape[-1] - v.shape[-1]], -1)
        wide = accumulation_dtype(v)
        total = (of_v * v).sum(-1, keepdim=True, dtype=wide)
        total = total + of_column.sum(-1, keepdim=True, dtype=wide)
        return of_v * column, total.to(column.dtype), None


def _with_weights(v: Tensor, column: Tensor, more: int) -> Tensor:
    """``v · column`` and ``more`` times the column, side by side; a column of one element is 1."""
    if column.dim() == 1:
        return torch.cat([v, column.expand(*v.shape[:-1], more)], -1)
    if torch.compiler.is_compiling():  # which writes one kernel of its own
        return torch.cat([v * column, column.expand(*v.shape[:-1], more)], -1)
    return _WithWeights.apply(v, column, more)  # type: ignore[no-any-return, no-untyped-call]


class Quotient(torch.autograd.Function):
    """``above / below``, ``[..., V]`` by ``[..., 1]``; keeps the result for backward instead of
    above, and its gradient of below is one sum in fp32, not a chain of roundings."""

    generate_vmap_rule = True

    @staticmethod
    def forward(above: Tensor, below: Tensor) -> Tensor:
        return above / below

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        o, below = ctx.saved_tensors
        grad = grad / below
        # of the gradient as rounded: its error is then common to both, and cancels where they do
        total = (grad * o).sum(-1, keepdim=True, dtype=accumulation_dtype(o))
        return grad, -total.to(below.dtype)


def quotient(above: Tensor, below: Tensor) -> Tensor:
    return Quotient.apply(above, below)  # type: ignore[no-any-return, no-untyped-call]


def ratio(above: Tensor, below: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``above / below``, with ``|below|`` raised to ``eps`` where it is smaller, keeping its sign
    (plus at zero)."""
    floor = torch.where(below < 0, -eps, eps).to(below.dtype)
    return quotient(above, torch.where(below.abs() < eps, floor, below)).to(dtype)
