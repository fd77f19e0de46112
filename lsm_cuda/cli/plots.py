"""The demo's picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter
except ImportError as error:
    raise ImportError("plots need the matplotlib package: pip install 'lsm-cuda[cli]'") from error

from .decode_cost import DecodeCost

__all__ = ["plot_demo"]

GLA, ATTENTION, QUIET = "#1f6feb", "#d9822b", "#9aa4b2"


def plot_demo(
    path: Path,
    losses: Sequence[float],
    held_out: tuple[float, float],
    gla: DecodeCost,
    attention: DecodeCost,
) -> Path:
    """Loss curve, time per generated token, and memory; returns ``path``.

    Args:
        path: PNG to write.
        losses: nats per step.
        held_out: bits per byte before and after training.
        gla, attention: costs of a step.
    """
    figure = Figure(figsize=(13.5, 4.2), dpi=130, layout="constrained")
    loss_axes, time_axes, memory_axes = figure.subplots(1, 3)
    _plot_loss(loss_axes, losses, held_out)
    _plot_cost(
        time_axes,
        "Time per generated token",
        "milliseconds",
        [(gla, [s * 1e3 for s in gla.seconds]), (attention, [s * 1e3 for s in attention.seconds])],
        "{:.2f} ms",
    )
    _plot_cost(
        memory_axes,
        "Memory carried between tokens",
        "MiB",
        [
            (gla, [n / 2**20 for n in gla.nbytes]),
            (attention, [n / 2**20 for n in attention.nbytes]),
        ],
        "{:.3g} MiB",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _plot_loss(axes: Any, losses: Sequence[float], held_out: tuple[float, float]) -> None:
    bits = [loss / math.log(2) for loss in losses]
    smooth: list[float] = []
    average = 0.0
    keep = 0.5 ** (1 / max(1.0, len(bits) / 60))  # forgets half in a sixtieth of the run
    for step, value in enumerate(bits, 1):
        average = keep * average + (1 - keep) * value
        smooth.append(average / (1 - keep**step))  # undoes the start from zero
    steps = range(1, len(bits) + 1)
    axes.plot(steps, bits, color=QUIET, linewidth=0.6, alpha=0.6)
    axes.plot(steps, smooth, color=GLA, linewidth=2, label="training, smoothed")
    axes.plot(
        [0, len(bits)], held_out, "o", color="#24292f", label="held out, before and after", zorder=3
    )
    axes.annotate(
        f"{held_out[1]:.2f}",
        (len(bits), held_out[1]),
        xytext=(0, -15),
        textcoords="offset points",
        ha="right",
        fontweight="bold",
    )
    axes.set_ylim(0, 1.05 * max(*bits, *held_out))
    axes.legend(frameon=False, loc="upper right")
    _dress(axes, "Byte-level GLA model", "step", "bits per byte")


def _plot_cost(
    axes: Any,
    title: str,
    unit: str,
    curves: list[tuple[DecodeCost, list[float]]],
    label: str,
) -> None:
    names = (("GLA, recurrent state", GLA), ("softmax attention, KV cache", ATTENTION))
    below_and_above = (-14, 7)  # GLA's label goes under its curve, out of the way of the other
    for (cost, values), (name, color), shift in zip(curves, names, below_and_above, strict=True):
        axes.plot(cost.contexts, values, "o-", color=color, linewidth=2, markersize=5, label=name)
        axes.annotate(
            label.format(values[-1]),
            (cost.contexts[-1], values[-1]),
            xytext=(0, shift),
            textcoords="offset points",
            ha="right",
            color=color,
            fontweight="bold",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(curves[0][0].contexts)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 2.5)  # room for the labels and the legend
    axes.legend(frameon=False, loc="upper left")
    _dress(axes, title, "context, bytes", unit)


def _dress(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, which="major", color="#e5e9ef")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
