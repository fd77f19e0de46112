"""The sparse attention benchmark runs, and counts what it says it counts."""

from __future__ import annotations

import json

import pytest
from bench_scripts import script


def test_it_runs(tmp_path):
    out = tmp_path / "rows.json"
    patterns = ["causal", "10 % of blocks", "16 blocks per token, shared by 4"]
    cached = ["cache", "cache, window 1024", "cache, 10 % of blocks"]
    done = script(
        "sparse", "--shape", "B1 T256 H4 HKV2 K16", "--seconds", 0.01, "--out", out,
        "--patterns", *patterns, *cached,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {r["pattern"] for r in rows} == {*patterns, *cached} and len(rows) == 6 + 3
    assert rows[6]["minimal_bytes"] == 2 * 256 * 2 * 16 * 4
    causal = 256 * 257 / 2 * 4 * 4 * 16
    assert rows[0]["minimal_flops"] == pytest.approx(causal)
    assert rows[1]["minimal_flops"] == pytest.approx(causal * 14 / 4)
    assert script("sparse", "--patterns", "spiral").returncode == 2
