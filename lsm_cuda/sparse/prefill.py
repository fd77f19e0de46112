"""Training-free sparse prefill: lists of blocks for a long prompt, estimated from its queries and
keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._common import accumulation_dtype
from ..ops.attn_mask import AttnMask
from ..ops.block_lists import BlockLists
from ..ops.selection import BlockChoice, ScoreRule, antidiagonals, block_select
from ..ops.sparse_attn import block_sparse_attn

__all__ = [
    "a_shape_lists",
    "flex_prefill_lists",
    "minference_lists",
    "pooled_lists",
    "recall",
    "sparge_attn",
    "sparge_lists",
    "sparse_prefill",
    "vertical_slash_lists",
    "xattention_lists",
]


def sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float | None = None
) -> Tensor:
    """Causal attention over the listed blocks: ``q [B, T, Hq, K]`` to ``[B, T, Hq, V]``.

    Example:
        >>> q, k, v = torch.randn(3, 1, 256, 2, 32)
        >>> sparse_prefill(q, k, v, xattention_lists(q, k, block=32)).shape
        torch.Size([1, 256, 2, 32])
    """
    return block_sparse_attn(q, k, v, lists, AttnMask(causal=True), scale)


# ---- Choosing ----


def cumulative(score: Tensor, mass: float) -> Tensor:
    """The fewest entries of each row whose sum reaches ``mass`` of the row's, as a bool mask.

    Of equal ones the earlier comes first.
    """
    order = torch.sort(score, dim=-1, descending=True, stable=True)
    before = order.values.cumsum(-1) - order.values
    taken = (before < mass * score.sum(-1, keepdim=True)) & (order.values > 0)
    return torch.zeros_like(taken).scatter(-1, order.indices, taken)


def _top(score: Tensor, count: int) -> Tensor:
    best = torch.sort(score, dim=-1, descending=True, stable=True)[1][..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)


def _lists(bitmap: Tensor, q: Tensor, k: Tensor, block: int) -> BlockLists:
    """Of ``[B, Hq, rows, blocks]``; causal, with the first block and each row's own."""
    _rows, blocks = bitmap.shape[-2:]
    own = _own(q, k, block)[:, None]
    column = torch.arange(blocks, device=q.device)
    bitmap = (bitmap | (column == 0) | (column == own)) & (column <= own)
    return BlockLists.from_bitmap(bitmap, q.shape[1], k.shape[1], block, block)


