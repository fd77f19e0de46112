"""What is tested: one row per operator, and the values that break kernels, paired two by two.

Adding an operator is one row in OPS. A case is drawn for each pair of values of any two axes
below (T = 65 with g = -80, bf16 with 33 columns, ...), which finds what a full product finds at a
hundredth of its size. One operator of an engine gets every pair, its siblings SIBLING_PAIRS.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from definitions import quadratic, transition_products

from lsm_cuda import reference
from lsm_cuda.ops import _chunk, _delta

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


@dataclass(frozen=True)
class Op:
    """An operator of an engine: its implementations and the shapes of its arguments."""

    name: str  # torch.ops.lsm.<name>_fwd, <name>_bwd and <name>_step
    chunk: Callable
    step: Callable
    reference: Callable
    quadratic: Callable  # a second definition that shares nothing with the first
    tensors: dict[str, str] = field(hash=False)  # differentiable arguments in order, with dims
    state: str = "N HV K V"
    every_pair: bool = False  # else SIBLING_PAIRS
    # How a tensor is drawn, if it is neither normal nor a gate: inputs.py has the kinds.
    draw: dict[str, str] = field(default_factory=dict, hash=False)
    impls: tuple[str, ...] = ("cpu", "emulator", "cuda")

    @property
    def gated(self) -> bool:
        return "g" in self.tensors

    @property
    def gates(self) -> list[str]:
        return [name for name in ("g", "gv") if name in self.tensors]

    def raw(self, kind: str, namespace: str = "lsm"):
        return getattr(getattr(torch.ops, namespace), f"{self.name}_{kind}").default

    def __str__(self) -> str:
        return self.name


def chunk_op(
    name: str,
    definition: Callable,
    gate: str | None,
    side: str = "key",
    exclusive: bool = False,
    every_pair: bool = False,
    second_gate: str | None = None,
) -> Op:
    """A row of the chunk engine: its gates' dims, and how the definitions see them."""

    def chunk(
        q, k, v, g=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
        gv=None,
    ):  # fmt: skip
        return _chunk.chunk(
            name, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, gv=gv
        )

    def step(q, k, v, g=None, *, state, scale=None, gv=None):
        return _chunk.step(name, q, k, v, g, state, scale, f"chunk_{name}", gv)

    gates = {"g": gate, "gv": second_gate}

    return Op(
        name=name,
        chunk=chunk,
        step=step,
        reference=definition,
        quadratic=functools.partial(quadratic, side=side, exclusive=exclusive),
        tensors={"q": "B T H K", "k": "B T H K", "v": "B T HV V"}
        | {name: dims for name, dims in gates.items() if dims},
        every_pair=every_pair,
    )


GLA = chunk_op("gla", reference.gated_linear_attention, "B T HV K", every_pair=True)
LINEAR_ATTN = chunk_op("linear_attn", reference.linear_attention, None)
OPS = [
    GLA,
    LINEAR_ATTN,
    chunk_op("simple_gla", reference.simple_gated_linear_attention, "B T HV"),
    chunk_op("gla_value", reference.value_gated_linear_attention, "B T HV V", side="value"),
    chunk_op(
        "gla_both", reference.two_sided_gated_linear_attention, "B T HV K", second_gate="B T HV V"
    ),
    chunk_op("rwkv6", reference.rwkv6, "B T HV K", exclusive=True),
]


def delta_op(name: str, definition: Callable, own: dict[str, str], **rest) -> Op:
    """A row of the delta engine; ``own``: what the operator takes beside q, k and v.

    Keys have length 1 and beta is below 1, as in models: longer keys make states that explode.
    """

    def chunk(
        q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **own
    ):
        given = tuple(own.get(n) for n in _delta.TAKES[name])
        return _delta.delta(
            name, q, k, v, given, scale, initial_state, output_final_state, cu_seqlens
        )

    def step(q, k, v, *, state, scale=None, **own):
        given = tuple(own.get(n) for n in _delta.TAKES[name])
        return _delta.delta_step(name, q, k, v, given, state, scale, f"chunk_{name}")

    return Op(
        name=name,
        chunk=chunk,
        step=step,
        reference=definition,
        quadratic=functools.partial(transition_products, name),
        tensors={"q": "B T H K", "k": "B T H K", "v": "B T HV V"} | own,
        draw={"k": "unit", "p": "shrunk k", "a": "unit", "b": "against a", "beta": "strength"},
        **rest,
    )


OPS += [
    delta_op("delta_rule", reference.delta_rule, {"beta": "B T HV"}),
    delta_op("gated_delta_rule", reference.gated_delta_rule, {"g": "B T HV", "beta": "B T HV"}),
    delta_op("kda", reference.kda, {"g": "B T HV K", "beta": "B T HV"}),
    delta_op("comba", reference.comba, {"p": "B T H K", "g": "B T HV", "beta": "B T HV"}),
    delta_op("dplr", reference.dplr, {"a": "B T H K", "b": "B T H K", "g": "B T HV K"}),
]
SCHEMAS = [GLA, LINEAR_ATTN]  # with a gate and without: for what PyTorch's tools see of an operator


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
SIBLING_PAIRS = [
    ("T", "batch"),
    ("T", "heads"),
    ("gate", "dtype"),
    ("gate", "state"),
    ("dims", "dtype"),
    ("dims", "heads"),
    ("layout", "dtype"),
]
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
    axes: dict[str, list],
    pairs: list[tuple[str, str]],
    allowed: Callable[[dict], bool],
    seed: int = 0,
) -> Iterator[dict]:
    """Rows that hold every allowed pair of values of the named pairs of axes; greedy, alike in
    every process."""
    rng = random.Random(seed)
    names = list(axes)
    missing = {
        (a, i, b, j): None  # a dict for its order
        for a, b in pairs
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }

    def covers(row: dict[str, int]) -> list[tuple]:
        held = ((a, row[a], b, row[b]) for a, b in pairs)
        return [p for p in held if p in missing]

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
    if not op.gated:
        axes = axes | {"gate": ["0"], "dtype": [d for d in axes["dtype"] if "+" not in d]}
    pairs = list(itertools.combinations(axes, 2)) if op.every_pair else SIBLING_PAIRS
    rows = pairwise(axes, pairs, lambda row: Case(op, **row).work <= limit)
    return edge_cases(op) + [Case(op, **row) for row in rows]
