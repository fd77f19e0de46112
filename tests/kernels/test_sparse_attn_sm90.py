"""Sparse attention's forward kernel of Hopper's warpgroups, on the emulator: values, traffic,
races, and what goes to the kernel of older GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention import Attn, Call, emulator_ops, make, raw_arguments
from checks import assert_accepted, assert_same_bits
from emulators import emulator
from impls import Emulator
from inputs import Tensors

from lsm_cuda import reference
from lsm_cuda.ops import AttnMask, BlockLists

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
    assert all(t.isnan().all() for t in attend(hopper(seeds=(seed,)), call).values())


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
    ours, older = attend(hopper(), call), attend(Emulator("emulator", seeds=(0,)), call)
    assert not ran()
    assert_same_bits(ours, older)


def test_one_row_for_all_heads_is_no_tensor_map():
    call = make(Attn(Tq=30, Tk=40, heads=(2, 2, 1), lists="none", **BF16))
    tensors = dict(call.x.tensors)
    tensors["k"] = tensors["k"][:, :, :1].expand(-1, -1, 2, -1)
    call = replace(call, x=replace(call.x, tensors=tensors))
    ours, older = attend(hopper(), call), attend(Emulator("emulator", seeds=(0,)), call)
    assert not ran()
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
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, Tq, Hq, D, generator=draw).bfloat16()
    k, v = torch.randn(2, 1, Tk, Hkv, D, generator=draw).bfloat16()
    bitmap = torch.rand(-(-Tq // block_q), Tk // block_k, generator=draw) < 0.5
    lists = BlockLists.from_bitmap(bitmap, Tq, Tk, block_q, block_k)
    emu = emulator("_emu")
    emu.set_seed(0)
    emu.reset_counters()
    emu.set_architecture(90)
    o, lse = torch.ops.lsm_emu.block_sparse_attn_fwd(
        q, k, v, None, None, lists.index, lists.row_ptr, *(None,) * 5, [1.0, 0.0, 0.0, 0.0],
        AttnMask().numbers(), [1, block_q, block_k],
    )  # fmt: skip
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
    results = attend(hopper("_emu_race", (1, 2, 3, 4)), call)
    assert ran("_emu_race")
    assert_same_bits(results, attend(hopper(seeds=(0,)), call))
