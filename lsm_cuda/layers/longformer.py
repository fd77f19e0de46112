"""Encoders of long documents with transformers' parameters: Longformer, BigBird, LongT5."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..cache import Cache
from ..modules import RMSNorm
from ..ops._common import accumulation_dtype
from ..ops._stretches import stretches
from ..ops.attn_mask import AttnMask
from ..ops.sparse_attn import block_sparse_attn
from ..sparse._pattern import merge
from ..sparse.patterns import big_bird
from .common import as_rows, check_hidden_states, check_mask, refuse_cache, split_heads

__all__ = [
    "BigBirdSelfAttention",
    "LongT5LocalAttention",
    "LongT5TransientGlobalAttention",
    "LongformerSelfAttention",
]

_NEVER = -1e4  # added to a score: no weight in any dtype, and finite in all


def _check_heads(layer: nn.Module, hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ValueError(
            f"{type(layer).__name__}: hidden_size must be a multiple of num_heads, got "
            f"{hidden_size} and {num_heads}"
        )


class LongformerSelfAttention(nn.Module):
    """A window on both sides, and global tokens anywhere, with projections of their own.

    Args:
        hidden_size: width of input and output.
        num_heads: heads.
        attention_window: tokens of the window, half of them on each side, as in the paper; even.
        dilation: gaps of the window.

    Parameters are those of transformers' layer of this name (which has no output projection).

    Raises:
        ValueError: sizes that do not divide, an odd window.

    Source: Longformer, arXiv:2004.05150.

    Example:
        >>> layer = LongformerSelfAttention(64, num_heads=4, attention_window=8)
        >>> mask = torch.ones(1, 50)
        >>> mask[:, 0] = 2
        >>> layer(torch.randn(1, 50, 64), mask)[0].shape
        torch.Size([1, 50, 64])
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_heads: int = 12,
        attention_window: int = 512,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        _check_heads(self, hidden_size, num_heads)
        if attention_window < 2 or attention_window % 2:
            raise ValueError(
                "LongformerSelfAttention: attention_window must be even and positive, got "
                f"{attention_window}"
            )
        self.head_dim = hidden_size // num_heads
        self.attention_window = attention_window
        self.dilation = dilation
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.query_global = nn.Linear(hidden_size, hidden_size)
        self.key_global = nn.Linear(hidden_size, hidden_size)
        self.value_global = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None, None]:
        """Mix along time, in both directions.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: ``[B, T]``: 0 padding, 1 a token, 2 a global token, which all others
                see and which sees all.
            past_key_values: None.
            use_cache, output_attentions: accepted for the sake of layers that have them.

        Returns:
            ``o [B, T, hidden_size]``, 0 at padding, None, None.
        """
        refuse_cache(self, past_key_values)
        check_hidden_states(hidden_states)
        B, T, _ = hidden_states.shape
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(B, T)
        check_mask(attention_mask, B, T)
        attention_mask = attention_mask[:, attention_mask.shape[1] - T :]
        padding, is_global = attention_mask == 0, attention_mask == 2
        q, k, v = (
            split_heads(projection(hidden_states), self.head_dim)
            for projection in (self.query, self.key, self.value)
        )
        scale = self.head_dim**-0.5
        reach = self.attention_window // 2 * self.dilation
        window = AttnMask(left=reach, right=reach, dilation=self.dilation)
        local = attend_unless(q, k, v, padding | is_global, window, scale)
        count = max(is_global.sum(1).tolist(), default=0)
        if not count:
            return self._out(local[0], padding)
        # global tokens of every row in front, and how many they are
        places = torch.sort(~is_global, dim=1, stable=True)[1][:, :count]
        absent = ~is_global.gather(1, places)
        row = torch.arange(B, device=q.device)[:, None]
        side = attend_unless(q, k[row, places], v[row, places], absent, AttnMask(), scale)
        o, _ = merge(local, side)
        q = split_heads(self.query_global(hidden_states[row, places]), self.head_dim)
        k, v = (
            split_heads(projection(hidden_states), self.head_dim)
            for projection in (self.key_global, self.value_global)
        )
        whole, _ = attend_unless(q, k, v, padding, AttnMask(), scale)
        # absent ones write to a place behind the last
        at = places.masked_fill(absent, T)[..., None, None].expand_as(whole)
        o = F.pad(o, (0, 0, 0, 0, 0, 1)).scatter(1, at, whole.to(o.dtype))[:, :T]
        return self._out(o, padding)

    @staticmethod
    def _out(o: Tensor, padding: Tensor) -> tuple[Tensor, None, None]:
        return o.masked_fill(padding[..., None, None], 0).flatten(2), None, None


