"""The chunk engine's operators as Python sees them.

    S_t = decay(S_{t-1}) + k_t v_tᵀ,        o_t = scale · S_tᵀ q_t

``linear_attn`` has no decay, ``simple_gla`` one per head, ``gla`` one per key channel,
``gla_value`` one per value channel, ``gla_both`` one per channel of either; ``rwkv6`` decays like
``gla`` but reads ``S_{t-1}``.
"""

from __future__ import annotations

from torch import Tensor

from ._operator import one_token, register, sequences

# Operators and the names of their gates, as in csrc/params/operators.h.
OPERATORS: dict[str, tuple[str, ...]] = {
    "linear_attn": (),
    "simple_gla": ("g",),
    "gla": ("g",),
    "gla_value": ("g",),
    "gla_both": ("g", "gv"),
    "rwkv6": ("g",),
}


for _name, _gates in OPERATORS.items():
    register(_name, _gates)


def chunk(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    state_v_first: bool = False,
    as_given: bool = False,
    gv: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Whole sequences through operator ``name``: autocast, default scale, states as asked for.

    ``as_given``: whoever calls has looked at autocast and may have widened q, k and v since: they
    stay, and gates follow them.
    """
    gates = (x for x in (g, gv) if x is not None)
    named = dict(zip(OPERATORS[name], gates, strict=True))
    return sequences(
        name, q, k, v, named, scale, initial_state, output_final_state, cu_seqlens, state_v_first,
        as_given,
    )  # fmt: skip


def step(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    scale: float | None,
    chunk_name: str,
    gv: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """One token through operator ``name``; ``chunk_name`` is what to use where gradients are
    needed. ``u``: how much of its own write a token reads that reads before it writes."""
    gates = tuple(x for x in (g, gv) if x is not None)
    more = () if u is None else (u,)
    return one_token(name, q, k, v, gates, state, scale, chunk_name, more)
