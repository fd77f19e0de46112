"""Blocks chosen by scores: pooled (InfLLM-v2), or learned by distillation (SeerAttention); heads
chosen by distillation (DuoAttention)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import RotaryEmbedding
from ..ops._common import check_last_queries, check_shape
from ..ops._stretches import stretches
from ..ops.attn_mask import AttnMask
from ..ops.block_lists import BlockLists
from ..ops.nsa import compress, nsa_compression
from ..ops.pooling import block_pool, row_boundaries
from ..ops.selection import BlockChoice, ScoreRule, block_scores, block_select
from ..ops.sparse_attn import block_sparse_attn
from .kv_cache import Policy, pages_of
from .prefill import cumulative

__all__ = [
    "SeerAttentionGate",
    "SeerAttentionR",
    "attach_seer",
    "duo_attn",
    "infllm_v2_attn",
    "infllm_v2_lists",
    "pooled_attention_map",
    "retrieval_heads",
    "seer_attention_forward",
]


# ---- InfLLM-v2 ----


def infllm_v2_lists(
    q: Tensor,
    k: Tensor,
    topk: int = 64,
    block: int = 64,
    kernel: int = 32,
    stride: int = 16,
    first: int = 1,
    local: int = 32,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> BlockLists:
    """Blocks by the best window in them: pooled keys, softmaxes, their sum over a group of heads.

    Softmaxes are over windows wholly in a query's past; their denominators come from windows four
    times as long and as far apart, and are 1 before the first of these ends.

    Args:
        q, k: ``[B, TQ, Hq, K]``, the last tokens of ``[B, T, Hkv, K]``.
        topk: blocks of a query, the first and local ones among them.
        block: tokens of a block, 16, 32, 64 or 128.
        kernel, stride: tokens of a window, and from one to the next.
        first, local: blocks at the beginning, and up to the query's own, that come before others.
        scale: default ``K ** -0.5``.
        cu_seqlens: ``[N + 1]`` of sequences packed into one row (TQ = T).

    Returns:
        Lists for every query and key head.

    Source: MiniCPM4, arXiv:2506.07900, section 2.2.

    Example:
        >>> q, k = torch.randn(1, 100, 4, 8), torch.randn(1, 100, 1, 8)
        >>> infllm_v2_lists(q, k, 3, 16, 8, 4, local=1).counts()[0, 0, ::25].tolist()
        [1, 2, 3, 3]
    """
    if kernel % stride or block % stride:
        raise ValueError(
            f"infllm_v2: stride must divide kernel and block, got {stride}, {kernel} and {block}"
        )
    check_last_queries("infllm_v2", q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tokens, rule = k.shape[1], ScoreRule.compressed(kernel, stride, block, tap_max=True)
    with torch.no_grad():
        coarse, cuts = compress(k, 4 * kernel, 4 * stride, cu_seqlens)
        _, lse = nsa_compression(
            q, coarse, coarse, 4 * kernel, scale, cu_seqlens,
            stride=4 * stride, tokens=tokens, cu_seqlens_cmp=cuts,
        )  # fmt: skip
        keys = block_pool(k, kernel, stride, partial=False, cu_seqlens=cu_seqlens)
    cuts = None if cu_seqlens is None else row_boundaries(cu_seqlens, kernel, stride, False)
    return block_select(
        q, keys, replace(rule, offset=tokens - q.shape[1]),
        BlockChoice(top_k=topk, first=first, local=local), scale,
        lse.masked_fill(lse == -torch.inf, 0), None, cu_seqlens, cuts, tokens,
    )  # fmt: skip


def infllm_v2_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk: int = 64,
    block: int = 64,
    kernel: int = 32,
    stride: int = 16,
    first: int = 1,
    local: int = 32,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal attention over the blocks of :func:`infllm_v2_lists`, with its arguments.

    Returns:
        ``[B, TQ, Hq, V]``; trained through, but for the choice of blocks.

    Example:
        >>> q, k = torch.randn(1, 100, 4, 8), torch.randn(1, 100, 1, 8)
        >>> infllm_v2_attn(q, k, k, 3, 16, 8, 4, local=1).shape
        torch.Size([1, 100, 4, 8])
    """
    lists = infllm_v2_lists(q, k, topk, block, kernel, stride, first, local, scale, cu_seqlens)
    return block_sparse_attn(q, k, v, lists, AttnMask(causal=True), scale, cu_seqlens=cu_seqlens)


