"""Feature maps: what queries and keys pass through before linear attention.

Linear attention with a map f gives key j the weight ``f(q_i) · f(k_j)`` in the output of query i,
normalised or not. The modules carry FLA's names, constructor arguments and parameter names where
FLA has the map. :func:`feature_map` finds them by name and :func:`feature_dim` tells their width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import ACT2FN
from .activations import activation as activation_by_name
from .features import (
    cosine_reweighting,
    dpfp,
    exp_over_largest,
    focused,
    hedgehog,
    pairs,
    quadratic,
    saturating_exp,
    taylor,
)
from .precision import wide

__all__ = [
    "FEATURE_MAPS",
    "ActivationFeatureMap",
    "CosFormerFeatureMap",
    "DPFPFeatureMap",
    "ExpFeatureMap",
    "FeatureMap",
    "FocusedFeatureMap",
    "GELUFeatureMap",
    "HadamardFeatureMap",
    "HedgehogFeatureMap",
    "LearnableOuterProductFeatureMap",
    "LearnablePolySketchNonNegativeFeatureMap",
    "ReGLAFeatureMap",
    "ReLUFeatureMap",
    "RebasedFeatureMap",
    "SigmoidFeatureMap",
    "SoftmaxFeatureMap",
    "SquaredReLUFeatureMap",
    "SwishFeatureMap",
    "T2RFeatureMap",
    "TaylorFeatureMap",
    "feature_dim",
    "feature_map",
]


class FeatureMap(nn.Module):
    """A feature map as a layer uses it: ``queries(q)`` and ``keys(k)``, which most maps equate.

    Args:
        head_dim: channels D of the input.

    Attributes:
        shared: whether queries and keys must pass through one and the same module.
        positional: whether ``offset`` matters.

    Raises:
        ValueError: ``head_dim`` not positive; in a call, an input of another width.
    """

    shared = False
    positional = False

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = positive(self, "head_dim", head_dim)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}"

    def queries(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Map queries ``[B, T, H, D]``; ``offset`` tells their positions to maps that use them."""
        y: Tensor = self(x)
        return y

    def keys(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Map keys ``[B, T, H, D]``."""
        y: Tensor = self(x)
        return y

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.head_dim:
            raise ValueError(
                f"{type(self).__name__}: x must have head_dim = {self.head_dim} channels in its "
                f"last dimension, got {list(x.shape)}"
            )


class ActivationFeatureMap(FeatureMap):
    """An element-wise function.

    Args:
        head_dim: not needed; every width is taken.
        activation: a name of ``modules.ACT2FN``. Default: that of the class.

    Raises:
        ValueError: another name.
    """

    activation = "identity"

    def __init__(self, head_dim: int | None = None, activation: str | None = None) -> None:
        super().__init__(1 if head_dim is None else head_dim)
        if activation is not None:
            self.activation = activation
        self._function = activation_by_name(self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


class ReLUFeatureMap(ActivationFeatureMap):
    """``max(x, 0)``."""

    activation = "relu"


class SquaredReLUFeatureMap(ActivationFeatureMap):
    """``max(x, 0)²``."""

    activation = "sqrelu"


class GELUFeatureMap(ActivationFeatureMap):
    """GELU in its tanh form."""

    activation = "gelu"


class SwishFeatureMap(ActivationFeatureMap):
    """``x · sigmoid(x)``."""

    activation = "swish"


class SigmoidFeatureMap(ActivationFeatureMap):
    """``sigmoid(x)``."""

    activation = "sigmoid"


class ExpFeatureMap(FeatureMap):
    """``e^x``, saturating (:func:`saturating_exp`)."""

    def forward(self, x: Tensor) -> Tensor:
        return saturating_exp(x)


class SoftmaxFeatureMap(FeatureMap):
    """Softmax over the channels.

    Source: Efficient Attention, arXiv:1812.01243; Liger, arXiv:2503.01496.
    """

    def forward(self, x: Tensor) -> Tensor:
        return wide(x).softmax(-1).to(x.dtype)


class HedgehogFeatureMap(FeatureMap):
    """:func:`hedgehog` of a learned linear map that starts as the identity.

    Args:
        head_dim: channels D; features 2 D.
        softmax: normalise over the features, as FLA does; without, the paper's plain exponentials.

    Source: The Hedgehog & the Porcupine, arXiv:2402.04347.
    """

    def __init__(self, head_dim: int, softmax: bool = True) -> None:
        super().__init__(head_dim)
        self.softmax = softmax
        self.layer = nn.Linear(head_dim, head_dim)
        self.init_projections()

    def init_projections(self) -> None:
        """The identity."""
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return hedgehog(self.layer(x), self.softmax)


class T2RFeatureMap(FeatureMap):
    """``relu(W x + b)``.

    Args:
        head_dim: channels D.
        dot_dim: features. Default: D.
        bias: learn b.

    Source: Finetuning Pretrained Transformers into RNNs, arXiv:2103.13076.
    """

    def __init__(self, head_dim: int, dot_dim: int | None = None, bias: bool = False) -> None:
        super().__init__(head_dim)
        self.dot_dim = positive(self, "dot_dim", head_dim if dot_dim is None else dot_dim)
        self.layer = nn.Linear(head_dim, self.dot_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        y: Tensor = self.layer(x)
        return y.relu()


class DPFPFeatureMap(FeatureMap):
    """:func:`dpfp`.

    Args:
        head_dim: channels D; features 2 ν D.
        nu: ν, from 1 to 2 D − 1; products repeat after that.

    Source: Linear Transformers Are Secretly Fast Weight Programmers, arXiv:2102.11174, which also
    divides queries and keys by the sum of their features.
    """

    def __init__(self, head_dim: int, nu: int = 4) -> None:
        super().__init__(head_dim)
        if not 1 <= nu < 2 * head_dim:
            raise ValueError(
                f"DPFPFeatureMap: nu must be from 1 to 2 * head_dim - 1 = {2 * head_dim - 1}, "
                f"got {nu}"
            )
        self.nu = nu

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return dpfp(x, self.nu)


class HadamardFeatureMap(FeatureMap):
    """Element-wise product of two learned affine maps."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        self.layer1 = nn.Linear(head_dim, head_dim)
        self.layer2 = nn.Linear(head_dim, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        y: Tensor = self.layer1(x) * self.layer2(x)
        return y


class LearnableOuterProductFeatureMap(FeatureMap):
    """Upper triangle, with diagonal, of the outer product of two learned linear maps.

    Args:
        head_dim: channels D.
        feature_dim: width M of the two maps; features M (M + 1) / 2.
    """

    def __init__(self, head_dim: int, feature_dim: int) -> None:
        super().__init__(head_dim)
        positive(self, "feature_dim", feature_dim)
        self.layer1 = nn.Linear(head_dim, feature_dim, bias=False)
        self.layer2 = nn.Linear(head_dim, feature_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return pairs(self.layer1(x), self.layer2(x), 0)


class LearnablePolySketchNonNegativeFeatureMap(FeatureMap):
    """Sketch of a polynomial kernel: products of learned linear maps, then the outer square.

    Args:
        head_dim: channels D.
        sketch_size: width M of the maps; features M (M + 1) / 2. Default: D.
        degree: of the kernel, a power of 2. FLA's parameters give 2 the map of 4; so does this.

    As in FLA, pairs i < j of the outer square are taken once and unscaled: the score of two
    sketches x, y is ``((x · y)² + Σ (x_i y_i)²) / 2``, which is not negative either.

    Raises:
        ValueError: a degree that is not a power of 2, or below 2.

    Source: PolySketchFormer, arXiv:2310.01655, section 2; parameters as FLA has them.
    """

    def __init__(self, head_dim: int, sketch_size: int | None = None, degree: int = 2) -> None:
        super().__init__(head_dim)
        if degree < 2 or degree & (degree - 1):
            raise ValueError(
                f"LearnablePolySketchNonNegativeFeatureMap: degree must be a power of 2, at least "
                f"2, got {degree}"
            )
        size = positive(self, "sketch_size", head_dim if sketch_size is None else sketch_size)
        self.sketch_size = size
        self.degree = degree
        self.gamma = nn.Parameter(torch.ones(head_dim))
        self.beta = nn.Parameter(torch.zeros(head_dim))
        widths = [head_dim] + [size] * max(0, degree.bit_length() - 3)
        self.sketches1 = nn.ModuleList(nn.Linear(w, size, bias=False) for w in widths)
        self.sketches2 = nn.ModuleList(nn.Linear(w, size, bias=False) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        x = _layer_norm(x, self.gamma, self.beta)
        for one, two in zip(self.sketches1, self.sketches2, strict=True):
            x = one(x) * two(x) * self.head_dim**-0.5
        return pairs(x, x, 0)


class TaylorFeatureMap(FeatureMap):
    """:func:`taylor`: the exponential of scores up to their square.

    Source: Simple linear attention language models balance the recall-throughput tradeoff (Based),
    arXiv:2402.18668.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return taylor(x)


class RebasedFeatureMap(FeatureMap):
    """:func:`quadratic` of a layer norm, or of an affine map, with learned scale and shift.

    Args:
        head_dim: channels D; features D (D + 1) / 2.
        use_gamma, use_beta: learn ``gamma``, ``beta`` ``[D]``.
        normalize: layer norm before them.

    Source: Linear Transformers with Learnable Kernel Functions are Better In-Context Models
    (ReBased), arXiv:2402.10644.
    """

    gamma: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(
        self,
        head_dim: int,
        use_gamma: bool = True,
        use_beta: bool = True,
        normalize: bool = True,
    ) -> None:
        super().__init__(head_dim)
        self.normalize = normalize
        self.gamma = nn.Parameter(torch.ones(head_dim)) if use_gamma else None
        self.beta = nn.Parameter(torch.zeros(head_dim)) if use_beta else None

    def forward(self, x: Tensor, flatten: bool = True) -> Tensor:
        """``flatten=False`` stops before :func:`quadratic`: for an op that squares scores."""
        self._check(x)
        if self.normalize:
            x = _layer_norm(x, self.gamma, self.beta)
        else:
            x = x if self.gamma is None else x * self.gamma
            x = x if self.beta is None else x + self.beta
        return quadratic(x) if flatten else x


class FocusedFeatureMap(FeatureMap):
    """:func:`focused`.

    Args:
        head_dim: channels D, and features.
        power: p ≥ 1.

    Source: FLatten Transformer: Vision Transformer using Focused Linear Attention,
    arXiv:2308.00442.
    """

    def __init__(self, head_dim: int, power: float = 3.0) -> None:
        super().__init__(head_dim)
        if power < 1:
            raise ValueError(f"FocusedFeatureMap: power must be at least 1, got {power}")
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return focused(x, self.power)


class CosFormerFeatureMap(FeatureMap):
    """``relu(x)`` with :func:`cosine_reweighting`: ``relu(q_i) · relu(k_j) cos(π (i − j) / 2M)``.

    Args:
        head_dim: channels D; features 2 D.
        max_len: M, at least the number of tokens of a sequence: distances beyond it would get
            negative weights.

    Raises:
        ValueError: a call with more than ``max_len`` tokens (positions in a tensor are not read).

    Source: cosFormer: Rethinking Softmax in Attention, arXiv:2202.08791.
    """

    positional = True

    def __init__(self, head_dim: int, max_len: int) -> None:
        super().__init__(head_dim)
        self.max_len = positive(self, "max_len", max_len)

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        end = x.shape[1] + offset if isinstance(offset, int) else 0
        if end > self.max_len:
            raise ValueError(
                f"CosFormerFeatureMap: at most max_len = {self.max_len} tokens, got {end}"
            )
        return cosine_reweighting(x.relu(), self.max_len, offset)

    def queries(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        return self.forward(x, offset)

    keys = queries


class ReGLAFeatureMap(FeatureMap):
    r"""``exp(W x)``, scaled down to at most 1: queries by their own largest feature.

    Args:
        head_dim: channels D.
        feature_dim: features F. Default: D.
        stabilize_keys: divide keys by the largest feature of their sequence and head, as the paper
            does. That looks ahead, and one call's keys are on another scale than the next one's:
            not for steps or a carried state. Without, keys saturate (:func:`saturating_exp`).

    :attr:`scale` is what the paper multiplies scores by: :math:`1 / (e \sqrt{F (e^2 - 1)})`, the
    inverse standard deviation of ``exp(x) · exp(y)`` for Gaussian x and y.

    Source: ReGLA: Refining Gated Linear Attention, arXiv:2502.01578.
    """

    def __init__(
        self, head_dim: int, feature_dim: int | None = None, stabilize_keys: bool = False
    ) -> None:
        super().__init__(head_dim)
        size = positive(self, "feature_dim", head_dim if feature_dim is None else feature_dim)
        self.stabilize_keys = stabilize_keys
        self.scale = 1 / (math.e * math.sqrt(size * (math.e**2 - 1)))
        self.layer = nn.Linear(head_dim, size, bias=False)

    def queries(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        self._check(x)
        y = self.layer(x)
        return exp_over_largest(wide(y), (-1,)).to(y.dtype)

    def keys(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        self._check(x)
        y = self.layer(x)
        if self.stabilize_keys:
            return exp_over_largest(wide(y), (-3, -1)).to(y.dtype)
        return saturating_exp(y)

    forward = keys


def _layer_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    y = wide(x)
    weight, bias = (None if p is None else p.to(y.dtype) for p in (gamma, beta))
    return F.layer_norm(y, x.shape[-1:], weight, bias).to(x.dtype)


def positive(module: nn.Module, argument: str, value: int) -> int:
    """``value``; raises ValueError where it is not positive."""
    if value < 1:
        raise ValueError(f"{type(module).__name__}: {argument} must be positive, got {value}")
    return value


# random_features.py adds its own.
FEATURE_MAPS: dict[str, Callable[..., FeatureMap]] = {
    **{name: functools.partial(ActivationFeatureMap, activation=name) for name in ACT2FN},
    "cosformer": CosFormerFeatureMap,
    "dpfp": DPFPFeatureMap,
    "elementwise_product": HadamardFeatureMap,
    "exp": ExpFeatureMap,
    "focused": FocusedFeatureMap,
    "hedgehog": HedgehogFeatureMap,
    "outer_product": LearnableOuterProductFeatureMap,
    "polysketch": LearnablePolySketchNonNegativeFeatureMap,
    "rebased": RebasedFeatureMap,
    "regla": ReGLAFeatureMap,
    "softmax": SoftmaxFeatureMap,
    "t2r": T2RFeatureMap,
    "taylor": TaylorFeatureMap,
}


def feature_map(name: str, head_dim: int, **options: Any) -> FeatureMap:
    """The module called ``name``.

    Args:
        name: a name of ``modules.ACT2FN``, or another of ``FEATURE_MAPS``.
        head_dim: channels D of queries and keys.
        options: further arguments of the module's constructor.

    Raises:
        ValueError: an unknown name, or options that the module does not take.

    Example:
        >>> feature_map("taylor", 16)(torch.randn(1, 10, 2, 16)).shape
        torch.Size([1, 10, 2, 153])
    """
    if name not in FEATURE_MAPS:
        raise ValueError(f"unknown feature map {name!r}, expected one of {', '.join(FEATURE_MAPS)}")
    try:
        return FEATURE_MAPS[name](head_dim, **options)
    except TypeError as error:
        raise ValueError(f"feature map {name!r}: {error}") from error


def feature_dim(name: str, head_dim: int, **options: Any) -> int:
    """Features F that :func:`feature_map` of the same arguments makes of ``head_dim`` channels."""
    with torch.device("meta"):
        return feature_map(name, head_dim, **options).keys(torch.empty(1, 1, 1, head_dim)).shape[-1]
