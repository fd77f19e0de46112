"""Operators under AddressSanitizer, in a process of its own: bounds of global memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulators import missing

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from cases import OPS, Case
from impls import Emulator
from inputs import make_inputs

emu = Emulator("asan", "_emu_asan", seeds=(0,))
for op in OPS:
    for T, dims, dtype in ((75, (64, 64), "bf16"), (20, (40, 24), "f16"), (9, (24, 24), "f32")):
        x = make_inputs(Case(op, T=T, dims=dims, dtype=dtype, state="both"))
        emu.run(op, x)
        emu.step(op, {name: t[:, 0] for name, t in x.tensors.items()}, x.initial_state)
        print(op, dtype, "done")
"""


def test_no_access_outside_a_tensor() -> None:
    if why := missing("_emu_asan"):
        pytest.skip(why)
    find = [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"]
    libasan = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    # The sanitizer's allocator has to be under torch's, so it comes first.
    environment = os.environ | {"LD_PRELOAD": libasan, "ASAN_OPTIONS": "detect_leaks=0"}
    run = [sys.executable, "-c", SCRIPT, str(Path(__file__).resolve().parents[1])]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
