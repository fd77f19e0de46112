"""The kernels of other CPUs, which this machine would not choose, by LSM_CPU_TIER."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTS = "cpu and not emulator and (definition or gradients or any_call or step or decode)"

ATTENTION = "test_sparse_attn.py"
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="one tier on this architecture"
)


def has(instructions: str) -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and instructions in cpu.read_text().split()


def run(tier: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=os.environ | {"LSM_CPU_TIER": tier}, cwd=HERE,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("tier", ["baseline", "avx2"])
def test_operators_hold_on_older_cpus(tier: str) -> None:
    done = run(tier, *PYTEST, ".", "-k", TESTS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.skipif(not has("avx512_bf16"), reason="a CPU without dot products of bf16")
def test_attention_holds_on_dot_products() -> None:
    """Which are taken only where they are asked for, and for what tiles leave over."""
    done = run(
        "avx512_bf16", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", ATTENTION, "-k", TESTS
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_a_tier_that_is_none_is_an_error() -> None:
    call = "import torch, lsm_cuda; x = torch.ones(1, 1, 1, 1); lsm_cuda.ops.chunk_gla(x, x, x, x)"
    done = run("sse9", "-c", call)
    assert done.returncode == 1
    assert (
        "LSM_CPU_TIER must be baseline, avx2, avx512, avx512_bf16 or amx, got 'sse9'" in done.stderr
    )
