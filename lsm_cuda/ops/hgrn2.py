"""HGRN2 and MetaLA: gated linear attention whose key is what the gate lets in, 1 - decay."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _chunk
from ._common import accumulation_dtype, check_no_gradient, check_shape, one_minus_exp

__all__ = ["chunk_hgrn2", "chunk_metala", "hgrn2_step", "metala_step"]


def _input_gate(op: str, q: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """``1 - e^g`` in the dtype of q, exact where the decay is close to 1."""
    lead = "B" if q.dim() == 3 else "B, T"
    check_shape(op, "g", g, f"[{lead}, H, K]", q.shape)
    check_shape(op, "v", v, f"[{lead}, H, V]", (*q.shape[:-1], v.shape[-1]))
    return one_minus_exp(g.to(accumulation_dtype(g))).to(q.dtype)


def chunk_hgrn2(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""HGRN2 over whole sequences.

    ``S_t = Diag(a_t) S_{t-1} + (1 - a_t) v_tᵀ``,   ``a_t = exp g_t``,   ``o_t = scale · S_tᵀ q_t``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        v (Tensor): values ``[B, T, H, V]``.
        g (Tensor): log of the forget gate a ``[B, T, H, K]``, natural log, ≤ 0, in the dtype of q
            or (better: half precision knows no gate between 1 - 2⁻⁹ and 1) fp32.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (Tensor, optional): ``[N, H, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``o [B, T, H, V]`` in the dtype of v, and the final state ``[N, H, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in q, v, g and initial_state; deterministic. ``1 - a`` is written to
        memory once, in the dtype of q.

    Source: HGRN2: Gated Linear RNNs with State Expansion, arXiv:2404.07904.

    Example:
        >>> q, v, f = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> o, state = chunk_hgrn2(q, v, F.logsigmoid(f), output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    k = _input_gate("chunk_hgrn2", q, v, g)
    return _chunk.chunk("gla", q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)


def hgrn2_step(
    q: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float | None = None
) -> Tensor:
    r"""One token of HGRN2; ``state`` is updated in place.

    Args:
        q (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, H, V]``.
        g (Tensor): log of the forget gate ``[B, H, K]``, natural log.
        state (Tensor): ``[B, H, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.

    Returns:
        ``o [B, H, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`chunk_hgrn2` where gradients are needed.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, v = torch.randn(2, 1, 2, 32)
        >>> hgrn2_step(q, v, -torch.ones(1, 2, 32), state).shape
        torch.Size([1, 2, 32])
    """
    check_no_gradient("hgrn2_step", "chunk_hgrn2", q, v, g, state)
    k = _input_gate("hgrn2_step", q, v, g)
    return _chunk.step("gla", q, k, v, g, state, scale, "chunk_hgrn2")


def _augment(op: str, o: Tensor, q: Tensor, k: Tensor, v: Tensor, w_aug: Tensor) -> Tensor:
    """``o + σ((q · (w_aug ⊙ k)) v)``."""
    check_shape(op, "w_aug", w_aug, "[H, K]", q.shape[-2:])
    weight = torch.einsum("...hk,hk->...h", q * k, w_aug.to(q.dtype))
    return o + torch.sigmoid(weight.unsqueeze(-1).to(o.dtype) * v.to(o.dtype))


def chunk_metala(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    w_aug: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""MetaLA over whole sequences: :func:`chunk_hgrn2` with self-augmentation.

    ``o_t = scale · S_tᵀ q_t + σ((q_t · (w_aug ⊙ (1 - a_t))) v_t)``, the sigmoid element-wise.

    Args:
        q, v, g, scale, initial_state, output_final_state, cu_seqlens: as :func:`chunk_hgrn2`.
        w_aug (Tensor): weight of the token's own value, ``[H, K]``; it meets q unscaled.

    Returns:
        ``o [B, T, H, V]`` in the dtype of v, and the final state ``[N, H, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in q, v, g, w_aug and initial_state; deterministic. The augmentation
        runs outside the kernel and writes and reads one tensor of q's size and two of v's.

    Source: MetaLA: Unified Optimal Linear Approximation to Softmax Attention Map, arXiv:2411.10741;
    the sigmoid's place and the unscaled query are those of the authors' code.

    Example:
        >>> q, v, f = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> o, _ = chunk_metala(q, v, F.logsigmoid(f) / 16, torch.zeros(2, 32))
        >>> o.shape
        torch.Size([1, 100, 2, 32])
    """
    k = _input_gate("chunk_metala", q, v, g)
    o, state = _chunk.chunk("gla", q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    return _augment("chunk_metala", o, q, k, v, w_aug), state


def metala_step(
    q: Tensor,
    v: Tensor,
    g: Tensor,
    w_aug: Tensor,
    state: Tensor,
    scale: float | None = None,
) -> Tensor:
    """One token of MetaLA: :func:`hgrn2_step` with self-augmentation by ``w_aug [H, K]``.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> q, v = torch.randn(2, 1, 2, 32)
        >>> metala_step(q, v, -torch.ones(1, 2, 32), torch.zeros(2, 32), state).shape
        torch.Size([1, 2, 32])
    """
    check_no_gradient("metala_step", "chunk_metala", q, v, g, w_aug, state)
    k = _input_gate("metala_step", q, v, g)
    o = _chunk.step("gla", q, k, v, g, state, scale, "chunk_metala")
    return _augment("metala_step", o, q, k, v, w_aug)
