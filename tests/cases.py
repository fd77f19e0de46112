"""What is tested: one row per operator, and the values that break kernels, paired two by two.

Adding an operator is one row in OPS. A case is drawn for each pair of values of any two axes
below (T = 65 with g = -80, bf16 with 33 columns, ...), which finds what a full product finds at a
hundredth of its size.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from definitions import quadratic_gla

import lsm_cuda
from lsm_cuda import reference

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


@dataclass(frozen=True)
class Op:
    """An operator of the chunk engine: its implementations and the shapes of its arguments."""

    name: str  # torch.ops.lsm.<name>_fwd, <name>_bwd and <name>_step
    chunk: Callable
    step: Callable
    reference: Callable
    quadratic: Callable  # a second definition that shares nothing with the first
    tensors: dict[str, str] = field(hash=False)  # differentiable arguments in order, with dims
    state: str = "N HV K V"

    def raw(self, kind: str, namespace: str = "lsm"):
        return getattr(getattr(torch.ops, namespace), f"{self.name}_{kind}").default

    def __str__(self) -> str:
        return self.name


GLA = Op(
    name="gla",
    chunk=lsm_cuda.ops.chunk_gla,
    step=lsm_cuda.ops.gla_step,
    reference=reference.gated_linear_attention,
    quadratic=quadratic_gla,
    tensors={"q": "B T H K", "k": "B T H K", "v": "B T HV V", "g": "B T HV K"},
)
OPS = [GLA]


@dataclass(frozen=True)
class Case:
    """One call. ``batch``: rows, or the dtype of cu_seqlens for sequences packed into one row."""

    op: Op
    T: int = 65
    heads: tuple[int, int] = (1, 1)  # H of q and k, HV of v and g
    dims: tuple[int, int] = (16, 16)  # K, V
    dtype: str = "f32"  # of q, k, v; "bf16+f32" has gates in float32
    gate: str = "mixed"
    batch: int | str = 1
    state: str = "none"  # which of initial and final state take part: none, initial, final, both
    layout: str = "contiguous"
    scale: float | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype.split("+")[0]]

    @property
    def gate_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype.split("+")[-1]]

    @property
    def varlen(self) -> bool:
        return isinstance(self.batch, str)

    @property
    def work(self) -> int:
        """State elements touched, which is what the reference's time and memory follow."""
        rows = 1 if self.varlen else self.batch
        return rows * self.T * self.heads[1] * self.dims[0] * self.dims[1]

    def __str__(self) -> str:
        H, HV = self.heads
        K, V = self.dims
        batch = f"cu_{self.batch}" if self.varlen else f"B{self.batch}"
        scale = "" if self.scale is None else f"-scale{self.scale}"
        return (
            f"{self.op}-T{self.T}-H{H}x{HV}-K{K}V{V}-{self.dtype}-g_{self.gate}-{batch}-{self.state}-{self.layout}"
            + scale
        )


AXES = {
    "T": [1, 15, 16, 17, 63, 64, 65, 200, 1000],
    "gate": ["0", "-1e-3", "-1", "-8", "-80", "-1e4", "-inf", "mixed", "resets", "positive"],
    "dims": [(16, 16), (1, 7), (7, 33), (33, 1), (64, 32), (32, 128), (256, 33), (33, 256)],
    "dtype": ["f32", "bf16", "f16", "f64", "bf16+f32", "f16+f32"],
    "heads": [(1, 1), (2, 2), (2, 4), (1, 3)],
    "batch": [1, 2, "int32", "int64"],
    "state": ["none", "initial", "final", "both"],
    "layout": ["contiguous", "transposed", "sliced", "expanded", "offset"],
    "scale": [None, 0.3],
}
MAX_WORK = 6_000_000  # keeps the fp64 recurrence with autograd under two seconds

# The emulator runs a warp at a time: fewer tokens and heads, the same gates, dtypes, layouts and
# odd sizes.
EMULATOR_AXES = AXES | {
    "T": [1, 15, 16, 17, 63, 65, 130],
    "dims": [(16, 16), (1, 7), (7, 33), (64, 32), (256, 16), (16, 256)],
    "dtype": ["f32", "bf16", "f16", "bf16+f32"],
    "heads": [(1, 1), (1, 2)],
}
EMULATOR_WORK = 200_000


def edge_cases(op: Op) -> list[Case]:
    """Calls with nothing to do; kept out of the pairs, where they would hide the other axes."""
    return [
        Case(op, T=0),
        Case(op, T=0, state="both", batch=2),
        Case(op, T=0, state="both", batch="int64"),
        Case(op, T=0, state="final", dtype="bf16"),
        Case(op, batch=0),
        Case(op, batch=0, state="both", heads=(1, 2)),
        Case(op, batch=0, T=0, dtype="f16"),
    ]


def pairwise(
    axes: dict[str, list], allowed: Callable[[dict], bool], seed: int = 0
) -> Iterator[dict]:
    """Rows that hold every allowed pair of values of two axes; greedy, alike in every process."""
    rng = random.Random(seed)
    names = list(axes)
    missing = {
        (a, i, b, j): None  # a dict for its order
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }

    def covers(row: dict[str, int]) -> list[tuple]:
        pairs = ((a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2))
        return [p for p in pairs if p in missing]

    while missing:
        a, i, b, j = wanted = next(iter(missing))
        best: dict[str, int] = {}
        for _ in range(12):
            row = {n: rng.randrange(len(axes[n])) for n in names} | {a: i, b: j}
            if allowed({n: axes[n][row[n]] for n in names}) and (
                not best or len(covers(row)) > len(covers(best))
            ):
                best = row
        if best:
            yield {n: axes[n][best[n]] for n in names}
            for pair in covers(best):
                del missing[pair]
        else:
            del missing[wanted]


@functools.cache
def cases(op: Op, impl: str) -> list[Case]:
    """The cases of one operator on one implementation: cpu, emulator or cuda."""
    axes = EMULATOR_AXES if impl == "emulator" else AXES
    limit = EMULATOR_WORK if impl == "emulator" else MAX_WORK
    if impl == "cuda":
        axes = axes | {"dtype": [d for d in axes["dtype"] if d != "f64"]}
    rows = pairwise(axes, lambda row: Case(op, **row).work <= limit)
    return edge_cases(op) + [Case(op, **row) for row in rows]
