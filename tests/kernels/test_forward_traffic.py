"""What every forward of the scan engine and its kin moves, counted by the emulator, over every
tensor once: what it asks for, and what of that is memory's, behind the second-level cache.
docs/kernels/scan.md has the table; no forward moves more than 1.15 to and from memory."""

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
# Some of an H200's 132 multiprocessors and their share of its 50 MiB: with as many blocks side by
# side as have 512 threads on each.
THREADS, CACHE = 512, (50 << 20) // 132
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


def bi_wkv(dtype: torch.dtype, layout: str, T: int = 96, D: int = 256) -> Call:
    k, v = torch.randn(2, 1, T, D).to(dtype)
    r, u = torch.rand(2, D)
    return call("bi_wkv_fwd", (r, u, k, v), (), (v,))


def conv(W: int, norm: int, dtype: torch.dtype, layout: str, T: int = 512) -> Call:
    D = 128 if layout == "last" else 16
    (x,) = lay_out(layout, torch.randn(1, T, D).to(dtype))
    weight, bias = torch.randn(D, W).to(dtype), torch.randn(D).to(dtype)
    rest = (None, None, None, True, W - 1, norm)
    return call("causal_conv1d_fwd", (x, weight, bias), rest, (x, x[:, : W - 1]))


def slstm(save: bool, dtype: torch.dtype, layout: str, D: int = 64, B: int = 1) -> Call:
    x, R = torch.randn(B, 64, 4, 1, D).to(dtype), torch.randn(1, D, 4, D)
    cells = (torch.zeros(B, 64, 4, 1, D),) if save else ()
    results = (x[:, :, 0], torch.zeros(B, 4, D), *cells)
    return call("slstm_fwd", (x, R), (None, None, save, True), results)


EVERY, FP32 = tuple(DTYPES), ("fp32",)


class Row(NamedTuple):
    """Of the table: how a call is made, on how many multiprocessors, in what dtypes and layouts."""

    call: Callable[[torch.dtype, str], Call]
    multiprocessors: int = 1
    dtypes: tuple[str, ...] = EVERY
    layouts: tuple[str, ...] = ("last",)


def of_selective(
    D: int, how: str, S: int = 16, G: int = 1, T: int = 256, multiprocessors: int = 4
) -> Row:
    dtypes = FP32 if "c" in how else EVERY
    return Row(partial(selective, D, S, G, how, T=T), multiprocessors, dtypes, LAYOUTS)


