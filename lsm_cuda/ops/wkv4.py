"""RWKV-4 and its kin: running averages of values with weights e^k, which must not overflow.

With any c that bounds the logarithms of all weights so far,

    S_t = e^{c_{t-1} - r - c_t} S_{t-1} + e^{k_t - c_t} v_t      Z_t = the same with v = 1

hold the weighted sums over e^{c_t}, and no exponent is positive. c is the running maximum ``max_i
(k_i - (t - i) r)``, found at once as a cumulative maximum of ``k_i + i r`` in fp64. Results do not
depend on it, so it has no gradient; the two recurrences are the scan's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._common import accumulation_dtype, check_no_gradient, check_rank, check_shape, check_state
from ._running import sequence_index
from .scan import scan

__all__ = ["aft_full", "aft_simple", "bi_wkv", "wkv4", "wkv4_step"]

State = tuple[Tensor, Tensor, Tensor]


class _Sums(NamedTuple):
    """Numerator and denominator over e^bound."""

    numerator: Tensor
    denominator: Tensor
    bound: Tensor


def _merge(*parts: _Sums) -> Tensor:
    """The average over several sums; bounds of −inf belong to empty ones."""
    bound = parts[0].bound
    for part in parts[1:]:
        bound = torch.maximum(bound, part.bound)
    weights = [torch.exp(part.bound - bound) for part in parts]
    numerator = sum(w * part.numerator for w, part in zip(weights, parts, strict=True))
    denominator = sum(w * part.denominator for w, part in zip(weights, parts, strict=True))
    assert isinstance(numerator, Tensor)
    return numerator / denominator


@torch.no_grad()
def _bounds(
    k: Tensor, rate: Tensor, first: Tensor | None, start: Tensor, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """c after and before every token, ``[B, T, D]`` fp64; ``first``: before each token's sequence,
    ``start``: where that sequence starts, ``[T]``."""
    rate = rate.double()
    age = (torch.arange(k.shape[1], device=k.device) - start).double()[:, None] * rate
    x = k.double() + age
    if first is not None:
        x = torch.maximum(x, first.double() - rate)  # it decays before the first token comes
    if sequence is not None and x.numel():  # later sequences start above all earlier ones
        step = x.amax().clamp(min=-1e300) - x.clamp(min=-1e6).amin().clamp(max=1e300) + 1.0
        lift = (sequence.double() * step)[:, None]
        x = (x + lift).movedim(1, -1).contiguous().cummax(-1).values.movedim(-1, 1) - lift
    else:
        x = x.movedim(1, -1).contiguous().cummax(-1).values.movedim(-1, 1)
    after = x - age
    before = torch.cat([after[:, :1], after[:, :-1]], 1)
    is_first = (torch.arange(k.shape[1], device=k.device) == start)[None, :, None]
    none = torch.full_like(after, -torch.inf) if first is None else first.double()
    return after, torch.where(is_first, none, before)


def _sums(
    k: Tensor, v: Tensor, rate: Tensor, state: State | None, cu_seqlens: Tensor | None
) -> tuple[_Sums, State]:
    """What precedes every token, and what follows the last one of every sequence; in the dtype of
    states."""
    dtype, T = accumulation_dtype(k), k.shape[1]
    k, v, rate = (x.to(dtype) for x in (k, v, rate))
    sequence, start = None, torch.zeros(T, dtype=torch.long, device=k.device)
    if cu_seqlens is not None:
        sequence, _ = sequence_index(T, cu_seqlens)
        start = cu_seqlens[sequence].long() if T else start

    def of_tokens(x: Tensor) -> Tensor:
        """A row per sequence, at every token."""
        return x[:, None] if sequence is None else x[sequence][None]

    first = None if state is None else of_tokens(state[2])
    after, before = _bounds(k.detach(), rate.detach(), first, start, sequence)
    weight = torch.exp((k.detach().double() - after).to(dtype) + (k - k.detach()))
    # what is before a first token of a fresh sequence is nothing, at any decay
    change = torch.where(before == -torch.inf, 0.0, before - rate.double().detach() - after)
    gate = change.to(dtype) + (rate.detach() - rate)  # the gradient of the rate, and only that
    results, ends = [], []
    for i, x in enumerate((weight * v, weight)):
        h0 = None if state is None else state[i].to(dtype)
        h, last = scan(x, gate, h0, True, cu_seqlens, log=True)
        assert last is not None
        is_first = (torch.arange(T, device=k.device) == start)[None, :, None]
        shifted = torch.cat([h[:, :1], h[:, :-1]], 1)
        initial = torch.zeros_like(h) if h0 is None else of_tokens(h0)
        results.append(torch.where(is_first, initial, shifted))
        ends.append(last)
    if cu_seqlens is None:
        none = torch.full_like(ends[0], -torch.inf) if state is None else state[2].to(dtype)
        bound = after[:, -1].to(dtype) if T else none
    else:
        none = torch.full_like(ends[0], -torch.inf) if state is None else state[2].to(dtype)
        filled = cu_seqlens[1:] > cu_seqlens[:-1]
        at = (cu_seqlens[1:] - 1).clamp(min=0)
        bound = torch.where(filled[:, None], after[0, at].to(dtype), none) if T else none
    return _Sums(results[0], results[1], before.to(dtype)), (ends[0], ends[1], bound.detach())


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

    Note: differentiable once; deterministic; no exponent is positive, however large k. Two scans in
        the dtype of states and PyTorch operations around them: several passes over memory.

    Source: RWKV, arXiv:2305.13048, eqs. 16-19.

    Example:
        >>> w, u = torch.randn(2, 64)
        >>> k, v = torch.randn(2, 1, 100, 64)
        >>> o, state = wkv4(w, u, k, v, output_final_state=True)
        >>> o.shape, len(state)
        (torch.Size([1, 100, 64]), 3)
    """
    _check("wkv4", k, v, w=w, u=u)
    check_state("wkv4", initial_state, "numerator", "denominator", "scale")
    past, state = _sums(k, v, w.exp(), initial_state, cu_seqlens)
    return _with_own(past, k, v, u).to(v.dtype), state if output_final_state else None


