"""``lsm bench``: this machine's times beside what else is installed, or beside its own limits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..bench.measure import OURS, CudaClock, HostClock, Row, environment, measure
from ..bench.peers import PEERS
from ..bench.registry import DTYPES, OPS, Op, Shape, sets
from ..bench.roofline import ceilings, floor_ms, fraction
from ..train import pick_device

__all__ = ["BenchConfig", "run_bench"]

QUICK = {"cpu": ("lengths", "decode"), "cuda": ("short", "decode")}  # of the registry's sets
QUICK_PEERS = [peer for peer in PEERS if peer.longest >= 2**14]  # a loop's one call may take it all
OTHERS = "others over ours"
MODES = {"forward": "fwd", "training": "fwd+bwd", "step": "step"}


@dataclass(frozen=True)
class BenchConfig:
    """What is timed; ``ops`` empty: all."""

    ops: tuple[str, ...] = ()
    out: Path = Path("bench.png")
    seconds: float = 45.0
    device: str = "auto"
    roofline: bool = False
    longest: int = 1024  # tokens; what attention takes grows with the square


def run_bench(config: BenchConfig, console: Console) -> list[Row]:
    """Time, print a table and draw; returns the rows.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: an operator or device that is not there.
        WrongResultError: an operator computes something wrong here.
    """
    from ..bench.plots import plot_ratio, plot_roofline  # a missing package should show now

    device = pick_device(config.device).type
    if unknown := set(config.ops) - set(OPS):
        raise ValueError(f"no operator {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    deadline = time.perf_counter() + config.seconds
    console.print("measuring what a copy and a matrix product reach …")
    where = environment(device)
    where["ceilings"] = ceilings(device, DTYPES[device], config.seconds / 100)
    rows, left = timed(config, device, deadline, console)
    if config.roofline:
        console.print(limits_line(where))
        console.print(roofline_table(rows, where))
    else:
        console.print(peers_table(rows, where))
    if left:
        console.print(f"{left} shapes were not reached; give it more time with --seconds")
    for name, reason in skipped(rows).items():
        console.print(f"[dim]{escape(f'not timed: {name}: {reason}')}[/]", soft_wrap=True)
    plot = (plot_roofline if config.roofline else plot_ratio)(rows, where, config.out)
    console.print(f"plot: {escape(str(plot.resolve()))}", soft_wrap=True)
    return rows


def timed(
    config: BenchConfig, device: str, deadline: float, console: Console
) -> tuple[list[Row], int]:
    """Rows until the deadline or Ctrl-C, and how many cells it cut off."""
    todo = list(cells(config, device))
    clock = CudaClock() if device == "cuda" else HostClock()
    rows: list[Row] = []
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(todo))
        for done, (op, shape, modes) in enumerate(todo):
            bar.update(task, description=f"{op.name} {shape}")
            share = (deadline - time.perf_counter()) / (len(todo) - done)
            if share <= 0 and rows:
                return rows, len(todo) - done
            try:
                rows += measure(
                    op, shape, DTYPES[device][0], device, modes, clock,
                    peers=() if config.roofline else QUICK_PEERS,
                    seconds=max(0.0, share) / 10,
                    patience=share / 10,  # every operator is to have its turn
                    tokens=64,
                )  # fmt: skip
            except KeyboardInterrupt:
                return rows, len(todo) - done
            bar.advance(task)
    return rows, 0


def cells(config: BenchConfig, device: str) -> Iterator[tuple[Op, Shape, tuple[str, ...]]]:
    """Shape by shape, all operators of each."""
    found = [
        (QUICK[device].index(s.name), n, op, shape, s.modes)
        for op in (OPS[name] for name in config.ops or OPS)
        for s in sets(op, device)
        if s.name in QUICK[device]
        for n, shape in enumerate(s.shapes)
        if shape["T"] <= config.longest or "step" in s.modes
    ]
    yield from (cell[2:] for cell in sorted(found, key=lambda cell: cell[:2]))


def skipped(rows: list[Row]) -> dict[str, str]:
    """Peers without a single time, and why."""
    found = {r["implementation"]: r["skipped"] for r in rows if "skipped" in r}
    there = {r["implementation"] for r in rows if "ms" in r}
    return {name: reason for name, reason in found.items() if name not in there}


def ours_in(rows: list[Row]) -> Iterator[tuple[Row, list[str]]]:
    """Our rows, each with the cells that start its line."""
    for row in rows:
        if row["implementation"] == OURS:
            mode = MODES[row["mode"]] + (" graph" if row["timing"] == "graph" else "")
            yield row, [row["op"], mode, row["shape"], f"{row['ms']:.3g}"]


def table(title: str, *headings: str) -> Table:
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        # 80 columns are to do: shapes and what others take may wrap, our numbers may not
        left = i < 3 or heading == OTHERS
        wraps = heading in ("shape", OTHERS)
        made.add_column(heading, justify="left" if left else "right", no_wrap=not wraps)
    return made


def peers_table(rows: list[Row], where: dict[str, Any]) -> Table:
    title = f"{where.get('gpu') or where['cpu']}: time of others over ours"
    made = table(title, "op", "", "shape", "ours, ms", OTHERS)
    for row, start in ours_in(rows):
        same = [
            f"{r['implementation']} {r['ratio']:.3g}×"
            for r in rows
            if "ratio" in r
            and all(r[k] == row[k] for k in ("op", "mode", "shape", "dtype", "timing"))
        ]
        made.add_row(*start, ", ".join(same) or "–")
    return made


def roofline_table(rows: list[Row], where: dict[str, Any]) -> Table:
    title = f"{where.get('gpu') or where['cpu']}: share of the floor"
    made = table(title, "op", "", "shape", "ours, ms", "GB/s", "GFLOP/s", "limit", "reached")
    for row, start in ours_in(rows):
        _, limit = floor_ms(row, where)
        made.add_row(
            *start,
            f"{row['minimal_bytes'] / row['ms'] / 1e6:.3g}",
            f"{row['minimal_flops'] / row['ms'] / 1e6:.3g}",
            limit,
            f"{fraction(row, where):.0%}",
        )
    return made


def limits_line(where: dict[str, Any]) -> str:
    limits = where["ceilings"]
    rates = ", ".join(f"{f / 1e9:.4g} GFLOP/s {d}" for d, f in limits["flops_per_second"].items())
    threads = f" on {torch.get_num_threads()} threads" if "gpu" not in where else ""
    return f"this machine{threads}: {limits['bytes_per_second'] / 1e9:.3g} GB/s, {rates}"
