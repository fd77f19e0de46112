"""What is measured: operators, shapes, and the bytes and FLOPs no implementation can avoid.

An operator is one row of ROWS, a set of shapes one row of SETS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lsm_cuda
from lsm_cuda import reference

__all__ = [
    "DTYPES",
    "MODES",
    "OPS",
    "ROWS",
    "SETS",
    "Inputs",
    "Op",
    "Set",
    "Shape",
    "cells",
    "sets",
]

Inputs = dict[str, Tensor]
MODES = ("forward", "training", "step")  # training: forward and backward; step: one more token
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16,),
    "emulator": (torch.bfloat16,),
}


@dataclass(frozen=True)
class Shape:
    """Sizes by name, as in ``"B8 T4096 H16 K128 V128"``.

    ``packed``: so many sequences of unequal lengths share the T tokens of one row. HV, the value
    heads, are H unless given, M, the slots, 64; N counts states.
    """

    text: str
    packed: int = 0

    def __str__(self) -> str:
        return f"{self.text} packed {self.packed}" if self.packed else self.text

    @property
    def sizes(self) -> dict[str, int]:
        given = {name: int(n) for name, n in re.findall(r"([A-Z]+)(\d+)", self.text)}
        return {"HV": given.get("H", 1), "M": 64, "N": self.packed or given["B"]} | given

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    def dims(self, names: str) -> tuple[int, ...]:
        """Sizes of a tensor whose dimensions are ``names``, as in ``"B T H K"``."""
        return tuple(self[name] for name in names.split())

    def at(self, T: int) -> Shape:
        """The same at another length."""
        return Shape(re.sub(r"T\d+", f"T{T}", self.text), self.packed)

    def cu_seqlens(self) -> Tensor | None:
        """Boundaries of the packed sequences: the n-th is about n times as long as the first."""
        if not self.packed:
            return None
        share = torch.arange(self.packed + 1, dtype=torch.float64).cumsum(0)
        return (share / share[-1] * self["T"]).round().to(torch.int32)


# How values are drawn, by the last word of an argument's dims; and its dtype, or that of the call.
Draw = tuple[Callable[[Tensor], Tensor], torch.dtype | None]
DRAWS: dict[str, Draw] = {
    "normal": (lambda x: x, None),
    "direction": (lambda x: F.normalize(x, dim=-1), None),
    "unit": (torch.sigmoid, None),
    "positive": (torch.exp, None),
    "gate": (lambda x: F.logsigmoid(x) / 16, torch.float32),  # log decays as in trained models
    "logits": (lambda x: x + 3, None),  # of gates that are mostly open
    "rate": (lambda x: -x.exp(), torch.float32),  # A of state space models
    "step": (lambda x: F.softplus(x - 4), torch.float32),  # dt
}


@dataclass(frozen=True)
class Op:
    """An operator: its names in ``lsm_cuda.ops`` and ``lsm_cuda.reference``, and its arguments.

    ``inputs``: arguments in order, with their dims and, where it is not normal, how they are drawn.
    ``qkv``: which of them are queries, keys and values, if there are such. ``state``: dims of each
    state, matrices with four. ``options``, ``step_options``: further arguments of ``chunk`` and
    ``step``; ``step_names``: names that differ in ``step``. ``adapt``: gives ``reference`` our
    arguments where it has others.
    """

    name: str
    chunk: str  # whole sequences
    step: str  # one token
    reference: str
    inputs: dict[str, str] = field(hash=False)
    qkv: tuple[str, ...] = ("q", "k", "v")
    output: str = "B T HV V"
    state: tuple[str, ...] = ("N HV K V",)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    step_options: dict[str, Any] = field(default_factory=dict, hash=False)
    step_names: dict[str, str] = field(default_factory=dict, hash=False)
    adapt: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda definition: definition
    engine: str = "chunk"  # whose SETS apply

    @property
    def available(self) -> bool:
        """Whether this lsm_cuda has the operator; an older one, under comparison, may not."""
        return hasattr(lsm_cuda.ops, self.chunk) and hasattr(lsm_cuda.ops, self.step)

    def definition(self, x: Inputs) -> Tensor:
        """The output, by the reference."""
        result = self.adapt(getattr(reference, self.reference))(**x)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def dims(self, name: str) -> tuple[str, Draw]:
        """Dims of an input, and how it is drawn."""
        *names, last = self.inputs[name].split()
        if last in DRAWS:
            return " ".join(names), DRAWS[last]
        return self.inputs[name], DRAWS["normal"]

    def per_token(self, name: str) -> bool:
        return "T" in self.inputs[name].split()

    def first_token(self, x: Tensor, dims: str) -> Tensor:
        """Of a tensor with such dims, time among them."""
        return x.select(dims.split().index("T"), 0)

    def make(self, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        """Arguments by name."""
        generator = torch.Generator(device).manual_seed(seed)
        made = {}
        for name in self.inputs:
            dims, (draw, own) = self.dims(name)
            x = torch.randn(shape.dims(dims), generator=generator, device=device)
            made[name] = draw(x).to(own or dtype)
        if (cu_seqlens := shape.cu_seqlens()) is not None:
            made["cu_seqlens"] = cu_seqlens.to(device)
        return made

    def minimal_bytes(self, shape: Shape, dtype: torch.dtype, mode: str) -> int:
        """Every input read once, every output written once, states of a step read and written.

        A backward reads the inputs and the gradient of the output and writes one gradient per
        input; training is forward and backward.
        """
        if mode == "training":
            return sum(self.minimal_bytes(shape, dtype, m) for m in ("forward", "backward"))
        token = shape.at(1) if mode == "step" else shape
        read = 0
        for dims, (_, own) in map(self.dims, self.inputs):
            read += prod(token.dims(dims)) * (own or dtype).itemsize
        output = prod(token.dims(self.output)) * dtype.itemsize
        if mode == "backward":
            return 2 * read + output
        states = sum(prod(token.dims(dims)) for dims in self.state) if mode == "step" else 0
        return read + output + 2 * 4 * states

    def minimal_flops(self, shape: Shape, mode: str) -> int:
        """The fewer of two forms' multiply-adds, for each matrix state: by it, or by all pairs of
        tokens.

        By a state [K, V], a token is written to it and reads from it, 2 KV each; a backward
        rebuilds the state, keeps that of the gradients, and reads dq, dk and dv. By pairs, scores
        cost 2 K and outputs 2 V for each of the (T + 1) / 2 keys of a token; a backward makes
        scores, their gradients, dq, dk and dv. Scaling by decays is of lower order in either form.

        A delta rule's token reads the state once more, for what it erases: 2 KV, and 6 in a
        backward (again, its gradient, and what that takes from the state's); by pairs, scores with
        what is erased, and a sum of values for each, 2 K + 2 V, and 6 K + 6 V in a backward.

        The scan engine's states are numbers: each takes a multiply-add per token, and in a backward
        three, for itself, its gradient and the gate's. What makes gates is not counted.
        """
        if mode == "training":
            return self.minimal_flops(shape, "forward") + self.minimal_flops(shape, "backward")
        T = shape["T"] // max(1, shape.packed)  # a packed sequence, on average
        if self.engine == "scan":
            numbers = sum(prod(shape.dims(dims.removeprefix("N "))) for dims in self.state)
            tokens = shape["B"] * (1 if mode == "step" else shape["T"])
            return tokens * numbers * (6 if mode == "backward" else 2)
        flops = 0
        for _, heads, K, V in (shape.dims(dims) for dims in self.state if len(dims.split()) == 4):
            erased = 1 if self.engine == "delta" else 0
            by_state, by_pairs = {
                "forward": ((4 + 2 * erased) * K * V, (1 + erased) * (T + 1) * (K + V)),
                "backward": (
                    (10 + 6 * erased) * K * V,
                    (T + 1) * (3 * (1 + erased) * K + (2 + 3 * erased) * V),
                ),
                "step": ((4 + 2 * erased) * K * V, (4 + 2 * erased) * K * V),
            }[mode]
            tokens = shape["B"] * (1 if mode == "step" else shape["T"])
            flops += tokens * heads * min(by_state, by_pairs)
        return flops


QKV = {"q": "B T H K", "k": "B T H K", "v": "B T HV V"}
RWKV = {"r": "B T H K", "k": "B T H K", "v": "B T HV V", "w": "B T HV K gate", "u": "HV K"}
SLOTS = {**QKV, "v": "B T H V", "s": "B T H M unit", "g": "B T H M gate"}
POSITIVE = {"q": "B T H K positive", "k": "B T H K positive", "v": "B T HV V"}
DELTA = {"q": "B T H K direction", "k": "B T H K direction", "v": "B T HV V"}
STRENGTH = {"beta": "B T HV unit"}
SSD = {"x": "B T HV V", "dt": "B T HV step", "A": "HV rate", "B": "B T H K", "C": "B T H K"}


def retained(simple_gla: Callable[..., Any]) -> Callable[..., Any]:
    """Retention: one decay per head, 1 − 2^(−5−h)."""

    def definition(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
        heads = torch.arange(v.shape[2], device=v.device, dtype=v.dtype)
        decay = torch.log1p(-torch.exp2(-5 - heads))
        return simple_gla(q, k, v, decay.expand(v.shape[:3]), **rest)

    return definition


def channels_first(selective_scan: Callable[..., Any]) -> Callable[..., Any]:
    """mamba_ssm's layout, and its names."""

    def definition(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any
    ) -> Tensor:
        B, C = (t.transpose(1, 2)[:, :, None] for t in (B, C))
        y, _ = selective_scan(u.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, **rest)
        turned: Tensor = y.transpose(1, 2)
        return turned

    return definition


ROWS = (
    Op(
        name="linear_attn",
        chunk="chunk_linear_attn",
        step="linear_attn_step",
        reference="linear_attention",
        inputs=QKV,
        options={"normalize": False},
    ),
    Op(
        name="retention",
        chunk="chunk_retention",
        step="retention_step",
        reference="simple_gated_linear_attention",
        inputs=QKV,
        adapt=retained,
    ),
    Op(
        name="simple_gla",
        chunk="chunk_simple_gla",
        step="simple_gla_step",
        reference="simple_gated_linear_attention",
        inputs={**QKV, "g": "B T HV gate"},
    ),
    Op(
        name="gla",
        chunk="chunk_gla",
        step="gla_step",
        reference="gated_linear_attention",
        inputs={**QKV, "g": "B T HV K gate"},
    ),
    Op(
        name="gla_both",
        chunk="chunk_gla",
        step="gla_step",
        reference="two_sided_gated_linear_attention",
        inputs={**QKV, "g": "B T HV K gate", "gv": "B T HV V gate"},
    ),
    Op(
        name="rwkv6",
        chunk="chunk_rwkv6",
        step="rwkv6_step",
        reference="finch",
        inputs=RWKV,
        qkv=("r", "k", "v"),
    ),
    Op(
        name="gsa",
        chunk="chunk_gsa",
        step="gsa_step",
        reference="gsa",
        inputs=SLOTS,
        output="B T H V",
        state=("N H K M", "N H M V"),
    ),
    Op(
        name="mlstm",
        chunk="chunk_mlstm",
        step="mlstm_step",
        reference="mlstm",
        inputs={**POSITIVE, "i": "B T HV logits", "f": "B T HV logits"},
        state=("N HV K V", "N HV K", "N HV"),
    ),
    Op(
        name="ssd",
        chunk="mamba_chunk_scan_combined",
        step="selective_state_update",
        reference="mamba2",
        inputs=SSD,
        qkv=("C", "B", "x"),
        state=("N HV V K",),
        engine="ssd",
    ),
    Op(
        name="delta_rule",
        chunk="chunk_delta_rule",
        step="delta_rule_step",
        reference="delta_rule",
        inputs={**DELTA, **STRENGTH},
        engine="delta",
    ),
    Op(
        name="gated_delta_rule",
        chunk="chunk_gated_delta_rule",
        step="gated_delta_rule_step",
        reference="gated_delta_rule",
        inputs={**DELTA, "g": "B T HV gate", **STRENGTH},
        engine="delta",
    ),
    Op(
        name="kda",
        chunk="chunk_kda",
        step="kda_step",
        reference="kda",
        inputs={**DELTA, "g": "B T HV K gate", **STRENGTH},
        engine="delta",
    ),
    Op(
        name="comba",
        chunk="chunk_comba",
        step="comba_step",
        reference="comba",
        inputs={**DELTA, "p": "B T H K direction", "g": "B T HV gate", **STRENGTH},
        engine="delta",
    ),
    Op(
        name="dplr",
        chunk="chunk_dplr_delta_rule",
        step="dplr_delta_rule_step",
        reference="dplr",
        inputs={
            **DELTA,
            "a": "B T H K direction",
            "b": "B T H K direction",
            "gk": "B T HV K gate",
        },
        engine="delta",
        adapt=lambda dplr: lambda gk, **x: dplr(g=gk, **x),
    ),
    Op(
        name="hgrn",
        chunk="chunk_hgrn",
        step="hgrn_step",
        reference="scan",
        inputs={"x": "B T D", "g": "B T D gate"},
        qkv=(),
        output="B T D",
        state=("N D",),
        engine="scan",
        adapt=lambda scan: lambda x, g, **rest: scan(x, g, log=True, **rest),
    ),
    Op(
        name="wkv4",
        chunk="wkv4",
        step="wkv4_step",
        reference="wkv4",
        inputs={"w": "D", "u": "D", "k": "B T D", "v": "B T D"},
        qkv=(),
        output="B T D",
        state=("N D", "N D", "N D"),
        engine="scan",
    ),
    Op(
        name="selective_scan",
        chunk="selective_scan_fn",
        step="selective_state_update",
        reference="selective_scan",
        inputs={
            "u": "B D T",
            "delta": "B D T step",
            "A": "D S rate",
            "B": "B S T",
            "C": "B S T",
            "D": "D",
        },
        qkv=(),
        output="B D T",
        state=("N D S",),
        step_names={"u": "x", "delta": "dt"},
        engine="scan",
        adapt=channels_first,
    ),
)
OPS = {op.name: op for op in ROWS if op.available}


@dataclass(frozen=True)
class Set:
    """Shapes that belong together, in order of importance, and what is timed at them. ``only``:
    the operators it is for; all of the engine's if empty."""

    name: str
    modes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    only: tuple[str, ...] = ()


def shapes(text: str, **values: tuple[int, ...]) -> tuple[Shape, ...]:
    """``shapes("B1 T{} H8", T=(1, 2))``: one shape per value."""
    (column,) = values.values()
    return tuple(Shape(text.format(n)) for n in column)


WHOLE = ("forward", "training")
LONG = ("gla", "gated_delta_rule")  # one of an engine is timed at more shapes on a CPU
# A step costs the same after any context; T is the context that its softmax peers read.
SETS: dict[tuple[str, str], tuple[Set, ...]] = {
    ("chunk", "cuda"): (
        Set("reference A", WHOLE, (Shape("B1 T32768 H32 K128 V128"),)),
        Set("reference B", WHOLE, (Shape("B8 T4096 H16 K128 V128"),)),
        Set("short", WHOLE, shapes("B1 T{} H32 K128 V128", T=(2048, 256, 1024, 64))),
        Set("decode", ("step",), shapes("B{} T4096 H32 K128 V128", B=(64, 1, 8))),
        Set("few heads", WHOLE, shapes("B1 T{} H4 K128 V128", T=(65536, 262144))),
        Set("packed", WHOLE, (Shape("B1 T32768 H32 K128 V128", packed=16),)),
        Set("small heads", WHOLE, (Shape("B4 T8192 H16 K64 V64"),)),
    ),
    ("chunk", "cpu"): (
        Set("lengths", WHOLE, shapes("B1 T{} H8 K64 V64", T=(2048, 512))),
        Set("decode", ("step",), (Shape("B1 T2048 H8 K64 V64"),)),
        Set("packed", WHOLE, (Shape("B1 T4096 H8 K64 V64", packed=8),)),
        Set("wide heads", WHOLE, (Shape("B1 T2048 H8 K128 V128"),), only=LONG),
        Set("long decode", ("step",), (Shape("B1 T8192 H8 K64 V64"),), only=LONG),
        Set("long", WHOLE, (Shape("B1 T8192 H8 K64 V64"),), only=LONG),
    ),
    ("chunk", "emulator"): (
        Set("tiny", WHOLE, (Shape("B1 T40 H1 K64 V32"),)),
        Set("tiny packed", ("forward",), (Shape("B1 T40 H1 K64 V32", packed=3),)),
        Set("tiny decode", ("step",), (Shape("B2 T16 H1 K64 V32"),)),
    ),
    # Mamba-2's sizes: H groups of B and C for HV heads, a state of K = 128.
    ("ssd", "cuda"): (
        Set("reference A", WHOLE, (Shape("B1 T32768 H1 HV128 K128 V64"),)),
        Set("reference B", WHOLE, (Shape("B8 T4096 H1 HV80 K128 V64"),)),
        Set("short", WHOLE, shapes("B1 T{} H1 HV128 K128 V64", T=(2048, 256))),
        Set("decode", ("step",), shapes("B{} T4096 H1 HV128 K128 V64", B=(64, 1))),
        Set("packed", WHOLE, (Shape("B1 T32768 H1 HV128 K128 V64", packed=16),)),
    ),
    ("ssd", "cpu"): (
        Set("lengths", WHOLE, shapes("B1 T{} H1 HV8 K128 V64", T=(2048, 512))),
        Set("decode", ("step",), (Shape("B1 T2048 H1 HV8 K128 V64"),)),
        Set("packed", WHOLE, (Shape("B1 T4096 H1 HV8 K128 V64", packed=8),)),
    ),
    ("ssd", "emulator"): (
        Set("tiny", WHOLE, (Shape("B1 T40 H1 HV2 K64 V32"),)),
        Set("tiny packed", ("forward",), (Shape("B1 T40 H1 HV2 K64 V32", packed=3),)),
        Set("tiny decode", ("step",), (Shape("B2 T16 H1 HV2 K64 V32"),)),
    ),
    # D channels; S states for each where there are such.
    ("scan", "cuda"): (
        Set("reference", WHOLE, (Shape("B8 T4096 D2048 S16"),)),
        Set("short", WHOLE, shapes("B1 T{} D2048 S16", T=(2048, 256))),
        Set("decode", ("step",), shapes("B{} T4096 D2048 S16", B=(64, 1))),
        Set("packed", WHOLE, (Shape("B1 T32768 D2048 S16", packed=16),)),
    ),
    ("scan", "cpu"): (
        Set("lengths", WHOLE, shapes("B1 T{} D1536 S16", T=(2048, 512))),
        Set("decode", ("step",), (Shape("B1 T2048 D1536 S16"),)),
        Set("packed", WHOLE, (Shape("B1 T4096 D1536 S16", packed=8),)),
    ),
    ("scan", "emulator"): (
        Set("tiny", WHOLE, (Shape("B1 T40 D64 S4"),)),
        Set("tiny packed", ("forward",), (Shape("B1 T40 D64 S4", packed=3),)),
        Set("tiny decode", ("step",), (Shape("B2 T16 D64 S4"),)),
    ),
}
for _device in ("cuda", "cpu", "emulator"):
    SETS["delta", _device] = SETS["chunk", _device]


def cells(op: Op, device: str) -> list[tuple[Shape, tuple[str, ...]]]:
    """Shapes of an operator on a device (cpu, cuda or emulator) with their modes, first things
    first."""
    return [(shape, s.modes) for s in sets(op, device) for shape in s.shapes]


def sets(op: Op, device: str) -> list[Set]:
    """Those that are for an operator."""
    return [s for s in SETS[op.engine, device] if not s.only or op.name in s.only]
