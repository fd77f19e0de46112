"""Linear attention without a decay, its normalised form, and both directions at once."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from . import _chunk
from ._common import autocast, backwards, check_shape, no_autocast, one_minus_exp
from ._sums import ratio, step_sums, sums
from .simple_gla import chunk_simple_gla, decay_of

__all__ = [
    "bidirectional_linear_attn",
    "chunk_linear_attn",
    "chunk_rfa",
    "fused_chunk_linear_attn",
    "fused_recurrent_linear_attn",
    "linear_attn_step",
    "rfa_step",
]

States: TypeAlias = Tensor | tuple[Tensor, Tensor] | None


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: States = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    *,
    eps: float = 1e-10,
) -> tuple[Tensor, States]:
    r"""Linear attention over whole sequences; the feature map is already applied to q and k.

    ``S_t = S_{t-1} + k_t v_tᵀ``,   ``z_t = z_{t-1} + k_t``,   ``o_t = S_tᵀ q_t / z_t·q_t``, or
    ``o_t = scale · S_tᵀ q_t`` without normalisation.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        scale (float, optional): default ``K ** -0.5``. With normalize it matters only to eps.
        initial_state (optional): S ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs); with normalize
            the pair (S, z), z ``[N, 1, H, K]``, or S alone for z = 0. Default: zeros.
        output_final_state (bool): also return the state after the last token.
        normalize (bool): divide by the sum of the scores.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        eps (float): a denominator ``scale · z_t·q_t`` nearer to zero is replaced by ±eps, its sign
            kept, plus at zero; it then passes no gradient.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and None, S, or with normalize (S, z).

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in q, k, v and the states. The denominator is eight more columns
        of v, which is read and written once more for them; fp16 is computed in fp32 then.

    Source: Transformers are RNNs, arXiv:2006.16236, equations 18 to 20.

    Example:
        >>> q, k = (torch.nn.functional.elu(torch.randn(1, 100, 2, 32)) + 1 for _ in range(2))
        >>> v = torch.randn(1, 100, 2, 32)
        >>> o, (S, z) = chunk_linear_attn(q, k, v, output_final_state=True)
        >>> S.shape, z.shape
        (torch.Size([1, 2, 32, 32]), torch.Size([1, 1, 2, 32]))
    """
    q, k, v = autocast(q, k, v)
    if not normalize:
        if isinstance(initial_state, tuple):
            raise ValueError(
                "lsm::chunk_linear_attn: initial_state must be the tensor S without normalize, "
                "got a tuple"
            )
        return _chunk.chunk(
            "linear_attn", q, k, v, None, scale, initial_state, output_final_state, cu_seqlens
        )
    S, z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    group = v.shape[2] // q.shape[2]
    z = None if z is None else z.squeeze(1).repeat_interleave(group, 1)
    above, below, state = sums(
        "linear_attn", q, k, v, None, None, scale, (S, z), output_final_state, cu_seqlens
    )
    o = ratio(above, below, eps, v.dtype)
    return o, None if state is None else (state[0], state[1][:, None, ::group].contiguous())


def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: States = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, States]:
    """FLA's second name for :func:`chunk_linear_attn`."""
    return chunk_linear_attn(
        q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens
    )


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: States = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, States]:
    """:func:`chunk_linear_attn` under FLA's recurrent name, where normalize is off by default;
    ``reverse`` runs time backwards in every sequence, from its end, which reads and writes q, k, v
    and o once more."""

    if reverse:
        return backwards(
            chunk_linear_attn, (q, k, v), initial_state, cu_seqlens, scale=scale,
            output_final_state=output_final_state, normalize=normalize,
        )  # fmt: skip
    return chunk_linear_attn(
        q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens
    )


def linear_attn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | tuple[Tensor, Tensor],
    scale: float | None = None,
    *,
    eps: float = 1e-10,
) -> Tensor:
    r"""One token of :func:`chunk_linear_attn`; ``state`` is updated in place.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        state (Tensor or tuple): S ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs), contiguous; the
            pair (S, z) with z ``[B, 1, H, K]`` for the normalised form.
        scale (float, optional): default ``K ** -0.5``.
        eps (float): as in :func:`chunk_linear_attn`.

    Returns:
        ``o [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> q, k = (torch.rand(1, 2, 32) for _ in range(2))
        >>> state = torch.zeros(1, 2, 32, 32), torch.zeros(1, 1, 2, 32)
        >>> linear_attn_step(q, k, torch.randn(1, 2, 32), state).shape
        torch.Size([1, 2, 32])
    """
    if isinstance(state, Tensor):
        return _chunk.step("linear_attn", q, k, v, None, state, scale, "chunk_linear_attn")
    S, z = state
    above, below = step_sums(
        "linear_attn", q, k, v, None, None, (S, z.squeeze(1)), scale, "chunk_linear_attn"
    )
    return ratio(above, below, eps, v.dtype)


