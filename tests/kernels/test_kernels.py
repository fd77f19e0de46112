"""The emulator's own cases: planted bugs, legal idioms, tile primitives, counters."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulators import BUILD, checking_bounds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = []
    for flavour in ("plain", "race", "bounds"):  # bounds: the race build, checking them
        binary = BUILD / f"kernel_tests_{'plain' if flavour == 'plain' else 'race'}"
        if not binary.is_file():
            continue
        listed = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True)
        rows += [
            pytest.param(binary, c, flavour == "bounds", id=f"{flavour}-{c}")
            for c in listed.stdout.split()
        ]
    if not rows:
        missing = pytest.mark.skip(reason=f"the emulator is not built (no kernel_tests in {BUILD})")
        rows = [pytest.param(None, None, None, marks=missing, id="not-built")]
    metafunc.parametrize(("binary", "case", "bounds"), rows)


def test_case(binary: Path, case: str, bounds: bool) -> None:
    environment = checking_bounds() if bounds else None
    run = [binary, case]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("bounds are checked" in done.stdout) == bounds
