"""Everything a GPU can tell about this tree, in one command and within a time budget.

    python benchmarks/gpu_suite.py --minutes 8 --pack build/gpu_pack --out results

Checks first (fp64, sanitizers, graphs, streams, memory), then timings, most important first, until
the time is up. OUT/<device>/ops.json is rewritten after each item, so that a kill loses one item;
each item runs in a process that is replaced when it dies or hangs. Needs torch and the built
libraries, in the tree or in a folder that pack.py made; builds only with --build. --dry-run puts
the emulator in the GPU's place: the same code on small shapes, with times that mean nothing and
that report.py refuses.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
MARGIN = 3.0  # seconds kept for the summary


@dataclasses.dataclass(frozen=True)
class Item:
    """A function of gpu_checks, its arguments, and seconds until its process is killed."""

    name: str
    function: str
    arguments: tuple[Any, ...] = ()
    limit: float = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--pack", type=Path, help="folder made by pack.py")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_suite")
    parser.add_argument("--ops", nargs="*", help="default: all")
    parser.add_argument("--only", default="", help="regular expression: items to run")
    parser.add_argument("--cases", type=int, help="cases per operator at most")
    parser.add_argument("--build", action="store_true", help="build the libraries first")
    parser.add_argument("--dry-run", action="store_true", help="the emulator in the GPU's place")
    parser.add_argument("--probe", nargs="+", metavar="OP", help=argparse.SUPPRESS)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    if options.build:
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True)
    if options.pack:
        unpack(options.pack)
    if options.probe:
        import gpu_checks

        return gpu_checks.probe(device(options.dry_run), options.probe, options.cases)
    return run(options, deadline)


def unpack(pack: Path) -> None:
    """Libraries into the tree; the program of rates where all processes find it; peers' wheels onto
    their path."""
    for file in (pack / "lsm_cuda").glob("*"):
        shutil.copy2(file, ROOT / "lsm_cuda")
    os.environ["LSM_COMMIT"] = (pack / "commit").read_text().strip()
    if (pack / "micro").is_file():
        program = Path(tempfile.mkdtemp()) / "micro"  # a pack may have lost what may be executed
        shutil.copy(pack / "micro", program)
        program.chmod(0o755)
        os.environ["LSM_MICRO"] = str(program)
    site = pack / "site"
    for wheel in (pack / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    sys.path.append(str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*filter(None, [os.environ.get("PYTHONPATH")]), str(site.resolve())]
    )


def device(dry_run: bool) -> Any:
    import gpu_checks

    return gpu_checks.StandIn() if dry_run else gpu_checks.Gpu()


def run(options: argparse.Namespace, deadline: float) -> int:
    from lsm_cuda.bench.results import save

    record: dict[str, Any] = {"environment": {}, "items": [], "rows": []}
    worker = Worker(options.dry_run)
    path = None

    def do(item: Item) -> bool:
        """Whether there was time for it; what it found is on disk when this returns."""
        nonlocal path
        left = deadline - time.monotonic() - MARGIN
        if left < 1:
            return False
        entry = worker.do(item, min(item.limit, left))
        result = entry.pop("result", {})
        record["rows"] += result.pop("rows", [])
        record["items"].append(entry if item == FIRST else entry | result)
        if item == FIRST:
            record["environment"] = result
        path = save(record, options.out)
        print(f"{entry['status']:8} {entry['seconds']:7.1f} s  {item.name}", flush=True)
        for line in entry.get("error", "").splitlines()[-1:]:
            print(f"         {line}")
        return True

    planned = [FIRST]
    try:
        if do(FIRST) and record["environment"]:
            planned += items(options, record["environment"])
            for item in planned[1:]:
                if not do(item):
                    break
    finally:
        worker.close()
    return summarise(record, len(planned), path)


FIRST = Item("environment", "environment")


def items(options: argparse.Namespace, environment: dict[str, Any]) -> list[Item]:
    """Everything after the first item, in order of importance."""
    return [i for i in all_items(options, environment) if re.search(options.only, i.name)]


def all_items(options: argparse.Namespace, environment: dict[str, Any]) -> Iterator[Item]:
    import gpu_checks

    from lsm_cuda.bench import registry

    ops, rows = (
        [op for op in table if not options.ops or op in options.ops]
        for table in (gpu_checks.TEST_OPS, gpu_checks.ROWS)
    )
    for op in ops:
        yield Item(f"correct {op}, a fifth", "correct", (op, 0, 5, options.cases), 90)
    for op in rows:
        yield Item(f"correct {op}", "row", (op,), 90)
    for kind in ("graph", "stream", "guard"):
        for op in (*ops, *rows):
            yield Item(f"{kind} {op}", kind, (op,))
    for kind in ("memory", "long"):
        for op in ops:
            yield Item(f"{kind} {op}", kind, (op,))
    for name in gpu_checks.FAMILIES:
        yield Item(f"family {name}", "family", (name,))
    for dtype, D in (("f16", 64), ("bf16", 128))[: 1 if options.dry_run else 2]:
        yield Item(f"paths of attention {dtype} {D}", "paths", (dtype, D), 90)
    if not options.dry_run:
        yield Item("rates", "rates")
    if ops:
        yield Item("sanitizers", "sanitize", (ops, options.cases, 120.0), 130)
    if rows:
        yield Item("sanitizers, other operators", "sanitize", (rows, options.cases, 60.0), 70)
    timed = [op for op in registry.OPS.values() if not options.ops or op.name in options.ops]
    machine = "emulator" if options.dry_run else "cuda"
    seconds = 0.0 if options.dry_run else 0.25
    found = gpu_checks.peers_of("cpu" if options.dry_run else "cuda")
    found = [peer for peer in found if peer.name not in environment["skipped"]]
    columns = {op: registry.cells(op, machine) for op in timed}
    for n in range(max(map(len, columns.values()), default=0)):
        for peer in (None, *found):
            for op, shapes in columns.items():
                if n >= len(shapes):
                    continue
                shape, modes = shapes[n]
                if peer and not any(peer.call(op, shape, mode) for mode in modes):
                    continue
                name = peer.name if peer else None
                title = f"time {op.name} {shape}" + (f" beside {name}" if name else "")
                arguments = (op.name, shape.text, shape.packed, list(modes), name, seconds)
                yield Item(title, "timings", arguments, 120)
        if n == 1:  # the reference shapes are timed; the rest of the cases before the other shapes
            for op in ops:
                for first in range(1, 5):
                    part = (op, first, 5, options.cases)
                    yield Item(f"correct {op}, fifth {first + 1}", "correct", part, 90)
    yield Item("tests", "tests", (300.0,), 310)


def summarise(record: dict[str, Any], planned: int, path: Path | None) -> int:
    counts: dict[str, int] = {}
    for entry in record["items"]:
        counts[entry["status"]] = counts.get(entry["status"], 0) + 1
    print("\n" + ", ".join(f"{n} {status}" for status, n in counts.items())
          + f", {planned - len(record['items'])} of {planned} items not reached, "
          f"{len(record['rows'])} rows: {path}")  # fmt: skip
    bad = [e["name"] for e in record["items"] if e["status"] not in ("ok", "skipped")]
    print("\n".join(f"not ok: {name}" for name in bad))
    if record["environment"].get("emulated"):
        print("dry run: the emulator stood in for the GPU; its times mean nothing")
    return 1 if bad or not record["environment"] else 0


# --- one process for all items, as long as it lives


class Worker:
    """Runs items in another process; a crash or a hang costs the item and a new process."""

    def __init__(self, dry_run: bool, module: str = "gpu_checks") -> None:
        self.start = (dry_run, module)
        self.process: Any = None

    def do(self, item: Item, limit: float) -> dict[str, Any]:
        begun = time.monotonic()
        if self.process is None:
            spawn = multiprocessing.get_context("spawn")
            self.pipe, theirs = spawn.Pipe()
            self.process = spawn.Process(target=serve, args=(theirs, *self.start))
            self.process.start()
            theirs.close()
            self.pipe.recv()  # it leads its group now
        try:
            self.pipe.send(item)
            if self.pipe.poll(limit):
                entry = self.pipe.recv()
            else:
                entry = {"status": "killed", "error": f"not finished after {limit:.0f} s"}
        except (EOFError, OSError):
            self.process.join()
            entry = {"status": "crashed", "error": f"the process ended: {self.process.exitcode}"}
        if entry["status"] in ("killed", "crashed") or entry.pop("device_lost", False):
            self.close()
        return {"name": item.name, "seconds": round(time.monotonic() - begun, 2)} | entry

    def close(self) -> None:
        """With all that it started: the process leads a group of its own."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
            self.process = None


def serve(pipe: Connection, dry_run: bool, module: str) -> None:
    """The other process: items in, results out."""
    os.setsid()
    pipe.send("ready")
    checks = importlib.import_module(module)
    machine = None
    while True:
        try:
            item = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            machine = machine or device(dry_run)
            result = getattr(checks, item.function)(machine, *item.arguments)
            entry = {"status": "ok" if result.get("ok", True) else "failed", "result": result}
        except Exception as error:
            skipped = type(error).__name__ == "Skip"
            text = str(error) if skipped else "".join(traceback.format_exception(error))[-3000:]
            entry = {"status": "skipped" if skipped else "failed", "error": text}
        try:
            if machine is not None:
                machine.synchronize()
        except RuntimeError:  # an error that stays with the device until the process ends
            entry["device_lost"] = True
        try:
            pipe.send(entry)
        except OSError:  # nobody waits any more
            return


if __name__ == "__main__":
    sys.exit(main())
