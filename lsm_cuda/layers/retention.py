"""A constant decay per head: RetNet's, MiniMax's and TransNormerLLM's layers."""

from __future__ import annotations

from torch import Tensor, nn

from ..modules import LRPE, RMSNorm, RotaryEmbedding, SimpleRMSNorm, activation
from ..ops import (
    chunk_lightning_attn,
    chunk_retention,
    lightning_attn_step,
    lightning_slopes,
    minimax_slopes,
    retention_step,
)
from .common import split_heads
from .recurrent import MODES, Call, QKVLayer, RecurrentLayer, check_mode

__all__ = ["LightningAttention", "MultiScaleRetention", "TransNormerAttention"]


class MultiScaleRetention(QKVLayer):
    """Retention with rotated queries and keys and a gated output norm.

    Args:
        mode: ``chunk``, ``fused_recurrent``, ``fused_chunk`` or ``parallel``: FLA's names, served
            by one kernel.
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: query heads H.
        num_kv_heads: key and value heads; each serves ``H // num_kv_heads`` query heads.
            Default: H.
        feature_map: name of a feature map of queries and keys that keeps their width.
        use_short_conv: put a short causal convolution with SiLU behind the q, k, v projections.
        conv_size, conv_bias: its taps, and whether it has a bias.
        use_output_gate: multiply the normalised output by a gate computed from the input.
        gate_fn: activation of that gate.
        elementwise_affine, norm_eps: of the output norm.
        fuse_norm: one module for norm and ``swish`` gate (decides the parameter's name only).
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide, an odd key width per head, or an unknown name.

    Source: Retentive Network, arXiv:2307.08621.

    Example:
        >>> layer = MultiScaleRetention(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            expand_k,
            expand_v,
            use_short_conv,
            conv_size,
            conv_bias,
            layer_idx,
        )
        self.mode = check_mode(self, mode, (*MODES, "parallel"))
        self._add_feature_map(feature_map)
        self._add_output_gate(use_output_gate, gate_fn, elementwise_affine, norm_eps, fuse_norm)
        self.rotary = RotaryEmbedding(self.head_k_dim)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = self._qkv(x, call)
        positions = call.positions()
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        return self._gate_output(call.run(chunk_retention, retention_step, q, k, v), x)


class LightningAttention(RecurrentLayer):
    """Lightning attention as MiniMax-01 has it: unscaled scores, one norm over all heads, a gate.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        head_dim: channels of a head. Default: ``hidden_size // num_heads``.
        num_layers: layers of the model; heads of later layers forget more slowly.
        hidden_act: activation of queries, keys and values.
        norm_eps: of the output norm.
        layer_idx: place in the model and the cache; None counts as the first layer.

    Parameters are those of transformers' ``MiniMaxLightningAttention``; its buffers are derived
    from sizes, and there are none here.

    Raises:
        ValueError: sizes that do not divide, an unknown activation, or ``layer_idx`` not below
            ``num_layers``.

    Source: MiniMax-01, arXiv:2501.08313, section 2.2; Lightning Attention-2, arXiv:2401.04658.

    Example:
        >>> layer = LightningAttention(hidden_size=64, num_heads=2, num_layers=4, layer_idx=0)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 8,
        head_dim: int | None = None,
        num_layers: int = 12,
        hidden_act: str = "silu",
        norm_eps: float = 1e-6,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.num_heads = num_heads
        self.head_dim = _head_dim(self, hidden_size, num_heads, head_dim)
        self.depth = _depth(self, layer_idx, num_layers)
        self.act_fn = activation(hidden_act)
        width = num_heads * self.head_dim
        self.qkv_proj = nn.Linear(hidden_size, 3 * width, bias=False)
        self.output_gate = nn.Linear(hidden_size, width, bias=False)
        self.norm = RMSNorm(width, eps=norm_eps)
        self.out_proj = nn.Linear(width, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        qkv = split_heads(self.act_fn(self.qkv_proj(x)), 3 * self.head_dim)
        slopes = minimax_slopes(self.num_heads, *self.depth, x.device)
        o = call.run(
            chunk_lightning_attn, lightning_attn_step, *qkv.chunk(3, -1), scale=1.0, slopes=slopes
        )
        y: Tensor = self.out_proj(self.norm(o.flatten(-2)) * self.output_gate(x).sigmoid())
        return y


class TransNormerAttention(RecurrentLayer):
    """The gated linear attention block of TransNormerLLM: lightning attention with LRPE-d.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        head_dim: channels of a head. Default: ``hidden_size // num_heads``.
        num_layers: layers of the model; heads of later layers forget more slowly.
        use_lrpe: linearised relative positions of queries and keys, which the paper puts into the
            first layer only. Default: there.
        hidden_act: activation of queries and keys.
        norm_eps: of the output norm, which has no weight.
        bias: biases in the projections.
        layer_idx: place in the model and the cache; None counts as the first layer.

    ``qkvu_proj``, ``out_proj`` and ``lrpe.theta`` are the names of TransNormerLLM's checkpoints.

    Raises:
        ValueError: sizes that do not divide, an unknown activation, or ``layer_idx`` not below
            ``num_layers``.

    Source: TransNormerLLM, arXiv:2307.14995, sections 3.1 and 3.2.

    Example:
        >>> layer = TransNormerAttention(hidden_size=64, num_heads=2, num_layers=4, layer_idx=0)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 8,
        head_dim: int | None = None,
        num_layers: int = 12,
        use_lrpe: bool | None = None,
        hidden_act: str = "swish",
        norm_eps: float = 1e-6,
        bias: bool = False,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.num_heads = num_heads
        self.head_dim = _head_dim(self, hidden_size, num_heads, head_dim)
        self.depth = _depth(self, layer_idx, num_layers)
        self.act_fn = activation(hidden_act)
        width = num_heads * self.head_dim
        self.qkvu_proj = nn.Linear(hidden_size, 4 * width, bias=bias)
        if use_lrpe is None:
            use_lrpe = self.depth[0] == 0
        self.lrpe = LRPE(num_heads, self.head_dim) if use_lrpe else None
        self.norm = SimpleRMSNorm(width, norm_eps)
        self.out_proj = nn.Linear(width, hidden_size, bias=bias)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v, u = self.qkvu_proj(x).chunk(4, -1)
        q, k = self.act_fn(q), self.act_fn(k)
        q, k, v = (split_heads(y, self.head_dim) for y in (q, k, v))
        if self.lrpe is not None:
            positions = call.positions()
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)
        slopes = lightning_slopes(self.num_heads, *self.depth, x.device)
        o = call.run(chunk_lightning_attn, lightning_attn_step, q, k, v, scale=1.0, slopes=slopes)
        y: Tensor = self.out_proj(u * self.norm(o.flatten(-2)))
        return y


def _head_dim(layer: nn.Module, hidden_size: int, num_heads: int, head_dim: int | None) -> int:
    if head_dim is not None:
        return head_dim
    if hidden_size % num_heads:
        raise ValueError(
            f"{type(layer).__name__}: hidden_size must be a multiple of num_heads, "
            f"got {hidden_size} and {num_heads}"
        )
    return hidden_size // num_heads


def _depth(layer: nn.Module, layer_idx: int | None, num_layers: int) -> tuple[int, int]:
    index = 0 if layer_idx is None else layer_idx
    if not 0 <= index < num_layers:
        raise ValueError(
            f"{type(layer).__name__}: layer_idx must be from 0 to num_layers - 1 = "
            f"{num_layers - 1}, got {layer_idx}"
        )
    return index, num_layers
