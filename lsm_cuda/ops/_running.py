"""Softmax over the tokens so far, as the chunk engine can compute it.

A channel with logits x_t holds the mean of what was written to it, weighted by e^{x_s}, s ≤ t. With
c_t any bound that rises with t and no x_s exceeds,

    S_t = e^{c_{t-1} - c_t} S_{t-1} + e^{x_t - c_t} v_t         n_t = the same with v = 1
    mean_t = S_t / n_t                                          log Σ_{s≤t} e^{x_s} = c_t + log n_t

holds whatever the c, so c has no gradient and neither has the decay: only e^{x_t - c_t} has. The c
here are integers, which makes every difference of them exact, however large the logits; n_t is at
least 1/e, and no two numbers of nearly equal size are subtracted anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import accumulation_dtype, check_no_forward_ad

_LARGEST = 2.0**30  # |c|; beyond it, decays of e^-(2^30) make no difference


def sequence_index(T: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each of T packed tokens, and whether it is its sequence's first."""
    t = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    n = torch.searchsorted(cu_seqlens[1:].contiguous(), t, right=True)
    n = n.clamp(max=max(cu_seqlens.shape[0] - 2, 0))
    return n, cu_seqlens[n] == t


def _cummax(x: Tensor) -> Tensor:
    """Along time, dimension 1, brought last: a scan over contiguous memory is many times faster."""
    return x.movedim(1, -1).contiguous().cummax(-1).values.movedim(-1, 1)


@torch.no_grad()
def bounds(
    x: Tensor, start: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``c_t``, the least integer that neither ``start`` nor any ``x_s``, s ≤ t, exceeds.

    Args:
        x: ``[B, T, ...]``.
        start: ``[N, ...]``, of the states that sequences begin with. None: there are none.

    Returns:
        ``c`` and ``c_{t-1} - c_t`` like x, in fp32 (fp64 for fp64 x), and c before the first token
        (None without start) and after the last one (``-inf`` if there was none), ``[N, ...]``.
    """
    dtype = accumulation_dtype(x)

    def ceiling(y: Tensor) -> Tensor:
        y = y.to(dtype).ceil().nan_to_num_(-_LARGEST, _LARGEST, -_LARGEST)
        return y.clamp_(-_LARGEST, _LARGEST)

    up, (T, *shape) = ceiling(x), x.shape[1:]
    start = None if start is None else ceiling(start)
    if cu_seqlens is None:
        if start is not None and T:
            up[:, 0] = torch.maximum(up[:, 0], start)
        c = _cummax(up)
        head = c[:, :1] if start is None else start.unsqueeze(1)
        previous = torch.cat([head, c[:, :-1]], 1)[:, :T]
    else:
        n, first = (y.view(1, T, *(1 for _ in shape)) for y in sequence_index(T, cu_seqlens))
        own = None if start is None or not start.numel() else start[n.flatten()].unsqueeze(0)
        if own is not None:
            up = torch.where(first, torch.maximum(up, own), up)
        # integers below 2^30 in size: 2^32 per sequence keeps them apart, exactly
        c = (_cummax(up.long() + (n << 32)) - (n << 32)).to(dtype)
        previous = torch.cat([c[:, :1], c[:, :-1]], 1)
        previous = torch.where(first, c if own is None else own, previous)

    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = c.new_full((N, *shape), -_LARGEST) if start is None else start
    if cu_seqlens is not None and T:
        lengths = cu_seqlens.diff().view(N, *(1 for _ in shape))
        last = torch.where(lengths > 0, c[0, (cu_seqlens[1:] - 1).clamp(0, T - 1)], last)
    elif T:
        last = c[:, -1]
    return c, previous - c, start, last.masked_fill(last == -_LARGEST, -torch.inf)


def divisor(n: Tensor) -> Tensor:
    """n, which is at least 1/e where anything was written, and elsewhere divides zeros."""
    return n.clamp(min=0.25)


@dataclass
class RunningSoftmax:
    """Operands of the engine for states that are means under a softmax over time."""

    weights: Tensor  # e^{x_t - c_t}, ≤ 1, in the dtype of x
    decay: Tensor  # c_{t-1} - c_t, ≤ 0, without gradient
    total: Tensor  # n_t
    first: Tensor | None  # n_0 [N, ...]: an initial mean times this is the engine's initial state
    last: Tensor  # n_T [N, ...]: the engine's final state over this is the final mean
    z: Tensor  # log Σ e^{x_s} over all tokens and the initial state, [N, 1, ...]


def running_softmax(x: Tensor, z: Tensor | None, cu_seqlens: Tensor | None) -> RunningSoftmax:
    """Of logits ``x [B, T, H, M]``, continuing from ``z [N, 1, H, M]``.

    Beyond the engine's own reads, this passes over x, c, the weights and n a few times, and scans
    two of them along time: the maximum, and n_t by the engine's value-decay operator at K = 1.
    """
    check_no_forward_ad("running_softmax", x=x, z=z)
    dtype = accumulation_dtype(x)
    z = None if z is None else z.to(dtype).squeeze(1)
    c, decay, before, after = bounds(x, None if z is None else z.detach(), cu_seqlens)
    weights = (x.to(dtype) - c).exp().to(x.dtype)
    first = None if z is None or before is None else (z - before).exp()
    B, T, H, _ = x.shape
    one = weights.new_ones(1, dtype=dtype).expand(B, T, H, 1)
    total, last = torch.ops.lsm.gla_value_fwd(
        one, one, weights.to(dtype), decay,
        None if first is None else first.unsqueeze(-2), cu_seqlens, 1.0, True,
    )  # fmt: skip
    last = divisor(last.squeeze(-2))
    z = after + last.log()
    return RunningSoftmax(weights, decay, divisor(total), first, last, z.unsqueeze(1))


@torch.no_grad()
def running_softmax_step(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token ``x [B, H, M]`` after ``z [B, 1, H, M]``: ``e^{x - z'}``, ``z - z'`` and z'."""
    old = z.squeeze(1)
    new = torch.logaddexp(old, x.to(z.dtype))
    decay = torch.where(new == -torch.inf, 0, old - new)
    weights = torch.where(x == -torch.inf, 0, (x - new).exp())
    return weights.to(x.dtype), decay, new.unsqueeze(1)
