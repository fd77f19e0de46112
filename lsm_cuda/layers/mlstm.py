"""The mLSTM layer of xLSTM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.precision import wide
from ..ops import chunk_mlstm, mlstm_step
from .common import split_heads
from .recurrent import Call, RecurrentLayer, width_of

__all__ = ["MLSTM"]


class MultiHeadLayerNorm(nn.Module):
    """Layer norm of every head on its own, with a weight, and a bias if wanted, per channel.

    ``residual``: the weight is stored without a 1 that is added to it.
    """

    def __init__(self, hidden_size: int, eps: float, bias: bool, residual: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.residual = residual
        self.weight = nn.Parameter(torch.full((hidden_size,), 0.0 if residual else 1.0))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H, V]`` to ``[..., H · V]``, in the dtype of x."""
        y = wide(x)
        weight = self.weight.to(y.dtype) + (1 if self.residual else 0)
        y = F.layer_norm(y, x.shape[-1:], eps=self.eps).flatten(-2) * weight
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


class MLSTM(RecurrentLayer):
    """xLSTM's matrix memory with exponential input gates, a norm per head and an output gate.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        qk_dim_factor, v_dim_factor: width of queries and keys, of values (all heads), in units of
            ``hidden_size``.
        use_bias: biases in the projections and the norm; the gates i and f always have them.
        gate_soft_cap: c, gate logits become ``c tanh(x / c)``; None leaves them as they are.
        norm_eps: of the norm.
        eps: added to the denominator.
        layer_idx: place in the cache; needed to use one.

    Parameters are those of the xLSTM-7B checkpoints and of transformers' ``xLSTMLayer``: ``q``,
    ``k``, ``v``, ``ogate_preact``, ``igate_preact``, ``fgate_preact``, ``multihead_norm`` and
    ``out_proj``.

    Raises:
        ValueError: sizes that do not divide, ``gate_soft_cap`` not positive.

    Source: xLSTM, arXiv:2405.04517; xLSTM 7B, arXiv:2503.13427, section 3.

    Example:
        >>> layer = MLSTM(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 4,
        qk_dim_factor: float = 0.5,
        v_dim_factor: float = 1.0,
        use_bias: bool = False,
        gate_soft_cap: float | None = 15.0,
        norm_eps: float = 1e-6,
        eps: float = 1e-6,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        if gate_soft_cap is not None and gate_soft_cap <= 0:
            raise ValueError(f"MLSTM: gate_soft_cap must be positive, got {gate_soft_cap}")
        qk_dim = width_of(self, "qk_dim_factor", hidden_size, qk_dim_factor, num_heads)
        v_dim = width_of(self, "v_dim_factor", hidden_size, v_dim_factor, num_heads)
        self.num_heads = num_heads
        self.head_k_dim = qk_dim // num_heads
        self.head_v_dim = v_dim // num_heads
        self.gate_soft_cap = gate_soft_cap
        self.eps = eps
        self.q = nn.Linear(hidden_size, qk_dim, bias=use_bias)
        self.k = nn.Linear(hidden_size, qk_dim, bias=use_bias)
        self.v = nn.Linear(hidden_size, v_dim, bias=use_bias)
        self.ogate_preact = nn.Linear(hidden_size, v_dim, bias=use_bias)
        self.igate_preact = nn.Linear(hidden_size, num_heads)
        self.fgate_preact = nn.Linear(hidden_size, num_heads)
        self.multihead_norm = MultiHeadLayerNorm(v_dim, norm_eps, use_bias)
        self.out_proj = nn.Linear(v_dim, hidden_size, bias=use_bias)
        self.init_projections()

    def init_projections(self) -> None:
        """Memories start long, and writes small."""
        nn.init.uniform_(self.fgate_preact.bias, 3.0, 6.0)
        nn.init.constant_(self.igate_preact.bias, -10.0)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q = split_heads(self.q(x), self.head_k_dim)
        k = split_heads(self.k(x), self.head_k_dim)
        v = split_heads(self.v(x), self.head_v_dim)
        i, f = self._cap(self.igate_preact(x)), self._cap(self.fgate_preact(x))
        h = call.run(chunk_mlstm, mlstm_step, q, k, v, i, f, eps=self.eps)
        o: Tensor = self.out_proj(self.multihead_norm(h) * self.ogate_preact(x).sigmoid())
        return o

    def _cap(self, gate: Tensor) -> Tensor:
        gate, cap = wide(gate), self.gate_soft_cap
        return gate if cap is None else cap * (gate / cap).tanh()
