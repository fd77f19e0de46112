"""Orders in which a scan walks the patches of an image, as index tables for :func:`scan`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["scan_order"]

_KINDS = ("row", "column", "zigzag", "hilbert")


def _hilbert(height: int, width: int) -> Tensor:
    """Cells by their distance along the Hilbert curve of the square that holds the image."""
    side = 1
    while side < max(height, width):
        side *= 2
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width),
                                                indexing="ij"))  # fmt: skip
    distance = torch.zeros_like(x)
    s = side // 2
    while s > 0:
        right, up = (x & s) > 0, (y & s) > 0
        distance += s * s * ((3 * right.long()) ^ up.long())
        x, y = torch.where(~up & right, side - 1 - x, x), torch.where(~up & right, side - 1 - y, y)
        x, y = torch.where(up, x, y), torch.where(up, y, x)
        s //= 2
    return distance.argsort()


def scan_order(height: int, width: int, kind: str, reverse: bool = False) -> Tensor:
    r"""The token of every position of a walk over an image whose tokens lie row by row.

    Args:
        height, width (int): of the image, in tokens.
        kind (str): ``row`` (as in memory), ``column``, ``zigzag`` (rows there and back, so that
            neighbours stay neighbours) or ``hilbert`` (the curve through the smallest square of a
            power of two; cells outside the image are left out).
        reverse (bool): from the last position to the first. ``scan(..., reverse=True)`` does the
            same without another table.

    Returns:
        int32 ``[height · width]``, a permutation, for the argument ``order`` of :func:`scan`.

    Raises:
        ValueError: another kind, or an image without tokens.

    Source: the scans of VMamba, arXiv:2401.10166 (rows and columns), ZigMa, arXiv:2403.13802
        (zig-zag), and Hilbert curves.

    Example:
        >>> scan_order(2, 3, "column").tolist()
        [0, 3, 1, 4, 2, 5]
        >>> from lsm_cuda.ops import scan
        >>> x, a = torch.randn(2, 1, 6, 8)
        >>> h, _ = scan(x, a.sigmoid(), order=scan_order(2, 3, "zigzag"))
    """
    if kind not in _KINDS:
        raise ValueError(f"lsm::scan_order: kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if height < 1 or width < 1:
        raise ValueError(f"lsm::scan_order: the image must have tokens, got {height} x {width}")
    cells = torch.arange(height * width).view(height, width)
    if kind == "column":
        cells = cells.T
    elif kind == "zigzag":
        cells = torch.where(torch.arange(height)[:, None] % 2 == 1, cells.flip(1), cells)
    order = _hilbert(height, width) if kind == "hilbert" else cells.flatten()
    return (order.flip(0) if reverse else order).int()
