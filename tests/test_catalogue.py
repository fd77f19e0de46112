"""docs/catalogue.md names what exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "catalogue.md").read_text().splitlines()
    if re.match(r"\| ([ABCDE]\d+|LAvv|KDA) \|", line)
]


def test_every_row_is_there():
    """B1, plain recurrent networks, is PyTorch's; of E, exact attention is here."""
    ranges = {"A": range(1, 35), "B": range(2, 29), "C": range(1, 12), "D": range(1, 53)}
    ranges["E"] = (1, 2, 3, 5, 6, 7, 12)
    A, B, C, D, E = ([f"{letter}{n}" for n in numbers] for letter, numbers in ranges.items())
    assert [row[0] for row in ROWS] == [*A, "LAvv", *B, *C, "KDA", *D, *E]


def test_names_exist():
    for row, _, served_by, tests in ROWS:
        symbols = re.findall(r"`(\w+)\.(\w+)`", served_by)
        assert symbols, row
        for module, name in symbols:
            assert hasattr(importlib.import_module(f"lsm_cuda.{module}"), name), (row, name)
        places = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert places, row
        for path, name in places:
            assert f"def {name}(" in (ROOT / path).read_text(), (row, path, name)
