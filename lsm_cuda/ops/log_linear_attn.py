"""Log-linear attention: one state per bucket of a Fenwick tree over the past."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _chunk
from ._common import accumulation_dtype, autocast, check_in_place, check_rank, check_shape
from ._running import sequence_index

__all__ = ["LogLinearAttentionState", "chunk_log_linear_attn", "log_linear_attn_step"]


class LogLinearAttentionState(NamedTuple):
    """Where N sequences stand.

    Level ℓ of 1 … L−1 divides a sequence into blocks of ``2^ℓ`` tokens. While a block's first half
    runs, its state gathers it; in the second half the state only decays and is read.

    Attributes:
        levels: ``[N, L − 1, HV, K, V]`` fp32 (fp64 for fp64 inputs).
        length: tokens so far, ``[N]`` int64.
    """

    levels: Tensor
    length: Tensor


def chunk_log_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    initial_state: LogLinearAttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = 1.0,
) -> tuple[Tensor, LogLinearAttentionState | None]:
    r"""Log-linear attention over whole sequences.

    ``o_t = scale · Σ_{s≤t} λ_t^{ℓ(t,s)} e^{g_{s+1} + … + g_t} (q_t·k_s) v_s``, where the level
    ``ℓ(t, s)`` is the bit length of ``t xor s``: 0 for the token itself, and else the level of the
    Fenwick bucket of the prefix of t that holds s. Positions count from the start of the sequence.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``, HV a multiple of H.
        g (Tensor): log decay ``[B, T, HV]``, natural log, ≤ 0, in the dtype of q or fp32.
        level_scales (Tensor): λ ``[B, T, HV, L]``, any floating dtype; L levels serve sequences of
            up to ``2^{L−1}`` tokens.
        initial_state (LogLinearAttentionState, optional): to continue, at any position.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        scale (float, optional): default 1; None for ``K ** -0.5``.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state or None.

    Raises:
        ValueError: level_scales of another shape, or too few levels for T. Beyond the levels of a
            continued or packed sequence nothing is read.
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in every floating tensor. One scan of the engine per level, so log₂ T
        of them: O(T log T) work and memory. Each reads q and v, reads k and writes it masked, and
        reads and writes o.

    Source: Log-Linear Attention, arXiv:2506.04761.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 2))
        >>> chunk_log_linear_attn(q, k, v, g, torch.rand(1, 100, 2, 8))[0].shape
        torch.Size([1, 100, 2, 32])
    """
    q, k, v = autocast(q, k, v)
    B, T, _, K = q.shape
    _check_scales("chunk_log_linear_attn", "[B, T, HV, L]", level_scales, v)
    L = level_scales.shape[-1]
    scale = K**-0.5 if scale is None else scale
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    length = torch.zeros(N, dtype=torch.int64, device=q.device)
    levels = None
    if initial_state is not None:
        levels, length = initial_state
    elif cu_seqlens is None and T > 1 << (L - 1):
        raise ValueError(
            f"lsm::chunk_log_linear_attn: level_scales must have at least "
            f"{1 + (T - 1).bit_length()} levels for T = {T}, got L = {L}"
        )
    if cu_seqlens is None:
        position = length[:, None] + torch.arange(T, device=q.device)
        lengths = length + T
    else:
        owner, _ = sequence_index(T, cu_seqlens)
        place = torch.arange(T, device=q.device) - cu_seqlens[owner]
        position = (length[owner] + place)[None]
        lengths = length + cu_seqlens.diff()

    level_scales = level_scales.to(accumulation_dtype(q))
    o = _own(q, k, level_scales, scale) * v
    # From zero, blocks with a first half beyond T are never read, and the states of two such levels
    # are alike.
    deepest = L - 1
    if initial_state is None:
        deepest = min(deepest, (T.bit_length() + 1) if output_final_state else (T - 1).bit_length())
    states: list[Tensor] = []
    for level in range(1, deepest + 1):
        half = 1 << (level - 1)
        second = (position & half) != 0
        starts = (position & (2 * half - 1)) == 0
        read, state = _chunk.chunk(
            "simple_gla", q, k.masked_fill(second[..., None, None], 0), v,
            g.masked_fill(starts[..., None], -torch.inf), scale,
            None if levels is None else levels[:, level - 1],
            output_final_state, cu_seqlens,
        )  # fmt: skip
        o = o + (level_scales[..., level] * second[..., None])[..., None] * read
        if state is not None:
            states.append(state)
    if not output_final_state:
        return o.to(v.dtype), None
    states += states[-1:] * (L - 1 - len(states))
    levels = torch.stack(states, 1) if states else o.new_zeros(N, 0, v.shape[2], K, v.shape[3])
    return o.to(v.dtype), LogLinearAttentionState(levels, lengths)


def log_linear_attn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    state: LogLinearAttentionState,
    scale: float | None = 1.0,
) -> Tensor:
    r"""One token of :func:`chunk_log_linear_attn`; ``state`` is updated in place, all of its
    levels in one step of the engine.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        g (Tensor): log decay ``[B, HV]``, natural log, in the dtype of q or fp32.
        level_scales (Tensor): λ ``[B, HV, L]``.
        state (LogLinearAttentionState): ``levels [B, L − 1, HV, K, V]``, contiguous.
        scale (float, optional): default 1; None for ``K ** -0.5``.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        ValueError: level_scales of another shape.
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = LogLinearAttentionState(
        ...     torch.zeros(1, 7, 2, 32, 32), torch.zeros(1, dtype=torch.int64))
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> log_linear_attn_step(q, k, v, torch.zeros(1, 2), torch.rand(1, 2, 8), state).shape
        torch.Size([1, 2, 32])
    """
    op = "log_linear_attn_step"
    check_rank(op, "q", q, "[B, H, K]")
    check_rank(op, "v", v, "[B, HV, V]")
    B, _, K = q.shape
    _check_scales(op, "[B, HV, L]", level_scales, v)
    scale = K**-0.5 if scale is None else scale
    levels, length = state
    n = level_scales.shape[-1] - 1
    check_in_place(
        op, "levels", levels, "[B, L - 1, HV, K, V]", (B, n, v.shape[1], K, v.shape[2]), q
    )
    check_shape(op, "length", length, "[B]", (B,))
    if length.dtype != torch.int64:
        got = str(length.dtype).removeprefix("torch.")
        raise RuntimeError(f"lsm::{op}: length must have dtype int64, got {got}")
    half = 1 << torch.arange(n, device=q.device)
    second = (length[:, None] & half) != 0  # [B, n]
    starts = (length[:, None] & (2 * half - 1)) == 0

    def per_level(x: Tensor) -> Tensor:
        return x[:, None].expand(B, n, *x.shape[1:])

    read: Tensor = _chunk.step(
        "simple_gla",
        per_level(q).flatten(0, 1),
        per_level(k).masked_fill(second[..., None, None], 0).flatten(0, 1),
        per_level(v).flatten(0, 1),
        per_level(g).masked_fill(starts[..., None], -torch.inf).flatten(0, 1),
        levels.view(B * n, *levels.shape[2:]),
        scale,
        "chunk_log_linear_attn",
    ).view(B, n, *v.shape[1:])
    length.add_(1)
    level_scales = level_scales.to(accumulation_dtype(q))
    weights = (level_scales[..., 1:].transpose(1, 2) * second[..., None])[..., None]
    return ((weights * read).sum(1) + _own(q, k, level_scales, scale) * v).to(v.dtype)


def _own(q: Tensor, k: Tensor, level_scales: Tensor, scale: float) -> Tensor:
    """What every token contributes to itself, ``[..., HV, 1]``."""
    wide = level_scales.dtype
    own = (q.to(wide) * k.to(wide)).sum(-1, keepdim=True) * scale
    group = level_scales.shape[-2] // q.shape[-2]
    return own.repeat_interleave(group, -2) * level_scales[..., :1]


def _check_scales(op: str, dims: str, level_scales: Tensor, v: Tensor) -> None:
    shape = v.shape[:-1]
    if level_scales.shape[:-1] != shape or level_scales.shape[-1:] in ((), (0,)):
        raise ValueError(
            f"lsm::{op}: level_scales must have shape {dims} with {dims[1:-4]} = {[*shape]}, "
            f"got {[*level_scales.shape]}"
        )
