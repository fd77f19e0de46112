"""Attention with bounded memory: slots that hold running means of keys and values."""

from __future__ import annotations

from torch import Tensor

from ._common import check_in_place, check_no_gradient
from ._running import running_softmax_step
from .gsa import between, check_slots, running_means, two_passes_step

__all__ = ["abc_step", "chunk_abc"]


def chunk_abc(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    r"""Attention with bounded-memory control over whole sequences.

    Slot ``m`` holds the means ``Kᵗ_m, Vᵗ_m`` of all keys and values so far, weighted by
    ``exp s_m``;   ``o_t = Vᵗᵀ softmax(scale · Kᵗ q_t)``.

    Args:
        q (Tensor): queries ``[B, T, HQ, K]``, bf16, fp16 or fp32 (fp64 too on CPU); HQ is a
            multiple of H, and query head ``h`` reads the slots of head ``h // (HQ // H)``.
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, H, V]``.
        s (Tensor): logarithm of the weights ``[B, T, H, M]``, natural log, of any size below
            2**30; ``-inf`` writes nothing.
        initial_state (tuple, optional): the slots' keys, transposed, ``[N, H, K, M]``, values
            ``[N, H, M, V]``, and z, the logarithm of the slots' total weight, ``[N, 1, H, M]``;
            fp32 (fp64 for fp64 inputs). FLA's state has no z, without which nothing continues
            where it ended.
        output_final_state (bool): also return the state after the last token.
        scale (float, optional): default ``K ** -0.5``.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``o [B, T, HQ, V]`` in the dtype of v, and the final state like initial_state, or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, a state without z, or K or M over
            256 on CUDA.

    Note: differentiable once in q, k, v, s and the state; deterministic. Beside the two passes of
        :func:`chunk_gsa` this costs a scan of the maximum of s, a scan of the slots' total weight
        (both ``[B, T, H, M]`` in fp32), and two more passes over the slots' scores. In decoding, z
        in fp32 stops growing once one more token changes it by less than its last bit.

    Source: ABC: Attention with Bounded-memory Control, arXiv:2110.02488.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> o, (hk, hv, z) = chunk_abc(q, k, v, torch.randn(1, 100, 2, 16), output_final_state=True)
        >>> o.shape, hk.shape, hv.shape, z.shape  # doctest: +NORMALIZE_WHITESPACE
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 16]), torch.Size([1, 2, 16, 32]),
         torch.Size([1, 1, 2, 16]))
    """
    return running_means(
        "chunk_abc", q, k, v, s, scale, initial_state, output_final_state, cu_seqlens,
        between("chunk_abc", "softmax"),
    )  # fmt: skip


def abc_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    scale: float | None = None,
) -> Tensor:
    r"""One token of attention with bounded memory; ``state`` is updated in place.

    Args:
        q (Tensor): ``[B, HQ, K]``, HQ a multiple of H.
        k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, H, V]``.
        s (Tensor): logarithm of the weights ``[B, H, M]``.
        state (tuple): the slots' keys, transposed, ``[B, H, K, M]``, values ``[B, H, M, V]`` and
            total log weight ``[B, 1, H, M]`` (``-inf`` before the first token), fp32 (fp64 for fp64
            inputs), contiguous, updated in place.
        scale (float, optional): default ``K ** -0.5``.

    Returns:
        ``o [B, HQ, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`chunk_abc` where gradients are needed.

    Example:
        >>> z = torch.full((1, 1, 2, 16), -torch.inf)
        >>> state = torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 16, 32), z
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> abc_step(q, k, v, torch.randn(1, 2, 16), state).shape
        torch.Size([1, 2, 32])
    """
    op = "abc_step"
    hk, hv, z = state
    check_no_gradient(op, "chunk_abc", q, k, v, s, *state)
    check_slots(op, q, k, v, s)
    check_in_place(op, "z", z, "[B, 1, H, M]", (s.shape[0], 1, *s.shape[1:]), q)
    weights, decay, total = running_softmax_step(s, z)
    softmax = between(op, "softmax")
    o = two_passes_step(op, "chunk_abc", q, k, v, weights, decay, (hk, hv), scale, softmax)
    z.copy_(total)
    return o
