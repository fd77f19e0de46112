"""Based and ReBased: features in slices, values in pieces, and what is kept for backward."""

from __future__ import annotations

import re

import pytest
import torch
from families import (
    FAMILIES,
    Family,
    assert_rule,
    definition,
    draw,
    gradients,
    operator,
)

from lsm_cuda import ops

BY_NAME = {str(family): family for family in FAMILIES}
POLYNOMIAL = [BY_NAME["based"], BY_NAME["rebased"]]


@pytest.mark.parametrize("dims", [(1, 1), (16, 64), (30, 5), (5, 256), (3, 300)])
@pytest.mark.parametrize("family", POLYNOMIAL, ids=str)
def test_sizes(family: Family, dims: tuple[int, int]) -> None:
    """More than 256 features or value columns take more than one call of the engine."""
    K, V = dims
    x = draw(family, T=12, K=K, V=V, B=1, H=1, HV=2)
    assert_rule(gradients(operator(family), family, x), definition(family, x), x)
    o, state = family.chunk(**x.tensors, output_final_state=True)
    *tokens, last = ({n: t[:, i] for n, t in x.tensors.items()} for i in range(12))
    states = tuple(torch.zeros_like(s) for s in state)
    for token in tokens:
        family.step(**token, state=states)
    torch.testing.assert_close(family.step(**last, state=states), o[:, -1], rtol=1e-4, atol=1e-4)
    for got, want in zip(states, state, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", POLYNOMIAL, ids=str)
def test_state_has_one_row_per_pair(family: Family) -> None:
    x = draw(family, K=16)
    _, (S, z) = family.chunk(**x.tensors, output_final_state=True)
    rows = {"based": 17 * 18 // 2 + 7, "rebased": 16 * 17 // 2}[family.name]  # + 7: a multiple of 8
    assert S.shape[2] == z.shape[2] == rows


def test_features_are_not_kept() -> None:
    """Backward has q, k, v and the normaliser's operands, no features of q or k."""
    x = {n: torch.randn(1, 256, 2, 16, requires_grad=True) for n in "qkv"}
    sizes: list[int] = []

    def save(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        ops.chunk_based(**x)
    assert max(sizes) <= 256 * 2 * 17
    assert sum(sizes) <= 6 * 256 * 2 * 17


@pytest.mark.parametrize("family", POLYNOMIAL, ids=str)
def test_undivided(family: Family) -> None:
    option = {"based": "use_norm", "rebased": "use_normalize"}[family.name]
    x = draw(family)
    o, _ = family.chunk(**x.tensors, **{option: False})
    p, _ = family.definition(**x.tensors, **{option: False})
    torch.testing.assert_close(o, p)
    token = {n: t[:, 0] for n, t in x.tensors.items()}
    _, state = family.chunk(**x.tensors, output_final_state=True)
    states = tuple(torch.zeros_like(s) for s in state)
    torch.testing.assert_close(family.step(**token, state=states, **{option: False}), p[:, 0])


def test_names_of_fla() -> None:
    x = draw(POLYNOMIAL[0]).tensors
    o, _ = ops.chunk_based(**x)
    assert torch.equal(ops.parallel_based(**x), o)
    assert torch.equal(ops.fused_chunk_based(**x), o)
    p, _ = ops.chunk_rebased(**x, eps=1e-3, use_scale=False)
    assert torch.equal(ops.parallel_rebased(**x, eps=1e-3, use_scale=False), p)
    above, below = ops.parallel_rebased(**x, use_scale=False, return_both=True)
    torch.testing.assert_close((above / (below.unsqueeze(-1) + 1e-3)).transpose(1, 2), p)


def test_bf16_gradients_where_weights_vanish() -> None:
    """A first query orthogonal to its key: nothing but eps divides."""
    q, k = torch.zeros(2, 1, 4, 1, 4, dtype=torch.bfloat16)
    q[..., 0], k[..., 1] = 1, 1
    x = {"q": q, "k": k, "v": torch.randn(1, 4, 1, 3).bfloat16()}
    o, _ = ops.chunk_rebased(**x)
    assert not o.any()
    o, _ = ops.chunk_rebased(**(x | {"k": k + 1e-3}))
    assert o.isfinite().all()


def test_errors() -> None:
    x = draw(POLYNOMIAL[0], HV=2).tensors
    bad = [
        (
            {"k": x["k"][..., 1:]},
            "k must have shape [B, T, H, K] = [2, 37, 2, 12], got [2, 37, 2, 11]",
        ),
        ({"q": x["q"][0]}, "q must have shape [B, T, H, K], got [37, 2, 12]"),
        (
            {"initial_state": torch.zeros(2, 2, 96, 10)},
            "initial_state must be the 2 tensors (S, z), got one tensor",
        ),
        (
            {"initial_state": (torch.zeros(2, 2, 96, 10), torch.zeros(2, 2, 91))},
            "z must have shape [N, HV, F] = [2, 2, 96], got [2, 2, 91]",
        ),
    ]
    for change, text in bad:
        with pytest.raises(RuntimeError, match=re.escape(f"lsm::chunk_based: {text}")):
            ops.chunk_based(**(x | change))
    token = {n: t[:, 0] for n, t in x.items()}
    text = "lsm::based_step: S must have shape [B, HV, F, V] = [2, 2, 96, 10], got [2, 2, 91, 10]"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        ops.based_step(**token, state=(torch.zeros(2, 2, 91, 10), torch.zeros(2, 2, 91)))
