"""Memory traffic and matrix work of the chunk engine, counted by the emulator and held to
docs/kernels/chunk.md.

What replaces a profiler where there is no GPU: a pass over memory more than documented fails here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from emulators import emulator

T, H, D = 512, 2, 128
X = T * H * D * 2  # bytes of one bf16 tensor
DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "chunk.md"
TOLERANCE = 0.05


def documented_traffic() -> dict[str, tuple[float, float]]:
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|", DOCUMENTED.read_text(), re.MULTILINE)
    return {name: (float(reads), float(writes)) for name, reads, writes in rows}


@pytest.fixture(scope="module")
def launches() -> dict[str, dict]:
    """Counters of each launch of a forward and a backward that are not cut into segments."""
    emu = emulator("_emu")
    emu.set_multiprocessors(1)
    emu.set_seed(0)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_o = (torch.randn(1, T, H, D, generator=generator).bfloat16() for _ in range(4))
    g = -torch.rand(1, T, H, D, generator=generator) / 10
    emu.reset_counters()
    torch.ops.lsm_emu.gla_fwd(q, k, v, g, None, None, 1.0, False)
    torch.ops.lsm_emu.gla_bwd(q, k, v, g, None, None, 1.0, grad_o, None)
    counted = emu.counters()["launches"]
    names = ["forward", "dq", "dk", "dv", "dg"]
    assert len(counted) == len(names), [launch["kernel"] for launch in counted]
    return dict(zip(names, counted, strict=True))


@pytest.mark.parametrize("name", ["forward", "dq", "dk", "dv", "dg"])
def test_traffic_is_as_documented(launches, name):
    reads, writes = documented_traffic()[name]
    launch = launches[name]
    assert launch["global_read_bytes"] / X == pytest.approx(reads, rel=TOLERANCE)
    assert launch["global_write_bytes"] / X == pytest.approx(writes, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["forward", "dq", "dk", "dv", "dg"])
def test_every_sector_is_used(launches, name):
    launch = launches[name]
    asked = launch["global_read_bytes"] + launch["global_write_bytes"]
    moved = 32 * (launch["global_read_sectors"] + launch["global_write_sectors"])
    assert moved <= (1 + TOLERANCE) * asked


@pytest.mark.parametrize(("name", "hmma"), [("forward", 84), ("dq", 88), ("dk", 88), ("dv", 84)])
def test_matrix_work(launches, name, hmma):
    warps, blocks = 4 * H, T // 16
    assert launches[name]["mma_instructions"] == hmma * warps * blocks


@pytest.mark.parametrize("name", ["forward", "dq", "dk", "dv"])
def test_no_bank_conflicts_in_ldmatrix(launches, name):
    assert launches[name]["ldmatrix_conflicts"] == 0
