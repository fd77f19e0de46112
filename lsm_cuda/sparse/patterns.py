"""Static patterns: which keys a query attends to, from positions alone.

A pattern attends through the block-sparse engine, in one call where the engine's mask and lists can
say it, else in several calls over disjoint heads, rows or sets of keys whose results are merged by
their log-sum-exp. Nothing of size T x T is made, except by :meth:`Pattern.to_dense`, for tests and
drawings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attn_mask import AttnMask
from ..ops.block_lists import BlockLists
from ..ops.sparse_attn import block_sparse_attn, merge_attn_states

__all__ = [
    "Pattern",
    "axial",
    "big_bird",
    "block_bert",
    "block_diffusion",
    "block_streaming",
    "chunked_local",
    "etc",
    "gmat",
    "log_sparse",
    "longformer",
    "longnet",
    "prefix_lm",
    "s2_attn",
    "sink_window",
    "sliding_window",
    "sparse_transformer_fixed",
    "sparse_transformer_strided",
    "spatio_temporal",
    "star",
]

Attended = tuple[Tensor, Tensor]


class Pattern:
    """Keys of each query; ``attend`` computes softmax attention over them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        """Attention of ``q [B, T, Hq, K]`` over ``k [B, T, Hkv, K]`` and ``v [B, T, Hkv, V]``.

        Args:
            q, k, v: as :func:`lsm_cuda.ops.block_sparse_attn`, whose dtypes and gradients hold.
            scale: of the scores; default ``K ** -0.5``.

        Returns:
            o ``[B, T, Hq, V]`` and the softmax's log-denominator ``[B, Hq, T]``.
        """
        raise NotImplementedError

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
    mask: AttnMask = AttnMask()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        lists = None if self.lists is None else self.lists.to(q.device)
        return attend(q, k, v, self.mask, scale, lists=lists)


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
        return by_head(part_of, lambda i, *qkv: self.parts[i].attend(*qkv, scale), q, k, v)


@dataclass(frozen=True)
class Segments(Pattern):
    """Attention inside runs of ``length`` tokens, the first of which starts ``shift`` early."""

    length: int
    shift: int = 0
    mask: AttnMask = AttnMask()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        B, T = q.shape[:2]
        ends = torch.arange(self.length - self.shift, T, self.length)
        own = torch.cat([ends.new_zeros(1), ends])
        return packed(q, k, v, bounds(own, T, B, q.device), scale, self.mask)


