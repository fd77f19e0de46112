"""MesaNet: least squares over the past, solved anew for every token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FusedRMSNormGated, RMSNorm
from ..modules.precision import wide
from ..ops import chunk_mesa_net, mesa_net_step
from ._gated import add_convs, project
from .common import split_heads
from .recurrent import Call, RecurrentLayer, check_mode

__all__ = ["MesaNet"]


class MesaNet(RecurrentLayer):
    r"""The Mesa layer between projections.

    Args:
        hidden_size: width of input and output.
        num_heads, head_dim: heads, and channels of queries, keys and values per head.
        mode: ``chunk``.
        use_output_gate: multiply the normalised output by SiLU of a projection of the input.
        use_short_conv: taken for FLA's sake, whose layer has its convolutions in any case.
        conv_size, conv_bias: taps of the convolutions behind q and k, and whether they have a bias.
        layer_idx: place in the cache; needed to use one.
        norm_eps: of the output norm.
        lambda_lower_bound: what the regulariser of a key channel exceeds.
        max_cg_step_training, max_cg_step_decoding: iterations of the solver.

    Raises:
        ValueError: an unknown mode.

    Source: MesaNet: Sequence Modeling by Locally Optimal Test-Time Training, arXiv:2506.05233.

    Example:
        >>> layer = MesaNet(hidden_size=64, num_heads=2, head_dim=16)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 16,
        head_dim: int = 128,
        mode: str = "chunk",
        use_output_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        lambda_lower_bound: float = 0.25,
        max_cg_step_training: int = 30,
        max_cg_step_decoding: int = 30,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.mode = check_mode(self, mode, ("chunk",))
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.key_dim = self.value_dim = num_heads * head_dim
        self.use_output_gate = use_output_gate
        self.lambda_lower_bound = lambda_lower_bound
        self.steps = max_cg_step_training, max_cg_step_decoding
        for name in "qkv":
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, self.key_dim, bias=False))
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=True)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=True)
        # softplus of this is 1 - lambda_lower_bound
        start = math.log(math.expm1(max(1 - lambda_lower_bound, 1e-3)))
        self.lambda_params = nn.Parameter(torch.full((self.key_dim,), start))
        add_convs(self, {"q": self.key_dim, "k": self.key_dim}, conv_size, conv_bias)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
            self.o_norm: nn.Module = FusedRMSNormGated(head_dim, eps=norm_eps)
        else:
            self.o_norm = RMSNorm(head_dim, eps=norm_eps, dtype=torch.float32)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = project(self, x, call, dict.fromkeys("qkv", self.head_dim))
        g = F.logsigmoid(wide(self.a_proj(x)))
        beta = wide(self.b_proj(x)).sigmoid()
        lamb = F.softplus(wide(self.lambda_params)) + self.lambda_lower_bound
        o = call.run(
            _chunk, _step, q, k, v, g, beta, lamb=lamb.view(self.num_heads, -1), steps=self.steps
        )
        if self.use_output_gate:
            o = self.o_norm(o, split_heads(self.g_proj(x), self.head_dim))
        else:
            o = self.o_norm(o)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    lamb: Tensor,
    steps: tuple[int, int],
    initial_state: tuple[Tensor, Tensor] | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """:func:`chunk_mesa_net` with the states in one tuple."""
    H, G = (None, None) if initial_state is None else initial_state
    o, H, G = chunk_mesa_net(
        q, k, v, g, beta, lamb, H, G, output_final_state, steps[0], True, cu_seqlens
    )
    return o, None if H is None or G is None else (H, G)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    lamb: Tensor,
    steps: tuple[int, int],
    state: tuple[Tensor, Tensor],
) -> Tensor:
    return mesa_net_step(q, k, v, g, beta, lamb, state, steps[1], True)
