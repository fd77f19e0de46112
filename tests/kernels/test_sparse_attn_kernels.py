"""Sparse attention's CUDA kernels on the emulator: traffic held to the lists, races, pieces of
sections that every query has on its list, poison."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention import Attn, Call, definition, emulated, half_of_blocks, make, run
from checks import assert_accepted, assert_same_bits
from emulators import emulator
from impls import Emulator

from lsm_cuda.ops import AttnMask, BlockLists

CAUSAL = {"causal": True}


def listed(bitmap: torch.Tensor, Tq: int, Tk: int, block_q: int, block_k: int) -> BlockLists:
    return BlockLists.from_bitmap(bitmap, Tq, Tk, block_q, block_k)


# ---- Traffic ----

# Tq, Tk, Hq, Hkv, K and V, block_q, block_k; the tokens that go through a list together.
SHAPES = {
    "rows of 64": (256, 512, 2, 1, 128, 64, 64),
    "rows of 128": (256, 512, 1, 1, 64, 128, 128),
    "rows of 16 of a group": (64, 256, 4, 1, 128, 16, 16),
    "tokens": (16, 512, 16, 1, 64, 1, 64),
    "wide": (64, 256, 1, 1, 256, 64, 64),
    "latent": (64, 256, 2, 1, (576, 512), 32, 64),
}


def counted(name: str) -> dict:
    """Launches of a forward and of a backward over lists of half of the blocks, and what they must
    move: keys and values of a list's blocks for every tile, queries for every section of keys."""
    Tq, Tk, Hq, Hkv, D, block_q, block_k = SHAPES[name]
    K, V = D if isinstance(D, tuple) else (D, D)
    arguments, bitmap, grad_o = half_of_blocks(Tq, Tk, Hq, Hkv, K, V, block_q, block_k)
    q = arguments[0]
    emu = emulator("_emu")
    emu.set_seed(0)
    emu.reset_counters()
    o, lse = torch.ops.lsm_emu.block_sparse_attn_fwd(*arguments)
    torch.ops.lsm_emu.block_sparse_attn_bwd(*arguments, o, lse, grad_o, None)
    sections = bitmap.repeat_interleave(block_k // 16, 1).unflatten(1, (-1, 4)).any(-1)
    entries = int(sections.sum())  # rows that have some of 64 keys
    if block_q == 1:  # eight tokens read the union of their lists
        bitmap = bitmap.unflatten(0, (-1, 8)).any(1)
    latent, passes = K > 256, 1 if K <= 128 else 2  # dk and dv apart
    each = int(bitmap.sum()) * block_k * (K + V) * 2
    # How often a list is read, by tiles of 128 rows; of latent heads 64, and 32 for dq and keys.
    tiles, dq_tiles = (
        -(-Hq // (rows // block_q)) if block_q > 1 else Hkv
        for rows in ((64, 32) if latent else (128, 128))
    )
    x, y, numbers = q.numel() * 2, grad_o.numel() * 2, lse.numel() * 4
    keys, queries = Tk * Hkv * (K + V) * 2, entries * Hq * block_q * ((K + V) * 2 + 16)
    return {
        "launches": emu.counters()["launches"],
        "forward": each * tiles + x + y + numbers,
        "row_stats": 2 * y + numbers + 4 * numbers,
        "tensor_rows": each * dq_tiles + 2 * x + y + 4 * numbers,
        "tensor_keys": queries * (2 if latent else 1) + keys + keys // passes,
    }


def moved(launch: dict) -> int:
    return launch["global_read_bytes"] + launch["global_write_bytes"]


def wasted(launch: dict) -> float:
    return 32 * launch["global_read_sectors"] / launch["global_read_bytes"]


@pytest.mark.parametrize("name", SHAPES)
def test_each_block_of_a_list_is_read_once(name):
    call = counted(name)
    forward, *backward = call["launches"]
    assert call["forward"] <= moved(forward) <= 1.15 * call["forward"]
    assert wasted(forward) <= 1.05
    kernels = {kernel: [launch for launch in backward if kernel in launch["kernel"]]
               for kernel in ("row_stats", "tensor_rows", "tensor_keys")}  # fmt: skip
    for kernel, launches in kernels.items():
        assert launches, kernel
        for launch in launches:
            assert moved(launch) <= 1.1 * call[kernel], kernel
            assert wasted(launch) <= 1.15, kernel
    least = sum(call[kernel] * len(launches) for kernel, launches in kernels.items())
    assert least <= sum(moved(launch) for launch in backward) <= 1.15 * least
    assert all(launch["ldmatrix_conflicts"] == 0 for launch in call["launches"])


def test_a_window_reads_what_it_sees():
    T, left, D = 1024, 127, 64
    q, k, v = torch.randn(3, 1, T, 1, D).bfloat16()
    emu = emulator("_emu")
    emu.reset_counters()
    mask = AttnMask(causal=True, left=left, sinks=4)
    torch.ops.lsm_emu.block_sparse_attn_fwd(
        q, k, v, *(None,) * 9, [1.0, 0.0, 0.0, 0.0], mask.numbers(), [1, 64, 64]
    )
    (launch,) = emu.counters()["launches"]
    blocks = 128 // 64 + 2 + 1  # a tile's own, the window's, the sinks'
    assert launch["global_read_bytes"] <= 1.05 * (T * D * 2 + T // 128 * blocks * 64 * 2 * D * 2)


# ---- Pieces ----


def popular(case: Attn, density: float = 0.05) -> Call:
    """A call whose lists all have the first block."""
    call = make(case)
    assert call.lists is not None
    bitmap = torch.rand(call.lists.to_bitmap().shape) < density
    bitmap[..., 0] = True
    cu = {"cu_seqlens_q": call.lists.cu_seqlens_q, "cu_seqlens_k": call.lists.cu_seqlens_k}
    sizes = (case.Tq, case.Tk, *case.blocks)
    return replace(call, lists=replace(BlockLists.from_bitmap(bitmap, *sizes), **cu))


@pytest.mark.parametrize("dims", [(64, 64), (136, 256), (576, 512)], ids=str)
def test_keys_of_every_query(dims):
    call = popular(Attn(Tq=280, Tk=200, heads=(2, 1, 1), blocks=(1, 32), dtype="bf16", dims=dims))
    impl = Emulator("emulator", seeds=(1, 2), multiprocessors=1)
    truth, same = (definition(call, d) for d in (torch.float64, torch.float32))
    assert_accepted(run(impl, call), truth, same, call.x)
    launches = emulator("_emu").counters()["launches"]
    assert sum("join_pieces" in launch["kernel"] for launch in launches[-3:]) == 1


# ---- Sums over blocks and over queries ----


@pytest.mark.parametrize(
    "case",
    [
        # more blocks than a plan has room for
        Attn(Tq=16, Tk=4500, heads=(1, 1, 1), extras=("bias",), lists="all", dtype="bf16"),
        # tiles of one row of the lists, whose sums are added up
        Attn(
            Tq=128, Tk=60, heads=(4, 1, 1), extras=("bias", "ramp"), blocks=(128, 16), dtype="f16"
        ),
    ],
    ids=str,
)
def test_biases_and_ramps_are_on_tensor_cores(case):
    call = make(case)
    emulator("_emu").reset_counters()
    truth, same = (definition(call, d) for d in (torch.float64, torch.float32))
    results = run(Emulator("emulator", seeds=(0,), multiprocessors=1), call)
    assert_accepted(results, truth, same, call.x)
    names = [launch["kernel"] for launch in emulator("_emu").counters()["launches"]]
    assert any("tensor_keys" in name for name in names)
    assert not any("exact" in name for name in names)


# ---- Races ----

# Together they take every kernel, and the ways through a plan: none, some and many parts.
RACES = [
    Attn(Tq=150, Tk=150, heads=(2, 1, 1), blocks=(64, 64), mask=CAUSAL, dtype="bf16"),
    Attn(Tq=70, Tk=300, heads=(2, 1, 2), blocks=(16, 16), dims=(128, 72), dtype="f16"),
    Attn(Tq=40, Tk=90, blocks=(128, 128), dims=(256, 256), dtype="bf16", lists="all"),
    Attn(Tq=40, Tk=90, blocks=(16, 32), dims=(256, 40), dtype="f16", mask=CAUSAL),
    Attn(Tq=30, Tk=90, heads=(4, 1, 1), blocks=(1, 16), dtype="bf16", lists="capacity"),
    Attn(Tq=60, Tk=60, lists="none", mask={"causal": True, "left": 20}, dtype="bf16",
         extras=("softcap", "alibi", "sinks"), batch="int32"),
    Attn(Tq=60, Tk=60, heads=(4, 2, 1), extras=("bias", "ramp"), mask=CAUSAL, dtype="bf16"),
    Attn(Tq=60, Tk=45, heads=(2, 1, 1), blocks=(1, 16), batch="int64", mask=CAUSAL),
    Attn(Tq=40, Tk=40, heads=(2, 1, 1), blocks=(32, 32), dims=(576, 512), mask=CAUSAL,
         extras=("bias",), dtype="bf16"),
    Attn(Tq=20, Tk=40, heads=(2, 1, 1), dims=(264, 300), extras=("bias", "ramp")),
]  # fmt: skip


@pytest.mark.parametrize("case", RACES, ids=str)
def test_no_schedule_races(case):
    call = make(case)
    impl = Emulator("race", "_emu_race", seeds=(1, 2, 3, 4), multiprocessors=1)
    results = run(impl, call)
    plain = Emulator("emulator", seeds=(0,), multiprocessors=1)
    assert_same_bits(results, run(plain, call))


# ---- Poison ----


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("which", ["q", "k"])
def test_bad_boundaries_give_nan_everywhere(dtype, which):
    call = make(Attn(Tq=40, Tk=40, batch="int64", dtype=dtype, lists="none", mask=CAUSAL))
    bad = torch.tensor([0, 30, 20, 40, 40, 40, 40])[: len(call.x.cu_seqlens)]
    bad[-1] = 40
    x = replace(call.x, cu_seqlens=bad) if which == "q" else call.x
    call = replace(call, x=x, cu_seqlens_k=bad if which == "k" else call.cu_seqlens_k)
    impl = Emulator("emulator", seeds=(0,))
    results = impl.under_every_seed(lambda: emulated(impl, call))
    assert all(t.isnan().all() for t in results.values())
