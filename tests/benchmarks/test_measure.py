"""Measuring: right before fast, in turns, with every absence named."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import time
import types

import pytest
import torch
from bench_scripts import BENCHMARKS, ROOT, script

import lsm_cuda
from lsm_cuda.bench import calls
from lsm_cuda.bench.measure import (
    OURS,
    CudaClock,
    HostClock,
    WrongResultError,
    check,
    measure,
    race,
    stretch,
)
from lsm_cuda.bench.peers import PEERS, Call, Peer, absent
from lsm_cuda.bench.registry import MODES, OPS, ROWS, Shape, cells
from lsm_cuda.bench.roofline import ceilings, floor_ms, fraction

SHAPE = Shape("B1 T40 H2 K16 V16 D24 S4")
F32 = torch.float32


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Of a millisecond: nothing here depends on how exact they are."""
    monkeypatch.setattr("lsm_cuda.bench.measure.BLOCK", 1e-3)


def rows(peer_rows=(), modes=MODES, shape=SHAPE, dtype=F32, op="gla"):
    return [*measure(OPS[op], shape, dtype, "cpu", modes, HostClock(), peer_rows, seconds=0.0)]


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_rows(name, dtype):
    sdpa = [p for p in PEERS if p.name == "torch SDPA"]
    found = rows(sdpa, OPS[name].modes, op=name, dtype=dtype)
    for mode in OPS[name].modes:
        ours, *theirs = (r for r in found if r["mode"] == mode)
        beside = ["torch SDPA"] if OPS[name].qkv else []  # none beside a scan
        assert ours["implementation"] == OURS
        assert [r["implementation"] for r in theirs] == beside
        assert ours["min"] <= ours["ms"] and ours["samples"] >= 5
        assert all(r["ratio"] == r["ms"] / ours["ms"] for r in theirs)
        assert ours["minimal_bytes"] == OPS[name].minimal_bytes(SHAPE, dtype, mode)
    json.dumps(found)


def test_packed():
    found = rows(PEERS, ("forward", "training"), Shape("B1 T40 H2 K16 V16", packed=3))
    assert {r["implementation"] for r in found if "ms" in r} == {OURS}


@pytest.mark.parametrize("what, damage", [
    ("the output", lambda o, s: (o * 1.001, s)),
    ("the gradient of v", lambda o, s: (o.detach() + 1.001 * (o - o.detach()), s)),
])  # fmt: skip
def test_wrong_results_are_not_timed(monkeypatch, what, damage):
    right = lsm_cuda.ops.chunk_gla
    monkeypatch.setattr(lsm_cuda.ops, "chunk_gla", lambda **x: damage(*right(**x)))
    with pytest.raises(WrongResultError, match=r"gla B1 T40 .* is wrong, relative error 1\.00e-03"):
        rows()
    if what == "the output":
        with pytest.raises(WrongResultError, match="the output"):
            check(OPS["gla"], SHAPE, F32, "cpu", [])


def test_a_wrong_step_is_not_timed(monkeypatch):
    right = lsm_cuda.ops.gla_step
    monkeypatch.setattr(lsm_cuda.ops, "gla_step", lambda **x: 1.01 * right(**x))
    with pytest.raises(WrongResultError, match="a step is wrong"):
        rows()


def other(function, **kwargs) -> Peer:
    """A peer made of a function here."""
    setattr(sys.modules[__name__], function.__name__, function)
    call = Call(f"{__name__}:{function.__name__}")
    return Peer("other", "torch", ("cpu",), {("gla", "sequence"): call}, **kwargs)


