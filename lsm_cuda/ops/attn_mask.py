"""Which keys a query may see, from positions alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AttnMask"]


@dataclass(frozen=True, eq=False)
class AttnMask:
    """A rule of positions: causal, window, sinks, prefix, dilation; never a tensor of T × T.

    Positions count from the start of a sequence. Query t of Tq stands at ``p = t + offset``, or, if
    ``align_end``, at ``t + offset + Tk − Tq`` (the last query beside the last key, as in a cache);
    key j at ``x = j · key_stride + key_length − 1``. A query sees a key if all of this holds:

    - causal: ``x // causal_block <= p // causal_block``, or ``x < prefix``
    - window: ``p − left <= x <= p + right``, or ``x < sinks``
    - dilation: ``(p − x) % dilation == 0``, or ``x < sinks``

    Attributes:
        causal (bool): no key after the query.
        left, right (int): bounds of the window in tokens; below 0: none.
        sinks (int): first keys that every window and dilation leaves visible.
        prefix (int): first keys that causality leaves visible (prefix-LM).
        dilation (int): every so many-th key, counted from the query.
        causal_block (int): causality between blocks of so many tokens (block diffusion).
        align_end (bool): as above; without it the first query stands beside the first key.
        offset (int): added to the positions of queries.
        key_stride, key_length (int): for pooled keys: key j pools tokens ``[j · key_stride,
            j · key_stride + key_length)`` and stands at its last one. With ``align_end`` False.
        head_left (Tensor, optional): ``[Hq]`` int32, ``left`` of each query head, instead of it.

    Example:
        >>> AttnMask(causal=True, left=2, sinks=1).to_dense(5, 5).int()
        tensor([[1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [1, 1, 1, 1, 0],
                [1, 0, 1, 1, 1]], dtype=torch.int32)
    """

    causal: bool = False
    left: int = -1
    right: int = -1
    sinks: int = 0
    prefix: int = 0
    dilation: int = 1
    causal_block: int = 1
    align_end: bool = True
    offset: int = 0
    key_stride: int = 1
    key_length: int = 1
    head_left: Tensor | None = None

    def numbers(self) -> list[int]:
        """In the order of the operators' argument ``mask``."""
        return [
            int(self.causal), int(self.align_end), self.offset, self.key_stride, self.key_length,
            self.causal_block, self.prefix, self.left, self.right, self.sinks, self.dilation,
        ]  # fmt: skip

    def positions(
        self, Tq: int, Tk: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of Tq queries and of Tk keys."""
        shift = self.offset + (Tk - Tq if self.align_end else 0)
        keys = torch.arange(Tk, device=device) * self.key_stride + self.key_length - 1
        return torch.arange(Tq, device=device) + shift, keys

    def sees(self, p: Tensor, x: Tensor) -> Tensor:
        """Whether queries at ``p`` see keys at ``x``: bool ``[len(p), len(x)]``, with ``head_left``
        ``[Hq, len(p), len(x)]``."""
        p, sink = p[:, None], x < self.sinks
        seen = torch.ones(len(p), len(x), dtype=torch.bool, device=x.device)
        if self.causal:
            seen &= (x // self.causal_block <= p // self.causal_block) | (x < self.prefix)
        if self.right >= 0:
            seen &= (x <= p + self.right) | sink
        if self.dilation > 1:
            seen &= ((p - x) % self.dilation == 0) | sink
        if self.head_left is not None:
            left = self.head_left.to(x.device)[:, None, None]
            return seen & ((left < 0) | (x >= p - left) | sink)
        return seen & ((x >= p - self.left) | sink) if self.left >= 0 else seen

    def to_dense(self, Tq: int, Tk: int, device: torch.device | str | None = None) -> Tensor:
        """The mask of Tq queries and Tk keys, as :meth:`sees` returns it."""
        return self.sees(*self.positions(Tq, Tk, device))
