"""Every kernel under many schedules and in the race build: the same bits whatever the order, and
no report."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from cases import OPS, Case, Op
from checks import assert_same_bits
from emulators import emulator
from impls import IMPLS, Emulator
from inputs import Tensors, make_inputs


@dataclass(frozen=True)
class Call:
    """One call; together they take every branch of the kernels: ragged and short, packed, cut into
    segments, value groups, gates that reopen a frame or walk token by token, each dtype."""

    name: str
    multiprocessors: int = 1
    case: dict[str, Any] = field(default_factory=dict)
    poison: bool = False  # cu_seqlens that decrease: NaN everywhere

    def run(self, op: Op, flavour: str, seed: int) -> Tensors:
        x = make_inputs(Case(op, state="both", **self.case))
        if self.poison:
            x = replace(x, cu_seqlens=x.cu_seqlens.flip(0))
        emu = Emulator(flavour, flavour, (seed,), self.multiprocessors)
        state = x.initial_state[:1].clone()
        o = emu.step(op, {name: t[:, 0] for name, t in x.tensors.items()}, state, x.scale)
        return emu.run(op, x) | {"step": o, "state": state}

    def __str__(self) -> str:
        return self.name


BF16 = {"dtype": "bf16+f32", "dims": (64, 64)}
CALLS = [
    Call("one-token", case=BF16 | {"T": 1}),
    Call("short", case=BF16 | {"T": 7, "heads": (1, 2)}),
    Call("one-block", case=BF16 | {"T": 16, "dims": (128, 64), "dtype": "bf16"}),
    Call("ragged", case=BF16 | {"T": 77, "dims": (64, 128), "gate": "-1"}),
    Call("wide", case=BF16 | {"T": 40, "dims": (256, 72)}),
    Call("tokenwise", case=BF16 | {"T": 37, "gate": "-80"}),
    Call("resets", case=BF16 | {"T": 150, "gate": "resets", "layout": "offset"}),
    Call("packed-cut", 64, BF16 | {"T": 300, "batch": "int32"}),
    Call("cut", 64, BF16 | {"T": 530, "gate": "-1"}),
    Call("fp32", case={"T": 45, "dims": (40, 24), "gate": "-8"}),
    Call("fp32-cut", 64, {"T": 300, "dims": (32, 32), "batch": "int64"}),
    Call("fp16", case={"T": 33, "dims": (64, 40), "dtype": "f16"}),
    Call("odd", case={"T": 19, "dims": (7, 33), "dtype": "bf16", "layout": "sliced"}),
    Call("fp32-odd", case={"T": 19, "dims": (33, 7)}),
    Call("poison", case=BF16 | {"T": 40, "batch": "int64"}, poison=True),
    Call("fp32-poison", case={"T": 40, "batch": "int32"}, poison=True),
]


@pytest.fixture(
    scope="module", params=itertools.product(OPS, CALLS), ids=lambda p: f"{p[0]}-{p[1]}"
)
def call(request: pytest.FixtureRequest) -> tuple[Op, Call, Tensors]:
    """An operator, a call of it, and the results in order."""
    op, call = request.param
    return op, call, call.run(op, "_emu", 0)


@pytest.mark.parametrize("seed", (5, 6, 7, 8))  # the race build has the first four
def test_any_schedule_gives_the_same_bits(call, seed):
    op, call, expected = call
    assert_same_bits(call.run(op, "_emu", seed), expected)
    if not call.poison:
        assert all(t.isfinite().all() for t in expected.values())


@pytest.mark.parametrize("seed", (1, 2, 3, 4))
def test_race_build_is_silent(call, seed):
    op, call, expected = call
    assert_same_bits(call.run(op, "_emu_race", seed), expected)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_operator_tests_run_under_every_schedule(op):
    """What IMPLS["emulator"] runs, it runs under four seeds, half of them run-ahead."""
    emu = emulator("_emu")
    x = make_inputs(Case(op, T=5, dtype="bf16", state="both"))
    token = {name: t[:, 0] for name, t in x.tensors.items()}
    for call in (
        lambda impl: impl.run(op, x),
        lambda impl: impl.forward(op, x),
        lambda impl: impl.step(op, token, torch.zeros_like(x.initial_state)),
    ):
        emu.reset_counters()
        call(IMPLS["emulator"])
        launches = emu.counters()["launches"]
        schedules = {launch["seed"]: launch["schedule"] for launch in launches}
        assert len(schedules) >= 4
        assert 2 * [*schedules.values()].count("run_ahead") == len(schedules)
        assert len(launches) % len(schedules) == 0
