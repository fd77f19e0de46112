"""HGRN: the gated recurrence with a log decay per channel, under FLA's names."""

from __future__ import annotations

from torch import Tensor

from .scan import scan, scan_step

__all__ = ["chunk_hgrn", "fused_recurrent_hgrn", "hgrn_step"]


def _gate(g: Tensor, theta: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    return g if theta is None else (g, theta)


def chunk_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    theta: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""HGRN over whole sequences: ``h_t = exp(g_t) ⊙ h_{t-1} + x_t``.

    The layer's input is ``x = (1 - exp g) ⊙ c``, and with a lower bound ``exp g = lb + (1 - lb)
    σ(f)``.

    Args:
        x (Tensor): ``[B, T, D]``, bf16, fp16 or fp32 (fp64 too on CPU); complex for the complex
            form.
        g (Tensor): log of the forget gate ``[B, T, D]``, natural log, ≤ 0, in the dtype of x or
            fp32.
        initial_state (Tensor, optional): ``[N, D]`` fp32 (fp64 for fp64 inputs; complex).
        output_final_state (bool): also return the state after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`scan`.
        theta (Tensor, optional): the complex form, gate ``exp(g + iθ)`` with phases ``[D]`` or
            ``[B, T, D]``; the results are complex.

    Returns:
        ``h [B, T, D]`` in the dtype of x, and the final state ``[N, D]`` or None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.

    Note: as :func:`scan`.

    Source: HGRN, arXiv:2311.04823.

    Example:
        >>> c, f = torch.randn(2, 1, 100, 64)
        >>> g = F.logsigmoid(f)
        >>> h, state = chunk_hgrn(-torch.expm1(g) * c, g, output_final_state=True)
        >>> h.shape, state.shape
        (torch.Size([1, 100, 64]), torch.Size([1, 64]))
    """
    return scan(x, _gate(g, theta), initial_state, output_final_state, cu_seqlens, log=True)


def fused_recurrent_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    theta: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """FLA's second name for :func:`chunk_hgrn`; one kernel serves both."""
    return chunk_hgrn(x, g, initial_state, output_final_state, cu_seqlens, theta)


def hgrn_step(x: Tensor, g: Tensor, state: Tensor, theta: Tensor | None = None) -> Tensor:
    r"""One token of :func:`chunk_hgrn`, ``[B, D]``; ``state [B, D]`` is updated in place.

    Example:
        >>> state = torch.zeros(2, 64)
        >>> hgrn_step(torch.randn(2, 64), -torch.rand(2, 64), state).shape
        torch.Size([2, 64])
    """
    return scan_step(x, g if theta is None else (g, theta), state, True)
