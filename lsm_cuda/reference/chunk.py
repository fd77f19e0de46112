"""The chunk engine: a state that decays, takes in a pair, and is read. One decay each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._common import outer, rank_one, recurrence


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Linear attention without a decay: ``S_t = S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    Args and returns: as :func:`gated_linear_attention`.

    Source: Transformers are RNNs, arXiv:2006.16236, without feature map and normaliser.
    """
    return recurrence(q, k, v, None, scale, initial_state, cu_seqlens)


def simple_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One decay per head: ``S_t = e^{g_t} S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    Args: as :func:`gated_linear_attention`, but g ``[B, T, HV]``.

    Source: RetNet, arXiv:2307.08621 (constant g); Mamba-2, arXiv:2405.21060 (g of the token).
    """
    return recurrence(q, k, v, g[..., None, None], scale, initial_state, cu_seqlens)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gated linear attention: ``S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ
    q_t``.

    Args:
        q, k: ``[B, T, H, K]``.
        v: ``[B, T, HV, V]``; value head ``h`` uses query/key head ``h // (HV // H)``.
        g: ``[B, T, HV, K]``, natural log of the decay.
        scale: default ``K ** -0.5``.
        initial_state: ``[N, HV, K, V]``, default zeros.
        cu_seqlens: ``[N + 1]`` sequence boundaries inside one packed row (``B == 1``).

    Returns:
        ``o [B, T, HV, V]`` and the final state ``[N, HV, K, V]``.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635,
        eq. 3.
    """
    return recurrence(q, k, v, g[..., :, None], scale, initial_state, cu_seqlens)


def value_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One decay per channel of the value: ``S_t = S_{t-1} Diag(exp g_t) + k_t v_tᵀ``,
    ``o_t = scale · S_tᵀ q_t``.

    Args: as :func:`gated_linear_attention`, but g ``[B, T, HV, V]``.

    Source: Gated Slot Attention, arXiv:2409.07146, eq. 7 (its first pass; slots are values).
    """
    return recurrence(q, k, v, g[..., None, :], scale, initial_state, cu_seqlens)


def two_sided_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    gv: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A decay per key channel and one per value channel: ``S_t = Diag(exp g_t) S_{t-1} Diag(exp
    gv_t) + k_t v_tᵀ``.

    Args: as :func:`gated_linear_attention`, with a second gate gv ``[B, T, HV, V]``.

    Source: Fine-Tuning Pre-trained Transformers into Decaying Fast Weights, arXiv:2210.04243.
    """
    g = g[..., :, None] + gv[..., None, :]
    return recurrence(q, k, v, g, scale, initial_state, cu_seqlens)


def rwkv6(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Read before write: ``o_t = scale · S_{t-1}ᵀ q_t``,
    ``S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ``.

    RWKV-5 and RWKV-6 without the bonus ``scale · (Σ_c q_tc u_c k_tc) v_t`` of the own token.

    Args and returns: as :func:`gated_linear_attention`.

    Source: Eagle and Finch, arXiv:2404.05892, section 4.
    """
    return recurrence(q, k, v, g[..., :, None], scale, initial_state, cu_seqlens, exclusive=True)


def lcsm(
    e: Tensor | None,
    i: Tensor,
    s: Tensor,
    o: Tensor | None = None,
    ov: Tensor | None = None,
    expand: Callable[[Tensor], Tensor] = lambda x: x,
    insert: Callable[[Tensor], Tensor] = lambda x: x,
    shrink: Callable[[Tensor], Tensor] = lambda x: x,
    oscillate: Callable[[Tensor], Tensor] = torch.exp,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Expand, oscillate, shrink: ``m_t = a_t ⊙ m_{t-1} + e_t i_tᵀ``, ``y_t = scale · m_tᵀ s_t``.

    Args: as :func:`lsm_cuda.ops.chunk_lcsm`, but options are functions; ``oscillate`` gives a.

    Source: Unlocking the Secrets of Linear Complexity Sequence Model from A Unified Perspective,
    arXiv:2405.17383.
    """
    of_keys = None if o is None else oscillate(o if o.dim() > 1 else o.expand(i.shape[:3]))
    of_values = None if ov is None else oscillate(ov)
    if e is None:
        assert of_keys is not None
        e = 1 - of_keys
    else:
        e = expand(e)

    def update(S, i, e, of_keys, of_values):  # type: ignore[no-untyped-def]
        if of_keys is not None:
            S = S * (of_keys[..., None] if of_keys.dim() == 3 else of_keys[..., None, None])
        if of_values is not None:
            S = S * of_values[..., None, :]
        return S + outer(e, i)

    tokens = (insert(i), e, of_keys, of_values)
    return rank_one(update, shrink(s), tokens, scale, initial_state, cu_seqlens)
