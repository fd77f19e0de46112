"""Cache policies that keep everything and read the tokens whose estimated scores are largest."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modules import RotaryEmbedding
from ..ops._common import accumulation_dtype
from ..ops.sparse_attn import block_sparse_attn
from ._pattern import merge
from .kv_cache import Policy, attend_tokens, take_tokens

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

    def score(self, q: Tensor) -> Tensor:
        k, _ = self.cache.kept()
        B, S, H, _K = k.shape
        at = self.channels.to(q.device)
        label = k.gather(-1, at.expand(B, S, -1, -1))
        qs = torch.unflatten(q[:, 0], 1, (H, -1))
        qs = qs.gather(-1, at[None, :, None].expand(B, H, qs.shape[2], -1))
        return torch.einsum("bhgd,bshd->bhgs", qs, label).flatten(1, 2)


class RetrievalAttention(Policy):
    """Reads the first and last tokens, and exactly the best of all others, as two parts of one
    softmax; the search is exhaustive instead of the paper's graph index.

    Args:
        budget: tokens found by search.
        sinks, recent: tokens that are always read.

    Source: RetrievalAttention, arXiv:2409.10516.
    """

    def __init__(self, budget: int = 100, sinks: int = 128, recent: int = 512) -> None:
        self.budget, self.sinks, self.recent = budget, sinks, recent

    def attend(self, q: Tensor) -> Tensor:
        k, v = self.cache.kept()
        n, H = k.shape[1:3]
        first = min(self.sinks, n)
        last = max(n - self.recent, first)
        scale = self.cache.scale
        near_k, near_v = (torch.cat([x[:, :first], x[:, last:]], 1) for x in (k, v))
        parts = [block_sparse_attn(q, near_k, near_v, scale=scale, return_lse=True)]
        if last > first:
            far_k, far_v = k[:, first:last], v[:, first:last]
            qs = torch.unflatten(q[:, 0], 1, (H, -1))
            score = torch.einsum("bhgd,bshd->bhgs", qs, far_k).flatten(1, 2)
            best = score.topk(min(self.budget, last - first), -1).indices
            parts.append(attend_tokens(q, far_k, far_v, best, scale))
        o, _ = merge(*parts)
        return o


class ClusterKV(TokenPolicy):
    """Reads whole clusters of keys, those whose centre fits the query best, up to a budget.

    Keys of the prompt are clustered by direction; later ones in batches of ``every``.

    Args:
        clusters: of the prompt.
        budget: tokens that are read, of the last cluster as many as fit.
        sinks: first tokens, which are left out of clusters and always read.
        every: later tokens that are clustered together, and read always until then.
        iterations: of k-means.

    Source: ClusterKV, arXiv:2412.03213.
    """

    centers: Tensor  # [B, Hkv, clusters, K]
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
        centers, owner = k_means(
            F.normalize(keys.to(accumulation_dtype(k)), dim=-1), clusters, self.iterations, True
        )
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
        self.book, self.code = k_means(self._split(k), self.codes, self.iterations)

    def append(self) -> None:
        k, _ = self.cache.kept()
        if not hasattr(self, "book"):
            self.begin(k, k)
            return
        new = nearest(self._split(k[:, -1:]), self.book)
        self.code = torch.cat([self.code, new], -1)

    def score(self, q: Tensor) -> Tensor:
        H = self.book.shape[1]
        qs = torch.unflatten(self._split(q), 1, (H, -1)).squeeze(4)  # [B, H, G, parts, K / parts]
        table = torch.einsum("bhgpd,bhpcd->bhgpc", qs, self.book)
        code = self.code[:, :, None].expand(*table.shape[:4], -1)
        return table.gather(-1, code).sum(3).flatten(1, 2)


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
        self.hashes = self._hash(k - self.center)

    def append(self) -> None:
        k, _ = self.cache.kept()
        if not hasattr(self, "hashes"):
            self.begin(k, k)
            return
        self.hashes = torch.cat([self.hashes, self._hash(k[:, -1:] - self.center)], 1)

    def _hash(self, x: Tensor) -> Tensor:
        """``[B, S, H, L]`` numbers of ``bits`` bits."""
        sign = torch.unflatten(x @ self.direction > 0, -1, (self.tables, self.bits))
        return (sign * 2 ** torch.arange(self.bits, device=x.device)).sum(-1)

    def probability(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, Hkv, G, S]``: chance that a key is sampled."""
        qs = F.normalize(torch.unflatten(q[:, 0], 1, (k.shape[2], -1)), dim=-1)
        cosine = torch.einsum("bhgd,bshd->bhgs", qs, F.normalize(k - self.center, dim=-1))
        one = (1 - cosine.clamp(-1, 1).acos() / math.pi) ** self.bits
        L = self.tables
        return 1 - (1 - one) ** L - L * one * (1 - one) ** (L - 1)

    def attend(self, q: Tensor) -> Tensor:
        k, _ = self.cache.kept()
        n, H = k.shape[1:3]
        mine = torch.unflatten(self._hash(q)[:, 0], 1, (H, -1))  # [B, H, G, L]
        keys = self.hashes.transpose(1, 2)[:, :, None]  # [B, H, 1, S, L]
        sampled = (keys == mine[..., None, :]).sum(-1) >= 2  # [B, H, G, S]
        token = torch.arange(n, device=q.device)
        always = (token < self.sinks) | (token >= n - self.recent)
        chance = self.probability(q, k).clamp(min=torch.finfo(k.dtype).tiny)
        weight = -chance.log().masked_fill(always, 0)
        read = (sampled | always).flatten(1, 2)
        count = int(read.sum(-1).max())
        order = torch.sort(~read, dim=-1, stable=True)[1][..., :count]
        index = order.masked_fill(~read.gather(-1, order), -1)
        return self.cache.read_tokens(q, index, weight.flatten(1, 2).gather(-1, order))


