"""Times operators beside their peers in one run; refuses to time what is wrong.

    python benchmarks/run.py --device cpu --threads 2 --out benchmarks/results
    python benchmarks/run.py --ops gla --compare main

The first shape of every operator comes first, then the second ones, and so on; --minutes ends the
run there. Ratios compare medians of one run only. Results are json under OUT/<device>/, written
after every shape; report.py turns those in benchmarks/results into docs. --default-allocator runs
without what glibc is otherwise told, to keep freed memory, and leaves a file of its own. --compare
builds another commit beside this tree, takes turns between the two, and fails where this tree is
more than a tenth slower.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# glibc gives large tensors fresh pages on every call, which can cost a peer several times its
# arithmetic. Keeping freed memory removes that for everybody.
TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"
LOSS = 1.1
TRIES, TURNS = 3, 5


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--ops", nargs="*", help="default: all")
    parser.add_argument("--only", default="", help="regular expression: shapes to time")
    parser.add_argument("--seconds", type=float, default=1.0, help="per cell and implementation")
    parser.add_argument(
        "--patience", type=float, default=5.0, help="seconds a peer's call may take"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="what ends the run")
    parser.add_argument(
        "--default-allocator", action="store_true",
        help="glibc as it is: fresh pages for large tensors; into default_allocator.json",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    parser.add_argument("--compare", metavar="REV", help="compare this tree with a commit")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # a tree; used by --compare
    options = parser.parse_args()
    os.environ.pop("OMP_WAIT_POLICY", None)  # threads that sleep slow PyTorch's small operations
    tuned = "GLIBC_TUNABLES" in os.environ
    if tuned and options.default_allocator:
        parser.error("--default-allocator with GLIBC_TUNABLES set")
    if sys.platform == "linux" and not tuned and not options.default_allocator:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.argv])
    import_from(options.serve or ROOT)
    import torch

    from lsm_cuda.bench.registry import OPS

    torch.set_num_threads(options.threads)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.ops = options.ops or list(OPS)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"no operator {', '.join(unknown)}; there are {', '.join(OPS)}")
    if options.serve:
        return serve(options)
    return compare(options) if options.compare else run(options)


def import_from(tree: Path) -> None:
    """lsm_cuda of ``tree``, measured by the harness of this tree."""
    sys.path.insert(0, str(tree))
    import lsm_cuda

    if tree != ROOT:
        harness = ROOT / "lsm_cuda" / "bench"
        spec = importlib.util.spec_from_file_location(
            "lsm_cuda.bench", harness / "__init__.py", submodule_search_locations=[str(harness)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["lsm_cuda.bench"] = lsm_cuda.bench = module
        spec.loader.exec_module(module)
        assert Path(lsm_cuda.__file__).is_relative_to(tree)


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is timed, as json: one per operator, shape and dtype."""
    from lsm_cuda.bench import registry

    found = [
        (n, {"op": op, "text": s.text, "packed": s.packed, "dtype": str(dtype)[6:], "modes": modes})
        for op in options.ops
        for n, (s, modes) in enumerate(registry.cells(registry.OPS[op], options.device))
        if re.search(options.only, str(s))
        for dtype in registry.DTYPES[options.device]
    ]
    return [cell for _, cell in sorted(found, key=lambda cell: cell[0])]


def clock(device: str) -> Any:
    from lsm_cuda.bench.measure import CudaClock, HostClock

    return CudaClock() if device == "cuda" else HostClock()


def run(options: argparse.Namespace) -> int:
    import torch

    from lsm_cuda.bench.measure import Checked, environment, measure
    from lsm_cuda.bench.registry import DTYPES, OPS, Shape
    from lsm_cuda.bench.results import save
    from lsm_cuda.bench.roofline import ceilings

    where = environment(options.device)
    where["ceilings"] = ceilings(options.device, DTYPES[options.device])
    record: dict[str, Any] = {"environment": where, "rows": []}
    ticks, checked, path = clock(options.device), Checked(), None
    deadline = time.monotonic() + 60 * options.minutes
    todo = cells(options)
    for n, cell in enumerate(todo):
        if time.monotonic() > deadline:
            print(f"{len(todo) - n} of {len(todo)} shapes were not reached")
            break
        for row in measure(
            OPS[cell["op"]],
            Shape(cell["text"], cell["packed"]),
            getattr(torch, cell["dtype"]),
            options.device,
            cell["modes"],
            ticks,
            seconds=options.seconds,
            patience=options.patience,
            checked=checked,
        ):
            record["rows"].append(row)
            print(show(row), flush=True)
        path = save(
            record, options.out, "default_allocator" if options.default_allocator else "ops"
        )
    print(f"written: {path}")
    return 0