def attend_unless(
    q: Tensor, k: Tensor, v: Tensor, never: Tensor, mask: AttnMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention that leaves out keys where ``never [B, S]``, by one more channel of their scores.

    A query that sees no other keys has a log-sum-exp far below all others, not -inf.
    """
    if bool(never.any()):
        bias = (never * (_NEVER / scale)).to(k.dtype)[..., None, None].expand(*k.shape[:3], 1)
        q, k = F.pad(q, (0, 1), value=1.0), torch.cat([k, bias], -1)
    o, lse = block_sparse_attn(q, k, v, None, mask, scale, return_lse=True)
    return o, lse


class BigBirdSelfAttention(nn.Module):
    """Blocks around the query's own, the first and last one, and random ones.

    Args:
        hidden_size: width of input and output.
        num_heads: heads, each with random blocks of its own.
        block_size: tokens of a block, 16, 32, 64 or 128.
        num_random_blocks: random blocks of every row of blocks.
        use_bias: biases in the projections.
        seed: of the random blocks, which are the same in every call for a number of tokens.

    Parameters are those of transformers' ``BigBirdBlockSparseAttention`` (which has no output
    projection); give :meth:`forward` the random blocks of a model that was trained with others.

    Raises:
        ValueError: sizes that do not divide.

    Source: Big Bird, arXiv:2007.14062.

    Example:
        >>> layer = BigBirdSelfAttention(64, num_heads=4, block_size=16)
        >>> layer(torch.randn(1, 150, 64))[0].shape
        torch.Size([1, 150, 64])
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_heads: int = 12,
        block_size: int = 64,
        num_random_blocks: int = 3,
        use_bias: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_heads(self, hidden_size, num_heads)
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.block_size = block_size
        self.num_random_blocks = num_random_blocks
        self.seed = seed
        self.query = nn.Linear(hidden_size, hidden_size, bias=use_bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=use_bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
        random_blocks: Tensor | None = None,
    ) -> tuple[Tensor, None, None]:
        """Mix along time, in both directions.

        Args:
            hidden_states, attention_mask, past_key_values, use_cache, output_attentions,
                cu_seqlens: as :meth:`NystromformerAttention.forward`.
            random_blocks: ``[num_heads, rows, n]``, blocks instead of the random ones.

        Returns:
            ``o [B, T, hidden_size]``, None, None.
        """
        refuse_cache(self, past_key_values)
        x, valid, back = as_rows(hidden_states, attention_mask, cu_seqlens)
        q, k, v = (
            split_heads(projection(x), self.head_dim)
            for projection in (self.query, self.key, self.value)
        )
        if valid is None:
            o = self._attend(q, k, v, random_blocks)
        else:  # blocks at the end are those of each sequence
            rows = [
                self._attend(q[n, None, :t], k[n, None, :t], v[n, None, :t], random_blocks)
                for n, t in enumerate(valid.sum(1).tolist())
            ]
            o = torch.cat([F.pad(y, (0, 0, 0, 0, 0, x.shape[1] - y.shape[1])) for y in rows])
        return back(o.flatten(2)), None, None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, random_blocks: Tensor | None) -> Tensor:
        pattern = big_bird(
            q.shape[1],
            self.num_heads,
            self.block_size,
            random_blocks=self.num_random_blocks if random_blocks is None else random_blocks,
            generator=torch.Generator().manual_seed(self.seed),
        )
        return pattern.attend(q, k, v)[0]


