"""Windows of keys as one key each, and where the windows of packed sequences begin."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_device_like, check_no_forward_ad, check_rank, no_double_backward

__all__ = ["block_pool", "row_boundaries"]

_POOLS = ("mean", "max", "min", "bounds")


def ceil_div(n: int, unit: int) -> int:
    return -(-n // unit)


def row_boundaries(
    cu_seqlens: Tensor, length: int, stride: int | None = None, partial: bool = True
) -> Tensor:
    """Where the windows of each packed sequence begin: ``[N + 1]`` int32, on its device.

    Args:
        cu_seqlens (Tensor): ``[N + 1]`` boundaries of the sequences' tokens.
        length, stride, partial: as in :func:`block_pool`.

    Example:
        >>> row_boundaries(torch.tensor([0, 100, 130]), 64)
        tensor([0, 2, 3], dtype=torch.int32)
    """
    stride = length if stride is None else stride
    tokens = cu_seqlens.diff()
    counts = tokens + stride - 1 if partial else (tokens - length + stride).clamp(min=0)
    ends = (counts // stride).cumsum(0)
    return torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)


def _windows(x: Tensor, length: int, stride: int, partial: bool) -> int:
    T = x.shape[1]
    return ceil_div(T, stride) if partial else max(0, (T - length) // stride + 1)


@torch.library.register_fake("lsm::block_pool")
def _pool_fake(x, cu_seqlens, cu_blocks, lengths, length, stride, pool, partial):  # type: ignore[no-untyped-def]
    named = {"cu_seqlens": cu_seqlens, "cu_blocks": cu_blocks, "lengths": lengths}
    check_device_like("block_pool", "x", x, named)
    B, T, H, K = x.shape
    blocks = _windows(x, length, stride, partial)
    if cu_seqlens is not None:
        blocks = T // stride + cu_seqlens.shape[0] - 1
    return x.new_empty(B, blocks, H, 2 * K if pool == 3 else K)


def _pool_setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, *boundaries, length, stride, pool, partial = inputs
    ctx.save_for_backward(x, *boundaries, output)
    ctx.rule = (length, stride, pool, partial)


def _pool_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, *boundaries, y = ctx.saved_tensors
    dx = torch.ops.lsm.block_pool_bwd(x, *boundaries, *ctx.rule, y, grad)
    return dx, *(None,) * 7


@torch.library.register_fake("lsm::block_pool_bwd")
def _pool_bwd_fake(x, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("block_pool_bwd"))


torch.library.register_autograd(
    "lsm::block_pool", _pool_backward, setup_context=_pool_setup_context
)
torch.library.register_autograd("lsm::block_pool_bwd", _refuse_double_backward)


def block_pool(
    x: Tensor,
    length: int,
    stride: int | None = None,
    pool: str = "mean",
    partial: bool = True,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""Pools windows of tokens: one key for each block (MoBA, SeerAttention), for overlapping
    windows (NSA: 32 tokens, 16 apart), or a page's bounds (Quest).

    Row i of a sequence pools its tokens ``[i · stride, i · stride + length)``.

    Args:
        x (Tensor): keys or queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        length (int): tokens of a window.
        stride (int, optional): default: length.
        pool (str): ``mean``, ``max``, ``min``, or ``bounds``: the maximum's K columns, then the
            minimum's.
        partial (bool): windows that end behind the sequence pool what is there; else there are
            none.
        lengths (Tensor, optional): ``[B]`` int32, tokens of each row that count; rows of the result
            behind their windows are 0.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of sequences packed into one row (then
            B = 1). The windows of sequence n then begin at row ``row_boundaries(cu_seqlens, length,
            stride, partial)[n]``, and T // stride + N rows have room for all; the others are 0.

    Returns:
        ``[B, blocks, H, K]``, for bounds ``[B, blocks, H, 2 K]``, in the dtype of x.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.
        ValueError: another pool.

    Note: differentiable once in x; a maximum's gradient is shared among the tokens that reach it.

    Source: MoBA, arXiv:2502.13189; NSA, arXiv:2502.11089; Quest, arXiv:2406.10774.

    Example:
        >>> block_pool(torch.arange(5.0).view(1, 5, 1, 1), 2).flatten()
        tensor([0.5000, 2.5000, 4.0000])
    """
    if pool not in _POOLS:
        raise ValueError(f"block_pool: pool must be one of {', '.join(_POOLS)}, got {pool!r}")
    check_rank("block_pool", "x", x, "[B, T, H, K]")
    check_no_forward_ad("block_pool", x=x)
    stride = length if stride is None else stride
    cu_blocks = None
    if cu_seqlens is not None:
        cu_blocks = row_boundaries(cu_seqlens, length, stride, partial)
    return torch.ops.lsm.block_pool(  # type: ignore[no-any-return]
        x, cu_seqlens, cu_blocks, lengths, length, stride, _POOLS.index(pool), partial
    )
