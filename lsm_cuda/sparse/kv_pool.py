"""Key/value caches whose tokens lie in pages of a pool that many caches share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..modules import RotaryEmbedding
from ..ops.attn_mask import AttnMask
from ..ops.block_lists import BlockLists
from ..ops.kv_cache import kv_cache_update, sparse_attn_decode
from ._pattern import merge
from .kv_cache import KVCache, Policy, select_tokens
from .kv_quantized import numbers, quantize

__all__ = ["PagePool", "PagedKVCache"]


@dataclass
class _Pages:
    """Pages of heads of one kind, and those of them that nobody has."""

    keys: Tensor  # [pages, page_size, Hkv, K], or codes of them
    values: Tensor  # [pages, page_size, Hkv, V], likewise
    free: list[int]
    affine: tuple[Tensor, Tensor] | None = None  # of codes, [pages, page_size, Hkv, 2]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What of keys and of values is kept, in pages."""
        return [(self.keys, self.values), *([] if self.affine is None else [self.affine])]


class PagePool:
    """Pages of tokens for many caches: of sequences, of layers, of kinds of heads.

    Args:
        pages: in all, for each kind of heads (their number, widths, dtype, device and bits), whose
            memory is taken when it first comes.
        page_size: tokens of a page.

    Example:
        >>> from lsm_cuda.sparse import Quest
        >>> pool = PagePool(pages=8, page_size=16)
        >>> cache = PagedKVCache(pool, Quest(budget=32, page_size=16))
        >>> q, k, v = torch.randn(1, 20, 4, 16), *torch.randn(2, 1, 20, 2, 16)
        >>> cache.prefill(q, k, v).shape, pool.free(k, v)
        (torch.Size([1, 20, 4, 16]), 6)
        >>> cache.release()
        >>> pool.free(k, v)
        8
    """

    def __init__(self, pages: int, page_size: int = 64) -> None:
        if pages < 1 or page_size < 1:
            raise ValueError(
                f"PagePool: pages and page_size must be positive, got {pages} and {page_size}"
            )
        self.pages, self.page_size = pages, page_size
        self._kinds: dict[object, _Pages] = {}

    def of(self, k: Tensor, v: Tensor, bits: int = 0) -> _Pages:
        """Pages for heads like those of ``k [B, T, Hkv, K]`` and ``v [B, T, Hkv, V]``, in codes of
        so many bits, or 0."""
        kind = (k.shape[2:], v.shape[3], k.dtype, k.device, bits)
        if kind not in self._kinds:

            def pages(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                shape = self.pages, self.page_size
                return k.new_zeros(*shape, *k.shape[2:]), v.new_zeros(*shape, *v.shape[2:])

            free = [*range(self.pages)][::-1]
            if bits:
                (k, k_affine), (v, v_affine) = (quantize(x[:, :0], bits) for x in (k, v))
                self._kinds[kind] = _Pages(*pages(k, v), free, pages(k_affine, v_affine))
            else:
                self._kinds[kind] = _Pages(*pages(k, v), free)
        return self._kinds[kind]

    def free(self, k: Tensor, v: Tensor, bits: int = 0) -> int:
        """Pages that are left for such heads."""
        return len(self.of(k, v, bits).free)


class PagedKVCache(KVCache):
    """A :class:`KVCache` in a pool's pages: a policy's tokens are read where they lie.

    Policies that read pages (:class:`Quest`, :class:`LServe`, :class:`ReSA`), the first and last
    tokens (:class:`StreamingLLM`, which gives pages in between back) or everything attend by page
    table; the others work too, over a copy of what is kept.

    Args:
        pool: where pages come from; its page size needs not be a policy's.
        policy, scale, rotary: as in :class:`KVCache`. Keys lie in their pages turned.
        bits: 8 or 4: pages hold codes (:func:`quantize`), which attention reads where they are;
            without ``rotary``, so that no key is rounded twice. On CUDA K and V are multiples of 16
            then. 0: numbers.

    Raises:
        RuntimeError: the pool has too few pages left.
        ValueError: other bits, bits with ``rotary``, or rows of an odd number of bytes.

    Example: :class:`PagePool`.
    """

    _FARTHEST = 1 << 15
    dtype: torch.dtype

    def __init__(
        self,
        pool: PagePool,
        policy: Policy | None = None,
        scale: float | None = None,
        rotary: RotaryEmbedding | None = None,
        bits: int = 0,
    ) -> None:
        super().__init__(policy, scale, rotary)
        if bits not in (0, 8, 4) or (bits and rotary is not None):
            raise ValueError(
                "PagedKVCache: bits must be 8 or 4, for keys with their positions, or 0, got "
                f"{bits}{'' if rotary is None else ' and a rotary'}"
            )
        self.pool, self.bits = pool, bits
        self.length = 0
        self.pages: _Pages | None = None
        self.table = torch.empty(0, 0, dtype=torch.int32)  # [B, pages], in order
        # Keys from place `front` on are turned as if `gap` tokens, in pages that were given back,
        # stood before them. `ends`: first and last tokens that are wanted, if not all.
        self.front = self.gap = 0
        self.ends: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.length

    def part(self, policy: Policy | None) -> PagedKVCache:
        return PagedKVCache(self.pool, policy, self.scale, self.rotary, self.bits)

    def store(self, k: Tensor, v: Tensor) -> None:
        if self.pages is None:
            if self.bits and any(x.shape[3] * self.bits % 16 for x in (k, v)):
                raise ValueError(
                    f"PagedKVCache: rows of codes must have an even number of bytes, got K = "
                    f"{k.shape[3]}, V = {v.shape[3]} of {self.bits} bits"
                )
            self.pages = self.pool.of(k, v, self.bits)
            self.table = torch.empty(k.shape[0], 0, dtype=torch.int32, device=k.device)
        self.dtype = k.dtype
        k = self._turned(k, self.length + self.gap)
        if not self.bits:
            return self._put([(k, v)])
        self._put([*zip(*(quantize(x, self.bits) for x in (k, v)), strict=True)])

    def _put(self, rows: list[tuple[Tensor, Tensor]]) -> None:
        """At the end, rows as :meth:`_Pages.pairs` has them."""
        assert self.pages is not None
        new = rows[0][0].shape[1]
        B, have = self.table.shape
        more = -(-(self.length + new) // self.pool.page_size) - have
        if more > 0:
            free = self.pages.free
            if B * more > len(free):
                raise RuntimeError(
                    f"PagedKVCache: needs {B * more} more pages, the pool has {len(free)} of "
                    f"{self.pool.pages} left; release caches that are done"
                )
            taken = torch.tensor([free.pop() for _ in range(B * more)], dtype=torch.int32)
            self.table = torch.cat([self.table, taken.view(B, more).to(self.table.device)], 1)
        for pages, pair in zip(self.pages.pairs(), rows, strict=True):
            # which are copied as they are, codes by two bytes
            keys, values, k, v = (
                x.view(torch.float16) if x.dtype == torch.uint8 else x for x in (*pages, *pair)
            )
            kv_cache_update(keys, values, k, v, self._lengths(self.length), self.table)
        self.length += new

    def _turned(self, x: Tensor, start: int) -> Tensor:
        """Places from ``start`` on, without the table that a stream of tokens would outgrow."""
        if self.rotary is None:
            return x
        return self.rotary(x, torch.arange(start, start + x.shape[1], device=x.device))  # type: ignore[no-any-return]

    def _lengths(self, length: int) -> Tensor:
        B = self.table.shape[0]
        return torch.full((B,), length, dtype=torch.int32, device=self.table.device)

    def release(self) -> None:
        self._clear()
        self.released = True
        self.policy.release()

    def _clear(self) -> None:
        self._drop(0, self.table.shape[1])
        self.length = self.front = self.gap = 0

    def _drop(self, first: int, last: int) -> None:
        """Give pages [first, last) of every sequence back."""
        if self.pages is None or first >= last:
            return
        self.pages.free += self.table[:, first:last].flatten().tolist()
        self.table = torch.cat([self.table[:, :first], self.table[:, last:]], 1)

    def raw(self) -> tuple[Tensor, Tensor]:
        """A copy of the kept keys and values, ``[B, S, Hkv, ·]``."""
        k, v = self._copied()
        place = torch.arange(self.length, device=k.device)
        return self._turned_back(k, torch.where(place < self.front, place, place + self.gap)), v

    def kept(self) -> tuple[Tensor, Tensor]:
        k, v = self._copied()
        if not self.gap:
            return k, v
        place = torch.arange(self.length, device=k.device)
        return self._turned_back(k, torch.where(place < self.front, 0, self.gap)), v

    def _copied(self) -> tuple[Tensor, Tensor]:
        """As they lie in their pages; codes as the numbers they stand for."""
        (k, v), *affine = self._rows()
        return self._number(k, v, affine)

    def _rows(self) -> list[tuple[Tensor, Tensor]]:
        assert self.pages is not None
        at = self.table.long()
        return [
            (k[at].flatten(1, 2)[:, : self.length], v[at].flatten(1, 2)[:, : self.length])
            for k, v in self.pages.pairs()
        ]

    def _number(
        self, k: Tensor, v: Tensor, affine: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        if not affine:
            return k, v
        both = zip((k, v), affine[0], strict=True)
        k, v = (numbers(x, a, self.bits, self.dtype) for x, a in both)
        return k, v

    def _turned_back(self, k: Tensor, positions: Tensor) -> Tensor:
        return k if self.rotary is None else self.rotary(k, -positions)

    def newest(self) -> Tensor:
        assert self.pages is not None
        page, place = divmod(self.length - 1, self.pool.page_size)
        at = self.table[:, page].long()
        (k, v), *affine = ((k[at, place], v[at, place]) for k, v in self.pages.pairs())
        k, _ = self._number(k, v, affine)
        if not self.gap:
            return k
        return self._turned_back(k[:, None], self.table.new_full((1,), self.gap))[:, 0]

    def replace(self, k: Tensor, v: Tensor) -> None:
        self.length -= k.shape[1]
        self.store(k, v)

    def keep(self, index: Tensor) -> None:
        if not self.bits:
            k, v = self.taken(index)
            self._clear()
            return self.store(k, v)
        rows = [(select_tokens(k, index), select_tokens(v, index)) for k, v in self._rows()]
        self._clear()
        self._put(rows)

    def keep_ends(self, first: int, last: int) -> None:
        """Pages that hold none of the ``first`` and ``last`` tokens are given back."""
        size = self.pool.page_size
        begin, end = -(-first // size), (self.length - last) // size
        self.ends = first, last
        if end > begin:
            self._drop(begin, end)
            self.length -= (end - begin) * size
            if self.rotary is not None:
                self.front, self.gap = begin * size, self.gap + (end - begin) * size
        if self.gap > self._FARTHEST:  # angles of large positions are not exact
            self.keep(torch.arange(self.length, device=self.table.device))

    def read(self, q: Tensor, mask: AttnMask | None = None) -> Tensor:
        first, last = self.ends or (0, self.length)
        if self.rotary is None or not (self.gap or self.length > first + last):
            return self._decode(q, None, mask, self.table, self.length)[0]
        # The last tokens stand right behind the first ones, though not in the pages: the query is
        # turned to its place beside each.
        assert self.unturned is not None
        far = self._turned(self.unturned, self.length - 1 + self.gap)
        window = AttnMask(causal=True, left=last - 1)
        size, rest = self.pool.page_size, self.length - self.front
        parts = [self._decode(far, None, window, self.table[:, self.front // size :], rest)]
        if first:
            near = self._turned(self.unturned, first + last - 1)
            parts.append(self._decode(near, None, None, self.table[:, : -(-first // size)], first))
        return merge(*parts)[0]

    def read_pages(self, q: Tensor, pages: Tensor, page_size: int) -> Tensor:
        if self.gap:
            return super().read_pages(q, pages, page_size)
        lists = BlockLists.from_indices(pages[:, :, None], 1, self.length, 1, page_size)
        return self._decode(q, lists, None, self.table, self.length)[0]

    def _decode(
        self,
        q: Tensor,
        lists: BlockLists | None,
        mask: AttnMask | None,
        table: Tensor,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        assert self.pages is not None
        o, lse = sparse_attn_decode(
            q, self.pages.keys, self.pages.values, self._lengths(length), table, lists, mask,
            self.scale, return_lse=True, affine=self.pages.affine,
        )  # fmt: skip
        return o, lse
