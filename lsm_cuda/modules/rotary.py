"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(nn.Module):
    """Turns channel pairs ``(i, i + D/2)`` by an angle that grows with the position.

    Args:
        dim: head dimension D, even.
        base: wavelength base.

    Raises:
        ValueError: an odd ``dim``.

    Source: RoFormer, arXiv:2104.09864.
    """

    table: Tensor

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even, got {dim}")
        self.dim = dim
        self.base = base
        # Positions are added as they are met; the table is derived, so no checkpoint holds it.
        self.register_buffer("table", torch.empty(0, 2, dim // 2), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Rotate ``x [B, T, H, D]``, whose first token stands at position ``offset``."""
        end = offset + x.shape[1]
        if self.table.shape[0] < end or self.table.device != x.device:
            self.table = self._angles(max(end, 2 * self.table.shape[0]), x.device)
        cos, sin = self.table[offset:end, :, None].to(x.dtype).unbind(1)  # [T, 1, D/2]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _angles(self, positions: int, device: torch.device) -> Tensor:
        exponent = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        time = torch.arange(positions, device=device, dtype=torch.float32)
        angle = torch.outer(time, self.base**-exponent)
        return torch.stack([angle.cos(), angle.sin()], 1)  # [T, 2, D/2]
