"""How it is measured: correct first, then side by side in one run, many samples, medians.

Implementations take turns, so that a machine that slows down slows all of them. On a CPU a sample
is a call, or a block of short calls under torch.utils.benchmark. On a GPU it is one call between
two events, with the L2 cache flushed and inputs rotated between samples: ``eager`` starts on an
idle GPU and so includes what the host needs, ``graph`` is a replay and does not.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.utils import benchmark

import lsm_cuda

from .operators import Inputs, Op, Shape
from .peers import PEERS, Call, Peer, absent, ours, version
from .rule import allowed, relative_rms

__all__ = [
    "OURS",
    "CudaClock",
    "HostClock",
    "Row",
    "WrongResultError",
    "check",
    "environment",
    "gpu_state",
    "measure",
    "race",
    "runner",
]

Row = dict[str, Any]
Run = Callable[[], object]
Sampler = Callable[[], float]  # milliseconds
Checked = dict[tuple[object, ...], list[tuple[Peer, str | None]]]

OURS = "lsm_cuda"
ROUNDS = 5  # turns that each implementation gets
ENOUGH = 3  # samples of one that takes SLOW seconds for them
SLOW = 2.0
BLOCK = 0.01  # seconds of calls that make one sample on a CPU
# How near a peer has to be to be the same function; ours is held to the acceptance rule.
SAME = {torch.float32: 5e-5, torch.bfloat16: 0.1, torch.float16: 2.5e-2}


class WrongResultError(RuntimeError):
    """Our result is not the operator's: nothing is timed."""


# --- correct first


