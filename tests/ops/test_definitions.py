"""The definitions agree with each other: recurrence, quadratic form, and other people's code."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from cases import OPS, Case, Op
from checks import assert_accepted, definition, differentiate
from impls import Impl
from inputs import Inputs, make_inputs
from peers import fla_module
from torch import Tensor

CASES = [
    {"T": 65, "dims": (7, 33), "heads": (2, 4), "batch": 2, "state": "both"},
    {"T": 40, "gate": "-80", "state": "both"},
    {"T": 40, "gate": "-inf", "state": "both", "heads": (1, 2)},
    {"T": 40, "gate": "0", "batch": "int32", "state": "both", "scale": 0.3},
    {"T": 64, "gate": "resets", "dims": (33, 1)},
    {"T": 30, "gate": "-1e4", "state": "final"},
    {"T": 1, "gate": "-1", "state": "both"},
]


@pytest.mark.parametrize("kwargs", CASES, ids=lambda kw: str(Case(OPS[0], **kw)))
@pytest.mark.parametrize("op", OPS, ids=str)
def test_quadratic_form_is_the_recurrence(op: Op, kwargs: dict) -> None:
    """In fp64, to its rounding: outputs, final state and every gradient."""
    x = make_inputs(Case(op, dtype="f64", **kwargs))

    def quadratic(y: Inputs) -> tuple[Tensor, Tensor | None]:
        o, state = op.quadratic(
            **y.tensors, scale=y.scale, initial_state=y.initial_state, cu_seqlens=y.cu_seqlens
        )
        return o, state if y.output_final_state else None

    assert_accepted(differentiate(quadratic, x), *definition(op, x), x)


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.parametrize("kwargs", CASES, ids=lambda kw: str(Case(OPS[0], **kw)))
def test_implementation_is_the_quadratic_form(impl: Impl, op: Op, kwargs: dict, dtype: str) -> None:
    """As test_quadratic_form_is_the_recurrence, without a recurrence anywhere."""
    x = make_inputs(Case(op, dtype=dtype, **kwargs))

    def quadratic(y: Inputs) -> tuple[Tensor, Tensor | None]:
        o, state = op.quadratic(
            **y.tensors, scale=y.scale, initial_state=y.initial_state, cu_seqlens=y.cu_seqlens
        )
        return o, state if y.output_final_state else None

    truth = differentiate(quadratic, x.map(torch.Tensor.double))
    same = differentiate(quadratic, x.map(torch.Tensor.float))
    assert_accepted(impl.run(op, x), truth, same, x)


def rwkv6(naive: Callable, q: Tensor, k: Tensor, v: Tensor, g: Tensor, **state: object) -> tuple:
    """Head-first, and with a bonus of the own token, which is none of the operator's."""
    q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
    o, final_state = naive(q, k, v, g, q.new_zeros(q.shape[1], q.shape[-1]), **state)
    return o.transpose(1, 2), final_state


def chunks(
    naive: Callable, *args: Tensor, initial_state: Tensor, output_final_state: bool
) -> tuple:
    """Whole chunks from zero, outputs alone."""
    return naive(*args), None


def plain(naive: Callable, *args: Tensor, **state: object) -> tuple:
    return naive(*args, **state)


LOOP = {"gate": ["mixed", "-8", "-80", "0"], "dtype": ["f32", "bf16"]}
# Sums of gates lose digits where gates are strong; chunks stay in the dtype they come in.
CHUNKS = {"gate": ["mixed", "0"], "dtype": ["f32"]}
FLA = {  # file, function, how to call it, the cases that it is good for
    "gla": [("gla/naive.py", "naive_recurrent_gla", plain, LOOP)],
    "linear_attn": [
        ("linear_attn/naive.py", "naive_recurrent_linear_attn", plain, LOOP | {"gate": ["0"]}),
        ("linear_attn/naive.py", "naive_chunk_linear_attn", chunks, CHUNKS | {"gate": ["0"]}),
    ],
    "simple_gla": [
        ("simple_gla/naive.py", "naive_recurrent_simple_gla", plain, LOOP),
        ("simple_gla/naive.py", "naive_chunk_simple_gla", plain, CHUNKS),
    ],
    "rwkv6": [("rwkv6/recurrent_naive.py", "naive_recurrent_rwkv6", rwkv6, LOOP)],
}
THEIRS = [
    pytest.param(name, path, function, call, gate, dtype, id=f"{function}-{gate}-{dtype}")
    for name, rows in FLA.items()
    for path, function, call, cases in rows
    for gate, dtype in itertools.product(cases["gate"], cases["dtype"])
]


@pytest.mark.parametrize("name, path, function, call, gate, dtype", THEIRS)
def test_operator_is_what_fla_computes(
    impl: Impl, name: str, path: str, function: str, call: Callable, gate: str, dtype: str
) -> None:
    """FLA's own code on the same inputs: forward, final state and gradients."""
    naive = getattr(fla_module(f"ops/{path}"), function)
    (op,) = (op for op in OPS if op.name == name)
    state = "none" if call is chunks else "both"
    case = Case(op, T=128, dims=(32, 48), heads=(2, 2), dtype=dtype, gate=gate, state=state)
    x = make_inputs(case)

    def fla(y: Inputs) -> tuple[Tensor, Tensor | None]:
        return call(
            naive, *y.tensors.values(), initial_state=y.initial_state,
            output_final_state=y.output_final_state,
        )  # fmt: skip

    truth, same = definition(op, x)
    assert_accepted(differentiate(fla, x), truth, same, x)
    assert_accepted(impl.run(op, x), truth, same, x)
