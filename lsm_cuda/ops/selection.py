"""Which blocks of keys a row of queries should read: scores of blocks, and a choice among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import accumulation_dtype, check_device_like, check_rank
from ._stretches import stretches
from .block_lists import BlockLists
from .pooling import ceil_div, row_boundaries

__all__ = [
    "BlockChoice",
    "ScoreRule",
    "antidiagonals",
    "block_scores",
    "block_select",
    "block_topk",
]

_MOST_ON_CHIP = 16384  # keys and blocks of a row, as csrc/kernels/sparse_attn/select.cu has it


# ---- Rules ----


@dataclass(frozen=True)
class ScoreRule:
    """How a row of queries rates blocks of keys.

    Row r stands for queries ``[r · block_q, (r + 1) · block_q)`` of a sequence, and for one query
    head, or (``group``) for all that read one key head: its members are the pairs of a query and a
    head. The weight of key i is the sum over members of ``scale q·k_i``, −inf where a member does
    not see the key; or (``softmax``) the sum of their probabilities, each a softmax over the keys
    the member sees. The score of block j is the sum (``tap_max``: the maximum) over n of ``taps[n]
    weight[j · tap_step + tap_first + n]``, over the keys that are there; without any it is 0
    (softmax) or −inf.

    Query t stands at ``t · q_stride + q_length − 1 + offset``, key i at ``i · key_stride +
    key_length − 1``, in tokens; if ``causal``, a query sees the keys up to its own position.

    Attributes:
        softmax, group, causal: as above.
        block_q (int): queries of a row.
        block_k (int): tokens of a block.
        key_stride, key_length (int): of pooled keys, as in :func:`block_pool`.
        q_stride, q_length (int): likewise of pooled queries.
        offset (int): added to the positions of queries.
        taps: weights, above 0, as many as keys go into a block; or their number, for ones.
        tap_step, tap_first (int): see above.
        tap_max (bool): see above.

    Example:
        >>> ScoreRule.compressed().taps
        (1.0, 2.0, 2.0, 2.0, 1.0)
    """

    softmax: bool = False
    group: bool = False
    causal: bool = True
    block_q: int = 1
    block_k: int = 64
    key_stride: int = 1
    key_length: int = 1
    q_stride: int = 1
    q_length: int = 1
    offset: int = 0
    taps: tuple[float, ...] | int = 1
    tap_step: int = 1
    tap_first: int = 0
    tap_max: bool = False

    @classmethod
    def pooled(
        cls, block_k: int = 64, block_q: int = 1, group: bool = False, causal: bool = True
    ) -> ScoreRule:
        """Products with one key for each block: its mean (MoBA), a gate's key (SeerAttention), or
        its bounds (Quest: keys of ``block_pool(k, block_k, pool="bounds")``, queries
        ``cat([q.relu(), -(-q).relu()], -1)``)."""
        return cls(
            group=group, causal=causal, block_q=block_q, block_k=block_k, key_stride=block_k,
            key_length=block_k,
        )  # fmt: skip

    @classmethod
    def compressed(
        cls,
        length: int = 32,
        stride: int = 16,
        block_k: int = 64,
        block_q: int = 1,
        tap_max: bool = False,
    ) -> ScoreRule:
        """Probabilities of compressed keys, summed over a group's heads, then over the keys whose
        window overlaps a block, as often as by ``stride`` tokens (NSA); with ``tap_max`` their
        maximum (InfLLM-v2)."""
        inside, overlap = block_k // stride, length // stride
        count = inside + overlap - 1
        taps = tuple(float(min(i + 1, count - i, inside, overlap)) for i in range(count))
        return cls(
            softmax=True, group=True, block_q=block_q, block_k=block_k, key_stride=stride,
            key_length=length, taps=count if tap_max else taps, tap_step=inside,
            tap_first=1 - overlap, tap_max=tap_max,
        )  # fmt: skip

    @classmethod
    def antidiagonal(cls, stride: int = 16, block_q: int = 64, block_k: int = 64) -> ScoreRule:
        """For what :func:`antidiagonals` returns (XAttention)."""
        return cls(
            softmax=True, block_q=block_q // stride, block_k=block_k, key_stride=stride,
            key_length=stride, q_stride=stride, q_length=stride, taps=block_k // stride,
            tap_step=block_k // stride,
        )  # fmt: skip

    @classmethod
    def columns(cls, Tq: int, block_k: int = 1, group: bool = False, offset: int = 0) -> ScoreRule:
        """Sums of the probabilities that Tq queries give to each key, or block of keys (H2O, TOVA,
        SnapKV; MInference's vertical lines, from the last queries)."""
        return cls(
            softmax=True, group=group, block_q=max(1, Tq), block_k=block_k, offset=offset,
            taps=block_k, tap_step=block_k,
        )  # fmt: skip

    def _numbers(self, blocks: int) -> list[int]:
        count = self.taps if isinstance(self.taps, int) else len(self.taps)
        return [
            int(self.softmax), int(self.group), int(self.causal), self.offset, self.q_stride,
            self.q_length, self.key_stride, self.key_length, self.block_q, self.block_k,
            self.tap_step, self.tap_first, count, int(self.tap_max), blocks,
        ]  # fmt: skip


@dataclass(frozen=True)
class BlockChoice:
    """Which of a row's blocks are taken, by their scores.

    A row may have the blocks up to the one of its last query, if causal, else all. The ``first``
    ones are taken, and of each query the ``local`` ones up to its own. Then the best others, ties
    to the lowest index, while there are fewer than ``top_k`` in all, the share of all scores that
    the taken ones have is below ``top_p``, and the score is at least ``threshold`` and above −inf.

    Attributes:
        top_k (int): blocks of a row, those that must be taken among them; 0: any number.
        top_p (float): share of the scores' sum, negative scores counting 0; 0: any share.
        threshold (float): the least score.
        first, local (int): blocks that must be taken.

    Example:
        >>> BlockChoice(top_k=16, first=1, local=2)  # NSA's
        BlockChoice(top_k=16, top_p=0.0, threshold=-inf, first=1, local=2)
    """

    top_k: int = 0
    top_p: float = 0.0
    threshold: float = -torch.inf
    first: int = 0
    local: int = 0

    def capacity(self, rule: ScoreRule, blocks: int) -> int:
        """The most blocks of a row."""
        must = self.first
        if self.local:
            must += self.local + ceil_div(rule.block_q * rule.q_stride - 1, rule.block_k)
        return min(blocks, max(self.top_k, must) if self.top_k else blocks)

    def _arguments(self, rule: ScoreRule, blocks: int) -> tuple[list[int], list[float]]:
        numbers = [self.top_k, self.first, self.local, self.capacity(rule, blocks)]
        return numbers, [float(self.top_p), float(self.threshold)]


# ---- Scores and choices ----


def _map_shape(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, rule: list[int]) -> tuple[int, ...]:
    B, Tq, Hq, _ = q.shape
    rows = ceil_div(Tq, rule[8]) if cu_seqlens is None else Tq // rule[8] + cu_seqlens.shape[0] - 1
    return B, k.shape[2] if rule[1] else Hq, rows


_TENSORS = ("k", "lse", "taps", "cu_seqlens_q", "cu_seqlens_k", "cu_rows", "lengths")


def _same_device(op: str, q: Tensor, *tensors: Tensor | None) -> None:
    check_device_like(op, "q", q, dict(zip(_TENSORS, tensors, strict=True)))


@torch.library.register_fake("lsm::block_scores")
def _scores_fake(q, k, lse, taps, cu_q, cu_k, cu_rows, lengths, scale, rule):  # type: ignore[no-untyped-def]
    _same_device("block_scores", q, k, lse, taps, cu_q, cu_k, cu_rows, lengths)
    return q.new_empty(*_map_shape(q, k, cu_q, rule), rule[14], dtype=accumulation_dtype(q))


@torch.library.register_fake("lsm::block_select")
def _select_fake(q, k, lse, taps, cu_q, cu_k, cu_rows, lengths, scale, rule, choice, cuts):  # type: ignore[no-untyped-def]
    _same_device("block_select", q, k, lse, taps, cu_q, cu_k, cu_rows, lengths)
    return q.new_empty(*_map_shape(q, k, cu_q, rule), choice[3], dtype=torch.int32)


@torch.library.register_fake("lsm::block_topk")
def _topk_fake(scores, cu_q, cu_rows, lengths, Tq, rule, choice, cuts):  # type: ignore[no-untyped-def]
    named = {"cu_seqlens_q": cu_q, "cu_rows": cu_rows, "lengths": lengths}
    check_device_like("block_topk", "scores", scores, named)
    return scores.new_empty(*scores.shape[:3], choice[3], dtype=torch.int32)


def _blocks(k: Tensor, rule: ScoreRule, tokens: int | None) -> int:
    if tokens is not None:
        return ceil_div(tokens, rule.block_k)
    return ceil_div(k.shape[1], rule.tap_step)


def _arguments(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    scale: float | None,
    lse: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    blocks: int,
) -> tuple[object, ...]:
    wide = accumulation_dtype(q)
    taps = None
    if not isinstance(rule.taps, int):
        taps = torch.tensor(rule.taps, dtype=wide, device=q.device)
    cu_rows = None
    if cu_seqlens is not None:
        cu_rows = row_boundaries(cu_seqlens, rule.block_q)
        if cu_seqlens_k is None:
            cu_seqlens_k = row_boundaries(
                cu_seqlens, rule.key_length, rule.key_stride, rule.key_length <= rule.key_stride
            )
        cu_seqlens_k = cu_seqlens_k.to(cu_seqlens.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.detach(), k.detach()
    lse = None if lse is None else lse.detach().to(wide)
    numbers = rule._numbers(blocks)
    return (q, k, lse, taps, cu_seqlens, cu_seqlens_k, cu_rows, lengths, float(scale), numbers)


def _lists(
    index: Tensor, rule: ScoreRule, Tq: int, blocks: int, tokens: int | None, cu: Tensor | None
) -> BlockLists:
    B, heads, rows, _ = index.shape
    tokens = blocks * rule.block_k if tokens is None else tokens
    block_q = rule.block_q * rule.q_stride
    return BlockLists(
        index, None, (B, heads, rows), Tq, tokens, block_q, rule.block_k, None, cu, cu
    )


def block_scores(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    scale: float | None = None,
    lse: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    tokens: int | None = None,
) -> Tensor:
    r"""Scores of blocks of keys for rows of queries (:class:`ScoreRule`), without anything of size
    Tq × Tk.

    Args:
        q (Tensor): ``[B, Tq, Hq, K]``, tokens or pooled ones; bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): ``[B, Tk, Hk, K]`` in the dtype of q; Hk divides Hq.
        rule (ScoreRule): what is scored, and how.
        scale (float, optional): default ``K ** -0.5``.
        lse (Tensor, optional): of the softmax, ``[B, Hq, Tq]``, as attention over k returns it, or
            an estimate; fp32 (fp64). Default: computed here, for another sweep over the keys.
        lengths (Tensor, optional): ``[B]`` int32, tokens of each sequence, of which the queries are
            the last: ``lengths[b] − Tq · q_stride`` is added to their positions.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of queries packed into one row, B = 1;
            each sequence begins a row of its own, and Tq // block_q + N rows have room for all.
        cu_seqlens_k (Tensor, optional): likewise of the keys. Default: those of :func:`block_pool`
            of the same sequences.
        tokens (int, optional): key tokens, for ``ceil(tokens / block_k)`` blocks. Default: as many
            blocks as ``ceil(Tk / tap_step)``.

    Returns:
        ``[B, heads, rows, blocks]`` fp32 (fp64 for fp64), heads = Hk if rule.group else Hq. Rows
        behind those of packed sequences are −inf.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: no gradient flows through selection.

    Source: NSA, arXiv:2502.11089, eqs. 8-10; MoBA, arXiv:2502.13189; Quest, arXiv:2406.10774;
        XAttention, arXiv:2503.16428; H2O, arXiv:2306.14048.

    Example:
        >>> from lsm_cuda.ops import block_pool
        >>> q, k = torch.randn(1, 256, 4, 32), torch.randn(1, 256, 2, 32)
        >>> block_scores(q, block_pool(k, 64), ScoreRule.pooled(64)).shape
        torch.Size([1, 4, 256, 4])
    """
    check_rank("block_scores", "q", q, "[B, Tq, Hq, K]")
    check_rank("block_scores", "k", k, "[B, Tk, Hk, K]")
    blocks = _blocks(k, rule, tokens)
    given = _arguments(q, k, rule, scale, lse, lengths, cu_seqlens, cu_seqlens_k, blocks)
    return torch.ops.lsm.block_scores(*given)  # type: ignore[no-any-return]


def block_select(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    choice: BlockChoice,
    scale: float | None = None,
    lse: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    tokens: int | None = None,
) -> BlockLists:
    r""":func:`block_scores` and the choice among them in one launch; scores stay on the chip.

    Args:
        q, k, rule, scale, lse, lengths, cu_seqlens, cu_seqlens_k, tokens: as :func:`block_scores`.
        choice (BlockChoice): which blocks are taken.

    Returns:
        BlockLists of fixed capacity, ascending: for :func:`block_sparse_attn`, or with block_q = 1
        :func:`sparse_attn_decode`.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: no gradient flows through selection. Sums have one order: equal inputs give equal lists.
        On CUDA, scores of rows with more than 16384 keys and blocks together do not fit on the
        chip: those of a stretch of rows go through memory.

    Example:
        >>> from lsm_cuda.ops import block_pool
        >>> q, k = torch.randn(1, 256, 16, 32), torch.randn(1, 256, 1, 32)  # NSA's selection
        >>> pooled = block_pool(k, 32, 16, partial=False)
        >>> choice = BlockChoice(top_k=3, first=1, local=2)
        >>> lists = block_select(q, pooled, ScoreRule.compressed(), choice, tokens=256)
        >>> lists.index[0, 0, -1]
        tensor([0, 2, 3], dtype=torch.int32)
    """
    check_rank("block_select", "q", q, "[B, Tq, Hq, K]")
    check_rank("block_select", "k", k, "[B, Tk, Hk, K]")
    blocks = _blocks(k, rule, tokens)
    given = _arguments(q, k, rule, scale, lse, lengths, cu_seqlens, cu_seqlens_k, blocks)
    chosen = choice._arguments(rule, blocks)
    taps = rule.taps if isinstance(rule.taps, int) else len(rule.taps)
    of_a_row = min(blocks * rule.tap_step + taps, k.shape[1]) + blocks
    if q.device.type == "cuda" and of_a_row > _MOST_ON_CHIP:
        index = _select_in_two(torch.ops.lsm, given, chosen)
    else:
        index = torch.ops.lsm.block_select(*given, *chosen)
    return _lists(index, rule, q.shape[1] * rule.q_stride, blocks, tokens, cu_seqlens)


def _select_in_two(library, given, chosen) -> Tensor:  # type: ignore[no-untyped-def]
    """A map of scores, then the choice among them, a stretch of rows at a time."""
    q, k, lse, taps, *sequences, lengths, scale, numbers = given
    Tq, block_q, blocks = q.shape[1], numbers[8], numbers[14]
    cu_seqlens, _, cu_rows = sequences
    if cu_seqlens is not None:
        scores = library.block_scores(*given)
        return library.block_topk(scores, cu_seqlens, cu_rows, None, Tq, numbers, *chosen)  # type: ignore[no-any-return]
    lists = []
    of_a_row = q.shape[0] * (k.shape[2] if numbers[1] else q.shape[2]) * blocks
    for rows in stretches(ceil_div(Tq, block_q), of_a_row):
        t = slice(rows.start * block_q, min(rows.stop * block_q, Tq))
        # With lengths, positions are counted from the last query.
        before = t.start if lengths is None else t.stop - Tq
        numbers_ = [*numbers[:3], numbers[3] + before * numbers[4], *numbers[4:]]
        lse_ = None if lse is None else lse[..., t]
        scores = library.block_scores(
            q[:, t], k, lse_, taps, None, None, None, lengths, scale, numbers_
        )
        lists.append(
            library.block_topk(scores, None, None, lengths, t.stop - t.start, numbers_, *chosen)
        )
    return torch.cat(lists, 2)


def block_topk(
    scores: Tensor,
    rule: ScoreRule,
    choice: BlockChoice,
    Tq: int | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    tokens: int | None = None,
) -> BlockLists:
    r"""The choice among scores made elsewhere: by :func:`block_scores`, or a gate network.

    Args:
        scores (Tensor): ``[B, heads, rows, blocks]`` fp32 (fp64 too on CPU).
        rule (ScoreRule): of its fields only those of positions, block_q and block_k are used.
        choice (BlockChoice): which blocks are taken.
        Tq (int, optional): queries. Default: rows × block_q; with cu_seqlens they are needed.
        lengths, cu_seqlens: as :func:`block_scores`.
        tokens (int, optional): key tokens. Default: blocks × block_k.

    Returns:
        BlockLists of fixed capacity, ascending.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Example:
        >>> rule = ScoreRule(causal=False, block_q=64, block_k=64)
        >>> scores = torch.tensor([[[[0.1, 0.5, 0.4], [0.3, 0.3, 0.4]]]])
        >>> block_topk(scores, rule, BlockChoice(top_p=0.45)).index
        tensor([[[[ 1, -1, -1],
                  [ 0,  2, -1]]]], dtype=torch.int32)
    """
    check_rank("block_topk", "scores", scores, "[B, heads, rows, blocks]")
    blocks = scores.shape[3]
    if Tq is None:
        if cu_seqlens is not None:
            raise RuntimeError("lsm::block_topk: cu_seqlens needs Tq, the queries, got None")
        Tq = scores.shape[2] * rule.block_q
    cu_rows = None if cu_seqlens is None else row_boundaries(cu_seqlens, rule.block_q)
    index = torch.ops.lsm.block_topk(
        scores.detach(), cu_seqlens, cu_rows, lengths, Tq, rule._numbers(blocks),
        *choice._arguments(rule, blocks),
    )  # fmt: skip
    return _lists(index, rule, Tq * rule.q_stride, blocks, tokens, cu_seqlens)


def antidiagonals(q: Tensor, k: Tensor, stride: int = 16) -> tuple[Tensor, Tensor]:
    r"""Queries and keys whose products are sums along antidiagonals of stride × stride tokens.

    ``q'_r · k'_i = Σ_s q_{rS + S−1−s} · k_{iS + s}``: score them with
    :meth:`ScoreRule.antidiagonal` and scale ``K ** -0.5 / stride``.

    Args:
        q (Tensor): ``[B, Tq, Hq, K]``; k (Tensor): ``[B, Tk, Hk, K]``. Lengths that the stride does
            not divide are filled with zeros.
        stride (int): S.

    Returns:
        ``[B, ceil(Tq / S), Hq, S K]`` and ``[B, ceil(Tk / S), Hk, S K]``.

    Source: XAttention, arXiv:2503.16428, algorithm 1.

    Example:
        >>> q, k = torch.randn(2, 1, 100, 4, 8)
        >>> antidiagonals(q, k)[0].shape
        torch.Size([1, 7, 4, 128])
    """

    def windows(x: Tensor) -> Tensor:
        extra = -x.shape[1] % stride
        B, T, H, K = x.shape
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, extra)).view(B, -1, stride, H, K)

    a, b = windows(q).flip(2), windows(k)
    return a.transpose(2, 3).flatten(3), b.transpose(2, 3).flatten(3)
