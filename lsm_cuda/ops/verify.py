"""Speculative decoding: draft tokens are read from a state, which then moves on by as many as were
accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulation_dtype, check_no_gradient
from ._delta import TAKES, delta

__all__ = ["DeltaDraft", "delta_verify"]

_PER_TOKEN = ("q", "g")  # the others have num_householder rows per token


class DeltaDraft:
    """Draft tokens that :func:`delta_verify` has read; :meth:`commit` accepts some of them.

    Args:
        operator: name of the operator.
        tensors: its arguments by name, q first.
        state: the state before them ``[B, HV, K, V]``.
        num_householder: micro-steps per token.
    """

    def __init__(
        self,
        operator: str,
        tensors: dict[str, Tensor | None],
        state: Tensor,
        num_householder: int = 1,
    ) -> None:
        self.operator = operator
        self.num_householder = num_householder
        self._tensors: dict[str, Tensor | None] | None = tensors
        self._state = state

    @torch.no_grad()
    def commit(self, m: int | Tensor) -> None:
        """Advance the state, in place, by the first m tokens. Once only.

        Args:
            m: 0 to the number of draft tokens; or one for every sequence ``[B]``, integers on the
                device of the state, which are not read back.

        Raises:
            RuntimeError: committed before.
            ValueError: an m out of range, or of another shape.
        """
        if self._tensors is None:
            raise RuntimeError(f"lsm::{self.operator}: these draft tokens have been committed")
        tensors, self._tensors = self._tensors, None
        q = tensors["q"]
        assert q is not None
        B, n = q.shape[:2]
        if isinstance(m, Tensor):
            if m.shape != (B,):
                raise ValueError(
                    f"lsm::{self.operator}: m must have shape [B] = [{B}], got {[*m.shape]}"
                )
            # Tokens whose keys and log decay are zero leave the state as it is.
            kept = torch.arange(n, device=q.device) < m[:, None]
            for name in tensors.keys() - {"q", "p", "a", "beta"}:
                x = tensors[name]
                if x is not None:
                    rows = kept.repeat_interleave(x.shape[1] // n, 1) if n else kept
                    tensors[name] = torch.where(rows.view(*rows.shape, *[1] * (x.dim() - 2)), x, 0)
        else:
            if not 0 <= m <= n:
                raise ValueError(f"lsm::{self.operator}: m must be in 0 to {n}, got {m}")
            for name, x in tensors.items():
                rows_kept = m if name in _PER_TOKEN else m * self.num_householder
                tensors[name] = None if x is None else x[:, :rows_kept]
        self._state.copy_(_run(self, tensors, 1.0, self._state, True)[1])  # type: ignore[arg-type]


def delta_verify(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    p: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float | None = None,
    num_householder: int = 1,
) -> tuple[Tensor, DeltaDraft]:
    r"""Outputs of n draft tokens from a state that stays as it is, and what is needed to advance it
    by the accepted ones.

    Args:
        operator (str): ``delta_rule`` (takes beta), ``gated_delta_rule`` (g ``[B, n, HV]``, beta),
            ``kda`` (g ``[B, n, HV, K]``, beta), ``comba`` (p, g, beta) or ``dplr`` (a, b and
            perhaps g ``[B, n, HV, K]``).
        q, k (Tensor): ``[B, n, H, K]``, as the operator takes them: normalised, if they are to be.
        v (Tensor): ``[B, n, HV, V]``.
        state (Tensor): ``[B, HV, K, V]`` fp32 (fp64 for fp64 inputs).
        beta, g, p, a, b (Tensor, optional): as in the chunk functions; log decays and writing
            strengths after their activations.
        scale (float, optional): default ``K ** -0.5``.
        num_householder (int): micro-steps per token, with as many rows of k, v and beta.

    Returns:
        ``o [B, n, HV, V]``, and a :class:`DeltaDraft` whose ``commit(m)`` updates ``state``.

    Raises:
        ValueError: another operator, or a tensor that it needs or does not take.
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Note: nothing per token is stored but the arguments; ``commit`` runs the operator over them once
        more.

    Example:
        >>> state = torch.zeros(2, 2, 16, 16)
        >>> q, k, v = (torch.randn(2, 4, 2, 16) for _ in range(3))
        >>> o, draft = delta_verify("delta_rule", q, k, v, state, beta=torch.rand(2, 4, 2))
        >>> draft.commit(torch.tensor([4, 1]))
        >>> o.shape
        torch.Size([2, 4, 2, 16])
    """
    if operator not in TAKES:
        raise ValueError(
            f"delta_verify: operator must be one of {', '.join(TAKES)}, got {operator!r}"
        )
    given = {"beta": beta, "g": g, "p": p, "a": a, "b": b}
    for name, x in given.items():
        optional = operator == "dplr" and name == "g"
        if (x is None) == (name in TAKES[operator]) and not optional:
            verb = "needs" if x is None else "does not take"
            raise ValueError(f"delta_verify: {operator} {verb} {name}")
    tensors: dict[str, Tensor | None] = {"q": q, "k": k, "v": v}
    tensors |= {name: given[name] for name in TAKES[operator]}
    check_no_gradient(
        f"{operator}_verify", f"{operator} over whole sequences",
        *(x for x in tensors.values() if x is not None), state,
    )  # fmt: skip
    if not state.is_contiguous() or state.dtype != accumulation_dtype(q):
        raise RuntimeError(
            f"lsm::{operator}: state is updated in place and must be contiguous "
            f"{accumulation_dtype(q)}, got {state.dtype} with strides {[*state.stride()]}"
        )
    draft = DeltaDraft(operator, tensors, state, num_householder)
    return _run(draft, tensors, scale, state, False)[0], draft


def _run(
    draft: DeltaDraft,
    tensors: dict[str, Tensor | None],
    scale: float | None,
    state: Tensor,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (tensors[name] for name in "qkv")
    own = tuple(tensors[name] for name in TAKES[draft.operator])
    return delta(
        draft.operator, q, k, v, own, scale, state, output_final_state, None,  # type: ignore[arg-type]
        draft.num_householder,
    )  # fmt: skip
