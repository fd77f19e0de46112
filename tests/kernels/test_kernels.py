"""The emulator's own cases: planted bugs, legal idioms, tile primitives, counters."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from emulators import BUILD


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = []
    for flavour in ("plain", "race", "asan"):
        binary = BUILD / f"kernel_tests_{flavour}"
        if not binary.is_file():
            continue
        listed = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True)
        rows += [pytest.param(binary, c, id=f"{flavour}-{c}") for c in listed.stdout.split()]
    if not rows:
        missing = pytest.mark.skip(reason=f"the emulator is not built (no kernel_tests in {BUILD})")
        rows = [pytest.param(None, None, marks=missing, id="not-built")]
    metafunc.parametrize(("binary", "case"), rows)


def test_case(binary: Path, case: str) -> None:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    run = [binary, case]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
    if case.startswith("asan_stops/") and binary.name.endswith("asan"):
        assert "heap-buffer-overflow" in done.stderr, done.stdout + done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
