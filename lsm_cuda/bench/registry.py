"""What is measured: operators and shapes.

An operator is one row of ROWS, a set of shapes one row of SETS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention, Coded, Dense, Nsa, Selection, drawn_lists, token_lists
from .operators import MODES, STRIDE, WINDOW, Inputs, Op, Shape

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

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16,),
    "emulator": (torch.bfloat16,),
}
QKV = {"q": "B T H K", "k": "B T H K", "v": "B T HV V"}
RWKV = {"r": "B T H K", "k": "B T H K", "v": "B T HV V", "w": "B T HV K gate", "u": "HV K"}
SLOTS = {**QKV, "v": "B T H V", "s": "B T H M unit", "g": "B T H M gate"}
POSITIVE = {"q": "B T H K positive", "k": "B T H K positive", "v": "B T HV V"}
DELTA = {"q": "B T H K direction", "k": "B T H K direction", "v": "B T HV V"}
STRENGTH = {"beta": "B T HV unit"}
ATTENTION = {"q": "B T H K", "k": "B T HKV K", "v": "B T HKV V"}
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


def tokens_side_by_side(conv: Callable[..., Any]) -> Callable[..., Any]:
    """Dao-AILab's layout."""

    def definition(x: Tensor, **rest: Any) -> Tensor:
        y, _ = conv(x.transpose(1, 2), activation="silu", **rest)
        turned: Tensor = y.transpose(1, 2)
        return turned

    return definition


def griffin(rg_lru: Callable[..., Any]) -> Callable[..., Any]:
    """The rate of RG-LRU is a parameter's."""

    def definition(
        x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, param: Tensor, **rest: Any
    ) -> Any:
        return rg_lru(x, input_gate, recurrence_gate, -8 * F.softplus(param), **rest)

    return definition


def from_logits(kda: Callable[..., Any]) -> Callable[..., Any]:
    """KDA as a layer calls it."""

    def definition(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, **rest: Any
    ) -> Any:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        g = -A_log.exp().unsqueeze(-1) * F.softplus(g, threshold=50)
        return kda(q, k, v, g, beta.sigmoid(), **rest)

    return definition


