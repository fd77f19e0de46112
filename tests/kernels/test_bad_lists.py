"""Lists and page tables that nobody checked: CUDA kernels leave out what does not exist. On the
emulator, where LSM_CHECK_LISTS=0 turns the checks off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention import Attn, Call, make, run
from checks import assert_same_bits
from impls import Emulator

from lsm_cuda.ops import AttnMask, BlockLists, _sparse_attn

EMULATOR = Emulator("emulator", seeds=(1, 2))
EXTREMES = [-(2**31), -7, 1 << 20, 2**31 - 1]


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    if why := EMULATOR.absent():
        pytest.skip(why)
    monkeypatch.setenv("LSM_CHECK_LISTS", "0")


def with_lists(call: Call, rows: list[list[int]]) -> Call:
    """The same with other lists, of one head."""
    assert call.lists is not None
    index = torch.tensor([n for row in rows for n in row], dtype=torch.int32)
    row_ptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return replace(call, lists=replace(call.lists, index=index, row_ptr=row_ptr))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("block_q", [1, 16])
def test_blocks_that_do_not_exist_are_left_out(dtype, block_q):
    call = make(Attn(Tq=24, Tk=72, blocks=(block_q, 16), dtype=dtype))
    rows = [[n, n + 2] for n in (0, 1, 2) * 8][: -(-24 // block_q)]
    bad = [[*row, *EXTREMES[2:]] if block_q == 1 else [*EXTREMES[:2], *row, 5, *EXTREMES[2:]]
           for row in rows]  # fmt: skip
    assert_same_bits(run(EMULATOR, with_lists(call, bad)), run(EMULATOR, with_lists(call, rows)))


BROKEN = {
    "repeated": ([2, 2, 2, 0, 0, 1], [0, 3, 6]),
    "descending": ([0, 1, 2, 3, 4, 1], [0, 6, 3]),
    "overlapping": ([0, 1, 2, 3, 4, 1], [6, 0, 6]),
    "too long": ([0, 1, 2, 3, 4, 1], [-5, 1 << 40, 1 << 62]),
}


@pytest.mark.parametrize("extras", [(), ("bias",)], ids=["plain", "bias"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_lists_lead_nowhere(name, extras):
    """What they give is not defined; that it is there, and what others have, is."""
    call = make(Attn(Tq=24, Tk=72, dtype="bf16", extras=extras))
    assert call.lists is not None
    index, row_ptr = (torch.tensor(n) for n in BROKEN[name])
    lists = replace(call.lists, index=index.int(), row_ptr=row_ptr)
    x = call.x
    if extras:
        x = replace(x, tensors=x.tensors | {"block_bias": torch.zeros(index.shape)})
    results = run(Emulator("emulator", seeds=(0,)), replace(call, lists=lists, x=x))
    assert results["o"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pages_outside_the_cache_are_left_out(dtype):
    q = torch.randn(1, 2, 4, 32).to(dtype)
    k, v = torch.randn(2, 6, 16, 2, 32).to(dtype)
    library = EMULATOR.raw(_Library, "")

    def decode(table: list[int], lists: BlockLists | None = None):
        given = _sparse_attn._arguments("", q, lists, AttnMask(), None, 0.0, None, None, None, 0.0)
        tables = torch.tensor([80], dtype=torch.int32), torch.tensor([table], dtype=torch.int32)
        o, lse = library.sparse_attn_decode(q, k, v, *tables, *given)
        return {"o": o, "lse": lse}

    got = decode([3, EXTREMES[0], 1, 6, EXTREMES[3]])
    lists = BlockLists.from_bitmap(
        torch.tensor([1, 0, 1, 0, 0]).bool().expand(1, 1, 2, 5), 2, 80, 1, 16
    )
    want = decode([3, 0, 1, 0, 0], lists)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-2, atol=1e-2)


class _Library:
    @staticmethod
    def raw(kind: str, namespace: str = "lsm"):
        return getattr(torch.ops, namespace)
