"""The delta engine's operators as Python sees them.

    S ← A_t S + k_t β_t (v_t − S̃ᵀ e_t)ᵀ,        o_t = scale · S_tᵀ q_t

``delta_rule`` has no decay A, ``gated_delta_rule`` one per head, ``kda`` one per key channel, and
all three erase what k itself reads from the decayed state, in several micro-steps per token if
asked to; ``comba`` erases with a key p of its own, before the decay. ``dplr`` is ``S ← A S + b
(Sᵀ a)ᵀ + k vᵀ``.
"""

from __future__ import annotations

from torch import Tensor

from ._operator import one_token, register, sequences

# What each operator takes between v and initial_state. Gates (g, beta) keep their own dtype.
TAKES = {
    "delta_rule": ("beta",),
    "gated_delta_rule": ("g", "beta"),
    "kda": ("g", "beta"),
    "comba": ("p", "g", "beta"),
    "dplr": ("a", "b", "g"),
}
OPERATORS = tuple(TAKES)
IN_STEPS = ("delta_rule", "gated_delta_rule", "kda")  # take num_householder


for _name, _own in TAKES.items():
    register(_name, _own)


def _steps(name: str, num_householder: int) -> tuple[int, ...]:
    return (num_householder,) if name in IN_STEPS else ()


def delta(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: tuple[Tensor | None, ...],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    num_householder: int = 1,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Whole sequences through operator ``name``; ``own``: what TAKES lists for it."""
    named = dict(zip(TAKES[name], own, strict=True))
    return sequences(
        name, q, k, v, named, scale, initial_state, output_final_state, cu_seqlens, state_v_first,
        more=_steps(name, num_householder),
    )  # fmt: skip


def delta_step(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: tuple[Tensor | None, ...],
    state: Tensor,
    scale: float | None,
    chunk_name: str,
    num_householder: int = 1,
) -> Tensor:
    """One token through operator ``name``; ``chunk_name`` is what to use where gradients are
    needed."""
    return one_token(name, q, k, v, own, state, scale, chunk_name, _steps(name, num_householder))
