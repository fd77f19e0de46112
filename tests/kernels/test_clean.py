"""Operators in the race build, and once under AddressSanitizer: shapes that take every path, no report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated import BUILD, load, run_gla

CONFIGURATIONS = {
    "one-chunk": {"B": 1, "T": 64, "H": 1, "K": 64, "V": 64},
    "shorter-than-a-chunk": {"B": 2, "T": 3, "H": 1, "K": 64, "V": 64},
    "ragged": {"B": 1, "T": 107, "H": 2, "K": 64, "V": 128},
    "wide": {"B": 1, "T": 70, "H": 1, "K": 128, "V": 64},
    "odd-sizes": {"B": 1, "T": 40, "H": 1, "K": 40, "V": 24},
    "varlen": {"B": 1, "T": 90, "H": 1, "K": 64, "V": 64, "lengths": [1, 33, 56]},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_race(name: str, seed: int) -> None:
    module = load("_emu_race")
    module.set_seed(seed)
    module.set_multiprocessors(2 + 30 * (seed % 2))  # few: no segments; many: sequences are cut
    try:
        run_gla(torch.ops.lsm_emu_race, **CONFIGURATIONS[name])
    finally:
        module.set_multiprocessors(8)
        module.set_seed(0)


def test_bounds_of_global_memory() -> None:
    """In a process of its own, with the sanitizer's allocator under torch's."""
    if not (BUILD / "_emu_asan.so").is_file():
        pytest.skip("the emulator is built without LSM_EMULATOR_ASAN")
    compiler = os.environ.get("CXX", "g++")
    find = [compiler, "-print-file-name=libasan.so"]
    libasan = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    script = (
        "import torch; from emulated import load, run_gla; load('_emu_asan')\n"
        "run_gla(torch.ops.lsm_emu_asan, B=1, T=75, H=1, K=64, V=64)\n"
        "run_gla(torch.ops.lsm_emu_asan, B=1, T=20, H=2, K=40, V=24)\n"
    )
    environment = os.environ | {"LD_PRELOAD": libasan, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
