"""lsm bench in small: a table and a picture, beside peers and beside the machine's limits."""

from __future__ import annotations

import types

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console
from typer.testing import CliRunner

from lsm_cuda.bench import registry
from lsm_cuda.bench.registry import Set, Shape
from lsm_cuda.cli import bench
from lsm_cuda.cli.app import app


@pytest.fixture
def small(monkeypatch):
    shapes = tuple(Shape(f"B1 T{T} H2 K16 V16 D16 S4") for T in (32, 64, 4096))
    sets = (Set("lengths", registry.WHOLE, shapes), Set("decode", ("step",), shapes[:1]))
    for engine, device in [*registry.SETS]:
        if device == "cpu":
            monkeypatch.setitem(registry.SETS, (engine, device), sets)


@pytest.fixture
def patient(monkeypatch):
    """Time is shared out, but does not run out, however busy this machine is."""
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: 0.0))


def run(tmp_path, **kwargs):
    console = Console(record=True, width=200)
    config = bench.BenchConfig(out=tmp_path / "a" / "bench.png", device="cpu", **kwargs)
    rows = bench.run_bench(config, console)
    assert (tmp_path / "a" / "bench.png").read_bytes()[:4] == b"\x89PNG"
    return rows, console.export_text()


def test_beside_peers(tmp_path, small, patient):
    rows, said = run(tmp_path, seconds=6, ops=("gla",))
    assert {r["shape"] for r in rows} == {f"B1 T{T} H2 K16 V16 D16 S4" for T in (32, 64)}
    assert "torch SDPA" in said and "×" in said and "fwd+bwd" in said and "step" in said
    assert "bench.png" in said and "not reached" not in said


def test_roofline(tmp_path, small, patient):
    ops = ("gla", "hgrn", "attn", "block_select")  # of all kinds
    rows, said = run(tmp_path, seconds=3, roofline=True, longest=64, ops=ops)
    assert {r["op"] for r in rows} == {*ops}
    assert "GB/s" in said and "GFLOP/s" in said and "compute" in said and "%" in said
    assert "torch SDPA" not in said


def test_time_is_kept(tmp_path, small):
    rows, said = run(tmp_path, seconds=0.001, ops=("gla",))
    assert {r["shape"] for r in rows} == {"B1 T32 H2 K16 V16 D16 S4"}
    assert "2 shapes were not reached" in said


def test_a_wrong_argument_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["bench", "--op", "no", "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 1 and result.stderr.startswith("error: no operator no; there are ")
    result = CliRunner().invoke(app, ["bench", "--device", "tpuu"])
    assert result.exit_code == 1 and "device must be auto, cpu or cuda" in result.stderr
