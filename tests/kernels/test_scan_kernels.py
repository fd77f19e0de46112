"""The scan engine's kernels on the emulator: traffic held to its floor, races, poison."""

from __future__ import annotations

import pytest
import torch
from checks import assert_same_bits
from emulators import emulator
from impls import Emulator
from scans import RG_LRU, SCAN, ScanCase, draw_scan, run_scan

T, D = 512, 256
# tensors read and written: x a -> h;  dy a h -> dx da;  constant a: x -> h;  dy h -> dx;
# x i r -> h;  dy x i r h -> dx di dr
FLOORS = {"token": (3, 5), "constant": (2, 3), "rg_lru": (4, 8)}
FORMS = [
    *FLOORS, "token log", "token reverse", "token complex", "constant complex", "rg_lru reverse",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_traffic_is_the_floor(form: str) -> None:
    form, _, how = form.partition(" ")
    emu = emulator("_emu")
    emu.set_multiprocessors(1)
    emu.set_seed(0)
    is_complex = how == "complex"
    x, y, z, grad = torch.randn(4, 1, T, D, dtype=torch.complex64 if is_complex else torch.bfloat16)
    X, flags = x.nbytes, (how == "log", how == "reverse")
    ops = torch.ops.lsm_emu
    emu.reset_counters()
    if form == "rg_lru":
        c = -torch.rand(D)
        h, _ = ops.rg_lru_fwd(x, y, z, c, None, None, None, flags[1], False)
        ops.rg_lru_bwd(x, y, z, c, None, None, None, flags[1], h, grad, None)
    else:
        a = torch.rand(D).to(x.dtype if is_complex else None) if form == "constant" else y / 4
        h, _ = ops.scan_fwd(x, a, None, None, None, *flags, False)
        ops.scan_bwd(x, a, None, None, None, *flags, h, grad, None, True)
    forward, backward, *_ = emu.counters()["launches"]
    for launch, floor in zip((forward, backward), FLOORS[form], strict=True):
        moved = launch["global_read_bytes"] + launch["global_write_bytes"]
        sectors = launch["global_read_sectors"] + launch["global_write_sectors"]
        assert moved <= 1.05 * floor * X
        assert 32 * sectors <= 1.15 * floor * X


CALLS = [
    (1, ScanCase(SCAN, T=150, D=72, dtype="bf16+f32", state="both")),
    (1, ScanCase(SCAN, T=150, D=33, dtype="f16", state="both", batch="int32", reverse=True)),
    (1, ScanCase(SCAN, T=70, D=40, dtype="c64", state="both", form="constant", order=True)),
    (64, ScanCase(SCAN, T=600, D=16, dtype="f32", state="both", batch="int64")),
    (64, ScanCase(SCAN, T=600, D=16, dtype="bf16", state="both", form="constant", reverse=True)),
    # More segments than a group of them.
    (64, ScanCase(SCAN, T=2500, D=8, dtype="f32", state="both", reverse=True)),
    (64, ScanCase(SCAN, T=5000, D=8, dtype="c64", state="both", batch="int32")),
    (1, ScanCase(RG_LRU, T=150, D=72, dtype="bf16", batch=2)),
    (64, ScanCase(RG_LRU, T=300, D=8, dtype="f32", state="both", batch="int64", reverse=True)),
]


@pytest.mark.parametrize(("multiprocessors", "case"), CALLS, ids=str)
def test_any_schedule_gives_the_same_bits_and_no_race(multiprocessors: int, case: ScanCase) -> None:
    x, options = draw_scan(case)
    plain = Emulator("_emu", "_emu", (0, 1, 2, 4), multiprocessors)
    race = Emulator("_emu_race", "_emu_race", (1, 2), multiprocessors)
    results = [run_scan(impl, case.op, x, options) for impl in (plain, race)]
    assert_same_bits(*results)
    assert all(t.isfinite().all() for t in results[0].values())


@pytest.mark.parametrize("boundaries", [[0, 9, 4, 40], [1, 5, 9, 40], [0, 5, 9, 39]])
def test_impossible_boundaries_give_nan(boundaries: list[int]) -> None:
    emu = Emulator("emulator")
    x, a = torch.randn(1, 40, 16), torch.rand(1, 40, 16)
    cu = torch.tensor(boundaries)
    common = (x, a, torch.randn(3, 16), cu, None, False, False)
    h, state = emu.raw(SCAN, "fwd")(*common, True)
    grads = emu.raw(SCAN, "bwd")(*common, h, x, None)
    assert all(t.isnan().all() for t in (h, state, *grads))
