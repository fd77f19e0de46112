"""One decay per head: what is its own beyond test_families.py."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from families import FAMILIES, assert_rule, definition, draw, gradients, operator
from peers import fla_module
from torch import Tensor

from lsm_cuda import ops

STATE = "initial_state output_final_state"
SIGNATURES = {
    "chunk_simple_gla": f"q k v g g_gamma scale {STATE} state_v_first cu_seqlens",
    "fused_chunk_simple_gla": f"q k v g g_gamma scale {STATE} cu_seqlens",
    "fused_recurrent_simple_gla": f"q k v g g_gamma scale {STATE} reverse state_v_first cu_seqlens",
    "parallel_simple_gla": "q k v g scale output_attentions cu_seqlens",
    "chunk_retention": f"q k v scale {STATE} cu_seqlens",
    "fused_chunk_retention": f"q k v scale {STATE} cu_seqlens",
    "fused_recurrent_retention": f"q k v scale {STATE} reverse state_v_first cu_seqlens",
    "parallel_retention": "q k v scale output_attentions cu_seqlens",
    "chunk_lightning_attn": f"q k v layer_idx num_layers scale {STATE} cu_seqlens",
    "fused_recurrent_lightning_attn": "q k v layer_idx num_layers scale "
    f"{STATE} reverse cu_seqlens",
}
(FAMILY,) = (f for f in FAMILIES if f.name == "simple_gla")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flas(name: str) -> None:
    names = SIGNATURES[name].split()
    assert list(inspect.signature(getattr(ops, name)).parameters)[: len(names)] == names


def arguments(*, T: int = 37, H: int = 2, HV: int = 2) -> tuple[Tensor, ...]:
    q, k, v, g = (
        torch.randn(2, T, *shape, dtype=torch.float64)
        for shape in ((H, 12), (H, 12), (HV, 10), (HV,))
    )
    return q, k, v, torch.nn.functional.logsigmoid(g)


@pytest.mark.parametrize("side", [{"g": 12}, {"gv": 10}], ids=["keys", "values"])
@pytest.mark.parametrize("gate", ["mixed", "-8", "-80", "-inf"])
def test_scalar_gate_is_the_vector_of_it(gate: str, side: dict[str, int]) -> None:
    """All gradients too: the gate's is the sum over channels."""
    x = draw(FAMILY, gate=gate)

    def vector(g, **rest):  # type: ignore[no-untyped-def]
        gates = {name: g[..., None].expand(*g.shape, n) for name, n in side.items()}
        return ops.chunk_gla(**{"g": None} | gates, output_final_state=True, **rest)

    assert_rule(gradients(vector, FAMILY, x), definition(FAMILY, x), x)


def test_zero_gate_is_none() -> None:
    q, k, v, g = arguments(HV=4)
    gated = ops.chunk_simple_gla(q, k, v, 0 * g, output_final_state=True)
    for free in (
        ops.chunk_simple_gla(q, k, v, output_final_state=True),
        ops.chunk_linear_attn(q, k, v, normalize=False, output_final_state=True),
    ):
        torch.testing.assert_close(gated, free)


def test_constant_gate_is_the_scalar_of_it() -> None:
    q, k, v, _ = arguments(HV=4)
    g_gamma = -torch.rand(4).double()
    constant = ops.chunk_simple_gla(q, k, v, g_gamma=g_gamma, output_final_state=True)
    scalar = ops.chunk_simple_gla(q, k, v, g_gamma.expand(2, 37, 4), output_final_state=True)
    assert all(torch.equal(a, b) for a, b in zip(constant, scalar, strict=True))


