"""Lists of key blocks, the index that sparse attention runs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .attn_mask import AttnMask

__all__ = ["BlockLists"]


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each row of ``block_q`` queries, the blocks of ``block_k`` keys it attends to: ascending,
    each once.

    Blocks count from the start of the sequence's keys. Rows of packed sequences follow one another,
    each sequence beginning a row of its own. Query head h of Hq reads list head
    ``h * heads // Hq``. Most are made by :meth:`from_bitmap`, :meth:`from_mask` or
    :meth:`from_indices`; patterns and selectors return them.

    Attributes:
        index (Tensor): int32; ``[entries]`` with ``row_ptr``, or ``[B, heads, rows, capacity]``
            with −1 after a row's last block.
        row_ptr (Tensor, optional): ``[B * heads * rows + 1]`` int64, where each row begins.
        shape: B, heads (1, Hkv or Hq), rows.
        Tq, Tk (int): queries and keys in a batch row.
        block_q, block_k (int): 16, 32, 64 or 128; block_q may be 1.
        bias (Tensor, optional): like ``index``, fp32 (fp64 for fp64 queries): added to every score
            of that block; differentiable.
        cu_seqlens_q, cu_seqlens_k (Tensor, optional): ``[N + 1]`` boundaries of packed sequences.

    Example:
        >>> lists = BlockLists.from_bitmap(torch.eye(4, dtype=torch.bool), 64, 64, 16, 16)
        >>> lists.index, lists.density()
        (tensor([0, 1, 2, 3], dtype=torch.int32), 0.25)
        >>> lists
        BlockLists(64 queries by 16, 64 keys by 16, 4 blocks in 1 x 1 x 4 lists)
    """

    index: Tensor
    row_ptr: Tensor | None
    shape: tuple[int, int, int]
    Tq: int
    Tk: int
    block_q: int = 64
    block_k: int = 64
    bias: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    def __repr__(self) -> str:
        lists = " x ".join(map(str, self.shape))
        long = f"{len(self.index)} blocks in {lists} lists"
        if self.row_ptr is None:
            long = f"{lists} lists of up to {self.index.shape[-1]} blocks"
        return (
            f"BlockLists({self.Tq} queries by {self.block_q}, {self.Tk} keys by {self.block_k}, "
            f"{long})"
        )

    # ---- Making them ----

    @classmethod
    def from_bitmap(
        cls,
        bitmap: Tensor,
        Tq: int,
        Tk: int,
        block_q: int = 64,
        block_k: int = 64,
        capacity: int | None = None,
        bias: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> BlockLists:
        """From bool ``[B, heads, rows, blocks]`` (leading dimensions may be absent, for 1), and a
        bias of that shape. With ``capacity`` lists of a fixed size, else CSR."""
        while bitmap.dim() < 4:
            bitmap = bitmap.unsqueeze(0)
        B, heads, rows, blocks = bitmap.shape
        if bias is not None:
            bias = bias.expand(bitmap.shape)
        given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        counts = bitmap.sum(-1)
        if capacity is None:
            ends = counts.flatten().cumsum(0)
            row_ptr = torch.cat([ends.new_zeros(1), ends])
            index = bitmap.nonzero()[:, -1].to(torch.int32)
            bias = None if bias is None else bias[bitmap]
        else:
            longest = int(counts.max()) if counts.numel() else 0
            if longest > capacity:
                raise ValueError(f"BlockLists: a row has {longest} blocks, capacity is {capacity}")
            row_ptr = None
            numbers = torch.arange(blocks, device=bitmap.device)
            order = torch.where(bitmap, numbers, blocks).sort(-1).values[..., :capacity]
            order = torch.nn.functional.pad(order, (0, capacity - order.shape[-1]), value=blocks)
            index = torch.where(order < blocks, order, -1).to(torch.int32)
            if bias is not None:
                bias = torch.nn.functional.pad(bias, (0, 1)).gather(-1, order)
        return cls(index, row_ptr, (B, heads, rows), Tq, Tk, block_q, block_k, bias, **given)

    @classmethod
    def from_mask(
        cls, mask: Tensor, block_q: int = 64, block_k: int = 64, capacity: int | None = None
    ) -> BlockLists:
        """Every block of which a bool mask ``[.., Tq, Tk]`` keeps any pair of tokens."""
        Tq, Tk = mask.shape[-2:]
        rows, blocks = _blocks(Tq, block_q), _blocks(Tk, block_k)
        extra = (0, blocks * block_k - Tk, 0, rows * block_q - Tq)
        whole = torch.nn.functional.pad(mask, extra)
        tiles = whole.reshape(*mask.shape[:-2], rows, block_q, blocks, block_k)
        return cls.from_bitmap(tiles.any(-1).any(-2), Tq, Tk, block_q, block_k, capacity)

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        Tq: int,
        Tk: int,
        block_q: int = 64,
        block_k: int = 64,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> BlockLists:
        """From integers ``[B, heads, rows, n]`` in any order, as top-k gives them: sorted, each
        once; negative ones are none. Their number stays the capacity."""
        nowhere = torch.iinfo(torch.int32).max
        order = torch.where(indices < 0, nowhere, indices).sort(-1).values
        again = torch.nn.functional.pad(order[..., 1:] == order[..., :-1], (1, 0))
        order = order.masked_fill(again, nowhere).sort(-1).values
        index = torch.where(order == nowhere, -1, order).to(torch.int32)
        B, heads, rows, _ = index.shape
        return cls(
            index, None, (B, heads, rows), Tq, Tk, block_q, block_k, None, cu_seqlens_q,
            cu_seqlens_k,
        )  # fmt: skip

    def expand(self, B: int) -> BlockLists:
        """Lists of one batch row for B of them."""
        if self.shape[0] == B:
            return self
        if self.shape[0] != 1:
            raise ValueError(f"BlockLists: lists are for {self.shape[0]} batch rows, not for {B}")
        shape, bias = (B, *self.shape[1:]), self.bias
        times = (B,) if self.row_ptr is not None else (B, 1, 1, 1)
        many = replace(
            self, shape=shape, index=self.index.repeat(times),
            bias=None if bias is None else bias.repeat(times),
        )  # fmt: skip
        if self.row_ptr is None:
            return many
        starts = torch.arange(B, device=self.index.device)[:, None] * len(self.index)
        row_ptr = (self.row_ptr[:-1] + starts).flatten()
        return replace(many, row_ptr=torch.cat([row_ptr, row_ptr.new_full((1,), len(many.index))]))

    def to(self, device: torch.device | str) -> BlockLists:
        """On another device."""

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self, index=self.index.to(device), row_ptr=moved(self.row_ptr), bias=moved(self.bias),
            cu_seqlens_q=moved(self.cu_seqlens_q), cu_seqlens_k=moved(self.cu_seqlens_k),
        )  # fmt: skip

    # ---- Reading them ----

    @property
    def blocks(self) -> int:
        """Key blocks of the longest sequence."""
        if self.cu_seqlens_k is None:
            return _blocks(self.Tk, self.block_k)
        return _blocks(max(self.cu_seqlens_k.diff().tolist(), default=0), self.block_k)

    def counts(self) -> Tensor:
        """Blocks in each row, ``[B, heads, rows]``."""
        if self.row_ptr is not None:
            return self.row_ptr.diff().view(self.shape)
        return (self.index >= 0).sum(-1)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row and block of each entry, and whether it is one."""
        counts = self.counts().flatten()
        numbers = torch.arange(len(counts), device=self.index.device)
        if self.row_ptr is not None:
            return numbers.repeat_interleave(counts), self.index.long(), self.index >= 0
        index = self.index.flatten(0, 2)
        return numbers[:, None].expand(index.shape), index.long(), index >= 0

    def to_bitmap(self) -> Tensor:
        """bool ``[B, heads, rows, blocks]``."""
        row, block, real = self._entries()
        bitmap = torch.zeros(*self.shape, self.blocks, dtype=torch.bool, device=self.index.device)
        bitmap.flatten(0, 2)[row[real], block[real]] = True
        return bitmap

    def dense_bias(self) -> Tensor:
        """The bias as ``[B, heads, rows, blocks]``, 0 where there is none; differentiable."""
        assert self.bias is not None
        row, block, real = self._entries()
        zeros = self.bias.new_zeros(self.to_bitmap().flatten(0, 2).shape)
        values = self.bias.reshape(row.shape)[real]
        return zeros.index_put((row[real], block[real]), values).view(*self.shape, self.blocks)

    def sequences(self) -> Iterator[tuple[slice, slice, slice]]:
        """Queries, keys and rows of each sequence of a batch row."""
        bounds = (self.cu_seqlens_q, self.cu_seqlens_k)
        queries, keys = (
            list(pairwise([0, T] if cu is None else cu.tolist()))
            for cu, T in zip(bounds, (self.Tq, self.Tk), strict=True)
        )
        first = 0
        for q, k in zip(queries, keys, strict=True):
            end = first + _blocks(q[1] - q[0], self.block_q)
            yield slice(*q), slice(*k), slice(first, end)
            first = end

    def to_dense(self, mask: AttnMask | None = None, heads: int | None = None) -> Tensor:
        """The pairs of queries and keys attended to, bool ``[B, heads, Tq, Tk]``.

        Args:
            mask (AttnMask, optional): what it forbids is left out.
            heads (int, optional): query heads, each with the list it reads.
        """
        B, own, _ = self.shape
        heads = max(own, heads or 1)
        if mask is not None and mask.head_left is not None:
            heads = len(mask.head_left)
        bitmap = self.to_bitmap().repeat_interleave(heads // own, 1)
        dense = bitmap.new_zeros(B, heads, self.Tq, self.Tk)
        for q, k, rows in self.sequences():
            queries, keys = q.stop - q.start, k.stop - k.start
            part = bitmap[:, :, rows].repeat_interleave(self.block_q, 2)
            part = part.repeat_interleave(self.block_k, 3)[:, :, :queries, :keys]
            seen = None if mask is None else mask.to_dense(queries, keys, bitmap.device)
            dense[:, :, q, k] = part if seen is None else part & seen
        return dense

    def density(self, mask: AttnMask | None = None) -> float:
        """The share of pairs of a query and a key that lie in listed blocks: of all pairs within a
        sequence, or of those that ``mask`` lets through."""
        rule, bitmap = mask or AttnMask(), self.to_bitmap()
        heads = self.shape[1] if rule.head_left is None else len(rule.head_left)
        kept = every = 0
        for q, k, rows in self.sequences():
            p, x = rule.positions(q.stop - q.start, k.stop - k.start, self.index.device)
            for row in range(rows.start, rows.stop):
                here = p[(row - rows.start) * self.block_q :][: self.block_q]
                pairs = rule.sees(here, x).sum(-2)
                pairs = pairs if pairs.dim() == 2 else pairs[None]
                extra = self.blocks * self.block_k - len(x)
                pairs = torch.nn.functional.pad(pairs, (0, extra))
                pairs = pairs.view(len(pairs), self.blocks, self.block_k).sum(-1)
                listed = bitmap[:, :, row].repeat_interleave(heads // self.shape[1], 1)
                kept += int((listed * pairs).sum())
                every += int(pairs.expand(listed.shape).sum())
        return kept / every if every else 0.0

    def check(self) -> None:
        """Raises ValueError for lists that no operator may run on. Reads values, which on a GPU
        waits for it; operators on CPU tensors check for themselves."""
        ends = self.row_ptr
        if ends is not None and (
            (ends.diff() < 0).any() or int(ends[0]) != 0 or int(ends[-1]) != len(self.index)
        ):
            raise ValueError("BlockLists: row_ptr must ascend from 0 to the number of entries")
        row, block, real = self._entries()
        if ends is not None:
            real = torch.ones_like(real)
        elif (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError("BlockLists: a row has blocks after -1")
        row, block = row[real], block[real]
        if ((row[1:] == row[:-1]) & (block[1:] <= block[:-1])).any():
            raise ValueError("BlockLists: a row must ascend without repetition")
        limits = torch.zeros(self.shape, dtype=torch.long, device=block.device)
        for _, k, rows in self.sequences():
            limits[:, :, rows] = _blocks(k.stop - k.start, self.block_k)
        limit = limits.flatten()[row]
        if ((block < 0) | (block >= limit)).any():
            at = int(((block < 0) | (block >= limit)).nonzero()[0])
            raise ValueError(
                f"BlockLists: block {int(block[at])} of row {int(row[at])} is outside [0, "
                f"{int(limit[at])}), the key blocks of its sequence"
            )

    def plot(
        self, path: str | Path, mask: AttnMask | None = None, batch: int = 0, head: int = 0
    ) -> Path:
        """Draws one head's pairs, or for long sequences its blocks, to a PNG; needs matplotlib."""
        from matplotlib.figure import Figure

        small = self.Tq * self.Tk <= 1 << 22
        heads = None if mask is None or mask.head_left is None else len(mask.head_left)
        picture = self.to_dense(mask, heads) if small else self.to_bitmap()
        figure = Figure(figsize=(4, 4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(
            picture[batch, head].cpu().numpy(), cmap="Blues", interpolation="nearest", vmin=0
        )
        axes.set_xlabel("key" if small else "block of keys")
        axes.set_ylabel("query" if small else "row of queries")
        axes.set_title(f"density {self.density(mask):.1%}")
        figure.savefig(path)
        return Path(path)
