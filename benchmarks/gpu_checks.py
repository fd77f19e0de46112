"""What gpu_suite.py runs: each function is one item and returns what to record.

The device is a GPU or its stand-in, the emulator, with one interface; nothing below it knows which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import cases as table  # noqa: E402
import checks  # noqa: E402
import impls  # noqa: E402
import torch  # noqa: E402
from emulated import emulator, stand_in  # noqa: E402
from inputs import Inputs, make_inputs  # noqa: E402

import lsm_cuda  # noqa: E402
from lsm_cuda import ops  # noqa: E402
from lsm_cuda.bench import measure, peers, registry, roofline  # noqa: E402

Record = dict[str, Any]
Case = table.Case
TEST_OPS = {op.name: op for op in table.OPS}
ROWS = {name: row for name, row in registry.OPS.items() if name not in TEST_OPS}  # of the rest
PACKED = {"T": 40, "cu_seqlens": [0, 0, 9, 9, 27, 40]}
try:
    import families

    FAMILIES = {str(row): row for row in families.FAMILIES}
except ModuleNotFoundError:  # a tree with engines alone
    FAMILIES = {}


class Skip(Exception):
    """Not possible here; the text says why."""


class Gpu:
    """The current GPU."""

    name, cases = "cuda", "cuda"
    long = 8192  # tokens of the long check
    tests = ("tests/ops", "tests/layers", "-k", "cuda or gpu")

    def __init__(self) -> None:
        if absent := impls.IMPLS["cuda"].absent():
            raise Skip(absent)
        self.clock = measure.CudaClock()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return measure.captured(run)

    @contextlib.contextmanager
    def late_stream(self) -> Iterator[None]:
        """A stream of its own that is busy for a while first."""
        self.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)
            yield
            torch.cuda.current_stream().synchronize()

    def architecture(self) -> int:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor

    def choose_architecture(self, number: int) -> None:
        os.environ["LSM_ARCHITECTURE"] = str(number)

    def other(self) -> str:
        if torch.cuda.device_count() < 2:
            raise Skip("one GPU")
        return "cuda:1"

    def sanitizers(self) -> dict[str, list[str]]:
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(found).is_file():
            raise Skip("compute-sanitizer is not installed")
        tools = ("memcheck", "racecheck", "synccheck", "initcheck")
        return {tool: [found, "--tool", tool, "--error-exitcode", "9"] for tool in tools}


class StandIn:
    """The emulator, which takes the place of the CPU kernels behind torch.ops.lsm."""

    name, cases = "cpu", "emulator"
    long = 100
    tests = ("tests/ops/test_errors.py", "-k", "emulator and boundaries")

    def __init__(self) -> None:
        if absent := impls.IMPLS["emulator"].absent():
            raise Skip(absent)
        self.clock = measure.HostClock()
        self.library = stand_in()

    def synchronize(self) -> None:
        pass

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def late_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def architecture(self) -> int:
        return 90

    def choose_architecture(self, number: int) -> None:
        emulator().set_architecture(number if number < 100 else 80)

    def other(self) -> str:
        return "cpu"

    def sanitizers(self) -> dict[str, list[str]]:
        return {"none": []}


Device = Gpu | StandIn


def peers_of(device: str) -> list[peers.Peer]:
    return [peer for peer in peers.PEERS if device in peer.devices]


def token_of(op: Any, x: Inputs) -> dict[str, torch.Tensor]:
    """The first token of the arguments that have time."""
    timed = {name for name, dims in op.tensors.items() if "T" in dims.split()}
    return {n: t[:, 0].contiguous() if n in timed else t for n, t in x.tensors.items()}


def environment(device: Device) -> Record:
    """Machine, versions, libraries, and the ceilings of the roofline."""
    dtypes = registry.DTYPES["cuda"]
    return {
        **measure.environment(device.name),
        "libraries": lsm_cuda.build_info()["libraries"],
        "emulated": isinstance(device, StandIn),
        "skipped": {p.name: why for p in peers_of(device.name) if (why := peers.absent(p))},
        "tools": [t for t in ("nvcc", "ncu", "compute-sanitizer") if shutil.which(t)],
        "ceilings": roofline.ceilings(device.name, dtypes, 0.5 if device.name == "cuda" else 0.01),
    }


# --- against fp64


def correct(device: Device, op: str, first: int, step: int, stop: int | None) -> Record:
    """Results and gradients of every ``step``-th case from ``first`` on, by the tests' rule."""
    impl = impls.IMPLS[device.cases]
    rows = table.cases(TEST_OPS[op], device.cases)[:stop]
    todo = rows[first::step]
    failed = {}
    places = [(op, device.cases, i) for i in range(first, len(rows), step)]
    for case, (x, truth, same) in zip(todo, truths(places), strict=True):
        broken = checks.verdicts(impl.run(case.op, x), truth, same, x)
        if broken:
            failed[str(case)] = broken
    return {"ok": not failed, "cases": len(todo), "failed": failed}


