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
from selective import channels_first, draw, results, walk
from torch import Tensor

from lsm_cuda import reference

# As in tests/ops/test_selective_scan.py; channels first in all tensors ("c") or in u alone ("u").
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
    (72, 70, 16, 2, "dzbsc", 2, "bf16"),  # 4 tokens at a time
    (70, 20, 5, 1, "dzbsc", 1, "f32"),  # one by one
    (64, 7, 17, 1, "zsc", "int32", "f16"),  # either, by where a sequence begins
    (36, 12, 16, "B", "dzc", 2, "bf16"),
    (40, 10, 70, 1, "dzbsc", 2, "f32"),
    (20, 20, 6, 1, "dzbsc", 2, "c64"),
    (37, 20, 6, 1, "dzbsc", 2, "c64"),
    (37, 600, 16, 1, "dbs", 1, "bf16"),  # B and C for 128 channels at once
    (37, 600, 16, 1, "dbsc", 1, "f32"),
    (20, 1160, 16, 2, "dbsc", 1, "f16"),
    (21, 150, 16, 1, "dbs", 1, "c64"),
    (33, 24, 3, 2, "dzbsu", 1, "f16"),
    (33, 24, 3, 1, "dzsoc", 1, "f16"),
]


def both(flavour: str, x: Inputs, softplus: bool, order: Tensor | None = None) -> Tensors:
    """Forward and backward."""
    emulator(flavour)
    ops = getattr(torch.ops, f"lsm{flavour}")
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
    tensors = tuple(x.tensors.get(n) for n in names)
    common = (*tensors, x.initial_state, x.cu_seqlens, order, softplus)
    y, state, states = ops.selective_scan_fwd(*common, True, True)
    grads = ops.selective_scan_bwd(*common, states, x.grad_o, x.grad_final_state)
    by_name = {f"d{n}": g for n, g in zip(names, grads, strict=False) if n in x.tensors}
    return {"o": y, "final_state": state, **by_name, "dinitial_state": grads[-1]}


def run(emu: Emulator, x: Inputs, softplus: bool, order: Tensor | None) -> Tensors:
    return emu.under_every_seed(lambda: both(emu.flavour, x, softplus, order))


CUT = [  # for 64 multiprocessors: in segments of time
    (530, 600, 16, 1, "dbs", 1, "bf16"),
    (600, 20, 16, 2, "dzbs", 1, "bf16"),
    (700, 9, 5, 1, "dzbso", "int32", "f32"),
    (300, 6, 3, 1, "dz", 2, "c64"),
    (290, 4, 70, "C", "zs", 1, "f32"),
    (530, 20, 140, 1, "dzbs", "int64", "bf16"),
    (530, 4, 3, "B", "s", "int64", "f16"),
    (530, 10, 5, 1, "dzsc", "int64", "bf16"),
]


@pytest.mark.parametrize("shape", SHAPES + CUT, ids=str)
def test_definition_under_every_schedule(shape: tuple) -> None:
    assert_definition(*draw(*shape), shape)


@pytest.mark.parametrize("rate", [0.0, -1.0, -100.0])
def test_extreme_decays(rate: float) -> None:
    """Of a token: steps have size one. In segments too."""
    shape = (530, 12, 6, 1, "dz", 1, "f32")
    x, _ = draw(*shape)
    x.tensors["dt"].fill_(1), x.tensors["A"].fill_(rate)
    # What only a decay of e^-100 leaves is subnormal, which the kernels flush.
    assert_definition(x, False, shape, ("dA", "dinitial_state") if rate == -100 else ())


def lay_out(x: Inputs, extras: str) -> Inputs:
    if "c" in extras:
        return channels_first(x)
    return channels_first(x, "u") if "u" in extras else x


