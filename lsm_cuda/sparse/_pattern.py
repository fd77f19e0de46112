"""What static patterns are made of: calls of the engine on some heads, rows or sets of
keys, merged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attn_mask import AttnMask
from ..ops.block_lists import BlockLists
from ..ops.sparse_attn import block_sparse_attn, merge_attn_states

Attended = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
_ALL = AttnMask()


class Pattern(ABC):
    """Keys of each query; ``attend`` computes softmax attention over them."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        """Attention of ``q [B, T, Hq, K]`` over ``k [B, T, Hkv, K]`` and ``v [B, T, Hkv, V]``.

        Args:
            q, k, v: as :func:`lsm_cuda.ops.block_sparse_attn`, whose dtypes and gradients hold.
            scale: of the scores; default ``K ** -0.5``.

        Returns:
            o ``[B, T, Hq, V]`` and the softmax's log-denominator ``[B, Hq, T]``.
        """

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None
    ) -> Attended:
        """:meth:`attend` in each of the sequences packed into one row, whose boundaries are
        ``cu_seqlens [N + 1]``: by a call for all where a mask says it, else one after the other,
        which reads the boundaries."""
        parts = [
            self.attend(q[:, s:e], k[:, s:e], v[:, s:e], scale)
            for s, e in pairwise(cu_seqlens.tolist())
        ]
        if not parts:
            return self.attend(q, k, v, scale)
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs, 1), torch.cat(lses, 2)

    def to_dense(self, tokens: int, heads: int = 1) -> Tensor:
        """How often query t of head h reads key j, ``[heads, tokens, tokens]`` int64.

        0 and 1 but for patterns that are a mixture of overlapping ones (LongNet), where a key that
        several read counts several times. Found by attending: equal scores and values that name
        their key give each row as it is.
        """
        q = torch.zeros(1, tokens, heads, 16, dtype=torch.float64)
        v = torch.eye(tokens, dtype=torch.float64)[None, :, None].expand(1, -1, heads, -1)
        o, lse = self.attend(q, q, v.contiguous())
        return (o[0].transpose(0, 1) * lse[0].exp()[..., None]).round().long()

    def density(self, tokens: int, heads: int = 1) -> float:
        """Share of the ``tokens * tokens`` pairs that are attended to."""
        return float((self.to_dense(tokens, heads) > 0).double().mean())

    def plot(self, path: str | Path, tokens: int = 64, heads: int = 1) -> Path:
        """Draws every head's pairs to a PNG; needs matplotlib."""
        from matplotlib.figure import Figure

        dense = self.to_dense(tokens, heads)
        figure = Figure(figsize=(4 * heads, 4), dpi=150, layout="constrained")
        for h, axes in enumerate(figure.subplots(1, heads, squeeze=False)[0]):
            axes.imshow(dense[h], cmap="Blues", interpolation="nearest", vmin=0)
            axes.set(title=f"head {h}", xlabel="key", ylabel="query")
        figure.savefig(path)
        return Path(path)


@dataclass(frozen=True)
class Masked(Pattern):
    """One call of the engine: lists of blocks, and arithmetic on positions."""

    lists: BlockLists | None = None
    mask: AttnMask = _ALL

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        lists = None if self.lists is None else self.lists.to(q.device)
        return attend(q, k, v, self.mask, scale, lists=lists)

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None
    ) -> Attended:
        if self.lists is not None:
            raise ValueError("a pattern made for a number of tokens cannot read packed sequences")
        return attend(q, k, v, self.mask, scale, cu_seqlens=cu_seqlens)


