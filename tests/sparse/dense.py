"""Dense attention under any mask, in as many lines as it takes: what sparse methods are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, count: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``q [B, T, Hq, K]``; key j counts ``count [.., T, S]`` times."""
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = torch.einsum("bthd,bshd->bhts", q, k) * scale + count.to(q.dtype).log()
    some = (count > 0).any(-1).expand(score.shape[:-1])
    p = score.masked_fill(~some[..., None], 0).softmax(-1) * some[..., None]
    lse = score.masked_fill(~some[..., None], 0).logsumexp(-1).masked_fill(~some, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", p, v), lse


def qkv(
    T: int, Hq: int = 4, Hkv: int = 2, K: int = 8, V: int = 6, B: int = 2, dtype=torch.float64
) -> list[Tensor]:
    shapes = (B, T, Hq, K), (B, T, Hkv, K), (B, T, Hkv, V)
    return [torch.randn(*s, dtype=dtype, requires_grad=True) for s in shapes]


def assert_same_attention(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], *leaves):
    """Outputs, log-sum-exps, and gradients of a random sum of both."""
    seen = theirs[1] > -torch.inf
    assert torch.equal(ours[1] > -torch.inf, seen)
    weights = [torch.randn_like(x) for x in theirs]

    def results(o: Tensor, lse: Tensor) -> list[Tensor]:
        finite = torch.where(seen, lse, 0)
        total = (o * weights[0]).sum() + (finite * weights[1]).sum()
        return [o, finite, *torch.autograd.grad(total, leaves)]

    for a, b in zip(results(*ours), results(*theirs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def same(a, b, *leaves):
    """Values and gradients."""
    weight = torch.randn_like(b)
    for x, y in zip(
        [a, *torch.autograd.grad((a * weight).sum(), leaves, retain_graph=True)],
        [b, *torch.autograd.grad((b * weight).sum(), leaves)],
        strict=True,
    ):
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-7)
