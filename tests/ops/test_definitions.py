"""The definitions agree with each other: recurrence, quadratic form, and other people's code."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import OPS, Case, Op
from checks import assert_accepted, definition, differentiate
from impls import Impl
from inputs import Inputs, make_inputs
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
    if dtype == "f64" and impl.tensor_cores:
        pytest.skip("fp64 is for CPU kernels only")
    x = make_inputs(Case(op, dtype=dtype, **kwargs))

    def quadratic(y: Inputs) -> tuple[Tensor, Tensor | None]:
        o, state = op.quadratic(
            **y.tensors, scale=y.scale, initial_state=y.initial_state, cu_seqlens=y.cu_seqlens
        )
        return o, state if y.output_final_state else None

    truth = differentiate(quadratic, x.map(torch.Tensor.double))
    same = differentiate(quadratic, x.map(torch.Tensor.float))
    assert_accepted(impl.run(op, x), truth, same, x)


def fla_module(path: str) -> ModuleType:
    """A file of an installed (or, with LSM_FLA_DIR, unpacked) FLA that needs nothing but PyTorch.

    Loaded by path: importing the package needs triton, its plain definitions do not.
    """
    root = os.environ.get("LSM_FLA_DIR")
    if root is None:
        spec = importlib.util.find_spec("fla")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("flash-linear-attention not found: install it or set LSM_FLA_DIR")
        root = spec.submodule_search_locations[0]
    file = Path(root) / path
    file = file if file.is_file() else Path(root) / "fla" / path
    assert file.is_file(), f"LSM_FLA_DIR={root} holds no {path}"
    spec = importlib.util.spec_from_file_location("fla_naive", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("gate", ["mixed", "-8", "-80", "0"])
def test_gla_is_what_fla_computes(impl: Impl, gate: str, dtype: str) -> None:
    """FLA's own loop, in fp32 inside, on the same inputs: forward, final state and gradients."""
    naive = fla_module("ops/gla/naive.py").naive_recurrent_gla
    (op,) = (op for op in OPS if op.name == "gla")
    case = Case(op, T=100, dims=(32, 48), heads=(2, 2), dtype=dtype, gate=gate, state="both")
    x = make_inputs(case)

    def fla(y: Inputs) -> tuple[Tensor, Tensor | None]:
        t = y.tensors
        return naive(t["q"], t["k"], t["v"], t["g"], y.initial_state, output_final_state=True)

    theirs = differentiate(fla, x)
    truth, same = definition(op, x)
    assert_accepted(theirs, truth, same, x)
    assert_accepted(impl.run(op, x), truth, same, x)