@dataclass(frozen=True)
class Columns(Pattern):
    """The last ``width`` tokens of every run of ``length``, causally."""

    length: int
    width: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        (B, T), length, width = q.shape[:2], self.length, self.width
        runs = -(-T // length)
        q, k, v = (
            F.pad(x, (0, 0, 0, 0, 0, runs * length - T)).unflatten(1, (runs, length))
            for x in (q, k, v)
        )
        columns = [x[:, :, length - width :] for x in (q, k, v)]
        # Of earlier runs: a run's columns lie length / width apart on a scale on which runs are
        # `length` long, so that a query one run behind sees whole runs up to its own.
        stride = length // width
        earlier = AttnMask(
            causal=True, align_end=False, offset=-length, causal_block=length, key_stride=stride
        )
        before = attend(
            q.flatten(1, 2), *(x.flatten(1, 2) for x in columns[1:]), earlier, scale
        )
        o, lse = attend(*(x.flatten(0, 1) for x in columns), AttnMask(causal=True), scale)
        o = F.pad(o, (0, 0, 0, 0, length - width, 0)).view(B, runs * length, *o.shape[2:])
        lse = F.pad(lse, (length - width, 0), value=-torch.inf)
        lse = lse.unflatten(0, (B, runs)).transpose(1, 2).flatten(2)
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
        return by_head(phases, lambda phase, *qkv: self._phase(phase, *qkv, scale), q, k, v)

    def _phase(self, phase: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Attended:
        B, T, H = q.shape[:3]
        token = torch.arange(T)
        kept = token[token % self.length % self.rate == phase]
        run = kept // self.length
        first = (run.diff(prepend=run.new_full((1,), -1)) != 0).nonzero().flatten()
        kept = kept.to(q.device)
        rows = [x.index_select(1, kept) for x in (q, k, v)]
        cuts = bounds(first, len(kept), B, q.device)
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
        B, T, H, K = q.shape
        near = attend(q, k, v, AttnMask(causal=True, left=self.window - 1), scale)
        scale = K**-0.5 if scale is None else scale
        distances = [self.base**i for i in range(T.bit_length()) if self.base**i < T]
        distances = [d for d in distances if d >= self.window]
        if not distances:
            return near
        k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
        # [B, T, H, distances]: a logarithm of T per token, so no kernel is needed
        score = torch.stack(
            [
                F.pad(
                    scale * (q[:, d:] * k[:, :-d]).sum(-1, dtype=near[1].dtype),
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
        o = sum(
            F.pad(p[:, d:, :, i, None].to(v.dtype) * v[:, :-d], (0, 0, 0, 0, d, 0))
            for i, d in enumerate(distances)
        )
        lse = some.logsumexp(-1).masked_fill(~seen[:, None], -torch.inf).transpose(1, 2)
        return merge(near, (o.masked_fill(~seen[:, None, None], 0), lse))


@dataclass(frozen=True)
class Axes(Pattern):
    """Tokens are a grid, row-major; attention along some of its axes, the others apart."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    mask: AttnMask = AttnMask()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        n = len(self.shape)
        rest = [a for a in range(n) if a not in self.axes]
        order = [0, *(a + 1 for a in (*rest, *self.axes))]
        split = 1 + len(rest)
        B = q.shape[0]

        def rows(x: Tensor) -> Tensor:
            x = x.unflatten(1, self.shape).permute(*order, n + 1, n + 2)
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
    o, lse = block_sparse_attn(
        q, k, v, lists, mask, scale, cu_seqlens=cu_seqlens, return_lse=True
    )
    return o, lse


def merge(*parts: Attended) -> Attended:
    """One softmax out of several over separate sets of keys."""
    if len(parts) == 1:
        return parts[0]
    return merge_attn_states(*zip(*parts, strict=True))


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
    results, order = [], list[int]()
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


def bounds(starts: Tensor, tokens: int, batch: int, device: torch.device) -> Tensor:
    """``cu_seqlens`` of a batch laid end to end, each row cut at ``starts`` (the first is 0)."""
    rows = torch.arange(batch)[:, None] * tokens + starts
    cuts = torch.cat([rows.flatten(), rows.new_tensor([batch * tokens])])
    return cuts.to(torch.int32).to(device)


def packed(
    q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, scale: float | None, mask: AttnMask
) -> Attended:
    """Attention inside the sequences that ``cuts`` makes of the batch laid end to end."""
    B, T = q.shape[:2]
    rows = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    o, lse = attend(*rows, mask, scale, cu_seqlens=cuts)
    return o.view(B, T, *o.shape[2:]), lse.view(-1, B, T).transpose(0, 1)


def _positive(builder: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{builder}: {name} must be positive, got {size}")


def sliding_window(window_size: int, causal: bool = True) -> Pattern:
    """The last ``window_size`` tokens, the query's own among them.

    Not causally: all tokens at most ``window_size`` away, on both sides.

    Source: Longformer, arXiv:2004.05150, section 3.1; Mistral 7B, arXiv:2310.06825.

    Example:
        >>> sliding_window(2).to_dense(4)[0].tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    _positive("sliding_window", window_size=window_size)
    if causal:
        return Masked(None, AttnMask(causal=True, left=window_size - 1))
    return Masked(None, AttnMask(left=window_size, right=window_size))


def sink_window(window_size: int, sinks: int = 4) -> Pattern:
    """The first ``sinks`` tokens and the last ``window_size``, causally.

    Source: StreamingLLM, arXiv:2309.17453.

    Example:
        >>> sink_window(2, sinks=1).to_dense(4)[0, 3].tolist()
        [1, 0, 1, 1]
    """
    _positive("sink_window", window_size=window_size)
    return Masked(None, AttnMask(causal=True, left=window_size - 1, sinks=sinks))


def block_streaming(
    tokens: int, block: int = 64, sink_blocks: int = 1, local_blocks: int = 4
) -> Pattern:
    """The first blocks of keys and the last ones, the query's own among them, causally.

    Args:
        tokens: T.
        block: tokens of a block of queries and of keys, 16 to 128, a power of two.
        sink_blocks, local_blocks: how many.

    Source: StreamingLLM, arXiv:2309.17453, in blocks; DuoAttention, arXiv:2410.10819.

    Example:
        >>> block_streaming(96, block=16, local_blocks=2).density(96) < 0.4
        True
    """
    row, column = _grid(tokens, block)
    chosen = (column < sink_blocks) | (row - column < local_blocks)
    return Masked(_lists((chosen & (column <= row))[None], tokens, block), AttnMask(causal=True))


def sparse_transformer_strided(stride: int) -> Pattern:
    """Half the heads see the last ``stride`` tokens, half every ``stride``-th one before.

    Source: Generating Long Sequences with Sparse Transformers, arXiv:1904.10509, section 4.3.

    Example:
        >>> sparse_transformer_strided(2).to_dense(4, heads=2)[:, 3].tolist()
        [[0, 0, 1, 1], [0, 1, 0, 1]]
    """
    _positive("sparse_transformer_strided", stride=stride)
    local = Masked(None, AttnMask(causal=True, left=stride - 1))
    return ByHead((local, Masked(None, AttnMask(causal=True, dilation=stride))))


def sparse_transformer_fixed(stride: int, width: int = 1) -> Pattern:
    """Half the heads see their own run of ``stride`` tokens, half the last ``width`` of each run.

    Raises:
        ValueError: ``width`` does not divide ``stride``.

    Source: Generating Long Sequences with Sparse Transformers, arXiv:1904.10509, section 4.3.

    Example:
        >>> sparse_transformer_fixed(2).to_dense(4, heads=2)[:, 3].tolist()
        [[0, 0, 1, 1], [0, 1, 0, 1]]
    """
    _positive("sparse_transformer_fixed", stride=stride, width=width)
    if stride % width:
        raise ValueError(
            f"sparse_transformer_fixed: width must divide stride, got {width} and {stride}"
        )
    return ByHead((chunked_local(stride), Columns(stride, width)))


def log_sparse(window_size: int = 1) -> Pattern:
    """The last ``window_size`` tokens, and those 1, 2, 4, 8, .. before.

    Source: Enhancing the Locality and Breaking the Memory Bottleneck of Transformer on Time Series
    Forecasting, arXiv:1907.00235, section 4.2.

    Example:
        >>> log_sparse().to_dense(6)[0, 5].tolist()
        [0, 1, 0, 1, 1, 1]
    """
    _positive("log_sparse", window_size=window_size)
    return Distances(2, window_size)


def longnet(segments: Sequence[int], rates: Sequence[int], causal: bool = True) -> Pattern:
    """Dilated attention: for each pair (w, r), every r-th token of runs of w among themselves.

    Head h starts at token h mod r of a run. The mixture weighs each output by its softmax's
    denominator, as the paper does: a key that several pairs reach counts several times.

    Raises:
        ValueError: as many ``segments`` as ``rates`` are needed.

    Source: LongNet, arXiv:2307.02486, eq. 6-10.

    Example:
        >>> longnet([2, 4], [1, 2]).to_dense(4)[0, 2].tolist()
        [1, 0, 2, 0]
    """
    if len(segments) != len(rates) or not segments:
        raise ValueError(
            f"longnet: needs as many segments as rates, got {[*segments]} and {[*rates]}"
        )
    return Union(tuple(Dilated(w, r, causal) for w, r in zip(segments, rates, strict=True)))


def chunked_local(length: int, causal: bool = True) -> Pattern:
    """Tokens see those of their own run of ``length``, up to themselves if causal.

    Source: Llama 4's local layers; Sparse Transformers, arXiv:1904.10509.

    Example:
        >>> chunked_local(2).to_dense(3)[0].tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    _positive("chunked_local", length=length)
    return Segments(length, 0, AttnMask(causal=causal))


def s2_attn(group_size: int, causal: bool = True) -> Pattern:
    """Groups of tokens; for half of the heads they are shifted by half a group.

    The paper's code rolls the sequence, so that its last half group and its first are one; a query
    of the first then reads the sequence's end. Here they are groups of their own.

    Source: LongLoRA, arXiv:2309.12307, section 3.2.

    Example:
        >>> s2_attn(2).to_dense(4, heads=2)[:, 2].tolist()
        [[0, 0, 1, 0], [0, 1, 1, 0]]
    """
    _positive("s2_attn", group_size=group_size)
    mask = AttnMask(causal=causal)
    return ByHead((Segments(group_size, 0, mask), Segments(group_size, group_size // 2, mask)))


def prefix_lm(prefix: int) -> Pattern:
    """Causal, but the first ``prefix`` tokens are seen by all.

    Source: Exploring the Limits of Transfer Learning, arXiv:1910.10683, section 3.2.1.

    Example:
        >>> prefix_lm(2).to_dense(3)[0].tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    return Masked(None, AttnMask(causal=True, prefix=prefix))


def block_diffusion(block: int) -> Pattern:
    """For training block diffusion: T / 2 noised tokens and then the same T / 2 clean ones.

    A noised token sees its own noised block, and clean blocks before it; a clean one sees clean
    blocks up to its own.

    Source: Block Diffusion, arXiv:2503.09573, section 3.3.

    Example:
        >>> block_diffusion(1).to_dense(4)[0].tolist()
        [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    _positive("block_diffusion", block=block)
    return BlockDiffusion(block)


def longformer(
    window: int, global_tokens: int = 0, dilation: int | Sequence[int] = 1, causal: bool = False
) -> Pattern:
    """A window, and global tokens at the beginning.

    Args:
        window: keys on each side.
        global_tokens: tokens at the beginning that see all and are seen by all.
        dilation: gaps of the window; a sequence of them is shared out over the heads.
        causal: only keys up to the query.

    For global tokens elsewhere, with projections of their own, see
    :class:`lsm_cuda.layers.LongformerSelfAttention`.

    Source: Longformer, arXiv:2004.05150.

    Example:
        >>> longformer(1, global_tokens=1).to_dense(4)[0].tolist()
        [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]
    """
    gaps = [dilation] if isinstance(dilation, int) else [*dilation]
    parts = tuple(
        Masked(
            None,
            AttnMask(causal=causal, left=window * d, right=0 if causal else window * d, dilation=d),
        )
        for d in gaps
    )
    local = parts[0] if len(parts) == 1 else ByHead(parts)
    return Globals(global_tokens, local, causal) if global_tokens else local


def gmat(memory: int, rest: Pattern, causal: bool = False) -> Pattern:
    """``memory`` tokens in front that attend and are attended to by all; any pattern for others.

    Source: GMAT, arXiv:2006.03274.

    Example:
        >>> gmat(1, sliding_window(1)).to_dense(3)[0].tolist()
        [[1, 1, 1], [1, 1, 0], [1, 0, 1]]
    """
    _positive("gmat", memory=memory)
    return Globals(memory, rest, causal)


def etc(global_tokens: int, radius: int) -> Pattern:
    """The four pieces of ETC for the global input in front of the long one, without its labels.

    Source: ETC, arXiv:2004.08483.

    Example:
        >>> etc(1, 1).to_dense(4)[0, 1].tolist()
        [1, 1, 1, 0]
    """
    return gmat(global_tokens, Masked(None, AttnMask(left=radius, right=radius)))


def star() -> Pattern:
    """Satellites behind one relay: each sees itself, its neighbours and the relay.

    The relay sees all. In the paper a satellite also sees its embedding: see
    :func:`lsm_cuda.sparse.star_attn`.

    Source: Star-Transformer, arXiv:1902.09113.

    Example:
        >>> star().to_dense(4)[0].tolist()
        [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]
    """
    return Globals(1, Masked(None, AttnMask(left=1, right=1)))


def big_bird(
    tokens: int,
    heads: int,
    block: int = 64,
    window_blocks: int = 3,
    global_blocks: int = 1,
    random_blocks: int | Tensor = 3,
    generator: torch.Generator | None = None,
) -> Pattern:
    """Blocks around the query's own, the first and last ones, and random ones; in both directions.

    Args:
        tokens: T.
        heads: query heads, each with random blocks of its own.
        block: tokens of a block, 16 to 128, a power of two.
        window_blocks: blocks around the query's own, which counts; odd.
        global_blocks: blocks at either end that see all and are seen by all.
        random_blocks: further blocks of each row; or which, ``[heads, rows, n]``, -1 for none.
        generator: of the random blocks.

    Source: Big Bird, arXiv:2007.14062.

    Example:
        >>> pattern = big_bird(512, 1, block=16, generator=torch.Generator().manual_seed(0))
        >>> round(pattern.density(512), 2)
        0.29
    """
    row, column = _grid(tokens, block)
    blocks = row.shape[0]
    edge = torch.arange(blocks)
    edge = (edge < global_blocks) | (edge >= blocks - global_blocks)
    fixed = ((row - column).abs() <= window_blocks // 2) | edge | edge[:, None]
    if isinstance(random_blocks, int):
        draw = torch.rand(heads, blocks, blocks, generator=generator).masked_fill(fixed, -1)
        picked = draw.argsort(-1, descending=True)[..., :random_blocks]
    else:
        picked = random_blocks.cpu()
    picked = picked.masked_fill(picked < 0, blocks)
    chosen = torch.zeros(heads, blocks, blocks + 1, dtype=torch.bool)
    chosen = chosen.scatter_(-1, picked, True)[..., :blocks] | fixed
    return Masked(_lists(chosen, tokens, block))


def block_bert(tokens: int, permutations: Sequence[Sequence[int]]) -> Pattern:
    """Head h attends from block i of the sequence to block ``permutations[h][i]`` only.

    Args:
        tokens: T, a multiple of the blocks.
        permutations: for each head, the n numbers 0 to n - 1 in some order.

    Source: Blockwise Self-Attention for Long Document Understanding, arXiv:1911.02972.

    Example:
        >>> block_bert(32, [[0, 1], [1, 0]]).to_dense(32, heads=2)[:, 0, ::16].tolist()
        [[1, 0], [0, 1]]
    """
    order = torch.tensor([[*p] for p in permutations])
    blocks = order.shape[1]
    if tokens % blocks:
        raise ValueError(
            f"block_bert: T must be a multiple of the blocks, got {tokens} and {blocks}"
        )
    return Permuted(tokens // blocks, tuple(map(tuple, order.tolist())))


@dataclass(frozen=True)
class Permuted(Pattern):
    """Dense attention from each block to one other, of each head's choice."""

    block: int
    permutations: tuple[tuple[int, ...], ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Attended:
        B, H = q.shape[0], q.shape[2]
        n = len(self.permutations[0])
        order = torch.tensor(self.permutations, device=q.device).T  # [n, H]
        head = torch.arange(H, device=q.device)
        q = q.unflatten(1, (n, self.block))
        # [n, H] in place of dimensions 1 and 3, which moves them to the front
        k, v = (
            x.unflatten(1, (n, self.block))[:, order, :, head // (H // x.shape[2])]
            .permute(2, 0, 3, 1, 4)
            .contiguous()
            for x in (k, v)
        )
        o, lse = attend(*(x.flatten(0, 1) for x in (q, k, v)), AttnMask(), scale)
        return (
            o.reshape(B, n * self.block, H, -1),
            lse.view(B, n, H, self.block).transpose(1, 2).flatten(2),
        )


def axial(shape: Sequence[int], axis: int | Sequence[int]) -> Pattern:
    """Tokens are a grid of ``shape``, row-major; attention along one axis or several of it.

    Source: Axial Attention in Multidimensional Transformers, arXiv:1912.12180.

    Example:
        >>> axial((2, 2), 0).to_dense(4)[0].tolist()
        [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    return Axes(tuple(shape), tuple(a % len(shape) for a in axes))


def spatio_temporal(
    frames: int, height: int, width: int, window: int | None = None
) -> tuple[Pattern, Pattern]:
    """Attention inside frames, and of one site across frames.

    Args:
        frames, height, width: of the video whose tokens come frame by frame, row by row.
        window: sites see square windows of this side of their frame, instead of all of it.

    Source: Open-Sora, arXiv:2412.20404.

    Example:
        >>> spatial, temporal = spatio_temporal(2, 1, 2)
        >>> spatial.to_dense(4)[0, 0].tolist(), temporal.to_dense(4)[0, 0].tolist()
        ([1, 1, 0, 0], [1, 0, 1, 0])
    """
    temporal = axial((frames, height, width), 0)
    if window is None:
        return axial((frames, height, width), (1, 2)), temporal
    if height % window or width % window:
        raise ValueError(
            f"spatio_temporal: window must divide height and width, got {window}, {height}, {width}"
        )
    windows = (frames, height // window, window, width // window, window)
    return axial(windows, (2, 4)), temporal


def _grid(tokens: int, block: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(-(-tokens // block))
    return index[:, None], index


def _lists(chosen: Tensor, tokens: int, block: int) -> BlockLists:
    """Lists of the chosen blocks, of a bitmap ``[heads, rows, blocks]``."""
    return BlockLists.from_bitmap(chosen, tokens, tokens, block, block)
