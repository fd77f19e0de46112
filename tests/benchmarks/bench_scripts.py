"""The scripts in benchmarks/, importable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def script(name: str, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / f"{name}.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **kwargs)
