"""The Python module: controls, counters, reports; and GLA's traffic against the hand count of docs/emulator.md."""

from __future__ import annotations

import math

import pytest
import torch
from emulated import gla_inputs, load

SHAPE = {"B": 1, "T": 128, "H": 2, "K": 64, "V": 64}


@pytest.fixture(params=["_emu", "_emu_race"])
def emulator(request):
    module = load(request.param)
    module.set_seed(0)
    module.set_schedule("by_seed")
    module.reset_counters()
    yield module, getattr(torch.ops, "lsm" + request.param)
    module.set_seed(0)


def test_forward_traffic_is_the_roofline(emulator) -> None:
    """Every input is read once and every output written once; not 5 % more."""
    module, ops = emulator
    B, T, H, K, V = SHAPE.values()
    q, k, v, g = gla_inputs(**SHAPE)
    ops.gla_fwd(q, k, v, g, None, None, K**-0.5, True)
    total = module.counters()["total"]
    read = B * T * H * (2 * (K + K + V) + 4 * K)
    written = B * H * (2 * T * V + 4 * K * V)
    assert read <= total["global_read_bytes"] <= 1.05 * read
    assert written <= total["global_write_bytes"] <= 1.05 * written
    assert 32 * total["global_read_sectors"] <= 1.05 * read
    assert 32 * total["global_write_sectors"] <= 1.05 * written


def test_forward_flops(emulator) -> None:
    """State update and read-out, plus the products inside blocks of 16 tokens."""
    module, ops = emulator
    B, T, H, K, V = SHAPE.values()
    q, k, v, g = gla_inputs(**SHAPE)
    ops.gla_fwd(q, k, v, g, None, None, K**-0.5, True)
    flops = module.counters()["total"]["mma_flops"]
    least = B * T * H * (4 * K * V + 2 * 16 * (K + V))
    assert least <= flops <= 1.5 * least


def test_counters_per_launch(emulator) -> None:
    module, ops = emulator
    q, k, v, g = gla_inputs(**SHAPE)
    o, _ = ops.gla_fwd(q, k, v, g, None, None, 0.125, False)
    ops.gla_bwd(q, k, v, g, None, None, 0.125, o, None)
    counted = module.counters()
    assert counted["total"]["launches"] == len(counted["launches"]) > 1
    for name in counted["total"]:
        assert counted["total"][name] == sum(launch[name] for launch in counted["launches"])
    assert all(math.prod(launch["grid"]) == launch["blocks"] for launch in counted["launches"])
    assert not any(launch["kernel"].startswith("0x") for launch in counted["launches"])
    module.reset_counters()
    assert module.counters()["launches"] == []


def test_seeds_do_not_change_results(emulator) -> None:
    module, ops = emulator
    q, k, v, g = gla_inputs(1, 50, 1, 64, 64)
    results = []
    for seed in range(4):
        module.set_seed(seed)
        results.append(ops.gla_fwd(q, k, v, g, None, None, 0.125, True))
    for o, state in results[1:]:
        assert torch.equal(o, results[0][0])
        assert torch.equal(state, results[0][1])


def test_wrong_schedule_is_named(emulator) -> None:
    module, _ = emulator
    with pytest.raises(ValueError, match="run_ahead"):
        module.set_schedule("fair")
