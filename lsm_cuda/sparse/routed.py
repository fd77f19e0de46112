"""Attention among tokens that belong together: chosen by a router, hashed, sorted or clustered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._common import accumulation_dtype, check_shape
from ..ops.attn_mask import AttnMask
from ..ops.sparse_attn import block_sparse_attn
from ._pattern import each, merge
from .kv_cache import take_tokens

__all__ = [
    "cluster_attn",
    "cluster_loss",
    "colt5_attn",
    "lsh_attn",
    "lsh_buckets",
    "mosa_attn",
    "routing_attn",
    "routing_update",
    "sinkhorn",
    "sinkhorn_attn",
    "soft_topk",
]


def _put_tokens(o: Tensor, index: Tensor, tokens: int) -> Tensor:
    """``o [B, n, H, D]`` at ``index [B, H, n]`` of zeros ``[B, tokens, H, D]``; each index once."""
    at = index.transpose(1, 2)[..., None].expand_as(o)
    return o.new_zeros(o.shape[0], tokens, *o.shape[2:]).scatter(1, at, o)


def mosa_attn(
    q: Tensor, k: Tensor, v: Tensor, router: Tensor, count: int, scale: float | None = None
) -> Tensor:
    """Mixture of sparse attention: every head picks its tokens, which attend to one another.

    Args:
        q, k, v: ``[B, T, H, K]``, ``[B, T, H, K]`` and ``[B, T, H, V]``.
        router: ``[B, T, H]``, scores of tokens after their sigmoid. A head takes the best, and its
            output is multiplied by them, which is how the router learns.
        count: tokens of a head.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, H, V]``, zeros at tokens a head did not take.

    A token sees taken tokens up to itself; but whether it is taken depends on later ones.

    Source: Mixture of Sparse Attention, arXiv:2505.00315.

    Example:
        >>> q, k, v = torch.randn(3, 1, 20, 2, 8)
        >>> mosa_attn(q, k, v, torch.rand(1, 20, 2), 5).ne(0).any(-1).sum(1).tolist()
        [[5, 5]]
    """
    check_shape("mosa", "router", router, "[B, T, H]", q.shape[:3])
    index = router.transpose(1, 2).topk(min(count, q.shape[1]), -1).indices.sort(-1).values
    rows = each(lambda x: take_tokens(x, index), q, k, v)
    o = block_sparse_attn(*rows, None, AttnMask(causal=True), scale)
    o = o * take_tokens(router[..., None], index).to(o.dtype)
    return _put_tokens(o, index, q.shape[1])


# ---- Clusters ----


def routing_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    window: int,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Routing attention: every centroid takes the tokens nearest to it, which attend to each other.

    Args:
        q, k: ``[B, T, H, K]``; routed by their direction. Causally k is q, as in the paper, since
            one set of tokens then serves as both.
        v: ``[B, T, H, V]``.
        centroids: ``[H, C, K]``; see :func:`routing_update`.
        window: tokens of a centroid.
        causal: a token sees those of its cluster up to itself.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, H, V]``: the mean over the clusters a token is in; zeros where it is in none.

    Source: Efficient Content-Based Sparse Attention with Routing Transformers, arXiv:2003.05997.

    Example:
        >>> q, v = torch.randn(2, 1, 20, 2, 8)
        >>> routing_attn(q, q, v, torch.randn(2, 4, 8), 5).shape
        torch.Size([1, 20, 2, 8])
    """
    B, T, H, _ = q.shape
    C, window = centroids.shape[1], min(window, T)
    check_shape("routing", "centroids", centroids, "[H, C, K]", (H, C, q.shape[3]))

    def nearest(x: Tensor) -> Tensor:
        """``[B, H, C * window]``, each centroid's tokens in order."""
        fit = torch.einsum("bthd,hcd->bhct", F.normalize(x, dim=-1), centroids.to(x.dtype))
        return fit.topk(window, -1).indices.sort(-1).values.flatten(2)

    with torch.no_grad():
        queries = nearest(q)
        keys = queries if causal else nearest(k)

    def rows(x: Tensor, index: Tensor) -> Tensor:
        return torch.unflatten(take_tokens(x, index), 1, (C, window)).flatten(0, 1)

    k = rows(q if causal else k, keys)
    o = block_sparse_attn(rows(q, queries), k, rows(v, keys), None, AttnMask(causal=causal), scale)
    o = torch.unflatten(o, 0, (B, C)).flatten(1, 2)  # [B, C * window, H, V]
    at = queries.transpose(1, 2)[..., None]
    total = v.new_zeros(B, T, H, v.shape[3]).scatter_add(1, at.expand_as(o), o)
    times = v.new_zeros(B, T, H, 1).scatter_add(1, at, at.new_ones(at.shape).to(v.dtype))
    return total / times.clamp(min=1)