WHOLE = {
    "selective scan, gate z": of_selective(2048, "z"),
    "selective scan, gate z, with gradients": of_selective(2048, "zs"),
    "selective scan": of_selective(2048, ""),
    "selective scan, 320 channels": of_selective(320, ""),
    "selective scan, 4 states": of_selective(512, "", S=4),
    "selective scan, 4 groups": of_selective(512, "", G=4),
    "selective scan, 64 states": of_selective(256, "", S=64, multiprocessors=1),
    "selective scan, 140 states": of_selective(64, "z", S=140, T=1024, multiprocessors=2),
    "selective scan, B of channels": of_selective(512, "B"),
    "selective scan, B and C of channels": of_selective(512, "BC"),
    "selective scan, complex, gate z": of_selective(1024, "cz", T=128),
    "selective scan, complex": of_selective(2048, "c"),
    "selective scan, complex, 8 states": of_selective(512, "c", S=8),
    "selective scan, T odd": of_selective(256, "z", T=257, multiprocessors=1),
    "scan": Row(partial(scan, "token")),
    "scan, fp32 gate": Row(partial(scan, "fp32 gate"), dtypes=("bf16", "fp16")),
    "scan, logarithm of the gate (HGRN, minGRU, minLSTM)": Row(partial(scan, "log")),
    "scan, complex (GateLoop)": Row(partial(scan, "complex"), dtypes=FP32),
    "scan, constant gate (LRU)": Row(partial(scan, "constant")),
    "scan, RG-LRU": Row(rg_lru),
    "WKV4, AFT-simple": Row(partial(wkv4, False)),
    "WKV4 with gradients": Row(partial(wkv4, True)),
    "Bi-WKV": Row(bi_wkv),
    "convolution, 4 taps": Row(partial(conv, 4, 0), layouts=LAYOUTS),
    "convolution, 8 taps": Row(partial(conv, 8, 0), layouts=LAYOUTS),
    "convolution, unit length": Row(partial(conv, 4, 128)),
    "convolution, T odd": Row(partial(conv, 4, 0, T=1001), layouts=LAYOUTS),
    "sLSTM": Row(partial(slstm, False), dtypes=FP32),
    "sLSTM, weights from the cache": Row(partial(slstm, False, D=128, B=4), 2, FP32),
    "sLSTM with gradients": Row(partial(slstm, True), dtypes=FP32),
}
# Too few blocks for the multiprocessors.
CUT = {
    "selective scan in segments, gate z": of_selective(256, "z", T=2048),
    "selective scan in segments": of_selective(256, "", T=2048),
    "selective scan in segments, 1024 channels": of_selective(1024, "", T=2048, multiprocessors=16),
    "selective scan in segments, complex": of_selective(64, "c", T=2048, multiprocessors=2),
    "selective scan in segments, complex, 256 channels": of_selective(256, "c", T=2048),
    "selective scan in segments, complex, 1024 channels": of_selective(
        1024, "c", T=1024, multiprocessors=16
    ),
    "selective scan in segments, 64 states": of_selective(
        32, "z", S=64, T=2048, multiprocessors=2
    ),
    "scan in segments": Row(partial(scan, "token", T=2048, D=64), 4),
    "scan in segments, logarithm of the gate": Row(partial(scan, "log", T=2048, D=64), 4),
    "scan in segments, complex": Row(partial(scan, "complex", T=2048, D=32), 4, FP32),
    "scan in segments, constant gate": Row(partial(scan, "constant", T=2048, D=64), 4),
    "scan in segments, RG-LRU": Row(partial(rg_lru, T=2048, D=64), 4),
    "WKV4 in segments": Row(partial(wkv4, False, T=2048, D=64), 4),
    "Bi-WKV in segments": Row(partial(bi_wkv, T=768, D=1024), 4),
}  # fmt: skip
ROWS = WHOLE | CUT
# What they ask for again they find in the cache, which holds only a part of the tensors.
THROUGH_THE_CACHE = {
    "selective scan, 64 states",
    "selective scan, 140 states",
    "sLSTM, weights from the cache",
    "Bi-WKV in segments",
    *(name for name in CUT if name.startswith("selective")),
}


def counted(name: str, dtype: str, layout: str) -> tuple[float, float]:
    """Bytes asked for, and those to and from memory, over the least."""
    emu, row = emulator("_emu"), ROWS[name]
    emu.set_seed(0)
    emu.set_multiprocessors(row.multiprocessors)
    run, least = row.call(DTYPES[dtype], layout)
    run()
    *_, launch = emu.counters()["launches"]
    emu.set_residents(row.multiprocessors * (THREADS // launch["block"][0]))
    emu.set_cache(row.multiprocessors * CACHE)
    emu.reset_counters()
    run()
    assert (len(emu.counters()["launches"]) > 1) == (name in CUT)
    assert least > row.multiprocessors * CACHE or name not in THROUGH_THE_CACHE
    total = emu.counters()["total"]
    emu.set_residents(1)
    emu.set_cache(None)
    found = (
        sum(total[f"{level}_{kind}_bytes"] for kind in ("read", "write")) / least
        for level in ("global", "memory")
    )
    return next(found), next(found)


COLUMNS = [(dtype, layout) for dtype in ("bf16", "fp32") for layout in LAYOUTS]


def has(name: str, dtype: str, layout: str) -> bool:
    return layout in ROWS[name].layouts and dtype in ROWS[name].dtypes


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
