"""Decode attention's and block selection's CUDA kernels on the emulator: races, traffic."""

from __future__ import annotations

import pytest
import torch
from emulators import emulator
from torch import Tensor

from lsm_cuda.ops import AttnMask, BlockChoice, BlockLists, ScoreRule, _sparse_attn, selection

BF16 = torch.bfloat16


def decode(lib, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists | None, table=None, left=-1):
    mask = AttnMask(causal=True, left=left)
    given = _sparse_attn._arguments("", q, lists, mask, None, 0.0, None, None, None, 0.0)
    return lib.sparse_attn_decode(q, k, v, None, table, *given)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("latent", [False, True])
def test_decode_has_no_races(dtype, latent):
    emu, lib = emulator("_emu_race"), torch.ops.lsm_emu_race
    q = torch.randn(1, 2, 3, 64).to(dtype)
    k, v = torch.randn(2, 5, 64, 1, 64).to(dtype)
    table = torch.tensor([[4, 0, 2, 3, 1]], dtype=torch.int32)
    for seed in (1, 2):
        emu.set_seed(seed)
        o, lse = decode(lib, q, k, k[..., :40] if latent else v, None, table)
        lib.merge_attn_states_bwd(o[None], lse[None], o, lse, o, lse)
        lengths = torch.tensor([300], dtype=torch.int32)
        lib.kv_cache_update(k, v, k[:1, :2], v[:1, :2], lengths, table)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_have_no_races(dtype, bits):
    emu, lib = emulator("_emu_race"), torch.ops.lsm_emu_race
    q = torch.randn(1, 2, 3, 64).to(dtype)
    codes = torch.randint(256, (2, 1, 300, 1, 8 * bits), dtype=torch.uint8)
    affine = torch.randn(2, 1, 300, 1, 2)
    mask = AttnMask(causal=True)
    given = _sparse_attn._arguments("", q, None, mask, None, 0.0, None, None, None, 0.0)
    for seed in (1, 2):
        emu.set_seed(seed)
        lib.sparse_attn_decode_codes(q, *codes, *affine, None, None, *given)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_selection_has_no_races(dtype):
    emu, lib = emulator("_emu_race"), torch.ops.lsm_emu_race
    q, k = torch.randn(1, 20, 8, 72).to(dtype), torch.randn(1, 130, 2, 72).to(dtype)
    rule = ScoreRule.compressed(8, 4, 16)
    chosen = BlockChoice(top_k=3, top_p=0.9, first=1, local=1)._arguments(rule, 9)
    for seed in (1, 2):
        emu.set_seed(seed)
        pooled = lib.block_pool(k, None, None, None, 8, 4, 3, False)[..., :72]
        given = selection._arguments(q, pooled, rule, None, None, None, None, None, 9)
        lib.block_select(*given, *chosen)
        pool = (k, None, None, None, 8, 4, 3, False)
        lib.block_pool_bwd(*pool, y := lib.block_pool(*pool), y)
        lib.block_topk(lib.block_scores(*given), None, None, None, 20, given[-1], *chosen)


