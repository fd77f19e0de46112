"""Chains of the delta engine, cut in time: pieces side by side to fill a card, windows one after
another to save memory, which the exact recurrence has too (docs/kernels/delta.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import OPS, Case, Op
from checks import assert_accepted, assert_same_bits, definition
from emulators import emulator
from impls import Emulator
from inputs import Inputs, make_inputs

from lsm_cuda.ops._delta import OPERATORS

DELTA = {op.name: op for op in OPS if op.name in OPERATORS}
BF16 = {"dtype": "bf16+f32", "state": "both", "dims": (64, 64)}
# Multiprocessors and a call. Pieces have 256 tokens at least; windows of a backward 1024, where its
# scratch memory would exceed half a megabyte per multiprocessor.
PIECES = (64, BF16 | {"T": 900})
WINDOWS = (1, BF16 | {"T": 1100, "heads": (1, 2)})
BOTH = (4, BF16 | {"T": 1100, "dims": (128, 40)})
WIDE = (1, BF16 | {"T": 1060, "heads": (1, 1), "dims": (256, 40)})  # in windows, never in pieces
CALLS = [
    ("delta_rule", *PIECES),
    ("gated_delta_rule", 64, BF16 | {"T": 900, "batch": "int64", "gate": "resets"}),
    ("gated_delta_rule", *WINDOWS),
    ("gated_delta_rule", BOTH[0], BOTH[1] | {"batch": "int32"}),
    ("gated_delta_rule", *WIDE),
    ("kda", 64, BF16 | {"T": 800, "batch": 2, "dims": (40, 72)}),
    ("kda", *BOTH),
    ("comba", *BOTH),
    ("dplr", *PIECES),
    ("dplr", 1, WINDOWS[1] | {"batch": "int64"}),
]
IDS = [f"{name}-{count}-T{call['T']}-K{call['dims'][0]}" for name, count, call in CALLS]


def peak(profile: torch.profiler.profile) -> int:
    """Most bytes held at once of what was allocated meanwhile."""
    held = most = 0
    events = profile.profiler.kineto_results.experimental_event_tree()
    while events:
        event = events.pop(0)
        if event.tag == torch._C._profiler._EventType.Allocation:
            held += event.extra_fields.alloc_size
            most = max(most, held)
        events = event.children + events
    return most


def launches(op: Op, multiprocessors: int, x: Inputs) -> tuple[int, int]:
    """Of a forward and of a backward."""
    emu = emulator("_emu")
    one = Emulator("_emu", "_emu", (0,), multiprocessors)
    counts = []
    for run in (one.fwd, one.bwd):
        emu.reset_counters()
        one.under_every_seed(lambda run=run: run(op, x))
        counts.append(len(emu.counters()["launches"]))
    return counts[0], counts[1]


@pytest.mark.parametrize(("name", "multiprocessors", "call"), CALLS, ids=IDS)
def test_cuts_keep_the_definition(name: str, multiprocessors: int, call: dict) -> None:
    op = DELTA[name]
    x = make_inputs(Case(op, **call))
    results = Emulator("emulator", seeds=(0,), multiprocessors=multiprocessors).run(op, x)
    assert_accepted(results, *definition(op, x), x)


def test_what_is_launched() -> None:
    """So that the calls above are cut as they say."""
    op = DELTA["gated_delta_rule"]

    def of(multiprocessors: int, call: dict) -> tuple[int, int]:
        return launches(op, multiprocessors, make_inputs(Case(op, **call)))

    whole, pieces, joins = (2, 4), 2, 4  # prepare, chain; prepare, states, reverse, gradients
    assert of(1, BF16 | {"T": 200}) == whole
    assert of(*PIECES) == (whole[0] + pieces, whole[1] + joins)
    assert of(*WINDOWS) == (whole[0], 2 * whole[1] + 2)
    assert of(*BOTH) == (whole[0] + pieces, 2 * (whole[1] + joins) + 3)
    assert of(*WIDE) == (whole[0], 2 * whole[1] + 2)
    assert of(64, WIDE[1]) == whole


@pytest.mark.parametrize(
    ("name", "batch"), [("gated_delta_rule", "int64"), ("kda", 1), ("dplr", "int64")]
)
def test_any_schedule_gives_the_same_bits_and_no_race(name: str, batch: int | str) -> None:
    op = DELTA[name]
    x = make_inputs(Case(op, **BOTH[1] | {"batch": batch}))
    plain, race = (
        Emulator(flavour, flavour, seeds, BOTH[0])
        for flavour, seeds in (("_emu", (0, 1, 4)), ("_emu_race", (2,)))
    )
    assert_same_bits(plain.run(op, x), race.run(op, x))


def test_impossible_boundaries_give_nan() -> None:
    op = DELTA["gated_delta_rule"]
    x = make_inputs(Case(op, **BOTH[1] | {"batch": "int64"}))
    x = replace(x, cu_seqlens=x.cu_seqlens.flip(0))
    results = Emulator("_emu", "_emu", (1,), BOTH[0]).run(op, x)
    assert all(t.isnan().all() for t in results.values())


def test_state_that_never_decays_survives_its_cuts() -> None:
    """Pieces are joined by their transitions, not by hoping that decay hides what came before."""
    op = DELTA["delta_rule"]
    x = make_inputs(Case(op, **PIECES[1] | {"gate": "0"}))
    x.tensors["beta"].mul_(1e-3)
    cut, whole = (Emulator("_emu", "_emu", (0,), n).forward(op, x) for n in (64, 1))
    assert cut[1].std() > x.initial_state.std() / 2
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", DELTA)
def test_memory_of_a_backward_is_bounded(name: str) -> None:
    """Results and scratch, at most 1.5 x of the arguments and the output, as the chunk engine's."""
    op = DELTA[name]
    x = make_inputs(Case(op, T=8192, dims=(128, 128), dtype="bf16"))
    given = sum(t.nbytes for t in x.tensors.values()) + x.grad_o.nbytes
    emulator("_emu").set_multiprocessors(1)
    with torch.profiler.profile(profile_memory=True) as profile:
        Emulator("_emu", "_emu", (0,), 1).bwd(op, x)
    held = peak(profile) + x.grad_o.nbytes  # o, of the forward
    assert 1.02 * given < held <= 1.5 * given, f"{held / given:.2f}"


EXACT = {"dtype": "f32", "state": "both", "dims": (16, 16), "heads": (1, 2), "batch": 2}


@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule", "kda", "dplr"])
def test_windows_of_the_recurrence_change_no_bit(name: str) -> None:
    op = DELTA[name]
    x = make_inputs(Case(op, **EXACT | {"T": 1100}))
    assert launches(op, 1, x)[1] > launches(op, 64, x)[1]

    def gradients(multiprocessors: int) -> dict[str, torch.Tensor]:
        impl = Emulator("_emu", "_emu", (0,), multiprocessors)
        return impl.under_every_seed(lambda: impl.bwd(op, x))

    assert_same_bits(gradients(1), gradients(64))


def test_scratch_of_the_recurrence_is_bounded() -> None:
    """Another window takes another state, not another window's memory."""
    op, scratch = DELTA["kda"], []
    for T in (2048, 3072):
        x = make_inputs(Case(op, **EXACT | {"T": T, "heads": (2, 2)}))  # no groups to add up
        emulator("_emu").set_multiprocessors(1)
        with torch.profiler.profile(profile_memory=True) as profile:
            results = Emulator("_emu", "_emu", (0,), 1).bwd(op, x)
        scratch.append(peak(profile) - sum(t.nbytes for t in results.values()))
    assert scratch[0] < scratch[1] <= 1.2 * scratch[0], scratch
