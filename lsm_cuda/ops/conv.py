"""The short causal convolution in front of linear attention and scans, under the names people
use."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    autocast_dtype,
    below_autograd,
    call,
    check_device_like,
    check_no_forward_ad,
    check_no_gradient,
    check_rank,
    in_dtype,
    no_double_backward,
    plain,
)
from .gates import L2_EPS, l2norm

__all__ = [
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_step",
    "causal_conv1d_update",
    "token_shift",
]

_NAME = "causal_conv1d"


def _like_layout(x: Tensor, norm: int) -> Tensor:
    """Uninitialised, with channels side by side as in x, or tokens if there is no norm."""
    B, T, D = x.shape
    if norm == 0 and x.stride(2) != 1 and x.stride(1) == 1 and T > 1 and D > 1:
        return x.new_empty(B, D, T).transpose(1, 2)
    return x.new_empty(B, T, D)


def _fwd_fake(  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, cu_seqlens, seq_idx, silu, state_size, norm=0, norm_eps=1e-6,
    norm_channels=None,
):  # fmt: skip
    named = {"weight": weight, "bias": bias, "initial_state": initial_state}
    named |= {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx}
    check_device_like(f"{_NAME}_fwd", "x", x, named)
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (N, x.shape[2], state_size) if state_size > 0 else (0,)
    return _like_layout(x, norm), x.new_empty(state)


def _bwd_fake(  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, cu_seqlens, seq_idx, silu, grad_y, grad_final_state,
    need_dweight=True, norm=0, norm_eps=1e-6, norm_channels=None,
):  # fmt: skip
    dweight = weight.new_empty(weight.shape if need_dweight else (0,))
    with_bias = need_dweight and bias is not None
    dbias = weight.new_empty(bias.shape if with_bias else (0,))
    dstate = x.new_empty((0,) if initial_state is None else initial_state.shape)
    return _like_layout(x, norm), dweight, dbias, dstate


def _step_fake(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu):  # type: ignore[no-untyped-def]
    named = {"conv_state": conv_state, "weight": weight, "bias": bias}
    named |= {"cache_seqlens": cache_seqlens, "conv_state_indices": conv_state_indices}
    check_device_like(f"{_NAME}_step", "x", x, named)
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:6])
    ctx.silu, ctx.state_size, *ctx.norm = inputs[6:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_final_state):  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, *_ = tensors = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    if ctx.state_size == 0:
        grad_final_state = None
    need_dweight = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dweight, dbias, dstate = torch.ops.lsm.causal_conv1d_bwd(
        *tensors, ctx.silu, grad_y, grad_final_state, need_dweight, *ctx.norm
    )
    return (
        dx,
        dweight if need_dweight else None,
        dbias if need_dweight and bias is not None else None,
        None if initial_state is None else dstate,
        None, None, None, None, *(None for _ in ctx.norm),
    )  # fmt: skip


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward(f"{_NAME}_bwd"))


torch.library.register_fake(f"lsm::{_NAME}_fwd")(_fwd_fake)
torch.library.register_fake(f"lsm::{_NAME}_bwd")(_bwd_fake)
torch.library.register_fake(f"lsm::{_NAME}_step")(_step_fake)
torch.library.register_autograd(f"lsm::{_NAME}_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd(f"lsm::{_NAME}_bwd", _refuse_double_backward)


_FORWARD = torch.ops.lsm.causal_conv1d_fwd.default


def _silu(op: str, activation: str | None) -> bool:
    if activation not in ("silu", "swish", None):
        raise ValueError(f"{op}: activation must be silu, swish or None, got {activation!r}")
    return activation is not None


def _weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """In one dtype: that of x, or wider."""
    if weight.dtype != x.dtype and weight.dtype in (torch.bfloat16, torch.float16):
        weight = weight.to(torch.promote_types(x.dtype, torch.float32))
    return weight, None if bias is None else in_dtype(bias, weight.dtype)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    state_size: int,
    norm: int = 0,
    norm_channels: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator, in the dtypes it takes; ``x [B, T, D]``."""
    run = below_autograd
    if not plain():
        run = call
        check_no_forward_ad(
            f"{_NAME}_fwd", x=x, weight=weight, bias=bias, initial_state=initial_state
        )
        if (dtype := autocast_dtype(x.device.type)) is not None and x.dtype != torch.float64:
            x = x.to(dtype)
            initial_state = None if initial_state is None else initial_state.to(dtype)
    weight, bias = _weights(x, weight, bias)
    if seq_idx is not None:
        seq_idx = seq_idx.to(torch.int32)
    return run(  # type: ignore[no-any-return]
        _FORWARD, x, weight, bias, initial_state, cu_seqlens, seq_idx, silu, state_size, norm,
        L2_EPS, norm_channels,
    )  # fmt: skip


