"""What a model remembers between calls: one state per layer, whatever the layer's kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sparse import KVCache

__all__ = ["Cache", "KVBuffer", "LayerState"]


@dataclass
class KVBuffer:
    """Keys and values of softmax attention, ``[B, S, H, D]``, in buffers that grow by doubling.

    A step then writes one row instead of copying the whole history.
    """

    keys: Tensor
    values: Tensor
    length: int

    @classmethod
    def start(cls, keys: Tensor, values: Tensor) -> KVBuffer:
        """Holds ``keys`` and ``values`` themselves; nothing is copied."""
        return cls(keys, values, keys.shape[1])

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``[B, T, H, D]`` and return all keys and values so far."""
        end = self.length + keys.shape[1]
        if end > self.keys.shape[1]:
            self.reserve(max(end, 2 * self.keys.shape[1]))
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end
        return self.keys[:, :end], self.values[:, :end]

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens in total."""
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            if capacity > old.shape[1]:
                new = old.new_empty(old.shape[0], capacity, *old.shape[2:])
                new[:, : self.length] = old[:, : self.length]
                setattr(self, name, new)


@dataclass
class LayerState:
    """State of one layer; a layer fills the fields that its kind needs.

    Attributes:
        recurrent_state: ``[N, H, K, V]`` fp32, or a tuple where the operator keeps more than one
            tensor, N first in each; decode steps update it in place.
        conv_state: ``[N, D, W]`` per short convolution; decode steps update it in place.
        attn_state: keys and values of softmax attention.
        windows: these compressed, one for each window of tokens that is whole.
        kv_cache: these under a policy, which drops or skips some of them.
        lengths: ``[N]`` int64, tokens of each sequence so far, for layers that need positions.
        seen: tokens processed so far, padding included.
    """

    recurrent_state: Tensor | tuple[Tensor, ...] | None = None
    conv_state: tuple[Tensor, ...] | None = None
    attn_state: KVBuffer | None = None
    windows: KVBuffer | None = None
    kv_cache: KVCache | None = None
    lengths: Tensor | None = None
    seen: int = 0

    def tensors(self) -> Iterator[Tensor]:
        if isinstance(self.recurrent_state, Tensor):
            yield self.recurrent_state
        else:
            yield from self.recurrent_state or ()
        yield from self.conv_state or ()
        if self.lengths is not None:
            yield self.lengths
        for kv in (self.attn_state, self.windows):
            if kv is not None:
                yield from (kv.keys, kv.values)
        if self.kv_cache is not None:
            yield from self.kv_cache.raw()


@dataclass
class Cache:
    """States of all layers of one model, indexed by ``layer_idx``.

    Layers read their state from it and write it back; callers only hand it from call to call.

    Example:
        >>> cache = Cache()
        >>> cache.get_seq_length()
        0
    """

    layers: dict[int, LayerState] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer_idx: int) -> LayerState:
        return self.layers[layer_idx]

    def get(self, layer_idx: int) -> LayerState | None:
        """The layer's state, or None before its first call."""
        return self.layers.get(layer_idx)

    def update(
        self,
        layer_idx: int,
        *,
        recurrent_state: Tensor | tuple[Tensor, ...] | None = None,
        conv_state: tuple[Tensor, ...] | None = None,
        attn_state: KVBuffer | None = None,
        kv_cache: KVCache | None = None,
        lengths: Tensor | None = None,
        offset: int = 0,
    ) -> LayerState:
        """Replace the given parts of a layer's state and count ``offset`` more tokens."""
        state = self.layers.setdefault(layer_idx, LayerState())
        if recurrent_state is not None:
            state.recurrent_state = recurrent_state
        if conv_state is not None:
            state.conv_state = conv_state
        if attn_state is not None:
            state.attn_state = attn_state
        if kv_cache is not None:
            state.kv_cache = kv_cache
        if lengths is not None:
            state.lengths = lengths
        state.seen += offset
        return state

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Tokens seen by a layer; by default, by any layer."""
        if layer_idx is None:
            return max((state.seen for state in self.layers.values()), default=0)
        state = self.layers.get(layer_idx)
        return 0 if state is None else state.seen

    def select(self, indices: Tensor) -> None:
        """Keep the sequences ``indices [M]``, in that order; one may appear several times.

        This is what beam search (reordering) and finished sequences (dropping) need.
        """
        self._map(lambda t: t.index_select(0, indices.to(t.device)))

    def clone(self) -> Cache:
        """An independent copy, for branching off a shared prefix: steps update states in place."""
        copy = Cache(
            {
                i: replace(s, attn_state=_shallow(s.attn_state), windows=_shallow(s.windows))
                for i, s in self.layers.items()
            }
        )
        copy._map(torch.clone)
        return copy

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(
            t.numel() * t.element_size() for state in self.layers.values() for t in state.tensors()
        )

    def _map(self, f: Callable[[Tensor], Tensor]) -> None:
        if any(state.kv_cache is not None for state in self.layers.values()):
            raise ValueError("Cache: sequences of a cache with a policy cannot be moved or copied")
        for state in self.layers.values():
            if isinstance(state.recurrent_state, Tensor):
                state.recurrent_state = f(state.recurrent_state)
            elif state.recurrent_state is not None:
                state.recurrent_state = tuple(map(f, state.recurrent_state))
            if state.conv_state is not None:
                state.conv_state = tuple(map(f, state.conv_state))
            if state.lengths is not None:
                state.lengths = f(state.lengths)
            for kv in (state.attn_state, state.windows):
                if kv is not None:
                    kv.keys, kv.values = f(kv.keys), f(kv.values)


def _shallow(kv: KVBuffer | None) -> KVBuffer | None:
    return None if kv is None else KVBuffer(kv.keys, kv.values, kv.length)
