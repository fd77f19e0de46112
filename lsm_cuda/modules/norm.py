"""Root-mean-square norms under FLA's names, computed in fp32 whatever the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import activation as activation_by_name
from .precision import wide

__all__ = ["FusedRMSNormGated", "RMSNorm", "SimpleRMSNorm"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension.

    Args:
        hidden_size: size of the last dimension.
        elementwise_affine: learn ``weight [hidden_size]``.
        eps: added to the mean square.
        device, dtype: of the weight.

    Shape: ``[..., hidden_size]`` to the same, in the dtype of the input.

    Source: Root Mean Square Layer Normalization, arXiv:1910.07467.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        weight = torch.ones(hidden_size, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, elementwise_affine={self.weight is not None}"

    def forward(self, x: Tensor) -> Tensor:
        return self._normalize(x).to(x.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        y = wide(x)
        weight = None if self.weight is None else self.weight.to(y.dtype)
        return F.rms_norm(y, (self.hidden_size,), weight, self.eps)


class SimpleRMSNorm(RMSNorm):
    """:class:`RMSNorm` without a weight.

    Args:
        hidden_size, eps: as :class:`RMSNorm`.

    Source: TransNormerLLM, arXiv:2307.14995, section 3.2.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, elementwise_affine=False, eps=eps)


class FusedRMSNormGated(RMSNorm):
    """:class:`RMSNorm` times a gate: ``rms_norm(x) · act(g)``, one rounding for both.

    Args:
        hidden_size, elementwise_affine, eps, device, dtype: as :class:`RMSNorm`.
        activation: ``swish``, ``silu`` or ``sigmoid``, applied to the gate.

    Raises:
        ValueError: another activation.
    """

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, eps, device, dtype)
        if activation not in ("swish", "silu", "sigmoid"):
            raise ValueError(
                f"FusedRMSNormGated: activation must be swish, silu or sigmoid, got {activation!r}"
            )
        self.activation = activation

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"

    def forward(self, x: Tensor, g: Tensor) -> Tensor:  # type: ignore[override]
        """``x``, ``g``: ``[..., hidden_size]``; the result has the dtype of ``x``."""
        y = self._normalize(x)
        return (y * activation_by_name(self.activation)(g.to(y.dtype))).to(x.dtype)
