"""Selection of key blocks: pooled windows, scores, choices, one row at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lsm_cuda.ops import BlockChoice, ScoreRule


def block_pool(
    x: Tensor,
    length: int,
    stride: int | None = None,
    pool: str = "mean",
    partial: bool = True,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Row i of a sequence pools its tokens ``[i · stride, i · stride + length)``.

    Args: as :func:`lsm_cuda.ops.block_pool`, and rows are laid out as there.
    """
    stride = length if stride is None else stride

    def count(T: int) -> int:
        return -(-T // stride) if partial else max(0, (T - length) // stride + 1)

    def pooled(tokens: Tensor) -> Tensor:
        if pool == "mean":
            return tokens.mean(0)
        high, low = tokens.amax(0), tokens.amin(0)
        return {"max": high, "min": low, "bounds": torch.cat([high, low], -1)}[pool]

    def windows(tokens: Tensor) -> list[Tensor]:
        starts = range(0, count(len(tokens)) * stride, stride)
        return [pooled(tokens[s : s + length]) for s in starts]

    B, T, H, K = x.shape
    if cu_seqlens is not None:
        rows, sequences = T // stride + len(cu_seqlens) - 1, pairwise(cu_seqlens.tolist())
        batch = [[y for a, b in sequences for y in windows(x[0, a:b])]]
    else:
        rows = count(T)
        ends = [T] * B if lengths is None else lengths.tolist()
        batch = [windows(x[b, :n]) for b, n in enumerate(ends)]
    zero = x.new_zeros(H, 2 * K if pool == "bounds" else K)
    if not rows or not batch:
        return x.new_zeros(B, rows, *zero.shape)
    return torch.stack([torch.stack(y + [zero] * (rows - len(y))) for y in batch])


def block_scores(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    scale: float | None = None,
    lse: Tensor | None = None,
    lengths: Tensor | None = None,
    blocks: int | None = None,
) -> Tensor:
    """``[B, heads, rows, blocks]``, as :class:`lsm_cuda.ops.ScoreRule` puts it; of packed
    sequences, call it for each.

    Args: as :func:`lsm_cuda.ops.block_scores`.
    """
    B, Tq, Hq, K = q.shape
    Tk, Hk = k.shape[1:3]
    scale = K**-0.5 if scale is None else scale
    taps = [1.0] * rule.taps if isinstance(rule.taps, int) else list(rule.taps)
    blocks = -(-Tk // rule.tap_step) if blocks is None else blocks
    x = torch.arange(Tk) * rule.key_stride + rule.key_length - 1
    p = torch.arange(Tq) * rule.q_stride + rule.q_length - 1 + rule.offset
    nothing = 0.0 if rule.softmax else -torch.inf
    rows = -(-Tq // rule.block_q)
    heads = Hk if rule.group else Hq
    scores = q.new_full((B, heads, rows, blocks), nothing)
    for b in range(B):
        at, keys = p, Tk
        if lengths is not None:
            at = p + int(lengths[b]) - Tq * rule.q_stride
            keys = min(Tk, -(-int(lengths[b]) // rule.key_stride))
        seen = (x[:keys] <= at[:, None]) if rule.causal else torch.ones(Tq, keys, dtype=torch.bool)
        own = k[b, :keys].repeat_interleave(Hq // Hk, 1)
        products = scale * torch.einsum("thd,jhd->htj", q[b], own)
        products = products.masked_fill(~seen, -torch.inf)
        if rule.softmax:
            total = products.logsumexp(-1) if lse is None else lse[b]
            some = seen.any(-1) & (total > -torch.inf)
            weights = (products - total.masked_fill(~some, 0.0)[..., None]).exp()
            weights = weights.masked_fill(~some[..., None], 0.0)
        else:
            weights = products
        if rule.group:
            weights = weights.unflatten(0, (Hk, Hq // Hk)).sum(1)
        weights = torch.stack([w.sum(1) for w in weights.split(rule.block_q, 1)], 1)
        for j in range(blocks):
            first = j * rule.tap_step + rule.tap_first
            inside = [(w, first + n) for n, w in enumerate(taps) if 0 <= first + n < keys]
            if inside:
                terms = torch.stack([w * weights[..., i] for w, i in inside])
                scores[b, ..., j] = terms.amax(0) if rule.tap_max else terms.sum(0)
    return scores


def block_choice(
    scores: Tensor,
    rule: ScoreRule,
    choice: BlockChoice,
    Tq: int,
    lengths: Tensor | None = None,
) -> list[list[list[list[int]]]]:
    """For every batch row, head and row of ``scores [B, heads, rows, blocks]`` the chosen blocks,
    as :class:`lsm_cuda.ops.BlockChoice` puts it."""

    def one(b: int, row: list[float], r: int) -> list[int]:
        shift, blocks = rule.q_length - 1 + rule.offset, len(row)
        if lengths is not None:
            shift += int(lengths[b]) - Tq * rule.q_stride
            blocks = min(blocks, -(-int(lengths[b]) // rule.block_k))
        first, last = r * rule.block_q, min((r + 1) * rule.block_q, Tq) - 1
        own, end = ((t * rule.q_stride + shift) // rule.block_k for t in (first, last))
        allowed = [j for j in range(blocks) if not rule.causal or j <= end]
        taken = [
            j for j in allowed
            if j < choice.first or (choice.local and own - choice.local < j <= end)
        ]  # fmt: skip
        others = [
            j for j in allowed
            if j not in taken and row[j] >= choice.threshold and row[j] > -torch.inf
        ]  # fmt: skip
        share = [max(s, 0.0) for s in row]
        total = sum(share[j] for j in allowed)
        for j in sorted(others, key=lambda j: (-row[j], j)):
            enough = choice.top_p and sum(share[i] for i in taken) >= choice.top_p * total
            if enough or (choice.top_k and len(taken) >= choice.top_k):
                break
            taken.append(j)
        return sorted(taken)

    return [
        [[one(b, row.tolist(), r) for r, row in enumerate(head)] for head in batch]
        for b, batch in enumerate(scores)
    ]
