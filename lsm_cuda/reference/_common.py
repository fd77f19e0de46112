"""What the definitions share: packed sequences, and loops over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

States = tuple[Tensor, ...]


def sequences(
    definition: Callable[..., tuple[Tensor, States]],
    tokens: tuple[Tensor | None, ...],
    states: tuple[Tensor | None, ...] | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, States]:
    """``definition(*tokens, states)`` of each packed sequence, or of the batch at once."""
    if cu_seqlens is None:
        return definition(*tokens, states)
    runs = []
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        own = None if states is None else tuple(None if s is None else s[n, None] for s in states)
        runs.append(definition(*(None if x is None else x[:, start:end] for x in tokens), own))
    outputs, finals = zip(*runs, strict=True)
    return torch.cat(outputs, 1), tuple(torch.cat(f) for f in zip(*finals, strict=True))


def each_token(*tensors: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """``x[:, t]`` of every tensor, token by token; None stays.

    Taken apart at once: the gradient of an index is as long as the sequence, for every token.
    """
    length = next(x.shape[1] for x in tensors if x is not None)
    columns = ((None,) * length if x is None else x.unbind(1) for x in tensors)
    return zip(*columns, strict=True)


def stack(outputs: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(outputs, 1) if outputs else like.new_empty(like.shape)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    exclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """``S_t = e^{g_t} ⊙ S_{t-1} + k_t v_tᵀ`` with ``g_t`` broadcast over ``[K, V]``; ``o_t = scale
    · S_tᵀ q_t``, or of ``S_{t-1}`` if exclusive."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        runs = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            h0 = None if initial_state is None else initial_state[n : n + 1]
            parts = (None if x is None else x[:, start:end] for x in (q, k, v, g))
            runs.append(recurrence(*parts, scale, h0, None, exclusive))  # type: ignore[arg-type, call-arg]
        if not runs:
            return v.new_empty(v.shape), v.new_empty(0, v.shape[2], q.shape[3], v.shape[3])
        return torch.cat([o for o, _ in runs], 1), torch.cat([s for _, s in runs], 0)

    B, _, H, K = q.shape
    HV, V = v.shape[2:]
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    S = q.new_zeros(B, HV, K, V) if initial_state is None else initial_state.to(q.dtype)
    outputs = []
    for q_t, k_t, v_t, g_t in each_token(q, k, v, g):
        before = S
        if g is not None:
            S = S * g_t.exp()
        S = S + outer(k_t, v_t)
        read = before if exclusive else S
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, read))
    return stack(outputs, v), S


def rank_one(
    update: Callable[..., Tensor],
    q: Tensor,
    tokens: tuple[Tensor | None, ...],
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S_t = update(S_{t-1}, *tokens[t])``, ``o_t = scale · S_tᵀ q_t``; tokens start with v, and
    those with as many heads as q are per key head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def definition(q, v, *given):  # type: ignore[no-untyped-def]
        *rest, states = given
        B, _, _, K = q.shape
        HV, V = v.shape[2:]
        q, *own = (
            None if x is None else x.repeat_interleave(HV // x.shape[2], 2) for x in (q, *rest)
        )
        S = q.new_zeros(B, HV, K, V) if states is None else states[0].to(q.dtype)
        outputs = []
        for q_t, *token in each_token(q, v, *own):
            S = update(S, *token)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, S))
        return stack(outputs, v), (S,)

    states = None if initial_state is None else (initial_state,)
    o, (S,) = sequences(definition, (q, *tokens), states, cu_seqlens)
    return o, S
