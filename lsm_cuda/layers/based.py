"""Linear attention with polynomial weights: Based and ReBased."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..modules import RebasedFeatureMap
from ..modules.features import taylor
from ..modules.precision import wide
from ..ops import (
    based_step,
    bidirectional_linear_attn,
    chunk_based,
    chunk_rebased,
    rebased_step,
)
from .common import refuse_cache, split_heads
from .recurrent import Call, RecurrentLayer, check_mode

__all__ = ["BasedLinearAttention", "ReBasedLinearAttention"]


class _PolynomialAttention(RecurrentLayer):
    """Projections to ``feature_dim`` channels of queries and keys per head."""

    def __init__(
        self,
        hidden_size: int,
        feature_dim: int,
        num_key_value_heads: int,
        num_heads: int,
        causal: bool,
        eps: float,
        mode: str,
        layer_idx: int | None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        name = type(self).__name__
        if num_heads != num_key_value_heads:
            raise ValueError(
                f"{name}: num_key_value_heads must equal num_heads, "
                f"got {num_key_value_heads} and {num_heads}"
            )
        if hidden_size < num_heads or feature_dim < 1:
            raise ValueError(
                f"{name}: hidden_size must be at least num_heads and feature_dim positive, "
                f"got {hidden_size}, {num_heads} and {feature_dim}"
            )
        self.mode = check_mode(self, mode, ("parallel", "chunk", "fused_chunk"))
        self.feature_dim = feature_dim
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.causal = causal
        self.eps = eps
        self.q_proj = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q = split_heads(self.q_proj(x), self.feature_dim)
        k = split_heads(self.k_proj(x), self.feature_dim)
        v = split_heads(self.v_proj(x), self.head_dim)
        if self.causal:
            o = self._attend(q, k, v, call)
        else:
            refuse_cache(self, call.cache)
            o = self._attend_both_ways(q, k, v, call)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    def _attend_both_ways(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        q, k = self._features(wide(q)), self._features(wide(k))
        values = torch.cat([wide(v), torch.ones_like(wide(v[..., :1]))], -1)
        sums = bidirectional_linear_attn(q, k, values, scale=1.0, cu_seqlens=call.cu_seqlens)
        return (sums[..., :-1] / (sums[..., -1:] + self.eps)).to(v.dtype)

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor: ...

    @abstractmethod
    def _features(self, x: Tensor) -> Tensor: ...


class BasedLinearAttention(_PolynomialAttention):
    """Softmax attention with the second-order Taylor polynomial of its exponential.

    Args:
        hidden_size: width of input and output.
        feature_dim: channels of queries and keys of a head.
        num_key_value_heads: must equal ``num_heads``, as in FLA.
        num_heads: heads H; values of a head have ``hidden_size // H`` channels.
        feature_name: ``taylor_exp``.
        eps: added to the sum of the weights if not causal.
        causal: False lets every token read all of its sequence; there is no cache then.
        mode: ``parallel``, ``chunk`` or ``fused_chunk``: FLA's names, served by one kernel.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not fit, another feature map or mode.

    Source: Simple linear attention language models balance the recall-throughput tradeoff,
    arXiv:2402.18668.

    Example:
        >>> layer = BasedLinearAttention(hidden_size=64, num_key_value_heads=2, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        feature_dim: int = 16,
        num_key_value_heads: int = 12,
        num_heads: int = 12,
        feature_name: str = "taylor_exp",
        eps: float = 1e-12,
        causal: bool = True,
        mode: str = "parallel",
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(
            hidden_size, feature_dim, num_key_value_heads, num_heads, causal, eps, mode, layer_idx
        )
        if feature_name != "taylor_exp":
            raise ValueError(
                f"BasedLinearAttention: feature_name must be taylor_exp, got {feature_name!r}"
            )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return call.run(chunk_based, based_step, q, k, v)

    def _features(self, x: Tensor) -> Tensor:
        return taylor(x)


class ReBasedLinearAttention(_PolynomialAttention):
    """Attention whose weights are squared products of normalised, learnably scaled vectors.

    Args:
        hidden_size: width of input and output.
        l_max: without meaning here; accepted for FLA's sake.
        feature_dim: channels of queries and keys of a head.
        num_key_value_heads: must equal ``num_heads``.
        num_heads: heads H; values of a head have ``hidden_size // H`` channels.
        use_gamma, use_beta, normalize: of :class:`modules.RebasedFeatureMap`.
        causal: False lets every token read all of its sequence; there is no cache then.
        eps: added to the sum of the weights.
        mode: ``parallel``, ``chunk`` or ``fused_chunk``: FLA's names, served by one kernel.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not fit, another mode.

    Source: Linear Transformers with Learnable Kernel Functions are Better In-Context Models,
    arXiv:2402.10644.

    Example:
        >>> layer = ReBasedLinearAttention(hidden_size=64, num_key_value_heads=2, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        l_max: int = 2048,
        feature_dim: int = 16,
        num_key_value_heads: int = 16,
        num_heads: int = 16,
        use_gamma: bool = True,
        use_beta: bool = True,
        normalize: bool = True,
        causal: bool = True,
        eps: float = 1e-5,
        mode: str = "parallel",
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(
            hidden_size, feature_dim, num_key_value_heads, num_heads, causal, eps, mode, layer_idx
        )
        self.feature_map = RebasedFeatureMap(feature_dim, use_gamma, use_beta, normalize)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        q, k = self.feature_map(q, flatten=False), self.feature_map(k, flatten=False)
        return call.run(chunk_rebased, rebased_step, q, k, v, eps=self.eps)

    def _features(self, x: Tensor) -> Tensor:
        y: Tensor = self.feature_map(x)
        return y
