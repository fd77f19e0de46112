"""The registry counts what it says it counts, and every operator is in it."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lsm_cuda import ops, reference
from lsm_cuda.bench.attention import attend
from lsm_cuda.bench.measure import runner
from lsm_cuda.bench.peers import ours
from lsm_cuda.bench.registry import OPS, ROWS, SETS, Shape, cells, sets

BF16, F32 = torch.bfloat16, torch.float32
# Two halves of what block_select does in one launch; Mamba-2's whole sequences in bf16 on CUDA.
ELSEWHERE = {f"lsm::{op}" for op in ("block_scores", "block_topk", "ssd_fwd", "ssd_bwd")}


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name().partition(".")[0])
        return func(*args, **kwargs or {})


def test_every_operator_is_in_a_row():
    """Between them the rows call every forward, backward and step that is registered."""
    with Calls() as calls:
        for op in OPS.values():
            shape, _ = cells(op, "emulator")[0]
            for mode in op.modes:
                runner(ours(op, mode), op, op.make(shape, F32, "cpu"), shape, mode)()
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("lsm::")}
    assert registered - calls.seen == ELSEWHERE


def test_rows_name_what_there_is():
    assert len({op.name for op in ROWS}) == len(ROWS)
    for op in OPS.values():
        assert hasattr(reference, op.reference) and set(op.qkv) <= set(op.inputs)
        shape, _ = cells(op, "emulator")[0]
        x = op.make(shape, F32, "cpu")
        inspect.signature(getattr(ops, op.chunk)).bind(**op.sequence(x, shape))
        if op.step:
            inspect.signature(getattr(ops, op.step)).bind(**op.token(x, shape))


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


def test_minimal_bytes_and_flops_of_attention():
    """Pairs by hand: a triangle, a band, and blocks of it; a step reads what its query sees."""
    shape, K = Shape("B2 T2000 H4 HKV2 K64 V32"), 64 + 32
    triangle, band = 2000 * 2001 // 2, 2000 * 1024 - 1024 * 1023 // 2
    for name, pairs, last in (("attn", triangle, 2000), ("attn_window", band, 1024)):
        op = OPS[name]
        assert op.minimal_flops(shape, "forward") == 2 * 4 * pairs * 2 * K
        assert op.minimal_flops(shape, "backward") == 2 * 4 * pairs * (6 * 64 + 4 * 32)
        assert op.minimal_flops(shape, "step") == 2 * 4 * last * 2 * K
        assert op.minimal_bytes(shape, BF16, "step") == 2 * 2 * (4 + 2 * last) * K
    coded = 2 * (2 * 4 * K + 2 * 2000 * (K + 2 * 8))
    assert OPS["attn_codes"].minimal_bytes(shape, BF16, "step") == coded
    assert OPS["attn"].minimal_bytes(shape, BF16, "forward") == 2 * 2 * 2000 * (4 + 2) * K
    halves = Shape("B1 T12 H1 K8 V8", packed=2)
    assert OPS["attn"].minimal_flops(halves, "forward") == (4 * 5 // 2 + 8 * 9 // 2) * 32


@pytest.mark.parametrize("name", ["attn", "attn_window", "attn_blocks", "attn_topk"])
@pytest.mark.parametrize("T", [100, 1100])
def test_pairs_are_those_of_the_dense_mask(name, T):
    op = OPS[name]
    seen = op.seen(T, torch.device("cpu"))
    assert op.pairs_of(T) == int(seen.sum())
    assert op.keys_of_last(T) == int(seen[-1].sum()) == len(op.seen_by_last(T, "cpu"))
    assert seen.diagonal().all() and not seen.triu(1).any()


def test_pairs_of_nsa():
    """Means of blocks in the past, the blocks chosen, and the window."""
    nsa = OPS["nsa"]
    assert nsa.keys_of_last(100) == 1 + 100 + 100
    assert nsa.keys_of_last(2000) == 31 + (15 * 64 + 16) + 512
    assert nsa.pairs_of(3) == 2 * (1 + 2 + 3)


def test_dense_attention_is_the_reference():
    x = OPS["attn_blocks"].make(Shape("B1 T70 H4 HKV2 K8 V8"), torch.float64, "cpu")
    q, k, v = (x[n][:, :20] for n in "qkv")
    seen = ops.AttnMask(causal=True, left=4).to_dense(20, 20)
    wanted, _ = reference.block_sparse_attention(q, k, v, None, ops.AttnMask(causal=True, left=4))
    torch.testing.assert_close(attend(q, k, v, seen), wanted)
    assert not attend(q, k, v, seen & (torch.arange(20) > 3)[:, None])[:, :4].any()


def test_minimal_bytes_and_flops_of_the_others():
    conv, slstm = OPS["causal_conv1d"], OPS["slstm"]
    shape = Shape("B2 T100 D64 S16")
    X = 2 * 100 * 64 * 2
    assert conv.minimal_bytes(shape, BF16, "forward") == 2 * X + 64 * 5 * 2
    assert conv.minimal_flops(shape, "forward") == 2 * 100 * 64 * 4 * 2
    assert conv.minimal_bytes(shape, BF16, "step") == 2 * (2 + 8) * 64 * 2 + 64 * 5 * 2
    state = 2 * 64 * 4
    assert OPS["rg_lru"].minimal_bytes(shape, BF16, "forward") == 4 * X + 64 * 2 + state
    assert OPS["rg_lru"].minimal_bytes(shape, BF16, "step") == 4 * X // 100 + 64 * 2 + 2 * state
    cell = Shape("B2 T100 H4 K8")
    assert slstm.minimal_flops(cell, "forward") == 2 * 100 * 4 * 8 * 4 * 8 * 2
    assert slstm.minimal_flops(cell, "training") == 3 * slstm.minimal_flops(cell, "forward")
    some = Shape("B1 T64 H2 HKV1 K8 V8")  # three windows: after 31, 47 and 63
    assert some["R"] == 3
    assert OPS["block_select"].minimal_flops(some, "forward") == 2 * 2 * 8 * (33 + 17 + 1)
    read = (64 * 2 * 8 + 3 * 8) * 2
    assert OPS["block_select"].minimal_bytes(some, BF16, "forward") == read + 64 * 16 * 4
    assert OPS["block_pool"].minimal_bytes(some, BF16, "forward") == (64 + 3) * 8 * 2
    assert OPS["merge_attn_states"].minimal_flops(some, "forward") == 2 * 4 * 64 * 2 * 8


@pytest.mark.parametrize("device", ["cpu", "cuda", "emulator"])
@pytest.mark.parametrize("name", OPS)
def test_every_operator_has_cells(name, device):
    """Whole sequences, packed ones and decoding, on every device, with inputs that can be made."""
    found = cells(OPS[name], device)
    assert {mode for _, modes in found for mode in modes} == set(OPS[name].modes)
    listed = OPS[name].engine == "attention" and name not in ("attn", "attn_window")
    assert any(shape.packed for shape, _ in found) == (OPS[name].packs and not listed)
    assert len({str(shape) for shape, modes in found if "step" not in modes}) == sum(
        "step" not in modes for _, modes in found
    )
    for shape, _ in found:
        x = OPS[name].make(shape.at(max(32, shape.packed)), BF16, "cpu")
        assert ("cu_seqlens" in x) == bool(shape.packed)


def test_sets_are_for_operators_there_are():
    names = {op.name for op in ROWS}
    assert all({*s.only} <= names for found in SETS.values() for s in found)
    assert "long" in {s.name for s in sets(OPS["gla"], "cpu")}
    assert "long" not in {s.name for s in sets(OPS["retention"], "cpu")}


def test_reference_shapes_come_first():
    first = [str(s.shapes[0]) for s in SETS["chunk", "cuda"][:2]]
    assert first == ["B1 T32768 H32 K128 V128", "B8 T4096 H16 K128 V128"]
