"""Sparse attention's kernels of Hopper's warpgroups, forward and backward, on the emulator:
values, traffic, races, and what goes to the kernels of older GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention import Attn, Call, emulator_ops, half_of_blocks, make, raw_arguments, run
from attention import definition as differentiated
from checks import assert_accepted, assert_same_bits
from emulators import emulator
from impls import Emulator
from inputs import Tensors

from lsm_cuda import reference
from lsm_cuda.ops import BlockLists

CAUSAL = {"causal": True}
EVERYTHING = ("softcap", "sinks", "alibi", "ramp", "bias")


def attend(impl: Emulator, call: Call) -> Tensors:
    def forward() -> Tensors:
        o, lse = emulator_ops(impl).block_sparse_attn_fwd(*raw_arguments(call))
        return {"o": o, "lse": lse}

    return impl.under_every_seed(forward)


def hopper(flavour: str = "_emu", seeds: tuple[int, ...] = (0, 1, 2)) -> Emulator:
    return Emulator(flavour, flavour, seeds, architecture=90)


def definition(call: Call, dtype: torch.dtype) -> Tensors:
    tensors = {n: t.to(dtype) for n, t in call.x.tensors.items()}
    o, lse = reference.block_sparse_attention(
        **call.arguments(tensors), cu_seqlens_q=call.x.cu_seqlens, cu_seqlens_k=call.cu_seqlens_k
    )
    return {"o": o, "lse": lse}


def ran(flavour: str = "_emu") -> bool:
    """Whether the last launch was the warpgroups' kernel."""
    return "warpgroup_rows" in emulator(flavour).counters()["launches"][-1]["kernel"]


# ---- Values ----