def moved(launch: dict) -> int:
    return launch["global_read_bytes"] + launch["global_write_bytes"]


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_all_that_is_read(bits):
    emu, lib = emulator("_emu"), torch.ops.lsm_emu
    emu.set_seed(0)
    T, Hkv, K = 1024, 2, 128
    q = torch.randn(1, 1, 8, K).to(BF16)
    codes = torch.zeros(2, 1, T, Hkv, K * bits // 8, dtype=torch.uint8)
    affine = torch.ones(2, 1, T, Hkv, 2)
    mask = AttnMask(causal=True)
    given = _sparse_attn._arguments("", q, None, mask, None, 0.0, None, None, None, 0.0)
    emu.reset_counters()
    lib.sparse_attn_decode_codes(q, *codes, *affine, None, None, *given)
    launch = emu.counters()["launches"][0]
    # eight threads of a row each ask for its step and least, in one request
    sectors = launch["global_read_sectors"] + launch["global_write_sectors"]
    rows = 2 * T * Hkv
    results, queries = T // 256 * 8 * (K + 1) * 4, q.numel() * 2 * T // 256
    assert 32 * sectors <= 1.05 * (rows * (K * bits // 8 + 32) + results + queries) + 512


@pytest.mark.parametrize("kind", ["dense", "window", "lists", "latent"])
def test_decode_reads_what_it_attends_to(kind):
    """The cache's bytes once for each group of heads, queries, and results of the parts."""
    emu, lib = emulator("_emu"), torch.ops.lsm_emu
    emu.set_seed(0)
    T, G, Hkv, K, V = 1024, 8, 2, 128, 64
    q = torch.randn(1, 1, G * Hkv, K).to(BF16)
    k, v = torch.randn(1, T, Hkv, K).to(BF16), torch.randn(1, T, Hkv, V).to(BF16)
    lists, keys, left, columns = None, T, -1, K + V
    if kind == "window":
        keys, left = 200, 199
    elif kind == "lists":
        chosen = torch.zeros(1, Hkv, 1, T // 64, dtype=torch.bool)
        chosen[..., ::4] = True
        lists, keys = BlockLists.from_bitmap(chosen, 1, T, 1, 64, 4), T // 4
    elif kind == "latent":
        v, columns = k[..., :V], K
    emu.reset_counters()
    decode(lib, q, k, v, lists, left=left)
    launch, merge = emu.counters()["launches"]
    parts = -(-keys // 256)
    results = parts * G * Hkv * (V + 1) * 4
    cache, queries = keys * Hkv * columns * 2, q.numel() * 2 * parts
    assert moved(launch) <= 1.05 * (cache + queries + results) + 512
    assert moved(merge) <= 4 * results


def test_scores_stay_on_the_chip():
    """NSA's selection: keys once for every 64 members, lists out, nothing in between."""
    emu, lib = emulator("_emu"), torch.ops.lsm_emu
    emu.set_seed(0)
    T, G, K = 64, 16, 64
    q, keys = torch.randn(1, T, G, K).to(BF16), torch.randn(1, 15, 1, K).to(BF16)
    rule, choice = ScoreRule.compressed(8, 4, 16), BlockChoice(top_k=2, local=1)
    lse = torch.randn(1, G, T)
    given = selection._arguments(q, keys, rule, None, lse, None, None, None, 4)
    emu.reset_counters()
    index = lib.block_select(*given, *choice._arguments(rule, 4))
    (launch,) = emu.counters()["launches"]
    blocks = T * G // 64
    expected = q.numel() * 2 + blocks * keys.numel() * 2 + lse.numel() * 4 + index.numel() * 4
    assert moved(launch) <= 1.05 * expected + blocks * 4 * 5 * 4 * 4  # taps


@pytest.mark.parametrize("pool", range(4))
def test_pooling_is_a_copy(pool):
    """Whole windows side by side: every token once, every window once."""
    emu, lib = emulator("_emu"), torch.ops.lsm_emu
    x = torch.randn(1, 256, 2, 64).to(BF16)
    emu.reset_counters()
    y = lib.block_pool(x, None, None, None, 16, 16, pool, True)
    (launch,) = emu.counters()["launches"]
    assert moved(launch) <= 1.05 * 2 * (x.numel() + y.numel())


def test_a_choice_reads_its_scores_once():
    emu, lib = emulator("_emu"), torch.ops.lsm_emu
    rule, choice = ScoreRule.compressed(16, 16, 16), BlockChoice(top_k=8, first=1, local=1)
    scores = torch.rand(1, 2, 64, 256)
    given = selection._arguments(*(torch.randn(1, 64, 2, 16),) * 2, rule, *(None,) * 5, 256)
    emu.reset_counters()
    index = lib.block_topk(scores, None, None, None, 64, given[-1], *choice._arguments(rule, 256))
    (launch,) = emu.counters()["launches"]
    assert moved(launch) <= 1.05 * 4 * (scores.numel() + index.numel())


def test_a_cache_is_written_once():
    """By sectors: every thread asks for its row's length, which is one request of a warp."""
    emu, lib = emulator("_emu"), torch.ops.lsm_emu
    k_cache, v_cache = torch.zeros(2, 2, 512, 2, 64).to(BF16)
    k, v = torch.randn(2, 2, 16, 2, 64).to(BF16)
    emu.reset_counters()
    lib.kv_cache_update(k_cache, v_cache, k, v, torch.tensor([3, 400], dtype=torch.int32), None)
    (launch,) = emu.counters()["launches"]
    sectors = launch["global_read_sectors"] + launch["global_write_sectors"]
    assert 32 * sectors <= 1.15 * 2 * 2 * (k.numel() + v.numel())
