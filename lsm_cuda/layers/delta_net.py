"""DeltaNet, and fast weight programmers, which it descends from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FusedRMSNormGated, RMSNorm, activation
from ..modules.features import dpfp
from ..modules.precision import wide
from ..ops import chunk_delta_rule, delta_rule_step
from ..ops.gates import strengths
from ._gated import add_convs, project
from .common import split_heads
from .recurrent import MODES, Call, RecurrentLayer, check_mode, width_of

__all__ = ["DeltaNet"]

_OF_CONV = ("silu", "identity")  # activations that a convolution of q and k has taken care of


class DeltaNet(RecurrentLayer):
    r"""The delta rule between projections.

    Args:
        mode: ``chunk``, ``fused_recurrent`` or ``fused_chunk``: FLA's names, served by one kernel.
        d_model: another name of ``hidden_size``, which it overrides.
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: heads.
        use_beta: a writing strength from the input; without, it is 1.
        use_gate: multiply the normalised output by SiLU of a projection of the input.
        use_short_conv: put a short causal convolution behind q, k, v.
        conv_size, conv_bias: its taps, and whether it has a bias.
        allow_neg_eigval: twice the writing strength, up to 2.
        layer_idx: place in the cache; needed to use one.
        qk_activation: of queries and keys: ``silu``, ``relu``, ``elu`` (plus 1), ``identity``, or
            ``dpfp``, products of neighbours, ``2 · dpfp_nu`` times as many channels.
        qk_norm: ``l2``, or ``sum`` for features that add up to 1.
        norm_eps: of the output norm.
        dpfp_nu: distances of those neighbours.

    ``qk_activation="dpfp"`` with ``qk_norm="sum"`` is the fast weight programmer.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode, activation or norm.

    Source: Parallelizing Linear Transformers with the Delta Rule over Sequence Length,
    arXiv:2406.06484; Linear Transformers Are Secretly Fast Weight Programmers, arXiv:2102.11174.

    Example:
        >>> layer = DeltaNet(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        d_model: int | None = None,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        dpfp_nu: int = 1,
    ) -> None:
        hidden_size = hidden_size if d_model is None else d_model
        super().__init__(hidden_size, layer_idx)
        self.mode = check_mode(self, mode, MODES)
        if qk_activation not in ("silu", "relu", "elu", "identity", "dpfp"):
            raise ValueError(
                "DeltaNet: qk_activation must be silu, relu, elu, identity or dpfp, "
                f"got {qk_activation!r}"
            )
        if qk_norm not in ("l2", "sum"):
            raise ValueError(f"DeltaNet: qk_norm must be l2 or sum, got {qk_norm!r}")
        self.num_heads = num_heads
        self.key_dim = width_of(self, "expand_k", hidden_size, expand_k, num_heads)
        self.value_dim = width_of(self, "expand_v", hidden_size, expand_v, num_heads)
        self.head_k_dim = self.key_dim // num_heads
        self.head_v_dim = self.value_dim // num_heads
        self.qk_activation, self.qk_norm, self.dpfp_nu = qk_activation, qk_norm, dpfp_nu
        self.use_gate = use_gate
        self.use_beta = use_beta
        self.use_short_conv = use_short_conv
        self.allow_neg_eigval = allow_neg_eigval
        widths = {"q": self.key_dim, "k": self.key_dim, "v": self.value_dim}
        for name, width in widths.items():
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, width, bias=False))
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        if use_short_conv:
            act = "silu" if qk_activation == "silu" else None
            add_convs(self, {"q": self.key_dim, "k": self.key_dim}, conv_size, conv_bias, act)
            add_convs(self, {"v": self.value_dim}, conv_size, conv_bias)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
            self.o_norm: nn.Module = FusedRMSNormGated(self.head_v_dim, eps=norm_eps)
        else:
            self.o_norm = RMSNorm(self.head_v_dim, eps=norm_eps, dtype=torch.float32)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        K, V = self.head_k_dim, self.head_v_dim
        fused = self.use_short_conv and self.qk_norm == "l2" and self.qk_activation in _OF_CONV
        q, k, v = project(self, x, call, {"q": K, "k": K, "v": V}, unit="qk" if fused else "")
        q, k = self._features(q), self._features(k)
        if not self.use_short_conv:
            v = F.silu(v)
        if self.use_beta:
            beta = strengths(self.b_proj(x), self.allow_neg_eigval)
        else:
            beta = wide(v.new_ones(())).expand(v.shape[:-1])
            beta = 2 * beta if self.allow_neg_eigval else beta
        o = call.run(
            chunk_delta_rule, delta_rule_step, q, k, v, beta,
            use_qk_l2norm_in_kernel=self.qk_norm == "l2" and not fused,
        )  # fmt: skip
        if self.use_gate:
            o = self.o_norm(o, split_heads(self.g_proj(x), self.head_v_dim))
        else:
            o = self.o_norm(o)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    def _features(self, x: Tensor) -> Tensor:
        if self.qk_activation == "dpfp":
            y = dpfp(wide(x), self.dpfp_nu)
        elif self.qk_activation == "identity" or (
            self.qk_activation == "silu" and self.use_short_conv
        ):
            y = x
        else:
            y = activation(self.qk_activation)(x)
        if self.qk_norm == "sum":
            y = F.normalize(wide(y), p=1.0, dim=-1, eps=1e-6)
        return y.to(x.dtype)
