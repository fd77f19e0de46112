"""The GPU suite end to end on the emulator, and what it does about crashes, hangs and kills."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from bench_scripts import BENCHMARKS, script
from cases import OPS as TESTED
from checks import assert_same_bits

from lsm_cuda.bench import registry
from lsm_cuda.bench.measure import environment

import gpu_suite  # isort: skip
import pack  # isort: skip
from gpu_suite import Item, Worker  # isort: skip


@pytest.fixture(scope="module", autouse=True)
def emulator():
    impls = importlib.import_module("impls")
    if why := impls.IMPLS["emulator"].absent():
        pytest.skip(why)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[dict, str]:
    out = tmp_path_factory.mktemp("suite")
    done = script("gpu_suite", "--dry-run", "--minutes", 10, "--cases", 3, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "emulator" / "ops.json").read_text()), done.stdout


def test_a_dry_run_reaches_everything(dry_run):
    record, said = dry_run
    assert "0 of" in said and "its times mean nothing" in said
    assert not [item["name"] for item in record["items"] if item["status"] != "ok"]
    names = [item["name"] for item in record["items"]]
    for op in TESTED:
        kinds = ["graph", "stream", "guard", "memory", "long", "correct"]
        kinds += ["time"] if op.name in registry.OPS else []
        assert all(any(n.startswith(f"{kind} {op}") for n in names) for kind in kinds)
    for op in registry.OPS:
        kinds = ["correct", "graph", "stream", "guard", "time"]
        assert all(any(n.startswith(f"{kind} {op}") for n in names) for kind in kinds)
    assert {"environment", "sanitizers", "sanitizers, other operators", "tests"} <= set(names)
    assert {r["mode"] for r in record["rows"]} == {"forward", "training", "step"}
    assert any("ratio" in r for r in record["rows"])


def test_its_times_are_marked(dry_run):
    record, _ = dry_run
    assert record["environment"]["emulated"] is True


def test_each_case_is_in_one_item():
    """A fifth first and the other fifths later are the whole table."""
    import argparse

    options = argparse.Namespace(ops=None, only="correct", cases=None, dry_run=True)
    for op in TESTED:
        found = [i for i in gpu_suite.items(options, {"skipped": {}}) if i.function == "correct"]
        parts = sorted(i.arguments[1] for i in found if i.arguments[0] == op.name)
        assert parts == [0, 1, 2, 3, 4] and {i.arguments[2] for i in found} == {5}


def test_expected_values_from_other_processes(monkeypatch):
    """What helpers compute ahead is what this process would."""
    import gpu_checks

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    gpu_checks.helpers.cache_clear()
    places = [("gla", "emulator", i) for i in range(8, 12)]
    try:
        assert gpu_checks.helpers() is not None
        for place, (x, truth, same) in zip(places, gpu_checks.truths(places), strict=True):
            own = gpu_checks.expected(place)
            assert_same_bits(x.tensors, own[0].tensors)
            assert_same_bits(truth, own[1])
            assert_same_bits(same, own[2])
    finally:
        gpu_checks.helpers().shutdown()
        gpu_checks.helpers.cache_clear()


def test_wrong_results_fail_their_item(monkeypatch):
    import gpu_checks

    device = gpu_checks.StandIn.__new__(gpu_checks.StandIn)
    impl = gpu_checks.impls.IMPLS["emulator"]
    right = type(impl).run
    monkeypatch.setattr(
        type(impl), "run", lambda self, op, x: {n: 1.1 * t for n, t in right(self, op, x).items()}
    )
    record = gpu_checks.correct(device, "gla", 0, 5, 20)
    assert not record["ok"] and record["failed"]


@pytest.mark.parametrize("broken", ["racecheck", "unsupported"])
def test_sanitizers_run_side_by_side(tmp_path, monkeypatch, broken):
    """With a stand-in for compute-sanitizer that runs what it is given, or objects."""
    import gpu_checks

    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"""#!/bin/sh
test "$1 $3 $4" = "--tool --error-exitcode 9" || exit 8
test "{broken}" = unsupported && echo "Error: Device not supported." && exit 1
test "$2" = "{broken}" && echo "ERROR SUMMARY: 1 error" && exit 9
shift 4
exec "$@"
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    device = gpu_checks.StandIn.__new__(gpu_checks.StandIn)
    monkeypatch.setattr(
        gpu_checks.StandIn, "sanitizers", lambda self: gpu_checks.Gpu.sanitizers(self)
    )
    record = gpu_checks.sanitize(device, ["gla"], 1, 120.0)
    assert record["ok"] == (broken != "racecheck"), record
    for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
        if broken == "unsupported":
            assert record[name] == "skipped: Device not supported"
        else:
            assert ("ERROR SUMMARY" if name == broken else "probed") in record[name]


def test_a_sanitizer_that_hangs_is_stopped(tmp_path, monkeypatch):
    import gpu_checks

    device = gpu_checks.StandIn.__new__(gpu_checks.StandIn)
    monkeypatch.setattr(
        gpu_checks.StandIn, "sanitizers", lambda self: {"memcheck": ["sh", "-c", "sleep 60"]}
    )
    record = gpu_checks.sanitize(device, ["gla"], 1, 0.2)
    assert not record["ok"] and record["memcheck"].startswith("not finished after 0 s")


def test_without_a_sanitizer_it_is_skipped(monkeypatch):
    import gpu_checks

    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(gpu_checks.Skip, match="compute-sanitizer is not installed"):
        gpu_checks.Gpu.sanitizers(None)


# --- the worker; the items below are this module's functions


def double(device, x):
    return {"twice": 2 * x}


def fail(device):
    raise ValueError("no such luck")