def assert_definition(
    x: Inputs, softplus: bool, shape: tuple, subnormal: tuple[str, ...] = ()
) -> None:
    order = walk(shape[0]) if "o" in shape[4] else None

    def definition(**rest):  # type: ignore[no-untyped-def]
        return reference.selective_scan(dt_softplus=softplus, **rest)

    kinds = (torch.float64, torch.float32)
    truth, same = (results(definition, x.map(lambda t, d=d: wide(t, d)), order) for d in kinds)
    blocks = 64 if shape[0] > 256 else 8
    laid_out = lay_out(x, shape[4])
    actual = run(Emulator("emulator", "_emu", (1, 2, 4), blocks), laid_out, softplus, order)
    for name in subnormal:
        values = torch.cat([r.pop(name).flatten().double() for r in (actual, truth, same)])
        assert values.abs().max() < torch.finfo(torch.float32).smallest_normal
    assert_accepted(*({n: real(t) for n, t in r.items()} for r in (actual, truth, same)),
                    real_inputs(x))  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [*(SHAPES[i] for i in (2, 8, 9, 12, 13, 16, 17, 18, 20)), (280, 10, 5, 1, "dzbs", 1, "bf16"),
     (280, 10, 5, 1, "dzbsc", 1, "bf16")],
    ids=str,
)  # fmt: skip
def test_race_build_is_silent(shape: tuple) -> None:
    """Under schedules of its own, to the same bits."""
    x, softplus = draw(*shape)
    x = lay_out(x, shape[4])
    order = walk(shape[0]) if "o" in shape[4] else None
    blocks = 64 if shape[0] > 256 else 8
    flavours = (("_emu", (0,)), ("_emu_race", (1, 2)))
    emulators = [Emulator(f, f, seeds, blocks) for f, seeds in flavours]
    plain, race = (run(emu, x, softplus, order) for emu in emulators)
    assert_same_bits(race, plain)


@pytest.mark.parametrize("boundaries", [[0, 9, 4, 40], [1, 5, 9, 40], [0, 5, 9, 39]])
@pytest.mark.parametrize("first", [False, True])
def test_impossible_boundaries_give_nan(boundaries: list[int], first: bool) -> None:
    x, _ = draw(40, 16, 4, 1, "dzb", 1, "f32")
    x = channels_first(x) if first else x
    t, h0 = x.tensors, torch.zeros(3, 16, 4)
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
    emulator("_emu")
    ops, cu = torch.ops.lsm_emu, torch.tensor(boundaries)
    common = (*(t[n] for n in names), h0, cu, None, True)
    y, state, states = ops.selective_scan_fwd(*common, True, True)
    grads = ops.selective_scan_bwd(*common, states, x.grad_o, h0)
    assert all(r.isnan().all() for r in (y, state, *grads))


DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "scan.md"


def documented(name: str) -> tuple[float, float]:
    row = rf"^\| selective_scan {name} \| ([\d.]+) \| ([\d.]+) \|"
    reads, writes = re.search(row, DOCUMENTED.read_text(), re.MULTILINE).groups()
    return float(reads), float(writes)


@pytest.mark.parametrize(
    ("first", "copies"), [("", 0), ("u dt z B C grad_o", 0), ("u z", 0), ("dt", 2)]
)
def test_copies(first: str, copies: int) -> None:
    """None but of channels first where those of u are last: here dt, forwards and backwards."""
    x, softplus = draw(40, 16, 8, 1, "dz", 1, "f32")
    x = channels_first(x, first)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        both("_emu", x, softplus)
    assert sum(event.name == "aten::copy_" for event in profile.events()) == copies


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_rows_of_any_length_are_read_and_written_in_lines(name: str) -> None:
    """Channels first, of odd lengths: as many bytes, and only sectors that rows share, or tiles."""
    emu, S = emulator("_emu"), 16
    emu.set_seed(0)
    emu.set_multiprocessors(1)

    def count(T: int, D: int = 64) -> tuple[int, int]:
        u, dt, z, dy = (t.mT.contiguous().mT for t in torch.randn(4, 1, T, D).bfloat16())
        B, C = torch.randn(2, 1, T, 1, S).bfloat16()
        given = (u, dt, -torch.rand(D, S), B, C, None, z, None, None, None, None, True)
        *_, states = torch.ops.lsm_emu.selective_scan_fwd(*given, True, False)
        emu.reset_counters()
        if name == "forward":
            torch.ops.lsm_emu.selective_scan_fwd(*given, False, False)
        else:
            torch.ops.lsm_emu.selective_scan_bwd(*given, states, dy, None)
        launch = emu.counters()["launches"][0]
        return tuple(
            sum(launch[f"global_{kind}_{unit}"] for kind in ("read", "write"))
            for unit in ("bytes", "sectors")
        )

    even, odd = count(256), count(257)
    assert odd[0] <= 1.05 * even[0]
    assert odd[1] <= 1.6 * even[1]