def chunk_rfa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    eps: float = 1e-10,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    r"""Gated random feature attention over whole sequences: a normalised moving average.

    ``S_t = e^{g_t} S_{t-1} + (1 − e^{g_t}) k_t v_tᵀ``, ``z`` alike with ``v = 1``, ``o_t = S_tᵀ q_t
    / z_t·q_t``.

    Args:
        q, k, v, scale, output_final_state, cu_seqlens, eps: as in :func:`chunk_linear_attn`.
            Random features give scores of both signs: the denominator may cross zero, where eps
            holds.
        g (Tensor): log of the forget gate ``[B, T, HV]``, natural log, ≤ 0, in the dtype of q or
            fp32.
        initial_state (tuple, optional): S ``[N, HV, K, V]`` and z ``[N, HV, K]``, fp32 (fp64 for
            fp64 inputs). Default: zeros.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v, and (S, z) or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: as :func:`chunk_linear_attn`; v is read and written once more for its weights too.

    Source: Random Feature Attention, arXiv:2103.02143, section 3.2.

    Example:
        >>> q, k, v = (torch.rand(1, 100, 2, 32) for _ in range(3))
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 2))
        >>> chunk_rfa(q, k, v, g)[0].shape
        torch.Size([1, 100, 2, 32])
    """
    q, k, v = autocast(q, k, v)
    above, below, state = sums(
        "simple_gla", q, k, v, g, one_minus_exp(g), scale, initial_state or (None, None),
        output_final_state, cu_seqlens,
    )  # fmt: skip
    return ratio(above, below, eps, v.dtype), state


def rfa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: tuple[Tensor, Tensor],
    scale: float | None = None,
    *,
    eps: float = 1e-10,
) -> Tensor:
    """One token of :func:`chunk_rfa`: ``q``, ``k [B, H, K]``, ``v [B, HV, V]``, ``g [B, HV]``;
    both states are updated in place. Returns ``[B, HV, V]``."""
    above, below = step_sums("simple_gla", q, k, v, g, one_minus_exp(g), state, scale, "chunk_rfa")
    return ratio(above, below, eps, v.dtype)


def bidirectional_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    eps: float = 1e-10,
) -> Tensor:
    r"""Non-causal linear attention: every token reads all tokens of its sequence.

    ``o_t = scale · Σ_s a_ts (q_t·k_s) v_s``, divided by ``scale · Σ_s a_ts (q_t·k_s)`` with
    normalize. Without g ``a_ts = 1``; with g it is the decay of the recurrence run forwards for
    ``s ≤ t`` and backwards for ``s > t``: ``exp Σ_{s<r≤t} g_r`` and ``exp Σ_{t≤r<s} g_r``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``, HV a multiple of H.
        g (Tensor, optional): log decay ``[B, T, HV]``, or ``[HV]`` for every token; natural log,
            ≤ 0.
        scale (float, optional): default ``K ** -0.5``.
        normalize (bool): divide by the sum of the scores.
        mask (Tensor, optional): ``[B, T]``, 0 or False where a token is padding: it is not read and
            decays nothing; what is returned in its place means nothing.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        eps (float): as in :func:`chunk_linear_attn`.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in q, k, v and g. Without g and cu_seqlens two matrix products; else
        the causal operator forwards and on flipped copies, minus the diagonal that both count.
        fp16 is computed in fp32.

    Source: Transformers are RNNs, arXiv:2006.16236, equation 6.

    Example:
        >>> q, k, v = (torch.rand(1, 100, 2, 32) for _ in range(3))
        >>> bidirectional_linear_attn(q, k, v, normalize=True).shape
        torch.Size([1, 100, 2, 32])
    """
    q, k, v = autocast(q, k, v)
    dtype = v.dtype
    if q.dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    if g is not None and g.dim() == 1:
        check_shape("bidirectional_linear_attn", "g", g, "[HV]", v.shape[2:3])
        g = decay_of("bidirectional_linear_attn", q, v, None, g)
    if g is not None and g.dtype != torch.float32:
        g = g.to(q.dtype)
    if mask is not None:
        padding = mask == 0
        k = k.masked_fill(padding[..., None, None], 0)
        g = None if g is None else g.masked_fill(padding[..., None], 0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(q):  # which would make fp16 again of what was widened
        above = _both_directions(q, k, v, g, scale, cu_seqlens)
        if not normalize:
            return above.to(dtype)
        ones = v.new_ones(1).expand(*v.shape[:3], 1)
        below = _both_directions(q, k, ones, g, scale, cu_seqlens)
    return ratio(above, below, eps, dtype)


def _both_directions(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    B, T, H, _ = q.shape
    grouped = v.view(B, T, H, v.shape[2] // H, v.shape[3])  # value heads beside their key head
    if g is None and cu_seqlens is None:
        S = torch.einsum("bthk,bthrv->bhkrv", k, grouped)
        return (torch.einsum("bthk,bhkrv->bthrv", q, S) * scale).flatten(2, 3)

    to_here, _ = chunk_simple_gla(q, k, v, g, scale=scale, cu_seqlens=cu_seqlens)
    from_here, _ = backwards(chunk_simple_gla, (q, k, v, g), None, cu_seqlens, scale=scale)
    own = (q * k).sum(-1)[..., None, None] * grouped * scale
    return to_here + (from_here - own.flatten(2, 3))
