"""Nyströmformer: softmax attention through landmarks, the means of segments of the sequence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.precision import no_autocast, wide
from .bidirectional import BidirectionalAttention, newton_pinv

__all__ = ["NystromformerAttention"]


class NystromformerAttention(BidirectionalAttention):
    r"""``softmax(q l_k') · pinv(softmax(l_q l_k')) · softmax(l_q k') v``, plus a convolution of v.

    The landmarks l_q, l_k are the means of m segments of q and k, equal in length or one token
    apart. Sequences of at most m tokens get exact softmax attention.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        num_landmarks: m.
        conv_kernel_size: taps, odd, of a depthwise convolution of the values along time, one
            filter per head, that is added to the output. None: no convolution.
        pinv_iterations: of the pseudo-inverse (:func:`newton_pinv`), computed in fp32.
        shared_init: start the iteration with one factor for all heads and sequences, as
            transformers does; a sequence's output then depends a little on the others in its batch.
        qkv_bias: biases in the q, k, v projections.

    ``q_proj``, ``k_proj``, ``v_proj`` and ``conv`` are transformers' ``query``, ``key``, ``value``
    and ``conv`` of ``NystromformerSelfAttention`` (which reads padding into its landmarks).

    Raises:
        ValueError: sizes that do not divide, ``num_landmarks`` not positive, an even kernel.

    Source: Nyströmformer, arXiv:2102.03902.

    Example:
        >>> layer = NystromformerAttention(hidden_size=64, num_heads=2, num_landmarks=16)
        >>> layer(torch.randn(1, 100, 64))[0].shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_heads: int = 12,
        num_landmarks: int = 64,
        conv_kernel_size: int | None = 65,
        pinv_iterations: int = 6,
        shared_init: bool = False,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_heads, qkv_bias)
        if num_landmarks < 1:
            raise ValueError(
                f"NystromformerAttention: num_landmarks must be positive, got {num_landmarks}"
            )
        if conv_kernel_size is not None and conv_kernel_size % 2 == 0:
            raise ValueError(
                f"NystromformerAttention: conv_kernel_size must be odd, got {conv_kernel_size}"
            )
        self.num_landmarks = num_landmarks
        self.pinv_iterations = pinv_iterations
        self.shared_init = shared_init
        self.conv = None
        if conv_kernel_size is not None:
            self.conv = nn.Conv2d(
                num_heads,
                num_heads,
                (conv_kernel_size, 1),
                padding=(conv_kernel_size // 2, 0),
                groups=num_heads,
                bias=False,
            )

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        m = self.num_landmarks
        mask = None if valid is None else valid[:, None, None, :]
        if q.shape[2] <= m:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            o = self._through_landmarks(q, k, v, mask)
            if mask is not None:  # rows of at most m tokens are exact beside longer ones too
                q, k, first = q[:, :, :m], k[:, :, :m], v[:, :, :m]
                exact = F.scaled_dot_product_attention(q, k, first, attn_mask=mask[..., :m])
                short = mask.sum(-1, keepdim=True) <= m
                o = torch.cat([exact.where(short, o[:, :, :m]), o[:, :, m:]], 2)
        if self.conv is None:
            return o
        convolved: Tensor = self.conv(
            v if valid is None else v.masked_fill(~valid[:, None, :, None], 0)
        )
        return o + convolved

    def _through_landmarks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mean = _segment_means(q, self.num_landmarks, mask)  # [N or 1, 1, m, S]
        l_q, l_k = mean @ q, mean @ k  # [N, H, m, D]
        with no_autocast(q):
            inner = (wide(l_q) @ wide(l_k).mT / math.sqrt(self.head_dim)).softmax(-1)
        inverse = newton_pinv(inner, self.pinv_iterations, self.shared_init)  # [N, H, m, m]
        pooled = F.scaled_dot_product_attention(l_q, k, v, attn_mask=mask)
        with no_autocast(q):
            pooled = (inverse @ wide(pooled)).to(q.dtype)  # [N, H, m, D]
        return F.scaled_dot_product_attention(q, l_k, pooled)


def _segment_means(x: Tensor, count: int, mask: Tensor | None) -> Tensor:
    """The matrix ``[N or 1, 1, count, S]`` that averages segments of ``x [N, H, S, D]``.

    Sequences of fewer tokens have a segment per token, and rows of zeros.
    """
    S = x.shape[2]
    place = torch.arange(S, device=x.device)
    valid = torch.ones_like(place[None], dtype=torch.bool) if mask is None else mask[:, 0, 0]
    length = valid.sum(-1, keepdim=True)
    segment = place * length.clamp(max=count) // length  # [N or 1, S]
    member = valid[:, None] & (segment[:, None] == place[:count, None])
    tokens = member.sum(-1, keepdim=True).clamp(min=1)
    return (member.to(torch.promote_types(x.dtype, torch.float32)) / tokens).to(x.dtype)[:, None]