def test_peers_that_cannot_be_timed_are_named():
    def wrong(q, k, v, g):
        return 2 * lsm_cuda.ops.chunk_gla(q, k, v, g)[0]

    def broken(q, k, v, g):
        raise RuntimeError("unsupported K = 16\nand a stack")

    (row,) = (r for r in rows([other(wrong)], ["forward"]) if "skipped" in r)
    assert row["skipped"].startswith("not the same function: relative error 1.0e+00")
    for same in (True, False):
        (row,) = (r for r in rows([other(broken, same=same)], ["forward"]) if "skipped" in r)
        assert row["skipped"] == "RuntimeError: unsupported K = 16"
    missing = Peer("missing", "no", ("cpu",), {("gla", "sequence"): Call("no_such_package:f")})
    assert absent(missing) == "ModuleNotFoundError: No module named 'no_such_package'"
    assert absent(Peer("x", "x", ("cpu",), {("gla", "sequence"): Call("torch:no_such")})) == (
        "ImportError: torch has no no_such"
    )
    (row,) = (r for r in rows([missing], ["forward"]) if "skipped" in r)
    assert "no_such_package" in row["skipped"]


def test_peers_that_are_too_slow_are_named():
    def slow(q, k, v, g):
        time.sleep(0.02)
        return v

    found = measure(
        OPS["gla"], SHAPE, F32, "cpu", ["forward"], HostClock(), [other(slow, same=False)],
        seconds=0.0, patience=0.001,
    )  # fmt: skip
    (row,) = (r for r in found if "skipped" in r)
    assert row["skipped"].endswith("s a call")


def test_peers_of_another_device_are_left_out():
    cuda = [p for p in PEERS if "cpu" not in p.devices]
    assert cuda and {r["implementation"] for r in rows(cuda)} == {OURS}


@pytest.mark.parametrize("peer", [p for p in PEERS if "cpu" in p.devices], ids=lambda p: p.name)
def test_peers_here_run_and_agree(peer):
    """Every CPU peer that is installed: its calls, and the same values where it says so."""
    if why := absent(peer):
        assert calls.version(peer.package) is None, why
        pytest.skip(why)
    shape = Shape("B1 T64 H2 K16 V16 D24 S4")
    for name, kind in peer.calls:
        if name not in OPS:
            continue
        whole = [mode for mode in OPS[name].modes if mode != "step"]
        modes = ["step"] if kind == "step" else whole
        found = rows([peer], modes, shape, op=name)
        assert not [r for r in found if "skipped" in r]
        assert {r["implementation"] for r in found} == {OURS, peer.name}


def test_arguments_fit_the_signatures_of_peers():
    """Every function of every peer takes our arguments, where it can be inspected here."""
    inspected = 0
    for peer in PEERS:
        for (name, _), call in peer.calls.items():
            if name not in OPS:
                continue
            try:
                function = call.load()
                given = call.arguments(OPS[name], OPS[name].make(SHAPE, F32, "cpu"), SHAPE)
                signature = inspect.signature(function)
            except (ImportError, ValueError, TypeError):
                continue
            signature.bind(**given)
            inspected += 1
    assert inspected


def test_the_registry_and_peers_know_the_same_operators():
    assert {name for peer in PEERS for name, _ in peer.calls} <= {op.name for op in ROWS}
    assert len({p.name for p in PEERS}) == len(PEERS)


def test_fla_files_are_found_by_folder(tmp_path, monkeypatch):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "naive.py").write_text("def f():\n    return 7\n")
    monkeypatch.setenv("LSM_FLA_DIR", str(tmp_path))
    calls.fla_file.cache_clear()
    try:
        assert Call("ops/naive.py:f").load()() == 7
        with pytest.raises(ImportError, match=r"ops/other\.py is not in"):
            Call("ops/other.py:f").load()
    finally:
        calls.fla_file.cache_clear()


def test_what_was_checked_is_not_checked_again(monkeypatch):
    checked = {}

    def forward(op="gla", T=300):
        at = Shape(f"B1 T{T} H8 K64 V64")  # 256 tokens of it are checked
        return [
            *measure(
                OPS[op], at, F32, "cpu", ["forward"], HostClock(), (), seconds=0.0, checked=checked
            )
        ]

    forward()
    monkeypatch.setattr(lsm_cuda.ops, "chunk_gla", lambda **x: (2 * x["v"], None))
    forward(T=400)
    assert len(checked) == 1
    with pytest.raises(WrongResultError):
        forward(T=40)


