"""Mamba-2 and log-linear Mamba-2: state space duality between two projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ShortConvolution
from ..modules.hippo import log_steps, softplus_inverse
from ..modules.precision import wide
from ..ops import (
    chunk_log_linear_attn,
    log_linear_attn_step,
    mamba_chunk_scan_combined,
    selective_state_update,
)
from ..ops.ssd import gated_norm
from .common import split_heads
from .recurrent import Call, RecurrentLayer

__all__ = ["LogLinearMamba2", "Mamba2"]


class GatedGroupNorm(nn.Module):
    """RMS norm of every group of channels, with a SiLU gate before or after it.

    Args:
        hidden_size: channels, all groups.
        groups: groups.
        eps: added to the mean square.
        norm_before_gate: ``norm(y) · silu(z)`` rather than ``norm(y · silu(z))``.
    """

    def __init__(self, hidden_size: int, groups: int, eps: float, norm_before_gate: bool) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_norm(y, z, self.weight, self.eps, self.groups, self.norm_before_gate)


class Mamba2(RecurrentLayer):
    """Mamba-2: one projection to gate, inputs, B, C and step sizes, then the scan.

    Args:
        num_heads: heads H. Default: ``expand · hidden_size // head_dim``, the only value allowed.
        head_dim: channels P of a head.
        hidden_size: width of input and output.
        state_size: state channels N.
        expand: inner width in units of ``hidden_size``.
        n_groups: groups G that share B and C; the norm is per group too.
        conv_kernel: taps of the short convolution.
        conv_init: bound of its uniform initial weights. Default: PyTorch's.
        use_conv_bias: whether it has a bias.
        hidden_act: its activation, ``silu`` or ``swish``.
        A_init_range: decay rates start uniformly in it.
        D_has_hdim: a skip weight per channel rather than per head.
        rmsnorm: a gated norm before the output projection; without, only the gate.
        norm_before_gate: norm, then gate.
        dt_min, dt_max, dt_init_floor: step sizes start log-uniformly between the first two.
        dt_limit: bounds of the step sizes.
        use_bias: biases in the projections.
        norm_eps: of the norm.
        layer_idx: place in the cache; needed to use one.
        chunk_size, backend: without meaning here; accepted for FLA's sake.

    ``in_proj``, ``conv1d``, ``dt_bias``, ``A_log``, ``D``, ``norm`` and ``out_proj`` are the
    parameters of mamba_ssm's ``Mamba2`` and transformers' ``Mamba2Mixer`` too.

    Raises:
        ValueError: sizes that do not divide, or another activation.

    Source: Transformers are SSMs, arXiv:2405.21060.

    Example:
        >>> layer = Mamba2(hidden_size=64, head_dim=32, state_size=16)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        num_heads: int | None = None,
        head_dim: int = 64,
        hidden_size: int = 2048,
        state_size: int = 128,
        expand: float = 2,
        n_groups: int = 1,
        conv_kernel: int = 4,
        conv_init: float | None = None,
        use_conv_bias: bool = True,
        hidden_act: str = "silu",
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        use_bias: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int = 256,
        layer_idx: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        name, inner = type(self).__name__, int(expand * hidden_size)
        if inner % head_dim or num_heads not in (None, 0, inner // head_dim):
            raise ValueError(
                f"{name}: num_heads * head_dim must be expand * hidden_size = {inner}, "
                f"got {num_heads} * {head_dim}"
            )
        self.num_heads = inner // head_dim
        if self.num_heads % n_groups:
            raise ValueError(
                f"{name}: num_heads must be a multiple of n_groups, "
                f"got {self.num_heads} and {n_groups}"
            )
        self.head_dim = head_dim
        self.intermediate_size = inner
        self.ssm_state_size = state_size
        self.n_groups = n_groups
        self.dt_limit = dt_limit
        conv_dim = inner + 2 * n_groups * state_size
        # Columns of in_proj: gate z; x, B and C, which are convolved; dt; what a subclass adds.
        self.widths = [inner, conv_dim, self.num_heads, self._extra_width()]
        self.in_proj = nn.Linear(hidden_size, sum(self.widths), bias=use_bias)
        self.conv1d = ShortConvolution(conv_dim, conv_kernel, use_conv_bias, hidden_act)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        dt = log_steps(self.num_heads, dt_min, dt_max).exp().clamp(min=dt_init_floor)
        self.dt_bias = nn.Parameter(softplus_inverse(dt))
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(inner if D_has_hdim else self.num_heads))
        self.norm = GatedGroupNorm(inner, n_groups, norm_eps, norm_before_gate) if rmsnorm else None
        self.out_proj = nn.Linear(inner, hidden_size, bias=use_bias)

    def _extra_width(self) -> int:
        return 0

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        z, xBC, dt, extra = torch.split(self.in_proj(x), self.widths, -1)
        groups = self.n_groups * self.ssm_state_size
        xBC = call.convolve(self.conv1d, xBC)
        x, B, C = torch.split(xBC, [self.intermediate_size, groups, groups], -1)
        x = split_heads(x, self.head_dim)
        B, C = (split_heads(y, self.ssm_state_size) for y in (B, C))
        dt = F.softplus(wide(dt) + wide(self.dt_bias))
        if tuple(self.dt_limit) != (0.0, math.inf):
            dt = dt.clamp(*self.dt_limit)
        y = self._scan(x, dt, B, C, extra, call).flatten(-2)
        y = y * F.silu(z) if self.norm is None else self.norm(y, z)
        o: Tensor = self.out_proj(y)
        return o

    def _scan(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, extra: Tensor, call: Call
    ) -> Tensor:
        """``x [B, T, H, P]``, ``dt [B, T, H]``, ``B``, ``C [B, T, G, N]`` to ``[B, T, H, P]``."""
        return call.run(_scan, _update, x, dt, B, C, A=-wide(self.A_log).exp(), D=self._skip())

    def _skip(self) -> Tensor:
        """D, ``[H]`` or ``[H, P]``."""
        return self.D if len(self.D) == self.num_heads else self.D.view(-1, self.head_dim)


