"""Parametrisation over implementations, and memory that starts as garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import sys

import pytest
import torch
from cases import GLA, OPS, Op, cases
from impls import IMPLS, Impl

# Fresh and freed memory is filled with 0xFE and 0x01 (glibc's M_PERTURB): what a kernel forgets
# to write, or reads after its life, is a huge number instead of the last call's right answer.
if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-6, 1)

# One thread for PyTorch's small operations, which waste time on waking others; kernels get two
# (impls.py), because their work is divided differently then.
torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``impl`` in a test's arguments: run on each one; ``case`` too: on each of its cases."""
    names = metafunc.fixturenames
    if "impl" not in names:
        return
    wanted = getattr(metafunc.function, "only_impls", tuple(IMPLS))
    ops: list[Op | None] = [None]
    if {"op", "case"} & set(names):
        only = getattr(metafunc.function, "only_ops", [op.name for op in OPS])
        ops = [op for op in OPS if op.name in only]
    rows = []
    for impl in (IMPLS[name] for name in wanted):
        marks = [pytest.mark.gpu] if impl.name == "cuda" else []
        absent = impl.absent()
        if absent:
            marks.append(pytest.mark.skip(reason=absent))
        for op in ops:
            if op is not None and impl.name not in op.impls:
                continue
            own = cases(op, impl.name) if "case" in names else [None]
            for case in own[:1] if absent else own:
                values = {"impl": impl, "op": op, "case": case}
                picked = [values[n] for n in ("impl", "op", "case") if n in names]
                name = f"{impl}-{case or op}" if op else str(impl)
                rows.append(pytest.param(*picked, marks=marks, id=name))
    metafunc.parametrize([n for n in ("impl", "op", "case") if n in names], rows)


def is_fp64(value: object) -> bool:
    """A type's name, or a case of that type."""
    dtype = value.get("dtype") if isinstance(value, dict) else getattr(value, "dtype", value)
    return isinstance(dtype, str) and dtype in ("f64", "c128")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An absent implementation is one skip per test, not one per parameter; cases in fp64 are not
    for CUDA kernels; ``test.applies`` says of a test's parameters which go together."""
    seen: set[tuple] = set()
    kept, dropped = [], []
    for item in items:
        spec = getattr(item, "callspec", None)
        values = list(spec.params.values()) if spec else []
        impl = next((v for v in values if isinstance(v, Impl)), None)
        first = item.nodeid.partition("[")[0], str(impl)
        never = impl is not None and impl.tensor_cores and any(map(is_fp64, values))
        if applies := getattr(getattr(item, "function", None), "applies", None):
            given = inspect.signature(applies).parameters
            never = never or not applies(**{n: spec.params[n] for n in given})
        if never or (impl is not None and impl.absent() and first in seen):
            dropped.append(item)
        else:
            seen.add(first)
            kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_collection_finish() -> None:
    """Thousands of tests and whole libraries are there to stay: collections need not walk them."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cpu() -> Impl:
    return IMPLS["cpu"]


@pytest.fixture
def op_gla() -> Op:
    """The operator for tests of what all operators share."""
    return GLA


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)
