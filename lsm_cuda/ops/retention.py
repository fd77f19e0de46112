"""A constant decay per head: retention and lightning attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .simple_gla import (
    chunk_simple_gla,
    decay_of,
    fused_recurrent_simple_gla,
    parallel_simple_gla,
    simple_gla_step,
)

__all__ = [
    "chunk_lightning_attn",
    "chunk_retention",
    "fused_chunk_retention",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_retention",
    "lightning_attn_step",
    "lightning_slopes",
    "minimax_slopes",
    "parallel_retention",
    "retention_log_decay",
    "retention_step",
]


def retention_log_decay(num_heads: int, device: torch.device | None = None) -> Tensor:
    """``log(1 − 2^{−5−h})`` of head h, ``[num_heads]`` fp64.

    Source: RetNet, arXiv:2307.08621, equation 8.
    """
    heads = torch.arange(num_heads, dtype=torch.float64, device=device)
    return torch.log1p(-torch.exp2(-5.0 - heads))


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Retention over whole sequences: ``S_t = γ_h S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ
    q_t``, ``γ_h = 1 − 2^{−5−h}``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, rotated already where the model rotates; bf16, fp16
            or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; h counts the HV value heads.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs).
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Source: RetNet, arXiv:2307.08621.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> chunk_retention(q, k, v)[0].shape
        torch.Size([1, 100, 2, 32])
    """
    decay = retention_log_decay(v.shape[2], v.device)
    return chunk_simple_gla(
        q, k, v, None, decay, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """FLA's second name for :func:`chunk_retention`."""
    return chunk_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_retention` under FLA's recurrent name; ``reverse`` and ``state_v_first`` as in
    :func:`fused_recurrent_simple_gla`."""
    decay = retention_log_decay(v.shape[2], v.device)
    return fused_recurrent_simple_gla(
        q, k, v, None, decay, scale, initial_state, output_final_state, reverse, state_v_first,
        cu_seqlens,
    )  # fmt: skip


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_retention` under FLA's quadratic name, as :func:`parallel_simple_gla`."""
    decay = retention_log_decay(v.shape[2], v.device)
    g = decay_of("parallel_retention", q, v, None, decay)
    return parallel_simple_gla(q, k, v, g, scale, output_attentions, cu_seqlens)


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, scale: float | None = None
) -> Tensor:
    """One token of :func:`chunk_retention`; arguments and in-place ``state`` as in
    :func:`simple_gla_step`."""
    decay = retention_log_decay(v.shape[1], v.device)
    g = decay_of("retention_step", q, v, None, decay)
    return simple_gla_step(q, k, v, g, state, scale)


def lightning_slopes(
    num_heads: int, layer_idx: int, num_layers: int, device: torch.device | None = None
) -> Tensor:
    """``8/H · (1 − layer_idx / num_layers) · h`` of head h, ``[num_heads]`` fp64: the first head
    never forgets.

    Source: TransNormerLLM, arXiv:2307.14995, with h from 0 as FLA counts it.
    """
    heads = torch.arange(num_heads, dtype=torch.float64, device=device)
    return 8 / num_heads * (1 - layer_idx / num_layers) * heads


def minimax_slopes(
    num_heads: int, layer_idx: int, num_layers: int, device: torch.device | None = None
) -> Tensor:
    """``2^{−8(h+1)/H} · (1 − layer_idx / (num_layers − 1 + 1e-5) + 1e-5)`` of head h,
    ``[num_heads]`` fp64; MiniMax does not scale its queries (``scale=1``).

    Source: MiniMax-01, arXiv:2501.08313, and its released model.
    """
    heads = torch.arange(num_heads, dtype=torch.float64, device=device)
    layer = 1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5
    return torch.exp2(-8 * (heads + 1) / num_heads) * layer


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int | None = None,
    num_layers: int | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Lightning attention over whole sequences: ``S_t = e^{−s_h} S_{t-1} + k_t v_tᵀ``, ``o_t =
    scale · S_tᵀ q_t``.

    Args:
        q, k, v, scale, initial_state, output_final_state, cu_seqlens: as in
            :func:`chunk_retention`.
        layer_idx, num_layers (int, optional): of :func:`lightning_slopes`.
        slopes (Tensor, optional): ``s [HV]``, ≥ 0, instead of those, such as
            :func:`minimax_slopes`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        ValueError: neither or both of slopes and the two layer numbers.

    Source: Lightning Attention-2, arXiv:2401.04658.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 4, 32) for _ in range(3))
        >>> o, _ = chunk_lightning_attn(q, k, v, layer_idx=1, num_layers=12)
        >>> p, _ = chunk_lightning_attn(q, k, v, slopes=minimax_slopes(4, 1, 12), scale=1.0)
    """
    decay = _lightning_decay("chunk_lightning_attn", v, layer_idx, num_layers, slopes)
    return chunk_simple_gla(
        q, k, v, None, decay, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int | None = None,
    num_layers: int | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_lightning_attn` under FLA's recurrent name; ``reverse`` as in
    :func:`fused_recurrent_simple_gla`."""
    decay = _lightning_decay("fused_recurrent_lightning_attn", v, layer_idx, num_layers, slopes)
    return fused_recurrent_simple_gla(
        q, k, v, None, decay, scale, initial_state, output_final_state, reverse,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def lightning_attn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    layer_idx: int | None = None,
    num_layers: int | None = None,
    scale: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """One token of :func:`chunk_lightning_attn`; tensors and in-place ``state`` as in
    :func:`simple_gla_step`."""
    op = "lightning_attn_step"
    decay = _lightning_decay(op, v, layer_idx, num_layers, slopes)
    return simple_gla_step(q, k, v, decay_of(op, q, v, None, decay), state, scale)


def _lightning_decay(
    op: str, v: Tensor, layer_idx: int | None, num_layers: int | None, slopes: Tensor | None
) -> Tensor:
    if slopes is not None and layer_idx is None and num_layers is None:
        return -slopes
    if slopes is None and layer_idx is not None and num_layers is not None:
        return -lightning_slopes(v.shape[-2], layer_idx, num_layers, v.device)
    raise ValueError(
        f"lsm::{op}: pass layer_idx and num_layers, or slopes, got layer_idx = {layer_idx}, "
        f"num_layers = {num_layers} and slopes {'absent' if slopes is None else 'too'}"
    )
