"""Cache policies that keep everything and read the tokens whose estimated scores are largest."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import KVBuffer
from ..modules import RotaryEmbedding
from ..ops._common import accumulation_dtype
from ..ops.sparse_attn import block_sparse_attn
from ._pattern import merge
from .kv_cache import Policy, attend_taken, attend_tokens, take_tokens, turn_taken

__all__ = [
    "ClusterKV",
    "DoubleSparsity",
    "MagicPIG",
    "PQCache",
    "RetrievalAttention",
    "ShadowKV",
]


class TokenPolicy(Policy, ABC):
    """Reads the tokens with the largest estimated scores, the first ones and the last ones.

    Args:
        budget: tokens that are read by their score.
        sinks, recent: first and last tokens, which are read as well.
    """

    def __init__(self, budget: int, sinks: int, recent: int) -> None:
        self.budget, self.sinks, self.recent = budget, sinks, recent

    @abstractmethod
    def score(self, q: Tensor) -> Tensor:
        """Estimates ``[B, Hq, S]`` for ``q [B, 1, Hq, K]``."""

    def attend(self, q: Tensor) -> Tensor:
        return self.cache.read_tokens(q, self.choose(self.score(q)))

    def choose(self, score: Tensor) -> Tensor:
        """``[B, heads, n]``."""
        n = score.shape[-1]
        token = torch.arange(n, device=score.device)
        always = (token < self.sinks) | (token >= n - self.recent)
        score = score.masked_fill(always, torch.inf)
        count = self.budget + min(self.sinks + self.recent, n)
        return score.topk(min(count, n), -1).indices


class DoubleSparsity(TokenPolicy):
    """Estimates scores from few channels of queries and keys, chosen beforehand.

    Args:
        channels: ``[Hkv, r]`` int64, of each key head (:meth:`calibrate`).
        budget, sinks, recent: tokens that are read.

    Source: Post-Training Sparse Attention with Double Sparsity, arXiv:2408.07092.
    """

    def __init__(
        self, channels: Tensor, budget: int = 512, sinks: int = 0, recent: int = 16
    ) -> None:
        super().__init__(budget, sinks, recent)
        self.channels = channels

    @staticmethod
    def calibrate(q: Tensor, k: Tensor, channels: int) -> Tensor:
        """The channels whose products are largest on a sample ``q [B, T, Hq, K]``, ``k``."""
        share = q.shape[2] // k.shape[2]
        size = torch.unflatten(q.abs().mean((0, 1)), 0, (-1, share)).mean(1) * k.abs().mean((0, 1))
        return size.topk(channels, -1).indices.sort(-1).values

    def begin(self, q: Tensor, lse: Tensor) -> None:
        #: these channels of all keys, beside them
        self.labels = Rows(self._label(self.cache.kept()[0]))

    def append(self) -> None:
        new = self._label(self.cache.newest()[:, None])
        if hasattr(self, "labels"):
            self.labels.append(new)
        else:
            self.labels = Rows(new)

    def _label(self, k: Tensor) -> Tensor:
        at = self.channels.to(k.device)
        if at.shape[0] != k.shape[2]:
            raise ValueError(
                f"DoubleSparsity: channels must be [Hkv, r] of Hkv = {k.shape[2]} key heads, got "
                f"{[*at.shape]}"
            )
        return k.gather(-1, at.expand(*k.shape[:2], -1, -1))

    def score(self, q: Tensor) -> Tensor:
        label, at = self.labels.all(), self.channels.to(q.device)
        B, H = q.shape[0], len(at)
        qs = torch.unflatten(q[:, 0], 1, (H, -1))
        qs = qs.gather(-1, at[None, :, None].expand(B, H, qs.shape[2], -1))
        return torch.einsum("bhgd,bshd->bhgs", qs, label).flatten(1, 2)


class RetrievalAttention(Policy):
    """Reads the first and last tokens, and those of the others that a search finds, as two parts of
    one softmax.

    Args:
        budget: tokens found by search.
        sinks, recent: tokens that are always read.
        search: an index's: of queries ``[B, Hq, K]``, keys ``[B, S, Hkv, K]`` and a number n the
            places of good keys, ``[B, Hq, n]``, -1 for none. Default: the best, exhaustively; the
            paper's index is a graph.

    Source: RetrievalAttention, arXiv:2409.10516.
    """

    def __init__(
        self,
        budget: int = 100,
        sinks: int = 128,
        recent: int = 512,
        search: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    ) -> None:
        self.budget, self.sinks, self.recent = budget, sinks, recent
        self.search = best_keys if search is None else search

    def attend(self, q: Tensor) -> Tensor:
        k, v = self.cache.kept()
        n = k.shape[1]
        first = min(self.sinks, n)
        last = max(n - self.recent, first)
        scale = self.cache.scale
        near_k, near_v = (torch.cat([x[:, :first], x[:, last:]], 1) for x in (k, v))
        parts = [block_sparse_attn(q, near_k, near_v, scale=scale, return_lse=True)]
        if last > first:
            far_k, far_v = k[:, first:last], v[:, first:last]
            best = self.search(q[:, 0], far_k, min(self.budget, last - first))
            parts.append(attend_tokens(q, far_k, far_v, best, scale))
        o, _ = merge(*parts)
        return o


class ClusterKV(TokenPolicy):
    """Reads whole clusters of keys, those whose mean fits the query best, up to a budget.

    Keys of the prompt are clustered by direction; later ones in batches of ``every``.

    Args:
        clusters: of the prompt.
        budget: tokens that are read, of the last cluster as many as fit.
        sinks: first tokens, which are left out of clusters and always read.
        every: later tokens that are clustered together, and read always until then.
        iterations: of k-means.

    Source: ClusterKV, arXiv:2412.03213.
    """

    centers: Tensor  # means of clusters' keys [B, Hkv, clusters, K]
    owner: Tensor  # [B, Hkv, tokens in clusters]

    def __init__(
        self,
        clusters: int = 80,
        budget: int = 1024,
        sinks: int = 16,
        every: int = 320,
        iterations: int = 10,
    ) -> None:
        super().__init__(budget, sinks, 0)
        self.clusters, self.every, self.iterations = clusters, every, iterations
        self.done = 0

    def begin(self, q: Tensor, lse: Tensor) -> None:
        self._cluster(self.clusters)

    def append(self) -> None:
        if len(self.cache) - self.done >= self.every and self.done:
            self._cluster(max(1, self.clusters * self.every // max(self.done, 1)))

    def _cluster(self, clusters: int) -> None:
        k, _ = self.cache.kept()
        start = self.done or self.sinks
        keys = k[:, start:].transpose(1, 2)  # [B, Hkv, n, K]
        if not keys.shape[2]:
            return
        keys = keys.to(accumulation_dtype(k))
        centers, owner = k_means(F.normalize(keys, dim=-1), clusters, self.iterations, True)
        centers, _ = means_of(keys, owner, centers)
        if self.done:
            owner = owner + self.centers.shape[2]
            centers = torch.cat([self.centers, centers], 2)
            owner = torch.cat([self.owner, owner], 2)
        self.centers, self.owner, self.done = centers, owner, k.shape[1]

    def score(self, q: Tensor) -> Tensor:
        n = len(self.cache)
        heads = q.shape[2]
        if not self.done:
            return q.new_full((q.shape[0], heads, n), torch.inf)
        qs = torch.unflatten(q[:, 0], 1, (self.centers.shape[1], -1)).to(self.centers.dtype)
        fit = torch.einsum("bhgd,bhcd->bhgc", qs, self.centers)
        owner = self.owner[:, :, None].expand(*fit.shape[:3], -1)
        near = fit.gather(-1, owner).flatten(1, 2)
        return F.pad(near, (self.sinks, n - self.done), value=torch.inf)

    def choose(self, score: Tensor) -> Tensor:
        always = self.sinks + len(self.cache) - self.done
        count = min(self.budget + always, score.shape[-1])
        # stable, so that a cluster that does not fit gives its first tokens
        return torch.sort(score, dim=-1, descending=True, stable=True)[1][..., :count]


class PQCache(TokenPolicy):
    """Estimates scores by product quantisation: of each part of a key, the nearest of a codebook.

    Args:
        budget, sinks, recent: tokens that are read.
        parts: of a key's channels.
        codes: entries of each part's codebook, learned from the prompt.
        iterations: of k-means.

    Source: PQCache, arXiv:2407.12820.
    """

    def __init__(
        self,
        budget: int = 1024,
        sinks: int = 4,
        recent: int = 64,
        parts: int = 2,
        codes: int = 64,
        iterations: int = 10,
    ) -> None:
        super().__init__(budget, sinks, recent)
        self.parts, self.codes, self.iterations = parts, codes, iterations

    def _split(self, k: Tensor) -> Tensor:
        """``[B, S, Hkv, K]`` to ``[B, Hkv, parts, S, K / parts]``."""
        return torch.unflatten(k.to(accumulation_dtype(k)), -1, (self.parts, -1)).permute(
            0, 2, 3, 1, 4
        )

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, _ = self.cache.kept()
        if k.shape[-1] % self.parts:
            raise ValueError(f"PQCache: parts must divide K, got {self.parts} and {k.shape[-1]}")
        self.book, code = k_means(self._split(k), self.codes, self.iterations)
        self.code = Rows(self._small(code))

    def append(self) -> None:
        if not hasattr(self, "book"):
            k, _ = self.cache.kept()
            self.begin(k, k)
            return
        new = self.cache.newest()[:, None]
        self.code.append(self._small(nearest(self._split(new), self.book)))

    def _small(self, code: Tensor) -> Tensor:
        """``[B, Hkv, parts, S]`` to ``[B, S, Hkv, parts]``."""
        return code.permute(0, 3, 1, 2).to(torch.uint8 if self.codes <= 256 else torch.int32)

    def score(self, q: Tensor) -> Tensor:
        H = self.book.shape[1]
        qs = torch.unflatten(self._split(q), 1, (H, -1)).squeeze(4)  # [B, H, G, parts, K / parts]
        table = torch.einsum("bhgpd,bhpcd->bhgpc", qs, self.book)
        code = self.code.all().permute(0, 2, 3, 1)[:, :, None].long()
        return table.gather(-1, code.expand(*table.shape[:4], -1)).sum(3).flatten(1, 2)


class MagicPIG(Policy):
    """Samples keys by hash collisions and weighs them by their chance of it.

    A key is sampled where at least two of L tables of K-bit hashes put it beside the query. With
    ``s = 1 − θ / π`` for the angle θ between them that happens with probability
    ``u = 1 − (1 − s^K)^L − L s^K (1 − s^K)^(L−1)``; the estimate divides its weight by u.

    Args:
        bits: K, signs of a hash.
        tables: L.
        sinks, recent: tokens that are read exactly.
        generator: of the random directions.

    Source: MagicPIG, arXiv:2410.16179.
    """

    def __init__(
        self,
        bits: int = 10,
        tables: int = 150,
        sinks: int = 4,
        recent: int = 64,
        generator: torch.Generator | None = None,
    ) -> None:
        self.bits, self.tables = bits, tables
        self.sinks, self.recent, self.generator = sinks, recent, generator

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, _ = self.cache.kept()
        size = (k.shape[-1], self.tables * self.bits)
        self.direction = torch.randn(size, generator=self.generator).to(k)
        # hashes of keys about their mean, which spreads their directions
        self.center = k.mean(1, keepdim=True)
        self.hashes = Rows(self._hash(k - self.center))

    def append(self) -> None:
        if not hasattr(self, "hashes"):
            k, _ = self.cache.kept()
            self.begin(k, k)
            return
        self.hashes.append(self._hash(self.cache.newest()[:, None] - self.center))

    def _hash(self, x: Tensor) -> Tensor:
        """``[B, S, H, L]`` numbers of ``bits`` bits."""
        sign = torch.unflatten(x @ self.direction > 0, -1, (self.tables, self.bits))
        small = torch.int16 if self.bits < 16 else torch.int64
        return (sign * 2 ** torch.arange(self.bits, device=x.device)).sum(-1).to(small)

    def probability(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, H, G, S]``: chance that a key of ``k [B, S, H, K]`` is sampled, H key heads or all
        query heads."""
        center = self.center.repeat_interleave(k.shape[2] // self.center.shape[2], 2)
        qs = F.normalize(torch.unflatten(q[:, 0], 1, (k.shape[2], -1)), dim=-1)
        cosine = torch.einsum("bhgd,bshd->bhgs", qs, F.normalize(k - center, dim=-1))
        one = (1 - cosine.clamp(-1, 1).acos() / math.pi) ** self.bits
        L = self.tables
        return 1 - (1 - one) ** L - L * one * (1 - one) ** (L - 1)

    def attend(self, q: Tensor) -> Tensor:
        n, H = len(self.cache), self.center.shape[2]
        mine = torch.unflatten(self._hash(q)[:, 0], 1, (H, -1))  # [B, H, G, L]
        keys = self.hashes.all().transpose(1, 2)[:, :, None]  # [B, H, 1, S, L]
        sampled = (keys == mine[..., None, :]).sum(-1) >= 2  # [B, H, G, S]
        token = torch.arange(n, device=q.device)
        always = (token < self.sinks) | (token >= n - self.recent)
        read = (sampled | always).flatten(1, 2)
        count = int(read.sum(-1).max())
        order = torch.sort(~read, dim=-1, stable=True)[1][..., :count]
        index = order.masked_fill(~read.gather(-1, order), -1)
        k, v = (take_tokens(x, index) for x in self.cache.kept())
        chance = self.probability(q, k)[:, :, 0].clamp(min=torch.finfo(k.dtype).tiny)
        weight = -chance.log().masked_fill(always[order], 0)
        return attend_taken(q, k, v, index, self.cache.scale, weight)[0]


class ShadowKV(Policy):
    """Keys as low-rank factors; the mean keys of chunks choose which values are fetched.

    The prompt's keys, before positions, are kept as a product of rank ``rank`` and rebuilt for
    chunks that are read; its values lie in the host's memory, from which a chunk comes when it is
    read, unless the step before read it too. Chunks that their mean describes badly are kept
    exactly and always read, as are tokens after the prompt.

    Args:
        rank: of the keys of all heads together.
        budget: tokens of chunks that are read by their mean.
        chunk_size: tokens of a chunk, a power of two.
        outliers: chunks that are kept exactly.
        rotary: turns keys by their position; give it here, not to the cache, and unturned keys to
            the cache; queries come turned. None: keys as they are.

    The cache itself then holds what came behind the prompt's last whole chunk.

    Source: ShadowKV, arXiv:2410.21465.
    """

    def __init__(
        self,
        rank: int = 160,
        budget: int = 2048,
        chunk_size: int = 8,
        outliers: int = 48,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        self.rank, self.budget, self.chunk_size = rank, budget, chunk_size
        self.outliers, self.rotary = outliers, rotary
        self.chosen: Tensor | None = None  # chunks whose values are here [B, Hkv, n]
        self.values: Tensor | None = None  # these, [B, Hkv, n, chunk_size, V]
        #: chunks of values that came from the host so far
        self.fetched = 0

    def _turned(self, k: Tensor, position: int = 0) -> Tensor:
        return k if self.rotary is None else self.rotary(k, position)

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, v = self.cache.raw()
        T, size = k.shape[1], self.chunk_size
        chunks = T // size
        self.prompt = chunks * size
        acc = accumulation_dtype(k)
        u, s, vh = torch.linalg.svd(k[:, : self.prompt].flatten(2).to(acc), full_matrices=False)
        r = min(self.rank, s.shape[-1])
        self.left, self.right = u[..., :r] * s[:, None, :r], vh[:, :r]
        turned = torch.unflatten(self._turned(k)[:, : self.prompt], 1, (chunks, size))
        self.mean = turned.mean(2)  # [B, chunks, H, K]
        fit = F.cosine_similarity(turned, self.mean[:, :, None], dim=-1).amin(2)  # [B, chunks, H]
        self.odd = fit.transpose(1, 2).topk(min(self.outliers, chunks), -1, largest=False).indices
        rows = (self.odd[..., None] * size + torch.arange(size, device=k.device)).flatten(2)
        self.exact = take_tokens(self._turned(k), rows), take_tokens(v, rows)
        host = torch.unflatten(v[:, : self.prompt].transpose(1, 2), 2, (chunks, size)).contiguous()
        self.host = host.cpu().pin_memory() if v.is_cuda else host  # [B, Hkv, chunks, size, V]
        self.cache.keep(torch.arange(self.prompt, T, device=k.device))

    def append(self) -> None:
        if not hasattr(self, "mean"):  # no prompt
            k, _ = self.cache.raw()
            self.begin(k, k)

    def release(self) -> None:
        self.chosen = self.values = None
        del self.left, self.right, self.exact, self.host

    def attend(self, q: Tensor) -> Tensor:
        rest_k, rest_v = self.cache.raw()
        chunks, H, K = self.mean.shape[1:]
        size = self.chunk_size
        qs = torch.unflatten(q[:, 0], 1, (H, -1))
        # softmax over chunks of every head, then the sum over heads that share keys
        scale = K**-0.5 if self.cache.scale is None else self.cache.scale
        score = (scale * torch.einsum("bhgd,bchd->bhgc", qs, self.mean)).softmax(-1).sum(2)
        score = score.scatter(-1, self.odd, -1)
        best = score.topk(min(self.budget // size, chunks - self.odd.shape[-1]), -1).indices
        rows = (best[..., None] * size + torch.arange(size, device=q.device)).flatten(2)
        keys = self._rebuilt(rows, H, K).to(q.dtype)  # [B, n, H, K]
        k = torch.cat([keys, self.exact[0], self._turned(rest_k, self.prompt)], 1)
        near = self._fetch(best).flatten(2, 3).transpose(1, 2)
        return block_sparse_attn(
            q, k, torch.cat([near, self.exact[1], rest_v], 1), scale=self.cache.scale
        )

    def _fetch(self, chunks: Tensor) -> Tensor:
        """Values of chunks ``[B, Hkv, n]``, those that are not here from the host."""
        if self.chosen is None or self.values is None or not chunks.numel():
            here = torch.zeros_like(chunks, dtype=torch.bool)
            shape = (*chunks.shape, *self.host.shape[3:])
            values = torch.empty(shape, dtype=self.host.dtype, device=chunks.device)
        else:
            same = chunks[..., None] == self.chosen[:, :, None]
            here, place = same.any(-1), same.int().argmax(-1)
            values = self.values.gather(
                2, place[..., None, None].expand(*place.shape, *self.host.shape[3:])
            )
        b, h, n = (~here).nonzero(as_tuple=True)
        wanted = (i.cpu() for i in (b, h, chunks[b, h, n]))
        values[b, h, n] = self.host[tuple(wanted)].to(values.device)
        self.fetched += len(b)
        self.chosen, self.values = chunks, values
        return values

    def _rebuilt(self, rows: Tensor, H: int, K: int) -> Tensor:
        B, _, n = rows.shape
        left = self.left.gather(1, rows.flatten(1)[..., None].expand(-1, -1, self.left.shape[-1]))
        right = torch.unflatten(self.right, -1, (H, K))
        k = torch.einsum("bhnr,brhd->bnhd", torch.unflatten(left, 1, (H, n)), right)
        return k if self.rotary is None else turn_taken(self.rotary, k, rows)


def k_means(
    x: Tensor, clusters: int, iterations: int, spherical: bool = False
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on ``x [..., n, D]``: centres ``[..., c, D]`` and owners ``[..., n]``.

    Starts from every (n / c)-th point, so that it is deterministic; an empty cluster keeps its
    centre. ``spherical``: centres are directions, for x of length 1.
    """
    n = x.shape[-2]
    clusters = min(clusters, n)
    centers = x[..., torch.arange(clusters, device=x.device) * n // clusters, :]
    owner = nearest(x, centers)
    for _ in range(iterations):
        mean, some = means_of(x, owner, centers)
        centers = F.normalize(mean, dim=-1).where(some, centers) if spherical else mean
        owner = nearest(x, centers)
    return centers, owner


def means_of(x: Tensor, owner: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Means of clusters, the given centres of empty ones; and which are not empty."""
    member = F.one_hot(owner, centers.shape[-2]).to(x.dtype)  # [..., n, c]
    count = member.sum(-2)[..., None]
    return (member.mT @ x / count.clamp(min=1)).where(count > 0, centers), count > 0


def best_keys(q: Tensor, k: Tensor, count: int) -> Tensor:
    """The keys of ``k [B, S, Hkv, K]`` with the largest scores, ``[B, Hq, count]``."""
    qs = torch.unflatten(q, 1, (k.shape[2], -1))
    score = torch.einsum("bhgd,bshd->bhgs", qs, k).flatten(1, 2)
    return score.topk(count, -1).indices


class Rows:
    """What a policy keeps of every token, ``[B, S, ...]``, in a buffer that grows by doubling."""

    def __init__(self, x: Tensor) -> None:
        self._buffer = KVBuffer.start(x, x[..., :0])

    def append(self, x: Tensor) -> None:
        self._buffer.append(x, x[..., :0])

    def all(self) -> Tensor:
        return self._buffer.keys[:, : self._buffer.length]


def nearest(x: Tensor, centers: Tensor) -> Tensor:
    """``[..., n]``: the nearest centre of every point."""
    return (x @ centers.mT - centers.square().sum(-1)[..., None, :] / 2).argmax(-1)
