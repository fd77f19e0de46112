"""Longhorn: every token solves for the state that explains it best at least change."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from . import _chunk
from ._common import (
    accumulation_dtype,
    autocast,
    check_in_place,
    check_no_forward_ad,
    check_no_gradient,
    check_rank,
    check_shape,
)
from ._delta import delta, delta_step

__all__ = ["chunk_longhorn", "longhorn_step"]

# Decays per token and head of q that a call of the diagonal form holds at a time.
_DECAYS_AT_ONCE = 1024


def chunk_longhorn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    diagonal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Longhorn over whole sequences.

    With ``ε = β / (1 + β |k|²)`` of every value channel, the minimiser of ``|S − S_{t-1}|² + β |Sᵀ
    k_t − v_t|²`` is ``S_t = S_{t-1} + k_t (ε_t ⊙ (v_t − S_{t-1}ᵀ k_t))ᵀ``. The released models
    keep just the diagonal of its transition, ``S_t = (1 − (k_t ⊙ k_t) ε_tᵀ) ⊙ S_{t-1} + k_t (ε_t ⊙
    v_t)ᵀ``. Then ``o_t = scale · S_tᵀ q_t``.

    Args:
        q, k (Tensor): ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        v (Tensor): ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads query/key
            head ``h // (HV // H)``.
        beta (Tensor): how much a token counts, ≥ 0, ``[B, T, HV, V]`` or ``[B, T, HV]``.
        scale (float, optional): None for ``K ** -0.5``. Default: 1.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs). Default:
            zeros.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        diagonal (bool): the released form.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and the final state ``[N, HV, K, V]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in all tensors but cu_seqlens; deterministic. The diagonal form has a
        decay per element of the state. It runs on the chunk engine with every value channel as a
        head, a few at a time: exact, at V times the gate traffic. A selective scan, whose decay
        is such a product, is its engine.

    Source: Longhorn: State Space Models are Amortized Online Learners, arXiv:2407.14207.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> o, state = chunk_longhorn(q, k, v, torch.rand(1, 100, 2, 16), output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))
    """
    op = "chunk_longhorn"
    check_no_forward_ad(op, q=q, k=k, v=v, beta=beta, initial_state=initial_state)
    beta = _per_channel(op, v, beta, "[B, T, HV, V]")
    q, k, v = autocast(q, k, v)
    if not diagonal:
        rate = _rate(beta, _square(k, beta).sum(-1, keepdim=True))
        return delta(
            "delta_rule", q, k, v, (rate,), scale, initial_state, output_final_state, cu_seqlens
        )
    check_rank(op, "q", q, "[B, T, H, K]")
    check_shape(op, "k", k, "[B, T, H, K]", q.shape)
    check_rank(op, "v", v, "[B, T, HV, V]")
    if initial_state is not None:
        N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = (N, v.shape[2], q.shape[-1], v.shape[-1])
        check_shape(op, "initial_state", initial_state, "[N, HV, K, V]", expected)
    width = max(1, _DECAYS_AT_ONCE // (q.shape[-1] * max(1, v.shape[2] // max(1, q.shape[2]))))
    outputs, states = [], []
    for start in range(0, v.shape[-1], width):
        columns = slice(start, start + width)
        o, state = torch.utils.checkpoint.checkpoint(
            _value_channels, q, k, v[..., columns], beta[..., columns],
            None if initial_state is None else initial_state[..., columns],
            cu_seqlens, scale, output_final_state, use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, -1), torch.cat(states, -1) if output_final_state else None


def longhorn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None = 1.0,
    diagonal: bool = False,
) -> Tensor:
    r"""One token of :func:`chunk_longhorn`; ``state`` is updated in place.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        beta (Tensor): ``[B, HV, V]`` or ``[B, HV]``.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous, updated in place.
        scale, diagonal: as in :func:`chunk_longhorn`.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 16, 16)
        >>> q, k, v = (torch.randn(1, 2, 16) for _ in range(3))
        >>> longhorn_step(q, k, v, torch.rand(1, 2, 16), state).shape
        torch.Size([1, 2, 16])
    """
    op = "longhorn_step"
    beta = _per_channel(op, v, beta, "[B, HV, V]")
    rate = _rate(beta, _square(k, beta).sum(-1, keepdim=True))
    if not diagonal:
        return delta_step("delta_rule", q, k, v, (rate,), state, scale, "chunk_longhorn")
    check_no_gradient(op, "chunk_longhorn", q, k, v, beta, state)
    check_rank(op, "q", q, "[B, H, K]")
    check_shape(op, "k", k, "[B, H, K]", q.shape)
    check_in_place(op, "state", state, "[B, HV, K, V]", (*v.shape[:2], q.shape[-1], v.shape[-1]), q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.to(state.dtype).repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    state.mul_(1 - k.square().unsqueeze(-1) * rate.unsqueeze(-2))
    state.add_(k.unsqueeze(-1) * (rate * v.to(state.dtype)).unsqueeze(-2))
    return (scale * torch.einsum("bhk,bhkv->bhv", q, state)).to(v.dtype)


def _per_channel(op: str, v: Tensor, beta: Tensor, dims: str) -> Tensor:
    if beta.dim() < v.dim():
        check_shape(op, "beta", beta, dims.replace(", V]", "]"), v.shape[:-1])
        beta = beta.unsqueeze(-1).expand(v.shape)
    check_shape(op, "beta", beta, dims, v.shape)
    return beta.to(accumulation_dtype(beta))


def _square(k: Tensor, beta: Tensor) -> Tensor:
    """``k ⊙ k`` of every value head, in the dtype of beta."""
    k = k.to(beta.dtype).square()
    return k.repeat_interleave(beta.shape[-2] // k.shape[-2], -2)


class _Rate(torch.autograd.Function):
    """``β / (1 + β s)``, whose gradient ``1 / (1 + β s)²`` the quotient rule would take for the
    difference of two nearly equal numbers where ``β s`` is large."""

    generate_vmap_rule = True

    @staticmethod
    def forward(beta: Tensor, size: Tensor) -> Tensor:
        return beta / (1 + beta * size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        beta, size = ctx.saved_tensors
        scaled = grad / (1 + beta * size).square()
        return scaled, -scaled * beta.square()


def _rate(beta: Tensor, size: Tensor) -> Tensor:
    """ε of keys whose square length is ``size``."""
    return _Rate.apply(*torch.broadcast_tensors(beta, size))  # type: ignore[no-any-return, no-untyped-call]


def _value_channels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """The diagonal form, each of the few channels of v a head with one value channel."""
    B, T, HV, V = v.shape
    square = _square(k, beta)
    size = square.sum(-1, keepdim=True)
    rest = (size - square).clamp(min=0).unsqueeze(-2)
    # 1 / (1 − ε k²) is 1 + k² β / (1 + β (|k|² − k²)), a sum of what is not negative
    decay = -(square.unsqueeze(-2) * _rate(beta.unsqueeze(-1), rest)).log1p()
    write = (_rate(beta, size) * v.to(beta.dtype)).to(v.dtype)
    if initial_state is not None:
        initial_state = initial_state.mT.flatten(1, 2).unsqueeze(-1)
    o, state = _chunk.chunk(
        "gla", q, k, write.flatten(2).unsqueeze(-1), decay.flatten(2, 3), scale, initial_state,
        output_final_state, cu_seqlens,
    )  # fmt: skip
    if state is not None:
        state = state.view(state.shape[0], HV, V, q.shape[-1]).mT
    return o.view(B, T, HV, V), state
