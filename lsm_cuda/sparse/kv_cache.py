"""A key/value cache with a policy: which tokens a step keeps, and which of them it reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import KVBuffer
from ..modules import RotaryEmbedding
from ..ops._common import accumulation_dtype
from ..ops.attn_mask import AttnMask
from ..ops.block_lists import BlockLists
from ..ops.selection import ScoreRule, block_scores
from ..ops.sparse_attn import block_sparse_attn

__all__ = ["KVCache", "Policy", "attention_mass"]


class Policy:
    """What a :class:`KVCache` keeps and reads. A policy holds the state of one cache.

    This one keeps and reads everything.
    """

    cache: KVCache

    def prompt_mask(self, q: Tensor) -> AttnMask:
        """What queries ``[B, T, Hq, K]`` of a prompt see."""
        return AttnMask(causal=True)

    def begin(self, q: Tensor, lse: Tensor) -> None:
        """After the prompt: its queries ``[B, T, Hq, K]`` and their log-sum-exps ``[B, Hq, T]``."""

    def append(self) -> None:
        """After one more token was put at the end of the cache."""

    def release(self) -> None:
        """After the cache was emptied."""

    def attend(self, q: Tensor) -> Tensor:
        """The last token's query ``[B, 1, Hq, K]`` over the cache, ``[B, 1, Hq, V]``."""
        return self.cache.read(q)


