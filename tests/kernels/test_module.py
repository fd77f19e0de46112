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
    module.set_residents(1)
    module.set_cache(None)
    module.set_schedule("by_seed")
    module.set_seed(0)


def run_gla(emu: ModuleType, tokens: int = 50) -> list[torch.Tensor]:
    ops = getattr(torch.ops, f"lsm{emu.__name__}")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 1, 64).bfloat16() for _ in range(3))
    g = -torch.rand(1, tokens, 1, 64)
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


@pytest.mark.parametrize("schedule", ["in_order", "uniform", "run_ahead"])
def test_blocks_side_by_side(emu, schedule):
    expected = run_gla(emu, 200)
    counted = emu.counters()["launches"]
    emu.reset_counters()
    emu.set_residents(3)
    emu.set_schedule(schedule)
    for got, want in zip(run_gla(emu, 200), expected, strict=True):
        assert torch.equal(got, want)
    for beside, before in zip(emu.counters()["launches"], counted, strict=True):
        same = {name: before[name] for name in before if name not in ("seed", "schedule")}
        assert beside | same == beside
    with pytest.raises(ValueError, match="1 to 32, got 0"):
        emu.set_residents(0)


def test_unknown_schedule_is_named(emu):
    with pytest.raises(ValueError, match="run_ahead"):
        emu.set_schedule("fair")


def memory(emu: ModuleType) -> tuple[int, int]:
    total = emu.counters()["total"]
    return total["memory_read_bytes"], total["memory_write_bytes"]


def test_a_cache_with_room_for_all_reads_every_tensor_once(emu):
    run_gla(emu)
    assert memory(emu) == (0, 0)
    emu.reset_counters()
    emu.set_cache(1 << 26)
    run_gla(emu)
    launch = emu.counters()["launches"][0]
    assert launch["memory_read_bytes"] == 50 * 64 * (3 * 2 + 4)
    assert launch["memory_write_bytes"] == 50 * 64 * 2 + 64 * 64 * 4
    asked = emu.counters()["total"]
    assert memory(emu)[0] < asked["global_read_bytes"]
    emu.set_cache(0)
    emu.reset_counters()
    run_gla(emu)
    assert memory(emu) == (0, 0)


def test_where_tensors_lie_does_not_matter(emu):
    emu.set_cache(1 << 15)
    seen, kept = set(), []
    for i in range(3):
        kept.append(torch.empty(1000 + 16 * i))
        emu.reset_counters()
        kept.append(run_gla(emu, tokens=200))
        seen.add(memory(emu))
    assert len(seen) == 1
    emu.set_cache(1 << 26)
    emu.reset_counters()
    run_gla(emu, tokens=200)
    assert memory(emu) < seen.pop()


def test_a_cache_of_less_than_a_line_is_refused(emu):
    with pytest.raises(ValueError, match="64 bytes, got 10"):
        emu.set_cache(10)
