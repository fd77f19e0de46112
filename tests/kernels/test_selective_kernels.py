"""The selective scan's CUDA kernels on the emulator: definition, schedules, traffic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checks import assert_accepted, assert_same_bits
from emulators import emulator
from impls import Emulator
from inputs import Inputs, Tensors
from scans import real, real_inputs, wide
from selective import draw, results, walk
from torch import Tensor

from lsm_cuda import reference

SHAPES = [
    (70, 40, 16, 1, "dzbs", 1, "f32"),
    (37, 20, 16, 1, "dzbs", 2, "bf16"),
    (33, 24, 3, 2, "dzbso", 1, "f16"),
    (50, 7, 17, 1, "zs", "int32", "f32"),
    (0, 8, 4, 1, "dzbs", 2, "f32"),
    (37, 12, 16, "B", "dz", 2, "bf16"),
    (20, 12, 20, "C", "bs", 1, "f32"),
    (16, 10, 5, "BC", "d", "int64", "f32"),
    (37, 10, 70, 1, "dzbs", 2, "f32"),  # more states than a block holds
    (37, 20, 6, 1, "dzbs", 2, "c64"),
    (20, 9, 17, "C", "bs", "int32", "c64"),
]


def run(emu: Emulator, x: Inputs, softplus: bool, order: Tensor | None) -> Tensors:
    def raw(kind: str):  # type: ignore[no-untyped-def]
        emulator(emu.flavour)
        return getattr(getattr(torch.ops, f"lsm{emu.flavour}"), f"selective_scan_{kind}")

    def call() -> Tensors:
        names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
        tensors = tuple(x.tensors.get(n) for n in names)
        common = (*tensors, x.initial_state, x.cu_seqlens, order, softplus)
        y, state = raw("fwd")(*common, True)
        *grads, dh0 = raw("bwd")(*common, x.grad_o, x.grad_final_state)
        by_name = {f"d{n}": g for n, g in zip(names, grads, strict=True) if n in x.tensors}
        return {"o": y, "final_state": state, **by_name, "dinitial_state": dh0}

    return emu.under_every_seed(call)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition_under_every_schedule(shape: tuple) -> None:
    x, softplus = draw(*shape)
    order = walk(shape[0]) if "o" in shape[4] else None

    def definition(**rest):  # type: ignore[no-untyped-def]
        return reference.selective_scan(dt_softplus=softplus, **rest)

    kinds = (torch.float64, torch.float32)
    truth, same = (results(definition, x.map(lambda t, d=d: wide(t, d)), order) for d in kinds)
    actual = run(Emulator("emulator", seeds=(1, 2, 4)), x, softplus, order)
    assert_accepted(*({n: real(t) for n, t in r.items()} for r in (actual, truth, same)),
                    real_inputs(x))  # fmt: skip


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[-3], SHAPES[-2]], ids=str)
def test_race_build_is_silent(shape: tuple) -> None:
    """Under schedules of its own, to the same bits."""
    x, softplus = draw(*shape)
    order = walk(shape[0]) if "o" in shape[4] else None
    emulators = [Emulator(f, f, seeds) for f, seeds in (("_emu", (0,)), ("_emu_race", (1, 2)))]
    plain, race = (run(emu, x, softplus, order) for emu in emulators)
    assert_same_bits(race, plain)


@pytest.mark.parametrize("boundaries", [[0, 9, 4, 40], [1, 5, 9, 40], [0, 5, 9, 39]])
def test_impossible_boundaries_give_nan(boundaries: list[int]) -> None:
    x, _ = draw(40, 16, 4, 1, "dzb", 1, "f32")
    t, h0 = x.tensors, torch.zeros(3, 16, 4)
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
    emulator("_emu")
    ops, cu = torch.ops.lsm_emu, torch.tensor(boundaries)
    common = (*(t[n] for n in names), h0, cu, None, True)
    y, state = ops.selective_scan_fwd(*common, True)
    grads = ops.selective_scan_bwd(*common, x.grad_o, h0)
    assert all(r.isnan().all() for r in (y, state, *grads))


DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "scan.md"


def documented(name: str) -> tuple[float, float]:
    row = rf"^\| selective_scan {name} \| ([\d.]+) \| ([\d.]+) \|"
    reads, writes = re.search(row, DOCUMENTED.read_text(), re.MULTILINE).groups()
    return float(reads), float(writes)


def test_traffic() -> None:
    """As documented; and the forward is u, dt and z in, y out, B and C once per 32 channels."""
    emu = emulator("_emu")
    emu.set_seed(0)
    T, D, S = 256, 256, 16
    X = T * D * 2  # bytes of one bf16 tensor
    u, dt, z, dy = torch.randn(4, 1, T, D).bfloat16()
    B, C = torch.randn(2, 1, T, 1, S).bfloat16()
    rows = (u, dt, -torch.rand(D, S), B, C, None, z, None, None, None, None, True)
    emu.reset_counters()
    torch.ops.lsm_emu.selective_scan_fwd(*rows, False)
    torch.ops.lsm_emu.selective_scan_bwd(*rows, dy, None)
    forward, *backward = emu.counters()["launches"]
    moved = forward["global_read_bytes"] + forward["global_write_bytes"]
    assert moved <= 1.05 * (4 * X + 2 * T * S * 2 * D // 32 + D * S * 4)
    names = ("forward", "backward", "add dB", "add dC", "add dA")
    for name, launch in zip(names, (forward, *backward), strict=True):
        moved = [launch[f"global_{kind}_bytes"] / X for kind in ("read", "write")]
        assert moved == pytest.approx(documented(name), abs=0.02), name
