"""Memory traffic of the sLSTM cell, counted by the emulator and held to docs/kernels/slstm.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from emulators import emulator

T, H = 16, 2
DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "slstm.md"


def documented(name: str) -> tuple[float, float]:
    row = rf"^\| slstm {name} \| ([\d.]+) \| ([\d.]+) \|"
    reads, writes = re.search(row, DOCUMENTED.read_text(), re.MULTILINE).groups()
    return float(reads), float(writes)


@pytest.mark.parametrize("D", [64, 96])
def test_traffic_is_as_documented(D: int) -> None:
    emu = emulator("_emu")
    emu.set_seed(0)
    x, R, dy = torch.randn(1, T, 4, H, D), torch.randn(H, D, 4, D), torch.randn(1, T, H, D)
    transposed = R.permute(0, 2, 3, 1).contiguous()
    ops = torch.ops.lsm_emu
    emu.reset_counters()
    _, cells, _ = ops.slstm_fwd(x, R, None, None, True, False)
    ops.slstm_fwd(x, R, None, None, False, False)
    ops.slstm_bwd(x, transposed, cells, None, None, dy, None)
    launches = emu.counters()["launches"]
    cached = R[0].numel() * 4 <= 96 * 1024
    weights = R.numel() * 4 * (1 if cached else T)
    for name, launch in zip(("forward", "inference", "backward"), launches, strict=True):
        read = (launch["global_read_bytes"] - weights) / (dy.numel() * 4)
        moved = read, launch["global_write_bytes"] / (dy.numel() * 4)
        assert moved == pytest.approx(documented(name), abs=0.01), name
        asked = launch["global_read_bytes"] + launch["global_write_bytes"]
        sectors = launch["global_read_sectors"] + launch["global_write_sectors"]
        assert 32 * sectors <= 1.05 * asked
