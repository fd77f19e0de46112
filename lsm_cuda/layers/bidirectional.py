"""What the approximations of bidirectional softmax attention share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..cache import Cache
from ..modules.precision import no_autocast, wide
from .common import as_rows, refuse_cache, split_heads

__all__ = ["BidirectionalAttention", "newton_pinv"]


class BidirectionalAttention(nn.Module, ABC):
    """Projections around a map from whole sequences of queries, keys and values to outputs.

    Args:
        hidden_size: width of input and output.
        num_heads: heads H.
        qkv_bias: biases in the q, k, v projections.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"{type(self).__name__}: hidden_size must be a multiple of num_heads, "
                f"got {hidden_size} and {num_heads}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, None]:
        """Mix along time, in both directions.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            attention_mask: ``[B, S]``, S ≥ T, 0 marks padding on either side; its last T columns
                are used. Outputs at padding are 0, and all others as if it were not there.
            past_key_values: None; there is no state to continue from.
            use_cache, output_attentions: accepted for the sake of layers that have them.
            cu_seqlens: ``[N + 1]`` boundaries of N sequences packed into one row (``B == 1``).

        Returns:
            ``o [B, T, hidden_size]``, None, None.

        Raises:
            ValueError: ``attention_mask`` of a wrong shape or beside ``cu_seqlens``, or a cache.
        """
        refuse_cache(self, past_key_values)
        x, valid, back = as_rows(hidden_states, attention_mask, cu_seqlens)
        q, k, v = (
            split_heads(projection(x), self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        o = self._mix(q, k, v, valid) if x.numel() else v
        return back(self.o_proj(o.transpose(1, 2).flatten(2))), None, None

    @abstractmethod
    def _mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """``[N, H, S, D]`` each, to the same; ``valid [N, S]`` bool, or None if all are tokens."""


def newton_pinv(a: Tensor, iterations: int, shared: bool = False) -> Tensor:
    """Pseudo-inverse of ``a [..., m, m]`` by a third-order iteration of matrix products, in fp32.

    The start ``a' / (|a|_1 |a|_∞)`` makes it converge for every matrix. Singular values far below
    the largest take more iterations: each multiplies their share of the inverse by 13/4 at first,
    so that few iterations damp them instead of inverting them. Rounding errors grow as fast where
    a singular value is 0: far more iterations than convergence takes do harm there.

    Args:
        a: matrices.
        iterations: the papers take 6.
        shared: start all matrices with the smallest of their factors.

    Source: Nyströmformer, arXiv:2102.03902, eq. 11, after Razavi et al., 2014.
    """
    a = wide(a)
    with no_autocast(a):
        size = a.abs()
        norm = size.sum(-2).amax(-1) * size.sum(-1).amax(-1)
        if shared:
            norm = norm.amax()
        z = a.mT / norm[..., None, None]
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        for _ in range(iterations):
            az = a @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z
