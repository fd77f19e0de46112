"""Documents carry no number without a results file; the registry counts what it says it counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from registry import OPS, SHAPES, Shape  # noqa: E402


def test_performance_page_is_generated_from_the_results():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "report.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_minimal_bytes_of_gla():
    """bf16 activations, fp32 gate, at K = V = 64: one tensor is X, the gate 2 X."""
    shape = Shape(2, 100, 3, 64, 64)
    X = 2 * 100 * 3 * 64 * 2
    assert OPS["gla"].minimal_bytes(shape, 2, 4, "forward") == 6 * X  # q k v o, g
    assert OPS["gla"].minimal_bytes(shape, 2, 4, "backward") == 11 * X  # twice q k, v dO dv, g dg
    state = 2 * 3 * 64 * 64 * 4
    assert OPS["gla"].minimal_bytes(shape, 2, 4, "step") == 2 * state + 6 * X // 100


def test_every_op_has_shapes_and_peers():
    for op in OPS.values():
        assert op.peers
    assert set(SHAPES) == {"cpu", "cuda"}
