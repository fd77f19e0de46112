"""Skyformer: attention with a Gaussian kernel, through landmarks drawn from queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..modules.precision import no_autocast, wide
from .bidirectional import BidirectionalAttention, newton_pinv

__all__ = ["SkyformerAttention"]


class SkyformerAttention(BidirectionalAttention):
    r"""``C(q, w) (C(w, w) + γ)⁻¹ C(w, k) v``, approximating ``C(q, k) v``.

    C is the Gaussian kernel ``exp(−|x − y|² / (2 √D))``, without a sum to divide by. The landmarks
    w are rows of q and of k, half of each, the same positions for all heads.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        num_landmarks: landmarks, even; all rows where a sequence has fewer.
        sampling: ``random``: positions drawn anew in every call while training, evenly spaced in
            evaluation; ``even``: evenly spaced always.
        gamma: γ, added to the diagonal.
        pinv_iterations: of the inverse (:func:`newton_pinv`), computed in fp32 after scaling rows
            and columns by the roots of their sums. Few damp directions that landmarks hardly span.
        qkv_bias: biases in the q, k, v projections.

    Raises:
        ValueError: sizes that do not divide, ``num_landmarks`` odd or not positive, ``gamma`` not
            positive, another ``sampling``.

    Source: Skyformer: Remodel Self-Attention with Gaussian Kernel and Nyström Method,
    arXiv:2111.00035; γ as in the authors' code.

    Example:
        >>> layer = SkyformerAttention(hidden_size=64, num_heads=2, num_landmarks=16)
        >>> layer(torch.randn(1, 100, 64))[0].shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 8,
        num_landmarks: int = 128,
        sampling: str = "random",
        gamma: float = 0.1,
        pinv_iterations: int = 6,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_heads, qkv_bias)
        if num_landmarks < 2 or num_landmarks % 2:
            raise ValueError(
                f"SkyformerAttention: num_landmarks must be positive and even, got {num_landmarks}"
            )
        if gamma <= 0:
            raise ValueError(f"SkyformerAttention: gamma must be positive, got {gamma}")
        if sampling not in ("random", "even"):
            raise ValueError(
                f"SkyformerAttention: sampling must be random or even, got {sampling!r}"
            )
        self.num_landmarks = num_landmarks
        self.sampling = sampling
        self.gamma = gamma
        self.pinv_iterations = pinv_iterations

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        if valid is None:
            valid = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool)
        scale = 1 / math.sqrt(math.sqrt(self.head_dim))
        dtype, q, k, v = q.dtype, wide(q) * scale, wide(k) * scale, wide(v)
        w_q, real_q = self._landmarks(q, valid)
        w_k, real_k = self._landmarks(k, valid)
        w = torch.cat([w_q, w_k], 2)  # [N, H, m, D]
        real = torch.cat([real_q, real_k], 1)[:, None, None]  # [N, 1, 1, m]
        eye = torch.eye(w.shape[2], dtype=w.dtype, device=w.device)
        with no_autocast(q):
            inner = _gaussian(w, w) * real * real.mT + self.gamma * eye
            root = inner.sum(-1, keepdim=True).rsqrt()  # [N, H, m, 1]
            inverse = newton_pinv(root * inner * root.mT, self.pinv_iterations)
            pooled = (_gaussian(w, k) * valid[:, None, None]) @ v  # [N, H, m, D]
            o = (_gaussian(q, w) * real) @ (root * (inverse @ (root * pooled)))
        return o.to(dtype)

    def _landmarks(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Half of the landmarks ``[N, H, m/2, D]``, and which of them there are, ``[N, m/2]``."""
        N, H, S, D = x.shape
        count = min(self.num_landmarks // 2, S)
        if self.training and self.sampling == "random":
            chance = torch.rand(N, S, device=x.device).masked_fill(~valid, -1)
            place = chance.topk(count).indices
            real = valid.gather(1, place)
        else:
            length = valid.sum(-1, keepdim=True)
            some = length.clamp(max=count)
            i = torch.arange(count, device=x.device)
            place = ((2 * i + 1) * length // (2 * some)).clamp(max=S - 1)
            real = i < some
        return x.gather(2, place[:, None, :, None].expand(N, H, count, D)), real


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    """``exp(−|x_i − y_j|² / 2)``: ``[..., S, D]`` and ``[..., R, D]`` to ``[..., S, R]``."""
    lengths = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return (x @ y.mT - lengths / 2).clamp(max=0).exp()
