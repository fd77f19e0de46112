"""Heads of more values than kernels of whole sequences take: in slices there, at once by steps."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Op
from checks import assert_accepted, definition
from impls import Impl
from inputs import make_inputs

from lsm_cuda.ops import _operator


@pytest.mark.parametrize("batch", [2, "int32"])
@pytest.mark.parametrize("state", ["none", "both"])
def test_slices_are_the_whole(impl: Impl, op: Op, monkeypatch, state, batch) -> None:
    """All results and gradients; the last slice is narrower than the others."""
    monkeypatch.setitem(_operator.VALUES, impl.device, 16)
    case = Case(op, T=37, dims=(12, 44), heads=(1, 2), dtype="f32", state=state, batch=batch)
    x = make_inputs(case)
    assert_accepted(impl.run(op, x), *definition(op, x), x)


test_slices_are_the_whole.only_impls = ("cpu", "cuda")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_steps_take_any_number_of_values(impl: Impl, op: Op, dtype) -> None:
    x = make_inputs(Case(op, T=3, dims=(16, 300), heads=(1, 2), state="both", batch=2, dtype=dtype))
    state = x.initial_state.clone().to(impl.device)
    steps = [
        impl.step(op, {n: tensor[:, t] for n, tensor in x.tensors.items()}, state) for t in range(3)
    ]
    results = {"o": torch.stack(steps, 1), "final_state": state.cpu()}
    truth, same = ({n: t[n] for n in results} for t in definition(op, x))
    assert_accepted(results, truth, same, x)


def test_columns_of_threads_are_the_whole(impl: Impl, op: Op) -> None:
    """Of one head, where the last thread has fewer columns than the others."""
    x = make_inputs(Case(op, T=64, dims=(48, 100), state="both"))
    assert_accepted(impl.run(op, x), *definition(op, x), x)


test_columns_of_threads_are_the_whole.only_impls = ("cpu", "cuda")
