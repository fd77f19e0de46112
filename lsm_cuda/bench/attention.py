"""Softmax attention under measurement: dense, in a window, over lists of blocks, and the choice of
blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

import lsm_cuda
from lsm_cuda import reference

from .operators import BLOCK, CHOSEN, STRIDE, WINDOW, Inputs, Op, Shape

__all__ = ["Attention", "Coded", "Dense", "Nsa", "Selection", "drawn_lists", "token_lists"]


@dataclass(frozen=True)
class Attention(Op):
    """Causal softmax attention, whose step is one query beside a cache of T keys.

    A query sees the last ``window`` tokens (all, if 0), of the blocks of keys on its list in
    ``lists(T)``.
    """

    output: str = "B T H V"
    state: tuple[str, ...] = ()
    engine: str = "attention"
    window: int = 0
    lists: Callable[[int], lsm_cuda.ops.BlockLists] | None = None
    cached = True

    def definition(self, x: Inputs) -> Tensor:
        """By the whole matrix of scores."""
        if "cu_seqlens" in x:
            cuts = pairwise(x["cu_seqlens"].tolist())
            parts = ({n: x[n][:, a:b] for n in self.inputs} for a, b in cuts)
            return torch.cat([self.definition(part) for part in parts], 1)
        q, k, v = (x[name] for name in self.qkv)
        return attend(q, k, v, self.seen(q.shape[1], q.device))

    def mask(self) -> lsm_cuda.ops.AttnMask:
        return lsm_cuda.ops.AttnMask(causal=True, left=self.window - 1)

    def seen(self, T: int, device: torch.device) -> Tensor:
        """The keys of each query, bool [T, T]."""
        if self.lists is None:
            return self.mask().to_dense(T, T, device)
        return self.lists(T).to_dense(self.mask())[0, 0].to(device)

    def seen_by_last(self, T: int, device: torch.device) -> Tensor:
        """Places of the keys that the last of T queries sees."""
        lists = None if self.lists is None else last_row(self.lists(T))
        seen = self.mask().to_dense(1, T) if lists is None else lists.to_dense(self.mask())[0, 0]
        return seen[0].nonzero()[:, 0].to(device)

    def stepped(self, output: Tensor) -> Tensor:
        return output[:, -1:]

    def sequence(self, x: Inputs, shape: Shape) -> dict[str, Any]:
        listed = {}
        if self.lists is not None:
            listed["lists"] = placed(self.lists(shape["T"]), shape["B"], x["q"].device)
        return {**x, "mask": self.mask(), **listed}

    def token(self, x: Inputs, shape: Shape) -> dict[str, Any]:
        """The last token of the queries, before all keys and values."""
        q, listed = x["q"][:, -1:].contiguous(), {}
        if self.lists is not None:
            listed["lists"] = placed(last_row(self.lists(shape["T"])), shape["B"], q.device)
        return {"q": q, "k_cache": x["k"], "v_cache": x["v"], "mask": self.mask(), **listed}

    def affordable(self, shape: Shape, numbers: int) -> int:
        """Tokens whose scores are four times so many numbers; 1280 at most."""
        return min(1280, isqrt(4 * numbers // (shape["B"] * shape["H"])))

    def keys_of_last(self, T: int) -> int:
        """Keys that the last of T queries sees."""
        if self.lists is not None:
            return pairs(last_row(self.lists(T)), T - 1)
        return min(T, self.window or T)

    def pairs_of(self, T: int) -> int:
        """Pairs of a query and a key that it sees, of T tokens."""
        if self.lists is not None:
            return pairs(self.lists(T))
        n = min(T, self.window or T)
        return n * (n + 1) // 2 + (T - n) * n

    def minimal_bytes(self, shape: Shape, dtype: torch.dtype, mode: str) -> int:
        """As of every operator; a step reads the keys and values that it sees."""
        if mode != "step":
            return super().minimal_bytes(shape, dtype, mode)
        B, H, HKV, K, V = shape.dims("B H HKV K V")
        return dtype.itemsize * B * (H + HKV * self.keys_of_last(shape["T"])) * (K + V)

    def minimal_flops(self, shape: Shape, mode: str) -> int:
        """By pair and head: scores and sums of values, 2 K + 2 V; in a backward scores, their
        gradients, dq, dk and dv."""
        if mode == "training":
            return self.minimal_flops(shape, "forward") + self.minimal_flops(shape, "backward")
        B, H, K, V = shape.dims("B H K V")
        if mode == "step":
            found = self.keys_of_last(shape["T"])
        else:
            found = sum(self.pairs_of(T) for T in shape.lengths)
        return B * H * found * (6 * K + 4 * V if mode == "backward" else 2 * K + 2 * V)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention over the keys that are seen, bool [T, keys]; 0 where there is none."""
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    scores = q.shape[-1] ** -0.5 * torch.einsum("bthk,bjhk->bhtj", q, k)
    some = seen.any(-1, keepdim=True)
    p = scores.masked_fill(~seen & some, -torch.inf).softmax(-1).masked_fill(~some, 0.0)
    return torch.einsum("bhtj,bjhv->bthv", p, v)


