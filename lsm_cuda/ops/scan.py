"""The gated element-wise recurrence itself, h_t = a_t h_{t-1} + x_t, real and complex."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _scan
from ._common import _autocasts, autocast_dtype, check_no_gradient

__all__ = ["scan", "scan_step"]


def _gate(x: Tensor, a: Tensor | tuple[Tensor, Tensor], log: bool) -> tuple[Tensor, Tensor, bool]:
    """x and a in dtypes that go together, and whether a is a logarithm."""
    if isinstance(a, tuple):
        magnitude, phase = a
        wide = torch.promote_types(magnitude.dtype, torch.float32)
        magnitude, phase = magnitude.to(wide), phase.to(wide)
        shape = max(magnitude.shape, phase.shape, key=len)
        a, log = torch.complex(magnitude.expand(shape), phase.expand(shape)), True
    if a.is_complex() != x.is_complex():
        dtype = torch.promote_types(x.dtype, a.dtype)
        x = x.to(torch.promote_types(dtype, torch.complex64))
        a = a.to(x.dtype)
    elif not x.is_complex() and x.dtype != torch.float64:
        half = autocast_dtype(x.device.type)
        if half is not None:
            x, a = x.to(half), a if a.dtype == torch.float32 else a.to(half)
    if a.dim() == 1:
        a = a.to(_scan.state_dtype(x))
    return x, a, log


def scan(
    x: Tensor,
    a: Tensor | tuple[Tensor, Tensor],
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    log: bool = False,
    reverse: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""The linear recurrence of every gated RNN, element by element.

    ``h_t = a_t ⊙ h_{t-1} + x_t``,   or   ``h_t = exp(a_t) ⊙ h_{t-1} + x_t``   if ``log``.

    Args:
        x (Tensor): ``[B, T, D]``, bf16, fp16, fp32 or complex64 (fp64 and complex128 too on CPU).
        a (Tensor): the gate, or its natural logarithm if ``log``: ``[B, T, D]``, or constant in
            time, ``[D]``. In the dtype of x, or (better for half precision, which knows no gate
            between 1 - 2⁻⁹ and 1) fp32. A pair (log magnitude, phase) of real tensors stands for
            the complex gate ``exp(magnitude + i phase)``. A complex gate makes a real x complex.
        initial_state (Tensor, optional): ``[N, D]`` fp32 (fp64 for fp64 inputs, complex for complex
            ones). Default: zeros.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` int32 or int64, boundaries of sequences packed
            into one row (then B = 1), starting at 0 and ending at T.
        log (bool): a is a logarithm.
        reverse (bool): time runs from the last token to the first; the initial state comes before
            the last token, the final state after the first.
        order (Tensor, optional): ``[T]`` int32 or int64, a permutation: position p of the
            recurrence is token ``order[p]``. Rows and columns of images, zig-zag and Hilbert curves
            (:func:`scan_order`) without a permuted copy. Not checked on CUDA, where a value out of
            range is skipped.

    Returns:
        ``h [B, T, D]`` in the dtype of x, and the final state ``[N, D]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: differentiable once in x, a and initial_state; deterministic. The gradient of a uses the
        h that was returned, rounded to the dtype of x.

    Example:
        >>> x, f = torch.randn(2, 100, 64), torch.rand(2, 100, 64)
        >>> h, state = scan(x, f, output_final_state=True)
        >>> h.shape, state.shape
        (torch.Size([2, 100, 64]), torch.Size([2, 64]))
    """
    x, a, log = _gate(x, a, log)
    return _scan.run(
        "scan", (x, a), initial_state, cu_seqlens, order, (log, reverse), output_final_state
    )


def scan_step(
    x: Tensor, a: Tensor | tuple[Tensor, Tensor], state: Tensor, log: bool = False
) -> Tensor:
    r"""One token of :func:`scan`; ``state`` is updated in place.

    Args:
        x (Tensor): ``[B, D]``.
        a (Tensor): gate ``[B, D]`` or ``[D]``, as in :func:`scan`.
        state (Tensor): ``[B, D]`` fp32 (fp64 for fp64 inputs, complex for complex ones),
            contiguous, updated in place.
        log (bool): a is a logarithm.

    Returns:
        ``h [B, D]`` in the dtype of x.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: inference only. Use :func:`scan` where gradients are needed.

    Example:
        >>> state = torch.zeros(2, 64)
        >>> scan_step(torch.randn(2, 64), torch.rand(2, 64), state).shape
        torch.Size([2, 64])
    """
    # Nearly always they go together as they are, and a step has little time to ask.
    if (
        _autocasts()
        or isinstance(a, tuple)
        or (a.dtype != x.dtype and (a.dtype != torch.float32 or x.is_complex()))
        or a.dim() != x.dim()
    ):
        x, a, log = _gate(x, a, log)
    if torch.is_grad_enabled():
        check_no_gradient("scan_step", "scan", x, a, state)
    return _STEP(x, a, state, log)  # type: ignore[no-any-return]


_STEP = torch.ops.lsm.scan_step.default  # looked up once: that is a part of a step's time