BF16, WIDE = {"dtype": "bf16", "dims": (64, 64)}, {"dtype": "bf16", "dims": (128, 128)}
F16 = {"dtype": "f16", "dims": (64, 64)}
CASES = [
    Attn(Tq=300, Tk=300, heads=(2, 1, 1), lists="none", mask=CAUSAL, **BF16),
    Attn(Tq=150, Tk=420, lists="none", **WIDE),
    Attn(Tq=1, Tk=300, heads=(16, 2, 1), lists="none", mask=CAUSAL, **BF16),
    Attn(Tq=77, Tk=5, lists="none", mask=CAUSAL, **F16),  # the first queries see nothing
    Attn(Tq=200, Tk=200, lists="none", mask={"causal": True, "left": 30, "sinks": 3}, **WIDE),
    Attn(Tq=90, Tk=90, lists="none", mask={"causal": True, "dilation": 3, "sinks": 2}, **BF16),
    Attn(Tq=90, Tk=90, lists="none", mask={"causal": True, "prefix": 50}, **F16, batch=2),
    Attn(Tq=90, Tk=90, lists="none", mask={"causal": True, "causal_block": 32}, **BF16),
    Attn(Tq=90, Tk=30, lists="none", **BF16, heads=(2, 2, 1),
         mask={"causal": True, "align_end": False, "key_stride": 4, "key_length": 8}),
    Attn(Tq=90, Tk=90, lists="none", **BF16, heads=(2, 2, 1),
         mask={"causal": True, "head_left": [3, -1], "sinks": 1}),
    Attn(Tq=90, Tk=90, heads=(2, 1, 1), lists="none", mask=CAUSAL, extras=EVERYTHING, **BF16),
    Attn(Tq=200, Tk=450, heads=(4, 2, 2), blocks=(64, 64), **WIDE),
    Attn(Tq=200, Tk=450, heads=(2, 1, 1), blocks=(128, 128), mask=CAUSAL, **BF16),
    Attn(Tq=70, Tk=300, heads=(6, 2, 2), blocks=(16, 16), **F16),
    Attn(Tq=70, Tk=300, heads=(4, 4, 4), blocks=(32, 64), lists="capacity", **BF16, batch=2),
    Attn(Tq=70, Tk=100, heads=(2, 1, 1), blocks=(64, 32), lists="empty", extras=("sinks",), **BF16),
    Attn(Tq=70, Tk=200, heads=(4, 2, 2), blocks=(64, 32), mask=CAUSAL, extras=EVERYTHING, **WIDE),
    Attn(Tq=90, Tk=90, blocks=(16, 64), dims=(72, 40), dtype="bf16", layout="transposed"),
    Attn(Tq=90, Tk=90, blocks=(16, 64), dims=(40, 128), dtype="f16", scale=100.0, mask=CAUSAL),
    Attn(Tq=120, Tk=120, heads=(4, 2, 2), batch="int32", mask=CAUSAL, blocks=(32, 64), **BF16),
    Attn(Tq=120, Tk=90, heads=(4, 2, 1), batch="int64", lists="none", **WIDE),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition_and_the_kernel_of_older_gpus(case):
    call = make(case)
    truth, same = (definition(call, d) for d in (torch.float64, torch.float32))
    ours = attend(hopper(), call)
    assert ran()
    assert_accepted(ours, truth, same, call.x)
    older = attend(Emulator("emulator", seeds=(0,)), call)
    assert not ran()
    size = truth["o"].abs().max().clamp(min=1e-6)
    torch.testing.assert_close(ours["o"] / size, older["o"] / size, rtol=0, atol=2e-2)
    torch.testing.assert_close(ours["lse"], older["lse"], rtol=1e-5, atol=1e-5)


def test_lists_of_several_plans():
    """More units than a plan has room for: the ring goes on over its parts."""
    call = make(Attn(Tq=16, Tk=16 * 400, blocks=(16, 16), lists="all", dims=(64, 64), dtype="bf16"))
    truth, same = (definition(call, d) for d in (torch.float64, torch.float32))
    assert_accepted(attend(hopper(seeds=(2,)), call), truth, same, call.x)
    assert ran()


@pytest.mark.parametrize("lists", ["none", "all"])
def test_the_next_sequence_does_not_show(lists):
    """Keys and values behind a packed sequence's end come along in its last box."""
    call = make(
        Attn(Tq=40, Tk=40, batch="int32", lists=lists, blocks=(16, 64), mask=CAUSAL, **BF16)
    )
    expected = attend(hopper(), call)
    bounds = call.x.cu_seqlens.tolist()
    first = next(n for n in bounds if n > 0)  # where the second sequence that is one begins
    tensors = dict(call.x.tensors)
    for name in "kv":
        tensors[name] = tensors[name].clone()
        tensors[name][:, first:] = torch.nan
    found = attend(hopper(), replace(call, x=replace(call.x, tensors=tensors)))
    assert_same_bits({"o": found["o"][:, :first]}, {"o": expected["o"][:, :first]})
    assert found["o"][:, first:].isnan().any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bad_boundaries_give_nan_everywhere(seed):
    call = make(Attn(Tq=40, Tk=40, batch="int64", lists="none", mask=CAUSAL, **BF16))
    bad = torch.tensor([0, 30, 20, 40, 40, 40, 40])[: len(call.x.cu_seqlens)]
    bad[-1] = 40
    call = replace(call, x=replace(call.x, cu_seqlens=bad))
    results = run(hopper(seeds=(seed,)), call)
    assert all(results[n].isnan().all() for n in ("o", "lse", "dq", "dk", "dv"))


# ---- Gradients ----

GRADIENTS = [
    Attn(Tq=200, Tk=150, heads=(4, 2, 2), blocks=(64, 64), mask=CAUSAL, **WIDE),
    Attn(Tq=300, Tk=280, heads=(2, 1, 1), blocks=(128, 128), **BF16),
    Attn(Tq=150, Tk=200, heads=(2, 1, 1), lists="none", mask=CAUSAL, **WIDE),
    Attn(Tq=200, Tk=200, lists="none", mask={"causal": True, "left": 30, "sinks": 3}, **F16),
    Attn(Tq=77, Tk=5, heads=(16, 2, 1), lists="none", mask=CAUSAL, **F16),  # some see nothing
    Attn(Tq=70, Tk=300, heads=(6, 2, 2), blocks=(16, 16), **F16),
    Attn(Tq=70, Tk=150, heads=(4, 4, 4), blocks=(32, 64), lists="capacity", **BF16, batch=2),
    Attn(Tq=70, Tk=100, heads=(2, 1, 1), blocks=(64, 32), lists="empty", extras=("sinks",), **WIDE),
    Attn(Tq=70, Tk=200, heads=(4, 2, 2), blocks=(64, 32), mask=CAUSAL, extras=EVERYTHING, **WIDE),
    Attn(Tq=130, Tk=90, heads=(2, 1, 1), blocks=(128, 16), extras=EVERYTHING, **F16),
    Attn(Tq=90, Tk=90, blocks=(16, 64), dims=(72, 40), dtype="bf16", layout="transposed"),
    Attn(Tq=90, Tk=90, blocks=(16, 64), dims=(40, 128), dtype="f16", mask=CAUSAL),
    Attn(Tq=120, Tk=120, heads=(4, 2, 2), batch="int32", mask=CAUSAL, blocks=(64, 64), **WIDE),
    Attn(Tq=120, Tk=90, heads=(4, 2, 1), batch="int64", lists="none", **BF16),
]  # fmt: skip


def launches(flavour: str = "_emu") -> list[str]:
    return [launch["kernel"] for launch in emulator(flavour).counters()["launches"]]


def gradients_ran(flavour: str = "_emu") -> bool:
    """Whether the last backward was the warpgroups'."""
    names = launches(flavour)
    last = max(i for i, name in enumerate(names) if "row_stats" in name)
    ours = [any(f"warpgroup_{what}" in name for name in names[last:]) for what in ("rows", "keys")]
    assert ours[0] == ours[1]
    return ours[0]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_equal_the_definitions(case):
    call = make(case)
    truth, same = (differentiated(call, d) for d in (torch.float64, torch.float32))
    assert_accepted(run(hopper(), call), truth, same, call.x)
    assert gradients_ran()


def test_gradients_over_lists_of_several_plans():
    """More units than a plan has room for, of queries and of keys."""
    tall = make(Attn(Tq=16 * 280, Tk=16, heads=(1, 1, 1), lists="all", **BF16))
    wide = make(Attn(Tq=16, Tk=16 * 280, heads=(1, 1, 1), lists="all", **BF16))
    for call in (tall, wide):
        truth, same = (differentiated(call, d) for d in (torch.float64, torch.float32))
        assert_accepted(run(hopper(seeds=(2,)), call), truth, same, call.x)
        assert gradients_ran()


@pytest.mark.parametrize("D", [64, 128])
def test_keys_of_every_query_are_cut_into_pieces(D):
    call = make(Attn(Tq=640, Tk=640, heads=(2, 1, 1), blocks=(16, 64), dims=(D, D), dtype="bf16"))
    bitmap = torch.eye(40, dtype=torch.bool).unflatten(1, (10, 4)).any(-1)[None, None]
    bitmap[..., 0] = True
    call = replace(call, lists=BlockLists.from_bitmap(bitmap, 640, 640, 16, 64))
    truth, same = (differentiated(call, d) for d in (torch.float64, torch.float32))
    impl = Emulator("_emu", seeds=(1, 2), multiprocessors=1, architecture=90)
    assert_accepted(run(impl, call), truth, same, call.x)
    assert gradients_ran() and "join_pieces" in launches()[-1]


@pytest.mark.parametrize("lists", ["none", "all"])
def test_gradients_do_not_see_the_next_sequence(lists):
    """What lies behind a packed sequence's end comes along in its last box, and is not finite."""
    call = make(
        Attn(Tq=40, Tk=40, batch="int32", lists=lists, blocks=(16, 64), mask=CAUSAL, **BF16)
    )
    expected = run(hopper(), call)
    first = next(n for n in call.x.cu_seqlens.tolist() if n > 0)
    tensors = {n: t.clone() for n, t in call.x.tensors.items()}
    grad_o = call.x.grad_o.clone()
    for t in (*(tensors[n] for n in "qkv"), grad_o):
        t[:, first:] = torch.nan
    x = replace(call.x, tensors=tensors, grad_o=grad_o)
    found = run(hopper(), replace(call, x=x))
    assert gradients_ran()
    for name in ("dq", "dk", "dv"):
        assert_same_bits({name: found[name][:, :first]}, {name: expected[name][:, :first]})
        assert found[name][:, first:].isnan().any()


# ---- Who runs ----


@pytest.mark.parametrize(
    "case",
    [
        Attn(Tq=30, Tk=40, blocks=(1, 16), **BF16),  # a list per token
        Attn(Tq=30, Tk=40, dims=(256, 64), dtype="bf16"),
        Attn(Tq=30, Tk=40, dims=(64, 64)),  # fp32
        Attn(Tq=30, Tk=0, lists="none", **BF16),
    ],
    ids=str,
)
def test_what_warpgroups_do_not_take(case):
    call = make(case)
    emulator("_emu").reset_counters()
    ours, older = run(hopper(), call), run(Emulator("emulator", seeds=(0,)), call)
    assert launches() and not any("warpgroup" in name for name in launches())
    assert_same_bits(ours, older)


def test_one_row_for_all_heads_is_no_tensor_map():
    call = make(Attn(Tq=30, Tk=40, heads=(2, 2, 1), lists="none", **BF16))
    tensors = dict(call.x.tensors)
    tensors["k"] = tensors["k"][:, :, :1].expand(-1, -1, 2, -1)
    call = replace(call, x=replace(call.x, tensors=tensors))
    ours, older = run(hopper(), call), run(Emulator("emulator", seeds=(0,)), call)
    assert not gradients_ran()
    assert_same_bits(ours, older)


# ---- Traffic and products ----

# Tq, Tk, Hq, Hkv, D, block_q, block_k
SHAPES = {
    "rows of 64": (256, 512, 2, 1, 128, 64, 64),
    "rows of 128": (256, 1024, 1, 1, 64, 128, 128),
    "rows of 16 of a group": (64, 256, 4, 1, 128, 16, 16),
}


@pytest.mark.parametrize("name", SHAPES)
def test_reads_each_block_of_a_list_once(name):
    Tq, Tk, Hq, Hkv, D, block_q, block_k = SHAPES[name]
    arguments, bitmap, _ = half_of_blocks(Tq, Tk, Hq, Hkv, D, D, block_q, block_k)
    q = arguments[0]
    emu = emulator("_emu")
    emu.set_seed(0)
    emu.reset_counters()
    emu.set_architecture(90)
    o, lse = torch.ops.lsm_emu.block_sparse_attn_fwd(*arguments)
    emu.set_architecture(80)
    (launch,) = emu.counters()["launches"]
    assert "warpgroup_rows" in launch["kernel"]
    tiles = Hkv * (Hq // Hkv * block_q // 128 or 1)  # of 128 rows, that go through a list
    read = int(bitmap.sum()) * tiles * block_k * 2 * D * 2
    moved = launch["global_read_bytes"] + launch["global_write_bytes"]
    assert moved <= 1.02 * (read + (q.numel() + o.numel()) * 2 + lse.numel() * 4)
    assert 32 * launch["global_read_sectors"] <= 1.05 * launch["global_read_bytes"]
    # Two products of 128 rows and whole steps of 128 keys; a warpgroup without rows has none.
    steps = int((-(-bitmap.sum(-1) * block_k // 128)).sum()) * tiles
    rows = min(128, Hq // Hkv * block_q)
    assert launch["mma_flops"] == steps * 128 * -(-rows // 64) * 64 * 4 * D


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_read_each_block_of_a_list_once(name):
    Tq, Tk, Hq, Hkv, D, block_q, block_k = SHAPES[name]
    arguments, bitmap, grad_o = half_of_blocks(Tq, Tk, Hq, Hkv, D, D, block_q, block_k)
    q, k = arguments[:2]
    emu = emulator("_emu")
    emu.set_seed(0)
    emu.set_architecture(90)
    o, lse = torch.ops.lsm_emu.block_sparse_attn_fwd(*arguments)
    emu.reset_counters()
    torch.ops.lsm_emu.block_sparse_attn_bwd(*arguments, o, lse, grad_o, None)
    emu.set_architecture(80)
    found = {
        what: next(x for x in emu.counters()["launches"] if f"warpgroup_{what}" in x["kernel"])
        for what in ("rows", "keys")
    }
    group, numbers = Hq // Hkv, lse.numel() * 64  # four lanes ask for a row's
    tiles = Hkv * (group * block_q // 128 or 1)  # of 128 rows, that go through a list
    sections = bitmap.repeat_interleave(block_k // 16, 1).unflatten(1, (-1, 4)).any(-1)
    queries = int(sections.sum()) * Hq * block_q  # of each 64 keys
    least = {
        "rows": int(bitmap.sum()) * tiles * block_k * 4 * D + 3 * q.numel() * 2 + numbers,
        "keys": queries * (4 * D + 16) + 4 * k.numel() * 2,
    }
    for what, launch in found.items():
        moved = launch["global_read_bytes"] + launch["global_write_bytes"]
        assert least[what] <= moved <= 1.03 * least[what], what
        assert 32 * launch["global_read_sectors"] <= 1.15 * launch["global_read_bytes"]
    # Three products of 64 rows and whole steps of 64 keys; four of 64 keys and whole steps of
    # queries, 32 of them where heads are wide.
    rows = min(128, group * block_q)
    steps = int((-(-bitmap.sum(-1) * block_k // 64)).sum()) * tiles
    assert found["rows"]["mma_flops"] == steps * -(-rows // 64) * 64 * 64 * 6 * D
    size = 64 if D == 64 else 32
    steps = int((-(-sections.sum(0) * block_q // size)).sum()) * Hq
    assert found["keys"]["mma_flops"] == steps * size * 64 * 8 * D


# ---- Races ----

RACES = [
    Attn(Tq=200, Tk=600, heads=(2, 1, 1), lists="none", mask=CAUSAL, **BF16),
    Attn(Tq=200, Tk=300, heads=(2, 1, 1), blocks=(64, 64), mask=CAUSAL, **WIDE),
    Attn(Tq=70, Tk=300, heads=(2, 1, 2), blocks=(16, 16), dims=(128, 72), dtype="f16"),
    Attn(Tq=60, Tk=60, heads=(4, 2, 1), extras=EVERYTHING, mask=CAUSAL, batch="int64", **F16),
    Attn(Tq=16, Tk=16 * 270, blocks=(16, 16), lists="all", **BF16),
]


@pytest.mark.parametrize("case", RACES, ids=str)
def test_no_schedule_races(case):
    call = make(case)
    results = run(hopper("_emu_race", (1, 2, 3, 4)), call)
    assert gradients_ran("_emu_race")
    assert_same_bits(results, run(hopper(seeds=(0,)), call))
