"""Mamba-1: the selective scan between projections; in both directions; and over images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ShortConvolution
from ..modules.hippo import log_steps, softplus_inverse
from ..modules.precision import wide
from ..ops import scan_order, selective_scan_fn, selective_state_update
from .common import check_hidden_states, refuse_cache
from .recurrent import Call, RecurrentLayer

__all__ = ["SS2D", "BiMamba", "Mamba", "VSSBlock"]


def _step_bias(channels: int, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """What softplus makes step sizes of, log-uniform between the bounds."""
    return softplus_inverse(log_steps(channels, dt_min, dt_max).exp().clamp(min=floor))


def _log_rates(channels: int, state_size: int) -> Tensor:
    """S4D's real eigenvalues, 1 to N, for every channel."""
    return torch.arange(1.0, state_size + 1).log().expand(channels, -1).clone()


class Mamba(RecurrentLayer):
    """Mamba: a short convolution and the selective scan, gated, between two projections.

    Args:
        hidden_size: width of input and output.
        state_size: states N per channel.
        conv_kernel: taps of the convolution.
        intermediate_size: channels of the scan. Default: ``2 · hidden_size``.
        time_step_rank: rank of the step sizes' projection. Default: ``hidden_size / 16``, rounded
            up.
        use_conv_bias: whether the convolution has a bias.
        use_bias: biases of the two projections.
        dt_min, dt_max, dt_init_floor: step sizes start log-uniformly between the first two.
        layer_idx: place in the cache; needed to use one.

    Parameters are those of mamba_ssm's ``Mamba`` and transformers' ``MambaMixer``: ``in_proj``,
    ``conv1d``, ``x_proj``, ``dt_proj``, ``A_log``, ``D`` and ``out_proj``.

    Source: Mamba, arXiv:2312.00752.

    Example:
        >>> Mamba(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        state_size: int = 16,
        conv_kernel: int = 4,
        intermediate_size: int | None = None,
        time_step_rank: int | None = None,
        use_conv_bias: bool = True,
        use_bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        inner = 2 * hidden_size if intermediate_size is None else intermediate_size
        rank = -(-hidden_size // 16) if time_step_rank is None else time_step_rank
        self.intermediate_size = inner
        self.widths = [rank, state_size, state_size]  # of dt, B and C
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=use_bias)
        for suffix in self._suffixes():
            self.add_module(f"conv1d{suffix}", ShortConvolution(inner, conv_kernel, use_conv_bias))
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, sum(self.widths), bias=False))
            dt_proj = nn.Linear(rank, inner)
            nn.init.uniform_(dt_proj.weight, -(rank**-0.5), rank**-0.5)
            dt_proj.bias = nn.Parameter(_step_bias(inner, dt_min, dt_max, dt_init_floor))
            self.add_module(f"dt_proj{suffix}", dt_proj)
            self.register_parameter(f"A{suffix}_log", nn.Parameter(_log_rates(inner, state_size)))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, hidden_size, bias=use_bias)

    def _suffixes(self) -> tuple[str, ...]:
        """Of the parameters' names, one per direction."""
        return ("",)

    def _projected(self, x: Tensor, suffix: str = "") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The scan's u, dt, B and C."""
        projected = self.get_submodule(f"x_proj{suffix}")(x)
        dt, B, C = torch.split(projected, self.widths, -1)
        dt = F.linear(dt, self.get_parameter(f"dt_proj{suffix}.weight"))
        return x, dt, B, C

    def _constants(self, suffix: str = "") -> dict[str, Any]:
        return {
            "A": -wide(self.get_parameter(f"A{suffix}_log")).exp(),
            "D": self.get_parameter(f"D{suffix}"),
            "dt_bias": self.get_parameter(f"dt_proj{suffix}.bias"),
        }

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)
        u, dt, B, C = self._projected(call.convolve(self.get_submodule("conv1d"), x))
        o: Tensor = self.out_proj(call.run(_scan, _update, u, dt, B, C, z, **self._constants()))
        return o


