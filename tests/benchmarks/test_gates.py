"""The gates of CI hold on this tree, and close on a deliberate loss."""

from __future__ import annotations

import copy
import json
import re
from functools import partial

import pytest
import torch
from bench_scripts import ROOT, script
from cases import GLA, Case
from impls import IMPLS
from inputs import make_inputs

import lsm_cuda
from lsm_cuda.bench.registry import OPS

import counters  # isort: skip
import gate  # isort: skip


WHOLE = "gla whole bf16+f32 forward"


@pytest.fixture(scope="module")
def emu():
    if why := IMPLS["emulator"].absent():
        pytest.skip(why)
    return counters.emulator()


@pytest.fixture(scope="module")
def counted(emu):
    return counters.count(emu)


def baseline():
    return json.loads(counters.BASELINE.read_text())


def test_counters_are_as_in_the_baseline(counted):
    assert not counters.regressions(baseline(), counted)


def test_every_kernel_is_counted(counted):
    sources = "\n".join(f.read_text() for f in (ROOT / "csrc" / "kernels").rglob("*.cu*"))
    declared = r"__global__ void(?:\s+__launch_bounds__\([^()]*\))?\s+(\w+)\("
    kernels = set(re.findall(declared, sources))
    assert len(re.findall(declared, sources)) == len(re.findall(r"\b__global__\b", sources))
    launched = {launch.split()[1] for launches in counted.values() for launch in launches}
    assert kernels and kernels == launched


def test_an_extra_pass_over_memory_closes_the_gate(emu, monkeypatch):
    """A forward more than in the baseline: a pass over all of its tensors more."""
    name, multiprocessors, run = next(c for c in counters.calls() if c[0] == WHOLE)
    held = {name: baseline()[name]}

    def twice():
        run()
        run()

    for todo, closed in ((run, False), (twice, True)):
        monkeypatch.setattr(counters, "calls", lambda todo=todo: [(name, multiprocessors, todo)])
        assert bool(counters.regressions(held, counters.count(emu))) == closed


def test_more_traffic_in_a_kernel_closes_the_gate(emu, monkeypatch):
    """A quarter more tokens than in the baseline, in the same launches."""
    longer = make_inputs(
        Case(GLA, T=80, heads=(2, 2), dims=(64, 64), dtype="bf16+f32", state="both")
    )
    more = (*longer.tensors.values(), longer.initial_state, None, 1.0, True)
    run = partial(torch.ops.lsm_emu.gla_fwd, *more)
    monkeypatch.setattr(counters, "calls", lambda: [(WHOLE, 1, run)])
    found = counters.regressions({WHOLE: baseline()[WHOLE]}, counters.count(emu))
    assert any("global_read_bytes" in line for line in found)
    assert found[-1].endswith("--update")


def test_growth_within_a_tenth_is_tolerated():
    before = baseline()
    after = copy.deepcopy(before)
    (launch,) = after[WHOLE].values()
    launch["global_read_bytes"] = int(1.09 * launch["global_read_bytes"])
    assert not counters.regressions(before, after)
    launch["global_read_bytes"] = int(1.02 * launch["global_read_bytes"])
    assert len(counters.regressions(before, after)) == 2
    launch["global_read_bytes"] = 1
    launch["atomics"] = 1
    (line, _) = counters.regressions(before, after)
    assert "atomics 1, baseline 0" in line
    del after[WHOLE]
    assert "launches []" in counters.regressions(before, after)[0]


def test_ratios_are_taken_of_every_operator(monkeypatch):
    monkeypatch.setattr(gate, "TURNS", 1)
    monkeypatch.setattr(gate, "SECONDS", 0.0)
    known = json.loads(gate.BASELINE.read_text())
    every = {f"{op} {mode}" for op in OPS for mode in ("forward", "training")}
    for held in known.values():  # a processor that is not at hand lacks what came after it
        assert held and set(held) <= every
    for op in (OPS[name] for name in gate.BESIDE):
        assert gate.ratio(op, "forward") > 0 and gate.ratio(op, "training") > 0


def test_twice_the_time_closes_the_gate(monkeypatch, capsys):
    """Against the ratio just measured: an operator that does its work twice is refused after all
    tries, the operator itself is not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        now = min(gate.ratio(OPS["gla"], "forward") for _ in range(3))  # others use this machine
        assert gate.holds("gla", "forward", now)
        right = lsm_cuda.ops.chunk_gla

        def twice(**x):
            right(**x)
            return right(**x)

        monkeypatch.setattr(lsm_cuda.ops, "chunk_gla", twice)
        assert not gate.holds("gla", "forward", now)
    finally:
        torch.set_num_threads(before)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("ok") and said[1].endswith("LOST")
    assert said[1].count(",") == gate.TRIES  # between the tries, and before the baseline


def test_an_unknown_processor_is_not_compared(capsys):
    assert gate.holds("gla", "forward", None)
    assert "no baseline for" in capsys.readouterr().out


def test_counters_script(emu):
    done = script("counters")
    assert done.returncode == 0 and "as in the baseline" in done.stdout, done.stdout + done.stderr
