"""The short causal convolution that linear-attention layers put in front of q, k and v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import activation as activation_by_name

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
        if cache is not None and self._can_step(x, cu_seqlens):
            y, state = self._step(x, cache), cache
        elif cu_seqlens is None:
            y, state = self._rows(x, cache)
        else:
            y, state = self._packed(x, cache, cu_seqlens)
        if self.activation is not None:
            y = activation_by_name(self.activation)(y)
        if residual is not None:
            y = y + residual
        return y, state if output_final_state else None

    @staticmethod
    def _can_step(x: Tensor, cu_seqlens: Tensor | None) -> bool:
        return cu_seqlens is None and x.shape[1] == 1 and not torch.is_grad_enabled()

    def _step(self, x: Tensor, cache: Tensor) -> Tensor:
        cache.copy_(torch.cat([cache[:, :, 1:], x.transpose(1, 2)], -1))
        y = (cache.to(x.dtype) * self.weight.squeeze(1)).sum(-1)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).unsqueeze(1)  # which autocast does not see to here

    def _rows(self, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        W = self.kernel_size[0]
        if cache is None:
            padded = F.pad(x, (0, 0, W, 0))
        else:
            padded = torch.cat([cache.to(x.dtype).transpose(1, 2), x], 1)  # [B, W + T, D]
        # A copy: a view would keep the whole sequence alive, and steps write into the state.
        state = padded[:, padded.shape[1] - W :].transpose(1, 2)
        return self._taps(padded[:, 1:]), state.clone(memory_format=torch.contiguous_format)

    def _packed(self, x: Tensor, cache: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Gives every sequence its own W rows of history, so that one pass respects boundaries."""
        T, D, W = x.shape[1], self.hidden_size, self.kernel_size[0]
        N = cu_seqlens.shape[0] - 1
        bounds = cu_seqlens.long()
        tokens = torch.arange(T, device=x.device)
        # Counting the ends at or before t also skips empty sequences.
        owner = torch.searchsorted(bounds[1:], tokens, right=True)
        place = tokens + (owner + 1) * W
        padded = x.new_zeros(T + N * W, D)
        if cache is not None:
            history = bounds[:-1, None] + W * torch.arange(N, device=x.device)[:, None]
            history = history + torch.arange(W, device=x.device)  # [N, W]
            rows = cache.to(x.dtype).transpose(1, 2).reshape(N * W, D)
            padded = padded.index_copy(0, history.flatten(), rows)
        padded = padded.index_copy(0, place, x[0])
        y = self._taps(padded[None])[0].index_select(0, place - (W - 1))
        ends = bounds[1:, None] + W * torch.arange(1, N + 1, device=x.device)[:, None]
        last = ends - W + torch.arange(W, device=x.device)  # [N, W]
        return y[None], padded[last].transpose(1, 2).contiguous()

    def _taps(self, x: Tensor) -> Tensor:
        """``[B, W - 1 + T, D]`` to ``[B, T, D]``."""
        if x.shape[1] < self.kernel_size[0]:
            return x.new_zeros(x.shape[0], 0, x.shape[2])
        y = F.conv1d(x.transpose(1, 2), self.weight, self.bias, groups=self.groups)
        return y.transpose(1, 2)