BACKWARD = ("backward", "add dC", "add dB", "add dA")


def launches_of(T: int, D: int, S: int, first: bool, multiprocessors: int) -> list[dict]:
    """Of a forward, one that a gradient follows, and a backward."""
    emu = emulator("_emu")
    emu.set_seed(0)
    emu.set_multiprocessors(multiprocessors)
    u, dt, z, dy = torch.randn(4, 1, T, D).bfloat16()
    B, C = torch.randn(2, 1, T, 1, S).bfloat16()
    if first:
        u, dt, z, dy = (t.mT.contiguous().mT for t in (u, dt, z, dy))
        B, C = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (B, C))
    rows = (u, dt, -torch.rand(D, S), B, C, None, z, None, None, None, None, True)
    emu.reset_counters()
    torch.ops.lsm_emu.selective_scan_fwd(*rows, False, False)
    *_, states = torch.ops.lsm_emu.selective_scan_fwd(*rows, True, False)
    torch.ops.lsm_emu.selective_scan_bwd(*rows, states, dy, None)
    return emu.counters()["launches"]


def moved(launch: dict, X: int) -> list[float]:
    return [launch[f"global_{kind}_bytes"] / X for kind in ("read", "write")]


def sectors(launch: dict, X: int) -> float:
    return 32 * (launch["global_read_sectors"] + launch["global_write_sectors"]) / X


@pytest.mark.parametrize("first", [False, True])
def test_traffic(first: bool) -> None:
    """As documented, channels last or first; a forward within 15 % of every tensor once."""
    T, D, S = 256, 256, 16
    X = T * D * 2  # bytes of one bf16 tensor
    inference, *rest = launches_of(T, D, S, first, 1)
    least = 4 + (2 * T * S * 2 + D * S * 4) / X
    assert sum(moved(inference, X)) <= 1.15 * least
    assert sectors(inference, X) <= 1.15 * least
    for name, launch in zip(("forward", *BACKWARD), rest, strict=True):
        assert moved(launch, X) == pytest.approx(documented(name), abs=0.02), name
        if name != "add dA":  # which turns its little tensor around
            assert sectors(launch, X) <= 1.1 * sum(moved(launch, X)), name


@pytest.mark.parametrize("first", [False, True])
def test_segments_ask_again_for_the_inputs_of_states_only(first: bool) -> None:
    """u, dt and B, or dy, z, dt and C, of three segments in four."""
    T, D, S = 1024, 128, 16
    X, A, ends = T * D * 2, D * S * 4, 3 * D * S * 4
    whole = launches_of(T, D, S, first, 1)
    cut = [n for n in launches_of(T, D, S, first, 64) if "fill" not in n["kernel"]]
    for name, before, after in zip(("forward", "forward", *BACKWARD), whole, cut, strict=True):
        if name.startswith("add"):
            continue
        assert name in after["kernel"]
        assert sectors(after, X) <= 1.1 * sum(moved(after, X))
        more = [a - b for a, b in zip(moved(after, X), moved(before, X), strict=True)]
        again = 3 / 4 * ((2 if name == "forward" else 3) + 1 / 4)
        assert more[0] == pytest.approx(again + (ends + 3 * A) / X, abs=0.02)
        # Of a backward, shares of dA, dD and the bias too, one for each segment.
        shares = 0 if name == "forward" else 3 * (A + 2 * D * 4)
        assert more[1] == pytest.approx((ends + shares) / X, abs=0.02)