def results(
    op: Op, x: Inputs, dtype: torch.dtype, grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition's output, and its gradients by argument, computed in ``dtype``."""
    x = {n: t.to(dtype) if t.is_floating_point() else t for n, t in x.items()}
    if not op.trained:
        return op.definition(x), {}
    x |= {n: x[n].detach().requires_grad_() for n in op.inputs}
    o = op.definition(x)
    grads = torch.autograd.grad(o, [x[n] for n in op.inputs], grad.to(dtype))
    return o.detach(), dict(zip(op.inputs, grads, strict=True))


def check(
    op: Op, shape: Shape, dtype: torch.dtype, device: str, peers: Iterable[Peer]
) -> list[tuple[Peer, str | None]]:
    """Peers, each with None or why it is not timed. Our output, gradients and step are held to the
    acceptance rule on a stretch, theirs to being the same function.

    Raises:
        WrongResultError: ours is off.
    """
    shape = stretch(op, shape, device)
    x = op.make(shape, dtype, device)
    seeded = torch.Generator(device).manual_seed(1)
    grad = torch.randn(shape.dims(op.output), generator=seeded, device=device).to(dtype)
    truth, wanted = results(op, x, torch.float64, grad)
    same, unrounded = results(op, x, torch.float32, grad)

    def refuse_if_off(what: str, actual: Tensor, truth: Tensor, same: Tensor) -> None:
        error = relative_rms(actual, truth)
        most, _ = allowed(relative_rms(same.to(actual.dtype), truth), dtype, actual.dtype)
        if not error <= most:
            raise WrongResultError(
                f"{op.name} {shape} {dtype}: {what} is wrong, relative error {error:.2e}, allowed "
                f"{most:.1e}; not timed"
            )

    o, leaves = differentiable(ours(op, "training"), op, x, shape)
    refuse_if_off("the output", o, truth, same)
    if op.trained:
        gradients = torch.autograd.grad(o, list(leaves.values()), grad)
        for name, actual in zip(leaves, gradients, strict=True):
            refuse_if_off(f"the gradient of {name}", actual, wanted[name], unrounded[name])
    if op.step and not shape.packed:
        with torch.no_grad():
            stepped = (op.stepped(t) for t in (truth, same))
            refuse_if_off("a step", ours_step(op, x, shape), *stepped)
    return [(p, off(p, op, shape, x, truth)) for p in peers]


def stretch(op: Op, shape: Shape, device: str) -> Shape:
    """As long as the fp64 definition and what autograd keeps of it are quick to have."""
    most = op.affordable(shape, 2**27 if device == "cuda" else 2**23)
    return shape.at(max(1, shape.packed, min(shape["T"], most)))


def ours_step(op: Op, x: Inputs, shape: Shape) -> Tensor:
    call = ours(op, "step")
    return call.result(call.load()(**call.arguments(op, x, shape)))


def off(peer: Peer, op: Op, shape: Shape, x: Inputs, truth: Tensor) -> str | None:
    """Why a peer is not to be timed, or None."""
    call = peer.calls.get((op.name, "sequence"))
    if (reason := absent(peer)) or call is None or not peer.same or not peer.fits(shape):
        return reason
    try:
        with torch.no_grad():
            actual = call.result(call.load()(**call.arguments(op, x, shape)))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if not (distance := relative_rms(actual, truth)) < SAME[x[next(iter(op.inputs))].dtype]:
        return f"not the same function: relative error {distance:.1e}"
    return None


# --- what is run


def differentiable(call: Call, op: Op, x: Inputs, shape: Shape) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a call, and the leaves it hangs on."""
    arguments, leaves = with_leaves(call, op, x, shape)
    return call.result(call.load()(**arguments)), leaves


def with_leaves(
    call: Call, op: Op, x: Inputs, shape: Shape
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arguments = call.arguments(op, x, shape)
    leaves = {
        name: t.detach().requires_grad_()
        for name, t in arguments.items()
        if isinstance(t, Tensor) and t.is_floating_point() and name not in call.constants
    }
    return arguments | leaves, leaves


def runner(call: Call, op: Op, x: Inputs, shape: Shape, mode: str) -> Run:
    """A call without arguments that does what ``mode`` says."""
    function = call.load()
    if mode != "training":
        arguments = call.arguments(op, x, shape)
        return torch.no_grad()(lambda: function(**arguments))
    arguments, leaves = with_leaves(call, op, x, shape)
    with torch.no_grad():
        grad = torch.randn_like(call.result(function(**arguments)))

    def train() -> object:
        o = call.result(function(**arguments))
        return torch.autograd.grad(o, list(leaves.values()), grad)

    return train


# --- clocks


class HostClock:
    """The CPU, or what stands in a device's place there."""

    kinds: tuple[str, ...] = ("eager",)
    compiles = False

    def input_sets(self, nbytes: int) -> int:
        return 1

    def sampler(self, kind: str, runs: list[Run]) -> Sampler:
        (run,) = runs
        once = self.once(run)
        if once < 10 * BLOCK:  # a cold start, perhaps
            once = self.once(run)
        if once > BLOCK:
            return lambda: self.once(run) * 1e3
        timer = benchmark.Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        calls = math.ceil(BLOCK / once)
        return lambda: timer.timeit(calls).mean * 1e3

    def once(self, run: Run) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def peak_bytes(self, run: Run) -> int | None:
        return None


class CudaClock:
    """The current GPU."""

    kinds: tuple[str, ...] = ("eager", "graph")
    compiles = True  # peers may, in their first call

    def __init__(self) -> None:
        self.l2 = torch.cuda.get_device_properties().L2_cache_size
        self.flushed = torch.empty(2 * self.l2, dtype=torch.uint8, device="cuda")

    def input_sets(self, nbytes: int) -> int:
        return max(1, min(8, math.ceil(2 * self.l2 / nbytes)))

    def sampler(self, kind: str, runs: list[Run]) -> Sampler:
        for run in runs:
            run()
        torch.cuda.synchronize()
        todo = itertools.cycle([captured(run) for run in runs] if kind == "graph" else runs)

        def sample() -> float:
            self.flushed.zero_()
            if kind == "eager":
                torch.cuda.synchronize()
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            run = next(todo)
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(stop))

        sample()
        return sample

    def once(self, run: Run) -> float:
        """Seconds of one call."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak_bytes(self, run: Run) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def captured(run: Run) -> Run:
    """A CUDA graph of a call."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


Clock = HostClock | CudaClock


# --- side by side


