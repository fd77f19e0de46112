"""The gate on CPU speed: ratios to torch's attention in the same run, held to a baseline.

    python benchmarks/gate.py            # compare; 1 if an operator lost more than a tenth
    python benchmarks/gate.py --update   # measure this machine's baseline

Made for a machine that others use too: processor time of one thread on data that stay in its own
cache, the best of many short calls of either side, taken in turns, and a loss is believed only when
several tries agree. Baselines are kept by processor and torch; without one nothing is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lsm_cuda.bench.measure import cpu_name, runner  # noqa: E402
from lsm_cuda.bench.peers import PEERS, ours  # noqa: E402
from lsm_cuda.bench.registry import OPS, Op, Shape  # noqa: E402

BASELINE = ROOT / "benchmarks" / "baselines" / "cpu.json"
SHAPE = Shape("B1 T256 H2 K64 V64")
ATTENTION = "torch SDPA"
LOSS = 0.9
TRIES = 5
TURNS, SECONDS = 5, 0.1  # per try; per turn and side
BESIDE = [op.name for op in OPS.values() if op.qkv and "forward" in op.modes]  # attention's peers


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--ops", nargs="*", default=BESIDE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(BASELINE.read_text()) if BASELINE.is_file() else {}
    baseline = known.setdefault(machine(), {})
    names = [(name, mode) for name in options.ops for mode in ("forward", "training")]
    if options.update:
        for name, mode in names:
            ratios = [ratio(OPS[name], mode) for _ in range(TRIES)]
            baseline[f"{name} {mode}"] = round(median(ratios), 2)
            print(f"{name} {mode}: {', '.join(f'{r:.2f}' for r in ratios)}", flush=True)
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(json.dumps(known, indent=1) + "\n")
        return 0
    lost = [n for n in names if not holds(*n, baseline.get(" ".join(n)))]
    return 1 if lost else 0


def machine() -> str:
    """What a baseline holds for: the processor, and the torch that is compared with."""
    return f"{cpu_name()}, torch {torch.__version__.split('+')[0]}"


def holds(name: str, mode: str, baseline: float | None) -> bool:
    """Whether one try of several comes within a tenth of the baseline; says so."""
    if baseline is None:
        print(f"{name} {mode}: no baseline for {machine()}; --update makes one")
        return True
    tried: list[float] = []
    while len(tried) < TRIES and max(tried, default=0) < LOSS * baseline:
        tried.append(ratio(OPS[name], mode))
    held = max(tried) >= LOSS * baseline
    values = ", ".join(f"{r:.2f}" for r in tried)
    verdict = "ok" if held else "LOST"
    print(f"{name} {mode}: {values} times {ATTENTION}, baseline {baseline}: {verdict}", flush=True)
    return held


def ratio(op: Op, mode: str) -> float:
    """How many times faster than attention, on fresh tensors: an address can be unlucky."""
    x = op.make(SHAPE, torch.float32, "cpu")
    (peer,) = (p for p in PEERS if p.name == ATTENTION)
    theirs = peer.call(op, SHAPE, mode)
    assert theirs is not None
    runs = [runner(call, op, x, SHAPE, mode) for call in (ours(op, mode), theirs)]
    best = [float("inf"), float("inf")]
    for _ in range(TURNS):
        best = [min(b, fastest(run)) for b, run in zip(best, runs, strict=True)]
    return best[1] / best[0]


def fastest(run: Callable[[], object]) -> float:
    """Processor seconds of the best of many calls."""
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