def test_slow_ones_get_fewer_turns(monkeypatch):
    samplers = {"slow": lambda: 700.0, "slower": lambda: 1e5, "fast": lambda: 1.0}
    samples = race(samplers, seconds=0.0)
    assert {name: len(times) for name, times in samples.items()} == {
        "slow": 3, "slower": 3, "fast": 5
    }  # fmt: skip


def test_turns():
    order = []

    def sampler(name):
        return lambda: order.append(name) or 1.0

    samples = race({"a": sampler("a"), "b": sampler("b")}, seconds=0.0)
    assert order == ["a", "b"] * 5 and len(samples["a"]) == 5


def test_roofline():
    limits = ceilings("cpu", (F32,), seconds=0.0)
    assert limits["bytes_per_second"] > 1e8 and limits["flops_per_second"]["float32"] > 1e8
    env = {"ceilings": {"bytes_per_second": 1e9, "flops_per_second": {"float32": 1e9}}}
    row = {"dtype": "float32", "ms": 4.0, "minimal_bytes": 2e6, "minimal_flops": 1e6}
    small, large = (env | {"cache_bytes": n} for n in (10**6, 10**8))
    assert floor_ms(row, small) == (2.0, "memory") and fraction(row, small) == 0.5
    assert floor_ms(row, large) == (1.0, "compute") and fraction(row, large) == 0.25
    row["minimal_flops"] = 3e6
    assert floor_ms(row, small) == (3.0, "compute")


def test_run_writes_results(tmp_path):
    done = script("run", "--device", "cpu", "--only", "T512 ", "--seconds", 0, "--out", tmp_path,
                  "--threads", 1, "--ops", "gla")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not reached" not in done.stdout
    record = json.loads((tmp_path / "cpu" / "ops.json").read_text())
    assert {"date", "commit", "cpu", "threads", "ceilings"} <= record["environment"].keys()
    assert {r["dtype"] for r in record["rows"]} == {"float32", "bfloat16"}
    assert any("ratio" in r for r in record["rows"])
    done = script("run", "--device", "cpu", "--seconds", 0, "--minutes", 0, "--out", tmp_path)
    assert done.returncode == 0 and re.search(r"(\d+) of \1 shapes were not reached", done.stdout)
    done = script("run", "--ops", "nothing")
    assert done.returncode == 2 and "no operator nothing; there are " in done.stderr


def test_another_tree_is_served(tmp_path):
    """--compare's processes: another tree's operators, this tree's harness."""
    ignore = shutil.ignore_patterns("__pycache__", "bench")
    shutil.copytree(ROOT / "lsm_cuda", tmp_path / "lsm_cuda", ignore=ignore)
    (tmp_path / "lsm_cuda" / "ops" / "marker.py").write_text("")
    ask = {"op": "gla", "text": SHAPE.text, "packed": 0, "dtype": "float32", "mode": "forward"}
    lines = f"{json.dumps({**ask, 'seconds': 0.0})}\n" * 2
    done = script("run", "--serve", tmp_path, "--device", "cpu", input=lines)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(times) for times in answers] == [5, 5], done.stderr
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
import run
run.import_from(Path({str(tmp_path)!r}))
import lsm_cuda.ops.marker, lsm_cuda.bench.registry
print(lsm_cuda.bench.registry.__file__)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == str(ROOT / "lsm_cuda" / "bench" / "registry.py"), found.stderr


def test_first_shapes_come_first():
    import argparse

    import run  # isort: skip

    options = argparse.Namespace(device="cpu", ops=["gla", "ssd"], only="")
    found = run.cells(options)
    assert [cell["op"] for cell in found[:6]] == ["gla", "gla", "ssd", "ssd", "gla", "gla"]
    assert len(found) == 2 * sum(len(cells(OPS[op], "cpu")) for op in options.ops)


