"""The scan engine and its neighbours: element-wise recurrences, short convolutions, sLSTM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu, softplus

from ._common import each_token, sequences, stack


def scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log: bool = False,
    reverse: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The element-wise linear recurrence: ``h_t = a_t ⊙ h_{t-1} + x_t``.

    Args:
        x (Tensor): ``[B, T, D]``, real or complex.
        a (Tensor): ``[B, T, D]`` or ``[D]``, or its natural logarithm if ``log``.
        initial_state (Tensor, optional): ``[N, D]``.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences.
        reverse (bool): ``h_t = a_t ⊙ h_{t+1} + x_t``.
        order (Tensor, optional): ``[T]``, the token of each position.

    Returns:
        ``h [B, T, D]`` and the final state ``[N, D]``.
    """
    a = (a.exp() if log else a).expand(x.shape)
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    starts = [(0, x.shape[1])] if cu_seqlens is None else list(pairwise(cu_seqlens.tolist()))
    tokens = range(x.shape[1]) if order is None else order.tolist()
    h0 = x.new_zeros(N, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    a_of, x_of = a.unbind(1), x.unbind(1)
    outputs: dict[int, Tensor] = {}
    final = []
    for n, (start, end) in enumerate(starts):
        h = h0 if cu_seqlens is None else h0[n, None]
        for p in reversed(range(start, end)) if reverse else range(start, end):
            t = tokens[p]
            h = a_of[t] * h + x_of[t]
            outputs[t] = h
        final.append(h)
    state = torch.cat(final) if final else h0
    if not outputs:
        return x.new_empty(x.shape), state
    return torch.stack([outputs[t] for t in range(x.shape[1])], 1), state


def _bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt with its slope, ``1 / (2 sqrt x)``, bounded by 1000."""
    root = x.detach().sqrt()
    slope = 0.5 / root.clamp(min=0.5e-3)
    return root + slope * (x - x.detach())


def rg_lru(
    x: Tensor,
    i: Tensor,
    r: Tensor,
    c: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The real-gated linear recurrent unit: ``h_t = a_t ⊙ h_{t-1} + sqrt(1 − a_t²) ⊙ (σ(i_t) ⊙
    x_t)`` with ``log a_t = c ⊙ σ(r_t)``.

    Without an initial state, the first token of a sequence has the factor 1 for its root. The slope
    of the root ends at 1000.

    Args:
        x, i, r (Tensor): ``[B, T, D]``.
        c (Tensor): ``[D]``, ≤ 0; Griffin has −8 softplus of its parameter.

    Returns: as :func:`scan`.

    Source: Griffin, arXiv:2402.19427, eqs. 1-4, and the authors' code for first tokens and slope.
    """
    log_a = c * r.sigmoid()
    square = -(2 * log_a).expm1()  # 1 − a²
    multiplier = _bounded_sqrt(square)
    if initial_state is None and x.shape[1]:
        positions = torch.arange(x.shape[1], device=x.device)
        bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        firsts = {(b - 1 if reverse else a) for a, b in pairwise(bounds) if b > a}
        first = torch.tensor([int(p) in firsts for p in positions], device=x.device)
        if order is not None:
            first = torch.zeros_like(first).index_put((order.long(),), first)
        multiplier = torch.where(first[None, :, None], 1.0, multiplier)
    return scan(
        multiplier * i.sigmoid() * x, log_a, initial_state, cu_seqlens, True, reverse, order
    )


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    r"""RWKV-4's average: weights ``e^{k_i - (t-1-i) r}`` of earlier tokens, ``e^{u + k_t}`` of the
    token itself; ``r = e^w``.

    Args:
        w, u (Tensor): ``[D]``.
        k, v (Tensor): ``[B, T, D]``.
        initial_state (tuple, optional): numerator, denominator and the logarithm of their scale,
            each ``[N, D]``.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences.

    Returns:
        ``o [B, T, D]`` and the state after the last tokens.

    Source: RWKV, arXiv:2305.13048, appendix on the stable form.
    """
    bounds = [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    N = k.shape[0] if cu_seqlens is None else len(bounds) - 1
    zeros = k.new_zeros(N, k.shape[2])
    state = (zeros, zeros, zeros - torch.inf) if initial_state is None else initial_state
    outputs, ends = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        a, b, m = state if cu_seqlens is None else (s[n, None] for s in state)
        for k_t, v_t in each_token(k[:, start:end], v[:, start:end]):
            own = torch.maximum(m, u + k_t)
            past, new = (m - own).exp(), (u + k_t - own).exp()
            outputs.append((past * a + new * v_t) / (past * b + new))
            after = torch.maximum(m - w.exp(), k_t)
            past, new = (m - w.exp() - after).exp(), (k_t - after).exp()
            a, b, m = past * a + new * v_t, past * b + new, after
        ends.append((a, b, m))
    final = tuple(torch.cat(parts) for parts in zip(*ends, strict=True)) if ends else state
    o = torch.stack(outputs, 1) if outputs else v.new_empty(v.shape)
    return o, final  # type: ignore[return-value]


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    r"""Vision-RWKV's average over all tokens: weights ``e^{k_i - (|t-i|-1) w / T}`` of the others,
    ``e^{u + k_t}`` of the token itself; by a recurrence from either end.

    Args:
        w, u (Tensor): ``[D]``.
        k, v (Tensor): ``[B, T, D]``.

    Returns:
        ``o [B, T, D]``.

    Source: Vision-RWKV, arXiv:2403.02308, eq. 2.
    """

    def merge(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
        """Sums over e^m, m the larger one's; no gradient, as nothing depends on it."""
        m = torch.maximum(a[2], b[2]).detach()
        x, y = (torch.exp(s[2] - m) for s in (a, b))
        return [x * a[0] + y * b[0], x * a[1] + y * b[1], m]

    T = k.shape[1]
    token = [v, torch.ones_like(v), k]

    def sums(order: Sequence[int]) -> dict[int, list[Tensor]]:
        """What was met before each token."""
        zeros = k.new_zeros(k.shape[0], k.shape[2])
        state, found = [zeros, zeros, zeros - torch.inf], {}
        for t in order:
            found[t] = state
            state = merge([*state[:2], state[2] - w / T], [x[:, t] for x in token])
        return found

    past, future = sums(range(T)), sums(range(T - 1, -1, -1))
    own = [*token[:2], k + u]
    rows = [merge(merge(past[t], [x[:, t] for x in own]), future[t]) for t in range(T)]
    return torch.stack([a / b for a, b, _ in rows], 1) if rows else torch.empty_like(v)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mamba-1: ``h_t = exp(δ_t A) ⊙ h_{t-1} + δ_t u_t B_t``, ``y_t = (C_t · h_t + D u_t)
    silu(z_t)``; time before channels.

    Args:
        u, dt, z (Tensor): ``[B, T, D]``; to dt its bias ``[D]`` is added and softplus applied if
            asked.
        A (Tensor): ``[D, N]``; complex: y has ``2 Re(C_t · h_t)``.
        B, C (Tensor): ``[B, T, G, N]``, channel d in group ``d // (D // G)``; or ``[D, N]``.
        D (Tensor, optional): ``[D]``.
        initial_state (Tensor, optional): ``[Nseq, D, N]``.
        cu_seqlens (Tensor, optional): ``[Nseq + 1]`` boundaries of packed sequences.
        order (Tensor, optional): ``[T]``, the token of each position.

    Returns:
        ``y [B, T, D]`` and the final state ``[Nseq, D, N]``.

    Source: Mamba, arXiv:2312.00752.
    """
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    bounds = [0, u.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    channels = u.shape[2]
    walk = range(u.shape[1]) if order is None else order.tolist()

    def per_channel(x: Tensor) -> Sequence[Tensor]:
        """B or C of every token, for every channel."""
        if x.dim() == 2:
            return (x,) * u.shape[1]
        return x.repeat_interleave(channels // x.shape[2], 2).unbind(1)

    B_of, C_of, u_of, dt_of = per_channel(B), per_channel(C), u.unbind(1), dt.unbind(1)
    outputs: dict[int, Tensor] = {}
    final = []
    for n, (start, end) in enumerate(pairwise(bounds)):
        h = A.new_zeros(u.shape[0], *A.shape)
        if initial_state is not None:
            h = initial_state if cu_seqlens is None else initial_state[n, None]
        for t in walk[start:end]:
            drive = (dt_of[t] * u_of[t]).unsqueeze(-1)
            h = (dt_of[t].unsqueeze(-1) * A).exp() * h + drive * B_of[t]
            y = (C_of[t] * h).sum(-1)
            outputs[t] = 2 * y.real if y.is_complex() else y
        final.append(h)
    y = torch.stack([outputs[t] for t in sorted(outputs)], 1) if outputs else u.new_empty(u.shape)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * silu(z)
    return y, torch.cat(final) if final else A.new_empty(0, *A.shape)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = None,
    state_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Depthwise causal convolution: ``y_t = act(bias + Σ_j weight[:, W − 1 − j] ⊙ x_{t−j})``.

    Args:
        x: ``[B, T, D]``.
        weight: ``[D, W]``; the last tap weighs the current token.
        bias: ``[D]``, default zeros.
        initial_state: ``[N, D, S]``, S ≥ W − 1: the inputs before the first, default zeros.
        cu_seqlens: as :func:`gated_linear_attention`.
        activation: ``silu`` or None.
        state_size: S of the state returned, default W.

    Returns:
        ``y [B, T, D]`` and the last S inputs ``[N, D, S]``.

    Source: Dao-AILab's causal-conv1d; Mamba, arXiv:2312.00752, section 3.4.
    """
    if cu_seqlens is not None:
        runs = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            h0 = None if initial_state is None else initial_state[n : n + 1]
            runs.append(
                causal_conv1d(
                    x[:, start:end], weight, bias, h0, activation=activation, state_size=state_size
                )
            )
        return torch.cat([y for y, _ in runs], 1), torch.cat([s for _, s in runs])
    W = weight.shape[1]
    S = W if state_size is None else state_size
    before = x.new_zeros(x.shape[0], x.shape[2], max(S, W))
    if initial_state is not None:
        before = torch.cat([before, initial_state.to(x.dtype)], 2)
    inputs = torch.cat([before.transpose(1, 2), x], 1)
    rows = inputs.unbind(1)
    outputs = []
    for t in range(len(rows) - x.shape[1], len(rows)):
        y = (torch.stack(rows[t - W + 1 : t + 1], 1) * weight.T).sum(1)
        y = y if bias is None else y + bias
        outputs.append(y if activation is None else silu(y))
    return stack(outputs, x), inputs[:, inputs.shape[1] - S :].transpose(1, 2)


def slstm(
    x: Tensor,
    R: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gates i, f, z, o of ``x_t + h_{t−1} R``: ``m_t = max(log σ(f) + m_{t−1}, i)``,
    ``c_t = e^{log σ(f) + m_{t−1} − m_t} c_{t−1} + e^{i − m_t} tanh z``, n_t the same of 1, ``h_t =
    σ(o) c_t / n_t``; where ``n_{t−1} = 0`` there is no past.

    Args: x ``[B, T, 4, H, D]``, R ``[H, D, 4, D]``, states h, c, n, m ``[N, 4, H, D]``.

    Returns:
        ``h [B, T, H, D]`` and the state after the last token.

    Source: xLSTM, arXiv:2405.04517, eqs. 8-18.
    """

    def definition(x, state):  # type: ignore[no-untyped-def]
        B, _, _, H, D = x.shape
        zero = x.new_zeros(B, H, D)
        h, c, n, m = (zero,) * 4 if state is None else state[0].to(x.dtype).unbind(1)
        outputs = []
        for (x_t,) in each_token(x):
            i, f, z, o = (x_t + torch.einsum("bhd,hdge->bghe", h, R)).unbind(1)
            carried = torch.where(n == 0, -torch.inf, logsigmoid(f) + m)
            m = torch.maximum(carried, i)
            keep, write = (carried - m).exp(), (i - m).exp()
            c, n = keep * c + write * z.tanh(), keep * n + write
            h = o.sigmoid() * c / n
            outputs.append(h)
        return stack(outputs, zero[:, None].expand(B, 0, H, D)), (torch.stack((h, c, n, m), 1),)

    states = None if initial_state is None else (initial_state,)
    h, (state,) = sequences(definition, (x,), states, cu_seqlens)
    return h, state
