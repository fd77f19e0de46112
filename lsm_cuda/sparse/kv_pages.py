"""Cache policies that keep everything and read some pages of it, and policies of heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._common import accumulation_dtype
from ..ops.attn_mask import AttnMask
from ..ops.sparse_attn import block_sparse_attn
from ._pattern import each
from .kv_cache import KVCache, Policy, pages_of
from .kv_evict import StreamingLLM

__all__ = [
    "DuoAttention",
    "LServe",
    "LongHeads",
    "Quest",
    "ReSA",
]


class Quest(Policy):
    """Reads the pages whose bounds promise the largest scores, head by head.

    A page's score is ``Σ_d max(q_d max_d, q_d min_d)``, no less than that of any of its keys.

    Args:
        budget: tokens that are read, in pages; the current page is one of them.
        page_size: tokens of a page, 16, 32, 64 or 128.
        logical: bounds are kept of parts of a page of so many tokens, and a page counts as its
            best part (LServe); default the whole page.
        reuse: steps that share one choice.
        shared: query heads that share a key head share the choice, by the sum of their scores.

    Source: Quest, arXiv:2406.10774; LServe, arXiv:2502.14866.
    """

    def __init__(
        self,
        budget: int = 1024,
        page_size: int = 16,
        logical: int | None = None,
        reuse: int = 1,
        shared: bool = False,
    ) -> None:
        self.pages = max(budget // page_size, 1)
        self.page_size = page_size
        self.logical = page_size if logical is None else logical
        if page_size % self.logical:
            raise ValueError(f"Quest: logical must divide page_size, got {logical} and {page_size}")
        self.reuse, self.shared = reuse, shared
        self.steps = 0

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, _ = self.cache.kept()
        self.low = pages_of(k, self.logical, torch.inf).amin(2)  # [B, parts, Hkv, K]
        self.high = pages_of(k, self.logical, -torch.inf).amax(2)

    def append(self) -> None:
        new, part = self.cache.newest(), (len(self.cache) - 1) // self.logical
        if not hasattr(self, "low"):
            self.low, self.high = new[:, None].clone(), new[:, None].clone()
            return
        if part == self.low.shape[1]:
            self.low = torch.cat([self.low, new[:, None]], 1)
            self.high = torch.cat([self.high, new[:, None]], 1)
        else:
            self.low[:, part] = torch.minimum(self.low[:, part], new)
            self.high[:, part] = torch.maximum(self.high[:, part], new)

    def score(self, q: Tensor) -> Tensor:
        """``[B, heads, pages]``."""
        H, acc = self.low.shape[2], accumulation_dtype(q)
        qs = torch.unflatten(q[:, 0], 1, (H, -1)).to(acc)  # [B, H, G, K]
        up, down = qs.clamp(min=0), qs.clamp(max=0)
        best = torch.einsum("bhgd,bphd->bhgp", up, self.high.to(acc))
        best = best + torch.einsum("bhgd,bphd->bhgp", down, self.low.to(acc))
        best = best.sum(2) if self.shared else best.flatten(1, 2)
        return parts_to_pages(best, self.page_size // self.logical)

    def attend(self, q: Tensor) -> Tensor:
        if self.steps % self.reuse == 0:
            self.chosen = self.choose(self.score(q))
        self.steps += 1
        # a page begun since the choice was made is read as well
        current = (len(self.cache) - 1) // self.page_size
        now = self.chosen.new_full((*self.chosen.shape[:2], 1), current)
        return self.cache.read_pages(q, torch.cat([self.chosen, now], -1), self.page_size)

    def choose(self, score: Tensor) -> Tensor:
        """``[B, heads, n]``: the best pages, the current one first of all."""
        n = score.shape[-1]
        score[..., n - 1] = torch.inf
        return score.topk(min(self.pages, n), -1).indices


class ReSA(Quest):
    """:class:`Quest`, shared by heads of a group, with keys and values corrected from time to time.

    Sparse steps leave errors in the keys and values of later layers. Every ``frequency`` tokens,
    :attr:`due` says so: run these tokens through the model densely and give the results to
    :meth:`rectify`.

    Args:
        budget, page_size: as in Quest.
        frequency: tokens between corrections.

    Source: Rectified Sparse Attention, arXiv:2506.04108.
    """

    def __init__(self, budget: int = 1024, page_size: int = 16, frequency: int = 32) -> None:
        super().__init__(budget, page_size, shared=True)
        self.frequency = frequency

    @property
    def due(self) -> bool:
        """Whether ``frequency`` tokens have come since the last correction."""
        return self.steps > 0 and self.steps % self.frequency == 0

    def rectify(self, k: Tensor, v: Tensor) -> None:
        """Keys and values ``[B, n, Hkv, ·]`` for the last n tokens, in place of those kept."""
        self.cache.replace(k, v)
        self.begin(k, k)


class LongHeads(Policy):
    """Every head reads the chunks whose representative key fits best, the first and the last.

    A chunk's representative is its keys' mean, weighted by the attention of the mean output of
    attention inside the chunk.

    Args:
        chunks: chunks that a head reads.
        chunk_size: tokens of a chunk, 16, 32, 64 or 128.

    Source: LongHeads, arXiv:2402.10685, section 3.1.
    """

    def __init__(self, chunks: int = 16, chunk_size: int = 128) -> None:
        if chunks < 2:
            raise ValueError(f"LongHeads: chunks must be at least 2, got {chunks}")
        self.chunks, self.chunk_size = chunks, chunk_size
        self.pending: Tensor | None = None  # queries of tokens whose chunk is not full
        self.representative: Tensor | None = None  # of full chunks [B, chunks, Hq, K]

    def begin(self, q: Tensor, lse: Tensor) -> None:
        self.pending = q
        self._represent()

    def _represent(self) -> None:
        assert self.pending is not None
        size, known = self.chunk_size, self.representative
        start = 0 if known is None else known.shape[1] * size
        full = self.pending.shape[1] // size
        if known is not None and not full:
            return
        q, (k, v) = self.pending, self.cache.kept()
        share = q.shape[2] // k.shape[2]
        rows = each(
            lambda x: torch.unflatten(x[:, : full * size], 1, (full, size)).flatten(0, 1),
            q,
            k[:, start:],
            v[:, start:],
        )
        inner = block_sparse_attn(*rows, None, None, self.cache.scale).mean(1)  # [B chunks, Hq, V]
        keys = rows[1].repeat_interleave(share, 2)
        width = min(inner.shape[-1], keys.shape[-1])
        score = torch.einsum("nhd,nshd->nhs", inner[..., :width], keys[..., :width])
        p = (score * width**-0.5).softmax(-1)
        made = torch.unflatten(torch.einsum("nhs,nshd->nhd", p, keys), 0, (q.shape[0], full))
        self.representative = made if known is None else torch.cat([known, made], 1)
        self.pending = q[:, full * size :]

    def attend(self, q: Tensor) -> Tensor:
        self.pending = q if self.pending is None else torch.cat([self.pending, q], 1)
        if self.representative is None or self.pending.shape[1] == self.chunk_size:
            self._represent()
        assert self.representative is not None
        size, n, known = self.chunk_size, len(self.cache), self.representative.shape[1]
        score = torch.einsum("bhd,bchd->bhc", q[:, 0], self.representative)
        last = torch.arange(known, -(-n // size), device=q.device)  # not full, so always read
        if known:
            score[..., 0] = torch.inf
            if not len(last):
                score[..., -1] = torch.inf
        best = score.topk(min(self.chunks - len(last), known), -1).indices
        pages = torch.cat([best, last.expand(*best.shape[:2], -1)], -1)
        return self.cache.read_pages(q, pages, size)


class DuoAttention(Policy):
    """Some key heads keep everything, the others the first and last tokens, in prompts too.

    Args:
        retrieval: bool for each key head, those that keep everything (:func:`retrieval_heads`).
        window, sinks: of the others.
        policy: of the heads that keep everything; default: they read it too.

    Source: DuoAttention, arXiv:2410.10819.
    """

    def __init__(
        self,
        retrieval: Sequence[bool],
        window: int = 256,
        sinks: int = 128,
        policy: Policy | None = None,
    ) -> None:
        self.heads = [[h for h, r in enumerate(retrieval) if r == kind] for kind in (True, False)]
        self.policies = (policy, StreamingLLM(window, sinks))
        self.window, self.sinks = window, sinks
        self.caches: list[KVCache] = []

    def prompt_mask(self, q: Tensor) -> AttnMask:
        assert self.cache.kind is not None
        given, heads = sum(map(len, self.heads)), self.cache.kind[1]
        if given != heads:
            raise ValueError(
                f"{type(self).__name__}: retrieval must be for each of the Hkv = {heads} key "
                f"heads, got {given}"
            )
        streams = torch.zeros(given, dtype=torch.bool)
        streams[self.heads[1]] = True
        left = torch.where(streams, self.window - 1, -1).to(q.device, torch.int32)
        left = left.repeat_interleave(q.shape[2] // len(left))
        return AttnMask(causal=True, head_left=left, sinks=self.sinks)

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, v = self.cache.raw()
        self.caches = []
        for heads, policy in zip(self.heads, self.policies, strict=True):
            own = self.cache.part(policy)
            if heads:
                queries = self._queries(heads, q, k)
                own.store(k[:, :, heads], v[:, :, heads])
                own.seen = k.shape[1]
                own.policy.begin(q[:, :, queries], lse[:, queries])
            self.caches.append(own)
        self.cache.keep(torch.arange(0, device=k.device))

    @staticmethod
    def _queries(heads: list[int], q: Tensor, k: Tensor) -> list[int]:
        share = q.shape[2] // k.shape[2]
        return [h * share + g for h in heads for g in range(share)]

    def append(self) -> None:
        if not self.caches:
            raise RuntimeError(f"{type(self).__name__}: needs a prompt before steps")

    def release(self) -> None:
        for own in self.caches:
            own.release()

    def attend(self, q: Tensor) -> Tensor:
        k, v = self.cache.raw()  # the new token alone, at place 0, where nothing is turned
        o = q.new_empty(*q.shape[:3], v.shape[3])
        for heads, own in zip(self.heads, self.caches, strict=True):
            if heads:
                queries = self._queries(heads, q, k)
                o[:, :, queries] = own.step(q[:, :, queries], k[:, :, heads], v[:, :, heads])
        self.cache.keep(torch.arange(0, device=k.device))
        return o


class LServe(DuoAttention):
    """Streaming heads, and heads that read pages found by bounds of their parts.

    Args:
        retrieval: bool for each key head, those that read pages.
        budget, page_size, logical, reuse: of these heads, as in :class:`Quest`.
        window, sinks: of the others.

    The paper's keys and values of few bits are those of a :class:`QuantizedKVCache`.

    Source: LServe, arXiv:2502.14866.
    """

    def __init__(
        self,
        retrieval: Sequence[bool],
        budget: int = 4096,
        page_size: int = 64,
        logical: int = 16,
        reuse: int = 4,
        window: int = 256,
        sinks: int = 128,
    ) -> None:
        pages = Quest(budget, page_size, logical, reuse, shared=True)
        super().__init__(retrieval, window, sinks, pages)


def parts_to_pages(score: Tensor, parts: int) -> Tensor:
    """The best part of every page."""
    if parts == 1:
        return score
    pad = -score.shape[-1] % parts
    return torch.unflatten(F.pad(score, (0, pad), value=-torch.inf), -1, (-1, parts)).amax(-1)