def race(samplers: dict[str, Sampler], seconds: float) -> dict[str, list[float]]:
    """Samples of each, taken in turns, for about ``seconds`` each and at least ROUNDS each, or
    ENOUGH of a slow one."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(ROUNDS):
        for name, sample in samplers.items():
            if len(samples[name]) >= ENOUGH and sum(samples[name]) > 1e3 * max(SLOW, seconds):
                continue
            end = time.perf_counter() + seconds / ROUNDS
            while True:
                samples[name].append(sample())
                if time.perf_counter() >= end:
                    break
    return samples


def summary(times: list[float]) -> dict[str, Any]:
    q1, _, q3 = quantiles(times, n=4)
    return {"ms": median(times), "q1": q1, "q3": q3, "min": min(times), "samples": len(times)}


def measure(
    op: Op,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    modes: Iterable[str],
    clock: Clock,
    peers: Iterable[Peer] = tuple(PEERS),
    seconds: float = 1.0,
    patience: float = 5.0,
    checked: Checked | None = None,
    tokens: int = 2**20,
) -> Iterator[Row]:
    """One row per mode, timing kind and implementation, ours first; a peer that could not be timed
    is a row with its reason. ``patience``: seconds a peer's call may take. ``checked``: what
    earlier calls found correct, which is not checked again; ``tokens``: so many of a sequence
    are checked, at most.

    Raises:
        WrongResultError: ours is wrong.
    """
    peers = [peer for peer in peers if device in peer.devices]
    checked = {} if checked is None else checked
    start = stretch(op, shape.at(min(shape["T"], tokens)), device)
    stretched = op.name, start, dtype, tuple(p.name for p in peers)
    if stretched not in checked:
        checked[stretched] = check(op, start, dtype, device, peers)
    found = checked[stretched]

    def inputs(at: Shape) -> list[Inputs]:
        count = clock.input_sets(op.minimal_bytes(at, dtype, "forward"))
        return [op.make(at, dtype, device, seed) for seed in range(count)]

    for mode in modes:
        common = {"op": op.name, "shape": str(shape), "dtype": str(dtype)[6:], "mode": mode}
        wanted = [(p, reason, c) for p, reason in found if (c := p.call(op, shape, mode, patience))]
        whole = inputs(shape) if mode != "step" or wanted or op.cached else []
        alone = mode == "step" and not op.cached  # no context is ours to read
        mine = inputs(shape.at(1)) if alone else whole
        runs = {OURS: [runner(ours(op, mode), op, x, shape, mode) for x in mine]}
        for peer, reason, call in wanted:
            todo = reason or tried(call, op, whole, shape, mode, clock, patience)
            if isinstance(todo, list):
                runs[peer.name] = todo
            else:
                yield common | {"implementation": peer.name, "skipped": todo}
        peaks = {name: clock.peak_bytes(todo[0]) for name, todo in runs.items()}
        floor = {
            "minimal_bytes": op.minimal_bytes(shape, dtype, mode),
            "minimal_flops": op.minimal_flops(shape, mode),
        }
        for kind in clock.kinds:
            samplers: dict[str, Sampler] = {}
            for name, todo in runs.items():
                try:
                    samplers[name] = clock.sampler(kind, todo)
                except RuntimeError as error:  # what a graph cannot capture
                    reason = f"{kind}: {error}".splitlines()[0]
                    yield common | {"implementation": name, "skipped": reason}
            results = {name: summary(times) for name, times in race(samplers, seconds).items()}
            for name, result in results.items():
                row = common | {"timing": kind, "implementation": name} | result
                if peaks[name] is not None:
                    row["peak_bytes"] = peaks[name]
                if name == OURS:
                    row |= floor
                elif OURS in results:
                    row["ratio"] = result["ms"] / results[OURS]["ms"]
                yield row
        runs.clear()
        gc.collect()


def tried(
    call: Call,
    op: Op,
    inputs: list[Inputs],
    shape: Shape,
    mode: str,
    clock: Clock,
    patience: float,
) -> list[Run] | str:
    """A peer's runs, called once to compile and warm up; or why it cannot be timed."""
    try:
        runs = [runner(call, op, x, shape, mode) for x in inputs]
        took = clock.once(runs[0])
        if clock.compiles or took < min(patience, SLOW / ENOUGH):  # warming up changes it
            took = clock.once(runs[0])
    except Exception as error:  # out of memory, an unsupported size: the reason is the result
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return runs if took < patience else f"{float(f'{took:.2g}'):g} s a call"


# --- where


def environment(device: str) -> dict[str, Any]:
    """Date, commit, versions and machine of a run."""
    info: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": os.environ.get("LSM_COMMIT") or said("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "build": {k: v for k, v in lsm_cuda.build_info().items() if k != "libraries"},
        "peers": {p.package: v for p in PEERS if (v := version(p.package)) is not None},
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        # what fits in a CPU's cache is not bound by memory; on a GPU the cache is flushed
        "cache_bytes": 0 if device == "cuda" else cpu_cache(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        info |= {
            "gpu": torch.cuda.get_device_name(),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
            "state": gpu_state(),
        }
    elif tunables := os.environ.get("GLIBC_TUNABLES"):
        info["allocator"] = tunables
    return info


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature, as nvidia-smi says them now."""
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,"
    query += "temperature.gpu"
    values = said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines()
    return dict(zip(query.split(","), values[0].split(", "), strict=False)) if values else {}


def cpu_name() -> str:
    fields = dict(line.split(":", 1) for line in said("lscpu").splitlines() if ":" in line)
    model, family, number = (
        fields.get(key, "?").strip() for key in ("Model name", "CPU family", "Model")
    )
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model} (family {family}, model {number}, {capability})"


def cpu_cache() -> int:
    """Bytes of the largest cache, 0 where Linux does not say."""
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(f.read_text().rstrip("K\n")) * 1024 for f in found), default=0)


def said(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
