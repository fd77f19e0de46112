"""A key/value cache of few bits a number."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import KVBuffer
from ..modules import RotaryEmbedding
from ..ops._common import accumulation_dtype
from ..ops.attn_mask import AttnMask
from ..ops.block_lists import BlockLists
from ..ops.kv_cache import sparse_attn_decode
from .kv_cache import KVCache, Policy, attend_taken, select_tokens, take_tokens, turn_taken

__all__ = ["QuantizedKVCache", "quantize"]


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Numbers of every vector ``[.., D]`` as the nearest of ``2 ** bits`` from its least to its
    largest.

    Args:
        x: ``[.., D]``.
        bits: 8 or 4; with 4 D is even, and a byte holds channels i and i + D / 2.

    Returns:
        Codes, uint8 ``[.., D]`` or ``[.., D / 2]``; step and least, ``[.., 2]``, at least fp32.

    Raises:
        ValueError: another number of bits, or an odd D.

    Source: QServe, arXiv:2405.04532, section 4 (KV4), as LServe has it.

    Example:
        >>> codes, affine = quantize(torch.tensor([0.0, 1.0, 3.0, 15.0]), 4)
        >>> codes.tolist(), affine.tolist()
        ([48, 241], [1.0, 0.0])
    """
    if bits not in (8, 4) or (bits == 4 and x.shape[-1] % 2):
        raise ValueError(
            f"quantize: bits must be 8, or 4 for an even D, got {bits} and D = {x.shape[-1]}"
        )
    x = x.to(accumulation_dtype(x))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((x - low) / torch.where(step > 0, step, 1)).round().to(torch.uint8)
    if bits == 4:
        first, second = codes.chunk(2, -1)
        codes = first | second << 4
    return codes, torch.cat([step, low], -1)


def numbers(codes: Tensor, affine: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """What :func:`quantize` was given, to half a step."""
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    step, low = affine[..., :1], affine[..., 1:]
    return torch.addcmul(low, codes.to(affine.dtype), step).to(dtype)


class QuantizedKVCache(KVCache):
    """A :class:`KVCache` that keeps keys and values in 8 or 4 bits, a scale and an offset for every
    token and head of them; the prompt's own attention is exact.

    Policies are those of any cache. Attention over everything, and over pages (Quest, LServe),
    reads the codes where they are, unless there is a ``rotary``, or on CUDA sizes that are no
    multiple of 16: then, and for single tokens (DoubleSparsity, ...), numbers are made of what is
    read, step by step.

    Args:
        policy, scale, rotary: as in :class:`KVCache`. Keys are kept without positions.
        bits: 8 or 4; 4 needs even K and V.

    Source: LServe, arXiv:2502.14866; QServe, arXiv:2405.04532.

    Example:
        >>> from lsm_cuda.sparse import Quest
        >>> cache = QuantizedKVCache(Quest(budget=32, page_size=16), bits=8)
        >>> q, k, v = torch.randn(1, 20, 4, 16), *torch.randn(2, 1, 20, 2, 16)
        >>> cache.prefill(q, k, v).shape, cache.bytes()
        (torch.Size([1, 20, 4, 16]), 1920)
    """

    affine: KVBuffer  # of keys and of values, [B, S, Hkv, 2]
    dtype: torch.dtype
    _columns: tuple[int, int]  # K and V

    def __init__(
        self,
        policy: Policy | None = None,
        scale: float | None = None,
        rotary: RotaryEmbedding | None = None,
        bits: int = 8,
    ) -> None:
        super().__init__(policy, scale, rotary)
        if bits not in (8, 4):
            raise ValueError(f"QuantizedKVCache: bits must be 8 or 4, got {bits}")
        self.bits = bits

    def part(self, policy: Policy | None) -> QuantizedKVCache:
        return QuantizedKVCache(policy, self.scale, self.rotary, self.bits)

    def bytes(self) -> int:
        """Of what is kept."""
        both = () if self.buffer is None else (self.buffer, self.affine)
        rows = [x[:, : b.length] for b in both for x in (b.keys, b.values)]
        return sum(x.numel() * x.element_size() for x in rows)

    def store(self, k: Tensor, v: Tensor) -> None:
        self.dtype, self._columns = k.dtype, (k.shape[3], v.shape[3])
        codes, affine = zip(*(quantize(x, self.bits) for x in (k, v)), strict=True)
        if self.buffer is None:
            self.buffer, self.affine = KVBuffer.start(*codes), KVBuffer.start(*affine)
        else:
            self.buffer.append(*codes)
            self.affine.append(*affine)

    def _kept(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Codes and affine numbers of keys, and of values."""
        assert self.buffer is not None
        codes, affine = self.buffer, self.affine
        n = codes.length
        return (
            (codes.keys[:, :n], affine.keys[:, :n]),
            (codes.values[:, :n], affine.values[:, :n]),
        )

    def raw(self) -> tuple[Tensor, Tensor]:
        k, v = (numbers(*x, self.bits, self.dtype) for x in self._kept())
        return k, v

    def newest(self) -> Tensor:
        codes, affine = self._kept()[0]
        k = numbers(codes[:, -1:], affine[:, -1:], self.bits, self.dtype)
        return (k if self.rotary is None else self.rotary(k, len(self) - 1))[:, 0]

    def replace(self, k: Tensor, v: Tensor) -> None:
        assert self.buffer is not None
        self.buffer.length -= k.shape[1]
        self.affine.length -= k.shape[1]
        self.store(k, v)

    def keep(self, index: Tensor) -> None:
        rows = (tuple(select_tokens(x, index) for x in pair) for pair in self._kept())
        codes, affine = zip(*rows, strict=True)
        self.buffer, self.affine = KVBuffer.start(*codes), KVBuffer.start(*affine)

    def _reads_codes(self, q: Tensor) -> bool:
        K, V = self._columns
        return self.rotary is None and not (q.is_cuda and (K % 16 or V % 16))

    def _attend(self, q: Tensor, lists: BlockLists | None, mask: AttnMask | None) -> Tensor:
        (k, k_affine), (v, v_affine) = self._kept()
        o = sparse_attn_decode(
            q, k, v, None, None, lists, AttnMask() if mask is None else mask, self.scale,
            affine=(k_affine, v_affine),
        )  # fmt: skip
        assert isinstance(o, Tensor)
        return o

    def read(self, q: Tensor, mask: AttnMask | None = None) -> Tensor:
        return self._attend(q, None, mask) if self._reads_codes(q) else super().read(q, mask)

    def read_tokens(self, q: Tensor, index: Tensor, log_weight: Tensor | None = None) -> Tensor:
        k, v = (
            numbers(take_tokens(codes, index), take_tokens(affine, index), self.bits, self.dtype)
            for codes, affine in self._kept()
        )
        if self.rotary is not None:
            k = turn_taken(self.rotary, k, index)
        return attend_taken(q, k, v, index, self.scale, log_weight)[0]

    def read_pages(self, q: Tensor, pages: Tensor, page_size: int) -> Tensor:
        lists = BlockLists.from_indices(pages[:, :, None], 1, len(self), 1, page_size)
        if self._reads_codes(q):
            return self._attend(q, lists, None)
        pages = lists.index[:, :, 0]
        token = pages[..., None] * page_size + torch.arange(page_size, device=q.device)
        there = (pages[..., None] >= 0) & (token < len(self))
        return self.read_tokens(q, torch.where(there, token, -1).flatten(2))
