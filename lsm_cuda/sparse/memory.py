"""Attention with memories: earlier segments, compressed ones, and tokens found by search."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops._common import accumulation_dtype, check_last_queries, check_shape
from ..ops._stretches import stretches
from ..ops.attn_mask import AttnMask
from ..ops.block_lists import BlockLists
from ..ops.sparse_attn import block_sparse_attn
from .kv_cache import pages_of

__all__ = [
    "CompressiveMemory",
    "adaptive_span_attn",
    "landmark_attn",
    "memorizing_attn",
    "transformer_xl_attn",
    "unlimiformer_attn",
]


# ---- Earlier segments ----


def transformer_xl_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_r: Tensor,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    base: float = 10000.0,
    scale: float | None = None,
) -> Tensor:
    r"""Causal attention with relative positions: scores ``(q_i + u)·k_j + (q_i + w)·W_r R_{i−j}``.

    R is sinusoidal, so the second term is a product of features of i and of j: queries and keys
    grow by R's channels, and no matrix of positions is made.

    Args:
        q: ``[B, T, H, K]``, the last T of the keys' tokens.
        k, v: ``[B, M + T, H, K]`` and ``[B, M + T, H, V]``, memory in front.
        w_r: ``[H, K, R]``, projection of the R sines and cosines of a distance, sines first.
        content_bias, position_bias: u and w, ``[H, K]``; default 0.
        base: wavelength base of R.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, H, V]``. K + R may be at most 256 on CUDA.

    Source: Transformer-XL, arXiv:1901.02860, section 3.3.

    Example:
        >>> q, k = torch.randn(1, 8, 2, 4), torch.randn(1, 12, 2, 4)
        >>> transformer_xl_attn(q, k, k, torch.randn(2, 4, 6)).shape
        torch.Size([1, 8, 2, 4])
    """
    K, R = w_r.shape[1:]
    check_last_queries("transformer_xl", q, k)
    check_shape("transformer_xl", "w_r", w_r, "[H, K, R]", (q.shape[2], q.shape[3], R))
    if R % 2:
        raise ValueError(f"transformer_xl_attn: R must be even, got {R}")
    scale = K**-0.5 if scale is None else scale
    acc, (T, S) = accumulation_dtype(q), (q.shape[1], k.shape[1])
    frequency = base ** (-torch.arange(0, R, 2, device=q.device, dtype=acc) / R)
    angle = torch.arange(S, device=q.device, dtype=acc)[:, None] * frequency  # [S, R / 2]
    sin, cos = angle.sin(), angle.cos()
    at = q if position_bias is None else q + position_bias
    a, b = torch.einsum("bthk,hkr->bthr", at.to(acc), w_r.to(acc)).chunk(2, -1)
    sin_i, cos_i = sin[S - T :, None], cos[S - T :, None]
    # a sin(ω(i − j)) + b cos(ω(i − j)), sorted by cos(ωj) and sin(ωj)
    features = torch.cat([a * sin_i + b * cos_i, b * sin_i - a * cos_i], -1).to(q.dtype)
    places = torch.cat([cos, sin], -1).to(k.dtype)[None, :, None]
    q = torch.cat([q if content_bias is None else q + content_bias, features], -1)
    k = torch.cat([k, places.expand(*k.shape[:3], -1)], -1)
    return block_sparse_attn(q, k, v, None, AttnMask(causal=True), scale)


class CompressiveMemory:
    """Hidden states of earlier segments, the older ones compressed.

    Args:
        length: newest states, kept as they are.
        compressed: compressed states; 0 is Transformer-XL's memory.
        rate: states that one compressed state stands for.
        compress: from ``[B, n · rate, D]`` to ``[B, n, D]``; default: means. A convolution of
            stride ``rate`` is the paper's best.

    States are detached: no gradient passes from one segment to the one before it.

    Source: Compressive Transformers, arXiv:1911.05507; Transformer-XL, arXiv:1901.02860.

    Example:
        >>> memory = CompressiveMemory(4, 2, rate=2)
        >>> for segment in torch.arange(12.0).view(3, 1, 4, 1):
        ...     pushed = memory.update(segment)
        >>> memory.states().flatten().tolist()
        [4.5, 6.5, 8.0, 9.0, 10.0, 11.0]
    """

    def __init__(
        self,
        length: int,
        compressed: int = 0,
        rate: int = 3,
        compress: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if length < 0 or compressed < 0 or rate < 1:
            raise ValueError(
                "CompressiveMemory: lengths must not be negative and rate positive, got "
                f"{length}, {compressed} and {rate}"
            )
        self.length, self.compressed, self.rate = length, compressed, rate
        self.compress = compress
        self.recent: Tensor | None = None
        self.old: Tensor | None = None

    def states(self) -> Tensor | None:
        """``[B, M, D]`` for keys and values in front of the next segment's, oldest first."""
        if self.recent is None:
            return None
        return self.recent if self.old is None else torch.cat([self.old, self.recent], 1)

    def update(self, hidden: Tensor) -> Tensor | None:
        """Remember a segment ``[B, T, D]``.

        Returns:
            What was pushed out of the recent memory and compressed just now, ``[B, n · rate, D]``,
            for a loss that trains ``compress`` (:meth:`reconstruction_loss`); or None.
        """
        hidden = hidden.detach()
        recent = hidden if self.recent is None else torch.cat([self.recent, hidden], 1)
        over = max(recent.shape[1] - self.length, 0)
        self.recent = recent[:, over:]
        whole = over // self.rate * self.rate if self.compressed else 0
        if not whole:
            return None
        pushed = recent[:, over - whole : over]  # what does not make a whole one is forgotten
        made = self._compressed(pushed).detach()
        old = made if self.old is None else torch.cat([self.old, made], 1)
        self.old = old[:, max(old.shape[1] - self.compressed, 0) :]
        return pushed

    def _compressed(self, x: Tensor) -> Tensor:
        if self.compress is not None:
            return self.compress(x)
        return torch.unflatten(x, 1, (-1, self.rate)).mean(2)

    def reconstruction_loss(self, pushed: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Attention-reconstruction loss: how much attention to compressed states differs.

        Args:
            pushed: what :meth:`update` returned.
            attend: attention of the segment's hidden states, detached, over the given states.
        """
        return F.mse_loss(attend(self._compressed(pushed)), attend(pushed).detach())


def adaptive_span_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor,
    ramp_length: float = 32.0,
    max_span: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention whose reach is learned.

    Weights are multiplied by ``clamp((R + z − distance) / R, 0, 1)``.

    Args:
        q, k, v: ``[B, T, Hq, K]``, ``[B, S, Hkv, K]`` and ``[B, S, Hkv, V]``.
        span: z ``[Hq]``, in tokens, clamped to [0, ``max_span``]. Add its mean, times a small
            number, to the loss.
        ramp_length: R.
        max_span: bound of z.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, Hq, V]``; weights are normalised after the ramp.

    Source: Adaptive Attention Span in Transformers, arXiv:1905.07799.

    Example:
        >>> q, k, v = torch.randn(3, 1, 20, 2, 8)
        >>> adaptive_span_attn(q, k, v, torch.tensor([2.0, 9.0]), 4.0).shape
        torch.Size([1, 20, 2, 8])
    """
    span = span.clamp(0, max_span)
    # beyond the ramp weights are 0: blocks there need not be read
    left = (span.detach() + ramp_length).ceil().to(torch.int32)
    mask = AttnMask(causal=True, head_left=left)
    return block_sparse_attn(q, k, v, None, mask, scale, ramp=span, ramp_length=float(ramp_length))


# ---- Search ----


def memorizing_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    gate: Tensor,
    topk: int = 32,
    scale: float | None = None,
) -> Tensor:
    """Causal attention, mixed with attention over the ``topk`` best keys of a memory.

    ``o = σ(gate) · o_memory + (1 − σ(gate)) · o_local``, each with a softmax of its own.

    Args:
        q, k, v: ``[B, T, Hq, K]``, ``[B, T, Hkv, K]`` and ``[B, T, Hkv, V]``.
        memory_k, memory_v: ``[B, M, Hkv, K]`` and ``[B, M, Hkv, V]``; no gradient.
        gate: ``[Hq]``.
        topk: keys of a query, found by exhaustive search.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, Hq, V]``.

    Source: Memorizing Transformers, arXiv:2203.08913.

    Example:
        >>> q, k, v = torch.randn(3, 1, 20, 2, 8)
        >>> memory = torch.randn(2, 1, 100, 2, 8)
        >>> memorizing_attn(q, k, v, *memory, torch.zeros(2), 4).shape
        torch.Size([1, 20, 2, 8])
    """
    local = block_sparse_attn(q, k, v, None, AttnMask(causal=True), scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    B, T, Hq, _ = q.shape
    H, acc = k.shape[2], accumulation_dtype(q)
    keys, values = (x.detach().to(acc).transpose(1, 2) for x in (memory_k, memory_v))
    row = torch.arange(B * H, device=q.device).view(B, 1, H, 1, 1)
    outputs = []
    for at in stretches(T, B * Hq * max(keys.shape[2], topk * keys.shape[3])):
        qs = torch.unflatten(q[:, at].to(acc), 2, (H, -1))  # [B, t, H, G, K]
        with torch.no_grad():
            score = torch.einsum("bthgd,bhmd->bthgm", qs, keys)
            index = score.topk(min(topk, score.shape[-1]), -1).indices
            found = [x.flatten(0, 1)[row, index] for x in (keys, values)]  # [B, t, H, G, topk, ·]
        p = (scale * torch.einsum("bthgd,bthgnd->bthgn", qs, found[0])).softmax(-1)
        outputs.append(torch.einsum("bthgn,bthgnd->bthgd", p, found[1]).flatten(2, 3))
    far = torch.cat(outputs, 1).to(q.dtype)
    share = gate.sigmoid()[:, None].to(q.dtype)
    return share * far + (1 - share) * local


def unlimiformer_attn(
    q: Tensor,
    states: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    topk: int = 1024,
    scale: float | None = None,
) -> Tensor:
    """Cross-attention of every head over the encoder states that fit it best.

    Heads search one set of states, by ``(q W_kᵀ)·h``: no keys are made of states that are not read.

    Args:
        q: ``[B, T, H, K]``, queries of the decoder.
        states: ``[B, S, D]``, hidden states of the encoder.
        w_k, w_v: ``[H, D, K]`` and ``[H, D, V]``, projections of each head.
        topk: states of a query and head, found by exhaustive search.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, H, V]``.

    Source: Unlimiformer, arXiv:2305.01625.

    Example:
        >>> q, w = torch.randn(1, 3, 2, 8), torch.randn(2, 16, 8)
        >>> unlimiformer_attn(q, torch.randn(1, 50, 16), w, w, 4).shape
        torch.Size([1, 3, 2, 8])
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    B, T, H, _ = q.shape
    S, D = states.shape[1:]
    acc = accumulation_dtype(q)
    wide = states.to(acc)
    row = torch.arange(B, device=q.device).view(B, 1, 1, 1)
    outputs = []
    for at in stretches(T, B * H * max(S, topk * D)):
        qs = torch.einsum("bthk,hdk->bthd", q[:, at].to(acc), w_k.to(acc))
        with torch.no_grad():
            index = torch.einsum("bthd,bsd->bths", qs, wide).topk(min(topk, S), -1).indices
        found = wide[row, index]  # [B, t, H, topk, D]
        p = (scale * torch.einsum("bthd,bthnd->bthn", qs, found)).softmax(-1)
        mixed = torch.einsum("bthn,bthnd->bthd", p, found)
        outputs.append(torch.einsum("bthd,hdv->bthv", mixed, w_v.to(acc)))
    return torch.cat(outputs, 1).to(q.dtype)


# ---- Landmarks ----


def landmark_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    block: int = 64,
    topk: int | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Attention to earlier blocks through one landmark key each: a softmax inside a softmax.

    A query's softmax is over its own block's tokens, causally, and the landmarks of earlier blocks;
    a landmark's weight is shared out inside its block by a softmax over the block's tokens. As one
    softmax, a token of block b scores ``s_tj + s_{t,landmark b} − log Σ_{i in b} exp s_ti``.

    Args:
        q: ``[B, T, Hq, K]``.
        k, v: ``[B, T, Hkv, K]`` and ``[B, T, Hkv, V]``, without the landmark tokens.
        landmarks: ``[B, blocks, Hkv, K]``, keys of the landmark tokens of all blocks that are
            whole, or more.
        block: tokens of a block, 16, 32, 64 or 128.
        topk: read the earlier blocks with the best landmarks only (inference); default all.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, Hq, V]``. Holds a number for every query, head and block.

    Source: Landmark Attention, arXiv:2305.16300, section 3.1.

    Example:
        >>> q, k, v = torch.randn(3, 1, 40, 2, 8)
        >>> landmark_attn(q, k, v, torch.randn(1, 2, 2, 8), 16).shape
        torch.Size([1, 40, 2, 8])
    """
    B, T, Hq, K = q.shape
    scale = K**-0.5 if scale is None else scale
    acc, H, blocks = accumulation_dtype(q), k.shape[2], -(-T // block)
    if landmarks.shape[1] < T // block:
        raise ValueError(
            f"landmark_attn: needs a landmark for each of {T // block} whole blocks, got "
            f"{landmarks.shape[1]}"
        )
    keys = pages_of(k.to(acc), block, 0)  # [B, blocks, block, H, K]
    marks = landmarks[:, :blocks].to(acc)
    marks = F.pad(marks, (0, 0, 0, 0, 0, blocks - marks.shape[1]))

    def bias(qs: Tensor, keys: Tensor, marks: Tensor) -> Tensor:
        """``[B, t, Hq, blocks]``; what lies inside is made again in the backward pass."""
        inner = torch.einsum("bthgd,bnshd->bthgns", qs, keys).mul(scale).logsumexp(-1)
        return (scale * torch.einsum("bthgd,bnhd->bthgn", qs, marks) - inner).flatten(2, 3)

    parts = []
    for at in stretches(T, B * Hq * blocks * block):
        qs = torch.unflatten(q[:, at].to(acc), 2, (H, -1))
        parts.append(checkpoint(bias, qs, keys, marks, use_reentrant=False))
    every = torch.cat(parts, 1).transpose(1, 2)  # [B, Hq, T, blocks]
    column = torch.arange(blocks, device=q.device)
    own = torch.arange(T, device=q.device)[:, None] // block
    chosen = (column < own).expand_as(every)
    if topk is not None:
        qs = torch.unflatten(q.to(acc), 2, (H, -1))
        score = torch.einsum("bthgd,bnhd->bhgtn", qs, marks).flatten(1, 2)
        best = score.masked_fill(~chosen, -torch.inf).topk(min(topk, blocks), -1)
        few = torch.zeros_like(chosen.contiguous())
        chosen = chosen & few.scatter(-1, best.indices, True)
    every = every.masked_fill(column >= own, 0)
    lists = BlockLists.from_bitmap(chosen | (column == own), T, T, 1, block, bias=every)
    return block_sparse_attn(q, k, v, lists, AttnMask(causal=True), scale)
