"""Loads an emulator module, and small inputs for the operators on it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("LSM_EMU_DIR", ROOT / "build" / "emulator"))


def load(name: str) -> ModuleType:
    """``_emu``, ``_emu_race`` or ``_emu_asan``, or skip the test."""
    if not (BUILD / f"{name}.so").is_file():
        pytest.skip(f"the emulator is not built (no {name}.so in {BUILD})")
    sys.path.insert(0, str(BUILD))
    try:
        return importlib.import_module(name)
    finally:
        del sys.path[0]


def gla_inputs(B: int, T: int, H: int, K: int, V: int, gate=torch.float32) -> list[torch.Tensor]:
    """q, k, v, g of gla_fwd."""
    torch.manual_seed(T + K)
    q, k, v = (torch.randn(B, T, H, d).bfloat16() for d in (K, K, V))
    return [q, k, v, torch.nn.functional.logsigmoid(torch.randn(B, T, H, K)).to(gate)]


def run_gla(ops, B: int, T: int, H: int, K: int, V: int, lengths: list[int] | None = None) -> None:
    """Forward, backward and one step; the values are other tests' business."""
    q, k, v, g = gla_inputs(B, T, H, K, V)
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    N = B if cu is None else len(cu) - 1
    h0 = torch.randn(N, H, K, V)
    o, state = ops.gla_fwd(q, k, v, g, h0, cu, K**-0.5, True)
    ops.gla_bwd(q, k, v, g, h0, cu, K**-0.5, torch.randn_like(o), torch.randn_like(state))
    ops.gla_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], h0[:B].contiguous(), K**-0.5)
