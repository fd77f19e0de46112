"""What the layers with gates and token shifts share beside ``recurrent``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ShortConvolution
from ..modules.precision import wide
from .common import split_heads
from .recurrent import Call

__all__ = ["GroupNorm", "TokenShift", "add_convs", "heads_and_ratio", "project"]


class TokenShift(nn.Module):
    """The token before each, zeros before the first; called as :class:`ShortConvolution`.

    Its state is the last token of each sequence, ``[N, D]``.
    """

    def forward(
        self,
        x: Tensor,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        B, T, D = x.shape
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        last = x.new_zeros(N, D) if cache is None else cache.to(x.dtype)
        if cu_seqlens is None:
            y = torch.cat([last[:, None], x], 1)
            shifted, state = y[:, :-1], y[:, -1]
            if cache is not None and T == 1 and not torch.is_grad_enabled():
                return shifted, cache.copy_(state) if output_final_state else None
            return shifted, state.clone() if output_final_state else None
        bounds = cu_seqlens.long()
        token, sequence = torch.arange(T, device=x.device), torch.arange(N, device=x.device)
        # Counting the ends at or before t also skips empty sequences.
        owner = torch.searchsorted(bounds[1:], token, right=True)
        y = torch.cat([last, x[0]])  # what came before, then all tokens
        shifted = y[torch.where(bounds[owner] == token, owner, N + token - 1)][None]
        state = y[torch.where(bounds.diff() > 0, N + bounds[1:] - 1, sequence)]
        return shifted, state if output_final_state else None


class GroupNorm(nn.GroupNorm):
    """Over groups of the channels of each token ``[B, T, C]``, in fp32 whatever the input."""

    def forward(self, x: Tensor) -> Tensor:
        y = split_heads(wide(x), self.num_channels // self.num_groups)
        y = F.layer_norm(y, y.shape[-1:], eps=self.eps).flatten(-2)
        if self.affine:
            y = y * self.weight.to(y.dtype) + self.bias.to(y.dtype)
        return y.to(x.dtype)


def add_convs(
    layer: nn.Module, widths: dict[str, int], size: int, bias: bool, activation: str | None = "silu"
) -> None:
    """A short convolution ``{name}_conv1d`` for each of ``widths``."""
    for name, channels in widths.items():
        layer.add_module(f"{name}_conv1d", ShortConvolution(channels, size, bias, activation))


def project(
    layer: nn.Module, x: Tensor, call: Call, head_dims: dict[str, int], unit: str = ""
) -> list[Tensor]:
    """``x`` through every ``{name}_proj`` and ``{name}_conv1d``, if any, in heads; those whose
    names are in ``unit`` and that have a convolution leave it with unit length."""
    projected = []
    for name, head_dim in head_dims.items():
        y = getattr(layer, f"{name}_proj")(x)
        if (conv := getattr(layer, f"{name}_conv1d", None)) is not None:
            y = call.convolve(conv, y, **({"l2norm_dim": head_dim} if name in unit else {}))
        projected.append(split_heads(y, head_dim))
    return projected


def heads_and_ratio(
    layer: nn.Module, hidden_size: int, num_heads: int | None, expand_ratio: int | None
) -> tuple[int, int]:
    """Heads and key channels per head, each deciding the other where only one is given."""
    if num_heads is None and expand_ratio is None:
        raise ValueError(f"{type(layer).__name__}: give num_heads or expand_ratio, got neither")
    if num_heads is None:
        num_heads = hidden_size // expand_ratio if expand_ratio else 0
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"{type(layer).__name__}: hidden_size must be a multiple of the heads, "
            f"got {hidden_size} and {num_heads} (expand_ratio {expand_ratio})"
        )
    return num_heads, hidden_size // num_heads if expand_ratio is None else expand_ratio