@torch.no_grad()
def routing_update(centroids: Tensor, q: Tensor, k: Tensor, decay: float = 0.999) -> Tensor:
    """Centroids moved towards the queries and keys nearest to them.

    Args:
        centroids: ``[H, C, K]``.
        q, k: ``[B, T, H, K]``.
        decay: of the moving average.

    Returns:
        ``[H, C, K]``; one that is nearest to nothing stays.

    Example:
        >>> q = torch.randn(1, 20, 2, 8)
        >>> routing_update(torch.randn(2, 4, 8), q, q).shape
        torch.Size([2, 4, 8])
    """
    C = centroids.shape[1]
    means = []
    for x in (q, k):
        unit = F.normalize(x, dim=-1).to(centroids.dtype)
        owner = torch.einsum("bthd,hcd->bthc", unit, centroids).argmax(-1)
        member = F.one_hot(owner, C).to(unit.dtype)
        count = member.sum((0, 1))[..., None]  # [H, C, 1]
        total = torch.einsum("bthc,bthd->hcd", member, unit)
        means.append((total / count.clamp(min=1)).where(count > 0, centroids))
    return decay * centroids + (1 - decay) * (means[0] + means[1]) / 2


def cluster_attn(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, centroids: Tensor, scale: float | None = None
) -> Tensor:
    """ClusterFormer: every token attends to the tokens of its cluster, in both directions.

    Args:
        q, k, v: ``[B, T, H, K]``, ``[B, T, H, K]`` and ``[B, T, H, V]``.
        x: ``[B, T, D]``, hidden states, which decide the cluster; the same for all heads.
        centroids: ``[C, D]``, parameters trained by :func:`cluster_loss`.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, H, V]``.

    Source: ClusterFormer: Neural Clustering Attention for Efficient and Effective Transformer,
    ACL 2022.

    Example:
        >>> q, k, v = torch.randn(3, 1, 20, 2, 8)
        >>> cluster_attn(q, k, v, torch.randn(1, 20, 4), torch.randn(3, 4)).shape
        torch.Size([1, 20, 2, 8])
    """
    B, T = q.shape[:2]
    C = centroids.shape[0]
    owner = (F.normalize(x, dim=-1) @ F.normalize(centroids, dim=-1).T).argmax(-1)  # [B, T]
    # all rows' clusters, one after the other, as packed sequences
    cluster = (torch.arange(B, device=x.device)[:, None] * C + owner).flatten()
    order = torch.sort(cluster, stable=True)[1]
    counts = torch.zeros(B * C, dtype=torch.int32, device=x.device)
    counts.index_add_(0, cluster, torch.ones_like(cluster, dtype=torch.int32))
    cuts = F.pad(counts.cumsum(0), (1, 0)).int()
    rows = each(lambda y: y.flatten(0, 1)[None].index_select(1, order), q, k, v)
    o = block_sparse_attn(*rows, None, None, scale, cu_seqlens=cuts)
    back = torch.empty_like(order)
    back[order] = torch.arange(B * T, device=x.device)
    return torch.unflatten(o[0].index_select(0, back), 0, (B, T))


