"""Values that weigh nothing are left out, SpargeAttn's second stage: those alone, and not their
weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention import Attn, definition, emulator_ops, make, raw_arguments
from emulators import emulator
from impls import Emulator

from lsm_cuda import sparse
from lsm_cuda.ops import AttnMask, BlockLists, _sparse_attn, block_sparse_attn

T, BLOCK, D = 256, 64, 32


def near_and_far(dtype: torch.dtype, heads: int = 2):
    """Every query's scores are near 10 in the first block, 4 in the second, and 9 in others."""
    q = torch.zeros(1, T, heads, D)
    q[..., 0] = 1
    k, v = torch.randn(1, T, 1, D) / 8, torch.randn(1, T, 1, D)
    k[..., 0] = 9 + torch.rand(1, T, 1) / 4
    k[:, :BLOCK, :, 0] += 1
    k[:, BLOCK : 2 * BLOCK, :, 0] -= 5
    v[:, BLOCK : 2 * BLOCK] += 200
    return [x.to(dtype) for x in (q, k, v)]


def attend(impl, q, k, v, lists: BlockLists | None, threshold: float, mask: AttnMask | None = None):
    lists = None if lists is None else lists.to(impl.device)
    given = _sparse_attn._arguments("", q, lists, mask, 1.0, 0.0, None, None, None, 0.0, threshold)
    library = emulator_ops(impl) if isinstance(impl, Emulator) else torch.ops.lsm
    call = (x.to(impl.device) for x in (q, k, v))
    return tuple(x.cpu() for x in library.block_sparse_attn_fwd(*call, None, None, *given))


@pytest.mark.parametrize("block_q", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_far_blocks_lose_their_values(impl, dtype, block_q):
    q, k, v = near_and_far(dtype)
    every = torch.ones(1, 1, -(-T // block_q), T // BLOCK, dtype=torch.bool)
    lists = BlockLists.from_bitmap(every, T, T, block_q, BLOCK)
    o, lse = attend(impl, q, k, v, lists, 3.0)
    gone = v.clone()
    gone[:, BLOCK : 2 * BLOCK] = 0
    want, same = attend(impl, q, k, gone, lists, 0.0)
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(lse, same)
    whole, _ = attend(impl, q, k, v, lists, 0.0)
    assert (whole - want).abs().min() > 0.1  # the values would show
    torch.testing.assert_close(attend(impl, q, k, v, lists, 12.0)[0], whole)


@pytest.mark.parametrize(
    "attn",
    [
        Attn(Tq=70, Tk=70, heads=(2, 1, 1), mask={"causal": True}, dtype="bf16"),
        Attn(Tq=70, Tk=70, heads=(2, 1, 1), blocks=(1, 16), mask={"causal": True}, scale=1.0),
        Attn(Tq=40, Tk=90, heads=(2, 1, 1), extras=("softcap", "sinks", "bias"), scale=1.0),
        Attn(Tq=40, Tk=90, heads=(4, 1, 1), dims=(256, 40), lists="none", dtype="f16", scale=1.0),
        Attn(Tq=60, Tk=60, lists="none", batch="int32", mask={"causal": True, "left": 20}),
        Attn(lists="empty"),
    ],
    ids=str,
)
def test_what_is_left_out_weighs_little(impl, attn):
    """Of random scores: at most a weight of e to the minus threshold for each key."""
    call, threshold = make(attn), 2.5
    library = emulator_ops(impl) if isinstance(impl, Emulator) else torch.ops.lsm
    arguments = raw_arguments(replace(call, options=call.options | {"pv_threshold": threshold}))
    o, lse = library.block_sparse_attn_fwd(*arguments)
    truth = definition(call, torch.float64)
    torch.testing.assert_close(lse.double(), truth["lse"], rtol=1e-4, atol=1e-4)
    whole, _ = library.block_sparse_attn_fwd(*raw_arguments(call))
    value = call.x.tensors["v"].abs().max().double()
    # of each weight's share of the softmax's sum, which the largest weight is part of
    bound = attn.Tk * torch.exp(torch.tensor(-threshold)) * value
    assert ((o.double() - whole.double()).abs() <= bound).all()
    huge = raw_arguments(replace(call, options=call.options | {"pv_threshold": 1e4}))
    torch.testing.assert_close(library.block_sparse_attn_fwd(*huge)[0], whole)


test_what_is_left_out_weighs_little.only_impls = ("cpu", "emulator")  # arguments on the host


def test_products_are_saved():
    """A quarter of the blocks is far: an eighth of the products."""
    q, k, v = near_and_far(torch.bfloat16, 2)
    q, k, v = (torch.cat([x, x * 0], -1) for x in (q, k, v))  # 64 columns, none of them padded
    emu, counted = emulator("_emu"), []
    for threshold in (3.0, 12.0):
        emu.reset_counters()
        given = _sparse_attn._arguments(
            "", q, None, None, 1.0, 0.0, None, None, None, 0.0, threshold
        )
        torch.ops.lsm_emu.block_sparse_attn_fwd(q, k, v, None, None, *given)
        counted.append(emu.counters()["launches"][-1]["mma_instructions"])
    assert counted[0] * 8 == counted[1] * 7


def test_sparge_attn():
    q, k, v = near_and_far(torch.float32)
    lists = sparse.sparge_lists(q, k, block=BLOCK, scale=1.0)
    mask = AttnMask(causal=True)
    whole = block_sparse_attn(q, k, v, lists, mask, 1.0)
    got = sparse.sparge_attn(q, k, v, pv_threshold=0.0, block=BLOCK, scale=1.0)
    torch.testing.assert_close(got, whole)
    some = sparse.sparge_attn(q, k, v, pv_threshold=3.0, block=BLOCK, scale=1.0)
    assert not torch.equal(some, whole)


def test_errors():
    q, k, v = (x.requires_grad_() for x in near_and_far(torch.float32))
    with pytest.raises(RuntimeError, match="pv_threshold has no backward, got an argument that"):
        block_sparse_attn(q, k, v, pv_threshold=1.0)
    with torch.no_grad():
        o, lse = block_sparse_attn(q, k, v, return_lse=True, pv_threshold=1.0)
        with pytest.raises(RuntimeError, match="pv_threshold must not be negative, got -1"):
            block_sparse_attn(q, k, v, pv_threshold=-1.0)
        given = _sparse_attn._arguments("", q, None, None, 1.0, 0.0, None, None, None, 0.0, 1.0)
        with pytest.raises(RuntimeError, match="bwd: pv_threshold has no backward, got 1"):
            torch.ops.lsm.block_sparse_attn_bwd(q, k, v, None, None, *given, o, lse, o, None)
