"""The chunk engine: linear attention with a diagonal decay, whole sequences and single tokens."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor

from . import _chunk
from ._common import (
    accumulation_dtype,
    backwards,
    check_in_place,
    check_no_gradient,
    check_rank,
    check_shape,
)

__all__ = ["chunk_gla", "fused_chunk_gla", "fused_recurrent_gla", "gla_step"]


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    gv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Gated linear attention over whole sequences.

    ``S_t = Diag(exp g_t) S_{t-1} Diag(exp gv_t) + k_t v_tᵀ``,   ``o_t = scale · S_tᵀ q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        g (Tensor, optional): log decay of the key channels ``[B, T, HV, K]``, natural log, ≤ 0, in
            the dtype of q or fp32; ``-inf`` resets. Default: none.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        state_v_first (bool): states are ``[N, HV, V, K]`` instead.
        cu_seqlens (Tensor, optional): ``[N + 1]`` int32 or int64 boundaries of N sequences packed
            into one row (``B == 1``), on the device of q: starts at 0, never decreases, ends at T.
            On a GPU it is checked on the device, without synchronising: outputs of a call whose
            boundaries are wrong are NaN.
        gv (Tensor, optional): log decay of the value channels ``[B, T, HV, V]``, like g. Default:
            none. Either gate alone is one call of the engine; see the note for both.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K or V over 256 on CUDA.

    Note: differentiable once in q, k, v, the gates and initial_state; deterministic. Under autocast
        q, k and v are cast, the gate and the state keep their dtype. With both gates each value
        channel is run as a head of its own, whose gate is the sum: exact for any gates, at V times
        the gate traffic of one, a few channels at a time.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635;
    both gates: Fine-Tuning Pre-trained Transformers into Decaying Fast Weights, arXiv:2210.04243.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 2, 32)) / 16
        >>> o, state = chunk_gla(q, k, v, g, output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    name, gate = "linear_attn", None
    if g is not None:
        name, gate = "gla", g
    elif gv is not None:
        name, gate = "gla_value", gv
    if g is None or gv is None:
        return _chunk.chunk(
            name, q, k, v, gate, scale, initial_state, output_final_state, cu_seqlens, state_v_first
        )
    if state_v_first and initial_state is not None:
        initial_state = initial_state.mT
    o, state = _two_sided(q, k, v, g, gv, scale, initial_state, output_final_state, cu_seqlens)
    return o, state.mT if state_v_first and state is not None else state


# Gate values per token and head that a call with both gates holds at a time.
_GATES_AT_ONCE = 1024


def _value_channels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    gv: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Both gates, each of the few channels of v a head with one value channel."""
    HV, V = v.shape[2:]
    g, gv = (x.to(accumulation_dtype(x)) for x in (g, gv))
    gates = (g.unsqueeze(-2) + gv.unsqueeze(-1)).flatten(2, 3)  # [B, T, HV V, K]
    if initial_state is not None:
        initial_state = initial_state.mT.flatten(1, 2).unsqueeze(-1)
    o, state = _chunk.chunk(
        "gla", q, k, v.flatten(2).unsqueeze(-1), gates, scale, initial_state, output_final_state,
        cu_seqlens,
    )  # fmt: skip
    if state is not None:
        state = state.view(state.shape[0], HV, V, q.shape[-1]).mT
    return o.view(*o.shape[:2], HV, V), state


def _two_sided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    gv: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Value channels a few at a time; backward makes their gates again instead of keeping them."""
    op = "chunk_gla"
    check_rank(op, "q", q, "[B, T, H, K]")
    check_rank(op, "v", v, "[B, T, HV, V]")
    check_shape(op, "g", g, "[B, T, HV, K]", (*v.shape[:3], q.shape[-1]))
    check_shape(op, "gv", gv, "[B, T, HV, V]", v.shape)
    if initial_state is not None:
        N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = (N, v.shape[2], q.shape[-1], v.shape[-1])
        check_shape(op, "initial_state", initial_state, "[N, HV, K, V]", expected)
    outputs, states = [], []
    width = max(1, _GATES_AT_ONCE // q.shape[-1])
    for start in range(0, v.shape[-1], width):
        columns = slice(start, start + width)
        o, state = torch.utils.checkpoint.checkpoint(
            _value_channels, q, k, v[..., columns], g, gv[..., columns],
            None if initial_state is None else initial_state[..., columns],
            cu_seqlens, scale, output_final_state, use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, -1), torch.cat(states, -1) if output_final_state else None


def fused_chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """FLA's third name for :func:`chunk_gla`; one kernel serves them all."""
    return chunk_gla(q, k, v, g, scale, initial_state, output_final_state)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gla` under FLA's recurrent name; ``reverse`` runs time backwards.

    Args: as :func:`chunk_gla`; ``gk`` is its ``g``.
    """
    if not reverse:
        return chunk_gla(
            q, k, v, gk, scale, initial_state, output_final_state, state_v_first, cu_seqlens, gv
        )

    def run(q, k, v, gk, gv, **rest):  # type: ignore[no-untyped-def]
        return chunk_gla(q, k, v, gk, scale, gv=gv, state_v_first=state_v_first, **rest)

    return backwards(
        run, (q, k, v, gk, gv), initial_state, cu_seqlens, output_final_state=output_final_state
    )


def gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float | None = None,
    gv: Tensor | None = None,
) -> Tensor:
    r"""One token of gated linear attention; ``state`` is updated in place, nothing else is
    allocated but the output.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        g (Tensor, optional): log decay of the key channels ``[B, HV, K]``, natural log, in the
            dtype of q or fp32.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.
        gv (Tensor, optional): log decay of the value channels ``[B, HV, V]``, like g. With both,
            the state is read and written once more.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`chunk_gla` where gradients are needed.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> gla_step(q, k, v, torch.zeros(1, 2, 32), state).shape
        torch.Size([1, 2, 32])
    """
    if gv is None:
        name = "linear_attn" if g is None else "gla"
        return _chunk.step(name, q, k, v, g, state, scale, "chunk_gla")
    if g is not None:
        op = "gla_step"
        check_no_gradient(op, "chunk_gla", q, k, v, g, gv, state)
        check_rank(op, "q", q, "[B, H, K]")
        check_rank(op, "v", v, "[B, HV, V]")
        check_shape(op, "k", k, "[B, H, K]", q.shape)
        check_shape(op, "g", g, "[B, HV, K]", (*v.shape[:-1], q.shape[-1]))
        check_shape(op, "gv", gv, "[B, HV, V]", v.shape)
        check_in_place(op, "state", state, "[B, HV, K, V]", (*g.shape, v.shape[-1]), q)
        state.mul_(g.to(state.dtype).exp().unsqueeze(-1))
    return _chunk.step("gla_value", q, k, v, gv, state, scale, "chunk_gla")
