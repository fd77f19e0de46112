"""Prefix-scannable models: states of all prefixes by a tree, or one by one with a binary counter,
with the same bracketing and so the same result even where the aggregation is not associative."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["PrefixScanState", "prefix_scan"]

Element: TypeAlias = tuple[Tensor, ...]
Agg: TypeAlias = Callable[[Element, Element], Element]


class PrefixScanState:
    """The roots of a prefix of n elements, one for each bit of n that is set: O(log n) of them.

    Pushing an element is counting: equal trees merge, the older on the left. What
    :func:`prefix_scan` returns continues here.

    Example:
        >>> agg = lambda older, newer: (older[0] + newer[0],)
        >>> state = PrefixScanState()
        >>> for x in torch.arange(5.0):
        ...     state.push(agg, (x,))
        >>> state.count, len(state.roots), state.prefix(agg, (torch.zeros(()),))
        (5, 2, (tensor(10.),))
    """

    def __init__(self, count: int = 0, roots: tuple[Element, ...] = ()) -> None:
        if len(roots) != count.bit_count():
            raise ValueError(
                f"PrefixScanState: {count} elements have {count.bit_count()} roots, "
                f"got {len(roots)}"
            )
        self.count = count
        self.roots = list(roots)  # of the largest tree, which is the oldest, first

    def push(self, agg: Agg, element: Element) -> None:
        """One more element; as many aggregations as the count has ones at its end."""
        ones = (self.count ^ (self.count + 1)).bit_length() - 1
        for _ in range(ones):
            element = agg(self.roots.pop(), element)
        self.roots.append(element)
        self.count += 1

    def prefix(self, agg: Agg, initial: Element) -> Element:
        """The aggregate of all elements so far: ``initial``, then the roots from old to new."""
        for root in self.roots:
            initial = agg(initial, root)
        return initial


def prefix_scan(agg: Agg, elements: Element, initial: Element) -> tuple[Element, PrefixScanState]:
    r"""The aggregates of all proper prefixes: before the first element, before the second, ...

    Element n sees ``initial`` and the elements 0 .. n−1, bracketed as by Blelloch's scan: every
    aligned block of ``2^ℓ`` elements is one tree, and a prefix runs over the trees of n's binary
    digits, the largest first. :class:`PrefixScanState` brackets alike, so decoding one element
    at a time computes the same, for any ``agg``.

    Args:
        agg (Callable): ``agg(older, newer)`` of two elements, over any leading dimensions. Affine
            maps ``(a₁, x₁), (a₂, x₂) → (a₂ a₁, a₂ x₁ + x₂)`` give the states of every gated
            recurrence; it may be a network.
        elements (tuple of Tensor): ``[B, N, ...]`` each, e.g. the encodings of chunks.
        initial (tuple of Tensor): ``[B, ...]`` each, what a prefix starts from; with agg's
            identity it changes nothing.

    Returns:
        The prefixes, ``[B, N, ...]`` each, and the state after the last element.

    Raises:
        ValueError: elements of different lengths.

    Note: about 2 N aggregations in ``2 log₂ N`` calls, each over a whole level of the tree; plain
        PyTorch, differentiable as often as agg is.

    Source: Sequential-Parallel Duality in Prefix Scannable Models, arXiv:2506.10918.

    Example:
        >>> x = (torch.randn(2, 10, 16),)
        >>> prefixes, state = prefix_scan(lambda a, b: (torch.tanh(a[0] + b[0]),), x,
        ...                               (torch.zeros(2, 16),))
        >>> prefixes[0].shape, state.count
        (torch.Size([2, 10, 16]), 10)
    """
    lengths = {x.shape[1] for x in elements}
    if len(lengths) != 1:
        raise ValueError(f"prefix_scan: elements must have one length, got {sorted(lengths)}")
    (N,) = lengths
    levels = [elements]  # complete trees of 2^ℓ elements
    while levels[-1][0].shape[1] > 1:
        below = levels[-1]
        pairs = below[0].shape[1] // 2
        left, right = (_every_second(below, first, pairs) for first in (0, 1))
        levels.append(agg(left, right))
    roots = tuple(
        tuple(x[:, (N >> level) - 1] for x in levels[level])
        for level in reversed(range(N.bit_length()))
        if N >> level & 1
    )
    # Down: a tree's left half starts from what the tree starts from, its right half from that and
    # the left half. Also of the last tree of a level, which may be incomplete.
    prefixes = tuple(x[:, None] for x in initial)
    for level in reversed(range(N.bit_length() if N > 1 else 0)):
        trees = -(-N >> level)
        if trees == prefixes[0].shape[1]:
            continue
        halves = trees // 2
        lefts = _every_second(levels[level], 0, halves)
        rights = agg(tuple(p[:, :halves] for p in prefixes), lefts)
        prefixes = tuple(_interleave(p, r, trees) for p, r in zip(prefixes, rights, strict=True))
    if N == 0:
        prefixes = tuple(p[:, :0] for p in prefixes)
    return prefixes, PrefixScanState(N, roots)


def _every_second(x: Element, first: int, count: int) -> Element:
    return tuple(t[:, first : 2 * count : 2] for t in x)


def _interleave(left: Tensor, right: Tensor, count: int) -> Tensor:
    """``left[0], right[0], left[1], ...``, count in all."""
    both = torch.stack([left[:, : right.shape[1]], right], 2).flatten(1, 2)
    return torch.cat([both, left[:, right.shape[1] :]], 1)[:, :count]
