"""The short causal convolution that linear-attention layers put in front of q, k and v."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.conv import causal_conv1d, causal_conv1d_step

__all__ = ["ShortConvolution"]


class ShortConvolution(nn.Conv1d):
    """Depthwise causal convolution over time, with a state for continuing a sequence.

    Args:
        hidden_size: channels D.
        kernel_size: taps W; the last one weighs the current token.
        bias: learn a bias per channel.
        activation: ``silu``, ``swish`` or None.
        device, dtype: of the parameters ``weight [D, 1, W]`` and ``bias [D]``.

    Raises:
        ValueError: another activation.
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in ("silu", "swish", None):
            raise ValueError(
                f"ShortConvolution: activation must be silu, swish or None, got {activation!r}"
            )
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            padding=kernel_size - 1,
            groups=hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.hidden_size = hidden_size
        self.activation = activation

    @property
    def state_size(self) -> int:
        """Elements of the state of one sequence."""
        return self.hidden_size * self.kernel_size[0]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        l2norm_dim: int | None = None,
        l2norm_channels: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve whole sequences, or one token per sequence after ``cache``.

        Args:
            x: ``[B, T, D]``; with ``cu_seqlens``, N sequences packed into one row (``B == 1``).
            residual: ``[B, T, D]``, added after the activation.
            mask: ``[B, T]``, 0 silences a token; not together with ``cu_seqlens``.
            cache: ``[N, D, W]``, the last W inputs of each sequence. A single-token call without
                autograd updates it in place.
            output_final_state: also return the state after the last token.
            cu_seqlens: ``[N + 1]`` boundaries of the packed sequences.
            l2norm_dim, l2norm_channels: channels of a head whose length y is divided by, and of all
                such heads, as in :func:`lsm_cuda.ops.causal_conv1d`.

        Returns:
            ``y [B, T, D]`` and the state ``[N, D, W]``, or None.

        Raises:
            ValueError: ``mask`` with ``cu_seqlens``, or ``cu_seqlens`` with ``B != 1``, or a cache
                of another shape.
        """
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("ShortConvolution: pass mask or cu_seqlens, not both")
            x = x * mask.unsqueeze(-1).to(x.dtype)
        if cu_seqlens is not None and x.shape[0] != 1:
            raise ValueError(
                f"ShortConvolution: x must have B = 1 with cu_seqlens, got {list(x.shape)}"
            )
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = (N, self.hidden_size, self.kernel_size[0])
        if cache is not None and cache.shape != expected:
            raise ValueError(
                f"ShortConvolution: cache must have shape [N, D, W] = {list(expected)}, "
                f"got {list(cache.shape)}"
            )
        weight = self.weight.squeeze(1)
        if cache is not None and self._can_step(x, cu_seqlens):
            # The state keeps its own dtype, which is that of earlier inputs.
            state = cache if cache.dtype == x.dtype else cache.to(x.dtype)
            y = causal_conv1d_step(
                x[:, 0], state, weight, self.bias, self.activation, l2norm_dim, l2norm_channels
            )[:, None]
            if state is not cache:
                cache.copy_(state)
            y = y if residual is None else y + residual
            return y, cache if output_final_state else None
        if cache is not None:
            cache = cache.to(x.dtype)
        return causal_conv1d(
            x, weight, self.bias, residual, cache, output_final_state, self.activation, cu_seqlens,
            l2norm_dim, l2norm_channels,
        )  # fmt: skip

    @staticmethod
    def _can_step(x: Tensor, cu_seqlens: Tensor | None) -> bool:
        return cu_seqlens is None and x.shape[1] == 1 and not torch.is_grad_enabled()
