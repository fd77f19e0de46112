"""Static patterns: which keys a query attends to, from positions alone.

A pattern attends through the block-sparse engine, in one call where the engine's mask and lists can
say it, else in several calls over disjoint heads, rows or sets of keys whose results are merged by
their log-sum-exp. Nothing of size T x T is made, except by :meth:`Pattern.to_dense`, for tests and
drawings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.attn_mask import AttnMask
from ..ops.block_lists import BlockLists
from ._pattern import (
    Axes,
    BlockDiffusion,
    ByHead,
    Columns,
    Dilated,
    Distances,
    Globals,
    Masked,
    Pattern,
    Permuted,
    Segments,
    Union,
)

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


def _positive(builder: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{builder}: {name} must be positive, got {size}")


def _natural(builder: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{builder}: {name} must not be negative, got {size}")


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
    _natural("sink_window", sinks=sinks)
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
    _positive("block_streaming", block=block, local_blocks=local_blocks)
    _natural("block_streaming", tokens=tokens, sink_blocks=sink_blocks)
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
    for length, rate in zip(segments, rates, strict=True):
        _positive("longnet", segments=length, rates=rate)
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
    _natural("prefix_lm", prefix=prefix)
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
    _natural("longformer", window=window, global_tokens=global_tokens)
    _positive("longformer", dilation=min(gaps, default=0))
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
    """The four pieces of ETC for the global input in front of the long one, without its labels
    (:func:`lsm_cuda.sparse.etc_attn` has them).

    Source: ETC, arXiv:2004.08483.

    Example:
        >>> etc(1, 1).to_dense(4)[0, 1].tolist()
        [1, 1, 1, 0]
    """
    _positive("etc", global_tokens=global_tokens)
    _natural("etc", radius=radius)
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

    Raises:
        ValueError: an even window, sizes that are not sizes, random blocks that are not there.

    Source: Big Bird, arXiv:2007.14062.

    Example:
        >>> pattern = big_bird(512, 1, block=16, generator=torch.Generator().manual_seed(0))
        >>> round(pattern.density(512), 2)
        0.29
    """
    _positive("big_bird", heads=heads, block=block)
    _natural("big_bird", tokens=tokens, window_blocks=window_blocks, global_blocks=global_blocks)
    if window_blocks % 2 == 0:
        raise ValueError(f"big_bird: window_blocks must be odd, got {window_blocks}")
    row, column = _grid(tokens, block)
    blocks = row.shape[0]
    edge = torch.arange(blocks)
    edge = (edge < global_blocks) | (edge >= blocks - global_blocks)
    fixed = ((row - column).abs() <= window_blocks // 2) | edge | edge[:, None]
    if isinstance(random_blocks, int):
        _natural("big_bird", random_blocks=random_blocks)
        draw = torch.rand(heads, blocks, blocks, generator=generator).masked_fill(fixed, -1)
        picked = draw.argsort(-1, descending=True)[..., :random_blocks]
    else:
        picked = random_blocks.cpu()
        if picked.shape[:2] != (heads, blocks) or (picked >= blocks).any():
            raise ValueError(
                f"big_bird: random_blocks must be [heads, rows, n] = [{heads}, {blocks}, n] and "
                f"below {blocks}, got {picked}"
            )
    picked = picked.masked_fill(picked < 0, blocks)
    chosen = torch.zeros(heads, blocks, blocks + 1, dtype=torch.bool)
    chosen = chosen.scatter_(-1, picked, True)[..., :blocks] | fixed
    return Masked(_lists(chosen, tokens, block))


def block_bert(tokens: int, permutations: Sequence[Sequence[int]]) -> Pattern:
    """Head h attends from block i of the sequence to block ``permutations[h][i]`` only.

    Args:
        tokens: T, a multiple of the blocks.
        permutations: for each head, the n numbers 0 to n - 1 in some order.

    Raises:
        ValueError: lists that are not that, or a T that is not a multiple of n; in use, another
            number of tokens or heads.

    Source: Blockwise Self-Attention for Long Document Understanding, arXiv:1911.02972.

    Example:
        >>> block_bert(32, [[0, 1], [1, 0]]).to_dense(32, heads=2)[:, 0, ::16].tolist()
        [[1, 0], [0, 1]]
    """
    blocks = len(permutations[0])
    if any(sorted(p) != list(range(blocks)) for p in permutations):
        raise ValueError(
            f"block_bert: expected permutations of 0 to {blocks - 1}, got {permutations}"
        )
    if tokens % blocks:
        raise ValueError(
            f"block_bert: T must be a multiple of the blocks, got {tokens} and {blocks}"
        )
    return Permuted(tokens // blocks, tuple(tuple(p) for p in permutations))


def axial(shape: Sequence[int], axis: int | Sequence[int]) -> Pattern:
    """Tokens are a grid of ``shape``, row-major; attention along one axis or several of it.

    Source: Axial Attention in Multidimensional Transformers, arXiv:1912.12180.

    Example:
        >>> axial((2, 2), 0).to_dense(4)[0].tolist()
        [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    n = len(shape)
    if len({a % n for a in axes}) != len(axes) or not all(-n <= a < n for a in axes):
        raise ValueError(f"axial: axis must be in [{-n}, {n}), each once, got {[*axes]}")
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
