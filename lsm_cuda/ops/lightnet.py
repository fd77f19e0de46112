"""LightNet: gated linear attention whose keys are a softmax over the tokens so far."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _chunk
from ._common import (
    autocast,
    check_in_place,
    check_no_gradient,
    check_rank,
    check_shape,
    check_state,
)
from ._running import running_softmax, running_softmax_step

__all__ = ["chunk_lightnet", "fused_recurrent_lightnet", "lightnet_step"]

State = tuple[Tensor | None, Tensor | None]


def chunk_lightnet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor]]:
    r"""LightNet over whole sequences.

    ``S_t = Diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_tᵀ``,   ``o_t = scale · S_tᵀ q_t``
    with ``z_t = log Σ_{s≤t} exp k_s`` per channel.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): logits of the keys ``[B, T, H, K]``, in natural log, of any size below 2**30;
            ``-inf`` writes nothing.
        v (Tensor): values ``[B, T, H, V]``.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (tuple, optional): S ``[N, H, K, V]`` and z ``[N, 1, H, K]``, fp32 (fp64 for
            fp64 inputs). S needs its z; without S it is zero.
        output_final_state (bool): also return S after the last token.
        state_v_first (bool): S is ``[N, H, V, K]`` instead.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``o [B, T, H, V]`` in the dtype of v, and (S or None, z) after the last token.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, S without z, or K over 256 on
            CUDA.

    Note: differentiable once in q, k, v and the state; deterministic. The engine's state is the
        unnormalised sum, and q is divided by the normaliser, so that the decays have no gradient to
        compute. Beside the engine's own traffic this costs a scan of the maximum of k, a scan of
        the normaliser (both ``[B, T, H, K]`` in fp32), and one more pass over q. In decoding, z in
        fp32 stops growing once one more token changes it by less than its last bit.

    Source: You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet,
    arXiv:2405.21022.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> o, (S, z) = chunk_lightnet(q, k, v, output_final_state=True)
        >>> o.shape, S.shape, z.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]), torch.Size([1, 1, 2, 32]))
    """
    op = "chunk_lightnet"
    check_rank(op, "k", k, "[B, T, H, K]")
    check_shape(op, "q", q, "[B, T, H, K]", k.shape)
    check_shape(op, "v", v, "[B, T, H, V]", (*k.shape[:-1], v.shape[-1]))
    check_state(op, initial_state, "S", "z")
    S, z = (None, None) if initial_state is None else initial_state
    if z is not None:
        N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_shape(op, "z", z, "[N, 1, H, K]", (N, 1, *k.shape[2:]))
    elif S is not None:
        raise RuntimeError(f"lsm::{op}: initial_state must come with its z, got S alone")
    q, v = autocast(q, v)  # k are logits, and keep their dtype until they are weights
    half = q.dtype == torch.float16
    if half:  # the exact recurrence on every device, so that fp32 costs nothing but memory
        q, k, v = q.float(), k.float(), v.float()
    keys = running_softmax(k, z, cu_seqlens)
    if S is not None and keys.first is not None:
        S = S * keys.first.unsqueeze(-2 if state_v_first else -1)
    o, S = _chunk.chunk(
        "gla", (q / keys.total).to(q.dtype), keys.weights.to(q.dtype), v, keys.decay, scale, S,
        output_final_state, cu_seqlens, state_v_first, as_given=True,
    )  # fmt: skip
    if S is not None:
        S = S / keys.last.unsqueeze(-2 if state_v_first else -1)
    return o.half() if half else o, (S, keys.z)


def fused_recurrent_lightnet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor | None, Tensor]]:
    """:func:`chunk_lightnet` under FLA's recurrent name; one kernel serves both."""
    return chunk_lightnet(
        q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens
    )


def lightnet_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor],
    scale: float | None = None,
) -> Tensor:
    r"""One token of LightNet; ``state`` is updated in place.

    Args:
        q, k (Tensor): ``[B, H, K]``; k are logits.
        v (Tensor): ``[B, H, V]``.
        state (tuple): S ``[B, H, K, V]`` and z ``[B, 1, H, K]``, fp32 (fp64 for fp64 inputs),
            contiguous; z is ``-inf`` before the first token.
        scale (float, optional): default ``K ** -0.5``.

    Returns:
        ``o [B, H, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`chunk_lightnet` where gradients are needed.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32), torch.full((1, 1, 2, 32), -torch.inf)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> lightnet_step(q, k, v, state).shape
        torch.Size([1, 2, 32])
    """
    S, z = state
    check_rank("lightnet_step", "k", k, "[B, H, K]")
    check_in_place("lightnet_step", "z", z, "[B, 1, H, K]", (k.shape[0], 1, *k.shape[1:]), k)
    check_no_gradient("lightnet_step", "chunk_lightnet", q, k, v, S, z)
    weights, decay, total = running_softmax_step(k, z)
    o = _chunk.step("gla", q, weights, v, decay, S, scale, "chunk_lightnet")
    z.copy_(total)
    return o
