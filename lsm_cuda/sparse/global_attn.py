"""Attention around global tokens with keys that no pattern has: ETC's relative labels, the
embeddings and the relay of Star-Transformer. Each kind of keys is a call of its own; results are
merged by their log-sum-exp, so nothing of size T x T is made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._common import accumulation_dtype
from ..ops.attn_mask import AttnMask
from ._pattern import attend, merge

__all__ = ["etc_attn", "star_attn"]


def etc_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    radius: int,
    labels: Tensor,
    across: Tensor,
    belongs: Tensor,
    scale: float | None = None,
) -> Tensor:
    r"""ETC with relative labels: ``s_ij = scale q_i · (k_j + a_{l(i, j)})``.

    The first G tokens, the global input, attend to all; long tokens to the global ones and to
    ``radius`` long ones on either side. Within an input a pair's label is its distance, clipped;
    across, whether the long token belongs to the global one.

    Args:
        q, k, v: ``[B, T, H, K]``, ``[B, T, H, K]`` and ``[B, T, H, V]``.
        radius: long tokens on either side.
        labels: ``[2 c + 1, H, K]``, a of key minus query from -c to c, c at least 1.
        across: ``[2, H, K]``, a of pairs that do not belong together, and of those that do.
        belongs: ``[G, T - G]`` bool.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, H, V]``.

    Source: ETC, arXiv:2004.08483, sections 3.1 and 3.2.

    Example:
        >>> x, a = torch.randn(1, 8, 2, 4), torch.randn(5, 2, 4)
        >>> etc_attn(x, x, x, 2, a[:3], a[3:], torch.ones(2, 6, dtype=torch.bool)).shape
        torch.Size([1, 8, 2, 4])
    """
    G, T, c = belongs.shape[0], q.shape[1], labels.shape[0] // 2
    if labels.shape[0] % 2 == 0 or c < 1 or radius < 0 or G + belongs.shape[1] != T:
        raise ValueError(
            "etc_attn: needs an odd number of labels from 3 on, a radius of 0 or more and belongs "
            f"[G, {T} - G], got {labels.shape[0]}, {radius} and {[*belongs.shape]}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    acc = accumulation_dtype(q)
    place = torch.arange(G, device=q.device)
    near = (place - place[:, None]).clamp(-c, c) + c
    long_q, long_k, long_v = (x[:, G:] for x in (q, k, v))

    def dense(
        q: Tensor, k: Tensor, v: Tensor, kinds: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Few queries, or few keys: ``index [Tq, Tk]`` says which of ``kinds`` a pair has."""
        q, k, kinds = (x.to(acc) for x in (q, k, kinds))
        score = torch.einsum("bthd,bshd->bhts", q, k)
        own = torch.einsum("bthd,nhd->bhtn", q, kinds)
        score = scale * (score + own.gather(-1, index.expand(*own.shape[:3], -1)))
        o = torch.einsum("bhts,bshd->bthd", score.softmax(-1).to(v.dtype), v)
        return o, score.logsumexp(-1)

    def shifted(x: Tensor, by: int) -> Tensor:
        """Long token j + by in the place of j, zeros where there is none."""
        n = x.shape[1]
        cut = x[:, max(by, 0) : max(n + min(by, 0), 0)]
        front = min(max(-by, 0), n)
        return F.pad(cut, (0, 0, 0, 0, front, n - front - cut.shape[1]))

    parts = [dense(long_q, k[:, :G], v[:, :G], across, belongs.T.long())] if G else []
    token = torch.arange(T - G, device=q.device)
    for d in range(-min(radius, c - 1), min(radius, c - 1) + 1):
        o, lse = _each(
            long_q, shifted(long_k, d) + labels[c + d].to(k.dtype), shifted(long_v, d), scale
        )
        there = (token + d >= 0) & (token + d < T - G)
        parts.append((o, lse.masked_fill(~there, -torch.inf)))
    for sign in (-1, 1) if radius >= c else ():
        width = radius - c
        far = AttnMask(
            left=width if sign < 0 else 0, right=0 if sign < 0 else width, align_end=False,
            offset=sign * c,
        )  # fmt: skip
        o, lse = attend(long_q, long_k, long_v, far, scale)
        # All keys there have one label, which only counts beside other parts.
        label = torch.einsum("bthd,hd->bht", long_q.to(acc), labels[c + sign * c].to(acc))
        parts.append((o, lse + scale * label))
    o, _ = merge(*parts)
    if not G:
        return o
    index = torch.cat([near, belongs.long() + len(labels)], 1)
    first, _ = dense(q[:, :G], k, v, torch.cat([labels, across]), index)
    return torch.cat([first, o], 1)


def star_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    embedding: tuple[Tensor, Tensor],
    relay: tuple[Tensor, Tensor],
    scale: float | None = None,
) -> Tensor:
    """Every satellite over itself, its two neighbours on the ring, its embedding and the relay.

    The relay's own update is attention of one query over all satellites and itself.

    Args:
        q, k, v: ``[B, T, H, K]``, ``[B, T, H, K]`` and ``[B, T, H, V]``, T at least 3.
        embedding: keys and values of the tokens' embeddings, as k and v.
        relay: key and value of the relay, ``[B, 1, H, K]`` and ``[B, 1, H, V]``.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, H, V]``.

    Source: Star-Transformer, arXiv:1902.09113, section 3.2.

    Example:
        >>> x, s = torch.randn(1, 5, 2, 8), torch.randn(1, 1, 2, 8)
        >>> star_attn(x, x, x, (x, x), (s, s)).shape
        torch.Size([1, 5, 2, 8])
    """
    T = q.shape[1]
    if T < 3:
        raise ValueError(f"star_attn: a ring needs 3 tokens, got T = {T}")
    around_k, around_v = (torch.cat([x[:, -1:], x, x[:, :1]], 1) for x in (k, v))
    around = AttnMask(left=0, right=2, align_end=False)
    parts = [
        attend(q, around_k, around_v, around, scale),
        attend(q, *relay, AttnMask(), scale),
        _each(q, *embedding, scale),
    ]
    o, _ = merge(*parts)
    return o


def _each(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Every query over the one key at its place."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    acc = accumulation_dtype(q)
    return v, (scale * (q.to(acc) * k.to(acc)).sum(-1)).transpose(1, 2).contiguous()