def skip(device):
    import gpu_checks

    raise gpu_checks.Skip("not here")


def die(device):
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(device):
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["LSM_TEST_CHILD"]).write_text(str(child.pid))
    time.sleep(600)


@pytest.fixture
def worker():
    made = Worker(dry_run=True, module=__name__)
    yield made
    made.close()


def test_items_and_their_failures(worker):
    assert worker.do(Item("a", "double", (21,)), 60)["result"] == {"twice": 42}
    pid = worker.process.pid
    failed = worker.do(Item("b", "fail"), 60)
    assert failed["status"] == "failed" and "ValueError: no such luck" in failed["error"]
    assert worker.do(Item("c", "skip"), 60)["status"] == "skipped"
    assert worker.process.pid == pid


def test_a_crash_costs_one_item(worker):
    entry = worker.do(Item("a", "die"), 60)
    assert entry["status"] == "crashed" and entry["error"] == "the process ended: -11"
    assert worker.do(Item("b", "double", (1,)), 60)["status"] == "ok"


def test_a_hang_costs_one_item_and_leaves_nothing(worker, tmp_path, monkeypatch):
    monkeypatch.setenv("LSM_TEST_CHILD", str(tmp_path / "child"))
    worker.do(Item("a", "double", (1,)), 60)  # the process is up
    entry = worker.do(Item("b", "hang"), 3)
    assert entry["status"] == "killed" and "not finished after 3 s" in entry["error"]
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/cmdline").is_file() and time.monotonic() < deadline:
        if not Path(f"/proc/{child}/cmdline").read_bytes():  # a zombie
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()
    assert worker.do(Item("c", "double", (1,)), 60)["status"] == "ok"


def test_a_kill_keeps_what_was_done(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_suite.py", "--dry-run", "--cases", "2"]
    process = subprocess.Popen([*map(str, command), "--out", tmp_path], stdout=subprocess.PIPE)
    file = tmp_path / "emulator" / "ops.json"
    try:
        deadline = time.monotonic() + 120
        seen = 0
        while seen < 3 and time.monotonic() < deadline:
            seen = len(json.loads(file.read_text())["items"]) if file.is_file() else 0
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert seen >= 3 and len(json.loads(file.read_text())["items"]) >= seen


def test_the_budget_is_kept(tmp_path):
    begun = time.monotonic()
    script("gpu_suite", "--dry-run", "--minutes", 0.3, "--out", tmp_path)
    (file,) = tmp_path.glob("*/ops.json")
    assert time.monotonic() - begun < 0.3 * 60 + 10
    assert json.loads(file.read_text())["items"][-1]["name"] != "tests"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_it_says_so(tmp_path):
    done = script("gpu_suite", "--minutes", 1, "--out", tmp_path)
    assert done.returncode == 1 and "no CUDA device" in done.stdout


# --- the folder that travels


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "lsm_cuda"
    folder.mkdir()
    for name in pack.LIBRARIES:
        (folder / name).write_bytes(b"x" * 1000)
    return folder


def test_pack(tmp_path, package, monkeypatch):
    total, left_out = pack.pack(tmp_path / "out", [], package)
    assert 3000 < total < 3100 and not left_out  # and the commit
    monkeypatch.setattr(pack, "LIMIT", 2500)
    with pytest.raises(ValueError, match=r"more than 0; the largest file is \w+"):
        pack.pack(tmp_path / "out", [], package)
    (package / "_C_cuda.so").unlink()
    with pytest.raises(FileNotFoundError, match=r"_C_cuda\.so not in .*: build with nvcc"):
        pack.pack(tmp_path / "out", [], package)


def test_wheels_that_do_not_fit_are_left_out(tmp_path, package, monkeypatch):
    sizes = {"small": 100, "large": 5000, "larger": 9000}

    def download(command, **kwargs):
        if "pip" in command:
            for name, size in sizes.items():
                (tmp_path / "out" / "wheels" / f"{name}.whl").write_bytes(b"x" * size)
        return subprocess.CompletedProcess(command, 0, stdout="abc")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(pack, "LIMIT", 8200)
    total, left_out = pack.pack(tmp_path / "out", ["some"], package)
    assert total == 8103 and left_out == ["larger.whl"]
    assert {f.stem for f in (tmp_path / "out" / "wheels").iterdir()} == {"small", "large"}


def test_unpack(tmp_path, package, monkeypatch):
    """Libraries land in the tree; a peer's wheel can be imported, here and in other processes; the
    program of rates can be run, though it came without its mode."""
    program = tmp_path / "micro"
    program.write_text("""#!/bin/sh\necho '{"name": "mma", "value": 8}'\n""")
    pack.pack(tmp_path / "pack", [], package, program)
    with zipfile.ZipFile(tmp_path / "pack" / "wheels" / "peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_peer.py", "x = 5\n")
    tree = tmp_path / "tree"
    (tree / "lsm_cuda").mkdir(parents=True)
    monkeypatch.setattr(gpu_suite, "ROOT", tree)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("LSM_COMMIT", "")
    monkeypatch.setenv("LSM_MICRO", "")
    gpu_suite.unpack(tmp_path / "pack")
    assert (tree / "lsm_cuda" / "_C_cuda.so").read_bytes() == b"x" * 1000
    done = subprocess.run([sys.executable, "-c", "import some_peer; print(some_peer.x)"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "5\n"
    gpu_checks = importlib.import_module("gpu_checks")
    assert gpu_checks.rates(None)["rates"] == [{"name": "mma", "value": 8}]
    assert os.environ["LSM_COMMIT"] == (tmp_path / "pack" / "commit").read_text().strip()
    assert environment("cpu")["commit"] == os.environ["LSM_COMMIT"]