class ShadowKV(Policy):
    """Keys as low-rank factors; the mean keys of chunks choose which values are fetched.

    The prompt's keys, before positions, are kept as a product of rank ``rank`` and rebuilt for
    chunks that are read; chunks that their mean describes badly are kept exactly and always read,
    as are tokens after the prompt.

    Args:
        rank: of the keys of all heads together.
        budget: tokens of chunks that are read by their mean.
        chunk_size: tokens of a chunk, a power of two.
        outliers: chunks that are kept exactly.
        rotary: turns keys by their position; give it here, not to the cache, and unturned keys to
            the cache; queries come turned. None: keys as they are.

    This is the method's arithmetic: keys and values stay where they are, and no memory is saved.

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

    def _turned(self, k: Tensor, position: Tensor | int = 0) -> Tensor:
        return k if self.rotary is None else self.rotary(k, position)

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, v = self.cache.raw()
        _B, T, _H, _K = k.shape
        size = self.chunk_size
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
        self.rest = [self._turned(k)[:, self.prompt :], v[:, self.prompt :]]

    def append(self) -> None:
        k, v = self.cache.raw()
        new = self._turned(k[:, -1:], len(self.cache) - 1)
        self.rest = [torch.cat([x, y], 1) for x, y in zip(self.rest, (new, v[:, -1:]), strict=True)]

    def attend(self, q: Tensor) -> Tensor:
        _, v = self.cache.raw()
        _B, chunks, H, K = self.mean.shape
        size, _heads = self.chunk_size, q.shape[2]
        qs = torch.unflatten(q[:, 0], 1, (H, -1))
        # softmax over chunks of every head, then the sum over heads that share keys
        scale = K**-0.5 if self.cache.scale is None else self.cache.scale
        score = (scale * torch.einsum("bhgd,bchd->bhgc", qs, self.mean)).softmax(-1).sum(2)
        score = score.scatter(-1, self.odd, -1)
        best = score.topk(min(self.budget // size, chunks - self.odd.shape[-1]), -1).indices
        rows = (best[..., None] * size + torch.arange(size, device=q.device)).flatten(2)
        keys = self._rebuilt(rows, H, K).to(q.dtype)  # [B, n, H, K]
        k = torch.cat([keys, self.exact[0], self.rest[0]], 1)
        values = torch.cat([take_tokens(v, rows), self.exact[1], self.rest[1]], 1)
        return block_sparse_attn(q, k, values, scale=self.cache.scale)

    def _rebuilt(self, rows: Tensor, H: int, K: int) -> Tensor:
        B, _, n = rows.shape
        left = self.left.gather(1, rows.flatten(1)[..., None].expand(-1, -1, self.left.shape[-1]))
        right = torch.unflatten(self.right, -1, (H, K))
        k = torch.einsum("bhnr,brhd->bhnd", left.view(B, H, n, -1), right)
        if self.rotary is None:
            return k.transpose(1, 2)
        # heads as batch rows: each has positions of its own
        turned = self.rotary(k.flatten(0, 1)[:, :, None], rows.flatten(0, 1))
        return torch.unflatten(turned[:, :, 0], 0, (B, H)).transpose(1, 2)


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
        member = F.one_hot(owner, clusters).to(x.dtype)  # [..., n, c]
        count = member.sum(-2)[..., None]
        mean = member.mT @ x / count.clamp(min=1)
        if spherical:
            mean = F.normalize(mean, dim=-1)
        centers = mean.where(count > 0, centers)
        owner = nearest(x, centers)
    return centers, owner


def nearest(x: Tensor, centers: Tensor) -> Tensor:
    """``[..., n]``: the nearest centre of every point."""
    return (x @ centers.mT - centers.square().sum(-1)[..., None, :] / 2).argmax(-1)
