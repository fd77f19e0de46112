"""Pictures of results: time against length, the share of the floor, and ratios to each peer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
except ImportError as error:
    raise ImportError("plots need the matplotlib package: pip install 'lsm-cuda[cli]'") from error

from .measure import OURS, Row
from .roofline import fraction

__all__ = ["PLOTS", "plot_ratio", "plot_roofline", "plot_time"]

COLORS = (
    "#d9822b", "#2da44e", "#8250df", "#bf3989", "#57606a", "#9a6700", "#0a7ea4", "#cf222e",
    "#7fd1c7", "#b6a6ff", "#116329", "#f2b8d0",
)  # fmt: skip
OUR_COLOR, GRID = "#1f6feb", "#e5e9ef"
Metadata = dict[str, str]


def color(name: str, names: Sequence[str]) -> str:
    return OUR_COLOR if name == OURS else COLORS[[*names].index(name) % len(COLORS)]


def peers_in(rows: Sequence[Row]) -> list[str]:
    return sorted({r["implementation"] for r in rows if r["implementation"] != OURS})


def family(row: Row) -> tuple[str, ...]:
    """What stays the same along a curve over T."""
    return row["op"], row["mode"], row["dtype"], re.sub(r"T\d+ ", "", row["shape"])


def tokens(row: Row) -> int:
    (T,) = re.findall(r"T(\d+)", row["shape"])
    return int(T)


def timed(rows: Sequence[Row]) -> list[Row]:
    """Rows with a time, by a graph where there is one."""
    graph = {
        (*family(r), tokens(r), r["implementation"]) for r in rows if r.get("timing") == "graph"
    }
    return [
        r
        for r in rows
        if "ms" in r
        and (r["timing"] == "graph" or (*family(r), tokens(r), r["implementation"]) not in graph)
    ]


def save(figure: Any, path: Path, metadata: Metadata) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata=metadata)
    return path


def plot_time(rows: Sequence[Row], environment: dict[str, Any], path: Path, **note: str) -> Path:
    """Milliseconds against T, of the first dtype: a panel per operator and mode."""
    rows = timed(rows)
    rows = [r for r in rows if r["dtype"] == rows[0]["dtype"]]
    names = peers_in(rows)
    lengths: dict[tuple[str, ...], set[int]] = {}
    for row in rows:
        lengths.setdefault(family(row), set()).add(tokens(row))
    panels = [f for f, ts in lengths.items() if len(ts) > 1 and f[1] != "step"]
    columns = min(4, len(panels)) or 1
    lines = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(3.6 * columns, 3.0 * lines), dpi=110, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    drawn: dict[str, Any] = {}
    for panel, axes in zip(panels, grid, strict=False):  # takes no axes more than it needs
        for name in (OURS, *names):
            curve = sorted(
                (tokens(r), r["ms"])
                for r in rows
                if family(r) == panel and r["implementation"] == name
            )
            if curve:
                x, y = zip(*curve, strict=True)
                (drawn[name],) = axes.plot(
                    x, y, "o-", color=color(name, names), linewidth=1.8, markersize=4
                )
        op, mode, dtype, rest = panel
        log_axes(axes, sorted(lengths[panel]))
        dress(axes, f"{op}, {mode}", f"T  ({rest}, {dtype})", "ms")
    for axes in [*grid]:  # what is left over
        axes.set_visible(False)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, frameon=False)
    return save(figure, path, note)


def plot_ratio(rows: Sequence[Row], environment: dict[str, Any], path: Path, **note: str) -> Path:
    """Each peer's time over ours, a dot per shape and dtype; right of 1 we are faster."""
    rows = [r for r in timed(rows) if "ratio" in r]
    names = peers_in(rows)
    dots = {
        name: [(line(r), r["ratio"]) for r in rows if r["implementation"] == name] for name in names
    }
    colors = {name: color(name, names) for name in names}
    figure, axes = strips(dots, colors, "Time of a peer over ours in the same run")
    axes.axvline(1, color="#24292f", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    return save(figure, path, note)


def plot_roofline(
    rows: Sequence[Row], environment: dict[str, Any], path: Path, **note: str
) -> Path:
    """The share of our time that the machine's limits alone would take, a dot per shape."""
    rows = [r for r in timed(rows) if r["implementation"] == OURS]
    dtypes = [*dict.fromkeys(r["dtype"] for r in rows)]
    dots: dict[str, list[tuple[str, float]]] = {dtype: [] for dtype in dtypes}
    for row in rows:
        dots[row["dtype"]].append((line(row), fraction(row, environment)))
    colors = dict(zip(dtypes, (OUR_COLOR, *COLORS), strict=False))
    figure, axes = strips(dots, colors, "Share of the floor reached")
    axes.set_xlim(0, max([1.0, *(1.05 * share for each in dots.values() for _, share in each)]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    return save(figure, path, note)


def line(row: Row) -> str:
    return f"{row['op']}, {row['mode']}"


def strips(
    dots: dict[str, list[tuple[str, float]]], colors: dict[str, str], title: str
) -> tuple[Any, Any]:
    """Dots by name, in horizontal lines by label."""
    labels = sorted({label for each in dots.values() for label, _ in each})
    figure = Figure(figsize=(8, 1.3 + 0.27 * len(labels)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, each in dots.items():
        y = [labels.index(label) for label, _ in each]
        x = [value for _, value in each]
        axes.plot(x, y, "o", color=colors[name], label=name, markersize=5, alpha=0.75)
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    dress(axes, title, "", "")
    if dots:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure, axes


PLOTS = {"time": plot_time, "ratio": plot_ratio, "roofline": plot_roofline}


def log_axes(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize="medium")
    axes.set_xlabel(x, fontsize="small")
    axes.set_ylabel(y, fontsize="small")
    axes.grid(True, which="major", color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