def cluster_loss(x: Tensor, centroids: Tensor) -> Tensor:
    """Mean of one minus the cosine between hidden states ``[B, T, D]`` and their centroids.

    Example:
        >>> cluster_loss(torch.ones(1, 3, 4), torch.ones(2, 4)).item()
        0.0
    """
    fit = F.normalize(x, dim=-1) @ F.normalize(centroids, dim=-1).T
    return 1 - fit.amax(-1).mean()


# ---- Hashes ----


@torch.no_grad()
def lsh_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """``argmax [x R; -x R]`` of every round: ``[B, T, H, K]`` to ``[B, H, rounds, T]``.

    Args:
        x: vectors.
        rotations: ``[H, K, rounds, buckets / 2]``, normal.

    Example:
        >>> lsh_buckets(torch.randn(1, 20, 2, 8), torch.randn(2, 8, 3, 4)).shape
        torch.Size([1, 2, 3, 20])
    """
    turned = torch.einsum("bthd,hdnr->bhntr", x, rotations.to(x.dtype))
    return torch.cat([turned, -turned], -1).argmax(-1)


def lsh_attn(
    qk: Tensor,
    v: Tensor,
    buckets: Tensor,
    chunk_length: int,
    causal: bool = True,
    self_value: float = -1e5,
) -> Tensor:
    """Reformer: tokens sorted by hash attend to their own chunk and the one before it.

    Keys are the queries, of length 1 (times ``K ** 0.5``, which the scale takes back). Rounds are
    mixed by their softmax denominators. A token scores itself ``self_value``, so that it reads
    itself only where there is nothing else.

    Args:
        qk: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        buckets: ``[B, H, rounds, T]`` (:func:`lsh_buckets`).
        chunk_length: tokens of a chunk of the sorted sequence; divides T.
        causal: only keys up to the query.
        self_value: score of a token for itself.

    Returns:
        ``[B, T, H, V]``. Scores take ``2 · rounds · T · chunk_length`` numbers a head.

    Source: Reformer, arXiv:2001.04451.

    Example:
        >>> x = torch.randn(1, 24, 2, 8)
        >>> lsh_attn(x, x, lsh_buckets(x, torch.randn(2, 8, 2, 2)), 6).shape
        torch.Size([1, 24, 2, 8])
    """
    B, T, H, K = qk.shape
    rounds = buckets.shape[2]
    check_shape("lsh", "buckets", buckets, "[B, H, rounds, T]", (B, H, rounds, T))
    if T % chunk_length:
        raise ValueError(f"lsh_attn: chunk_length must divide T, got {chunk_length} and {T}")
    # The chunk before the first of a round is the last of the round before it, as transformers
    # and the authors have it: rounds are one long sorted sequence.
    most = int(buckets.max()) if buckets.numel() else 0
    offset = torch.arange(rounds, device=qk.device)[:, None] * (most + 1)
    order = torch.sort((buckets + offset).flatten(2), dim=-1, stable=True)[1]  # [B, H, rounds T]
    place = order % T
    back = torch.empty_like(order).scatter_(
        -1, order, torch.arange(rounds * T, device=qk.device).expand_as(order)
    )

    def chunks(x: Tensor) -> Tensor:
        """``[B, T, H, D]`` to sorted ``[B, H, chunks, chunk_length, D]``."""
        return torch.unflatten(take_tokens(x, place).transpose(1, 2), 2, (-1, chunk_length))

    def beside(x: Tensor, dim: int) -> Tensor:
        return torch.cat([x.roll(1, 2), x], dim)

    acc = accumulation_dtype(qk)
    q = chunks(qk).to(acc)
    unit = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)
    keys, values = beside(unit, 3), beside(chunks(v).to(acc), 3)
    at = torch.unflatten(place, -1, (-1, chunk_length))
    of = beside(at, 3)
    score = K**-0.5 * q @ keys.mT  # [B, H, chunks, chunk_length, 2 chunk_length]
    if causal:
        score = score.masked_fill(of[..., None, :] > at[..., None], -1e9)
    score = score.masked_fill(of[..., None, :] == at[..., None], self_value)
    lse = score.logsumexp(-1)
    o = (score - lse[..., None]).exp() @ values
    o, lse = o.flatten(2, 3), lse.flatten(2)  # [B, H, rounds T, ..]
    o = torch.unflatten(o.gather(2, back[..., None].expand_as(o)), 2, (rounds, T))
    lse = torch.unflatten(lse.gather(2, back), 2, (rounds, T))
    rounds_of = [(o[:, :, i].transpose(1, 2), lse[:, :, i]) for i in range(rounds)]
    o, _ = merge(*rounds_of)
    return o.to(v.dtype)