def truths(places: list[tuple[str, str, int]]) -> Iterator[Any]:
    """Inputs and expected values of cases, computed ahead by other processes if there are cores."""
    if (pool := helpers()) is None:
        yield from (expected(place) for place in places)
    else:
        for packed in pool.map(packed_expected, places):
            yield torch.load(io.BytesIO(packed), weights_only=False)


@functools.cache
def helpers() -> ProcessPoolExecutor | None:
    spare = min(8, (os.cpu_count() or 1) - 2)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(spare, mp_context=spawn) if spare > 1 else None


def expected(place: tuple[str, str, int]) -> Any:
    op, impl, i = place
    torch.set_num_threads(1)
    return checks.expected(table.cases(TEST_OPS[op], impl)[i])


def packed_expected(place: tuple[str, str, int]) -> bytes:
    buffer = io.BytesIO()
    torch.save(expected(place), buffer)
    return buffer.getvalue()


def long(device: Device, op: str) -> Record:
    """Many chunks and few heads, with gradients: work that kernels cut into segments."""
    case = Case(TEST_OPS[op], T=device.long, heads=(2, 2), dims=(64, 64), dtype="bf16+f32")
    x = make_inputs(case)
    there = x.to(device.name)
    actual = checks.differentiate(functools.partial(forward, case.op), there)
    truth, same = checks.definition(case.op, there)  # on the device: it takes as long as T
    everything = [{n: t.cpu() for n, t in r.items()} for r in (actual, truth, same)]
    broken = checks.verdicts(*everything, x)
    return {"ok": not broken, "failed": broken, "T": case.T}


def family(device: Device, name: str) -> Record:
    """An operator around an engine's: results and gradients on the device, against fp64."""
    row = FAMILIES[name]
    half = {"dtype": torch.bfloat16}
    for case in ({"dtype": torch.float32}, half | {"T": 70}, PACKED, half | PACKED):
        x = families.draw(row, **case)
        there = dataclasses.replace(
            x,
            tensors={n: t.to(device.name) for n, t in x.tensors.items()},
            states=x.states and tuple(t.to(device.name) for t in x.states),
            cu_seqlens=None if x.cu_seqlens is None else x.cu_seqlens.to(device.name),
        )
        actual = families.gradients(families.operator(row), row, there)
        on_host = {n: t.cpu() for n, t in actual.items()}
        families.assert_rule(on_host, families.definition(row, x), x)
    return {"ok": True}


