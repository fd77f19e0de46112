"""A decay policy from outside the tree: one struct, one row, one test row, no kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import Case, Op, chunk_op
from checks import assert_accepted, definition, expected
from emulators import BUILD, missing
from impls import Emulator
from inputs import Inputs, Tensors, make_inputs

from lsm_cuda import reference

ROOT = Path(__file__).resolve().parents[2]


def square_gla(q, k, v, g, **rest):  # type: ignore[no-untyped-def]
    return reference.gated_linear_attention(q, k, v, -g.square(), **rest)


SQUARE = chunk_op("square_gla", square_gla, "B T HV K")  # the test row


class Cpu(Emulator):
    """CPU kernels, called as the emulator is: by hand, once."""

    tensor_cores = False

    def raw(self, op: Op, kind: str):
        if why := missing("_C_example"):
            pytest.skip(why)
        torch.ops.load_library(BUILD / "_C_example.so")
        return op.raw(kind, "lsm_example")

    def under_every_seed(self, call) -> Tensors:
        return call()


IMPLS = [Cpu("cpu"), Emulator("emulator", "_emu_example", seeds=(1, 2))]

CASES = [
    {"T": 70, "state": "both", "dims": (7, 33), "heads": (1, 2), "gate": "-1"},
    {"T": 70, "state": "both", "dtype": "bf16", "gate": "mixed"},
    {"T": 40, "state": "both", "dtype": "f16+f32", "batch": "int32"},
    {"T": 33, "dtype": "bf16+f32", "gate": "-8", "batch": 2},
    {"T": 600, "state": "both", "dtype": "f64", "gate": "-1e-3"},
]


@pytest.mark.parametrize("kwargs", CASES, ids=lambda kw: str(Case(SQUARE, **kw)))
@pytest.mark.parametrize("kernels", IMPLS, ids=str)
def test_accepted(kernels: Emulator, kwargs: dict) -> None:
    x, truth, same = expected(Case(SQUARE, **kwargs))
    assert_accepted(kernels.run(SQUARE, x), truth, same, x)


@pytest.mark.parametrize("kernels", IMPLS, ids=str)
def test_step_is_chunk(kernels: Emulator) -> None:
    x: Inputs = make_inputs(Case(SQUARE, T=5, state="both"))
    state, tokens = x.initial_state.clone(), []
    for t in range(5):
        tokens.append(kernels.step(SQUARE, {n: y[:, t] for n, y in x.tensors.items()}, state))
    truth, same = definition(SQUARE, x)
    got = {"o": torch.stack(tokens, 1), "final_state": state}
    assert_accepted(got, *({n: t[n] for n in got} for t in (truth, same)), x)


def test_page_shows_the_example() -> None:
    """What docs/adding_a_policy.md prints is what is built."""
    page = (ROOT / "docs" / "adding_a_policy.md").read_text()
    header = (ROOT / "examples" / "custom_policy" / "square_gate.h").read_text()
    blocks = re.findall(r"```cpp\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    for block in blocks:
        assert block.strip().rstrip(",") in header
