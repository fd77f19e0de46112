"""The emulator's Python module: controls, counters per launch, reports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulators import emulator


@pytest.fixture(params=["_emu", "_emu_race"])
def emu(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    module = emulator(request.param)
    module.set_seed(0)
    module.set_multiprocessors(8)
    module.reset_counters()
    yield module
    module.set_schedule("by_seed")
    module.set_seed(0)


def run_gla(emu: ModuleType) -> list[torch.Tensor]:
    ops = getattr(torch.ops, f"lsm{emu.__name__}")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 50, 1, 64).bfloat16() for _ in range(3))
    g = -torch.rand(1, 50, 1, 64)
    o, state = ops.gla_fwd(q, k, v, g, None, None, 0.125, True)
    return [o, state, *ops.gla_bwd(q, k, v, g, None, None, 0.125, o, state)]


def test_total_is_the_sum_of_the_launches(emu):
    run_gla(emu)
    counted = emu.counters()
    assert counted["total"]["launches"] == len(counted["launches"]) > 1
    for name, total in counted["total"].items():
        assert total == sum(launch[name] for launch in counted["launches"])


def test_a_launch_is_described(emu):
    run_gla(emu)
    for launch in emu.counters()["launches"]:
        assert math.prod(launch["grid"]) == launch["blocks"]
        assert not launch["kernel"].startswith("0x")
    emu.reset_counters()
    assert emu.counters()["launches"] == []


@pytest.mark.parametrize("schedule", ["in_order", "uniform", "run_ahead"])
def test_schedules(emu, schedule):
    expected = run_gla(emu)
    emu.set_schedule(schedule)
    for got, want in zip(run_gla(emu), expected, strict=True):
        assert torch.equal(got, want)


def test_unknown_schedule_is_named(emu):
    with pytest.raises(ValueError, match="run_ahead"):
        emu.set_schedule("fair")
