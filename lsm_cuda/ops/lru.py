"""Linear recurrent units: LRU (complex, constant gate) and RG-LRU (real, gated by the token)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _scan
from ._common import accumulation_dtype, autocast, check_no_gradient, in_dtype
from .scan import scan, scan_step

__all__ = ["lru", "lru_step", "rg_lru", "rg_lru_step"]


def _eigenvalue(nu_log: Tensor, theta_log: Tensor) -> tuple[Tensor, Tensor]:
    """Log magnitude and phase."""
    return -nu_log.exp(), theta_log.exp()


def _normalizer(nu_log: Tensor) -> Tensor:
    """sqrt(1 − |λ|²)."""
    return (-(2 * -nu_log.exp()).expm1()).sqrt()


def lru(
    x: Tensor,
    nu_log: Tensor,
    theta_log: Tensor,
    gamma: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""The linear recurrent unit: ``h_t = λ ⊙ h_{t-1} + γ ⊙ x_t``, ``λ = exp(-exp ν + i exp θ)``.

    Args:
        x (Tensor): ``[B, T, D]``, real or complex, the input after its projection (``B u`` of the
            paper).
        nu_log, theta_log (Tensor): ``[D]``, logarithms of the decay rate and of the phase.
        gamma (Tensor, optional): ``[D]``. Default: ``sqrt(1 - |λ|²)``.
        initial_state (Tensor, optional): ``[N, D]`` complex.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens, reverse: as in :func:`scan`.

    Returns:
        ``h [B, T, D]`` complex64 (complex128), and the final state ``[N, D]`` or None. The layer's
        output is ``Re(C h) + D u``.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: differentiable once in every tensor; deterministic. γ x is written to memory once.

    Source: Resurrecting Recurrent Neural Networks for Long Sequences, arXiv:2303.06349.

    Example:
        >>> x = torch.randn(2, 100, 64, dtype=torch.complex64)
        >>> h, _ = lru(x, torch.randn(64) - 3, torch.randn(64))
        >>> h.shape, h.dtype
        (torch.Size([2, 100, 64]), torch.complex64)
    """
    gamma = _normalizer(nu_log) if gamma is None else gamma
    return scan(
        gamma * x, _eigenvalue(nu_log, theta_log), initial_state, output_final_state, cu_seqlens,
        reverse=reverse,
    )  # fmt: skip


def lru_step(
    x: Tensor, nu_log: Tensor, theta_log: Tensor, state: Tensor, gamma: Tensor | None = None
) -> Tensor:
    r"""One token of :func:`lru`, ``[B, D]``; ``state [B, D]`` (complex) is updated in place.

    Example:
        >>> state = torch.zeros(2, 64, dtype=torch.complex64)
        >>> lru_step(torch.randn(2, 64), torch.randn(64), torch.randn(64), state).shape
        torch.Size([2, 64])
    """
    gamma = _normalizer(nu_log) if gamma is None else gamma
    return scan_step(gamma * x, _eigenvalue(nu_log, theta_log), state)


def _rate(x: Tensor, param: Tensor) -> Tensor:
    """−8 softplus(param), the log decay of a token whose gate is open."""
    return F.softplus(in_dtype(param, accumulation_dtype(x))).mul_(-8.0)


def rg_lru(
    x: Tensor,
    input_gate: Tensor,
    recurrence_gate: Tensor,
    param: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""The real-gated linear recurrent unit of Griffin, gates included.

    ``log a_t = -8 softplus(Λ) ⊙ σ(r_t)``,
    ``h_t = a_t ⊙ h_{t-1} + sqrt(1 - a_t²) ⊙ σ(i_t) ⊙ x_t``.

    Args:
        x (Tensor): ``[B, T, D]``, bf16, fp16 or fp32 (fp64 too on CPU).
        input_gate (Tensor): i, logits ``[B, T, D]`` in the dtype of x.
        recurrence_gate (Tensor): r, logits ``[B, T, D]`` in the dtype of x.
        param (Tensor): Λ, ``[D]``, any floating dtype.
        initial_state (Tensor, optional): ``[N, D]`` fp32 (fp64 for fp64 inputs). Without one, every
            sequence starts with the authors' rule for first tokens: factor 1 instead of the root.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens, reverse: as in :func:`scan`.

    Returns:
        ``h [B, T, D]`` in the dtype of x, and the final state ``[N, D]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: differentiable once in every tensor; deterministic. One pass over memory: sigmoids, root
        and gate are made where they are used. The slope of the root ends at 1000, as in the
        authors' code. The gradients of r and Λ use h rounded to the dtype of x.

    Source: Griffin, arXiv:2402.19427.

    Example:
        >>> x, i, r = torch.randn(3, 2, 100, 64)
        >>> h, state = rg_lru(x, i, r, torch.randn(64), output_final_state=True)
        >>> h.shape, state.shape
        (torch.Size([2, 100, 64]), torch.Size([2, 64]))
    """
    x, input_gate, recurrence_gate = autocast(x, input_gate, recurrence_gate)
    tensors = (x, input_gate, recurrence_gate, _rate(x, param))
    return _scan.run(
        "rg_lru", tensors, initial_state, cu_seqlens, None, (reverse,), output_final_state
    )


def rg_lru_step(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, param: Tensor, state: Tensor
) -> Tensor:
    r"""One token of :func:`rg_lru`, ``[B, D]``; ``state [B, D]`` is updated in place.

    A token of a running sequence: the rule for first tokens does not apply. Where a sequence starts
    here, use ``rg_lru(x[:, None], ..., output_final_state=True)``.

    Example:
        >>> x, i, r = torch.randn(3, 2, 64)
        >>> rg_lru_step(x, i, r, torch.randn(64), torch.zeros(2, 64)).shape
        torch.Size([2, 64])
    """
    if torch.is_grad_enabled():
        check_no_gradient("rg_lru_step", "rg_lru", x, input_gate, recurrence_gate, param, state)
    x, input_gate, recurrence_gate = autocast(x, input_gate, recurrence_gate)
    return _STEP(x, input_gate, recurrence_gate, _rate(x, param), state)  # type: ignore[no-any-return]


_STEP = torch.ops.lsm.rg_lru_step.default  # looked up once: that is a part of a step's time