@functools.cache
def drawn_lists(T: int) -> lsm_cuda.ops.BlockLists:
    """For each block of queries a tenth of the blocks before it, drawn, and its own."""
    n = -(-T // BLOCK)
    some = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < 0.1
    bitmap = (some | torch.eye(n, dtype=torch.bool)).tril()
    return lsm_cuda.ops.BlockLists.from_bitmap(bitmap, T, T, BLOCK, BLOCK)


@functools.cache
def token_lists(T: int) -> lsm_cuda.ops.BlockLists:
    """As NSA's: CHOSEN blocks for each query, the first one, its own with the one before, and drawn
    ones, which four neighbours share."""
    own = torch.arange(T) // BLOCK
    rng = torch.Generator().manual_seed(0)
    drawn = torch.rand(-(-T // 4), CHOSEN - 3, generator=rng).repeat_interleave(4, 0)[:T]
    drawn = (drawn * (own + 1)[:, None]).long().clamp(max=own[:, None])
    always = torch.stack([torch.zeros_like(own), own - 1, own], 1)
    blocks = torch.cat([always, drawn], 1)[None, None]
    return lsm_cuda.ops.BlockLists.from_indices(blocks, T, T, 1, BLOCK)


def entries(lists: lsm_cuda.ops.BlockLists) -> tuple[Tensor, Tensor]:
    """The row and the block of each entry."""
    row, block, real = lists._entries()
    return row[real], block[real]


@functools.cache
def last_row(lists: lsm_cuda.ops.BlockLists) -> lsm_cuda.ops.BlockLists:
    """What the last token reads."""
    row, block = entries(lists)
    mine = block[row == lists.shape[2] - 1]
    return lsm_cuda.ops.BlockLists.from_indices(mine[None, None, None], 1, lists.Tk, 1, BLOCK)


def pairs(lists: lsm_cuda.ops.BlockLists, first: int = 0) -> int:
    """Pairs of a query and a key at or before it that are listed; ``first``: place of the first
    query."""
    row, block = entries(lists)
    query = row[:, None] * lists.block_q + torch.arange(lists.block_q)
    keys = (query + first + 1 - BLOCK * block[:, None]).clamp(0, BLOCK)
    return int(keys.masked_fill(query >= lists.Tq, 0).sum())


@functools.cache
def placed(lists: lsm_cuda.ops.BlockLists, B: int, device: torch.device) -> lsm_cuda.ops.BlockLists:
    """For B rows, on a device."""
    return lists.expand(B).to(device)


@dataclass(frozen=True)
class Dense(Attention):
    """Attention to every key before, whose step writes its own key and value to the cache first."""

    def token(self, x: Inputs, shape: Shape) -> dict[str, Any]:
        q, k, v = (x[name][:, -1:].contiguous() for name in self.qkv)
        before = torch.full((shape["B"],), shape["T"] - 1, dtype=torch.int32, device=q.device)
        cache = {"k_cache": x["k"], "v_cache": x["v"], "cache_seqlens": before}
        return {"q": q, "k": k, "v": v, **cache, "causal": True}


@dataclass(frozen=True)
class Coded(Attention):
    """A step beside a cache of 8-bit codes, of numbers that they stand for exactly."""

    modes, trained = ("step",), False

    @property
    def available(self) -> bool:
        return super().available and hasattr(torch.ops.lsm, "sparse_attn_decode_codes")

    def make(self, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        """Keys and values are n / 32 of n from -128 to 127, both of which every row has."""
        made = super().make(shape, dtype, device, seed)
        for name in ("k", "v"):
            n = (32 * made[name]).round().clamp(-128, 127)
            n[..., 0], n[..., 1] = -128, 127
            made[name] = n / 32
        return made

    def token(self, x: Inputs, shape: Shape) -> dict[str, Any]:
        from lsm_cuda.sparse import quantize

        (k, k_affine), (v, v_affine) = (quantize(x[name], 8) for name in ("k", "v"))
        cache = {"k_cache": k, "v_cache": v, "affine": (k_affine, v_affine)}
        return {**super().token(x, shape), **cache}

    def minimal_bytes(self, shape: Shape, dtype: torch.dtype, mode: str) -> int:
        """Of a key or a value a byte for each number, its step and its least in fp32."""
        B, H, HKV, K, V = shape.dims("B H HKV K V")
        kept = HKV * self.keys_of_last(shape["T"]) * (K + V + 2 * 2 * 4)
        return B * (dtype.itemsize * H * (K + V) + kept)


@dataclass(frozen=True)
class Nsa(Attention):
    """Native sparse attention, gates and choice of blocks included. A step's compressed keys and
    values are kept, as a cache would."""

    window: int = 512

    def definition(self, x: Inputs) -> Tensor:
        """Of so few tokens that every block is chosen."""
        q, k, v = (x[name] for name in self.qkv)
        T = q.shape[1]
        assert T <= BLOCK * CHOSEN
        t = torch.arange(T, device=q.device)[:, None]
        past = torch.arange(1, T // BLOCK + 1, device=q.device) * BLOCK - 1 <= t
        compressed = attend(q, self.compressed(k), self.compressed(v), past)
        selected, recent = (attend(q, k, v, seen) for seen in (t >= t.T, self.seen(T, q.device)))
        g_cmp, g_slc, g_swa = (x[name].unsqueeze(-1) for name in ("g_cmp", "g_slc", "g_swa"))
        return g_cmp * compressed + g_slc * selected + g_swa * recent

    def compressed(self, x: Tensor) -> Tensor:
        """Means of whole blocks."""
        B, T, H, K = x.shape
        return x[:, : T // BLOCK * BLOCK].reshape(B, T // BLOCK, BLOCK, H, K).mean(2)

    def sequence(self, x: Inputs, shape: Shape) -> dict[str, Any]:
        sizes = {"block_counts": CHOSEN, "block_size": BLOCK, "window_size": self.window}
        return {**x, **sizes}

    def token(self, x: Inputs, shape: Shape) -> dict[str, Any]:
        queries = {n: x[n][:, -1:].contiguous() for n in self.inputs if n not in ("k", "v")}
        kept = {f"{n}_cmp": self.compressed(x[n]) for n in ("k", "v")}
        return self.sequence({**queries, "k": x["k"], "v": x["v"], **kept}, shape)

    def affordable(self, shape: Shape, numbers: int) -> int:
        return min(BLOCK * CHOSEN, super().affordable(shape, numbers))

    def keys_of_last(self, T: int) -> int:
        """Of the three branches together."""
        own = (T - 1) % BLOCK + 1
        chosen = min(T, BLOCK * (CHOSEN - 1) + own)
        return T // BLOCK + chosen + min(T, self.window)

    def pairs_of(self, T: int) -> int:
        return sum(self.keys_of_last(t + 1) for t in range(T))


@dataclass(frozen=True)
class Selection(Op):
    """The blocks of keys that each query should read, by its softmax over pooled keys."""

    output: str = "B HKV T"
    state: tuple[str, ...] = ()
    engine: str = "attention"
    result: Callable[[Any], Tensor] = lambda lists: lists.to_bitmap().float()
    trained = False

    def rules(self) -> tuple[lsm_cuda.ops.ScoreRule, lsm_cuda.ops.BlockChoice]:
        rule = lsm_cuda.ops.ScoreRule.compressed(WINDOW, STRIDE, BLOCK)
        return rule, lsm_cuda.ops.BlockChoice(top_k=CHOSEN, first=1, local=2)

    def sequence(self, x: Inputs, shape: Shape) -> dict[str, Any]:
        rule, choice = self.rules()
        return {**x, "rule": rule, "choice": choice, "tokens": shape["T"]}

    def definition(self, x: Inputs) -> Tensor:
        """1 where a block is chosen, [B, HKV, T, blocks]."""
        rule, choice = self.rules()
        q, k = (x[name].detach().cpu() for name in ("q", "k"))
        T = q.shape[1]
        scores = reference.block_scores(q, k, rule, blocks=-(-T // BLOCK))
        chosen = torch.zeros_like(scores)
        for b, heads in enumerate(reference.block_choice(scores, rule, choice, T)):
            for h, rows in enumerate(heads):
                for t, blocks in enumerate(rows):
                    chosen[b, h, t, blocks] = 1
        return chosen.to(x["q"].device)

    def affordable(self, shape: Shape, numbers: int) -> int:
        return 2048  # twice as many blocks as are chosen

    def minimal_bytes(self, shape: Shape, dtype: torch.dtype, mode: str) -> int:
        """Queries and keys read, CHOSEN numbers of 4 bytes written for each query and key head."""
        read = sum(prod(shape.dims(dims)) for dims in self.inputs.values())
        return read * dtype.itemsize + 4 * CHOSEN * prod(shape.dims(self.output))

    def minimal_flops(self, shape: Shape, mode: str) -> int:
        """Scores of the windows before each query."""
        T, B, H, K = shape.dims("T B H K")
        seen = sum(max(0, (t + 1 - WINDOW) // STRIDE + 1) for t in range(T))
        return 2 * B * H * K * seen