def show(row: dict[str, Any]) -> str:
    cell = f"{row['op']} {row['shape']} {row['dtype']:9} {row['mode']:9} {row['implementation']:20}"
    if "skipped" in row:
        return f"{cell} skipped: {row['skipped']}"
    ratio = f"{row['ratio']:8.2f}x" if "ratio" in row else " " * 9
    spread = f"[{row['q1']:.4f}, {row['q3']:.4f}]"
    return f"{cell} {row['timing']:6} {row['ms']:10.4f} ms {ratio}  {spread}"


# --- two commits


def compare(options: argparse.Namespace) -> int:
    trees = {"then": checkout(options.compare), "now": ROOT}
    for tree in trees.values():
        build(tree, options.device)
    then, now = (Served(tree, options) for tree in trees.values())
    slower = 0
    for cell in cells(options):
        for mode in cell["modes"]:
            ask = json.dumps({**cell, "mode": mode, "seconds": options.seconds / TURNS})
            name = f"{cell['op']} {cell['text']} {cell['dtype']:9} {mode:9}"
            before: list[float] = []
            after: list[float] = []
            for _ in range(TRIES):
                for _ in range(TURNS):
                    before += then.samples(ask)
                    after += now.samples(ask)
                if not before or not after or not is_slower(after, before):
                    break
            if not before or not after:
                print(f"{name} not in {'this tree' if before else options.compare}")
                continue
            slower += is_slower(after, before)
            print(
                f"{name} {median(before):10.4f} ms then, {median(after):10.4f} now: "
                f"{median(before) / median(after):.2f}x (best {min(before) / min(after):.2f}x)",
                flush=True,
            )
    if slower:
        print(f"{slower} cells are more than a tenth slower than {options.compare}")
    if (load := os.getloadavg()[0]) > options.threads:
        print(f"this machine was busy (load {load:.1f}): repeat before believing it")
    return 1 if slower else 0


def is_slower(after: list[float], before: list[float]) -> bool:
    """By more than a tenth, in the middle and at best."""
    return all(f(after) > LOSS * f(before) for f in (median, min))


def checkout(rev: str) -> Path:
    """The files of a commit under build/compare/; builds there are kept."""
    name = subprocess.run(
        ["git", "rev-parse", "--short", f"{rev}^{{commit}}"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    tree = ROOT / "build" / "compare" / name
    tree.mkdir(parents=True, exist_ok=True)
    archive = subprocess.Popen(["git", "archive", name], cwd=ROOT, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "--skip-old-files", "-C", tree], stdin=archive.stdout, check=True)
    return tree


def build(tree: Path, device: str) -> None:
    print(f"building {tree}", file=sys.stderr)
    environment = {"LSM_BUILD_CUDA": "0"} if device == "cpu" else {}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree, check=True, stdout=subprocess.DEVNULL, env=os.environ | environment,
    )  # fmt: skip


class Served:
    """A process that times the operators of one tree on request."""

    def __init__(self, tree: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", tree, "--device", options.device]
        self.process = subprocess.Popen(
            [*map(str, command), "--threads", str(options.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def samples(self, ask: str) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(ask + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        times: list[float] = json.loads(answer)
        return times


def serve(options: argparse.Namespace) -> int:
    import torch

    from lsm_cuda.bench.measure import OURS, race, runner
    from lsm_cuda.bench.peers import ours
    from lsm_cuda.bench.registry import OPS, Shape

    ticks, asked, sampler = clock(options.device), "", None
    for line in sys.stdin:
        cell = json.loads(line)
        op, shape = OPS.get(cell["op"]), Shape(cell["text"], cell["packed"])
        if line != asked:
            asked, sampler = line, None
            if op is not None:
                x = op.make(shape, getattr(torch, cell["dtype"]), options.device)
                run = runner(ours(op, cell["mode"]), op, x, shape, cell["mode"])
                sampler = ticks.sampler("eager", [run])
        times = race({OURS: sampler}, cell["seconds"])[OURS] if sampler else []
        print(json.dumps(times), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