def _scan(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    A: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`mamba_chunk_scan_combined` with the arguments of the other operators."""
    packed = cu_seqlens is not None
    result = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        initial_states=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_states=output_final_state and not packed,
        return_varlen_states=output_final_state and packed,
    )
    return (result, None) if isinstance(result, Tensor) else (result[0], result[1])


def _update(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *, A: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    return selective_state_update(state, x, dt, A, B, C, D)


class LogLinearMamba2(Mamba2):
    """Mamba-2 with a state per level of a Fenwick tree, read with weights of the input's making.

    Args:
        num_heads, head_dim, hidden_size, state_size, expand, n_groups, conv_kernel, conv_init,
        use_conv_bias, hidden_act, rmsnorm, D_has_hdim, norm_before_gate, chunk_size, dt_limit,
        dt_min, dt_max, dt_init_floor, use_bias, norm_eps, layer_idx, backend: as :class:`Mamba2`.
        num_levels: L; sequences have up to ``2^(L − 1)`` tokens. FLA's checkpoints have 15.

    ``L [H, num_levels]`` is learned beside the parameters of :class:`Mamba2`; the level weights are
    ``softplus(L · l)``, with l from more columns of ``in_proj``.

    Raises:
        ValueError: as :class:`Mamba2`, or no level; in a call, more tokens than the levels allow.

    Source: Log-Linear Attention, arXiv:2506.04761.

    Example:
        >>> layer = LogLinearMamba2(hidden_size=64, head_dim=32, state_size=16, num_levels=5)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        num_heads: int | None = None,
        head_dim: int = 64,
        hidden_size: int = 2048,
        state_size: int = 128,
        expand: float = 2,
        n_groups: int = 1,
        conv_kernel: int = 4,
        conv_init: float | None = None,
        use_conv_bias: bool = False,
        hidden_act: str = "silu",
        rmsnorm: bool = True,
        D_has_hdim: bool = False,
        norm_before_gate: bool = False,
        chunk_size: int = 64,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        use_bias: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        backend: str | None = None,
        num_levels: int = 15,
    ) -> None:
        if num_levels < 1:
            raise ValueError(f"LogLinearMamba2: num_levels must be positive, got {num_levels}")
        self._num_levels = num_levels
        super().__init__(
            num_heads=num_heads,
            head_dim=head_dim,
            hidden_size=hidden_size,
            state_size=state_size,
            expand=expand,
            n_groups=n_groups,
            conv_kernel=conv_kernel,
            conv_init=conv_init,
            use_conv_bias=use_conv_bias,
            hidden_act=hidden_act,
            D_has_hdim=D_has_hdim,
            rmsnorm=rmsnorm,
            norm_before_gate=norm_before_gate,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            use_bias=use_bias,
            norm_eps=norm_eps,
            layer_idx=layer_idx,
        )
        self.A_log = nn.Parameter(torch.arange(1.0, self.num_heads + 1).log())
        self.L = nn.Parameter(torch.ones(self.num_heads, num_levels))

    def _extra_width(self) -> int:
        return self.num_heads * self._num_levels

    def _scan(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, extra: Tensor, call: Call
    ) -> Tensor:
        scales = F.softplus(wide(self.L) * wide(split_heads(extra, self._num_levels)))
        g = dt * -wide(self.A_log).exp()
        v = x * dt[..., None].to(x.dtype)
        y = call.run(chunk_log_linear_attn, log_linear_attn_step, C, B, v, g, scales)
        D = self._skip()
        return y + x * (D if D.dim() == 2 else D[:, None]).to(x.dtype)