def test_names_are_one_function() -> None:
    q, k, v, g = arguments()
    S = torch.randn(2, 2, 12, 10, dtype=torch.float64)
    want = ops.chunk_simple_gla(q, k, v, g, None, 0.3, S, True)
    for function in (ops.fused_chunk_simple_gla, ops.fused_recurrent_simple_gla):
        got = function(q, k, v, g, None, 0.3, S, True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    turned = ops.chunk_simple_gla(q, k, v, g, None, 0.3, S.mT, True, state_v_first=True)
    assert torch.equal(turned[0], want[0]) and torch.equal(turned[1].mT, want[1])


@pytest.mark.parametrize("gate", ["g", "g_gamma"])
def test_reverse(gate: str) -> None:
    """Time backwards in every packed sequence, each from its own end."""
    bounds = [0, 0, 4, 15, 20]
    q, k, v, g = (x[:1, :20] for x in arguments())
    gates = {"g": g} if gate == "g" else {"g_gamma": g[0, 0]}
    S = torch.randn(4, 2, 12, 10, dtype=torch.float64)
    o, last = ops.fused_recurrent_simple_gla(
        q, k, v, **gates, initial_state=S, output_final_state=True, reverse=True,
        cu_seqlens=torch.tensor(bounds),
    )  # fmt: skip
    for n, (a, b) in enumerate(pairwise(bounds)):
        part = {"g": g[:, a:b].flip(1)} if gate == "g" else gates
        p, state = ops.chunk_simple_gla(
            *(x[:, a:b].flip(1) for x in (q, k, v)), **part, initial_state=S[n : n + 1],
            output_final_state=True,
        )  # fmt: skip
        torch.testing.assert_close(o[:, a:b].flip(1), p)
        torch.testing.assert_close(last[n : n + 1], state)


@pytest.mark.parametrize("gated", [True, False])
def test_parallel_returns_the_matrix(gated: bool) -> None:
    q, k, v, g = arguments(HV=4)
    if gated:
        g[:, 5] = -torch.inf
    o, matrix = ops.parallel_simple_gla(q, k, v, g if gated else None, output_attentions=True)
    assert matrix.shape == (2, 4, 37, 37)
    torch.testing.assert_close(torch.einsum("bhts,bshv->bthv", matrix, v), o)
    assert ops.parallel_simple_gla(q, k, v, g)[1] is None
    o, matrix = ops.parallel_retention(q, k, v, output_attentions=True)
    torch.testing.assert_close(torch.einsum("bhts,bshv->bthv", matrix, v), o)


@pytest.mark.parametrize("gate", ["mixed", "-8"])
@pytest.mark.parametrize("form", ["recurrent", "chunk", "parallel"])
def test_is_what_fla_computes(form: str, gate: str) -> None:
    """FLA's three plain forms obey the acceptance rule where their gates allow it, as ours does."""
    naive = getattr(fla_module("ops/simple_gla/naive.py"), f"naive_{form}_simple_gla")
    x = draw(FAMILY, HV=2, gate=gate, states=form != "parallel")

    def fla(q, k, v, g, initial_state=None, cu_seqlens=None):  # type: ignore[no-untyped-def]
        if form == "parallel":
            return naive(q, k, v, g)[0], None
        return naive(q, k, v, g, initial_state=initial_state, output_final_state=True)

    expected = definition(FAMILY, x)
    theirs = gradients(fla, FAMILY, x)
    ours = gradients(operator(FAMILY), FAMILY, x)
    if form == "recurrent" or gate == "mixed":
        if form == "parallel":
            expected = tuple(gradients_without_state(x, t) for t in (torch.double, torch.float))
            ours = gradients(lambda **y: (FAMILY.chunk(**y)[0], None), FAMILY, x)
        assert_rule(theirs, expected, x)
    assert_rule(ours, expected, x)


def gradients_without_state(x, dtype):  # type: ignore[no-untyped-def]
    return gradients(lambda **y: (FAMILY.definition(**y)[0], None), FAMILY, x, dtype)


def test_errors() -> None:
    q, k, v, g = arguments()
    with pytest.raises(ValueError) as error:
        ops.chunk_simple_gla(q, k, v, g, torch.zeros(2))
    assert str(error.value) == "lsm::chunk_simple_gla: pass g or g_gamma, not both"
    with pytest.raises(RuntimeError) as error:
        ops.chunk_simple_gla(q, k, v, g_gamma=torch.zeros(3))
    assert str(error.value) == (
        "lsm::chunk_simple_gla: g_gamma must have shape [HV] = [2], got [3]"
    )
    with pytest.raises(ValueError) as error:
        bounds = torch.tensor([0, 37])
        ops.parallel_simple_gla(
            q[:1], k[:1], v[:1], g[:1], output_attentions=True, cu_seqlens=bounds
        )
    assert str(error.value) == (
        "lsm::parallel_simple_gla: output_attentions with cu_seqlens is not supported; "
        "call it per sequence"
    )