# ---- Sorted blocks ----


def sinkhorn(logits: Tensor, iterations: int = 8, causal: bool = False) -> Tensor:
    """Logarithm of the doubly stochastic matrix next to ``exp(logits) [.., N, N]``.

    Causally, row i has columns before i only, and a column is normalised over rows up to its own:
    nothing depends on later blocks.

    Source: Sparse Sinkhorn Attention, arXiv:2002.11296, section 3.1.

    Example:
        >>> p = sinkhorn(torch.randn(4, 4), 30).exp()
        >>> p.sum(0).allclose(torch.ones(4)), p.sum(1).allclose(torch.ones(4), atol=1e-3)
        (True, True)
    """
    if not causal:
        for _ in range(iterations):
            logits = logits - logits.logsumexp(-1, keepdim=True)
            logits = logits - logits.logsumexp(-2, keepdim=True)
        return logits
    low = torch.finfo(logits.dtype).min / 4  # finite, so that gradients are
    block = torch.arange(logits.shape[-1], device=logits.device)
    ahead = block >= block[:, None]
    for _ in range(iterations):
        logits = logits.masked_fill(ahead, low)
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits.masked_fill(ahead, low)
        logits = logits - logits.logcumsumexp(-2)
    return logits.masked_fill(ahead, low)