def _own(q: Tensor, k: Tensor, block: int) -> Tensor:
    """The last block of keys that a row of queries sees, of a prompt in one piece."""
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"sparse prefill: a prompt comes in one piece, got {q.shape[1]} tokens of q and "
            f"{k.shape[1]} of k"
        )
    rows = -(-q.shape[1] // block)
    end = torch.arange(1, rows + 1, device=q.device) * block
    return (end.clamp(max=q.shape[1]) - 1) // block


def _products(q: Tensor, k: Tensor) -> Tensor:
    """``[B, t, Hq, K]`` with ``[B, s, Hkv, K]``: ``[B, Hq, t, s]``."""
    q = torch.unflatten(q, 2, (k.shape[2], -1))
    return torch.einsum("bthgd,bshd->bhgts", q, k).flatten(1, 2)


def _pooled(x: Tensor, block: int) -> Tensor:
    """Means of blocks, ``[B, blocks, H, K]``."""
    T = x.shape[1]
    blocks = -(-T // block)
    x = F.pad(x.to(accumulation_dtype(x)), (0, 0, 0, 0, 0, blocks * block - T))
    tokens = (T - torch.arange(blocks, device=x.device) * block).clamp(max=block)
    return torch.unflatten(x, 1, (blocks, block)).sum(2) / tokens[:, None, None]


def _last_rows(q: Tensor, k: Tensor, last: int, scale: float) -> Tensor:
    """Attention of the last queries, ``[B, Hq, last, T]``."""
    T = k.shape[1]
    last = min(last, q.shape[1])
    acc = accumulation_dtype(q)
    score = scale * _products(q[:, -last:].to(acc), k.to(acc))
    row = torch.arange(T - last, T, device=q.device)[:, None]
    future = torch.arange(T, device=q.device) > row
    return score.masked_fill(future, -torch.inf).softmax(-1)


def _slashes(p: Tensor) -> Tensor:
    """Sums of ``[B, H, last, T]`` by distance of query and key: ``[B, H, T]``."""
    last, T = p.shape[-2:]
    query = torch.arange(T - last, T, device=p.device)[:, None]
    key = query - torch.arange(T, device=p.device)  # at each distance
    index = key.clamp(min=0).expand(p.shape)
    return p.gather(-1, index).masked_fill(key < 0, 0).sum(-2)


def _bitmap_of(columns: Tensor, distances: Tensor, rows: int, block: int) -> Tensor:
    """Blocks that hold chosen columns ``[B, H, T]`` or pairs at chosen distances ``[B, H, T]``."""
    blocks = -(-columns.shape[-1] // block)
    pad = blocks * block - columns.shape[-1]
    vertical = torch.unflatten(F.pad(columns, (0, pad)), -1, (blocks, block)).any(-1)
    # A distance s of a row's first query to its last reaches at most two blocks of keys, whose
    # numbers lie ceil(s / block) and ceil((s + 1) / block) - 1 behind the row's own.
    distance = torch.arange(columns.shape[-1], device=columns.device)
    behind = torch.zeros(*columns.shape[:2], blocks + 1, device=columns.device)
    for offset in (-(-distance // block), -(-(distance + 1) // block) - 1):
        behind.index_add_(-1, offset, distances.float())
    row, column = torch.arange(rows)[:, None], torch.arange(blocks)
    apart = (row - column).to(columns.device)
    slash = (behind > 0)[..., apart.clamp(min=0)] & (apart >= 0)
    return slash | vertical[:, :, None]


# ---- Methods ----


def a_shape_lists(
    q: Tensor, k: Tensor, sinks: int = 128, window: int = 1024, block: int = 64
) -> BlockLists:
    """The first blocks of keys and the last ones before each query.

    Args:
        q, k: ``[B, T, Hq, K]`` and ``[B, T, Hkv, K]``.
        sinks, window: tokens, rounded up to blocks.
        block: 16, 32, 64 or 128.

    Source: MInference 1.0, arXiv:2407.02490, section 3.2.

    Example:
        >>> q = torch.randn(1, 64, 1, 8)
        >>> a_shape_lists(q, q, 16, 16, 16).counts()[0, 0].tolist()
        [1, 2, 3, 3]
    """
    return _lists(_a_shape(q, k, sinks, window, block), q, k, block)


def _a_shape(q: Tensor, k: Tensor, sinks: int, window: int, block: int) -> Tensor:
    own = _own(q, k, block)[:, None]
    column = torch.arange(-(-k.shape[1] // block), device=q.device)
    chosen = (column * block < sinks) | (own - column <= -(-window // block))
    return chosen.expand(q.shape[0], q.shape[2], -1, -1)


def vertical_slash_lists(
    q: Tensor,
    k: Tensor,
    vertical: int = 1000,
    slash: int = 200,
    last: int = 64,
    block: int = 64,
    scale: float | None = None,
) -> BlockLists:
    """The columns and diagonals that hold most of the last queries' attention.

    Args:
        q, k: ``[B, T, Hq, K]`` and ``[B, T, Hkv, K]``.
        vertical, slash: how many of each, rounded up to the blocks that hold them.
        last: queries that are looked at.
        block: 16, 32, 64 or 128.
        scale: of scores; default ``K ** -0.5``.

    Source: MInference 1.0, arXiv:2407.02490, algorithm 2.

    Example:
        >>> q = torch.randn(1, 64, 1, 8)
        >>> vertical_slash_lists(q, q, 1, 1, block=16).counts()[0, 0, 0].item()
        1
    """
    return _lists(_vertical_slash(q, k, vertical, slash, last, block, scale), q, k, block)


def _vertical_slash(
    q: Tensor, k: Tensor, vertical: int, slash: int, last: int, block: int, scale: float | None
) -> Tensor:
    p = _last_rows(q, k, last, q.shape[-1] ** -0.5 if scale is None else scale)
    columns, distances = _top(p.sum(-2), vertical), _top(_slashes(p), slash)
    return _bitmap_of(columns, distances, -(-q.shape[1] // block), block)


def pooled_lists(
    q: Tensor, k: Tensor, count: int = 16, block: int = 64, scale: float | None = None
) -> BlockLists:
    """The blocks whose mean key fits a row's mean query best.

    Args:
        q, k: ``[B, T, Hq, K]`` and ``[B, T, Hkv, K]``.
        count: blocks of a row.
        block: 16, 32, 64 or 128.
        scale: of scores; default ``K ** -0.5``.

    Source: MInference 1.0, arXiv:2407.02490, algorithm 3.

    Example:
        >>> q = torch.randn(1, 64, 1, 8)
        >>> pooled_lists(q, q, 2, 16).counts()[0, 0].tolist()[:2]
        [1, 2]
    """
    return _lists(_top(_pooled_map(q, k, block, scale), count), q, k, block)


def _pooled_map(q: Tensor, k: Tensor, block: int, scale: float | None) -> Tensor:
    """Attention between means of blocks, ``[B, Hq, rows, blocks]``, causal."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = scale * _products(_pooled(q, block), _pooled(k, block))
    future = torch.arange(score.shape[-1], device=q.device) > _own(q, k, block)[:, None]
    return score.masked_fill(future, -torch.inf).softmax(-1)


def minference_lists(
    q: Tensor,
    k: Tensor,
    patterns: Sequence[tuple[str, int, int]] | None = None,
    last: int = 64,
    block: int = 64,
    scale: float | None = None,
) -> BlockLists:
    """Every head by a pattern of its own.

    Args:
        q, k: ``[B, T, Hq, K]`` and ``[B, T, Hkv, K]``.
        patterns: for each query head ``("a_shape", sinks, window)``, ``("vertical_slash", columns,
            diagonals)`` or ``("block_sparse", blocks, 0)``. Default: the one of three, of like
            cost, that keeps most of the last queries' attention.
        last: queries that are looked at.
        block: 16, 32, 64 or 128.
        scale: of scores; default ``K ** -0.5``.

    Source: MInference 1.0, arXiv:2407.02490.

    Example:
        >>> q = torch.randn(1, 64, 2, 8)
        >>> patterns = [("a_shape", 16, 16), ("block_sparse", 2, 0)]
        >>> minference_lists(q, q, patterns, block=16).counts()[0, 0].tolist()
        [1, 2, 3, 3]
    """
    H = q.shape[2]
    made = {
        "a_shape": lambda a, b: _a_shape(q, k, a, b, block),
        "vertical_slash": lambda a, b: _vertical_slash(q, k, a, b, last, block, scale),
        "block_sparse": lambda a, b: _top(_pooled_map(q, k, block, scale), a),
    }
    if patterns is not None:
        if len(patterns) != H or any(name not in made for name, *_ in patterns):
            raise ValueError(
                f"minference_lists: patterns must name one of {', '.join(made)} for each of the "
                f"{H} heads, got {[*patterns]}"
            )
        every = {p: made[p[0]](*p[1:]) for p in dict.fromkeys(patterns)}
        return _lists(torch.stack([every[p][:, h] for h, p in enumerate(patterns)], 1), q, k, block)
    blocks = max(-(-k.shape[1] // block) // 8, 2)
    tokens = blocks * block
    if not q.shape[1]:
        return a_shape_lists(q, k, block=block)
    candidates = torch.stack(
        [
            made["a_shape"](min(block, tokens), tokens - block),
            made["vertical_slash"](tokens // 8, blocks // 2),
            made["block_sparse"](blocks, 0),
        ]
    )
    p = _last_rows(q, k, last, q.shape[-1] ** -0.5 if scale is None else scale)
    columns = torch.unflatten(F.pad(p.sum(-2), (0, -k.shape[1] % block)), -1, (-1, block)).sum(-1)
    kept = (candidates[..., -1, :] * columns).sum(-1).mean(1)  # [3, Hq], of the last row
    best = kept.argmax(0).view(1, 1, H, 1, 1).expand(1, *candidates.shape[1:])
    return _lists(candidates.gather(0, best)[0], q, k, block)


def flex_prefill_lists(
    q: Tensor,
    k: Tensor,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1024,
    block: int = 128,
    scale: float | None = None,
) -> BlockLists:
    """Every head by whichever pattern fits it, with as many blocks as its attention needs.

    Where attention between means of blocks predicts the last block's attention (square root of
    the Jensen-Shannon divergence below ``tau``), blocks of all rows together are taken by it until
    they hold ``gamma`` of the whole; elsewhere columns and diagonals, until they hold ``gamma`` of
    the last block's attention.

    Args:
        q, k: ``[B, T, Hq, K]`` and ``[B, T, Hkv, K]``.
        gamma: share of attention.
        tau: threshold.
        min_budget: last tokens before each query that are always read.
        block: 16, 32, 64 or 128.
        scale: of scores; default ``K ** -0.5``.

    Source: FlexPrefill, arXiv:2502.20766, algorithms 1-4.

    Example:
        >>> q = torch.randn(1, 64, 1, 8)
        >>> flex_prefill_lists(q, q, 1.0, block=16).density(AttnMask(causal=True))
        1.0
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = _last_rows(q, k, block, scale)
    true = torch.unflatten(F.pad(p.mean(-2), (0, -k.shape[1] % block)), -1, (-1, block)).sum(-1)
    means = _pooled(k, block)
    guess = _products(q[:, -min(block, q.shape[1]) :].mean(1, keepdim=True).to(means), means)
    guess = (scale * guess[:, :, 0]).softmax(-1)
    far = _divergence(guess, true).sqrt()  # [B, Hq]
    rows = -(-q.shape[1] // block)
    every = _pooled_map(q, k, block, scale)
    by_block = torch.unflatten(cumulative(every.flatten(-2), gamma), -1, every.shape[-2:])
    columns, distances = cumulative(p.sum(-2), gamma), cumulative(_slashes(p), gamma)
    by_column = _bitmap_of(columns, distances, rows, block)
    chosen = torch.where((far < tau)[..., None, None], by_block, by_column)
    local = _a_shape(q, k, 0, max(min_budget - block, 0), block)
    return _lists(chosen | local, q, k, block)


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon, in nats."""
    m = (a + b) / 2
    return sum(torch.xlogy(x, x / m.clamp(min=1e-30)).sum(-1) / 2 for x in (a, b))  # type: ignore[return-value]


def xattention_lists(
    q: Tensor,
    k: Tensor,
    stride: int = 8,
    tau: float = 0.9,
    block: int = 128,
    scale: float | None = None,
) -> BlockLists:
    """The fewest blocks of each row that hold a share of its attention, by sums of antidiagonals.

    Every square of ``stride`` tokens is judged by the sum of its antidiagonal, which meets each of
    its rows and columns once. The first block and the row's own are read first.

    Args:
        q, k: ``[B, T, Hq, K]`` and ``[B, T, Hkv, K]``.
        stride: of the antidiagonals; divides ``block``.
        tau: share of a row's estimated attention.
        block: 16, 32, 64 or 128.
        scale: of scores; default ``K ** -0.5``.

    Source: XAttention, arXiv:2503.16428, algorithm 1.

    Example:
        >>> q = torch.randn(1, 64, 1, 8)
        >>> xattention_lists(q, q, 4, 1.0, 16).density(AttnMask(causal=True))
        1.0
    """
    if block % stride:
        raise ValueError(f"xattention_lists: stride must divide block, got {stride} and {block}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _own(q, k, block)
    rule = ScoreRule.antidiagonal(stride, block, block)
    choice = BlockChoice(top_p=tau, first=1, local=1)
    lists = block_select(
        *antidiagonals(q, k, stride), rule, choice, scale / stride, tokens=k.shape[1]
    )
    return replace(lists, Tq=q.shape[1])


def sparge_lists(
    q: Tensor,
    k: Tensor,
    tau: float = 0.9,
    theta: float = 0.5,
    block: int = 64,
    scale: float | None = None,
) -> BlockLists:
    """The fewest blocks of each row that hold a share of attention between means of blocks.

    A mean speaks only for tokens that are alike (cosine similarity ``theta`` on average): rows of
    other queries read every block, and blocks of other keys are read by every row. The paper's
    second stage skips values of blocks inside the kernel (:func:`sparge_attn`).

    Args:
        q, k: ``[B, T, Hq, K]`` and ``[B, T, Hkv, K]``.
        tau: share of a row's estimated attention.
        theta: similarity.
        block: 16, 32, 64 or 128.
        scale: of scores; default ``K ** -0.5``.

    Source: SpargeAttn, arXiv:2502.18137, section 3.3.

    Example:
        >>> q = torch.randn(1, 64, 1, 8)
        >>> sparge_lists(q, q, block=16).density(AttnMask(causal=True))
        1.0
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    alike_q, alike_k = _similarity(q, block) >= theta, _similarity(k, block) >= theta
    alike_k = alike_k.repeat_interleave(q.shape[2] // k.shape[2], 1)[:, :, None]  # [B, Hq, 1, n]
    score = scale * _products(_pooled(q, block), _pooled(k, block))
    future = torch.arange(score.shape[-1], device=q.device) > _own(q, k, block)[:, None]
    score = score.masked_fill(future | ~alike_k, -torch.inf)
    chosen = cumulative(score.softmax(-1).nan_to_num(0), tau)
    return _lists(chosen | ~alike_k | ~alike_q[..., None], q, k, block)


def sparge_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau: float = 0.9,
    theta: float = 0.5,
    pv_threshold: float = 20.0,
    block: int = 64,
    scale: float | None = None,
) -> Tensor:
    """Causal attention over :func:`sparge_lists`, without the values that weigh nothing.

    Inside the kernel, values of a block are left out where its scores are all ``pv_threshold``
    below the largest so far (:func:`lsm_cuda.ops.block_sparse_attn`). Inference only.

    Args:
        q, k, v: ``[B, T, Hq, K]``, ``[B, T, Hkv, K]`` and ``[B, T, Hkv, V]``.
        tau, theta, block, scale: as :func:`sparge_lists`.
        pv_threshold: the paper's -λ; 0: every value counts.

    Returns:
        ``[B, T, Hq, V]``.

    Source: SpargeAttn, arXiv:2502.18137, algorithm 1.

    Example:
        >>> q, k, v = torch.randn(3, 1, 64, 1, 8)
        >>> sparge_attn(q, k, v, block=16).shape
        torch.Size([1, 64, 1, 8])
    """
    lists, mask = sparge_lists(q, k, tau, theta, block, scale), AttnMask(causal=True)
    return block_sparse_attn(q, k, v, lists, mask, scale, pv_threshold=pv_threshold)


def _similarity(x: Tensor, block: int) -> Tensor:
    """Mean cosine between tokens of a block, ``[B, H, blocks]``: the squared length of their mean
    direction."""
    return _pooled(F.normalize(x, dim=-1), block).square().sum(-1).transpose(1, 2)


def recall(q: Tensor, k: Tensor, lists: BlockLists, scale: float | None = None) -> Tensor:
    """Share of the causal softmax that the listed blocks hold, ``[B, Hq]``, mean over queries.

    Example:
        >>> q = torch.randn(1, 64, 1, 8)
        >>> recall(q, q, a_shape_lists(q, q, 0, 64, 16)).item()
        1.0
    """
    mask, lse = AttnMask(causal=True), []
    for some in (lists, None):
        lse.append(block_sparse_attn(q, k, k, some, mask, scale, return_lse=True)[1])
    return (lse[0] - lse[1]).exp().mean(-1)
