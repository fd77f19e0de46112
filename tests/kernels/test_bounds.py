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

import torch

lsm = torch.ops.lsm_emu_asan
for T, D, W, dtype, norm in (
    (75, 64, 4, torch.bfloat16, 32), (37, 7, 3, torch.float16, 0), (9, 24, 8, torch.float32, 4)
):
    for first in (False, True):
        x, grad = torch.randn(2, 2, T, D).to(dtype)
        if first:
            x, grad = (t.mT.contiguous().mT for t in (x, grad))
        weight, bias, state = (torch.randn(*s).to(dtype) for s in ((D, W), (D,), (2, D, W)))
        rows = (x, weight, bias, state, None, None, True)
        y, final = lsm.causal_conv1d_fwd(*rows, W, norm)
        lsm.causal_conv1d_bwd(*rows, grad, final, True, norm)
        lsm.causal_conv1d_step(x[:, :1], state, weight, bias, None, None, True)
        print("causal_conv1d", dtype, "done")
for T, D, dtype in ((9, 64, torch.bfloat16), (5, 7, torch.float32)):
    x, R = torch.randn(2, T, 4, 2, D).to(dtype), torch.randn(2, D, 4, D)
    state, transposed = torch.ones(2, 4, 2, D), R.permute(0, 2, 3, 1).contiguous()
    y, cells, final = lsm.slstm_fwd(x, R, state, None, True, True)
    lsm.slstm_bwd(x.float(), transposed, cells, state, None, y.float(), final)
    lsm.slstm_step(x[:, 0], R, state)
    print("slstm", dtype, "done")
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