class LongT5LocalAttention(nn.Module):
    """A window on both sides, with T5's biases. Scores are not scaled.

    Args:
        hidden_size: width of input and output.
        num_heads: heads.
        head_dim: channels of a head.
        local_radius: tokens on each side.
        has_relative_attention_bias: learn biases by distance, as the first layer of a model does.
        num_buckets, max_distance: of these biases.

    Parameters are those of transformers' layer of this name.

    Source: LongT5, arXiv:2112.07916.

    Example:
        >>> layer = LongT5LocalAttention(64, 4, 16, 5)
        >>> layer(torch.randn(1, 50, 64))[0].shape
        torch.Size([1, 50, 64])
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 6,
        head_dim: int = 64,
        local_radius: int = 127,
        has_relative_attention_bias: bool = True,
        num_buckets: int = 32,
        max_distance: int = 128,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.local_radius = num_heads, head_dim, local_radius
        self.num_buckets, self.max_distance = num_buckets, max_distance
        inner = num_heads * head_dim
        self.q = nn.Linear(hidden_size, inner, bias=False)
        self.k = nn.Linear(hidden_size, inner, bias=False)
        self.v = nn.Linear(hidden_size, inner, bias=False)
        self.o = nn.Linear(inner, hidden_size, bias=False)
        self.has_relative_attention_bias = has_relative_attention_bias
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, None]:
        """Mix along time, in both directions; as :meth:`NystromformerAttention.forward`."""
        refuse_cache(self, past_key_values)
        x, valid, back = as_rows(hidden_states, attention_mask, cu_seqlens)
        N, T = x.shape[:2]
        if not T:
            return back(x), None, None
        if valid is None:
            valid = x.new_ones(N, T, dtype=torch.bool)
        q, k, v = (split_heads(p(x), self.head_dim) for p in (self.q, self.k, self.v))
        o, _ = merge(self._local(q, k, v, valid), *self._others(x, q, valid))
        return back(self.o(o.flatten(2))), None, None

    def _others(self, x: Tensor, q: Tensor, valid: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Attention to keys that are not tokens, each with its log-sum-exp."""
        return ()

    def _bias(self, table: nn.Embedding, distance: Tensor) -> Tensor:
        """``[..., H]`` of key position minus query position."""
        half = self.num_buckets // 2
        exact = half // 2
        size = distance.abs()
        far = (size.clamp(min=1) / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
        values: Tensor = table(torch.where(size < exact, size, far) + half * (distance > 0))
        return values

    def _local(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks of queries over three blocks of keys: scores take 3 T block numbers a head."""
        _N, T = q.shape[:2]
        length = self.local_radius + 1
        rows = -(-T // length)

        def three(x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (length, length + rows * length - T))
            return x.unfold(1, 3 * length, length)  # [N, rows, .., 3 length]

        acc = accumulation_dtype(q)
        queries = torch.unflatten(F.pad(q, (0, 0, 0, 0, 0, rows * length - T)), 1, (rows, length))
        score = torch.einsum("nrthd,nrhds->nrhts", queries.to(acc), three(k).to(acc))
        t, s = torch.arange(length, device=q.device)[:, None], torch.arange(3 * length).to(q.device)
        distance = s - length - t
        if self.has_relative_attention_bias:
            score = score + self._bias(self.relative_attention_bias, distance).permute(2, 0, 1)
        seen = (distance.abs() < length) & three(valid)[:, :, None, None]
        some = seen.any(-1)
        score = score.masked_fill(~seen, -torch.inf).masked_fill(~some[..., None], 0)
        lse = score.logsumexp(-1)
        p = (score - lse[..., None]).exp() * some[..., None]
        o = torch.einsum("nrhts,nrhds->nrthd", p, three(v).to(acc)).flatten(1, 2)[:, :T]
        lse = lse.masked_fill(~some, -torch.inf).transpose(1, 2).flatten(2)[..., :T]
        return o.to(q.dtype).contiguous(), lse.contiguous()


class LongT5TransientGlobalAttention(LongT5LocalAttention):
    """:class:`LongT5LocalAttention`, and one key for every few tokens of the sequence.

    The key and value of a block are projections of the normalised sum of its tokens, made anew in
    every layer.

    Args:
        hidden_size, num_heads, head_dim, local_radius: as there.
        global_block_size: tokens of a block; those left over at the end join the last block.
        has_relative_attention_bias, num_buckets, max_distance: as there.
        eps: of the blocks' norm.

    Parameters are those of transformers' layer of this name.

    Source: LongT5, arXiv:2112.07916.

    Example:
        >>> layer = LongT5TransientGlobalAttention(64, 4, 16, 5, 4)
        >>> layer(torch.randn(1, 50, 64))[0].shape
        torch.Size([1, 50, 64])
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 6,
        head_dim: int = 64,
        local_radius: int = 127,
        global_block_size: int = 16,
        has_relative_attention_bias: bool = True,
        num_buckets: int = 32,
        max_distance: int = 128,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, head_dim, local_radius, has_relative_attention_bias,
            num_buckets, max_distance,
        )  # fmt: skip
        self.global_block_size = global_block_size
        if has_relative_attention_bias:
            self.global_relative_attention_bias = nn.Embedding(num_buckets, num_heads)
        self.global_input_layer_norm = RMSNorm(hidden_size, eps=eps)

    def _others(self, x: Tensor, q: Tensor, valid: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        T, size = x.shape[1], self.global_block_size
        lengths = valid.sum(1)
        blocks = lengths // size  # of each row
        block = torch.arange(T, device=x.device) // size
        owner = torch.minimum(block, (blocks - 1)[:, None])  # -1 where there is no block at all
        count = T // size
        if not count:
            return ()
        member = F.one_hot(owner.masked_fill(~valid | (owner < 0), count), count + 1)
        member = member[..., :count].to(x.dtype)  # [N, T, count], zeros and ones
        sums = self.global_input_layer_norm(member.mT @ x)
        k, v = (split_heads(p(sums), self.head_dim) for p in (self.k, self.v))
        return (self._side(q, k, v, owner, blocks),)

    def _side(
        self, q: Tensor, k: Tensor, v: Tensor, owner: Tensor, blocks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Every query over the blocks of its row, a stretch of queries at a time."""
        N, T, H = q.shape[:3]
        acc, block = accumulation_dtype(q), torch.arange(k.shape[1], device=q.device)
        absent = (block >= blocks[:, None])[:, None, None]

        def attend(q: Tensor, k: Tensor, v: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
            score = torch.einsum("nthd,nshd->nhts", q.to(acc), k.to(acc))
            if self.has_relative_attention_bias:
                distance = block - owner[..., None]
                bias = self._bias(self.global_relative_attention_bias, distance)
                score = score + bias.permute(0, 3, 1, 2)
            # finite, so that rows without any block have gradients; they weigh nothing
            score = score.masked_fill(absent, _NEVER)
            lse = score.logsumexp(-1)
            return torch.einsum("nhts,nshd->nthd", (score - lse[..., None]).exp(), v.to(acc)), lse

        parts = [
            checkpoint(attend, q[:, at], k, v, owner[:, at], use_reentrant=False)
            for at in stretches(T, N * H * k.shape[1])
        ]
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs, 1).to(q.dtype), torch.cat(lses, 2)
