"""docs/ops.md lists what exists, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lsm_cuda import ops

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "ops.md").read_text()
OPERATORS, FUNCTIONS = PAGE.split("Public functions", 1)


def first_column(page: str) -> set[str]:
    """Names in backticks in the first column of the table's rows below its head."""
    rows = page.split("| --- |", 1)[1].splitlines()[1:]
    cells = [row.split("|")[1] for row in rows if row.startswith("|")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_registered_operators_are_documented():
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name.removeprefix("lsm::") for s in schemas if s.name.startswith("lsm::")}
    documented = first_column(OPERATORS)
    whole = documented & names  # else the name of three operators
    families = {f"{op}_{kind}" for op in documented - whole for kind in ("fwd", "bwd", "step")}
    assert names == whole | families


def test_public_functions_are_documented():
    assert set(ops.__all__) == first_column(FUNCTIONS)
