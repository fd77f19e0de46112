"""Times operators beside their peers in one run; refuses to time what is wrong.

    python benchmarks/run.py --device cpu --threads 2 [--ops gla] [--out benchmarks/results]

Each cell is a median with its spread; ratios compare medians of this run only. On a GPU: CUDA
events, L2 flushed and inputs rotated between samples. Results are json under results/<device>/;
report.py turns them into docs.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from registry import OPS, SHAPES, Inputs, Op, Peer, Shape
from torch import Tensor

import lsm_cuda
from lsm_cuda.reference import gated_linear_attention

HERE = Path(__file__).resolve().parent
SECONDS = 1.0  # per cell, at least
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--ops", nargs="*", default=list(OPS))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = torch.device(options.device).type
    rows: list[dict[str, Any]] = []
    for name in options.ops:
        for shape in SHAPES[kind]:
            for dtype in (torch.float32, torch.bfloat16) if kind == "cpu" else (torch.bfloat16,):
                for row in measure(OPS[name], shape, dtype, options.device):
                    rows.append(row)
                    print(show(row), flush=True)
    folder = options.out / device_name(kind).lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(kind, options.threads), "rows": rows}
    path = folder / "ops.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")
    return 0


def measure(op: Op, shape: Shape, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """One row per (mode, implementation), ours first."""
    x = op.make(shape, dtype, device)
    gate(op, shape, dtype, device)
    found = [(peer, peer.find()) for peer in op.peers]
    for mode in ("forward", "backward", "step"):
        if mode == "step" and shape != SHAPES[torch.device(device).type][0]:
            continue
        ours = samples(runner(op.forward, op, x, mode), device)
        item, gate_item = x["q"].element_size(), x["g"].element_size()
        common = {"op": op.name, "shape": str(shape), "dtype": str(dtype)[6:], "mode": mode}
        yield (
            common
            | ours
            | {
                "implementation": "lsm_cuda",
                "minimal_bytes": op.minimal_bytes(shape, item, gate_item, mode),
                "flops": op.recurrence_flops(shape, mode),
            }
        )
        for peer, forward in found:
            if not comparable(peer, forward, shape, mode):
                continue
            assert forward is not None
            times = samples(runner(forward, op, x, mode, peer), device)
            ratio = times["ms"] / ours["ms"]
            yield common | times | {"implementation": peer.name, "ratio": ratio}


def comparable(
    peer: Peer, forward: Callable[[Inputs], Tensor] | None, shape: Shape, mode: str
) -> bool:
    return (
        forward is not None
        and peer.longest.get(mode, shape.T) >= shape.T
        and (peer.same or mode != "step")
    )


def gate(op: Op, shape: Shape, dtype: torch.dtype, device: str) -> None:
    """Ours, and every peer that claims the same, against fp64 on a short stretch."""
    short = Shape(shape.B, min(shape.T, 128), shape.H, shape.K, shape.V)
    x = op.make(short, dtype, device)
    truth, _ = gated_linear_attention(**{name: t.double() for name, t in x.items()})
    implementations = [("lsm_cuda", op.forward)]
    implementations += [(p.name, f) for p in op.peers if p.same and (f := p.find()) is not None]
    for name, forward in implementations:
        error = (forward(x).double() - truth).norm() / truth.norm()
        if not error < TOLERANCE[dtype]:
            raise SystemExit(
                f"{op.name} {short} {dtype}: {name} is wrong, relative error {error:.2e}; not timed"
            )


def runner(
    forward: Callable[[Inputs], Tensor], op: Op, x: Inputs, mode: str, peer: Peer | None = None
) -> Callable[[], object]:
    if mode == "forward":
        return torch.no_grad()(lambda: forward(x))
    if mode == "backward":  # forward and backward: what a training step pays
        leaves = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
        grad = torch.randn_like(x["v"])

        def train() -> None:
            for t in leaves.values():
                t.grad = None
            forward(leaves).backward(grad)

        return train
    B, _, H, K = x["q"].shape
    token = {name: t[:, :1].contiguous() for name, t in x.items()}
    token["state"] = torch.zeros(B, H, K, x["v"].shape[-1], device=x["q"].device)
    return torch.no_grad()(lambda: op.step(token) if peer is None else forward(token))


def samples(run: Callable[[], object], device: str) -> dict[str, float]:
    once = sample_cuda if torch.device(device).type == "cuda" else sample_cpu
    for _ in range(2):
        once(run)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        times.append(once(run))
    quarter = quantiles(times, n=4)
    return {
        "ms": median(times),
        "q1": quarter[0],
        "q3": quarter[2],
        "min": min(times),
        "samples": len(times),
    }


def sample_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def sample_cuda(run: Callable[[], object]) -> float:
    torch.empty(64 * 2**20, dtype=torch.int32, device="cuda").zero_()  # past any L2
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def device_name(kind: str) -> str:
    return torch.cuda.get_device_name() if kind == "cuda" else "cpu"


def environment(kind: str, threads: int) -> dict[str, Any]:
    def said(*command: str) -> str:
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=HERE
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    info: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": said("git", "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        "build": {k: v for k, v in lsm_cuda.build_info().items() if k != "libraries"},
    }
    if kind == "cpu":
        model = [line for line in said("lscpu").splitlines() if line.startswith("Model name")]
        return info | {"threads": threads, "cpu": model[0].split(":")[1].strip() if model else "?"}
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit"
    return info | {"gpu": said("nvidia-smi", query, "--format=csv,noheader")}


def show(row: dict[str, Any]) -> str:
    ratio = f"{row['ratio']:8.1f}x" if "ratio" in row else " " * 9
    cell = f"{row['op']} {row['shape']} {row['dtype']:9} {row['mode']:9} {row['implementation']:26}"
    return f"{cell} {row['ms']:10.4f} ms {ratio}  [{row['q1']:.4f}, {row['q3']:.4f}]"


if __name__ == "__main__":
    sys.exit(main())
