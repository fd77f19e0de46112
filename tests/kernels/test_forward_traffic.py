"""What every forward of the scan engine and its kin moves, counted by the emulator, over every
tensor once: what it asks for, and what of that passes the second-level cache. docs/kernels/scan.md
has the table; nothing from memory is above 1.15."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulators import emulator
from torch import Tensor

MOST = 1.15
# An H200's 50 MiB over the threads that run at once, 512 on each of its 132 multiprocessors: what a
# block may count on for what it reads again.
CACHE_OF_A_THREAD = (50 << 20) // (132 * 512)
# Blocks that share B and C run at once; the emulator runs one after another, a whole block apart.
CACHE_OF_BLOCKS = 512 << 10
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("last", "first")  # channels
DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "scan.md"


class Call(NamedTuple):
    run: Callable[[], object]
    least: int  # bytes of every tensor once


def call(op: str, given: tuple, rest: tuple, results: tuple[Tensor, ...]) -> Call:
    """``results`` are like what comes out."""
    run = partial(getattr(torch.ops.lsm_emu, op), *given, *rest)
    tensors = [t for t in (*given, *results) if t is not None]
    return Call(run, sum(t.numel() * t.element_size() for t in tensors))


def lay_out(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    if layout == "last":
        return tensors
    return tuple(t.movedim(1, -1).contiguous().movedim(-1, 1) for t in tensors)


def selective(
    D: int, S: int, G: int, how: str, dtype: torch.dtype, layout: str, T: int = 256
) -> Call:
    """``how``: "z", "c"omplex A, "s"aved states; "B", "C": those are channels'."""
    is_complex = "c" in how
    wide = torch.complex64 if is_complex else torch.float32
    u, dt, z = torch.randn(3, 1, T, D).to(dtype)
    B, C = torch.randn(2, 1, T, G, S, dtype=wide).to(wide if is_complex else dtype)
    A, skip, bias = -torch.rand(D, S).to(wide), torch.randn(D), torch.randn(D)
    u, dt, z, B, C = lay_out(layout, u, dt, z, B, C)
    B = A.clone() if "B" in how else B
    C = A.clone() if "C" in how else C
    given = (u, dt, A, B, C, skip, z if "z" in how else None, bias)
    rest = (None, None, None, True, "s" in how, True)
    saved = [torch.empty(T // 32, D, S)] if "s" in how else []
    return call("selective_scan_fwd", given, rest, (u, A, *saved))


def scan(gate: str, dtype: torch.dtype, layout: str, T: int = 256, D: int = 256) -> Call:
    x = torch.randn(1, T, D).to(torch.complex64 if gate == "complex" else dtype)
    a = torch.rand(D).to(x.dtype if x.is_complex() else torch.float32)
    if gate != "constant":
        a = torch.rand(x.shape).to(torch.float32 if gate == "fp32 gate" else x.dtype)
    state = torch.zeros(D).to(torch.promote_types(x.dtype, torch.float32))
    return call("scan_fwd", (x, a), (None, None, None, gate == "log", False, True), (x, state))


def rg_lru(dtype: torch.dtype, layout: str, T: int = 256, D: int = 256) -> Call:
    x, i, r = torch.randn(3, 1, T, D).to(dtype)
    c = -torch.rand(D)
    return call("rg_lru_fwd", (x, i, r, c), (None, None, None, False, True), (x, c))


def wkv4(save: bool, dtype: torch.dtype, layout: str, T: int = 256, D: int = 256) -> Call:
    k, v = torch.randn(2, 1, T, D).to(dtype)
    r, u = torch.rand(2, D)
    results = (v, *(r,) * 3) + ((torch.zeros(8, 3, 256),) if save else ())
    return call("wkv4_fwd", (r, u, k, v), (*(None,) * 4, save, True), results)


def conv(W: int, norm: int, dtype: torch.dtype, layout: str, T: int = 512) -> Call:
    D = 128 if layout == "last" else 16
    (x,) = lay_out(layout, torch.randn(1, T, D).to(dtype))
    weight, bias = torch.randn(D, W).to(dtype), torch.randn(D).to(dtype)
    rest = (None, None, None, True, W - 1, norm)
    return call("causal_conv1d_fwd", (x, weight, bias), rest, (x, x[:, : W - 1]))


def slstm(save: bool, dtype: torch.dtype, layout: str, D: int = 64) -> Call:
    x, R = torch.randn(1, 64, 4, 1, D).to(dtype), torch.randn(1, D, 4, D)
    cells = (torch.zeros(1, 64, 4, 1, D),) if save else ()
    results = (x[:, :, 0], torch.zeros(4, D), *cells)
    return call("slstm_fwd", (x, R), (None, None, save, True), results)


EVERY = tuple(DTYPES)
# Row of the table: how a call is made, of which layouts and dtypes.
FORWARDS: dict[str, tuple[Callable[[torch.dtype, str], Call], tuple[str, ...], tuple[str, ...]]] = {
    "selective scan, gate z": (partial(selective, 2048, 16, 1, "z"), LAYOUTS, EVERY),
    "selective scan, gate z, with gradients": (
        partial(selective, 2048, 16, 1, "zs"), LAYOUTS, EVERY,
    ),
    "selective scan": (partial(selective, 2048, 16, 1, ""), LAYOUTS, EVERY),
    "selective scan, 320 channels": (partial(selective, 320, 16, 1, ""), LAYOUTS, EVERY),
    "selective scan, 4 states": (partial(selective, 512, 4, 1, ""), LAYOUTS, EVERY),
    "selective scan, 4 groups": (partial(selective, 512, 16, 4, ""), LAYOUTS, EVERY),
    "selective scan, 64 states": (partial(selective, 256, 64, 1, ""), LAYOUTS, EVERY),
    "selective scan, 140 states": (partial(selective, 64, 140, 1, "z"), LAYOUTS, EVERY),
    "selective scan, B of channels": (partial(selective, 512, 16, 1, "B"), LAYOUTS, EVERY),
    "selective scan, B and C of channels": (
        partial(selective, 512, 16, 1, "BC"), LAYOUTS, EVERY,
    ),
    "selective scan, complex, gate z": (
        partial(selective, 1024, 16, 1, "cz", T=128), LAYOUTS, ("fp32",),
    ),
    "selective scan, complex": (partial(selective, 2048, 16, 1, "c"), LAYOUTS, ("fp32",)),
    "selective scan, complex, 8 states": (
        partial(selective, 512, 8, 1, "c"), LAYOUTS, ("fp32",),
    ),
    "selective scan, T odd": (partial(selective, 256, 16, 1, "z", T=257), LAYOUTS, EVERY),
    "scan": (partial(scan, "token"), ("last",), EVERY),
    "scan, fp32 gate": (partial(scan, "fp32 gate"), ("last",), ("bf16", "fp16")),
    "scan, logarithm of the gate (HGRN, minGRU, minLSTM)": (
        partial(scan, "log"), ("last",), EVERY,
    ),
    "scan, complex (GateLoop)": (partial(scan, "complex"), ("last",), ("fp32",)),
    "scan, constant gate (LRU)": (partial(scan, "constant"), ("last",), EVERY),
    "scan, RG-LRU": (rg_lru, ("last",), EVERY),
    "WKV4, AFT-simple": (partial(wkv4, False), ("last",), EVERY),
    "WKV4 with gradients": (partial(wkv4, True), ("last",), EVERY),
    "convolution, 4 taps": (partial(conv, 4, 0), LAYOUTS, EVERY),
    "convolution, 8 taps": (partial(conv, 8, 0), LAYOUTS, EVERY),
    "convolution, unit length": (partial(conv, 4, 128), ("last",), EVERY),
    "convolution, T odd": (partial(conv, 4, 0, T=1001), LAYOUTS, EVERY),
    "sLSTM": (partial(slstm, False), ("last",), ("fp32",)),
    "sLSTM, weights from the cache": (partial(slstm, False, D=128), ("last",), ("fp32",)),
    "sLSTM with gradients": (partial(slstm, True), ("last",), ("fp32",)),
}  # fmt: skip


# Few rows on many multiprocessors.
CUT = {
    "selective scan in segments, gate z": (
        partial(selective, 256, 16, 1, "z", T=1024), LAYOUTS, EVERY,
    ),
    "selective scan in segments": (partial(selective, 256, 16, 1, "", T=1024), LAYOUTS, EVERY),
    "selective scan in segments, complex": (
        partial(selective, 64, 16, 1, "c", T=1024), LAYOUTS, ("fp32",),
    ),
    "selective scan in segments, 64 states": (
        partial(selective, 32, 64, 1, "z", T=1024), LAYOUTS, EVERY,
    ),
    "scan in segments": (partial(scan, "token", T=2048, D=64), ("last",), EVERY),
    "scan in segments, logarithm of the gate": (
        partial(scan, "log", T=2048, D=64), ("last",), EVERY,
    ),
    "scan in segments, complex": (partial(scan, "complex", T=2048, D=32), ("last",), ("fp32",)),
    "scan in segments, constant gate": (
        partial(scan, "constant", T=2048, D=64), ("last",), EVERY,
    ),
    "scan in segments, RG-LRU": (partial(rg_lru, T=2048, D=64), ("last",), EVERY),
    "WKV4 in segments": (partial(wkv4, False, T=2048, D=64), ("last",), EVERY),
}  # fmt: skip
ROWS = FORWARDS | CUT
# What they ask for again, they find in the cache.
THROUGH_THE_CACHE = {
    "selective scan, 64 states",
    "selective scan, 140 states",
    "sLSTM, weights from the cache",
    *(name for name in CUT if name.startswith("selective")),
}


def counted(name: str, dtype: str, layout: str) -> tuple[float, float]:
    """Bytes asked for, and those to and from memory, over the least."""
    emu = emulator("_emu")
    emu.set_seed(0)
    emu.set_multiprocessors(64 if name in CUT else 1)
    make, *_ = ROWS[name]
    run, least = make(DTYPES[dtype], layout)
    cache = CACHE_OF_BLOCKS
    if name in CUT:
        run()
        *_, launch = emu.counters()["launches"]
        cache = CACHE_OF_A_THREAD * launch["block"][0]
    emu.set_cache(cache)
    emu.reset_counters()
    run()
    assert (len(emu.counters()["launches"]) > 1) == (name in CUT)
    total = emu.counters()["total"]
    emu.set_cache(None)
    found = (
        sum(total[f"{level}_{kind}_bytes"] for kind in ("read", "write")) / least
        for level in ("global", "memory")
    )
    return next(found), next(found)


COLUMNS = [(dtype, layout) for dtype in ("bf16", "fp32") for layout in LAYOUTS]


def has(name: str, dtype: str, layout: str) -> bool:
    _, layouts, dtypes = ROWS[name]
    return layout in layouts and dtype in dtypes


def row(name: str) -> str:
    """Of the table."""
    cells = ["{:.3f} {:.3f}".format(*counted(name, *c)) if has(name, *c) else "" for c in COLUMNS]
    return f"| {name} | {' | '.join(cells)} |"


@pytest.mark.parametrize("name", ROWS)
def test_forwards_move_every_tensor_once(name: str) -> None:
    text = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", DOCUMENTED.read_text(), re.MULTILINE)
    assert text, f"no row for {name}: {row(name)}"
    documented = dict(zip(COLUMNS, (cell.split() for cell in text[1].split("|")), strict=True))
    for dtype in DTYPES:
        for layout in LAYOUTS:
            if not has(name, dtype, layout):
                continue
            asked, memory = counted(name, dtype, layout)
            assert memory <= MOST
            assert asked <= MOST or name in THROUGH_THE_CACHE
            column = ("bf16" if dtype == "fp16" else dtype, layout)
            expected = [float(x) for x in documented[column]]
            assert [asked, memory] == pytest.approx(expected, abs=0.002), column


if __name__ == "__main__":
    print("\n".join(map(row, ROWS)))