def _check(op: str, k: Tensor, v: Tensor, **channels: Tensor) -> None:
    check_rank(op, "k", k, "[B, T, D]")
    check_shape(op, "v", v, "[B, T, D]", k.shape)
    for name, t in channels.items():
        check_shape(op, name, t, "[D]", k.shape[-1:])


def _with_own(past: _Sums, k: Tensor, v: Tensor, u: Tensor, *more: _Sums) -> Tensor:
    """The average that adds the token itself, with weight e^{u + k}."""
    dtype = past.numerator.dtype
    logit = k.to(dtype) + u.to(dtype)
    bound = logit.detach()
    weight = torch.exp(logit - bound)
    return _merge(past, *more, _Sums(weight * v.to(dtype), weight, bound))


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
    numerator, denominator, bound = state
    o = _with_own(_Sums(numerator, denominator, bound), k, v, u)
    key = k.to(bound.dtype)
    faded = bound - w.to(bound.dtype).exp()
    after = torch.maximum(faded, key)
    old, new = torch.exp(faded - after), torch.exp(key - after)
    numerator.mul_(old).add_(new * v.to(bound.dtype))
    denominator.mul_(old).add_(new)
    bound.copy_(after)
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
    past, state = _sums(k, v, still, initial_state, cu_seqlens)
    o = q.to(still.dtype).sigmoid() * _with_own(past, k, v, still)
    return o.to(v.dtype), state if output_final_state else None


def aft_full(q: Tensor, k: Tensor, v: Tensor, w: Tensor, causal: bool = True) -> Tensor:
    r"""The attention-free transformer: ``σ(q_t) ⊙ Σ_s e^{k_s + w_ts} v_s / Σ_s e^{k_s + w_ts}``.

    Args:
        q, k, v (Tensor): ``[B, T, D]``.
        w (Tensor): learned biases of pairs of positions, ``[T, T]``.
        causal (bool): sum over s ≤ t only.

    Returns:
        ``o [B, T, D]`` in the dtype of v.

    Note: two matrix products in fp64, whose exponents reach ±700: a row and a channel share no
        maximum that fp32 could be scaled by. Differentiable to any order.

    Source: An Attention Free Transformer, arXiv:2105.14103, eq. 2.

    Example:
        >>> q, k, v = torch.randn(3, 1, 20, 64)
        >>> aft_full(q, k, v, torch.randn(20, 20)).shape
        torch.Size([1, 20, 64])
    """
    _check("aft_full", k, v)
    check_shape("aft_full", "q", q, "[B, T, D]", k.shape)
    check_shape("aft_full", "w", w, "[T, T]", (k.shape[1], k.shape[1]))
    if k.shape[1] == 0:
        return v.clone()
    pairs, keys = w.double(), k.double()
    if causal:
        seen = torch.ones_like(pairs, dtype=torch.bool).tril()
        pairs = pairs.masked_fill(~seen, -torch.inf)
    pairs = torch.exp(pairs - pairs.amax(1, keepdim=True).detach())
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

    Source: Vision-RWKV, arXiv:2403.02308, eq. 2.

    Example:
        >>> w, u = torch.rand(2, 64)
        >>> k, v = torch.randn(2, 1, 100, 64)
        >>> bi_wkv(w, u, k, v).shape
        torch.Size([1, 100, 64])
    """
    _check("bi_wkv", k, v, w=w, u=u)
    rate = w.to(accumulation_dtype(k)) / max(k.shape[1], 1)
    past, _ = _sums(k, v, rate, None, None)
    future, _ = _sums(k.flip(1), v.flip(1), rate, None, None)
    future = _Sums(*(x.flip(1) for x in future))
    return _with_own(past, k, v, u, future).to(v.dtype)