def test_modules_need_no_extra():
    """Everything but plots imports with torch alone."""
    for name in ("registry", "peers", "measure", "roofline", "results"):
        spec = importlib.util.find_spec(f"lsm_cuda.bench.{name}")
        assert "matplotlib" not in spec.loader.get_source(spec.name)


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class FakeGraph:
    """Records nothing: what is captured ran, and replays do nothing."""

    replays = 0

    def replay(self):
        FakeGraph.replays += 1


@contextlib.contextmanager
def fake(*_):
    yield


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda as far as the GPU's clock uses it, on the CPU: finds slips, proves no timing."""

    class Stream:
        def wait_stream(self, other):
            pass

    properties = types.SimpleNamespace(L2_cache_size=4096)
    fakes = {
        "Event": FakeEvent, "CUDAGraph": FakeGraph, "Stream": Stream, "graph": fake, "stream": fake,
        "synchronize": lambda: None, "current_stream": Stream, "memory_allocated": lambda: 5,
        "max_memory_allocated": lambda: 12, "reset_peak_memory_stats": lambda: None,
        "get_device_properties": lambda: properties,
    }  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))


def test_the_clock_of_a_gpu(fake_cuda):
    clock = CudaClock()
    assert clock.input_sets(100) == 8 and clock.input_sets(3000) == 3
    assert clock.input_sets(10**6) == 1
    order = []
    sample = clock.sampler("eager", [lambda: order.append(0), lambda: order.append(1)])
    assert sample() >= 0 and sample() >= 0
    assert order == [0, 1, 0, 1, 0]  # warm-ups, one sample thrown away, two samples
    FakeGraph.replays = 0
    assert clock.sampler("graph", [lambda: order.append(2)])() >= 0
    assert order.count(2) == 4 and FakeGraph.replays == 2  # 1 + 2 warm-ups, 1 capture
    assert clock.peak_bytes(lambda: None) == 7
    assert clock.once(lambda: time.sleep(0.01)) >= 0.01


def test_rows_of_a_gpu(fake_cuda):
    """Eager and graph rows, with memory; what cannot be captured is named."""
    sdpa = [p for p in PEERS if p.name == "torch SDPA"]
    found = [*measure(OPS["gla"], SHAPE, F32, "cpu", MODES, CudaClock(), sdpa, seconds=0.0)]
    assert [r["timing"] for r in found] == ["eager", "eager", "graph", "graph"] * 3
    assert all(r["peak_bytes"] == 7 for r in found)

    class NoGraphs(CudaClock):
        def sampler(self, kind, runs):
            if kind == "graph" and len(runs) == 1:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            return super().sampler(kind, runs)

    clock = NoGraphs()
    clock.input_sets = lambda nbytes: 1
    found = [*measure(OPS["gla"], SHAPE, F32, "cpu", ["forward"], clock, sdpa, seconds=0.0)]
    assert [r["timing"] for r in found if "ms" in r] == ["eager", "eager"]
    assert {r["skipped"] for r in found if "skipped" in r} == {
        "graph: operation not permitted when stream is capturing"
    }


def test_the_stretch_that_is_checked_stays_small():
    """Long or wide shapes are cut in time until the fp64 recurrence is quick."""
    gla = OPS["gla"]
    assert stretch(gla, Shape("B1 T32768 H32 K128 V128"), "cuda")["T"] == 256
    assert stretch(gla, Shape("B64 T4096 H32 K128 V128"), "cuda")["T"] == 4
    assert stretch(gla, Shape("B1 T8192 H8 K64 V64"), "cpu")["T"] == 256
    assert stretch(gla, Shape("B1 T32768 H32 K128 V128", packed=16), "cuda")["T"] == 256
    assert stretch(gla, SHAPE, "cpu") == SHAPE
