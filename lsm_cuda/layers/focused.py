"""Focused linear attention: sharpened features, both directions, a convolution of the values."""

from __future__ import annotations

from torch import Tensor, nn

from ..modules.features import focused
from ..modules.precision import no_autocast, wide
from .bidirectional import BidirectionalAttention

__all__ = ["FocusedLinearAttention"]


class FocusedLinearAttention(BidirectionalAttention):
    r"""``φ(q)ᵀ Σ_s φ(k_s) v_sᵀ / (φ(q)·Σ_s φ(k_s)) + conv(v)``, φ = :func:`focused`.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        power: p of φ, at least 1.
        conv_kernel_size: taps, odd, of a depthwise convolution of the values along time, one filter
            per channel of a head, shared by the heads. The paper's, of images, has 5 × 5. None: no
            convolution.
        eps: added to the denominator.
        qkv_bias: biases in the q, k, v projections.

    Raises:
        ValueError: sizes that do not divide, ``power`` below 1, an even kernel.

    Source: FLatten Transformer: Vision Transformer using Focused Linear Attention,
    arXiv:2308.00442, eq. 5 and 8.

    Example:
        >>> layer = FocusedLinearAttention(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 100, 64))[0].shape
        torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int = 512,
        num_heads: int = 8,
        power: float = 3.0,
        conv_kernel_size: int | None = 5,
        eps: float = 1e-6,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_heads, qkv_bias)
        if power < 1:
            raise ValueError(f"FocusedLinearAttention: power must be at least 1, got {power}")
        if conv_kernel_size is not None and conv_kernel_size % 2 == 0:
            raise ValueError(
                f"FocusedLinearAttention: conv_kernel_size must be odd, got {conv_kernel_size}"
            )
        self.power = power
        self.eps = eps
        self.conv = None
        if conv_kernel_size is not None:
            D = self.head_dim
            self.conv = nn.Conv1d(
                D, D, conv_kernel_size, padding=conv_kernel_size // 2, groups=D, bias=True
            )

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        if valid is not None:
            v = v.masked_fill(~valid[:, None, :, None], 0)
        with no_autocast(q):
            phi_q, phi_k = focused(wide(q), self.power), focused(wide(k), self.power)
            if valid is not None:
                phi_k = phi_k * valid[:, None, :, None]
            below = phi_q @ phi_k.sum(2).unsqueeze(-1) + self.eps  # [N, H, S, 1]
            o = (phi_q @ (phi_k.mT @ wide(v)) / below).to(v.dtype)
        if self.conv is None:
            return o
        N, H, S, D = v.shape
        convolved: Tensor = self.conv(v.transpose(2, 3).reshape(N * H, D, S))
        return o + convolved.view(N, H, D, S).transpose(2, 3)
