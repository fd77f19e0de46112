"""Gated slot attention: M slots per head that two gated linear attentions write and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _chunk
from ._common import (
    autocast,
    backwards,
    check_in_place,
    check_no_gradient,
    check_rank,
    check_shape,
    check_state,
)
from ._running import running_softmax

__all__ = ["chunk_gsa", "fused_recurrent_gsa", "gsa_step"]

# What stands between the two passes, over the slots.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "swish": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "none": lambda x: x,
}
# Their derivative jumps at 0, where bf16 cannot tell the sides of many scores (docs/numerics.md).
JUMPS = ("relu",)


def between(op: str, activation: str) -> Callable[[Tensor], Tensor]:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"lsm::{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    return ACTIVATIONS[activation]


def check_slots(op: str, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> int:
    """Shapes of whole sequences or single tokens; returns query heads per slot head."""
    lead = "B" if q.dim() == 3 else "B, T"
    check_rank(op, "k", k, f"[{lead}, H, K]")
    *first, H, K = k.shape
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != K or q.shape[-2] % H:
        raise RuntimeError(
            f"lsm::{op}: q must have shape [{lead}, HQ, K] with HQ a multiple of the heads of k = "
            f"{[*k.shape]}, got {[*q.shape]}"
        )
    check_shape(op, "v", v, f"[{lead}, H, V]", (*first, H, v.shape[-1]))
    check_shape(op, "s", s, f"[{lead}, H, M]", (*first, H, s.shape[-1]))
    return q.shape[-2] // H


def two_passes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    scale: float | None,
    states: Sequence[Tensor | None],
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    total: Tensor | None = None,
    exact: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Slots as values, activation, slots as keys. ``total`` divides what either pass reads: the
    weight that slots kept as sums have gathered. ``exact``: scores between the passes in fp32."""
    groups = q.shape[2] // k.shape[2]
    hk, hv = states
    if groups > 1:
        k, v, s, g = (x.repeat_interleave(groups, 2) for x in (k, v, s, g))
        total = None if total is None else total.repeat_interleave(groups, 2)
        hk, hv = (x if x is None else x.repeat_interleave(groups, 1) for x in (hk, hv))

    def mean(x: Tensor) -> Tensor:
        return x if total is None else (x / total).to(x.dtype)

    run = partial(_chunk.chunk, as_given=True)
    rest = output_final_state, cu_seqlens
    if exact:
        x, hk = run("gla_value", q.float(), k.float(), s.float(), g, scale, hk, *rest)
    else:
        x, hk = run("gla_value", q, k, s, g, scale, hk, *rest)
    p = mean(activation(mean(x))).to(v.dtype)
    o, hv = run("gla", p, s, v, g, 1.0, hv, *rest)
    if hk is None or hv is None:
        return o, None
    return o, (hk[:, ::groups].contiguous(), hv[:, ::groups].contiguous())