def sinkhorn_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    logits: Tensor | None = None,
    temperature: float = 0.75,
    iterations: int = 8,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Every block of queries attends to its own block, and to a mixture of blocks as one block.

    Keys and values of the second are ``P K`` and ``P V``, by blocks, P the doubly stochastic matrix
    of :func:`sinkhorn`.

    Args:
        q, k, v: ``[B, T, H, K]``, ``[B, T, H, K]`` and ``[B, T, H, V]``; T a multiple of block.
        block: tokens.
        logits: ``[B, H, N, N]`` of the N blocks; default: products of the blocks' summed queries
            and keys (causally of the queries before the block), by ``K ** -0.5``.
        temperature: logits are divided by it.
        iterations: of normalisation.
        causal: mixtures of earlier blocks only, and the own block up to the query.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, H, V]``.

    Source: Sparse Sinkhorn Attention, arXiv:2002.11296.

    Example:
        >>> q, k, v = torch.randn(3, 1, 24, 2, 8)
        >>> sinkhorn_attn(q, k, v, 6).shape
        torch.Size([1, 24, 2, 8])
    """
    T, K = q.shape[1], q.shape[3]
    if T % block:
        raise ValueError(f"sinkhorn_attn: block must divide T, got {block} and {T}")
    q, k, v = (torch.unflatten(x, 1, (-1, block)) for x in (q, k, v))  # [B, N, block, H, D]
    if logits is None:
        summary = q.sum(2)
        if causal:  # a block's own queries come too late for its first ones
            summary = F.pad(summary.cumsum(1), (0, 0, 0, 0, 1, 0))[:, :-1]
        logits = torch.einsum("bnhd,bmhd->bhnm", summary, k.sum(2)) * K**-0.5
    N = q.shape[1]
    check_shape("sinkhorn", "logits", logits, "[B, H, N, N]", (q.shape[0], q.shape[3], N, N))
    p = sinkhorn(logits.to(accumulation_dtype(q)) / temperature, iterations, causal).exp()
    p = p.to(k.dtype)
    mixed_k, mixed_v = (torch.einsum("bhnm,bmthd->bnthd", p, x).flatten(0, 1) for x in (k, v))
    own = each(lambda x: x.flatten(0, 1), q, k, v)
    near = block_sparse_attn(*own, None, AttnMask(causal=causal), scale, return_lse=True)
    o, lse = block_sparse_attn(own[0], mixed_k, mixed_v, scale=scale, return_lse=True)
    if causal:  # the first block has nothing before it
        first = torch.arange(o.shape[0], device=o.device) % q.shape[1] == 0
        lse = lse.masked_fill(first[:, None, None], -torch.inf)
    o, _ = merge(near, (o, lse))
    return torch.unflatten(o, 0, q.shape[:2]).flatten(1, 2)


# ---- Light and heavy ----


def soft_topk(scores: Tensor, count: int, epsilon: float = 1.0, iterations: int = 50) -> Tensor:
    """Weights in [0, 1] that sum to ``count`` and favour large scores ``[.., T]``, with gradients.

    They maximise ``Σ s_i w_i + ε · entropy`` by coordinate descent.

    Source: CoLT5, arXiv:2303.09752, appendix.

    Example:
        >>> w = soft_topk(torch.tensor([3.0, 2.0, 0.0, -1.0]), 2)
        >>> w.sum().allclose(torch.tensor(2.0)), w.max().item() <= 1
        (True, True)
    """
    k = torch.tensor(float(min(count, scores.shape[-1])), dtype=scores.dtype, device=scores.device)
    b = -F.relu(scores)
    for _ in range(iterations):
        a = epsilon * (k.log() - ((scores + b) / epsilon).logsumexp(-1, keepdim=True))
        b = -F.relu(scores + a)
    return ((scores + a + b) / epsilon).exp()


def colt5_attn(
    light: tuple[Tensor, Tensor, Tensor],
    heavy: tuple[Tensor, Tensor, Tensor],
    query_scores: Tensor,
    key_scores: Tensor,
    queries: int,
    keys: int,
    radius: int = 127,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Local attention for every token, and full attention of routed tokens over routed tokens.

    Args:
        light: q, k, v ``[B, T, H, ·]`` of the light branch.
        heavy: q, k, v ``[B, T, H', ·]`` of the heavy one; only routed tokens are read.
        query_scores, key_scores: ``[B, T]``, of two routers.
        queries, keys: tokens each of them takes.
        radius: of the light branch, on each side.
        scale: default ``K ** -0.5`` of either.

    Returns:
        The two branches, ``[B, T, H, V]`` and ``[B, T, H', V']``; the second, zeros where a token
        was not routed, is multiplied by the query router's weight, its values by the key router's.
        A layer adds their projections.

    Source: CoLT5, arXiv:2303.09752, section 3.2.

    Example:
        >>> light, heavy = torch.randn(2, 3, 1, 20, 2, 8)
        >>> s = torch.randn(2, 1, 20)
        >>> colt5_attn(tuple(light), tuple(heavy), *s, 4, 8, 3)[1].ne(0).any(-1).sum().item()
        8
    """
    near = block_sparse_attn(*light, None, AttnMask(left=radius, right=radius), scale)
    H, T = heavy[0].shape[2], heavy[0].shape[1]

    def routed(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``[B, H, n]`` tokens and ``[B, n, 1, 1]`` weights."""
        weight = soft_topk(scores, count)
        index = scores.topk(min(count, T), -1).indices.sort(-1).values
        return index[:, None].expand(-1, H, -1), weight.gather(-1, index)[..., None, None]

    (at, weight), (of, key_weight) = routed(query_scores, queries), routed(key_scores, keys)
    q, k, v = take_tokens(heavy[0], at), take_tokens(heavy[1], of), take_tokens(heavy[2], of)
    o = block_sparse_attn(q, k, v * key_weight.to(v.dtype), scale=scale)
    return near, _put_tokens(o * weight.to(o.dtype), at, T)
