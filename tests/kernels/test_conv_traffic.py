"""Memory traffic of the short convolution, counted by the emulator and held to
docs/kernels/conv.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from emulators import emulator

T, D, W = 512, 128, 4
X = T * D * 2  # bytes of one bf16 tensor
DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "conv.md"
TOLERANCE = 0.02
FLOOR = {"forward": 2, "backward": 3}


def documented(name: str) -> tuple[float, float]:
    row = rf"^\| causal_conv1d {name} \| ([\d.]+) \| ([\d.]+) \|"
    reads, writes = re.search(row, DOCUMENTED.read_text(), re.MULTILINE).groups()
    return float(reads), float(writes)


def count(name: str, channel_first: bool = False, norm: int = 0, **sizes: int) -> dict:
    """Counters of the walk; the sum over blocks is a launch of its own."""
    emu = emulator("_emu")
    emu.set_seed(0)
    size = {"B": 1, "T": T, "D": D} | sizes
    x, grad = (torch.randn(size["B"], size["T"], size["D"]).bfloat16() for _ in range(2))
    if channel_first:
        x, grad = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, grad))
    weight, bias = torch.randn(size["D"], W).bfloat16(), torch.randn(size["D"]).bfloat16()
    rows = (x, weight, bias, None, None, None, True)
    emu.reset_counters()
    if name == "forward":
        torch.ops.lsm_emu.causal_conv1d_fwd(*rows, 0, norm)
    else:
        torch.ops.lsm_emu.causal_conv1d_bwd(*rows, grad, None, True, norm)
    return emu.counters()["launches"][0]


@pytest.mark.parametrize("name", FLOOR)
def test_traffic_is_as_documented(name):
    launch, (reads, writes) = count(name), documented(name)
    assert launch["global_read_bytes"] / X == pytest.approx(reads, abs=TOLERANCE)
    assert launch["global_write_bytes"] / X == pytest.approx(writes, abs=TOLERANCE)
    assert reads + writes <= 1.15 * FLOOR[name]


@pytest.mark.parametrize("name", FLOOR)
def test_every_sector_is_used(name):
    launch = count(name)
    asked = launch["global_read_bytes"] + launch["global_write_bytes"]
    moved = 32 * (launch["global_read_sectors"] + launch["global_write_sectors"])
    assert moved <= 1.05 * asked


@pytest.mark.parametrize("name", FLOOR)
def test_no_layout_is_transposed(name):
    """Tokens side by side: as many bytes, to the inputs before each run."""
    launch = count(name, channel_first=True, D=16)
    moved = (launch["global_read_bytes"] + launch["global_write_bytes"]) / (T * 16 * 2)
    assert moved <= 1.15 * FLOOR[name]


@pytest.mark.parametrize("name", FLOOR)
@pytest.mark.parametrize("length", [1001, 1002, 1004])
def test_rows_of_any_length_are_read_and_written_in_pieces(name, length):
    """But for their ends: each where it is aligned, which no two of an odd length need share."""

    def sectors(T: int) -> int:
        launch = count(name, channel_first=True, D=16, T=T)
        return launch["global_read_sectors"] + launch["global_write_sectors"]

    assert sectors(length) <= 1.1 * sectors(1008)


@pytest.mark.parametrize("name", FLOOR)
def test_a_norm_costs_no_pass(name):
    """Dividing heads by their length moves nothing more; a pass of its own would move two tensors
    forwards and three backwards."""
    plain, normed = count(name), count(name, norm=128)
    for counter in ("global_read_bytes", "global_write_bytes"):
        assert normed[counter] == plain[counter]
