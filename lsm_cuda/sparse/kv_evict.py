"""Cache policies that drop tokens for good."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._common import accumulation_dtype
from ..ops.attn_mask import AttnMask
from ..ops.sparse_attn import block_sparse_attn
from .kv_cache import Policy, attention_mass, by_group, take_tokens

__all__ = [
    "H2O",
    "TOVA",
    "FastGen",
    "SnapKV",
    "SpAtten",
    "StreamingLLM",
]


class StreamingLLM(Policy):
    """Keeps the first tokens and the last ones.

    With the cache's ``rotary``, positions are those in the cache, as the paper has it.

    Args:
        window: last tokens, the current one among them.
        sinks: first tokens.

    Raises:
        ValueError: no window, or fewer than no sinks.

    Source: Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453.
    """

    def __init__(self, window: int = 1020, sinks: int = 4) -> None:
        if window < 1 or sinks < 0:
            raise ValueError(
                f"StreamingLLM: window must be positive and sinks not negative, got {window} and "
                f"{sinks}"
            )
        self.window, self.sinks = window, sinks

    def begin(self, q: Tensor, lse: Tensor) -> None:
        self.append()

    def append(self) -> None:
        self.cache.keep_ends(self.sinks, self.window)

    def attend(self, q: Tensor) -> Tensor:
        mask = AttnMask(causal=True, left=self.window - 1, sinks=self.sinks)
        return self.cache.read(q, mask)


class H2O(Policy):
    """Keeps the last tokens and those that got most attention so far, head by head.

    Args:
        heavy: tokens of the second kind.
        recent: last tokens, the current one among them.

    Source: H2O: Heavy-Hitter Oracle, arXiv:2306.14048.
    """

    def __init__(self, heavy: int = 128, recent: int = 128) -> None:
        self.heavy, self.recent = heavy, recent

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, _ = self.cache.kept()
        self.mass = by_group(attention_mass(q, k, lse, self.cache.scale), k.shape[2])
        self._evict()

    def append(self) -> None:
        if not hasattr(self, "mass"):
            k, _ = self.cache.raw()
            self.mass = torch.zeros(
                k.shape[0], k.shape[2], 0, dtype=accumulation_dtype(k), device=k.device
            )
        self.mass = F.pad(self.mass, (0, 1))

    def attend(self, q: Tensor) -> Tensor:
        k, v = self.cache.kept()
        o, lse = block_sparse_attn(q, k, v, scale=self.cache.scale, return_lse=True)
        p = attention_mass(q, k, lse, self.cache.scale)
        self.mass = self.mass + by_group(p, k.shape[2])
        self._evict()
        return o

    def _evict(self) -> None:
        n = self.mass.shape[-1]
        if n > self.heavy + self.recent:
            keep = best_and_recent(self.mass, self.heavy, self.recent)
            self.cache.keep(keep)
            self.mass = self.mass.gather(-1, keep)


class TOVA(Policy):
    """Drops the token with least of the current query's attention, the mean over heads.

    Args:
        budget: tokens that are kept.

    Source: Transformers are Multi-State RNNs, arXiv:2401.06104.
    """

    def __init__(self, budget: int = 512) -> None:
        self.budget = budget

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, _ = self.cache.kept()
        self._evict(attention_mass(q[:, -1:], k, lse[..., -1:], self.cache.scale))

    def attend(self, q: Tensor) -> Tensor:
        k, v = self.cache.kept()
        o, lse = block_sparse_attn(q, k, v, scale=self.cache.scale, return_lse=True)
        self._evict(attention_mass(q, k, lse, self.cache.scale))
        return o

    def _evict(self, p: Tensor) -> None:
        if p.shape[-1] > self.budget:
            heads = self.cache.raw()[0].shape[2]
            keep = best_and_recent(p.mean(1, keepdim=True), self.budget, 0)
            self.cache.keep(keep.expand(-1, heads, -1))


class SpAtten(Policy):
    """Drops the tokens that mattered least so far to all heads together, and reads few values.

    Args:
        budget: tokens that are kept, by the attention they got in all, and the current one.
        values: of these, how many each head takes values of, those of the largest weights, which
            are not normalised again; default all.
        heads: query heads that are kept of every sequence, by the sum of the magnitudes of their
            outputs so far; a head that is dropped gives zeros from then on. Default all. The paper
            drops a head in later layers too: ``alive [B, Hq]`` of one layer's policy may be given
            to the next one's.
        progressive: ``(few, bits, threshold)``: queries and keys have so many bits, of which a head
            reads the first few; all where none of its weights reaches the threshold, a flat row.
            This is the arithmetic of it: what is kept is kept whole. Default: exact.

    Source: SpAtten, arXiv:2012.09852, section 3.
    """

    def __init__(
        self,
        budget: int = 512,
        values: int | None = None,
        heads: int | None = None,
        progressive: tuple[int, int, float] | None = None,
    ) -> None:
        self.budget, self.values, self.heads = budget, values, heads
        self.progressive = progressive
        self.alive: Tensor | None = None
        self.output: Tensor | None = None

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, _ = self.cache.kept()
        self.mass = attention_mass(q, k, lse, self.cache.scale).sum(1, keepdim=True)
        self._prune()

    def append(self) -> None:
        k, _ = self.cache.raw()
        if not hasattr(self, "mass"):
            self.mass = k.new_zeros(k.shape[0], 1, 0, dtype=accumulation_dtype(k))
        self.mass = F.pad(self.mass, (0, 1))

    def attend(self, q: Tensor) -> Tensor:
        k, v = self.cache.kept()
        o, p = self._weights(q, k, v)
        if self.values is not None and self.values < k.shape[1]:
            best = p.topk(self.values, -1)
            taken = take_tokens(v, best.indices).to(p.dtype)
            o = torch.einsum("bhn,bnhd->bhd", best.values, taken)[:, None].to(v.dtype)
        if self.alive is not None:
            p = p * self.alive[..., None]
        o = self._kept_heads(o)
        self.mass = self.mass + p.sum(1, keepdim=True)
        self._prune()
        return o

    def _weights(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``o [B, 1, Hq, V]`` and the weights of it ``[B, Hq, S]``."""
        scale = self.cache.scale
        if self.progressive is None:
            o, lse = block_sparse_attn(q, k, v, scale=scale, return_lse=True)
            return o, attention_mass(q, k, lse, scale)
        few, bits, threshold = self.progressive
        results = []
        for kept in (bits, few):
            rough_q, rough_k = leading_bits(q, kept, bits), leading_bits(k, kept, bits)
            o, lse = block_sparse_attn(rough_q, rough_k, v, scale=scale, return_lse=True)
            results.append((o, attention_mass(rough_q, rough_k, lse, scale)))
        (o, p), (o_few, p_few) = results
        flat = p_few.amax(-1) < threshold  # [B, Hq]
        return o.where(flat[:, None, :, None], o_few), p.where(flat[..., None], p_few)

    def _kept_heads(self, o: Tensor) -> Tensor:
        """``o [B, 1, Hq, V]`` without the heads that were dropped; then more may be."""
        if self.heads is None:
            return o
        B, _, Hq, _ = o.shape
        if self.alive is None:
            self.alive = torch.ones(B, Hq, dtype=torch.bool, device=o.device)
        o = torch.where(self.alive[:, None, :, None], o, 0.0)
        size = o.abs().sum((1, 3), dtype=accumulation_dtype(o))
        self.output = size if self.output is None else self.output + size
        best = self.output.masked_fill(~self.alive, -1.0).topk(min(self.heads, Hq), -1).indices
        self.alive = self.alive & torch.zeros_like(self.alive).scatter(-1, best, True)
        return o

    def _prune(self) -> None:
        if self.mass.shape[-1] > self.budget + 1:
            keep = best_and_recent(self.mass, self.budget, 1)
            self.cache.keep(keep.expand(-1, self.cache.raw()[0].shape[2], -1))
            self.mass = self.mass.gather(-1, keep)


