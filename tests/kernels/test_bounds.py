"""Operators under AddressSanitizer, in a process of its own: bounds of global memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from emulators import BUILD

SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import _emu_asan
ops = torch.ops.lsm_emu_asan
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
for T, K, V, dtype in ((75, 64, 64, bf16), (20, 40, 24, fp16), (9, 24, 24, fp32)):
    q, k = (torch.randn(1, T, 1, K).to(dtype) for _ in range(2))
    v = torch.randn(1, T, 1, V).to(dtype)
    g = -torch.rand(1, T, 1, K)
    h0 = torch.randn(1, 1, K, V)
    o, state = ops.gla_fwd(q, k, v, g, h0, None, 0.125, True)
    ops.gla_bwd(q, k, v, g, h0, None, 0.125, o, state)
    ops.gla_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], h0, 0.125)
"""


def test_no_access_outside_a_tensor() -> None:
    if not (BUILD / "_emu_asan.so").is_file():
        pytest.skip("the emulator is built without LSM_EMULATOR_ASAN")
    find = [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"]
    libasan = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    # The sanitizer's allocator has to be under torch's, so it comes first.
    environment = os.environ | {"LD_PRELOAD": libasan, "ASAN_OPTIONS": "detect_leaks=0"}
    run = [sys.executable, "-c", SCRIPT, str(BUILD)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
