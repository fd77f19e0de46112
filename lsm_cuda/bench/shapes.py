"""At what shapes operators are measured: a set of them is one row of SETS."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .operators import Op, Shape


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
