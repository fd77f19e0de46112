"""RWKV-5 and RWKV-6 time mixing; the latter compatible with FLA's checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import activation
from ..modules.precision import wide
from ..ops import chunk_rwkv5, chunk_rwkv6, rwkv5_step, rwkv6_step
from ._gated import GroupNorm, TokenShift
from .common import split_heads
from .recurrent import Call, RecurrentLayer, check_mode, width_of

__all__ = ["RWKV5Attention", "RWKV6Attention"]


class _RWKV(RecurrentLayer):
    """Sizes, the bonus, and what follows the recurrence."""

    def __init__(
        self,
        mode: str,
        hidden_size: int,
        expand_k: float,
        expand_v: float,
        num_heads: int,
        gate_fn: str,
        elementwise_affine: bool,
        norm_eps: float,
        layer_idx: int | None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.mode = check_mode(self, mode, ("chunk", "fused_recurrent"))
        self.num_heads = num_heads
        self.key_dim = width_of(self, "expand_k", hidden_size, expand_k, num_heads)
        self.value_dim = width_of(self, "expand_v", hidden_size, expand_v, num_heads)
        self.head_k_dim = self.key_dim // num_heads
        self.head_v_dim = self.value_dim // num_heads
        self.token_shift = TokenShift()
        self.gate_fn = activation(gate_fn)
        self.bonus = nn.Parameter(torch.zeros(num_heads, self.head_k_dim))
        self.g_norm = GroupNorm(num_heads, self.value_dim, norm_eps, elementwise_affine)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _heads(self, r: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        K, V = self.head_k_dim, self.head_v_dim
        return split_heads(r, K), split_heads(k, K), split_heads(v, V)

    def _output(self, o: Tensor, g: Tensor) -> Tensor:
        y: Tensor = self.g_norm(o.flatten(-2))
        y = self.o_proj(y * self.gate_fn(g))
        return y


def _spread(size: int) -> Tensor:
    """Initial ``log(-log w)``: from memories of hundreds of tokens to ones of a few."""
    return torch.linspace(-6, -1, size)


class RWKV6Attention(_RWKV):
    """RWKV-6 (Finch): tokens shifted by an amount that depends on them, and so their decay.

    Args:
        mode: ``chunk`` or ``fused_recurrent``: FLA's names, served by one kernel.
        hidden_size: width of input and output.
        expand_k, expand_v: key and value width (all heads) in units of ``hidden_size``.
        num_heads: heads.
        gate_fn: activation of the output gate.
        proj_low_rank_dim: rank of each of the five token shifts.
        gate_low_rank_dim: rank of the decay's projection.
        fuse_norm: taken for FLA's sake.
        elementwise_affine, norm_eps: of the output norm, over each head.
        layer_idx: place in the cache; needed to use one.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode or activation.

    Source: Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence,
    arXiv:2404.05892.

    Example:
        >>> layer = RWKV6Attention(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        gate_fn: str = "swish",
        proj_low_rank_dim: int = 32,
        gate_low_rank_dim: int = 64,
        fuse_norm: bool = True,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(
            mode, hidden_size, expand_k, expand_v, num_heads, gate_fn, elementwise_affine,
            norm_eps, layer_idx,
        )  # fmt: skip
        self.proj_low_rank_dim = proj_low_rank_dim
        self.x_proj = nn.Sequential(
            LerpLinear(hidden_size, 5 * proj_low_rank_dim),
            nn.Tanh(),
            nn.Linear(5 * proj_low_rank_dim, hidden_size, bias=False),
        )
        self.x_bias = nn.Parameter(torch.zeros(5, hidden_size))
        self.r_proj = DDLerpLinear(hidden_size, self.key_dim)
        self.w_proj = DDLerpLinear(hidden_size, self.key_dim, gate_low_rank_dim)
        self.k_proj = DDLerpLinear(hidden_size, self.key_dim)
        self.v_proj = DDLerpLinear(hidden_size, self.value_dim)
        self.g_proj = DDLerpLinear(hidden_size, self.value_dim)
        self.init_projections()

    @torch.no_grad()
    def init_projections(self) -> None:
        """Memories of many lengths."""
        self.w_proj.get_parameter("linear.lora.2.bias").copy_(_spread(self.key_dim))

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        delta = call.convolve(self.token_shift, x) - x
        low = self.x_proj[0](x, delta).tanh().unflatten(-1, (5, -1))
        up = self.x_proj.get_parameter("2.weight").view(self.hidden_size, 5, -1)
        mu = torch.einsum("btnr,hnr->btnh", low, up) + self.x_bias
        projections = (self.r_proj, self.w_proj, self.k_proj, self.v_proj, self.g_proj)
        r, w, k, v, g = (
            project(x, m, delta) for project, m in zip(projections, mu.unbind(-2), strict=True)
        )
        w = -split_heads(wide(w), self.head_k_dim).exp()
        o = call.run(chunk_rwkv6, rwkv6_step, *self._heads(r, k, v), w, u=self.bonus, scale=1.0)
        return self._output(o, g)


class RWKV5Attention(_RWKV):
    """RWKV-5 (Eagle): learned token shifts, and a decay per channel that is constant in time.

    Args:
        mode, hidden_size, expand_k, expand_v, num_heads, gate_fn, elementwise_affine, norm_eps,
            layer_idx: as :class:`RWKV6Attention`.

    ``decay [num_heads, K]`` holds ``log(-log w)``. FLA has no such layer; parameters are named as
    in its RWKV-6.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode or activation.

    Source: Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence,
    arXiv:2404.05892.

    Example:
        >>> layer = RWKV5Attention(hidden_size=64, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(
            mode, hidden_size, expand_k, expand_v, num_heads, gate_fn, elementwise_affine,
            norm_eps, layer_idx,
        )  # fmt: skip
        self.r_proj = LerpLinear(hidden_size, self.key_dim)
        self.k_proj = LerpLinear(hidden_size, self.key_dim)
        self.v_proj = LerpLinear(hidden_size, self.value_dim)
        self.g_proj = LerpLinear(hidden_size, self.value_dim)
        self.decay = nn.Parameter(_spread(self.key_dim).view(num_heads, -1))

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        delta = call.convolve(self.token_shift, x) - x
        r, k, v, g = (p(x, delta) for p in (self.r_proj, self.k_proj, self.v_proj, self.g_proj))
        w = -wide(self.decay).exp()
        o = call.run(chunk_rwkv5, rwkv5_step, *self._heads(r, k, v), w=w, u=self.bonus, scale=1.0)
        return self._output(o, g)


class LoRA(nn.Module):
    """``W₂ tanh(W₁ x) + b`` under FLA's parameter names."""

    def __init__(self, input_dim: int, output_dim: int, low_rank_dim: int) -> None:
        super().__init__()
        self.lora = nn.Sequential(
            nn.Linear(input_dim, low_rank_dim, bias=False),
            nn.Tanh(),
            nn.Linear(low_rank_dim, output_dim, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lora(x)
        return y


class DDLerpLinear(nn.Module):
    """A projection of ``x + mu · delta``; ``delta`` leads to the previous token."""

    def __init__(self, input_dim: int, output_dim: int, low_rank_dim: int | None = None) -> None:
        super().__init__()
        if low_rank_dim is None:
            self.linear: nn.Module = nn.Linear(input_dim, output_dim, bias=False)
        else:
            self.linear = LoRA(input_dim, output_dim, low_rank_dim)

    def forward(self, x: Tensor, mu: Tensor, delta: Tensor) -> Tensor:
        y: Tensor = self.linear(x + delta * mu)
        return y


class LerpLinear(nn.Module):
    """:class:`DDLerpLinear` with a learned ``mu``."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim, bias=False)
        self.mu = nn.Parameter(torch.zeros(input_dim))

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        y: Tensor = self.linear(x + delta * self.mu)
        return y