def running_means(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    scale: float | None,
    initial_state: tuple[Tensor, ...] | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Two passes over slots kept as sums of weight ``e^{s - c}``, divided where they are read."""
    check_slots(op, q, k, v, s)
    check_state(op, initial_state, "hk", "hv", "z")
    hk, hv, z = (None, None, None) if initial_state is None else initial_state
    if z is not None:
        N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_shape(op, "z", z, "[N, 1, H, M]", (N, 1, *s.shape[2:]))
    q, k, v = autocast(q, k, v)  # s are logits, and keep their dtype until they are weights
    half = q.dtype == torch.float16
    if half:  # whose range the sums may leave
        q, k, v, s = q.float(), k.float(), v.float(), s.float()
    slots = running_softmax(s, z, cu_seqlens)
    if slots.first is not None and hk is not None and hv is not None:
        hk, hv = hk * slots.first.unsqueeze(-2), hv * slots.first.unsqueeze(-1)
    o, state = two_passes(
        q, k, v, slots.weights.to(q.dtype), slots.decay, scale, (hk, hv), output_final_state,
        cu_seqlens, activation, slots.total,
    )  # fmt: skip
    o = o.half() if half else o
    if state is None:
        return o, None
    hk, hv = state
    return o, (hk / slots.last.unsqueeze(-2), hv / slots.last.unsqueeze(-1), slots.z)


def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None,
    activation: str = "softmax",
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    r"""Gated slot attention over whole sequences.

    ``Kᵗ = Diag(exp g_t) Kᵗ⁻¹ + s_t k_tᵀ``,   ``Vᵗ = Diag(exp g_t) Vᵗ⁻¹ + s_t v_tᵀ``,
    ``o_t = Vᵗᵀ softmax(scale · Kᵗ q_t)``, with M slots as rows of K and V.

    Args:
        q (Tensor): queries ``[B, T, HQ, K]``, bf16, fp16 or fp32 (fp64 too on CPU); HQ is a
            multiple of H, and query head ``h`` reads the slots of head ``h // (HQ // H)``.
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, H, V]``.
        s (Tensor): what each slot takes in ``[B, T, H, M]``; the layer's ``1 - exp(g)``.
        g (Tensor, optional): log decay of the slots ``[B, T, H, M]``, natural log, ≤ 0, in the
            dtype of q or fp32. None: s are logits and slots are running means, :func:`chunk_abc`.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (tuple, optional): the slots' keys, transposed, ``[N, H, K, M]``, and values
            ``[N, H, M, V]``, fp32 (fp64 for fp64 inputs); without g also z, as in
            :func:`chunk_abc`.
        output_final_state (bool): also return the state after the last token.
        checkpoint_level (int): 0, 1 or 2, taken for FLA's sake: what its levels 1 and 2 recompute
            in the backward pass (cumulative gates, chunk states) is never stored here.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        activation (str): in the place of softmax: swish, relu, relu2 (its square) or none.

    Returns:
        ``o [B, T, HQ, V]`` in the dtype of v, and the final state like initial_state, or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K or M over 256 on CUDA.
        ValueError: an unknown activation or checkpoint_level.

    Note: differentiable once in q, k, v, s, g and the state; deterministic. Two calls of the chunk
        engine; between them the slots' scores ``[B, T, HQ, M]`` are written and read twice in the
        dtype of q; for relu in bf16 the first call and its scores are in fp32. With HQ > H, k, v,
        s and g are repeated in memory.

    Source: Gated Slot Attention for Efficient Linear-Time Sequence Modeling, arXiv:2409.07146.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> g = F.logsigmoid(torch.randn(1, 100, 2, 16)) / 8
        >>> o, (hk, hv) = chunk_gsa(q, k, v, 1 - g.exp(), g, output_final_state=True)
        >>> o.shape, hk.shape, hv.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 16]), torch.Size([1, 2, 16, 32]))
    """
    op = "chunk_gsa"
    if checkpoint_level not in (0, 1, 2):
        raise ValueError(f"lsm::{op}: checkpoint_level must be 0, 1 or 2, got {checkpoint_level!r}")
    softmax = between(op, activation)
    if g is None:
        return running_means(
            op, q, k, v, s, scale, initial_state, output_final_state, cu_seqlens, softmax
        )
    check_slots(op, q, k, v, s)
    check_shape(op, "g", g, "[B, T, H, M]", s.shape)
    check_state(op, initial_state, "hk", "hv")
    states = (None, None) if initial_state is None else initial_state
    q, k, v, s = autocast(q, k, v, s)
    return two_passes(
        q, k, v, s, g, scale, states, output_final_state, cu_seqlens, softmax,
        exact=activation in JUMPS and q.dtype == torch.bfloat16,
    )  # fmt: skip


def fused_recurrent_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    activation: str = "softmax",
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """:func:`chunk_gsa` under FLA's recurrent name; ``reverse`` runs time backwards."""
    run = partial(
        chunk_gsa, scale=scale, output_final_state=output_final_state, activation=activation
    )
    if reverse:
        return backwards(run, (q, k, v, s, g), initial_state, cu_seqlens)
    return run(q, k, v, s, g, initial_state=initial_state, cu_seqlens=cu_seqlens)


def two_passes_step(
    op: str,
    chunk_name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    state: Sequence[Tensor],
    scale: float | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    hk, hv = state
    groups = check_slots(op, q, k, v, s)
    B, H, M = s.shape
    check_in_place(op, "hk", hk, "[B, H, K, M]", (B, H, k.shape[-1], M), q)
    check_in_place(op, "hv", hv, "[B, H, M, V]", (B, H, M, v.shape[-1]), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if groups == 1:
        x = _chunk.step("gla_value", q, k, s, g, hk, scale, chunk_name)
        return _chunk.step("gla", activation(x), s, v, g, hv, 1.0, chunk_name)
    # Slots are written once, by the first query of a group; then all of the group read them.
    one = q[:, ::groups]
    _chunk.step("gla_value", one, k, s, g, hk, scale, chunk_name)
    x = scale * torch.einsum(
        "bhgk,bhkm->bhgm", q.view(q.shape[0], -1, groups, q.shape[2]).to(hk.dtype), hk
    )
    p = activation(x.to(q.dtype))
    _chunk.step("gla", p[:, :, 0], s, v, g, hv, 1.0, chunk_name)
    return torch.einsum("bhgm,bhmv->bhgv", p.to(hv.dtype), hv).flatten(1, 2).to(v.dtype)


def gsa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    state: tuple[Tensor, Tensor],
    scale: float | None = None,
    activation: str = "softmax",
) -> Tensor:
    r"""One token of gated slot attention; ``state`` is updated in place.

    Args:
        q (Tensor): ``[B, HQ, K]``, HQ a multiple of H.
        k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, H, V]``.
        s (Tensor): what each slot takes in ``[B, H, M]``.
        g (Tensor): log decay of the slots ``[B, H, M]``, natural log.
        state (tuple): the slots' keys, transposed, ``[B, H, K, M]``, and values ``[B, H, M, V]``,
            fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.
        activation (str): as in :func:`chunk_gsa`.

    Returns:
        ``o [B, HQ, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.
        ValueError: an unknown activation.

    Note: inference only. Use :func:`chunk_gsa` where gradients are needed. With HQ > H the state is
        read once more.

    Example:
        >>> state = torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 16, 32)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> g = F.logsigmoid(torch.randn(1, 2, 16))
        >>> gsa_step(q, k, v, 1 - g.exp(), g, state).shape
        torch.Size([1, 2, 32])
    """
    op = "gsa_step"
    softmax = between(op, activation)
    check_no_gradient(op, "chunk_gsa", q, k, v, s, g, *state)
    return two_passes_step(op, "chunk_gsa", q, k, v, s, g, state, scale, softmax)
