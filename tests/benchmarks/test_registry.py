"""The registry counts what it says it counts, and every operator is in it."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import OPS as TESTED

from lsm_cuda import ops, reference
from lsm_cuda.bench.registry import MODES, OPS, ROWS, SETS, Shape, cells, sets

BF16, F32 = torch.bfloat16, torch.float32


# torch.ops.lsm names that only other operators use
INSIDE = {"gla_value": "gsa"}


def test_every_operator_has_a_row():
    for op in TESTED:
        assert INSIDE.get(op.name, op.name) in OPS


def test_rows_name_what_there_is():
    assert len({op.name for op in ROWS}) == len(ROWS)
    for op in OPS.values():
        assert hasattr(reference, op.reference) and set(op.qkv) <= set(op.inputs)
        parameters = inspect.signature(getattr(ops, op.chunk)).parameters
        assert {*op.inputs, *op.options} <= set(parameters)
        tokens = {op.step_names.get(name, name) for name in op.inputs}
        parameters = inspect.signature(getattr(ops, op.step)).parameters
        assert {*tokens, "state", *op.step_options} <= set(parameters)


def test_shapes_are_read_by_name():
    shape = Shape("B2 T100 H3 K64 V32")
    assert shape.dims("B T HV V") == (2, 100, 3, 32) and shape["N"] == 2
    assert Shape("B2 T100 H3 HV6 K64 V32")["HV"] == 6
    assert str(shape.at(7)) == "B2 T7 H3 K64 V32"


@pytest.mark.parametrize("packed", [1, 3, 16])
def test_packed_sequences_fill_the_row(packed):
    shape = Shape("B1 T1000 H1 K8 V8", packed)
    cu = shape.cu_seqlens()
    lengths = cu.diff()
    assert cu[0] == 0 and cu[-1] == 1000 and len(lengths) == packed == shape["N"]
    assert (lengths > 0).all() and (packed == 1 or lengths[-1] > 2 * lengths[0])


def test_minimal_bytes_of_gla():
    """bf16 activations, fp32 gates, at K = V = 64: one tensor is X, the gate 2 X."""
    gla, shape = OPS["gla"], Shape("B2 T100 H3 K64 V64")
    X = 2 * 100 * 3 * 64 * 2
    forward, backward = 6 * X, 11 * X  # q k v o, g; twice q k v and g, dO
    assert gla.minimal_bytes(shape, BF16, "forward") == forward
    assert gla.minimal_bytes(shape, BF16, "backward") == backward
    assert gla.minimal_bytes(shape, BF16, "training") == forward + backward
    state = 2 * 3 * 64 * 64 * 4
    assert gla.minimal_bytes(shape, BF16, "step") == 2 * state + 6 * X // 100
    assert gla.minimal_bytes(shape, F32, "forward") == 10 * X


def test_minimal_bytes_with_value_heads():
    shape = Shape("B1 T10 H2 HV4 K8 V16")
    qk, vo, g = 2 * 10 * 2 * 8 * 2, 2 * 10 * 4 * 16 * 2, 10 * 4 * 8 * 4
    assert OPS["gla"].minimal_bytes(shape, BF16, "forward") == qk + vo + g


def test_minimal_bytes_and_flops_of_a_scan():
    """bf16, delta and A in fp32, in mamba_ssm's layout."""
    op, shape = OPS["selective_scan"], Shape("B2 T100 D64 S16")
    X, BC = 2 * 64 * 100 * 2, 2 * 2 * 16 * 100 * 2
    assert op.minimal_bytes(shape, BF16, "forward") == 4 * X + BC + 64 * 16 * 4 + 64 * 2
    assert op.minimal_flops(shape, "forward") == 2 * 100 * 64 * 16 * 2
    assert op.minimal_flops(shape, "step") == 2 * 64 * 16 * 2
    assert OPS["wkv4"].minimal_flops(shape, "backward") == 2 * 100 * 3 * 64 * 6


def test_minimal_flops():
    """Long sequences pay per state element, short ones per pair of tokens, packed ones per their
    own length."""
    gla = OPS["gla"]
    long, short = Shape("B2 T1000 H3 K64 V32"), Shape("B1 T7 H1 K64 V32")
    assert gla.minimal_flops(long, "forward") == 2 * 1000 * 3 * 4 * 64 * 32
    assert gla.minimal_flops(long, "backward") == 2 * 1000 * 3 * 10 * 64 * 32
    assert gla.minimal_flops(long, "step") == 2 * 3 * 4 * 64 * 32
    pairs = 7 * 8 // 2
    assert gla.minimal_flops(short, "forward") == pairs * (2 * 64 + 2 * 32)
    assert gla.minimal_flops(short, "backward") == pairs * (6 * 64 + 4 * 32)
    packed = Shape("B1 T64 H1 K64 V64", packed=32)
    assert gla.minimal_flops(packed, "forward") == 64 * 3 * (64 + 64)
    assert gla.minimal_flops(long, "training") == 2 * 1000 * 3 * 14 * 64 * 32


@pytest.mark.parametrize("device", ["cpu", "cuda", "emulator"])
@pytest.mark.parametrize("name", OPS)
def test_every_operator_has_cells(name, device):
    """Whole sequences, packed ones and decoding, on every device, with inputs that can be made."""
    found = cells(OPS[name], device)
    assert {mode for _, modes in found for mode in modes} == set(MODES)
    assert any(shape.packed for shape, _ in found)
    assert len({str(shape) for shape, modes in found if "step" not in modes}) == sum(
        "step" not in modes for _, modes in found
    )
    for shape, _ in found:
        x = OPS[name].make(shape.at(max(8, shape.packed)), BF16, "cpu")
        assert ("cu_seqlens" in x) == bool(shape.packed)


def test_sets_are_for_operators_there_are():
    names = {op.name for op in ROWS}
    assert all({*s.only} <= names for found in SETS.values() for s in found)
    assert "long" in {s.name for s in sets(OPS["gla"], "cpu")}
    assert "long" not in {s.name for s in sets(OPS["simple_gla"], "cpu")}


def test_reference_shapes_come_first():
    first = [str(s.shapes[0]) for s in SETS["chunk", "cuda"][:2]]
    assert first == ["B1 T32768 H32 K128 V128", "B8 T4096 H16 K128 V128"]
