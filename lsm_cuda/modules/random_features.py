"""Feature maps along random directions, whose scores estimate a kernel without bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .feature_map import FEATURE_MAPS, FeatureMap, positive
from .features import (
    exp_over_largest,
    favor_exponents,
    random_fourier,
    random_projection,
    saturating_exp,
)
from .precision import wide

__all__ = ["PerformerFeatureMap", "RFAFeatureMap", "RandomFeatureMap"]


class RandomFeatureMap(FeatureMap):
    """A map along random directions, which queries and keys must share.

    Args:
        head_dim: channels K.
        num_features: directions m.
        orthogonal: draw them orthogonal in blocks of K, which lowers the variance.

    The directions are the buffer ``projection [m, K]``, part of the state dict.
    """

    shared = True
    projection: Tensor

    def __init__(self, head_dim: int, num_features: int, orthogonal: bool) -> None:
        super().__init__(head_dim)
        self.num_features = positive(self, "num_features", num_features)
        self.orthogonal = orthogonal
        draw = random_projection(num_features, head_dim, orthogonal)
        self.register_buffer("projection", draw.to(torch.get_default_dtype()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_features={self.num_features}"

    @torch.no_grad()
    def redraw(self) -> None:
        """New directions, in place; states accumulated with the old ones are of no use then."""
        self.projection.copy_(random_projection(self.num_features, self.head_dim, self.orthogonal))


class PerformerFeatureMap(RandomFeatureMap):
    r"""FAVOR+: positive random features of the softmax kernel ``exp(q · k / √K)``.

    Called directly it is the unbiased map of :func:`features.favor_exponents`, saturating.
    ``queries`` divides by each query's largest feature, which normalised attention does not see.

    Args:
        head_dim: channels K.
        num_features: features m. Default: 2 K; the paper's bound asks for some K log K.
        orthogonal: orthogonal directions.
        stabilize_keys: divide keys by the largest feature of their sequence and head, as the
            authors do. That looks ahead, and one call's keys are on another scale than the next
            one's: not for steps or a carried state. Without, keys of norm far beyond √K vanish.

    Source: Rethinking Attention with Performers, arXiv:2009.14794.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int | None = None,
        orthogonal: bool = True,
        stabilize_keys: bool = False,
    ) -> None:
        super().__init__(
            head_dim, 2 * head_dim if num_features is None else num_features, orthogonal
        )
        self.stabilize_keys = stabilize_keys

    def forward(self, x: Tensor) -> Tensor:
        return saturating_exp(self._exponents(x), x.dtype)

    def queries(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        return exp_over_largest(self._exponents(x), (-1,)).to(x.dtype)

    def keys(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        if self.stabilize_keys:
            return exp_over_largest(self._exponents(x), (-3, -1)).to(x.dtype)
        y: Tensor = self(x)
        return y

    def _exponents(self, x: Tensor) -> Tensor:
        self._check(x)
        return favor_exponents(x, self.projection)


class RFAFeatureMap(RandomFeatureMap):
    r"""Random Fourier features of queries and keys on the unit sphere.

    The kernel is ``exp(−|σ (q − k)|² / 2)``, for one σ the softmax's ``exp(σ² q · k)`` up to a
    factor. Features take both signs, so a sum of weights may be zero or negative: normalised
    attention has to bound it.

    Args:
        head_dim: channels K.
        num_features: directions m; features 2 m. Default: K.
        sigma: standard deviation of the directions, ``sigma [K]``.
        learn_sigma: make it a parameter.
        orthogonal: orthogonal directions; the paper draws them independently.

    Source: Random Feature Attention, arXiv:2103.02143.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int | None = None,
        sigma: float = 1.0,
        learn_sigma: bool = False,
        orthogonal: bool = False,
    ) -> None:
        size = head_dim if num_features is None else num_features
        super().__init__(head_dim, size, orthogonal)
        if sigma <= 0:
            raise ValueError(f"RFAFeatureMap: sigma must be positive, got {sigma}")
        self.sigma = nn.Parameter(torch.full((head_dim,), sigma), requires_grad=learn_sigma)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return random_fourier(x, wide(self.projection) * wide(self.sigma))


FEATURE_MAPS |= {"performer": PerformerFeatureMap, "rfa": RFAFeatureMap}
