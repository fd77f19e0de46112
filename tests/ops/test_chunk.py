"""Results and gradients of every operator on every case, and single tokens, by the rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import AXES, OPS, Case, Op, cases
from checks import assert_accepted, expected, relative_rms, verdicts
from impls import Impl
from inputs import make_inputs

from lsm_cuda.ops import _chunk


def test_accepted(impl: Impl, case: Case) -> None:
    x, truth, same = expected(case)
    assert_accepted(impl.run(case.op, x), truth, same, x)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_groups_of_four(impl: Impl, op: Op, dtype: str) -> None:
    """Four value heads' shares of dq and dk, rounded one by one on CUDA, obey the rule together."""
    x, truth, same = expected(Case(op, T=40, heads=(1, 4), dtype=dtype, state="both"))
    assert_accepted(impl.run(op, x), truth, same, x)


def test_forward_without_gradients_is_the_same(impl: Impl, op: Op) -> None:
    x = make_inputs(Case(op, T=65, dims=(7, 33), heads=(1, 2), state="both"))
    with_grad = impl.run(op, x)
    with torch.no_grad():
        o, state = impl.forward(op, x.to(impl.device))
    assert not o.requires_grad
    assert torch.equal(o.cpu(), with_grad["o"])
    assert torch.equal(state.cpu(), with_grad["final_state"])


STEP_CASES = [
    ("f32", "mixed", (16, 16), (1, 1)),
    ("bf16", "-1", (64, 32), (2, 4)),
    ("f16+f32", "-80", (7, 33), (1, 3)),
    ("bf16+f32", "-inf", (1, 7), (2, 2)),
    ("f32", "positive", (33, 1), (2, 2)),
    ("f32", "0", (256, 256), (1, 2)),
    ("f64", "mixed", (33, 7), (2, 4)),
]


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "offset"])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("dtype, gate, dims, heads", STEP_CASES)
def test_step(
    impl: Impl, op: Op, dtype: str, gate: str, dims: tuple, heads: tuple, batch: int, layout: str
) -> None:
    case = Case(
        op, T=1, dtype=dtype, gate=gate, dims=dims, heads=heads, batch=batch, layout=layout,
        state="both",
    )  # fmt: skip
    x, truth, same = expected(case)
    state = x.initial_state.clone().to(impl.device)
    address = state.data_ptr()
    o = impl.step(op, {name: t[:, 0] for name, t in x.tensors.items()}, state, case.scale)
    assert state.data_ptr() == address
    names = ("o", "final_state")
    assert_accepted(
        {"o": o[:, None], "final_state": state},
        {n: truth[n] for n in names},
        {n: same[n] for n in names},
        x,
    )


@pytest.mark.parametrize("dtype, gate, dims, heads", STEP_CASES)
def test_step_of_a_transposed_state(
    impl: Impl, op: Op, dtype: str, gate: str, dims: tuple, heads: tuple
) -> None:
    """A state that lies as [B, HV, V, K], which the chunk engine takes, is updated where it is."""
    case = Case(op, T=1, dtype=dtype, gate=gate, dims=dims, heads=heads, batch=2, state="both")
    x, truth, same = expected(case)
    memory = x.initial_state.mT.contiguous().to(impl.device)
    o = impl.step(op, {n: t[:, 0] for n, t in x.tensors.items()}, memory.mT, case.scale)
    names = ("o", "final_state")
    results = {"o": o[:, None], "final_state": memory.mT}
    assert_accepted(results, {n: truth[n] for n in names}, {n: same[n] for n in names}, x)


test_step_of_a_transposed_state.only_ops = tuple(_chunk.OPERATORS)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_cases_hold_every_pair(op: Op) -> None:
    """The case table is what it says: every value of every axis, and every affordable pair."""
    table = cases(op, "cpu")
    axes = dict(AXES)
    if not op.gated:
        axes |= {"gate": ["0"], "dtype": ["f32", "bf16", "f16", "f64"]}
    for axis, values in axes.items():
        assert {getattr(case, axis) for case in table} >= set(values)
    pairs = [("gate", "dtype"), ("dims", "dtype"), ("T", "batch")]
    if op.every_pair:
        pairs += [("T", "gate"), ("layout", "scale")]
    for a, b in pairs:
        held = {(getattr(case, a), getattr(case, b)) for case in table}
        assert held >= set(itertools.product(axes[a], axes[b]))


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_rule_notices(op: Op, dtype: str) -> None:
    """The rule accepts rounding, and rejects a lost token, a wrong scale and an infinity."""
    case = Case(op, T=200, dtype=dtype, gate="-1")
    x, truth, same = expected(case)
    close = truth if dtype == "f64" else same
    good = {name: t.to(case.torch_dtype) for name, t in close.items()}
    assert not verdicts(good, truth, same, x)
    for name, t in good.items():
        lost = t.clone()
        lost[:, t[0].flatten(1).norm(dim=1).argmax()] = 0
        huge = t.clone()
        huge.view(-1)[0] = torch.inf
        for bad in (lost, t * 1.03, huge, t.transpose(-1, -2)):
            assert verdicts(good | {name: bad}, truth, same, x), name
    assert relative_rms(truth["o"], truth["o"]) == 0
