"""The sLSTM cell of xLSTM: exponential gates over a recurrence that cannot be unrolled in time."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    accumulation_dtype,
    autocast_dtype,
    check_device_like,
    check_no_forward_ad,
    check_no_gradient,
    check_rank,
    no_double_backward,
)
from .conv import token_shift

__all__ = ["slstm", "slstm_step"]


def _fwd_fake(x, R, initial_state, cu_seqlens, save_cells, output_final_state):  # type: ignore[no-untyped-def]
    named = {"R": R, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    check_device_like("slstm_fwd", "x", x, named)
    B, T, _, H, D = x.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    cells = R.new_empty((B, T, 4, H, D) if save_cells else (0,))
    final = R.new_empty((N, 4, H, D) if output_final_state else (0,))
    return x.new_empty(B, T, H, D), cells, final


def _bwd_fake(raw, R_transposed, cells, initial_state, cu_seqlens, grad_y, grad_final_state):  # type: ignore[no-untyped-def]
    first = raw.new_empty((0,) if initial_state is None else initial_state.shape)
    return raw.new_empty(raw.shape), first


def _step_fake(x, R, state):  # type: ignore[no-untyped-def]
    check_device_like("slstm_step", "x", x, {"R": R, "state": state})
    B, _, H, D = x.shape
    return x.new_empty(B, H, D)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, R, initial_state, cu_seqlens, _, output_final_state = inputs
    _, cells, _ = output
    ctx.save_for_backward(x, R, initial_state, cu_seqlens, cells)
    ctx.output_final_state = output_final_state
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_cells, grad_final_state):  # type: ignore[no-untyped-def]
    """What every token's output does to the next one's gates is a product of known matrices: only
    the way back through time is a walk."""
    x, R, initial_state, cu_seqlens, cells = ctx.saved_tensors
    B, T, _, H, D = x.shape
    h0 = None if initial_state is None else initial_state[:, 0].flatten(1)
    before = token_shift(cells[:, :, 0].flatten(2), cu_seqlens, h0, taps=(1.0, 0.0))
    before = before.view(B, T, H, D)  # type: ignore[union-attr]
    raw = x.to(R.dtype) + torch.einsum("bthd,hdge->btghe", before, R)
    grad_y = before.new_zeros(before.shape) if grad_y is None else grad_y.to(R.dtype)
    if not ctx.output_final_state:
        grad_final_state = None
    transposed = R.permute(0, 2, 3, 1).contiguous()
    draw, dstate = torch.ops.lsm.slstm_bwd(
        raw, transposed, cells, initial_state, cu_seqlens, grad_y, grad_final_state
    )
    dR = torch.einsum("bthd,btghe->hdge", before, draw) if ctx.needs_input_grad[1] else None
    dstate = None if initial_state is None else dstate
    return draw.to(x.dtype), dR, dstate, None, None, None


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("slstm_bwd"))


torch.library.register_fake("lsm::slstm_fwd")(_fwd_fake)
torch.library.register_fake("lsm::slstm_bwd")(_bwd_fake)
torch.library.register_fake("lsm::slstm_step")(_step_fake)
torch.library.register_autograd("lsm::slstm_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("lsm::slstm_bwd", _refuse_double_backward)


def slstm(
    x: Tensor,
    R: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""sLSTM over whole sequences: scalar memories with exponential gates that see the last output.

    With the pre-activations i, f, z, o of ``raw_t = x_t + h_{t−1} R``, head by head,

    ``m_t = max(log σ(f) + m_{t−1}, i)``, ``c_t = e^{log σ(f) + m_{t−1} − m_t} c_{t−1} + e^{i −
    m_t} tanh z``, ``n_t`` likewise with 1 in the place of ``tanh z``, ``h_t = σ(o) c_t / n_t``.

    Args:
        x (Tensor): ``[B, T, 4, H, D]``, what the input (and the bias) brings to i, f, z and o;
            bf16, fp16 or fp32 (fp64 too on CPU).
        R (Tensor): recurrent weights ``[H, D, 4, D]``: from a head's channel, to a gate's channel
            of the same head; used in fp32 (fp64 for fp64).
        initial_state (Tensor, optional): h, c, n, m: ``[N, 4, H, D]`` fp32 (fp64 for fp64). Where
            n is 0 there is no past, whatever m says. Default: zeros.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of N sequences packed into one row, as
            in :func:`chunk_gla`.

    Returns:
        ``h [B, T, H, D]`` in the dtype of x, and the state ``[N, 4, H, D]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or D over 1024 on CUDA.

    Note: differentiable once in x, R and initial_state; deterministic. Time is walked by one
        launch, which takes T products of a vector with R: there is no parallel form. For the
        gradient the state after each token is kept, 16 bytes per channel. Under autocast x is cast.

    Source: xLSTM, arXiv:2405.04517, eqs. 8-18 and appendix A.2; f is the sigmoid there too.

    Example:
        >>> x, R = torch.randn(2, 10, 4, 3, 8), torch.randn(3, 8, 4, 8) / 8
        >>> y, state = slstm(x, R, output_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 10, 3, 8]), torch.Size([2, 4, 3, 8]))
    """
    check_rank("slstm", "x", x, "[B, T, 4, H, D]")
    check_no_forward_ad("slstm_fwd", x=x, R=R, initial_state=initial_state)
    if (dtype := autocast_dtype(x.device.type)) is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    R = R.to(accumulation_dtype(x))
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, R, initial_state)
    )
    y, _, last = torch.ops.lsm.slstm_fwd(x, R, initial_state, cu_seqlens, save, output_final_state)
    return y, last if output_final_state else None


def slstm_step(x: Tensor, R: Tensor, state: Tensor) -> Tensor:
    r"""One token of :func:`slstm`; ``state`` is updated in place.

    Args:
        x (Tensor): ``[B, 4, H, D]``.
        R (Tensor): ``[H, D, 4, D]``.
        state (Tensor): ``[B, 4, H, D]`` fp32 (fp64 for fp64), contiguous.

    Returns:
        ``h [B, H, D]`` in the dtype of x.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only.

    Example:
        >>> state = torch.zeros(2, 4, 3, 8)
        >>> slstm_step(torch.randn(2, 4, 3, 8), torch.randn(3, 8, 4, 8), state).shape
        torch.Size([2, 3, 8])
    """
    check_no_gradient("slstm_step", "slstm", x, R, state)
    return torch.ops.lsm.slstm_step(x, R.to(accumulation_dtype(x)), state)  # type: ignore[no-any-return]
