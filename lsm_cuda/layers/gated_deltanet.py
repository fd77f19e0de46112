"""Gated DeltaNet and its relatives: DeltaProduct, Comba, Kimi delta attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..modules import FusedRMSNormGated
from ..ops import (
    chunk_comba,
    chunk_gated_delta_product,
    chunk_gated_delta_rule,
    chunk_kda,
    comba_step,
    gated_delta_product_step,
    gated_delta_rule_step,
    kda_step,
)
from ..ops.gates import decays_and_strengths, strengths
from ._delta import DeltaLayer, mamba_decay
from .common import split_heads
from .recurrent import Call

__all__ = ["Comba", "GatedDeltaNet", "GatedDeltaProduct", "KimiDeltaAttention"]


class GatedDeltaNet(DeltaLayer):
    r"""The gated delta rule between projections, as in Qwen3-Next.

    Args:
        hidden_size: width of input and output.
        expand_v: value channels per head in units of ``head_dim``.
        head_dim: query and key channels per head.
        num_heads: query and key heads.
        num_v_heads: value heads, a multiple of them. Default: as many.
        mode: ``chunk`` or ``fused_recurrent``: FLA's names, served by one kernel.
        use_gate: multiply the normalised output by a gate computed from the input.
        use_short_conv: put a short causal convolution behind q, k, v, before their SiLU.
        allow_neg_eigval: twice the writing strength, up to 2.
        conv_size, conv_bias: taps of the convolution, and whether it has a bias.
        layer_idx: place in the cache; needed to use one.
        norm_eps: of the output norm.
        output_gate_activation: ``swish``, ``silu`` or ``sigmoid``.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode or activation.

    Source: Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464.

    Example:
        >>> layer = GatedDeltaNet(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
    ) -> None:
        super().__init__(
            mode, hidden_size, expand_v, head_dim, num_heads, num_v_heads, use_short_conv,
            conv_size, conv_bias, layer_idx,
        )  # fmt: skip
        self.allow_neg_eigval = allow_neg_eigval
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self._add_decay()
        self._add_output(use_gate, norm_eps, output_gate_activation)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        o = call.run(
            chunk_gated_delta_rule, gated_delta_rule_step, *self._qkv(x, call), self.a_proj(x),
            self.b_proj(x), use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval, use_gate_in_kernel=True, A_log=self.A_log,
            dt_bias=self.dt_bias,
        )  # fmt: skip
        return self._output(o, x)

    def from_qwen3_next(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of transformers' ``Qwen3NextGatedDeltaNet`` under this layer's names.

        Its sizes are ``linear_key_head_dim`` for ``head_dim``, ``linear_num_key_heads``,
        ``linear_num_value_heads``, and ``rms_norm_eps`` for ``norm_eps``.
        """
        H, K, V = self.num_heads, self.head_k_dim, self.head_v_dim
        group = self.num_v_heads // H
        renamed = {"norm.weight": "o_norm.weight", "out_proj.weight": "o_proj.weight"}
        own = {new: state_dict[old] for old, new in renamed.items()}
        own |= {name: state_dict[name] for name in ("A_log", "dt_bias")}
        # rows are sorted by key head, then by what they make
        for name, letters, widths in (
            ("in_proj_qkvz", "qkvg", [K, K, group * V, group * V]),
            ("in_proj_ba", "ba", [group, group]),
        ):
            weight = state_dict[f"{name}.weight"]
            rows = torch.split(weight.reshape(H, -1, weight.shape[1]), widths, 1)
            own |= {f"{c}_proj.weight": r.flatten(0, 1) for c, r in zip(letters, rows, strict=True)}
        return own | _convolutions(state_dict, self)


class GatedDeltaProduct(DeltaLayer):
    r"""Several delta rules per token, with or without a decay before them.

    Args:
        hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode, use_short_conv, conv_size,
            conv_bias, layer_idx, norm_eps: as :class:`GatedDeltaNet`.
        use_output_gate: multiply the normalised output by SiLU of a projection of the input.
        use_forget_gate: a decay.
        allow_neg_eigval: twice the writing strength, up to 2.
        num_householder: delta rules per token.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode.

    Source: DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products,
    arXiv:2502.10297.

    Example:
        >>> layer = GatedDeltaProduct(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        use_forget_gate: bool = True,
        allow_neg_eigval: bool = True,
        num_householder: int = 2,
    ) -> None:
        super().__init__(
            mode, hidden_size, expand_v, head_dim, num_heads, num_v_heads, use_short_conv,
            conv_size, conv_bias, layer_idx, num_householder,
        )  # fmt: skip
        self.use_forget_gate = use_forget_gate
        self.allow_neg_eigval = allow_neg_eigval
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads * num_householder, bias=False)
        if use_forget_gate:
            self._add_decay()
        self._add_output(use_output_gate, norm_eps)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self._qkv(x, call)
        g, beta = None, self.b_proj(x)
        if self.use_forget_gate:
            g, beta = decays_and_strengths(
                "gated_delta_product", self.a_proj(x), beta, self.A_log, self.dt_bias,
                self.allow_neg_eigval,
            )  # fmt: skip
        else:
            beta = strengths(beta, self.allow_neg_eigval)
        n = self.steps
        k, v, beta = (
            y.reshape(*y.shape[:2], n, y.shape[2] // n, *y.shape[3:]) for y in (k, v, beta)
        )
        given = (q, k, v, beta) if g is None else (q, k, v, beta, g)
        return self._output(call.run(_product, _product_step, *given), x)


def _product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gated_delta_product` with a dimension for a token's steps, which makes every
    tensor one of tokens."""
    n = k.shape[2]
    k, v, beta = (y.flatten(1, 2) for y in (k, v, beta))
    return chunk_gated_delta_product(
        q, k, v, g, beta, n, None, initial_state, output_final_state, False, cu_seqlens
    )


def _product_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *, state: Tensor
) -> Tensor:
    return gated_delta_product_step(q, k, v, g, beta, state)


class Comba(DeltaLayer):
    r"""The gated delta rule with closed-loop control: what is erased is read with a key of its own,
    before the decay, and the output is corrected by it.

    Args:
        hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode, use_short_conv, conv_size,
            conv_bias, layer_idx, norm_eps: as :class:`GatedDeltaNet`.
        use_output_gate: multiply the normalised output by the sigmoid of a projection of the input.
        use_output_correction: read with ``q − D p``.
        use_inner_decay: erase with ``p = σ(decay) k`` instead of k.
        correction_factor: what D starts with.

    As in FLA the operator divides p by its length again, so ``σ(decay)`` acts through the
    correction only.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode.

    Source: Comba: Improving Bilinear RNNs with Closed-loop Control, arXiv:2506.02475.

    Example:
        >>> layer = Comba(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        use_output_gate: bool = True,
        use_output_correction: bool = True,
        use_inner_decay: bool = True,
        correction_factor: float = 1.0,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            mode, hidden_size, expand_v, head_dim, num_heads, num_v_heads, use_short_conv,
            conv_size, conv_bias, layer_idx,
        )  # fmt: skip
        self.use_output_correction = use_output_correction
        self.use_inner_decay = use_inner_decay
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        if use_inner_decay:
            self.decay = nn.Parameter(torch.ones(num_heads))
        if use_output_correction:
            self.D = nn.Parameter(torch.full((num_heads,), float(correction_factor)))
        self._add_decay()
        self._add_output(use_output_gate, norm_eps, "sigmoid")

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self._qkv(x, call, unit_length=False)
        p = (k * self.decay.sigmoid()[:, None]).to(k.dtype) if self.use_inner_decay else k
        if self.use_output_correction:
            q = (q - self.D[:, None] * p).to(q.dtype)
        g, beta = decays_and_strengths(
            "comba", self.a_proj(x), self.b_proj(x), self.A_log, self.dt_bias
        )
        o = call.run(chunk_comba, comba_step, q, k, v, p, g, beta, use_qk_l2norm_in_kernel=True)
        return self._output(o, x)


class KimiDeltaAttention(DeltaLayer):
    r"""The delta rule with a decay per key channel, from a low-rank projection, as in Kimi Linear.

    Args:
        hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode, use_short_conv,
            allow_neg_eigval, conv_size, conv_bias, layer_idx, norm_eps: as :class:`GatedDeltaNet`.
        safe_gate: decay rates start at 1; FLA's kernels need it where ours need nothing.
        lower_bound: the least log decay; gates are then a sigmoid between it and 0.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode.

    Source: Kimi Linear: An Expressive, Efficient Attention Architecture, arXiv:2510.26692.

    Example:
        >>> layer = KimiDeltaAttention(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            mode, hidden_size, expand_v, head_dim, num_heads, num_v_heads, use_short_conv,
            conv_size, conv_bias, layer_idx,
        )  # fmt: skip
        self.allow_neg_eigval = allow_neg_eigval
        self.lower_bound = lower_bound
        V, gates = self.head_v_dim, self.num_v_heads * head_dim
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, V, bias=False), nn.Linear(V, gates, bias=False)
        )
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log, self.dt_bias = mamba_decay(self.num_v_heads, gates, 1.0)
        if safe_gate:
            nn.init.zeros_(self.A_log)
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, V, bias=False), nn.Linear(V, self.value_dim, bias=True)
        )
        self.o_norm = FusedRMSNormGated(V, eps=norm_eps, activation="sigmoid")
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        o = call.run(
            chunk_kda, kda_step, *self._qkv(x, call), split_heads(self.f_proj(x), self.head_k_dim),
            self.b_proj(x), use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval, lower_bound=self.lower_bound,
            A_log=self.A_log, dt_bias=self.dt_bias,
        )  # fmt: skip
        return self._output(o, x)

    def from_kimi_linear(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of transformers' ``KimiLinearDeltaAttention`` under this layer's names.

        Its sizes are ``linear_head_dim`` for ``head_dim``, ``linear_num_heads``, and
        ``rms_norm_eps`` for ``norm_eps``; its output gate has no bias, which is 0 here.
        """
        renamed = {
            "f_proj.0": "forget_gate.f_a_proj",
            "f_proj.1": "forget_gate.f_b_proj",
            "g_proj.0": "g_a_proj",
            "g_proj.1": "g_b_proj",
            **{name: name for name in ("q_proj", "k_proj", "v_proj", "b_proj", "o_norm", "o_proj")},
        }
        own = {f"{new}.weight": state_dict[f"{old}.weight"] for new, old in renamed.items()}
        own["g_proj.1.bias"] = own["g_proj.1.weight"].new_zeros(self.value_dim)
        own["A_log"] = state_dict["forget_gate.A_log"].flatten()
        own["dt_bias"] = state_dict["forget_gate.dt_bias"]
        return own | _convolutions(state_dict, self)


def _convolutions(state_dict: Mapping[str, Tensor], layer: DeltaLayer) -> dict[str, Tensor]:
    """One convolution over queries, keys and values, taken apart."""
    widths = [layer.key_dim, layer.key_dim, layer.value_dim]
    parts = torch.split(state_dict["conv1d.weight"], widths)
    return {f"{c}_conv1d.weight": w for c, w in zip("qkv", parts, strict=True)}