def _scan(
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    *,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`selective_scan_fn` over ``[B, T, ·]``, with the arguments of the other operators."""
    u, dt, B, C = (t.transpose(1, 2) for t in (u, dt, B, C))
    z = None if z is None else z.transpose(1, 2)
    result = selective_scan_fn(
        u, dt, A, B, C, D, z, dt_bias, True, output_final_state, initial_state, cu_seqlens, order
    )
    y, state = (result, None) if isinstance(result, Tensor) else result
    return y.transpose(1, 2), state


def _update(
    u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, *, state: Tensor, **constants: Tensor
) -> Tensor:
    A, D, dt_bias = (constants[name] for name in ("A", "D", "dt_bias"))
    return selective_state_update(state, u, dt, A, B, C, D, z, dt_bias, True)


class BiMamba(Mamba):
    """Mamba in both directions, each with parameters of its own between shared projections.

    Args:
        divide_out: the mean of the directions rather than their sum.
        options: as :class:`Mamba`.

    Parameters are those of Vision Mamba's ``bimamba_type="v2"``: :class:`Mamba`'s, and ``A_b_log``,
    ``D_b``, ``conv1d_b``, ``x_proj_b`` and ``dt_proj_b`` for the way back.

    Note: there is no state to continue from; a cache is refused.

    Source: Vision Mamba, arXiv:2401.09417.

    Example:
        >>> BiMamba(hidden_size=16)(torch.randn(1, 10, 16))[0].shape
        torch.Size([1, 10, 16])
    """

    def __init__(self, *args: Any, divide_out: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.divide_out = divide_out

    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_b")

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        refuse_cache(self, call.cache)
        x, z = self.in_proj(x).chunk(2, -1)
        there = self._direction(x, z, "", call.cu_seqlens)
        cu = None if call.cu_seqlens is None else x.shape[1] - call.cu_seqlens.flip(0)
        back = self._direction(x.flip(1), z.flip(1), "_b", cu).flip(1)
        y = there + back
        o: Tensor = self.out_proj(y / 2 if self.divide_out else y)
        return o

    def _direction(self, x: Tensor, z: Tensor, suffix: str, cu_seqlens: Tensor | None) -> Tensor:
        u, _ = self.get_submodule(f"conv1d{suffix}")(x, cu_seqlens=cu_seqlens)
        u, dt, B, C = self._projected(u, suffix)
        return _scan(u, dt, B, C, z, cu_seqlens=cu_seqlens, **self._constants(suffix))[0]


Direction = tuple[str, bool]


class SS2D(nn.Module):
    """The scan of an image along several paths, each with parameters of its own, summed.

    Args:
        d_model: channels of input and output.
        d_state: states N per channel.
        ssm_ratio: channels of the scan in units of ``d_model``.
        dt_rank: rank of the step sizes' projection. Default: ``d_model / 16``, rounded up.
        d_conv: side of the depthwise convolution.
        directions: paths, as :func:`scan_order` names them, and whether each is walked backwards.
            Default: VMamba's four.
        dt_min, dt_max, dt_init_floor: step sizes start log-uniformly between the first two.

    Parameters are those of VMamba's ``SS2D``: ``in_proj``, ``conv2d``, ``x_proj_weight``,
    ``dt_projs_weight``, ``dt_projs_bias``, ``A_logs``, ``Ds``, ``out_norm`` and ``out_proj``.

    Source: VMamba, arXiv:2401.10166.

    Example:
        >>> SS2D(16)(torch.randn(1, 4, 6, 16)).shape
        torch.Size([1, 4, 6, 16])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        directions: tuple[Direction, ...] = (
            ("row", False), ("column", False), ("row", True), ("column", True),
        ),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
    ) -> None:  # fmt: skip
        super().__init__()
        inner, K = int(ssm_ratio * d_model), len(directions)
        rank = -(-d_model // 16) if dt_rank is None else dt_rank
        self.directions = directions
        self.widths = [rank, d_state, d_state]
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=(d_conv - 1) // 2, groups=inner)
        x_proj = torch.empty(K, sum(self.widths), inner).uniform_(-(inner**-0.5), inner**-0.5)
        self.x_proj_weight = nn.Parameter(x_proj)
        dt_projs = torch.empty(K, inner, rank).uniform_(-(rank**-0.5), rank**-0.5)
        self.dt_projs_weight = nn.Parameter(dt_projs)
        bias = [_step_bias(inner, dt_min, dt_max, dt_init_floor) for _ in directions]
        self.dt_projs_bias = nn.Parameter(torch.stack(bias))
        self.A_logs = nn.Parameter(_log_rates(K * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(K * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, d_model]`` to the same."""
        check_hidden_states(x, "B, H, W, d_model")
        B, H, W, _ = x.shape
        x, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)
        A = -wide(self.A_logs).exp().view(len(self.directions), -1, self.widths[1])
        D = self.Ds.view(len(self.directions), -1)
        y = torch.zeros_like(wide(u))
        for k, (kind, backwards) in enumerate(self.directions):
            dt, b, c = torch.split(F.linear(u, self.x_proj_weight[k]), self.widths, -1)
            dt = F.linear(dt, self.dt_projs_weight[k])
            order = scan_order(H, W, kind, backwards).to(u.device)
            o, _ = _scan(
                u, dt, b, c, None, A=A[k], D=D[k], dt_bias=self.dt_projs_bias[k], order=order
            )
            y = y + o
        out: Tensor = self.out_proj(self.out_norm(y.to(z.dtype)).view(B, H, W, -1) * F.silu(z))
        return out


class VSSBlock(nn.Module):
    """VMamba's block: a residual around a norm and :class:`SS2D`.

    Args:
        hidden_dim: channels.
        options: as :class:`SS2D`.

    Parameters: ``ln_1`` and ``self_attention``, as in VMamba's first version.

    Source: VMamba, arXiv:2401.10166.

    Example:
        >>> VSSBlock(16)(torch.randn(1, 4, 6, 16)).shape
        torch.Size([1, 4, 6, 16])
    """

    def __init__(self, hidden_dim: int, **options: Any) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(hidden_dim)
        self.self_attention = SS2D(hidden_dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, hidden_dim]`` to the same."""
        check_hidden_states(x, "B, H, W, hidden_dim")
        y: Tensor = x + self.self_attention(self.ln_1(x))
        return y
