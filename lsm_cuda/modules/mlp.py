"""The gated feed-forward block of a decoder layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """SwiGLU: ``down(silu(gate x) · up x)``.

    Args:
        hidden_size: width of input and output.
        hidden_ratio: parameters in units of ``hidden_size²`` of a plain two-matrix block.
        intermediate_size: inner width; by default ``2/3 · hidden_ratio · hidden_size``, rounded up
            to a multiple of 256.

    Shape: ``[..., hidden_size]`` to the same.

    Source: GLU Variants Improve Transformer, arXiv:2002.05202.
    """

    def __init__(
        self, hidden_size: int, hidden_ratio: int = 4, intermediate_size: int | None = None
    ) -> None:
        super().__init__()
        if intermediate_size is None:
            wanted = hidden_size * hidden_ratio * 2 // 3
            intermediate_size = 256 * -(-wanted // 256)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y