IN_KERNEL = {f"use_{what}_in_kernel": True for what in ("qk_l2norm", "gate", "beta_sigmoid")}
POOL = {"length": WINDOW, "stride": STRIDE, "partial": False}

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
        name="based",
        chunk="chunk_based",
        step="based_step",
        reference="based",
        inputs=QKV,
        state=("N HV F V", "N HV F"),
        engine="features",
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
        name="kda_logits",
        chunk="chunk_kda",
        step="kda_step",
        reference="kda",
        inputs={
            **QKV,
            "g": "B T HV K shut",
            "beta": "B T HV",
            "A_log": "HV",
        },
        options=IN_KERNEL,
        step_options=IN_KERNEL,
        adapt=from_logits,
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
        state=("N D",) * 3,
        engine="scan",
    ),
    Op(
        name="bi_wkv",
        chunk="bi_wkv",
        step="",  # a token needs what follows it
        reference="bi_wkv",
        inputs={"w": "D", "u": "D", "k": "B T D", "v": "B T D"},
        qkv=(),
        output="B T D",
        state=("N D",) * 6,  # from either side
        engine="scan",
        packs=False,
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
    Op(
        name="rg_lru",
        chunk="rg_lru",
        step="rg_lru_step",
        reference="rg_lru",
        # without a state the first token would be another case, which a step never is
        inputs={
            "x": "B T D",
            "input_gate": "B T D",
            "recurrence_gate": "B T D",
            "param": "D",
            "initial_state": "N D zero",
        },
        qkv=(),
        output="B T D",
        state=("N D",),
        engine="scan",
        adapt=griffin,
    ),
    Op(
        name="causal_conv1d",
        chunk="causal_conv1d",
        step="causal_conv1d_step",
        reference="causal_conv1d",
        inputs={"x": "B T D", "weight": "D W", "bias": "D"},
        qkv=(),
        output="B T D",
        state=("N D W",),
        state_like="x",
        options={"activation": "silu"},
        step_options={"activation": "silu"},
        engine="scan",
        adapt=lambda conv: functools.partial(conv, activation="silu"),
    ),
    Op(
        name="causal_conv1d_fn",
        chunk="causal_conv1d_fn",
        step="",  # states have one layout
        reference="causal_conv1d",
        inputs={"x": "B D T", "weight": "D W", "bias": "D"},
        qkv=(),
        output="B D T",
        state=("N D W",),
        options={"activation": "silu"},
        engine="scan",
        adapt=tokens_side_by_side,
    ),
    Op(
        name="slstm",
        chunk="slstm",
        step="slstm_step",
        reference="slstm",
        inputs={"x": "B T G H K", "R": "H K G K matrix"},
        qkv=(),
        output="B T H K",
        state=("N G H K",),
        engine="slstm",
        matrix="H K G K",
    ),
    Dense(
        name="attn",
        chunk="block_sparse_attn",
        step="flash_attn_with_kvcache",
        reference="block_sparse_attention",
        inputs=ATTENTION,
    ),
    Attention(
        name="attn_window",
        chunk="block_sparse_attn",
        step="sparse_attn_decode",
        reference="block_sparse_attention",
        inputs=ATTENTION,
        window=1024,
    ),
    Attention(
        name="attn_blocks",
        chunk="block_sparse_attn",
        step="sparse_attn_decode",
        reference="block_sparse_attention",
        inputs=ATTENTION,
        lists=drawn_lists,
    ),
    Attention(
        name="attn_topk",
        chunk="block_sparse_attn",
        step="sparse_attn_decode",
        reference="block_sparse_attention",
        inputs=ATTENTION,
        lists=token_lists,
    ),
    Coded(
        name="attn_codes",
        chunk="block_sparse_attn",
        step="sparse_attn_decode",
        reference="block_sparse_attention",
        inputs=ATTENTION,
    ),
    Nsa(
        name="nsa",
        chunk="parallel_nsa",
        step="parallel_nsa",
        reference="block_sparse_attention",
        inputs=ATTENTION | dict.fromkeys(("g_cmp", "g_slc", "g_swa"), "B T H unit"),
    ),
    Selection(
        name="block_select",
        chunk="block_select",
        step="",
        reference="block_scores",
        inputs={"q": "B T H K", "k": "B R HKV K"},
        qkv=(),
    ),
    Op(
        name="block_pool",
        chunk="block_pool",
        step="",
        reference="block_pool",
        inputs={"x": "B T HKV K"},
        qkv=(),
        output="B R HKV K",
        state=(),
        options=POOL,
        engine="attention",
        adapt=lambda pool: functools.partial(pool, **POOL),
        per_element=(1, 1),
    ),
    Op(
        name="merge_attn_states",
        chunk="merge_attn_states",
        step="",
        reference="merge_attention_states",
        inputs={"o": "P B T H V", "lse": "P B H T score"},
        qkv=(),
        output="B T H V",
        state=(),
        engine="attention",
        per_element=(2, 3),
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
# Of an engine, these are timed at more shapes on a CPU.
WIDE = ("gla", "gated_delta_rule")
LONG = ("simple_gla", "gla", "mlstm", "gated_delta_rule", "kda")
WHOLE_LISTS = ("attn", "attn_window")  # whose keys no list names, so that sequences may be packed
SPARSE = ("attn_blocks", "attn_window", "attn_topk", "nsa")
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
        Set("wide heads", WHOLE, (Shape("B1 T2048 H8 K128 V128"),), only=WIDE),
        Set("long decode", ("step",), (Shape("B1 T8192 H8 K64 V64"),), only=WIDE),
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
        Set("long", WHOLE, (Shape("B1 T8192 H1 HV8 K128 V64"),)),
    ),
    ("ssd", "emulator"): (
        Set("tiny", WHOLE, (Shape("B1 T40 H1 HV2 K64 V32"),)),
        Set("tiny packed", ("forward",), (Shape("B1 T40 H1 HV2 K64 V32", packed=3),)),
        Set("tiny decode", ("step",), (Shape("B2 T16 H1 HV2 K64 V32"),)),
    ),
    # Cells that see the last output: time is walked.
    ("slstm", "cuda"): (
        Set("reference", WHOLE, (Shape("B8 T1024 H4 K256"),)),
        Set("short", WHOLE, shapes("B1 T{} H4 K256", T=(1024, 256))),
        Set("decode", ("step",), shapes("B{} T1024 H4 K256", B=(64, 1))),
        Set("packed", WHOLE, (Shape("B1 T8192 H4 K256", packed=16),)),
    ),
    ("slstm", "cpu"): (
        Set("lengths", WHOLE, shapes("B1 T{} H4 K64", T=(512, 128))),
        Set("decode", ("step",), (Shape("B1 T512 H4 K64"),)),
        Set("packed", WHOLE, (Shape("B1 T1024 H4 K64", packed=8),)),
    ),
    ("slstm", "emulator"): (
        Set("tiny", WHOLE, (Shape("B1 T20 H2 K16"),)),
        Set("tiny packed", ("forward",), (Shape("B1 T20 H2 K16", packed=3),)),
        Set("tiny decode", ("step",), (Shape("B2 T16 H2 K16"),)),
    ),
    # A step's T is read here, by those that see it all.
    ("attention", "cuda"): (
        Set("reference A", WHOLE, (Shape("B1 T32768 H64 HKV4 K128 V128"),)),
        Set("reference B", WHOLE, (Shape("B8 T4096 H32 HKV2 K128 V128"),)),
        Set("decode", ("step",), shapes("B{} T16384 H64 HKV4 K128 V128", B=(64, 1, 8))),
        Set("short", WHOLE, shapes("B1 T{} H64 HKV4 K128 V128", T=(8192, 2048))),
        Set("packed", WHOLE, (Shape("B1 T32768 H64 HKV4 K128 V128", packed=16),), only=WHOLE_LISTS),
        Set("long", WHOLE, (Shape("B1 T65536 H64 HKV4 K128 V128"),), only=SPARSE),
        Set("long decode", ("step",), (Shape("B1 T65536 H64 HKV4 K128 V128"),)),
        Set("small heads", WHOLE, (Shape("B4 T8192 H16 HKV16 K64 V64"),), only=WHOLE_LISTS),
    ),
    ("attention", "cpu"): (
        Set("lengths", WHOLE, shapes("B1 T{} H8 HKV2 K64 V64", T=(4096, 1024))),
        Set("decode", ("step",), (Shape("B1 T4096 H8 HKV2 K64 V64"),)),
        Set("packed", WHOLE, (Shape("B1 T4096 H8 HKV2 K64 V64", packed=8),), only=WHOLE_LISTS),
        Set("long decode", ("step",), (Shape("B1 T16384 H8 HKV2 K64 V64"),)),
        Set("long", WHOLE, (Shape("B1 T8192 H8 HKV2 K64 V64"),), only=("attn_blocks", "nsa")),
    ),
    ("attention", "emulator"): (
        Set("tiny", WHOLE, (Shape("B1 T150 H2 HKV1 K64 V64"),)),
        Set("tiny packed", ("forward",), (Shape("B1 T40 H2 HKV1 K64 V64", packed=3),), WHOLE_LISTS),
        Set("tiny decode", ("step",), (Shape("B2 T150 H2 HKV1 K64 V64"),)),
    ),
    # Narrow keys, whose products are the features.
    ("features", "cuda"): (
        Set("reference", WHOLE, (Shape("B8 T4096 H16 K16 V64"),)),
        Set("decode", ("step",), (Shape("B64 T4096 H16 K16 V64"),)),
        Set("packed", WHOLE, (Shape("B1 T32768 H16 K16 V64", packed=16),)),
    ),
    ("features", "cpu"): (
        Set("lengths", WHOLE, (Shape("B1 T2048 H16 K16 V64"),)),
        Set("decode", ("step",), (Shape("B1 T2048 H16 K16 V64"),)),
        Set("packed", WHOLE, (Shape("B1 T4096 H16 K16 V64", packed=8),)),
    ),
    ("features", "emulator"): (
        Set("tiny", WHOLE, (Shape("B1 T40 H1 K4 V16"),)),
        Set("tiny packed", ("forward",), (Shape("B1 T40 H1 K4 V16", packed=3),)),
        Set("tiny decode", ("step",), (Shape("B2 T16 H1 K4 V16"),)),
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
    """Those that are for an operator, with the modes that it has."""
    found = (s for s in SETS[op.engine, device] if not s.only or op.name in s.only)
    own = (
        replace(
            s,
            modes=tuple(m for m in s.modes if m in op.modes),
            shapes=tuple(shape for shape in s.shapes if op.packs or not shape.packed),
        )
        for s in found
    )
    return [s for s in own if s.modes and s.shapes]