class KVCache:
    """Keys and values of one attention layer while it generates.

    :class:`PagedKVCache` has them in pages that many caches share, :class:`QuantizedKVCache` in few
    bits, the first in few bits too if asked; policies do not know.

    Args:
        policy: which of them are kept and read; ``kv_evict``, ``kv_pages`` and ``kv_tokens`` have
            them. Default: all.
        scale: of scores; default ``K ** -0.5``.
        rotary: if given, queries and keys come without positions and are turned here, by their
            place in the cache: a policy that drops tokens moves the others together.

    Every policy of tokens to keep or to read works on prompts and steps alike through two calls.

    Example:
        >>> from lsm_cuda.sparse import StreamingLLM
        >>> cache = KVCache(StreamingLLM(window=8, sinks=2))
        >>> q, k, v = torch.randn(1, 20, 4, 16), *torch.randn(2, 1, 20, 2, 16)
        >>> cache.prefill(q, k, v).shape, len(cache)
        (torch.Size([1, 20, 4, 16]), 10)
        >>> cache.step(q[:, :1], k[:, :1], v[:, :1]).shape, len(cache)
        (torch.Size([1, 1, 4, 16]), 10)
    """

    def __init__(
        self,
        policy: Policy | None = None,
        scale: float | None = None,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        self.policy = Policy() if policy is None else policy
        if "cache" in vars(self.policy):
            raise ValueError(
                f"KVCache: {type(self.policy).__name__} has a cache already; a policy holds the "
                "state of one, make another"
            )
        self.policy.cache = self
        self.scale = scale
        self.rotary = rotary
        self.buffer: KVBuffer | None = None
        self.seen = 0
        #: B, Hkv, K, V and dtype of its tokens, once there are any
        self.kind: tuple[int | torch.dtype, ...] | None = None
        self.released = False
        #: the last query as it came, where ``rotary`` turns it
        self.unturned: Tensor | None = None

    def __len__(self) -> int:
        """Tokens that are kept here; a policy by heads keeps theirs in caches of its own."""
        return 0 if self.buffer is None else self.buffer.length

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The prompt: causal attention, dense but for heads whose policy has a mask for prompts
        too (:class:`DuoAttention`); then the policy's choice of what stays.

        Args:
            q: ``[B, T, Hq, K]``.
            k, v: ``[B, T, Hkv, K]`` and ``[B, T, Hkv, V]``.

        Returns:
            ``[B, T, Hq, V]``.

        Raises:
            RuntimeError: tokens were here before.
        """
        if self.seen:
            raise RuntimeError("KVCache: prefill comes first, once; then step")
        self._admit(k, v)
        if not k.shape[1]:
            return q.new_empty(*q.shape[:3], v.shape[3])
        self.store(k, v)
        self.seen = k.shape[1]
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        mask = self.policy.prompt_mask(q)
        o, lse = block_sparse_attn(q, k, v, None, mask, self.scale, return_lse=True)
        self.policy.begin(q, lse)
        return o

    @torch.no_grad()
    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One more token ``[B, 1, H, ·]``: it is kept, then its query reads what the policy says.

        Returns:
            ``[B, 1, Hq, V]``.

        Raises:
            RuntimeError: tokens unlike those before, or a cache that was released.
        """
        if q.shape[1] != 1:
            raise RuntimeError(f"KVCache: a step is one token, q [B, 1, Hq, K], got {[*q.shape]}")
        self._admit(k, v)
        self.store(k, v)
        self.seen += 1
        self.policy.append()
        if self.rotary is not None:
            self.unturned, q = q, self.rotary(q, len(self) - 1)
        return self.policy.attend(q)

    def _admit(self, k: Tensor, v: Tensor) -> None:
        """Refuse tokens that do not belong to those before them."""
        if self.released:
            raise RuntimeError("KVCache: it was released; make another")
        kind = (k.shape[0], *k.shape[2:], v.shape[3], k.dtype)
        if self.kind is None:
            self.kind = kind
        elif kind != self.kind or v.shape[:3] != k.shape[:3]:
            raise RuntimeError(
                f"KVCache: B, Hkv, K, V and dtype must be {self.kind} as before, got {kind}"
            )

    def release(self) -> None:
        """Give back the memory of what is kept; no more tokens may come."""
        self.buffer, self.released = None, True
        self.policy.release()

    def part(self, policy: Policy | None) -> KVCache:
        """An empty cache of the same kind, for some of the heads."""
        return KVCache(policy, self.scale, self.rotary)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Put tokens ``[B, T, Hkv, ·]`` at the end."""
        if self.buffer is None:
            self.buffer = KVBuffer.start(k, v)
        else:
            self.buffer.append(k, v)

    def raw(self) -> tuple[Tensor, Tensor]:
        """Kept keys ``[B, S, Hkv, K]``, as they came, and values."""
        assert self.buffer is not None
        n = self.buffer.length
        return self.buffer.keys[:, :n], self.buffer.values[:, :n]

    def kept(self) -> tuple[Tensor, Tensor]:
        """Kept keys with their positions, and values."""
        k, v = self.raw()
        return (k if self.rotary is None else self.rotary(k)), v

    def newest(self) -> Tensor:
        """The last token's key ``[B, Hkv, K]``, with its position."""
        k = self.raw()[0][:, -1:]
        return (k if self.rotary is None else self.rotary(k, len(self) - 1))[:, 0]

    def replace(self, k: Tensor, v: Tensor) -> None:
        """Put tokens ``[B, T, Hkv, ·]`` in the place of the last T."""
        keys, values = self.raw()
        keys[:, -k.shape[1] :], values[:, -v.shape[1] :] = k, v

    def taken(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys as they came, and values, of tokens as :meth:`keep` names them."""
        k, v = self.raw()
        return select_tokens(k, index), select_tokens(v, index)

    def keep(self, index: Tensor) -> None:
        """Drop all tokens but ``index [B, Hkv, n]`` of each head, or ``[n]`` of all."""
        self.buffer = KVBuffer.start(*self.taken(index))

    def keep_ends(self, first: int, last: int) -> None:
        """Tokens that are not of the ``first`` or the ``last`` may be dropped."""
        n = len(self)
        if n > first + last:
            token = torch.arange(n, device=self.raw()[0].device)
            self.keep(token[(token < first) | (token >= n - last)])

    def read(self, q: Tensor, mask: AttnMask | None = None) -> Tensor:
        """Exact attention of the last token over what is kept, places as in the cache."""
        k, v = self.kept()
        return block_sparse_attn(q, k, v, None, mask, self.scale)

    def read_tokens(self, q: Tensor, index: Tensor, log_weight: Tensor | None = None) -> Tensor:
        """Exact attention over tokens ``index [B, heads, n]``, heads Hkv or Hq, -1 for none.

        Args:
            q: ``[B, 1, Hq, K]``.
            index: tokens of each list.
            log_weight: like ``index``, added to scores.
        """
        k, v = (take_tokens(x, index) for x in self.kept())
        o, _ = attend_taken(q, k, v, index, self.scale, log_weight)
        return o

    def read_pages(self, q: Tensor, pages: Tensor, page_size: int) -> Tensor:
        """Exact attention over pages ``[B, heads, n]`` of the cache, -1 for none."""
        k, v = self.kept()
        lists = BlockLists.from_indices(pages[:, :, None], 1, k.shape[1], 1, page_size)
        return block_sparse_attn(q, k, v, lists, None, self.scale)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``x [B, S, Hkv, D]`` at ``index [B, heads, n]``: ``[B, n, heads, D]``; -1 takes any."""
    B, S, H, D = x.shape
    heads, n = index.shape[1:]
    x = x.transpose(1, 2)[:, :, None].expand(B, H, heads // H, S, D)
    at = index.clamp(min=0).view(B, H, heads // H, n, 1).expand(B, H, heads // H, n, D)
    return x.gather(3, at).flatten(1, 2).transpose(1, 2)


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """As :func:`take_tokens`, or the tokens ``index [n]`` of all heads."""
    return x.index_select(1, index) if index.dim() == 1 else take_tokens(x, index)


def turn_taken(rotary: RotaryEmbedding, k: Tensor, index: Tensor) -> Tensor:
    """``k [B, n, heads, K]`` turned to places ``index [B, heads, n]``."""
    turned = rotary(k.transpose(1, 2).flatten(0, 1)[:, :, None], index.flatten(0, 1))
    return torch.unflatten(turned[:, :, 0], 0, index.shape[:2]).transpose(1, 2)


def attend_tokens(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """One query over tokens ``index [B, heads, n]``: ``o [B, 1, Hq, V]`` and ``lse [B, Hq, 1]``."""
    return attend_taken(q, take_tokens(k, index), take_tokens(v, index), index, scale)


def attend_taken(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    scale: float | None,
    log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same over tokens that were taken, ``[B, n, heads, D]``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, acc = index.shape[1], accumulation_dtype(q)
    qs = torch.unflatten(q[:, 0], 1, (heads, -1)).to(acc)  # [B, heads, G, K]
    score = scale * torch.einsum("bhgd,bnhd->bhgn", qs, k.to(acc))
    if log_weight is not None:
        score = score + log_weight[:, :, None]
    score = score.masked_fill((index < 0)[:, :, None], -torch.inf)
    lse = score.logsumexp(-1)
    p = (score - lse[..., None]).exp().nan_to_num(0)
    o = torch.einsum("bhgn,bnhd->bhgd", p, v.to(acc)).flatten(1, 2)[:, None]
    return o.to(q.dtype), lse.flatten(1)[..., None]


def attention_mass(q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None) -> Tensor:
    """What every key gets of all queries' causal attention, without the map of it.

    Args:
        q: ``[B, T, Hq, K]``, the last tokens of the keys' sequence.
        k: ``[B, S, Hkv, K]``.
        lse: ``[B, Hq, T]``, log-sum-exps of the queries over these keys.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, Hq, S]``: sums over queries of their softmax.

    Example:
        >>> q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 5, 2, 8)
        >>> lse = torch.einsum("bthd,bshd->bhts", q, k).logsumexp(-1)
        >>> attention_mass(q, k, lse, scale=1).sum(-1).allclose(torch.ones(1, 2))
        True
    """
    T, S = q.shape[1], k.shape[1]
    rule = ScoreRule.columns(T, offset=S - T)
    return block_scores(q, k, rule, scale, lse)[:, :, 0]


def by_group(x: Tensor, groups: int) -> Tensor:
    """Sum of ``[B, Hq, S]`` over the query heads that share a key head: ``[B, Hkv, S]``."""
    return torch.unflatten(x, 1, (groups, -1)).sum(2)


def pages_of(x: Tensor, size: int, value: float) -> Tensor:
    """``[B, S, H, D]`` as ``[B, pages, size, H, D]``, filled up with ``value``."""
    pages = -(-x.shape[1] // size)
    return torch.unflatten(
        F.pad(x, (0, 0, 0, 0, 0, pages * size - x.shape[1]), value=value), 1, (pages, size)
    )
