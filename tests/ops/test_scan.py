"""The scan engine: definitions, laws, errors."""

from __future__ import annotations

import pytest
import torch
from impls import IMPLS
from scans import RG_LRU, SCAN, SCANS, ScanCase, assert_scan, scan_cases

from lsm_cuda import ops, reference


def each_case():
    for impl in IMPLS.values():
        absent = impl.absent()
        marks = [pytest.mark.gpu] if impl.name == "cuda" else []
        marks += [pytest.mark.skip(reason=absent)] if absent else []
        for op in SCANS:
            for case in scan_cases(op, impl.name)[: 1 if absent else None]:
                yield pytest.param(impl, case, marks=marks, id=f"{impl}-{case}")


@pytest.mark.parametrize(("impl", "case"), each_case())
def test_definition(impl, case):
    assert_scan(impl, case)
