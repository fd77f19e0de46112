"""Linear-complexity sequence models as one: expand, oscillate, shrink, each with its options."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ..modules.activations import activation
from . import _chunk
from ._common import accumulation_dtype, check_shape, one_minus_exp

__all__ = ["chunk_lcsm", "lcsm_step"]

# From what a model computes to log decays.
_OSCILLATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": lambda x: x,  # they are
    "sigmoid": logsigmoid,  # a = σ(o): GLA, HGRN2
    "softplus": lambda x: -softplus(x),  # a = exp(−softplus(o)): Mamba-2 with A = −1
    "exp": lambda x: -x.exp(),  # a = exp(−exp(o)): RWKV
}


def chunk_lcsm(
    e: Tensor | None,
    i: Tensor,
    s: Tensor,
    o: Tensor | None = None,
    ov: Tensor | None = None,
    *,
    expand: str = "identity",
    insert: str = "identity",
    shrink: str = "identity",
    oscillate: str = "log",
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""A memory that every token decays, writes to, and reads.

    ``m_t = a_t ⊙ m_{t-1} + e_t i_tᵀ``,   ``y_t = scale · m_tᵀ s_t``.

    The shapes of o and ov choose the operator of the engine, the other options what is applied to
    an argument before.

    Args:
        e (Tensor, optional): expands the input into the memory (k), ``[B, T, H, K]``. None: the
            complement ``1 − a`` of the decay of key channels, as in HGRN2; then H is o's.
        i (Tensor): input (v), ``[B, T, HV, V]``.
        s (Tensor): shrinks the memory to the output (q), ``[B, T, H, K]``.
        o (Tensor, optional): oscillation, the decay: ``[HV]`` constant, ``[B, T, HV]`` a scalar of
            the token, ``[B, T, HV, K]`` a vector over keys. Default: none.
        ov (Tensor, optional): a vector over values ``[B, T, HV, V]``; with a vector o the decay is
            the matrix ``a_o a_ovᵀ``.
        expand, insert, shrink (str): activations of e, i and s by name
            (:data:`lsm_cuda.modules.activations.ACT2FN`).
        oscillate (str): what o and ov are: ``log`` decays, or what a = ``sigmoid(o)``,
            ``exp(−softplus(o))`` (``softplus``) or ``exp(−exp(o))`` (``exp``) is made of.
        scale (float): of the output.
        initial_state (Tensor, optional): ``[N, HV, K, V]`` fp32 (fp64 for fp64 inputs).
        output_final_state (bool): also return the memory after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``y [B, T, HV, V]`` in the dtype of i, and the memory ``[N, HV, K, V]`` or None.

    Raises:
        ValueError: an unknown name, ov beside an o that is no vector, or e None without a vector o.
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in every tensor. Each activation other than identity reads and writes
        its tensor once.

    Source: Unlocking the Secrets of Linear Complexity Sequence Model from A Unified Perspective,
    arXiv:2405.17383.

    Example:
        >>> e, i, s, o = (torch.randn(1, 100, 2, 32) for _ in range(4))
        >>> y, m = chunk_lcsm(e, i, s, o, expand="silu", oscillate="sigmoid",
        ...                   output_final_state=True)
        >>> y.shape, m.shape
        (torch.Size([1, 100, 2, 32]), torch.Size([1, 2, 32, 32]))
    """
    name, e, i, s, g, gv = _configure(
        "chunk_lcsm", e, i, s, o, ov, expand, insert, shrink, oscillate
    )
    return _chunk.chunk(
        name, s, e, i, g, scale, initial_state, output_final_state, cu_seqlens, gv=gv
    )


def lcsm_step(
    e: Tensor | None,
    i: Tensor,
    s: Tensor,
    state: Tensor,
    o: Tensor | None = None,
    ov: Tensor | None = None,
    *,
    expand: str = "identity",
    insert: str = "identity",
    shrink: str = "identity",
    oscillate: str = "log",
    scale: float = 1.0,
) -> Tensor:
    """One token of :func:`chunk_lcsm`; ``state [B, HV, K, V]`` is updated in place.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32)
        >>> e, i, s = (torch.randn(1, 2, 32) for _ in range(3))
        >>> lcsm_step(e, i, s, state, -torch.ones(2)).shape
        torch.Size([1, 2, 32])
    """
    name, e, i, s, g, gv = _configure(
        "lcsm_step", e, i, s, o, ov, expand, insert, shrink, oscillate
    )
    return _chunk.step(name, s, e, i, g, state, scale, "chunk_lcsm", gv)


def _configure(
    op: str,
    e: Tensor | None,
    i: Tensor,
    s: Tensor,
    o: Tensor | None,
    ov: Tensor | None,
    expand: str,
    insert: str,
    shrink: str,
    oscillate: str,
) -> tuple[str, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The operator of the engine and its arguments, k, v, q and gates."""
    if oscillate not in _OSCILLATIONS:
        known = ", ".join(_OSCILLATIONS)
        raise ValueError(f"lsm::{op}: oscillate must be one of {known}, got {oscillate!r}")
    vector = o is not None and o.dim() == i.dim()
    if e is None and not vector:
        raise ValueError(f"lsm::{op}: e None needs o with key channels to complement")
    if ov is not None and o is not None and not vector:
        raise ValueError(f"lsm::{op}: ov needs o with key channels, or none, got {[*o.shape]}")
    g, gv = (None if x is None else _decay(oscillate, x) for x in (o, ov))
    if e is None and g is not None:
        e = one_minus_exp(g).to(s.dtype)
    else:
        assert e is not None
        e = activation(expand)(e)
    if g is not None and g.dim() == 1:
        check_shape(op, "o", g, "[HV]", i.shape[-2:-1])
        g = g.expand(i.shape[:-1])
    if g is None and gv is not None:
        g, gv, name = gv, None, "gla_value"
    elif gv is not None:
        name = "gla_both"
    else:
        name = "linear_attn" if g is None else "gla" if vector else "simple_gla"
    return name, e, activation(insert)(i), activation(shrink)(s), g, gv


def _decay(oscillate: str, x: Tensor) -> Tensor:
    return x if oscillate == "log" else _OSCILLATIONS[oscillate](x.to(accumulation_dtype(x)))