# ---- SeerAttention ----


@torch.no_grad()
def pooled_attention_map(
    q: Tensor, k: Tensor, block: int = 64, block_q: int | None = None, scale: float | None = None
) -> Tensor:
    """The largest causal attention weight in every block, rows divided by their sum: what a gate
    learns. The map itself is never kept.

    Args:
        q, k: ``[B, T, Hq, K]`` and ``[B, T, Hkv, K]``.
        block: tokens of a block of keys.
        block_q: of queries; default ``block``. 1 gives the target of SeerAttention-R.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, Hq, rows, blocks]``.

    Source: SeerAttention, arXiv:2410.13276, section 3.3.

    Example:
        >>> q = torch.randn(1, 40, 2, 8)
        >>> pooled_attention_map(q, q, 16).sum(-1).allclose(torch.ones(1, 2, 3))
        True
    """
    T, S = q.shape[1], k.shape[1]
    block_q = block if block_q is None else block_q
    # the largest weight of a block for every query, then of the queries of a row
    rule = ScoreRule(softmax=True, block_k=block, taps=block, tap_step=block, tap_max=True)
    _, lse = block_sparse_attn(q, k, k, None, AttnMask(causal=True), scale, return_lse=True)
    tops = []
    for at in stretches(-(-T // block_q), q.shape[0] * q.shape[2] * block_q * -(-S // block)):
        own = slice(at.start * block_q, min(at.stop * block_q, T))
        part = replace(rule, offset=S - T + own.start)
        top = block_scores(q[:, own], k, part, scale, lse[..., own])
        top = F.pad(top, (0, 0, 0, -top.shape[2] % block_q))
        tops.append(torch.unflatten(top, 2, (-1, block_q)).amax(3))
    top = torch.cat(tops, 2)
    return top / top.sum(-1, keepdim=True)


class SeerAttentionGate(nn.Module):
    """Scores blocks of keys for blocks of queries: ``P_q(Q) W_q · (P_k(K) W_k)``.

    Queries are pooled by their mean, keys by their mean, maximum and minimum side by side; heads of
    a group of queries share the keys' projection. Both come before positions and are turned by
    those of their blocks.

    Args:
        head_dim: K.
        num_heads: query heads.
        num_kv_heads: key heads.
        block: tokens of a block.
        gate_dim: channels of a gate.
        rope_theta: base of the blocks' rotary embedding; None: no positions.
        group_queries: SeerAttention-R: no pooling of queries, which a group of heads makes one
            gate's query of together.

    Source: SeerAttention, arXiv:2410.13276; SeerAttention-R, arXiv:2506.08889.

    Example:
        >>> gate = SeerAttentionGate(8, 4, 2, block=16, gate_dim=8)
        >>> q, k = torch.randn(1, 40, 4, 8), torch.randn(1, 40, 2, 8)
        >>> gate(q, k).shape
        torch.Size([1, 4, 3, 3])
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        block: int = 64,
        gate_dim: int = 128,
        rope_theta: float | None = 10000.0,
        group_queries: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.block, self.gate_dim, self.group_queries = block, gate_dim, group_queries
        share = num_heads // num_kv_heads
        gates, width = (num_kv_heads, share * head_dim) if group_queries else (num_heads, head_dim)
        self.w_q = nn.Parameter(torch.empty(gates, width, gate_dim))
        self.w_k = nn.Parameter(torch.empty(num_kv_heads, 3 * head_dim, gate_dim))
        self.rotary = None if rope_theta is None else RotaryEmbedding(gate_dim, rope_theta)
        for w in (self.w_q, self.w_k):
            nn.init.normal_(w, std=w.shape[1] ** -0.5)

    def keys(self, k: Tensor) -> Tensor:
        """``[B, S, Hkv, K]`` to ``[B, blocks, Hkv, gate_dim]``."""
        size, S = self.block, k.shape[1]
        blocks = pages_of(k, size, 0)
        tokens = (S - torch.arange(blocks.shape[1], device=k.device) * size).clamp(max=size)
        pooled = [
            blocks.sum(2) / tokens[:, None, None].to(k.dtype),
            pages_of(k, size, -torch.inf).amax(2),
            pages_of(k, size, torch.inf).amin(2),
        ]
        made: Tensor = torch.einsum("bnhd,hdg->bnhg", torch.cat(pooled, -1), self.w_k.to(k.dtype))
        place = torch.arange(made.shape[1], device=k.device) * size
        if self.rotary is not None:
            made = self.rotary(made, place)
        return made

    def queries(self, q: Tensor, start: int = 0) -> Tensor:
        """``[B, rows, gates, gate_dim]``; ``start`` is the first query's position."""
        size, T = self.block, q.shape[1]
        place = torch.arange(start, start + T, device=q.device)
        if self.group_queries:
            q = torch.unflatten(q.flatten(2), 2, (self.w_q.shape[0], -1))
            place = place // size * size
        else:
            rows = pages_of(q, size, 0)
            tokens = (T - torch.arange(rows.shape[1], device=q.device) * size).clamp(max=size)
            q, place = rows.sum(2) / tokens[:, None, None].to(q.dtype), place[::size]
        made: Tensor = torch.einsum("bthd,hdg->bthg", q, self.w_q.to(q.dtype))
        if self.rotary is not None:
            made = self.rotary(made, place)
        return made

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Logits ``[B, gates, rows, blocks]``, -inf ahead of a row.

        Args:
            q, k: ``[B, T, Hq, K]`` and ``[B, T, Hkv, K]``, without positions.
        """
        made, keys = self.queries(q), self.keys(k)
        share = made.shape[2] // keys.shape[2]
        keys = keys.repeat_interleave(share, 2)
        logits: Tensor = torch.einsum("bthg,bnhg->bhtn", made, keys) * self.gate_dim**-0.5
        row = torch.arange(logits.shape[2], device=q.device)[:, None]
        own = row // self.block if self.group_queries else row
        return logits.masked_fill(torch.arange(logits.shape[3], device=q.device) > own, -torch.inf)

    def loss(self, q: Tensor, k: Tensor, target: Tensor) -> Tensor:
        """Mean over rows of ``KL(target | softmax(logits))``.

        Args:
            q, k: as :meth:`forward`.
            target: ``[B, Hq, rows, blocks]`` (:func:`pooled_attention_map`); with
                ``group_queries`` the largest of a group's heads counts.
        """
        logits: Tensor = self(q, k)
        if self.group_queries:
            target = torch.unflatten(target, 1, (logits.shape[1], -1)).amax(2)
            target = target / target.sum(-1, keepdim=True)
        log_p = logits.log_softmax(-1).masked_fill(target == 0, 0).to(target.dtype)
        return (torch.xlogy(target, target) - target * log_p).sum(-1).mean()

    @torch.no_grad()
    def lists(
        self, q: Tensor, k: Tensor, topk: int | None = None, threshold: float | None = None,
        mass: float | None = None,
    ) -> BlockLists:  # fmt: skip
        """Blocks of every row: the ``topk`` best, those of at least ``threshold`` of the softmax,
        or the fewest that hold ``mass`` of it. The first block and the row's own are always read.

        Args:
            q, k: as :meth:`forward`.
            topk, threshold, mass: one of them.
        """
        if sum(x is not None for x in (topk, threshold, mass)) != 1:
            raise ValueError(
                "SeerAttentionGate.lists: give one of topk, threshold and mass, got "
                f"{topk}, {threshold}, {mass}"
            )
        p = self(q, k).softmax(-1)
        if topk is not None:
            chosen = torch.zeros_like(p, dtype=torch.bool)
            chosen.scatter_(-1, p.topk(min(topk, p.shape[-1]), -1).indices, True)
        elif threshold is not None:
            chosen = p >= threshold
        else:
            assert mass is not None
            chosen = cumulative(p, mass)
        column = torch.arange(p.shape[-1], device=p.device)
        row = torch.arange(p.shape[-2], device=p.device)[:, None]
        own = row // self.block if self.group_queries else row
        chosen = (chosen | (column == 0) | (column == own)) & (column <= own)
        block_q = 1 if self.group_queries else self.block
        return BlockLists.from_bitmap(chosen, q.shape[1], k.shape[1], block_q, self.block)


class SeerAttentionR(Policy):
    """Decoding by a gate: every group of heads reads the pages its gate's query scores best.

    The gate takes queries and keys without positions: give the cache its ``rotary``, or give the
    gate none.

    Args:
        gate: with ``group_queries``, for one cache.
        topk: pages that are read, the last ``local`` ones among them.
        threshold: instead, pages of at least this share of the softmax.
        local: last pages that are always read, with the first.

    Source: SeerAttention-R, arXiv:2506.08889.
    """

    def __init__(
        self,
        gate: SeerAttentionGate,
        topk: int | None = 32,
        threshold: float | None = None,
        local: int = 1,
    ) -> None:
        if not gate.group_queries:
            raise ValueError("SeerAttentionR: gate must have group_queries")
        self.gate, self.topk, self.threshold, self.local = gate, topk, threshold, local
        self.compressed: Tensor | None = None

    def begin(self, q: Tensor, lse: Tensor) -> None:
        self.compressed = self.gate.keys(self.cache.raw()[0])

    def append(self) -> None:
        k, _ = self.cache.raw()
        size = self.gate.block
        if self.compressed is None:
            self.compressed = self.gate.keys(k)
            return
        # only the page that is being filled changes
        start = (k.shape[1] - 1) // size
        page = self.gate.keys(k[:, start * size :])
        if self.gate.rotary is not None:  # turned as the first page; on to its place
            page = self.gate.rotary(page, start * size)
        self.compressed = torch.cat([self.compressed[:, :start], page], 1)

    def attend(self, q: Tensor) -> Tensor:
        assert self.compressed is not None
        raw = self.cache.unturned if self.cache.unturned is not None else q
        made = self.gate.queries(raw, len(self.cache) - 1)[:, 0]  # [B, Hkv, gate_dim]
        score = torch.einsum("bhg,bnhg->bhn", made, self.compressed) * self.gate.gate_dim**-0.5
        p = score.softmax(-1)
        n = p.shape[-1]
        page = torch.arange(n, device=q.device)
        always = (page == 0) | (page >= n - self.local)
        if self.threshold is None:
            assert self.topk is not None
            pages = p.masked_fill(always, torch.inf).topk(min(self.topk, n), -1).indices
        else:
            pages = page.expand_as(p).masked_fill(~((p >= self.threshold) | always), -1)
        return self.cache.read_pages(q, pages, self.gate.block)


def seer_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over a gate's blocks, as transformers calls an attention function.

    ``module.seer_gate`` and ``module.seer_choice`` are put there by :func:`attach_seer`. Prompts
    are causal and without padding; queries after them, as in generation, read everything. Of the
    options, a soft cap of scores (Gemma 2), sink logits (GPT-OSS) and a window count.

    Raises:
        ValueError: padding, dropout, or attention that is not causal.
    """
    causal = options.get("is_causal")
    if dropout or not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(
            "seer_attention_forward: attention must be causal and without dropout, got dropout = "
            f"{dropout}"
        )
    window = options.get("sliding_window")
    if attention_mask is not None:
        # of each query its own key, and of the last query what its window has: padding hides them
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        own = seen.diagonal(seen.shape[-1] - seen.shape[-2], -2, -1)
        if not bool(own.all() and seen[..., -1, -(window or seen.shape[-1]) :].all()):
            raise ValueError("seer_attention_forward: sequences must come without padding")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    lists = None
    if q.shape[1] == k.shape[1] > 1:
        gate: SeerAttentionGate = module.seer_gate  # type: ignore[assignment]
        lists = gate.lists(q, k, **module.seer_choice)  # type: ignore[arg-type]
    o: Tensor = block_sparse_attn(
        q, k, v, lists, AttnMask(causal=True, left=-1 if window is None else window - 1), scaling,
        options.get("softcap") or 0.0, options.get("s_aux"),
    )  # fmt: skip
    return o, None


def attach_seer(
    model: nn.Module,
    make_gate: Callable[[nn.Module], SeerAttentionGate],
    is_attention: Callable[[nn.Module], bool],
    **choice: Any,
) -> list[SeerAttentionGate]:
    """Give every attention module of a transformers model a gate, and attend by it.

    Args:
        model: a causal model of transformers whose attention goes through its interface.
        make_gate: the gate of an attention module. transformers' attention functions see queries
            and keys with positions, so a gate made here needs none (``rope_theta=None``).
        is_attention: which modules get one.
        choice: ``topk``, ``threshold`` or ``mass`` of :meth:`SeerAttentionGate.lists`.

    Returns:
        The gates, for training: only their parameters need a gradient.

    Raises:
        ValueError: no module is an attention module.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("lsm_seer", seer_attention_forward)
    # else transformers makes no mask for it, and padding would go unnoticed
    AttentionMaskInterface.register("lsm_seer", sdpa_mask)
    gates = []
    for module in model.modules():
        if is_attention(module):
            module.seer_gate = make_gate(module)
            module.seer_choice = choice  # type: ignore[assignment]
            gates.append(module.seer_gate)
            module.config._attn_implementation = "lsm_seer"  # type: ignore[union-attr]
    if not gates:
        raise ValueError("attach_seer: is_attention accepts no module of the model")
    return gates


# ---- DuoAttention ----


def duo_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    window: int = 256,
    sinks: int = 128,
    scale: float | None = None,
) -> Tensor:
    """Between causal attention to everything and to the first and last tokens: how it is learned
    which heads need everything.

    ``gate`` is trained, with all else frozen, so that the model's last hidden states stay those of
    full attention, and to be small: ``mse + 0.05 gate.abs().sum()`` in the paper.

    Args:
        q, k, v: ``[B, T, Hq, K]``, ``[B, T, Hkv, K]`` and ``[B, T, Hkv, V]``.
        gate: ``[Hkv]``, the share of full attention, in [0, 1].
        window, sinks: tokens of the other.
        scale: default ``K ** -0.5``.

    Returns:
        ``[B, T, Hq, V]``.

    Source: DuoAttention, arXiv:2410.10819, section 3.2.

    Example:
        >>> q, k, v = torch.randn(1, 20, 4, 8), *torch.randn(2, 1, 20, 2, 8)
        >>> duo_attn(q, k, v, torch.tensor([1.0, 0.0]), 4, 2).shape
        torch.Size([1, 20, 4, 8])
    """
    check_shape("duo", "gate", gate, "[Hkv]", k.shape[2:3])
    full = block_sparse_attn(q, k, v, None, AttnMask(causal=True), scale)
    near = AttnMask(causal=True, left=window - 1, sinks=sinks)
    share = gate.repeat_interleave(q.shape[2] // len(gate))[:, None].to(full.dtype)
    return share * full + (1 - share) * block_sparse_attn(q, k, v, None, near, scale)


def retrieval_heads(gate: Tensor, share: float) -> Tensor:
    """The key heads with the largest gates, that share of them: bool like ``gate [Hkv]``, or
    ``[layers, Hkv]`` of all layers together. For :class:`DuoAttention`.

    Source: DuoAttention, arXiv:2410.10819, section 3.3.

    Example:
        >>> retrieval_heads(torch.tensor([0.1, 0.9, 0.4]), 0.34).tolist()
        [False, True, False]
    """
    chosen = torch.zeros(gate.numel(), dtype=torch.bool, device=gate.device)
    chosen[gate.detach().flatten().topk(round(share * gate.numel())).indices] = True
    return chosen.view(gate.shape)
