"""Position embeddings of queries and keys: rotation, xPos, linearised relative positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .precision import wide

__all__ = ["LRPE", "RotaryEmbedding", "XPos", "packed_positions"]


def packed_positions(cu_seqlens: Tensor, time: int) -> Tensor:
    """Position of each of ``time`` packed tokens in its own sequence, ``[T]`` int64.

    For the ``offset`` of the modules here; add the tokens that each sequence had before, if any.
    Differences of positions within a sequence are the same without it.
    """
    bounds = cu_seqlens.long()
    tokens = torch.arange(time, device=bounds.device)
    # Counting the ends at or before t also skips empty sequences.
    return tokens - bounds[torch.searchsorted(bounds[1:], tokens, right=True)]


def token_positions(x: Tensor, offset: int | Tensor) -> Tensor:
    """Positions of ``x [B, T, H, D]`` in at least fp32, ``[T, 1, 1]`` or ``[B, T, 1, 1]``.

    Raises:
        ValueError: an ``offset`` that is a tensor of another shape than ``[T]`` or ``[B, T]``.
    """
    if isinstance(offset, int):
        offset = torch.arange(offset, offset + x.shape[1], device=x.device)
    elif offset.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"offset must be an int or positions [T] or [B, T] of x {list(x.shape)}, "
            f"got {list(offset.shape)}"
        )
    return offset.to(torch.promote_types(x.dtype, torch.float32))[..., None, None]


def linear_phase(x: Tensor, angle: Tensor) -> Tensor:
    """``[x cos(angle), x sin(angle)]``: products of two such are ``Σ x_i y_i cos(α_i − β_i)``."""
    y = wide(x)
    return torch.cat([y * angle.cos(), y * angle.sin()], -1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Turns channel pairs ``(i, i + D/2)`` by an angle that grows with the position.

    Args:
        dim: head dimension D, even.
        base: wavelength base.

    Raises:
        ValueError: an odd ``dim``.

    Source: RoFormer, arXiv:2104.09864.
    """

    table: Tensor

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even, got {dim}")
        self.dim = dim
        self.base = base
        # Positions are added as they are met; the table is derived, so no checkpoint holds it.
        self.register_buffer("table", torch.empty(0, 2, dim // 2), persistent=False)

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """Rotate ``x [B, T, H, D]``.

        Args:
            x: queries or keys.
            offset: position of the first token, or of every token, ``[T]`` or ``[B, T]``.
        """
        cos, sin = self._cos_sin(x, offset)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _cos_sin(self, x: Tensor, offset: int | Tensor) -> tuple[Tensor, ...]:
        """``[.., T, 1, D/2]`` each, in the dtype of ``x``."""
        if isinstance(offset, Tensor):
            angle = token_positions(x, offset) * self._frequencies(x.device)
            return angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        end = offset + x.shape[1]
        if self.table.shape[0] < end or self.table.device != x.device:
            self.table = self._angles(max(end, 2 * self.table.shape[0]), x.device)
        return self.table[offset:end, :, None].to(x.dtype).unbind(1)

    def _angles(self, positions: int, device: torch.device) -> Tensor:
        time = torch.arange(positions, device=device, dtype=torch.float32)
        angle = torch.outer(time, self._frequencies(device))
        return torch.stack([angle.cos(), angle.sin()], 1)  # [T, 2, D/2]

    def _frequencies(self, device: torch.device) -> Tensor:
        exponent = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return self.base**-exponent


class XPos(nn.Module):
    r"""Rotation whose scores also decay with the distance, slowly turning pairs most slowly.

    With :math:`ζ_i = (2i / D + 0.4) / 1.4`, pair i of queries is scaled by
    :math:`ζ_i^{(n - c) / b}` and of keys by its inverse, so that scores carry
    :math:`ζ_i^{(n - m) / b}`.

    Args:
        dim: head dimension D, even.
        base: wavelength base of the rotation.
        scale_base: tokens b after which pair i has lost the factor ζ_i.

    The two factors alone grow without bound: fp32 and bf16 hold them for positions up to about
    35 000 from c, fp16 for 4 000. Beyond, and in any recurrence, rotate plainly and give
    :attr:`log_decay` to an op with a decay per key channel: the same scores, with no limit.

    Raises:
        ValueError: an odd ``dim``, or ``scale_base`` not positive.

    Source: A Length-Extrapolatable Transformer, arXiv:2212.10554.
    """

    log_zeta: Tensor

    def __init__(self, dim: int, base: float = 10000.0, scale_base: float = 512.0) -> None:
        super().__init__()
        if scale_base <= 0:
            raise ValueError(f"XPos: scale_base must be positive, got {scale_base}")
        self.rotary = RotaryEmbedding(dim, base)
        self.scale_base = scale_base
        zeta = (torch.arange(0, dim, 2) / dim + 0.4) / 1.4
        self.register_buffer("log_zeta", zeta.log().repeat(2), persistent=False)

    @property
    def log_decay(self) -> Tensor:
        """``[D]`` fp32: log of the factor that a score loses with every token of distance."""
        return self.log_zeta / self.scale_base

    def forward(
        self, q: Tensor, k: Tensor, offset: int | Tensor = 0, center: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Rotate and scale ``q`` and ``k [B, T, H, D]``.

        Args:
            q, k: of the same tokens; numbers of heads may differ.
            offset: as in :class:`RotaryEmbedding`.
            center: position c with factor 1; the same in every call that shares a cache.
        """
        power = (token_positions(q, offset) - center) * self.log_decay
        q = (wide(self.rotary(q, offset)) * power.exp()).to(q.dtype)
        k = (wide(self.rotary(k, offset)) * (-power).exp()).to(k.dtype)
        return q, k


class LRPE(nn.Module):
    r"""Linearised relative positions: scores become :math:`Σ_i q_i k_i \cos(θ_i (n - m))`.

    Args:
        num_heads: heads H.
        head_dim: channels D of a head; the result has 2 D.
        base: θ starts at ``base^(−2 j / (H D))`` for channel j of all H D.

    ``theta [H, 1, D]`` is learned, in the shape of TransNormerLLM's checkpoints. With the decay of
    lightning attention it is the paper's LRPE-d.

    Source: Linearized Relative Positional Encoding, arXiv:2307.09270; TransNormerLLM,
    arXiv:2307.14995, section 3.1.
    """

    def __init__(self, num_heads: int, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        width = num_heads * head_dim
        theta = base ** (-2 / width * torch.arange(width))
        self.theta = nn.Parameter(theta.reshape(num_heads, 1, head_dim))

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """``x [B, T, H, D]`` to ``[B, T, H, 2 D]``; ``offset`` as in :class:`RotaryEmbedding`."""
        return linear_phase(x, token_positions(x, offset) * wide(self.theta.squeeze(1)))
