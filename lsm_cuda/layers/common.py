"""What every layer does around its operator: padding, heads, and its place in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..cache import Cache, LayerState

__all__ = [
    "as_rows",
    "check_hidden_states",
    "check_mask",
    "layer_index",
    "layer_state",
    "refuse_cache",
    "repad",
    "split_heads",
    "unpad",
]


def split_heads(x: Tensor, head_dim: int, groups: int = 1) -> Tensor:
    """``[B, T, h · D]`` to ``[B, T, h · groups, D]``, each head ``groups`` times in a row."""
    x = x.reshape(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def unpad(
    hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Drop padding: a masked batch becomes one packed row.

    Args:
        hidden_states: ``[B, T, D]``.
        attention_mask: ``[B, S]`` with S ≥ T, nonzero for tokens, 0 for padding; the last T columns
            belong to ``hidden_states`` (a mask that also covers cached tokens is longer).
        cu_seqlens: boundaries given by the caller, who has packed already.

    Returns:
        hidden states ``[1, tokens, D]``, the tokens' places in the flattened batch (for
        :func:`repad`), and ``cu_seqlens [B + 1]`` int32. A mask without padding, or no mask, gives
        the input back, None, and ``cu_seqlens``.

    Raises:
        ValueError: both given, a mask that is not ``[B, S]``, or hidden states of another shape or
            of integers.
    """
    check_hidden_states(hidden_states)
    B, T = hidden_states.shape[:2]
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("pass attention_mask or cu_seqlens, not both")
        if B != 1:
            raise ValueError(
                f"hidden_states must have B = 1 with cu_seqlens, got {list(hidden_states.shape)}"
            )
        return hidden_states, None, cu_seqlens
    if attention_mask is None:
        return hidden_states, None, None
    check_mask(attention_mask, B, T)
    mask = attention_mask[:, attention_mask.shape[1] - T :] != 0
    if bool(mask.all()):
        return hidden_states, None, None
    indices = mask.flatten().nonzero().flatten()
    bounds = torch.zeros(B + 1, dtype=torch.int32, device=mask.device)
    bounds[1:] = mask.sum(1).cumsum(0)
    return hidden_states.flatten(0, 1).index_select(0, indices)[None], indices, bounds


def check_hidden_states(hidden_states: Tensor, shape: str = "B, T, D") -> None:
    """Raises ValueError unless they have as many dimensions and are no integers."""
    if hidden_states.dim() != shape.count(",") + 1:
        raise ValueError(
            f"hidden_states must have shape [{shape}], got {list(hidden_states.shape)}"
        )
    if not (hidden_states.is_floating_point() or hidden_states.is_complex()):
        raise ValueError(f"hidden_states must be floating point, got {hidden_states.dtype}")


def check_mask(attention_mask: Tensor, batch: int, time: int) -> None:
    """Raises ValueError unless the mask is ``[B, S]`` with S ≥ T."""
    rank_and_batch = attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    if not rank_and_batch or attention_mask.shape[1] < time:
        raise ValueError(
            f"attention_mask must have shape [B, S] = [{batch}, {time} or more] and mark padding "
            f"with 0, got {list(attention_mask.shape)}"
        )


def repad(x: Tensor, indices: Tensor | None, batch: int, time: int) -> Tensor:
    """Undo :func:`unpad`: ``[1, tokens, D]`` to ``[B, T, D]``, zeros at padding."""
    if indices is None:
        return x
    rows = x.new_zeros(batch * time, x.shape[-1]).index_copy(0, indices, x[0])
    return rows.view(batch, time, -1)


def as_rows(
    hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """One sequence per row, from its first token on: for layers that look at whole sequences.

    Args:
        hidden_states, attention_mask, cu_seqlens: as :func:`unpad`.

    Returns:
        rows ``[N, S, D]``; which of their places are tokens, ``[N, S]`` bool, or None if all are;
        and the way back from such rows to the layout of ``hidden_states``, zeros at padding. Rows
        are zero behind their tokens. An empty sequence counts as one zero token, so that none has
        nothing to attend to.

    Raises:
        ValueError: as :func:`unpad`.
    """
    B, T = hidden_states.shape[:2]
    packed, indices, bounds = unpad(hidden_states, attention_mask, cu_seqlens)
    if bounds is None:
        return hidden_states, None, lambda rows: rows
    bounds = bounds.long()
    N, lengths = bounds.shape[0] - 1, bounds.diff().clamp(min=1)
    S = int(lengths.max()) if N else 0
    token = torch.arange(packed.shape[1], device=packed.device)
    owner = torch.searchsorted(bounds[1:], token, right=True)
    place = owner * S + token - bounds[owner]
    rows = packed.new_zeros(N * S, packed.shape[2]).index_copy(0, place, packed[0])
    valid = torch.arange(S, device=packed.device) < lengths[:, None]

    def back(x: Tensor) -> Tensor:
        return repad(x.flatten(0, 1).index_select(0, place)[None], indices, B, T)

    return rows.view(N, S, -1), valid, back


def refuse_cache(layer: nn.Module, cache: Cache | None) -> None:
    """Raises ValueError where a cache is given to a layer that looks at whole sequences."""
    if cache is not None:
        raise ValueError(
            f"{type(layer).__name__}: attends in both directions and cannot continue a sequence; "
            "past_key_values must be None"
        )


def layer_index(layer: nn.Module, layer_idx: int | None) -> int:
    """Raises ValueError where a cache is used by a layer that was not given a place in it."""
    if layer_idx is None:
        raise ValueError(
            f"{type(layer).__name__}: past_key_values needs the layer's place in it; "
            "construct the layer with layer_idx"
        )
    return layer_idx


def layer_state(layer: nn.Module, layer_idx: int | None, cache: Cache | None) -> LayerState | None:
    """The state that an earlier call of this layer left in the cache, if any."""
    return None if cache is None else cache.get(layer_index(layer, layer_idx))
