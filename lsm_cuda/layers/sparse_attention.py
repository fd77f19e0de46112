"""Causal attention to chosen blocks: native sparse attention and MoBA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cache import KVBuffer, LayerState
from ..modules import FusedRMSNormGated, RMSNorm
from ..modules.rotary import packed_positions
from ..ops.attn_mask import AttnMask
from ..ops.moba import parallel_moba
from ..ops.nsa import parallel_nsa
from ..ops.pooling import block_pool
from ..ops.sparse_attn import block_sparse_attn
from .attention import CausalAttention
from .common import split_heads

__all__ = ["MoBA", "NativeSparseAttention"]


class WindowMLP(nn.Module):
    """One vector for every window of tokens, from all of them and where each stands in it.

    Args:
        head_dim: channels of a head; heads share the map.
        length: tokens of a window.

    Source: Native Sparse Attention, arXiv:2502.11089, eq. 7.
    """

    def __init__(self, head_dim: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.position = nn.Parameter(torch.zeros(length, head_dim))
        self.up = nn.Linear(length * head_dim, 2 * head_dim)
        self.down = nn.Linear(2 * head_dim, head_dim)

    def forward(self, x: Tensor, stride: int) -> Tensor:
        """``[B, T, H, D]`` to ``[B, windows, H, D]``, of windows that are whole."""
        if x.shape[1] < self.length:
            return x[:, :0]
        windows = x.unfold(1, self.length, stride).transpose(-1, -2) + self.position
        y: Tensor = self.down(torch.nn.functional.silu(self.up(windows.flatten(-2))))
        return y


class NativeSparseAttention(CausalAttention):
    """Compressed, selected and recent keys, mixed by gates of the token (:func:`parallel_nsa`).

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads, each with its own selection; default ``num_heads``.
        head_dim: channels of a head.
        qkv_bias: biases in the q, k, v projections.
        block_size: tokens of a selected block, 16, 32, 64 or 128.
        block_counts: selected blocks of a token.
        window_size: recent tokens.
        rope_theta: base of the rotary embedding; None: no positions.
        layer_idx: place in the cache; needed to use one.
        cmp_length, cmp_stride: tokens of a compressed window, and from one to the next; default
            ``block_size``, FLA's setting. The paper's: 32 and 16.
        cmp_mlp: compress windows of keys and of values by a learned map each, as in the paper,
            instead of their means, as FLA does.

    Raises:
        ValueError: sizes that do not divide.

    Parameter names are FLA's. Steps from a cache compress the windows that became whole, also where
    sequences are padded: what was said of a token stays so.

    Source: Native Sparse Attention, arXiv:2502.11089.

    Example:
        >>> layer = NativeSparseAttention(64, num_heads=4, num_kv_heads=1, head_dim=16)
        >>> layer(torch.randn(1, 100, 64))[0].shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 64,
        num_kv_heads: int | None = 4,
        head_dim: int = 64,
        qkv_bias: bool = False,
        block_size: int = 64,
        block_counts: int = 16,
        window_size: int = 512,
        rope_theta: float | None = 10000.0,
        layer_idx: int | None = None,
        cmp_length: int | None = None,
        cmp_stride: int | None = None,
        cmp_mlp: bool = False,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, num_kv_heads, head_dim, qkv_bias, False, rope_theta, layer_idx
        )
        self.g_proj = nn.Linear(hidden_size, num_heads * 3, bias=False)
        self.block_size = block_size
        self.block_counts = block_counts
        self.window_size = window_size
        self.cmp_length = block_size if cmp_length is None else cmp_length
        self.cmp_stride = self.cmp_length if cmp_stride is None else cmp_stride
        self.k_compress = WindowMLP(head_dim, self.cmp_length) if cmp_mlp else None
        self.v_compress = WindowMLP(head_dim, self.cmp_length) if cmp_mlp else None

    def _positions(
        self, time: int, start: int, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> int | Tensor:
        if self.k_compress is None:  # a mean of turned keys turns with them
            return start
        if cu_seqlens is not None:
            return packed_positions(cu_seqlens, time)
        if attention_mask is None:
            return start
        return ((attention_mask != 0).cumsum(1) - 1).clamp(min=0)[:, -time:]

    def _gates(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        return (split_heads(self.g_proj(hidden_states), 3).sigmoid(),)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
    ) -> Tensor:
        learned = self.k_compress is not None
        if cu_seqlens is not None and (learned or q.shape[1] != k.shape[1]):
            assert cu_seqlens_k is not None
            return self._row_by_row(q, k, v, gates, cu_seqlens, cu_seqlens_k)
        compressed = self._compress(k, v) if learned else (None, None)
        return self._mix(q, k, v, gates, cu_seqlens, *compressed)

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: LayerState
    ) -> Tensor:
        kept = state.windows
        done, whole = 0 if kept is None else kept.length, self._whole_windows(k.shape[1])
        if kept is None or whole > done:
            new = self._compress(*(x[:, done * self.cmp_stride :] for x in (k, v)))
            if kept is None:
                kept = state.windows = KVBuffer.start(*new)
            else:
                kept.append(*new)
        windows = kept.keys[:, :whole], kept.values[:, :whole]
        return self._mix(q, k, v, gates, None, *windows)

    def _attend_padded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        mask: Tensor,
        state: LayerState,
    ) -> Tensor:
        """Row by row; of each row's windows those are kept that its tokens fill so far."""
        T, S = q.shape[1], k.shape[1]
        whole, done = (
            [self._whole_windows(n) for n in m.sum(1).tolist()] for m in (mask, mask[:, : S - T])
        )
        kept = state.windows
        if kept is None:
            kept = state.windows = KVBuffer.start(k[:, :0], v[:, :0])
            done = [0] * len(done)
        if (more := max(whole) - kept.length) > 0:
            kept.append(*(x.new_zeros(x.shape[0], more, *x.shape[2:]) for x in (k, v)))
        o = q.new_zeros(*q.shape[:3], v.shape[3])
        for b, (count, first) in enumerate(zip(whole, done, strict=True)):
            at, own = mask[b, S - T :].nonzero()[:, 0], mask[b].nonzero()[:, 0]
            if not len(at):
                continue
            keys, values = (_rows(x[b : b + 1], own) for x in (k, v))
            if count > first:
                begin = first * self.cmp_stride
                new = self._compress(keys[:, begin:], values[:, begin:])
                kept.keys[b, first:count], kept.values[b, first:count] = new[0][0], new[1][0]
            windows = kept.keys[b : b + 1, :count], kept.values[b : b + 1, :count]
            rows = tuple(g[b : b + 1, at] for g in gates)
            o[b, at] = self._mix(q[b : b + 1, at], keys, values, rows, None, *windows)[0]
        return o

    def _whole_windows(self, tokens: int) -> int:
        return max(0, (tokens - self.cmp_length) // self.cmp_stride + 1)

    def _compress(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A key and a value for each whole window."""
        if self.k_compress is not None and self.v_compress is not None:
            return self.k_compress(k, self.cmp_stride), self.v_compress(v, self.cmp_stride)
        size = self.cmp_length, self.cmp_stride
        return block_pool(k, *size, partial=False), block_pool(v, *size, partial=False)

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        k_cmp: Tensor | None,
        v_cmp: Tensor | None,
    ) -> Tensor:
        g_cmp, g_slc, g_swa = gates[0].unbind(-1)
        return parallel_nsa(
            q, k, v, g_cmp, g_slc, g_swa,
            block_counts=self.block_counts, block_size=self.block_size,
            window_size=self.window_size, cu_seqlens=cu_seqlens,
            cmp_length=self.cmp_length, cmp_stride=self.cmp_stride, k_cmp=k_cmp, v_cmp=v_cmp,
        )  # fmt: skip


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x [1, S, ..]`` at ``index``, ascending: without a copy where it has no gaps."""
    first, n = int(index[0]), len(index)
    return x[:, first : first + n] if int(index[-1]) - first == n - 1 else x[:, index]


class MoBA(CausalAttention):
    """Attention over the blocks whose mean key fits a query best (:func:`parallel_moba`).

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads; default ``num_heads``.
        qkv_bias: biases in the q, k, v projections.
        qk_norm: RMSNorm of the heads' queries and keys.
        rope_theta: base of the rotary embedding; None: no positions.
        layer_idx: place in the cache; needed to use one.
        moba_chunk_size: tokens of a block, a multiple of 16.
        moba_topk: blocks of a query, its own among them.
        use_output_gate: multiply heads by a gate of the token.
        full_decode: a single token reads all of the cache, as the paper has it; else its best
            blocks, as in training.

    Raises:
        ValueError: sizes that do not divide.

    Parameter names are FLA's.

    Source: MoBA, arXiv:2502.13189.

    Example:
        >>> layer = MoBA(64, num_heads=4, moba_chunk_size=16, moba_topk=2)
        >>> layer(torch.randn(1, 100, 64))[0].shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rope_theta: float | None = 10000.0,
        layer_idx: int | None = None,
        moba_chunk_size: int = 256,
        moba_topk: int = 4,
        use_output_gate: bool = False,
        full_decode: bool = True,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, num_kv_heads, None, qkv_bias, qk_norm, rope_theta, layer_idx
        )
        self.moba_chunk_size = moba_chunk_size
        self.moba_topk = moba_topk
        self.full_decode = full_decode
        self.use_output_gate = use_output_gate
        if use_output_gate:
            self.g_proj = nn.Sequential(
                nn.Linear(hidden_size, self.head_dim, bias=False),
                nn.Linear(self.head_dim, hidden_size, bias=False),
            )
            self.o_norm: nn.Module = FusedRMSNormGated(
                self.head_dim, activation="sigmoid", eps=1e-6
            )
        else:
            self.o_norm = RMSNorm(self.head_dim, eps=1e-6)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
    ) -> Tensor:
        behind = q.shape[1] != k.shape[1]
        one = q.shape[1] == 1 if cu_seqlens is None else q.shape[1] < cu_seqlens.shape[0]
        if self.full_decode and behind and one:
            return block_sparse_attn(
                q, k, v, None, AttnMask(causal=True),
                cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
            )  # fmt: skip
        if cu_seqlens is not None and cu_seqlens_k is not None and behind:
            return self._row_by_row(q, k, v, gates, cu_seqlens, cu_seqlens_k)
        return parallel_moba(q, k, v, cu_seqlens, None, self.moba_chunk_size, self.moba_topk)

    def _finish(self, o: Tensor, hidden_states: Tensor) -> Tensor:
        if not self.use_output_gate:
            y: Tensor = self.o_norm(o)
        else:
            y = self.o_norm(o, split_heads(self.g_proj(hidden_states), self.head_dim))
        return y