def _norm_fits(x: Tensor, weight: Tensor, norm: int) -> bool:
    """Whether the kernel takes heads of so many channels."""
    least = 4 if weight.shape[1] <= 4 else 2
    return x.device.type != "cuda" or (least <= norm <= 32 * least and norm & (norm - 1) == 0)


def _check_norm(op: str, x: Tensor, norm: int, channels: int | None) -> None:
    D = x.shape[-1]
    if channels is not None and not 0 <= channels <= D:
        raise ValueError(f"{op}: l2norm_channels must be 0 to D = {D}, got {channels}")
    all_of = f"D = {D}" if channels is None else f"l2norm_channels = {channels}"
    if norm < 0 or (norm > 0 and (D if channels is None else channels) % norm):
        raise ValueError(f"{op}: l2norm_dim must be a divisor of {all_of}, got {norm}")


def unit_heads(y: Tensor, norm: int, channels: int | None) -> Tensor:
    """Heads of ``norm`` channels, the first ``channels`` of all, over their lengths."""
    D = y.shape[-1]
    first = D if channels is None else channels
    heads, rest = y[..., :first], y[..., first:]
    heads = l2norm(heads.reshape(*y.shape[:-1], first // norm, norm), L2_EPS).flatten(-2)
    return heads if first == D else torch.cat([heads, rest], -1)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    l2norm_dim: int | None = None,
    l2norm_channels: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Depthwise causal convolution over time, ``[B, T, D]``, as FLA calls it.

    ``y_t = act(bias + Σ_j weight[:, W − 1 − j] ⊙ x_{t−j})``, ``j = 0 … W − 1``, of t's own
    sequence; with ``l2norm_dim`` divided by its length head by head.

    Args:
        x (Tensor): ``[B, T, D]``, bf16, fp16 or fp32 (fp64 too on CPU); channels or tokens side by
            side in memory, else it is copied.
        weight (Tensor): ``[D, W]``, the last tap weighs the current token; W up to 8 on CUDA, 128
            on CPU; in the dtype of x, or fp32.
        bias (Tensor, optional): ``[D]``.
        residual (Tensor, optional): ``[B, T, D]``, added after the activation.
        initial_state (Tensor, optional): ``[N, D, S]`` in the dtype of x, S ≥ W − 1: the last
            inputs of each sequence, the latest last. Default: zeros.
        output_final_state (bool): also return the last S inputs; S is W, or the initial state's.
        activation (str, optional): ``silu``, ``swish`` or None.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of N sequences packed into one row, as
            in :func:`chunk_gla`.
        l2norm_dim (int, optional): channels K of a head, a divisor of D; ``y_t`` of each is divided
            by ``sqrt(Σ y² + 1e-6)`` in the same pass (on CUDA for powers of two up to 128, else
            in another), as the delta rules want q and k.
        l2norm_channels (int, optional): only so many channels, the first ones, are so divided, as
            where q, k and v are convolved as one tensor. Default: all.

    Returns:
        ``y`` like x, and the final state ``[N, D, S]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or too many taps.
        ValueError: another activation, or heads that do not divide D.

    Note: differentiable once in x, weight, bias and initial_state; deterministic. Sums are fp32
        (fp64 for fp64). Under autocast x and the state are cast, the weights keep their dtype.

    Source: Dao-AILab's causal-conv1d; Mamba, arXiv:2312.00752, section 3.4.

    Example:
        >>> x, weight = torch.randn(1, 100, 64), torch.randn(64, 4)
        >>> y, state = causal_conv1d(x, weight, activation="silu", output_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([1, 100, 64]), torch.Size([1, 64, 4]))

        A delta layer's q, k (two heads of 16 each) and v in one pass, as views of one tensor:

        >>> qkv, weight = torch.randn(1, 100, 96), torch.randn(96, 4)
        >>> y, _ = causal_conv1d(qkv, weight, activation="silu", l2norm_dim=16, l2norm_channels=64)
        >>> q, k, v = y.split([32, 32, 32], -1)
    """
    check_rank(_NAME, "x", x, "[B, T, D]")
    check_rank(_NAME, "weight", weight, "[D, W]")
    silu, size, norm, fused = _silu(_NAME, activation), 0, 0, 0
    if output_final_state:
        size = weight.shape[1] if initial_state is None else initial_state.shape[-1]
    if l2norm_dim is not None or l2norm_channels is not None:
        norm = 0 if l2norm_dim is None else l2norm_dim
        _check_norm(_NAME, x, norm, l2norm_channels)
        fused = norm if norm and _norm_fits(x, weight, norm) else 0
    y, state = convolve(
        x, weight, bias, initial_state, cu_seqlens, None, silu, size, fused, l2norm_channels
    )
    if norm and not fused:
        y = unit_heads(y, norm, l2norm_channels)
    return y if residual is None else y + residual, state if output_final_state else None


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Depthwise causal convolution over time, ``[B, D, T]``, as Dao-AILab's causal-conv1d calls
    it.

    Args:
        x (Tensor): ``[B, D, T]``; with ``x.stride(1) == 1`` channels lie side by side (channel
            last). The result has the layout of x.
        weight, bias (Tensor): as :func:`causal_conv1d`.
        seq_idx (Tensor, optional): integers ``[B, T]``; where it changes from one token to the
            next, a sequence begins. Not together with states or cu_seqlens.
        initial_states (Tensor, optional): ``[N, D, W − 1]``, the inputs before the first.
        return_final_states (bool): also return the last W − 1 inputs.
        final_states_out (Tensor, optional): where to put them.
        activation (str, optional): ``silu``, ``swish`` or None.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, ``B == 1``.

    Returns:
        ``y [B, D, T]``, with ``return_final_states`` also the states ``[N, D, W − 1]``.

    Raises: as :func:`causal_conv1d`.

    Note: as :func:`causal_conv1d`. Nothing here needs the channel-last layout.

    Example:
        >>> causal_conv1d_fn(torch.randn(2, 64, 10), torch.randn(64, 4), activation="silu").shape
        torch.Size([2, 64, 10])
    """
    check_rank("causal_conv1d_fn", "x", x, "[B, D, T]")
    check_rank("causal_conv1d_fn", "weight", weight, "[D, W]")
    silu, past = _silu("causal_conv1d_fn", activation), weight.shape[1] - 1
    x = x.transpose(1, 2)
    size = past if return_final_states else 0
    y, states = convolve(x, weight, bias, initial_states, cu_seqlens, seq_idx, silu, size)
    y = y.transpose(1, 2)
    if not return_final_states:
        return y
    if past == 0:
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        states = y.new_empty(N, x.shape[2], 0)
    return y, states if final_states_out is None else final_states_out.copy_(states)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    r"""One token, or a few, of :func:`causal_conv1d_fn`; ``conv_state`` is updated in place.

    Args:
        x (Tensor): ``[B, D]`` or ``[B, D, T]``.
        conv_state (Tensor): ``[B, D, S]``, S ≥ W − 1, in the dtype of x, at any strides: the last S
            inputs, the latest last.
        weight, bias (Tensor): as :func:`causal_conv1d`.
        activation (str, optional): ``silu``, ``swish`` or None.
        cache_seqlens (Tensor, optional): ``[B]`` int32. With it the state is a ring, S ≥ W: the
            input at position i of a sequence lies in column ``i mod S``, x begins at position
            ``cache_seqlens[b]``, and nothing moves.
        conv_state_indices (Tensor, optional): ``[B]`` int32, the row of ``conv_state`` that
            belongs to each row of x; a negative one is skipped, and its result is 0.

    Returns:
        ``y`` like x.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.
        ValueError: another activation.

    Note: inference only; rows of x that share a row of the state give undefined results.

    Example:
        >>> state = torch.zeros(2, 64, 3)
        >>> causal_conv1d_update(torch.randn(2, 64), state, torch.randn(64, 4)).shape
        torch.Size([2, 64])
    """
    silu = _silu("causal_conv1d_update", activation)
    tokens = (x if x.dim() == 3 else x.unsqueeze(-1)).transpose(1, 2)
    rows = (None if r is None else r.to(torch.int32) for r in (cache_seqlens, conv_state_indices))
    y = _step(tokens, conv_state, weight, bias, silu, *rows).transpose(1, 2)
    return y if x.dim() == 3 else y.squeeze(-1)


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    l2norm_dim: int | None = None,
    l2norm_channels: int | None = None,
) -> Tensor:
    """One token of :func:`causal_conv1d`, ``x [B, D]``; ``state [B, D, S]`` is updated in place.

    Args, errors and note: as :func:`causal_conv1d_update`; the norm as :func:`causal_conv1d`, in a
    pass of its own.
    """
    silu = _silu("causal_conv1d_step", activation)
    norm = 0 if l2norm_dim is None else l2norm_dim
    if norm or l2norm_channels is not None:
        _check_norm("causal_conv1d_step", x, norm, l2norm_channels)
    y = _step(x.unsqueeze(1), state, weight, bias, silu).squeeze(1)
    return unit_heads(y, norm, l2norm_channels) if norm else y


def _step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    tensors = [t for t in (x, state, weight, bias) if t is not None]
    check_no_gradient(f"{_NAME}_step", "causal_conv1d", *tensors)
    weight, bias = _weights(x, weight, bias)
    return torch.ops.lsm.causal_conv1d_step(  # type: ignore[no-any-return]
        x, state, weight, bias, cache_seqlens, conv_state_indices, silu
    )


def token_shift(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    taps: tuple[float, float] = (1.0, -1.0),
) -> Tensor | tuple[Tensor, Tensor]:
    r"""RWKV's token shift, ``x_{t−1} − x_t``, zero before the first token; a convolution of width
    2.

    Args:
        x (Tensor): ``[B, T, D]``.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, ``B == 1``.
        cache (Tensor, optional): ``[N, D]``, the token before the first.
        output_cache (bool): also return the last token of each sequence.
        taps: weights of the token before and of the token; (1, 0) is the shift alone.

    Returns:
        ``[B, T, D]``, with ``output_cache`` also ``[N, D]``.

    Raises: as :func:`causal_conv1d`.

    Example:
        >>> token_shift(torch.tensor([[[1.0], [3.0], [4.0]]])).flatten()
        tensor([-1., -2., -1.])
    """
    weight = x.new_tensor(taps).expand(x.shape[-1], 2)
    state = None if cache is None else cache.unsqueeze(-1).to(x.dtype)
    size = 1 if output_cache else 0
    y, last = convolve(x, weight, None, state, cu_seqlens, None, False, size)
    return (y, last.squeeze(-1)) if output_cache else y
