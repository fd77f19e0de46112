"""Gated recurrences that are the scan with something around it: GLRU, minGRU, minLSTM, GateLoop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _chunk
from ._common import accumulation_dtype, check_shape
from .scan import scan

__all__ = ["gateloop", "glru", "min_gru", "min_lstm"]


def glru(
    f: Tensor,
    i: Tensor,
    c: Tensor,
    o: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    log: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""The generic gated linear recurrent unit: ``h_t = f_t ⊙ h_{t-1} + i_t ⊙ c_t``, ``o_t ⊙ h_t``.

    Args:
        f (Tensor): forget gate ``[B, T, D]``, or its logarithm if ``log``.
        i, c, o (Tensor): input gate, candidate, output gate, ``[B, T, D]``.
        initial_state, output_final_state, cu_seqlens: as in :func:`scan`.

    Returns:
        ``o ⊙ h [B, T, D]`` and the final state ``[N, D]`` or None.

    Example:
        >>> f, i, c, o = torch.rand(4, 1, 100, 64)
        >>> glru(f, i, c, o)[0].shape
        torch.Size([1, 100, 64])
    """
    h, state = scan(i * c, f, initial_state, output_final_state, cu_seqlens, log)
    return o * h, state


def _positive(x: Tensor) -> Tensor:
    """g of minGRU's stable form: x + 1/2 for x ≥ 0, σ(x) else."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def min_gru(
    z: Tensor,
    h_tilde: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    positive: bool = True,
) -> tuple[Tensor, Tensor | None]:
    r"""minGRU: ``h_t = (1 - σ(z_t)) ⊙ h_{t-1} + σ(z_t) ⊙ g(h̃_t)``.

    Args:
        z, h_tilde (Tensor): logits of the gate and the candidate, ``[B, T, D]``.
        initial_state, output_final_state, cu_seqlens: as in :func:`scan`.
        positive (bool): g keeps the candidate positive, ``x + 1/2`` or σ(x), as in the paper's
            log-space form; else g is the identity.

    Returns:
        ``h [B, T, D]`` and the final state ``[N, D]`` or None.

    Source: Were RNNs All We Needed?, arXiv:2410.01201.

    Example:
        >>> z, c = torch.randn(2, 1, 100, 64)
        >>> min_gru(z, c)[0].shape
        torch.Size([1, 100, 64])
    """
    candidate = _positive(h_tilde) if positive else h_tilde
    log_f = F.logsigmoid(-z.to(accumulation_dtype(z)))
    x = z.sigmoid() * candidate
    return scan(x, log_f, initial_state, output_final_state, cu_seqlens, log=True)


def min_lstm(
    f: Tensor,
    i: Tensor,
    h_tilde: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    positive: bool = True,
) -> tuple[Tensor, Tensor | None]:
    r"""minLSTM: ``h_t = f'_t ⊙ h_{t-1} + i'_t ⊙ g(h̃_t)``, the gates normalised to ``f' + i' = 1``.

    Args:
        f, i, h_tilde (Tensor): logits of the gates and the candidate, ``[B, T, D]``.
        initial_state, output_final_state, cu_seqlens, positive: as in :func:`min_gru`.

    Returns:
        ``h [B, T, D]`` and the final state ``[N, D]`` or None.

    Source: Were RNNs All We Needed?, arXiv:2410.01201.

    Example:
        >>> f, i, c = torch.randn(3, 1, 100, 64)
        >>> min_lstm(f, i, c)[0].shape
        torch.Size([1, 100, 64])
    """
    # f / (f + i) = σ(log f − log i): the gate of a minGRU
    wide = accumulation_dtype(f)
    z = F.logsigmoid(i.to(wide)) - F.logsigmoid(f.to(wide))
    candidate = _positive(h_tilde) if positive else h_tilde
    x = (z.sigmoid() * candidate).to(h_tilde.dtype)
    return scan(x, F.logsigmoid(-z), initial_state, output_final_state, cu_seqlens, log=True)


def gateloop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_magnitude: Tensor,
    phase: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""GateLoop: a linear recurrence whose gate ``a_t = exp(m_t + iθ_t)`` turns as well as decays.

    ``S_t = Diag(a_t) S_{t-1} + k_t v_tᵀ``,   ``o_t = Re(S_tᵀ q_t)``; element by element if K = V =
    1.

    Args:
        q, k, v (Tensor): ``[B, T, D]``, heads of one channel as in the paper's experiments; or
            q, k ``[B, T, H, K]``, v ``[B, T, H, V]``.
        log_magnitude (Tensor): m ≤ 0, like k; the paper has ``logsigmoid``.
        phase (Tensor): θ, like k.
        initial_state (Tensor, optional): complex, ``[N, D]`` or ``[N, H, K, V]``.
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): as in :func:`scan`; for heads of one channel only.

    Returns:
        ``o`` like v, and the complex final state or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: wide heads run on the chunk engine with phase-rotated features, twice the key channels;
        the running phase is a cumulative sum in fp32 (fp64), whose error grows with T.

    Source: GateLoop, arXiv:2311.01927.

    Example:
        >>> q, k, v, m, theta = torch.randn(5, 1, 100, 64)
        >>> gateloop(q, k, v, F.logsigmoid(m), theta)[0].shape
        torch.Size([1, 100, 64])
    """
    for name, t in {"log_magnitude": log_magnitude, "phase": phase, "q": q}.items():
        check_shape("gateloop", name, t, "like k", k.shape)
    wide = accumulation_dtype(v)
    gate = log_magnitude.to(wide), phase.to(wide)
    if q.dim() == 3:
        h, state = scan((k * v).to(wide), gate, initial_state, output_final_state, cu_seqlens)
        return (q * h.real).to(v.dtype), state
    if cu_seqlens is not None:
        raise RuntimeError("lsm::gateloop: cu_seqlens needs heads of one channel, [B, T, D]")
    running = gate[1].cumsum(1)
    cosine, sine = running.cos().to(q.dtype), running.sin().to(q.dtype)
    turned_q, turned_k = (torch.cat([x * cosine, x * sine], -1) for x in (q, k))
    parts = None
    if initial_state is not None:
        parts = torch.cat([initial_state.real, -initial_state.imag], -2)
    o, parts = _chunk.chunk(
        "gla", turned_q, turned_k, v, torch.cat([gate[0], gate[0]], -1), 1.0, parts,
        output_final_state, None,
    )  # fmt: skip
    if parts is None:
        return o, None
    real, imaginary = parts.chunk(2, -2)
    last = running[:, -1] if q.shape[1] else running.new_zeros(q.shape[0], *q.shape[2:])
    turn = torch.polar(torch.ones_like(last), last)
    return o, turn.unsqueeze(-1) * torch.complex(real, -imaginary)
