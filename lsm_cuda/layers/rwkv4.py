"""RWKV-4's time mixing, compatible with transformers' Rwkv, and the attention-free transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import aft_full, aft_simple, wkv4, wkv4_step
from ..ops._common import accumulation_dtype
from ._gated import TokenShift
from .common import as_rows
from .recurrent import Call, RecurrentLayer

__all__ = ["AFT", "RWKV4Attention"]

State = tuple[Tensor, ...]


class RWKV4Attention(RecurrentLayer):
    """RWKV-4: shifted tokens, an average of values with fading weights, and a gate.

    Args:
        hidden_size: width of input and output.
        attention_hidden_size: width of keys and values. Default: ``hidden_size``.
        layer_idx: place in the cache; needed to use one.

    Parameters are those of transformers' ``RwkvSelfAttention``: ``time_decay``, ``time_first``,
    ``time_mix_key``, ``time_mix_value``, ``time_mix_receptance``, ``key``, ``value``,
    ``receptance`` and ``output``.

    Source: RWKV: Reinventing RNNs for the Transformer Era, arXiv:2305.13048, section 3.

    Example:
        >>> RWKV4Attention(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        attention_hidden_size: int | None = None,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        width = hidden_size if attention_hidden_size is None else attention_hidden_size
        # Memories from a hundred tokens to less than one.
        self.time_decay = nn.Parameter(torch.linspace(-5, 3, width))
        self.time_first = nn.Parameter(torch.full((width,), 0.3).log())
        for name in ("key", "value", "receptance"):
            mix = torch.linspace(0, 1, hidden_size)[None, None]
            self.register_parameter(f"time_mix_{name}", nn.Parameter(mix))
        self.time_shift = TokenShift()
        self.key = nn.Linear(hidden_size, width, bias=False)
        self.value = nn.Linear(hidden_size, width, bias=False)
        self.receptance = nn.Linear(hidden_size, width, bias=False)
        self.output = nn.Linear(width, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        delta = call.convolve(self.time_shift, x) - x
        k = self.key(x + delta * (1 - self.get_parameter("time_mix_key")))
        v = self.value(x + delta * (1 - self.get_parameter("time_mix_value")))
        r = self.receptance(x + delta * (1 - self.get_parameter("time_mix_receptance")))
        o = call.run(_wkv4, _wkv4_step, k, v, w=self.time_decay, u=self.time_first)
        y: Tensor = self.output(r.sigmoid() * o)
        return y


def _wkv4(k: Tensor, v: Tensor, **rest: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    return wkv4(k=k, v=v, **rest)  # type: ignore[arg-type]


def _wkv4_step(k: Tensor, v: Tensor, **rest: Tensor) -> Tensor:
    return wkv4_step(k=k, v=v, **rest)  # type: ignore[arg-type]


class AFT(RecurrentLayer):
    """The attention-free transformer: a softmax per channel over keys and pairs of positions.

    Args:
        hidden_size: width of input and output.
        max_seqlen: positions that have weights (AFT-full), and the longest sequence. None: no
            positions (AFT-simple), whose state is three numbers a channel.
        rank: of the positions' weights as a product, ``u @ v.T``. None: all of them, ``wbias``.
        layer_idx: place in the cache; needed to use one.

    Parameters are ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, and, of positions,
    aft-pytorch's ``wbias [max_seqlen, max_seqlen]``, or the paper's ``u`` and ``v``
    ``[max_seqlen, rank]``. With positions a cache holds the keys and values of ``max_seqlen``
    tokens, and a step reads them all.

    Raises:
        ValueError: a rank without positions; in a call, a sequence of more than ``max_seqlen``.

    Source: An Attention Free Transformer, arXiv:2105.14103, section 3.

    Example:
        >>> AFT(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
        >>> AFT(hidden_size=16, max_seqlen=32)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        max_seqlen: int | None = None,
        rank: int | None = None,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        if rank is not None and max_seqlen is None:
            raise ValueError("AFT: rank is of the weights of positions, which need max_seqlen")
        self.max_seqlen = max_seqlen
        self.rank = rank
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if max_seqlen is None:
            return
        names, width = (("wbias",), max_seqlen) if rank is None else (("u", "v"), rank)
        for name in names:
            weight = nn.init.xavier_uniform_(torch.empty(max_seqlen, width))
            self.register_parameter(name, nn.Parameter(weight))

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.max_seqlen is None:
            o = call.run(aft_simple, _aft_step, q, k, v)
        else:
            o = call.run(self._full, self._full_step, q, k, v)
        y: Tensor = self.o_proj(o)
        return y

    def _pairs(self) -> Tensor:
        """``[max_seqlen, max_seqlen]``."""
        if self.rank is None:
            return self.get_parameter("wbias")
        return self.get_parameter("u") @ self.get_parameter("v").T

    def _full(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial_state: State | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, State | None]:
        """A state is keys and values, ``[N, max_seqlen, D]`` each, and how many there are."""
        T, pairs = q.shape[1], self._pairs()
        if initial_state is None and cu_seqlens is None and not output_final_state:
            self._check_length(T)
            return aft_full(q, k, v, pairs[:T, :T]), None
        rows, _, back = as_rows(torch.cat([q, k, v], 2), None, cu_seqlens)
        q, k, v = rows.chunk(3, 2)
        N, T, D = q.shape
        new = q.new_full((N,), T, dtype=torch.long)
        if cu_seqlens is not None:
            new = cu_seqlens.diff().long()
        if initial_state is None:
            blank = k.new_zeros(N, len(pairs), D, dtype=accumulation_dtype(k))
            initial_state = (blank - torch.inf, blank, torch.zeros_like(new))
        keys, values, before = initial_state
        after = before + new
        if N > 0:
            self._check_length(int(after.max()))
        # Behind a row's tokens nothing is written, but a row without any has a zero: there is a key
        # to divide by, which the first token replaces.
        own = torch.arange(T, device=q.device)
        written = own < new.masked_fill(after == 0, 1)[:, None]
        place = (before[:, None] + own).clamp(max=len(pairs) - 1)
        row = torch.arange(N, device=q.device)[:, None].expand_as(place)
        at = row[written], place[written]
        keys = keys.index_put(at, k[written].to(keys.dtype))
        values = values.index_put(at, v[written].to(values.dtype))
        o = self._read(q, keys, values, pairs, place)
        return back(o), (keys, values, after) if output_final_state else None

    def _full_step(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        keys, values, length = state
        if len(length):
            self._check_length(int(length.max()) + 1)
        row = torch.arange(len(length), device=length.device)
        keys[row, length], values[row, length] = k.to(keys.dtype), v.to(values.dtype)
        o = self._read(q[:, None], keys, values, self._pairs(), length[:, None])[:, 0]
        length += 1
        return o

    @staticmethod
    def _read(q: Tensor, keys: Tensor, values: Tensor, pairs: Tensor, place: Tensor) -> Tensor:
        """Queries at ``place [N, T]`` of what is there."""
        S = int(place.max()) + 1 if place.numel() else place.shape[1]
        seen = torch.arange(S, device=q.device) <= place[..., None]
        pairs = pairs[:, :S][place].masked_fill(~seen, -torch.inf)
        return aft_full(q, keys[:, :S], values[:, :S], pairs, causal=False).to(q.dtype)

    def _check_length(self, tokens: int) -> None:
        if self.max_seqlen is not None and tokens > self.max_seqlen:
            raise ValueError(
                f"AFT: a sequence of {tokens} tokens is longer than max_seqlen = {self.max_seqlen}"
            )


def _aft_step(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """A token is a sequence of one; its state is written over the old one."""
    o, after = aft_simple(q[:, None], k[:, None], v[:, None], state, True)  # type: ignore[arg-type]
    for old, new in zip(state, after or (), strict=True):
        old.copy_(new)
    return o[:, 0]