def row(device: Device, name: str) -> Record:
    """A row of the registry on small shapes in every dtype: results, gradients, step."""
    for shape, _ in registry.cells(ROWS[name], "emulator"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            measure.check(ROWS[name], shape, dtype, device.name, ())
    return {"ok": True}


def paths(device: Device, dtype: str, D: int) -> Record:
    """Sparse attention by Hopper's warpgroups and by every GPU's kernels: both against fp64, and
    milliseconds of both on causal attention."""
    import attention

    if device.architecture() != 90:
        raise Skip("not a Hopper GPU")
    half, T = {"dtype": dtype, "dims": (D, D)}, 700 if device.name == "cuda" else 100
    packed = {"batch": "int32", "lists": "none", "mask": {"causal": True}}
    window = {"lists": "none", "mask": {"causal": True, "left": 100, "sinks": 4}}
    rows = {"blocks": (64, 64), "heads": (4, 2, 2), "mask": {"causal": True}}
    failed, times = {}, {}
    for more in (packed, window, rows, {"blocks": (16, 16), "extras": ("softcap", "bias")}):
        case = attention.Attn(Tq=T, Tk=T, **(half | more))
        call = attention.make(case)
        truth, same = (attention.definition(call, d) for d in (torch.float64, torch.float32))
        for number in (80, 90):
            device.choose_architecture(number)
            broken = checks.verdicts(
                attention.run(impls.IMPLS[device.name], call), truth, same, call.x
            )
            if broken:
                failed[f"{case} sm_{number}"] = broken
    sizes = (1, 16384, 16, D) if device.name == "cuda" else (1, 128, 1, D)
    q, k, v = (torch.randn(sizes, device=device.name).to(table.DTYPES[dtype]) for _ in range(3))
    run = functools.partial(ops.block_sparse_attn, q, k, v, mask=ops.AttnMask(causal=True))
    for number in (80, 90):
        device.choose_architecture(number)
        sample = device.clock.sampler(device.clock.kinds[-1], [run])  # a graph's, on a GPU
        times[f"sm_{number}"] = min(sample() for _ in range(5))
    device.choose_architecture(100)
    return {"ok": not failed, "failed": failed, "sizes": [*sizes], "ms": times}


def rates(device: Device) -> Record:
    """What an SM does per clock, by the program of benchmarks/micro."""
    program = Path(os.environ.get("LSM_MICRO", ROOT / "build" / "cmake" / "micro"))
    if not program.is_file():
        raise Skip("benchmarks/micro is not built: pack.py does")
    done = subprocess.run([program], capture_output=True, text=True, timeout=55)
    if done.returncode:
        raise RuntimeError(done.stderr or f"{program} ended with {done.returncode}")
    return {"ok": True, "rates": [json.loads(line) for line in done.stdout.splitlines()]}


# --- how it is called


def forward(op: Any, x: Inputs) -> Any:
    return impls.IMPLS["cpu"].forward(op, x)  # the public function, on whatever device x is


@dataclasses.dataclass
class Work:
    """Tensors, and a call that reads them: results, gradients, and what steps give and leave."""

    tensors: dict[str, torch.Tensor]
    run: Callable[[], dict[str, torch.Tensor]]

    def overwrite(self, other: Work) -> None:
        """The values of another's tensors into these."""
        for name, t in self.tensors.items():
            t.copy_(other.tensors[name])


def work(place: str, name: str, other: bool = False) -> Work:
    """Of an operator; ``other``: of other values."""
    if name in ROWS:
        op = ROWS[name]
        shape, _ = registry.cells(op, "emulator")[0]
        x = op.make(shape, torch.bfloat16, "cpu", seed=int(other))
        tensors = {n: t.to(place) for n, t in x.items()}
        return Work(tensors, lambda: of_row(op, tensors, shape))
    op, x, y = two_inputs(place, name)
    x = y if other else x
    tensors = {n: getattr(x, n) for n in ("grad_o", "initial_state", "grad_final_state")}
    return Work({**x.tensors, **tensors}, lambda: of_engine(op, x))


def two_inputs(place: str, op: str) -> tuple[Any, Inputs, Inputs]:
    shape = {"T": 130, "dims": (64, 32), "heads": (1, 2), "dtype": "bf16+f32", "state": "both"}
    both = (make_inputs(Case(TEST_OPS[op], gate=gate, **shape)) for gate in ("mixed", "-1"))
    return TEST_OPS[op], *(x.to(place) for x in both)


def of_engine(op: Any, x: Inputs) -> dict[str, torch.Tensor]:
    results = checks.differentiate(functools.partial(forward, op), x)
    token, state = token_of(op, x), x.initial_state.clone()
    with torch.no_grad():
        for i in range(3):
            results[f"step {i}"] = op.step(**token, state=state)
    return results | {"state": state}


def of_row(op: registry.Op, x: dict[str, torch.Tensor], shape: registry.Shape) -> Any:
    call = peers.ours(op, "training")
    arguments, leaves = measure.with_leaves(call, op, x, shape)
    found = call.load()(**arguments)
    if isinstance(found, lsm_cuda.ops.BlockLists):
        return {"index": found.index}
    o = peers.first(found)
    grads = torch.autograd.grad(o, list(leaves.values()), o.detach())
    results = {"o": o.detach()} | {f"d{n}": t for n, t in zip(leaves, grads, strict=True)}
    if op.step and not shape.packed:
        call, token = peers.ours(op, "step"), op.token(x, shape)
        with torch.no_grad():
            results["step"] = call.result(call.load()(**token))
        states = token.get("state", ())
        states = states if isinstance(states, tuple) else (states,)
        results |= {f"state {i}": s for i, s in enumerate(states)}
    return results


def graph(device: Device, op: str) -> Record:
    """Forward, backward and steps replay from a CUDA graph on other inputs, to the same bits."""
    x, y = (work(device.name, op, other) for other in (False, True))
    static = work(device.name, op)
    expected = [z.run() for z in (x, y)]
    replay = device.capture(static.run)
    for z, wanted in ((y, expected[1]), (x, expected[0])):
        static.overwrite(z)
        results = replay()
        device.synchronize()
        checks.assert_same_bits(results, wanted)
    return {"ok": True}


def stream(device: Device, op: str) -> Record:
    """On a stream that is still busy, an operator waits for its inputs."""
    x, y = (work(device.name, op, other) for other in (False, True))
    wanted = y.run()
    with device.late_stream():
        x.overwrite(y)
        results = x.run()
    checks.assert_same_bits(results, wanted)
    return {"ok": True}


def guard(device: Device, op: str) -> Record:
    """Tensors of a GPU that is not the current one."""
    other = device.other()
    wanted, elsewhere = (work(place, op).run() for place in (device.name, other))
    assert all(t.device == torch.device(other) for t in elsewhere.values()), "moved"
    on_host = ({n: t.cpu() for n, t in found.items()} for found in (elsewhere, wanted))
    checks.assert_same_bits(*on_host)
    return {"ok": True}


def memory(device: Device, op: str) -> Record:
    """What does not fit is said in words, and the next call works."""
    row, x, _ = two_inputs(device.name, op)
    huge = {"T": 2**50, "K": 8, "V": 8}
    one = torch.zeros((), device=device.name)
    tensors = {
        n: one.expand([huge.get(d, 1) for d in dims.split()]) for n, dims in row.tensors.items()
    }
    try:
        row.chunk(**tensors)
    except RuntimeError as error:
        text = str(error)
    else:
        raise AssertionError("nothing was raised")
    assert text.startswith("out of memory: lsm could not allocate ["), text
    forward(row, x)
    device.synchronize()
    return {"ok": True, "text": text.splitlines()[0]}


# --- under compute-sanitizer


def sanitize(device: Device, ops: list[str], limit: int | None, seconds: float) -> Record:
    """Small shapes of every operator under each tool, all tools side by side."""
    suite = [sys.executable, str(Path(__file__).with_name("gpu_suite.py")), "--probe", *ops]
    suite += ["--cases", str(limit)] if limit else []
    suite += ["--dry-run"] if isinstance(device, StandIn) else []
    # no caching: an access past a tensor must not land in another one
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = {
        tool: subprocess.Popen([*command, *suite], env=env, start_new_session=True, **pipes)
        for tool, command in device.sanitizers().items()
    }
    record: Record = {"ok": True}
    end = time.monotonic() + seconds
    for tool, process in running.items():
        try:
            text, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and what runs under it
            text, _ = process.communicate()
            record[tool] = f"not finished after {seconds:.0f} s\n{text[-500:]}"
            record["ok"] = False
            continue
        if "Device not supported" in text:
            record[tool] = "skipped: Device not supported"
        else:
            record[tool] = text[-3000:]
            record["ok"] &= process.returncode == 0 and "probed" in text
    return record


def probe(device: Device, ops: list[str], limit: int | None) -> int:
    """Runs small cases of operators and looks at no result; for sanitizers."""
    count = 0
    for op in ops:
        if op in ROWS:
            for shape, _ in registry.cells(ROWS[op], "emulator"):
                x = ROWS[op].make(shape, torch.bfloat16, device.name)
                of_row(ROWS[op], x, shape)
                device.synchronize()
                count += 1
            continue
        row = TEST_OPS[op]
        rows = table.cases(row, "emulator")[::4][:limit]
        cut = {"T": 530, "dims": (64, 64), "dtype": "bf16+f32", "state": "both"}
        rows += [Case(row, batch=batch, **cut) for batch in ([1, "int32"] if not limit else [])]
        for case in rows:
            x = make_inputs(case)
            impls.IMPLS[device.cases].run(row, x)
            if case.T and x.initial_state is not None and not case.varlen:
                state = x.initial_state.to(device.name, copy=True)
                impls.IMPLS[device.cases].step(row, token_of(row, x), state)
            device.synchronize()
            count += 1
    print(f"probed {count} cases")
    return 0


# --- the tests, the clock


def tests(device: Device, seconds: float) -> Record:
    """The test suite's own tests of this device, as far as time allows."""
    try:
        import pytest  # noqa: F401
    except ImportError as error:
        raise Skip("pytest is not installed") from error
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--no-header", *device.tests]
    command += ["-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        return {"ok": "F" not in text, "output": f"stopped after {seconds:.0f} s\n{text[-3000:]}"}
    return {"ok": done.returncode == 0, "output": (done.stdout + done.stderr)[-5000:]}


def timings(
    device: Device,
    op: str,
    text: str,
    packed: int,
    modes: list[str],
    peer: str | None,
    seconds: float,
) -> Record:
    """Rows of one cell: ours, or ours beside one peer, whose rows are kept."""
    beside = [p for p in peers.PEERS if p.name == peer]
    shape = registry.Shape(text, packed)
    rows = []
    for dtype in registry.DTYPES["cuda"]:
        rows += measure.measure(
            registry.OPS[op], shape, dtype, device.name, modes, device.clock, beside, seconds
        )
    kept = measure.OURS if peer is None else peer
    clocks = measure.gpu_state() if device.name == "cuda" else {}
    return {
        "ok": True,
        "clocks": clocks,
        "rows": [row for row in rows if row["implementation"] == kept],
    }