class SnapKV(Policy):
    """Keeps of a prompt what its last queries look at, head by head, and all that follows.

    Args:
        budget: tokens of the prompt that are kept.
        window: last tokens of the prompt, which are kept and whose queries choose the others.
        kernel: tokens over which a key's share is smoothed (the maximum of), odd.

    Source: SnapKV, arXiv:2404.14469.
    """

    def __init__(self, budget: int = 1024, window: int = 32, kernel: int = 7) -> None:
        if budget <= window or kernel % 2 == 0:
            raise ValueError(
                f"SnapKV: budget must exceed window and kernel be odd, got {budget}, {window}, "
                f"{kernel}"
            )
        self.budget, self.window, self.kernel = budget, window, kernel

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, _ = self.cache.kept()
        if k.shape[1] <= self.budget:
            return
        last = q[:, -self.window :], k, lse[..., -self.window :]
        mass = by_group(attention_mass(*last, self.cache.scale), k.shape[2])
        smooth = F.max_pool1d(
            mass[..., : -self.window], self.kernel, stride=1, padding=self.kernel // 2
        )
        mass = torch.cat([smooth, mass[..., -self.window :]], -1)
        self.cache.keep(best_and_recent(mass, self.budget - self.window, self.window))


class FastGen(Policy):
    """Every head keeps the least of five sets of tokens that recovers its attention to the prompt.

    In order: special tokens; these and punctuation; these and the heaviest tokens (as
    :class:`H2O`); these and the last ones; all. A head's set is the first that gets a share of at
    least ``recovery`` of its attention, on average over the prompt's queries. New tokens stay as
    long as they are among the last in heads with that set, or in all sets as the current token.

    Args:
        special: bool ``[B, T]``, special tokens of the prompt.
        punctuation: bool ``[B, T]``.
        recovery: share of attention.
        heavy: share of the prompt's tokens that count as the heaviest.
        recent: share of them that counts as the last.

    Source: Model Tells You What to Discard, arXiv:2310.01801.
    """

    position: Tensor  # [B, Hkv, S], of every kept token; -1: none
    fixed: Tensor  # [B, Hkv, S], those that stay for good

    SETS = ("special", "punctuation", "frequency", "local", "full")

    def __init__(
        self,
        special: Tensor,
        punctuation: Tensor,
        recovery: float = 0.95,
        heavy: float = 0.3,
        recent: float = 0.3,
    ) -> None:
        self.special, self.punctuation = special, punctuation
        self.recovery, self.heavy, self.recent = recovery, heavy, recent

    def begin(self, q: Tensor, lse: Tensor) -> None:
        k, _ = self.cache.kept()
        B, T, H, _ = k.shape
        for name, x in (("special", self.special), ("punctuation", self.punctuation)):
            if x.shape != (B, T):
                raise ValueError(
                    f"FastGen: {name} must have shape [B, T] = {[B, T]} of the prompt, got "
                    f"{[*x.shape]}"
                )
        mass = by_group(attention_mass(q, k, lse, self.cache.scale), H)  # [B, H, T]
        share = mass / mass.sum(-1, keepdim=True)
        self.window = max(round(self.recent * T), 1)
        count = max(round(self.heavy * T), 1)
        token = torch.arange(T, device=q.device)
        heaviest = torch.zeros_like(mass, dtype=torch.bool)
        heaviest.scatter_(-1, mass.topk(min(count, T), -1).indices, True)
        last = (token >= T - self.window).expand_as(heaviest)
        kept = self.special[:, None].expand_as(heaviest)
        sets = [kept]
        for more in (self.punctuation[:, None], heaviest, last, torch.ones_like(last)):
            kept = kept | more
            sets.append(kept)
        recovered = torch.stack([(share * s).sum(-1) for s in sets])  # [5, B, H]
        enough = recovered >= self.recovery
        enough[-1] = True
        #: ``[B, H]``, the place of each head's set in ``SETS``
        self.chosen = enough.int().argmax(0)
        alive = torch.stack(sets).gather(0, self.chosen[None, ..., None].expand(1, B, H, T))[0]
        self._compact(alive, token.expand(B, H, T))

    def append(self) -> None:
        if not hasattr(self, "chosen"):
            raise RuntimeError("FastGen: needs a prompt before steps")
        B, H = self.chosen.shape
        now = self.position.new_full((B, H, 1), self.cache.seen - 1)
        self.position = torch.cat([self.position, now], -1)
        self.fixed = F.pad(self.fixed, (0, 1))
        # what is not of the set stays while it is new enough, or for good in full heads
        local, full = (self.chosen == 3)[..., None], (self.chosen == 4)[..., None]
        fresh = self.position >= self.cache.seen - self.window
        current = self.position == self.cache.seen - 1
        alive = self.fixed | current | (local & fresh) | full
        self._compact(alive & (self.position >= 0), self.position)

    def _compact(self, alive: Tensor, position: Tensor) -> None:
        """Keep the tokens that are alive in front, in order, for the longest head's sake others."""
        if not hasattr(self, "fixed"):
            last = position >= self.cache.seen - self.window
            self.fixed = alive & ~(last & (self.chosen == 3)[..., None])
        count = int(alive.sum(-1).max())
        order = torch.sort(~alive, dim=-1, stable=True)[1][..., :count]
        dead = ~alive.gather(-1, order)
        self.cache.keep(order)
        self.position = position.gather(-1, order).masked_fill(dead, -1)
        self.fixed = self.fixed.gather(-1, order) & ~dead

    def attend(self, q: Tensor) -> Tensor:
        place = torch.arange(self.position.shape[-1], device=q.device)
        index = place.expand_as(self.position).masked_fill(self.position < 0, -1)
        return self.cache.read_tokens(q, index)


def leading_bits(x: Tensor, few: int, bits: int) -> Tensor:
    """The first ``few`` bits of ``x [B, T, H, D]`` as integers of ``bits`` bits, times a step of
    each row and head."""
    wide = x.to(accumulation_dtype(x))
    step = wide.abs().amax((1, 3), keepdim=True) / (2 ** (bits - 1) - 1)
    rest = 2.0 ** (bits - few)
    code: Tensor = ((wide / step.where(step > 0, 1)).round() / rest).floor() * rest
    rough: Tensor = code * step
    return rough.to(x.dtype)


def best_and_recent(mass: Tensor, best: int, recent: int) -> Tensor:
    """``[B, heads, best + recent]``, ascending: the last tokens and the best before them."""
    n = mass.shape[-1]
    chosen = mass[..., : n - recent].topk(best, -1).indices
    last = torch.arange(n - recent, n, device=mass.device).expand(*mass.shape[:-1], -1)
    return torch.cat([chosen, last], -1).sort(-1).values