@dataclass(frozen=True)
class Union(Pattern):
    """One softmax over the keys of all ``parts``; a key of several counts several times."""

    parts: tuple[Pattern, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        return merge(*(part.attend(q, k, v, scale) for part in self.parts))


@dataclass(frozen=True)
class ByHead(Pattern):
    """Heads share ``parts``: each an equal run of heads, or in turns if ``interleaved``."""

    parts: tuple[Pattern, ...]
    interleaved: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        H, n = q.shape[2], len(self.parts)
        part_of = [h % n if self.interleaved else h * n // H for h in range(H)]
        return by_head(part_of, lambda i, q, k, v: self.parts[i].attend(q, k, v, scale), q, k, v)


@dataclass(frozen=True)
class Segments(Pattern):
    """Attention inside runs of ``length`` tokens, the first of which starts ``shift`` early."""

    length: int
    shift: int = 0
    mask: AttnMask = _ALL

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        B, T = q.shape[:2]
        first = self.length - self.shift
        ends = torch.arange(first, max(T, first), self.length, device=q.device)
        own = torch.cat([ends.new_zeros(1), ends])
        return packed(q, k, v, bounds(own, T, B), scale, self.mask)


@dataclass(frozen=True)
class Columns(Pattern):
    """The last ``width`` tokens of every run of ``length``, causally."""

    length: int
    width: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        (B, T), length, width = q.shape[:2], self.length, self.width
        runs = -(-T // length)
        q, k, v = (
            torch.unflatten(F.pad(x, (0, 0, 0, 0, 0, runs * length - T)), 1, (runs, length))
            for x in (q, k, v)
        )
        columns = each(lambda x: x[:, :, length - width :], q, k, v)
        # Of earlier runs: a run's columns lie length / width apart on a scale on which runs are
        # `length` long, so that a query one run behind sees whole runs up to its own.
        stride = length // width
        earlier = AttnMask(
            causal=True, align_end=False, offset=-length, causal_block=length, key_stride=stride
        )
        before = attend(*each(lambda x: x.flatten(1, 2), q, *columns[1:]), earlier, scale)
        o, lse = attend(*each(lambda x: x.flatten(0, 1), *columns), AttnMask(causal=True), scale)
        o = F.pad(o, (0, 0, 0, 0, length - width, 0)).view(B, runs * length, *o.shape[2:])
        lse = F.pad(lse, (length - width, 0), value=-torch.inf)
        lse = torch.unflatten(lse, 0, (B, runs)).transpose(1, 2).flatten(2)
        o, lse = merge(before, (o, lse))
        return o[:, :T], lse[..., :T]


@dataclass(frozen=True)
class Dilated(Pattern):
    """Every ``rate``-th token of every run of ``length``, among themselves; head h starts at h."""

    length: int
    rate: int
    causal: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        phases = [h % self.rate for h in range(q.shape[2])]
        return by_head(phases, lambda phase, q, k, v: self._phase(phase, q, k, v, scale), q, k, v)

    def _phase(self, phase: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Attended:
        B, T, H = q.shape[:3]
        # as many of every run, but for the last, which may be cut
        runs, most = -(-T // self.length), -(-max(self.length - phase, 0) // self.rate)
        over = T - (runs - 1) * self.length - phase
        count = (runs - 1) * most + min(max(-(-over // self.rate), 0), most) if T else 0
        first = torch.arange(max(runs, 1), device=q.device) * most
        run = torch.arange(runs, device=q.device)[:, None] * self.length
        place = phase + torch.arange(most, device=q.device) * self.rate
        kept = (run + place).flatten()[:count]
        rows = each(lambda x: x.index_select(1, kept), q, k, v)
        cuts = bounds(first, count, B)
        o, lse = packed(*rows, cuts, scale, AttnMask(causal=self.causal))
        return (
            v.new_zeros(B, T, H, v.shape[3]).index_copy(1, kept, o),
            lse.new_full((B, H, T), -torch.inf).index_copy(2, kept, lse),
        )


@dataclass(frozen=True)
class Distances(Pattern):
    """Keys at given distances before the query, and all nearer than ``window``."""

    base: int
    window: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        _B, T, H, K = q.shape
        near = attend(q, k, v, AttnMask(causal=True, left=self.window - 1), scale)
        scale, acc = K**-0.5 if scale is None else scale, near[1].dtype
        distances = [self.base**i for i in range(T.bit_length()) if self.base**i < T]
        distances = [d for d in distances if d >= self.window]
        if not distances:
            return near
        k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
        # [B, T, H, distances]: a logarithm of T per token, so no kernel is needed
        score = torch.stack(
            [
                F.pad(
                    scale * (q[:, d:].to(acc) * k[:, :-d].to(acc)).sum(-1),
                    (0, 0, d, 0),
                    value=-torch.inf,
                )
                for d in distances
            ],
            -1,
        )
        seen = torch.arange(T, device=q.device) >= distances[0]
        some = score.masked_fill(~seen[:, None, None], 0)  # rows of -inf have no softmax
        p = some.softmax(-1)
        o = torch.zeros_like(near[0])
        for i, d in enumerate(distances):
            o = o + F.pad(p[:, d:, :, i, None].to(v.dtype) * v[:, :-d], (0, 0, 0, 0, d, 0))
        lse = some.logsumexp(-1).masked_fill(~seen[:, None], -torch.inf).transpose(1, 2)
        return merge(near, (o.masked_fill(~seen[:, None, None], 0), lse))


@dataclass(frozen=True)
class Axes(Pattern):
    """Tokens are a grid, row-major; attention along some of its axes, the others apart."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    mask: AttnMask = _ALL

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        n = len(self.shape)
        if q.shape[1] != math.prod(self.shape):
            raise ValueError(
                f"axial: a grid of {[*self.shape]} has {math.prod(self.shape)} tokens, got "
                f"{q.shape[1]}"
            )
        rest = [a for a in range(n) if a not in self.axes]
        order = [0, *(a + 1 for a in (*rest, *self.axes))]
        split = 1 + len(rest)
        B = q.shape[0]

        def rows(x: Tensor) -> Tensor:
            x = torch.unflatten(x, 1, self.shape).permute(*order, n + 1, n + 2)
            return x.flatten(0, split - 1).flatten(1, len(self.axes))

        o, lse = attend(rows(q), rows(k), rows(v), self.mask, scale)
        sizes = [B, *(self.shape[a - 1] for a in order[1:])]
        back = [order.index(a) for a in range(n + 1)]
        o = o.reshape(*sizes, *o.shape[2:]).permute(*back, n + 1, n + 2).flatten(1, n)
        lse = lse.transpose(1, 2).reshape(*sizes, -1).permute(*back, n + 1).flatten(1, n)
        return o, lse.transpose(1, 2)


@dataclass(frozen=True)
class Globals(Pattern):
    """The first ``count`` tokens attend to all and are attended to by all; ``rest`` among others.

    Causally, they are seen by all, and see those of them that came before.
    """

    count: int
    rest: Pattern
    causal: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        n = self.count
        # Key by key: the tokens themselves, then the global ones.
        tokens = self.rest.attend(q[:, n:], k[:, n:], v[:, n:], scale)
        side = attend(q[:, n:], k[:, :n], v[:, :n], AttnMask(), scale)
        o, lse = merge(tokens, side)
        seen = n if self.causal else k.shape[1]
        own = AttnMask(causal=self.causal)
        first, first_lse = attend(q[:, :n], k[:, :seen], v[:, :seen], own, scale)
        return torch.cat([first, o], 1), torch.cat([first_lse, lse], 2)


@dataclass(frozen=True)
class BlockDiffusion(Pattern):
    """Two copies of a sequence, noised and clean, in blocks; see :func:`block_diffusion`."""

    block: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        if q.shape[1] % 2:
            raise ValueError(
                "block_diffusion: T must be even, the noised tokens and then the clean ones, "
                f"got {q.shape[1]}"
            )
        (noised_q, clean_q), (noised_k, clean_k), (noised_v, clean_v) = (
            x.chunk(2, 1) for x in (q, k, v)
        )
        own = Segments(self.block).attend(noised_q, noised_k, noised_v, scale)
        before = Masked(None, AttnMask(causal=True, causal_block=self.block, offset=-self.block))
        o, lse = merge(own, before.attend(noised_q, clean_k, clean_v, scale))
        blocks = AttnMask(causal=True, causal_block=self.block)
        clean_o, clean_lse = attend(clean_q, clean_k, clean_v, blocks, scale)
        return torch.cat([o, clean_o], 1), torch.cat([lse, clean_lse], 2)


@dataclass(frozen=True)
class Permuted(Pattern):
    """Dense attention from each block to one other, of each head's choice."""

    block: int
    permutations: tuple[tuple[int, ...], ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        B, T, H, _ = q.shape
        n = len(self.permutations[0])
        if (n * self.block, len(self.permutations)) != (T, H):
            raise ValueError(
                f"block_bert: expected {n * self.block} tokens and a permutation for each head, "
                f"got {T} tokens, {H} heads and {len(self.permutations)} permutations"
            )
        order = torch.tensor(self.permutations, device=q.device).T  # [n, H]
        head = torch.arange(H, device=q.device)
        q = torch.unflatten(q, 1, (n, self.block))
        # [n, H] in place of dimensions 1 and 3, which moves them to the front
        k, v = (
            torch.unflatten(x, 1, (n, self.block))[:, order, :, head // (H // x.shape[2])]
            .permute(2, 0, 3, 1, 4)
            .contiguous()
            for x in (k, v)
        )
        o, lse = attend(*each(lambda x: x.flatten(0, 1), q, k, v), AttnMask(), scale)
        return (
            o.reshape(B, n * self.block, H, -1),
            lse.view(B, n, H, self.block).transpose(1, 2).flatten(2),
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttnMask,
    scale: float | None,
    lists: BlockLists | None = None,
    cu_seqlens: Tensor | None = None,
) -> Attended:
    """One call of the engine."""
    o, lse = block_sparse_attn(q, k, v, lists, mask, scale, cu_seqlens=cu_seqlens, return_lse=True)
    return o, lse


def each(f: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """``f`` of queries, keys and values."""
    return f(q), f(k), f(v)


def merge(*parts: Attended) -> Attended:
    """One softmax out of several over separate sets of keys."""
    if len(parts) == 1:
        return parts[0]
    outputs, lses = zip(*parts, strict=True)
    return merge_attn_states(outputs, lses)


def by_head(
    group_of: Sequence[int], run: Callable[..., Attended], q: Tensor, k: Tensor, v: Tensor
) -> Attended:
    """``run(group, q, k, v)`` of the heads of each group, put together again.

    Key heads are taken along: one for each run of query heads that shares it, where all such runs
    are equally long, else one for each query head.
    """
    groups = sorted(set(group_of))
    if len(groups) == 1:
        return run(groups[0], q, k, v)
    share = q.shape[2] // k.shape[2]
    results = []
    order: list[int] = []
    for group in groups:
        heads = [h for h, g in enumerate(group_of) if g == group]
        sources = [h // share for h in heads]
        kept = sorted(set(sources))
        if len({sources.count(s) for s in kept}) > 1:
            kept = sources
        own = (_take(q, heads), _take(k, kept), _take(v, kept))
        results.append(run(group, *own))
        order += heads
    back = sorted(range(len(order)), key=order.__getitem__)
    outputs, lses = zip(*results, strict=True)
    return _take(torch.cat(outputs, 2), back), torch.cat(lses, 1)[:, back]


def _take(x: Tensor, heads: list[int]) -> Tensor:
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if step > 0 and heads == [*range(heads[0], heads[-1] + 1, step)]:
        return x[:, :, heads[0] : heads[-1] + 1 : step]
    return x[:, :, heads]


def bounds(starts: Tensor, tokens: int, batch: int) -> Tensor:
    """``cu_seqlens`` of a batch laid end to end, each row cut at ``starts`` (the first is 0)."""
    rows = torch.arange(batch, device=starts.device)[:, None] * tokens + starts
    return F.pad(rows.flatten(), (0, 1), value=batch * tokens).to(torch.int32)


def packed(
    q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, scale: float | None, mask: AttnMask
) -> Attended:
    """Attention inside the sequences that ``cuts`` makes of the batch laid end to end."""
    B, T = q.shape[:2]
    rows = each(lambda x: x.reshape(1, -1, *x.shape[2:]), q, k, v)
    o, lse = attend(*rows, mask, scale, cu_seqlens=cuts)
    return o.view(B, T, *o.shape[2:]), lse.view(q.shape[2], B, T).transpose(0, 1)
