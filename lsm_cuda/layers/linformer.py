"""Linformer: softmax attention over keys and values projected to a fixed number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bidirectional import BidirectionalAttention

__all__ = ["LinformerAttention"]


class LinformerAttention(BidirectionalAttention):
    r"""``softmax(q (E k)' / √D) (F v)`` with learned projections E, F along time.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        max_len: most tokens of a sequence; shorter ones use the first columns of E and F.
        proj_dim: projected keys and values n'.
        share: ``none``: E and F per head, ``[H, n', max_len]``; ``heads``: for all heads,
            ``[1, n', max_len]``; ``kv``: for all heads, and F is E. To share them among layers as
            well, give the layers the same parameter.
        qkv_bias: biases in the q, k, v projections.

    Raises:
        ValueError: sizes that do not divide, another ``share``, or in a call a longer sequence.

    Source: Linformer: Self-Attention with Linear Complexity, arXiv:2006.04768.

    Example:
        >>> layer = LinformerAttention(hidden_size=64, num_heads=2, max_len=100, proj_dim=16)
        >>> layer(torch.randn(1, 80, 64))[0].shape
        torch.Size([1, 80, 64])
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 8,
        max_len: int = 512,
        proj_dim: int = 256,
        share: str = "none",
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_heads, qkv_bias)
        if share not in ("none", "heads", "kv"):
            raise ValueError(f"LinformerAttention: share must be none, heads or kv, got {share!r}")
        if max_len < 1 or proj_dim < 1:
            raise ValueError(
                "LinformerAttention: max_len and proj_dim must be positive, "
                f"got {max_len} and {proj_dim}"
            )
        self.max_len = max_len
        self.proj_dim = proj_dim
        self.share = share
        shape = (num_heads if share == "none" else 1, proj_dim, max_len)
        # Variance 1 / n' keeps inner products, in expectation (the lemma behind the paper).
        self.E = nn.Parameter(torch.randn(shape) * proj_dim**-0.5)
        if share != "kv":
            self.F = nn.Parameter(torch.randn(shape) * proj_dim**-0.5)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        S = k.shape[2]
        if self.max_len < S:
            raise ValueError(
                f"LinformerAttention: sequences must have at most max_len = {self.max_len} "
                f"tokens, got {S}"
            )
        if valid is not None:
            padding = ~valid[:, None, :, None]
            k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        along_k = self.E[..., :S]
        along_v = along_k if self.share == "kv" else self.F[..., :S]
        return F.scaled_dot_product_attention(q, along_k @ k, along_v @ v)
