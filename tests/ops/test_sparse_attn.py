"""Sparse attention: on every implementation against its definition and against dense attention."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from attention import Attn, definition, dense, emulator_ops, make, raw_arguments, run
from checks import assert_accepted, assert_same_bits
from torch import Tensor

from lsm_cuda import ops, reference
from lsm_cuda.ops import AttnMask, BlockLists, _sparse_attn

CAUSAL = {"causal": True}
EVERYTHING = ("softcap", "sinks", "alibi", "ramp", "bias")
CASES = [
    Attn(lists="none"),
    Attn(lists="none", mask=CAUSAL, dtype="f64", dims=(7, 33)),
    Attn(lists="none", mask=CAUSAL, Tq=70, Tk=70, dtype="bf16", heads=(4, 2, 1), dims=(64, 64)),
    Attn(lists="none", Tq=5, Tk=33, mask={"causal": True, "left": 8, "sinks": 3}),
    Attn(lists="none", Tq=33, Tk=5, mask=CAUSAL),  # the first queries see nothing
    Attn(lists="none", mask={"left": 4, "right": 2}, dims=(96, 8)),
    Attn(lists="none", mask={"causal": True, "dilation": 3, "sinks": 2}, batch=2),
    Attn(lists="none", mask={"causal": True, "dilation": 2, "left": 9}, batch="int32"),
    Attn(lists="none", mask={"causal": True, "prefix": 11}, heads=(3, 1, 1)),
    Attn(lists="none", mask={"causal": True, "causal_block": 8, "align_end": False}),
    Attn(lists="none", Tk=9, mask={"causal": True, "align_end": False, "key_stride": 4,
                                   "key_length": 8}),
    Attn(lists="none", mask={"causal": True, "head_left": [3, -1], "sinks": 1}, heads=(2, 2, 1)),
    Attn(lists="none", mask={"causal": True, "offset": -3}, extras=("sinks",)),
    Attn(lists="none", extras=EVERYTHING, batch="int64", dtype="f64"),
    Attn(lists="none", Tq=0), Attn(lists="none", Tk=0), Attn(batch=0),
    Attn(Tk=0, lists="none", extras=("sinks",)),
    Attn(),
    Attn(lists="empty", batch=2),
    Attn(lists="empty", extras=("sinks", "bias"), dtype="bf16"),
    Attn(lists="all", Tq=70, Tk=50, dims=(16, 24)),
    Attn(Tq=130, Tk=140, heads=(4, 2, 2), mask=CAUSAL, dtype="bf16", batch=2, blocks=(32, 32)),
    Attn(Tq=50, Tk=90, heads=(6, 2, 2), dims=(64, 32), dtype="bf16", extras=("bias",),
         mask={"causal": True, "left": 20, "sinks": 3}),
    Attn(Tq=20, Tk=37, dims=(32, 64), dtype="bf16", lists="none",
         extras=("alibi", "softcap", "sinks")),
    Attn(Tq=60, Tk=60, batch="int32", dims=(32, 32), dtype="bf16", mask=CAUSAL),
    Attn(Tq=130, Tk=140, heads=(4, 2, 4), mask=CAUSAL, lists="capacity", dtype="f16"),
    Attn(Tq=100, Tk=100, heads=(16, 1, 1), blocks=(1, 16), mask=CAUSAL, lists="capacity"),
    Attn(Tq=50, Tk=100, heads=(4, 4, 4), blocks=(1, 32), dims=(40, 8)),
    Attn(Tq=200, Tk=200, heads=(2, 1, 1), blocks=(64, 64), dims=(128, 64)),
    Attn(Tq=40, Tk=64, heads=(1, 1, 1), blocks=(128, 16), dims=(256, 256)),
    Attn(Tq=40, Tk=64, heads=(2, 2, 1), blocks=(64, 16), dims=(192, 128), dtype="bf16"),
    # latent heads: beyond 256 columns
    Attn(Tq=40, Tk=50, heads=(4, 1, 1), dims=(576, 512), lists="none", mask=CAUSAL, dtype="bf16"),
    Attn(Tq=21, Tk=40, heads=(2, 1, 1), dims=(576, 512), lists="none", mask=CAUSAL),
    Attn(Tq=70, Tk=130, heads=(2, 1, 2), dims=(264, 300), blocks=(64, 32), dtype="f16",
         extras=EVERYTHING, batch="int32"),
    Attn(Tq=24, Tk=70, heads=(2, 1, 1), dims=(320, 24), blocks=(1, 16), dtype="bf16"),
    Attn(Tq=150, Tk=150, heads=(8, 2, 2), dims=(64, 48), blocks=(1, 32), dtype="bf16", mask=CAUSAL,
         extras=("sinks",), lists="capacity"),
    Attn(Tq=60, Tk=77, heads=(3, 1, 1), dims=(96, 64), blocks=(1, 16), dtype="bf16", batch=2,
         mask={"causal": True, "left": 20, "sinks": 3}),
    Attn(Tq=50, Tk=60, heads=(2, 1, 1), dims=(32, 16), blocks=(1, 16), dtype="bf16", scale=300.0),
    Attn(Tq=24, Tk=40, heads=(2, 1, 1), dims=(40, 260), blocks=(1, 16), extras=EVERYTHING),
    Attn(Tq=60, Tk=60, batch="int32", heads=(4, 2, 2), mask={"causal": True, "left": 20}),
    Attn(Tq=60, Tk=45, batch="int64", lists="capacity", dtype="bf16", blocks=(1, 16)),
    Attn(Tq=60, Tk=60, heads=(4, 2, 1), extras=("bias",), mask=CAUSAL),
    Attn(Tq=60, Tk=60, heads=(4, 2, 4), extras=("bias", "softcap"), lists="capacity", dtype="bf16"),
    Attn(Tq=60, Tk=60, heads=(4, 2, 2), extras=EVERYTHING, batch="int32", mask=CAUSAL),
    Attn(Tq=30, Tk=60, heads=(6, 2, 2), extras=("ramp", "sinks"), blocks=(1, 16), dtype="f64"),
    Attn(Tq=40, Tk=90, heads=(4, 2, 1), extras=("ramp", "sinks"), blocks=(1, 16), dtype="bf16"),
    Attn(Tq=40, Tk=60, heads=(4, 2, 2), extras=("bias",), blocks=(1, 16), dtype="bf16"),
    Attn(Tq=150, Tk=200, heads=(4, 2, 2), extras=("bias", "ramp"), blocks=(64, 32), dtype="f16",
         dims=(128, 72), mask=CAUSAL),
    Attn(Tq=140, Tk=130, heads=(2, 1, 1), extras=("bias", "softcap"), blocks=(128, 128),
         dtype="bf16", dims=(256, 40)),
    Attn(scale=0.7, layout="transposed"),
    Attn(scale=300.0, mask=CAUSAL, dtype="bf16"),  # weights of 0 and 1
    Attn(scale=1e-50, mask=CAUSAL, dtype="bf16", dims=(32, 16), lists="none"),  # 0 in fp32
    Attn(layout="sliced", dtype="bf16", heads=(2, 2, 1)),
    Attn(layout="offset", dims=(5, 3), batch=2),
]  # fmt: skip


@pytest.mark.parametrize("attn", CASES, ids=str)
def test_results_and_gradients(impl, attn):
    call = make(attn)
    truth, same = (definition(call, d) for d in (torch.float64, torch.float32))
    assert_accepted(run(impl, call), truth, same, call.x)


def test_stretches_of_queries_add_up(cpu):
    """Few heads: the CPU's backward cuts the queries, with lists that key/value heads share."""
    call = make(
        Attn(Tq=600, Tk=30, heads=(4, 2, 1), extras=("bias", "ramp", "sinks"), blocks=(64, 16))
    )
    truth, same = (definition(call, d) for d in (torch.float64, torch.float32))
    assert_accepted(run(cpu, call), truth, same, call.x)


# ---- Dense attention under the same mask ----


def pattern(T: int, heads: int, generator: torch.Generator) -> tuple[BlockLists, AttnMask]:
    mask = AttnMask(causal=True, left=T // 2, sinks=4)
    blocks = -(-T // 32)
    bitmap = torch.rand(1, heads, blocks, blocks, generator=generator) < 0.4
    return BlockLists.from_bitmap(bitmap, T, T, 32, 32), mask


def lists_for(kind: str, T: int, rng: torch.Generator) -> tuple[BlockLists, AttnMask, dict]:
    """Lists, mask and boundaries of packed sequences."""
    if kind == "random":
        return *pattern(T, 1, rng), {}
    blocks = -(-T // 32)
    if kind == "packed":
        cu = torch.tensor([0, T // 3, T // 3, T // 3 + 1 if T > 2 else T, T])
        lengths = cu.diff().tolist()
        rows = sum(-(-n // 32) for n in lengths)
        bitmap = torch.rand(1, 1, rows, blocks, generator=rng) < 0.7
        for n, first in zip(lengths, ops.row_boundaries(cu, 32).tolist(), strict=False):
            bitmap[..., first : first + -(-n // 32), -(-n // 32) :] = False
        lists = BlockLists.from_bitmap(bitmap, T, T, 32, 32, None, None, cu, cu)
        return lists, AttnMask(causal=True), {"cu_seqlens": cu}
    chosen = torch.full((1, 1, blocks, blocks), kind == "all")
    return BlockLists.from_bitmap(chosen, T, T, 32, 32), AttnMask(), {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group,D", [(1, 64), (4, 96), (16, 128), (1, 256)], ids=lambda n: f"{n}")
@pytest.mark.parametrize(
    ("kind", "T"),
    [("random", 1), ("random", 77), ("random", 200), ("packed", 150), ("all", 70), ("none", 70)],
)
def test_equals_dense_attention(dtype, group, D, kind, T):
    rng = torch.Generator().manual_seed(T * D)
    q, g = (torch.randn(1, T, group, D, generator=rng).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, T, 1, D, generator=rng).to(dtype) for _ in range(2))
    grad_lse = torch.randn(1, group, T, generator=rng)
    lists, mask, options = lists_for(kind, T, rng)
    pairs = lists.to_dense(mask, group)

    def results(f, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        o, lse = f(*leaves)
        seen = torch.where(pairs.any(-1), lse, 0.0)  # of others it is a constant
        return o, lse, *torch.autograd.grad([o, seen], leaves, [g.to(dtype), grad_lse])

    ours = results(
        lambda *x: ops.block_sparse_attn(*x, lists, mask, **options, return_lse=True), dtype
    )
    theirs = results(lambda *x: dense(*x, pairs), torch.float32)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), ours, theirs, strict=True):
        scale = b[b.isfinite()].abs().max().clamp(min=1) if b.isfinite().any() else 1
        torch.testing.assert_close(
            a.float() / scale, b / scale, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def test_flash_attn_names():
    q, k, v = torch.randn(3, 2, 50, 4, 32)
    o, lse, _ = ops.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    pairs = torch.ones(50, 50).tril().bool().expand(2, 4, 50, 50)
    expected, expected_lse = dense(q, k, v, pairs)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(lse, expected_lse)
    bounds = torch.tensor([0, 20, 50])
    packed = ops.flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, window_size=(5, 0))
    for a, b in itertools.pairwise(bounds.tolist()):
        own = ops.flash_attn_func(q[:1, a:b], k[:1, a:b], v[:1, a:b], window_size=(5, 0))
        torch.testing.assert_close(packed[a:b], own[0])
    with pytest.raises(ValueError, match="dropout is not supported"):
        ops.flash_attn_func(q, k, v, dropout_p=0.1)


# ---- Laws ----


def test_deterministic_whatever_the_threads():
    call = make(Attn(Tq=700, Tk=700, heads=(2, 1, 1), mask=CAUSAL, extras=("bias", "sinks")))

    def results(n: int):
        from impls import threads

        leaves = {name: t.requires_grad_() for name, t in call.x.tensors.items()}
        with threads(n):
            o, lse = ops.block_sparse_attn(**call.arguments(leaves), return_lse=True)
            grads = torch.autograd.grad([o, lse], leaves.values(), [call.x.grad_o, call.grad_lse])
        return {"o": o, "lse": lse} | dict(zip(leaves, grads, strict=True))

    assert_same_bits(results(1), results(2))


@pytest.mark.parametrize("K", [64, 256])
def test_large_scores(impl, K):
    """Whose differences are lost, but not that there are some: nothing overflows."""
    attn = Attn(Tq=70, Tk=70, lists="none", mask=CAUSAL, dims=(K, 32), dtype="bf16")
    call = make(attn)
    for name in ("q", "k"):
        call.x.tensors[name].fill_(3e4)
    got, v = run(impl, call), call.x.tensors["v"].float()
    mean = v.cumsum(1) / torch.arange(1, 71)[:, None, None]
    torch.testing.assert_close(got["o"].float(), mean.expand(got["o"].shape), rtol=0, atol=2e-2)
    most = torch.full_like(got["lse"], 3e4**2 * K**0.5)
    torch.testing.assert_close(got["lse"], most, rtol=1e-2, atol=0)
    assert all(got[name].isfinite().all() for name in ("dq", "dk", "dv"))


def test_no_rows_no_gradients(impl):
    """Of sink logits and ramps, which have no batch: 0, and not what memory holds."""
    call = make(Attn(batch=0, lists="none", heads=(50, 1, 1), extras=("sinks", "ramp")))
    spoilt = [torch.full((50,), torch.nan) for _ in range(20)]
    del spoilt  # what is allocated next lies there
    got = run(impl, call)
    assert not any(got[name].any() for name in ("dsink_logits", "dramp"))


def test_heads_and_sequences_do_not_meet():
    """The CPU packs a head for many tiles: bits are those of a call for it alone."""
    T, parts = 2300, ((0, 2300), (0, 70), (70, 1500), (1500, 2300))
    q, k, v = torch.randn(3, 2, T, 2, 128).bfloat16()
    q = torch.cat([q, -q], 2)
    cu = torch.tensor([0, 70, 70, 1500, T])
    both = ops.flash_attn_func(q, k, v, causal=True)
    packed = ops.block_sparse_attn(q[:1], k[:1], v[:1], mask=AttnMask(causal=True), cu_seqlens=cu)
    for b, h, (begin, end) in itertools.product((0, 1), (0, 1), parts):
        heads, tokens = slice(2 * h, 2 * h + 2), slice(begin, end)
        own = [x[b : b + 1, tokens, n] for x, n in ((q, heads), (k, [h]), (v, [h]))]
        o = ops.flash_attn_func(*own, causal=True)
        if (begin, end) == (0, T):
            assert torch.equal(both[b : b + 1, :, heads], o)
        elif b == 0:
            assert torch.equal(packed[:, tokens, heads], o)


def test_values_behind_the_last_key_seen_do_not_count():
    """A tile sees the first keys of a block; products of pairs meet more, with weights of 0."""
    q, k, v = (torch.randn(1, 64, h, 64).bfloat16() for h in (32, 1, 1))
    for key in (9, 22, 41):
        spoilt = v.clone()
        spoilt[:, key] = torch.nan
        o = ops.flash_attn_func(q, k, spoilt, causal=True)
        assert not o[:, :key].isnan().any() and o[:, key:].isnan().all()


def test_what_is_not_seen_is_not_read():
    """NaN in keys of blocks on no list, and beyond the sequences, stays where it is."""
    T = 96
    q, k, v = torch.randn(3, 1, T, 2, 16)
    lists = BlockLists.from_bitmap(torch.tensor([[1, 0, 1]] * 3).bool(), T, T, 32, 32)
    expected = ops.block_sparse_attn(q, k, v, lists)
    k[:, 32:64], v[:, 32:64] = torch.nan, torch.inf
    torch.testing.assert_close(ops.block_sparse_attn(q, k, v, lists), expected)


def test_gradcheck():
    call = make(
        Attn(Tq=9, Tk=18, heads=(2, 1, 1), dims=(3, 2), dtype="f64", extras=EVERYTHING,
             mask={"causal": True, "prefix": 3})
    )  # fmt: skip
    names = list(call.x.tensors)

    def f(*tensors: Tensor):
        return ops.block_sparse_attn(
            **call.arguments(dict(zip(names, tensors, strict=True))), return_lse=True
        )

    leaves = [t.requires_grad_() for t in call.x.tensors.values()]
    assert torch.autograd.gradcheck(f, leaves)
    o, _ = f(*leaves)
    (dq,) = torch.autograd.grad(o.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dq.sum().backward()


# ---- What PyTorch's tools need ----


@pytest.mark.parametrize("extras", [(), EVERYTHING], ids=["plain", "everything"])
def test_opcheck(extras):
    call = make(Attn(Tq=20, Tk=20, extras=extras, mask=CAUSAL))
    leaves = {n: t.requires_grad_() for n, t in call.x.tensors.items()}
    arguments = raw_arguments(replace(call, x=replace(call.x, tensors=leaves)))
    torch.library.opcheck(torch.ops.lsm.block_sparse_attn_fwd.default, arguments)
    with torch.no_grad():
        o, lse = torch.ops.lsm.block_sparse_attn_fwd(*arguments)
    detached = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    torch.library.opcheck(
        torch.ops.lsm.block_sparse_attn_bwd.default,
        (*detached, o, lse, call.x.grad_o, call.grad_lse),
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_compile():
    call = make(Attn(mask=CAUSAL, extras=("bias", "sinks")))
    t = {n: x.requires_grad_() for n, x in call.x.tensors.items()}
    arguments = call.arguments(t)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.block_sparse_attn(**{**arguments, "q": q * 2, "k": k, "v": v})

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    eager, traced = f(t["q"], t["k"], t["v"]), compiled(t["q"], t["k"], t["v"])
    torch.testing.assert_close(traced, eager)
    grads = [torch.autograd.grad(o.sum(), [t["q"], t["v"]]) for o in (eager, traced)]
    torch.testing.assert_close(grads[1], grads[0])


def test_autocast_and_meta():
    q = torch.randn(1, 20, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.block_sparse_attn(q, q, q).dtype == torch.bfloat16
    o, lse = ops.block_sparse_attn(*(q.to("meta"),) * 3, return_lse=True)
    assert o.shape == q.shape and lse.shape == (1, 2, 20)


# ---- Errors ----


def bitmap_lists(entries: list[int], counts: list[int]) -> BlockLists:
    row_ptr = torch.tensor([0, *counts]).cumsum(0)
    index = torch.tensor(entries, dtype=torch.int32)
    return BlockLists(index, row_ptr, (1, 1, len(counts)), 32 * len(counts), 64, 32, 32)


def listed(entries: list[list[int]]) -> BlockLists:
    index = torch.tensor(entries, dtype=torch.int32)[None, None]
    return BlockLists(index, None, (1, 1, len(entries)), 32 * len(entries), 64, 32, 32)


BAD_LISTS = {
    "out of range": (bitmap_lists([0, 2], [1, 1]), r"must be in \[0, 2\), .* got 2 in the list of"),
    "negative": (bitmap_lists([0, -1], [1, 1]), r"must be in \[0, 2\), .* got -1"),
    "unsorted": (bitmap_lists([1, 0], [2, 0]), "ascend without repetition, got block 0 after 1"),
    "repeated": (listed([[0, 0], [1, -1]]), "ascend without repetition, got block 0 after 0"),
    "after the end": (listed([[-1, 0], [1, -1]]), "nothing after -1, got block 0"),
    "too long": (bitmap_lists([0, 1], [1, 2]), "block_ptr must end at the 2 entries .* got 3"),
    "descending": (
        replace(bitmap_lists([0, 1], [1, 1]), row_ptr=torch.tensor([0, 2, 1])),
        "block_ptr must not decrease",
    ),
    "rows": (bitmap_lists([0, 1, 1], [1, 1, 1]), r"lists must have ceil\(Tq / block_q\) = 2 rows"),
    "block size": (
        replace(bitmap_lists([0, 1], [1, 1]), block_k=24),
        "block_k must be 16, 32, 64 or 128, got 24",
    ),
    "heads": (
        replace(listed([[0, 1], [1, -1]]), shape=(1, 3, 2)),
        "lists must be for 1 head, for the Hkv = 1 heads of k or for the Hq = 2 heads of q, got 3",
    ),
}


def checked(impl):
    """The operators where values are read: a GPU would have to be waited for."""
    return emulator_ops(impl) if impl.tensor_cores else torch.ops.lsm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists_are_refused(impl, name, dtype):
    lists, text = BAD_LISTS[name]
    q, k = torch.randn(1, 64, 2, 16).to(dtype), torch.randn(1, 64, 1, 16).to(dtype)
    given = _sparse_attn._arguments("", q, lists, AttnMask(), None, 0.0, None, None, None, 0.0)
    library, o, lse = checked(impl), q, torch.zeros(1, 2, 64)
    with pytest.raises(RuntimeError, match=f"lsm::block_sparse_attn_fwd: .*{text}"):
        library.block_sparse_attn_fwd(q, k, k, None, None, *given)
    with pytest.raises(RuntimeError, match=f"lsm::block_sparse_attn_bwd: .*{text}"):
        library.block_sparse_attn_bwd(q, k, k, None, None, *given, o, lse, o, None)


test_bad_lists_are_refused.only_impls = ("cpu", "emulator")


@pytest.mark.parametrize("name", [n for n in BAD_LISTS if n not in ("rows", "block size", "heads")])
def test_bad_lists_are_refused_by_a_decode(impl, name):
    lists, text = BAD_LISTS[name]
    lists = replace(lists, Tq=2, block_q=1)  # a row per query
    q, k = torch.randn(1, 2, 2, 16), torch.randn(1, 64, 1, 16)
    given = _sparse_attn._arguments("", q, lists, AttnMask(), None, 0.0, None, None, None, 0.0)
    with pytest.raises(RuntimeError, match=f"lsm::sparse_attn_decode: .*{text}"):
        checked(impl).sparse_attn_decode(q, k, k, None, None, *given)


test_bad_lists_are_refused_by_a_decode.only_impls = ("cpu", "emulator")


def test_bad_tensors_are_refused():
    q, k = torch.randn(1, 64, 2, 16), torch.randn(1, 64, 1, 16)
    bounds = torch.tensor([0, 64])
    for change, text in [
        ({"q": q[0]}, r"q must have shape \[B, Tq, Hq, K\], got \[64, 2, 16\]"),
        ({"k": k[..., :8]}, "k must have K = 16 like q, got K = 8"),
        ({"v": k[:, :32]}, r"v must have shape \[B, Tk, Hkv, V\] with all but V like k"),
        ({"k": k[:, :, :0], "v": k[:, :, :0]}, "q must have a multiple of the Hkv = 0 heads"),
        ({"k": k.half()}, "k must have dtype float32 like q, got float16"),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits must have shape \[Hq\] = \[2\], got \[3\]"),
        ({"ramp": torch.zeros(2)}, "ramp_length must be above 0, got 0"),
        ({"softcap": -1.0}, "softcap must not be negative or infinite, got -1"),
        ({"softcap": torch.inf}, "softcap must not be negative or infinite, got inf"),
        ({"mask": AttnMask(dilation=0)}, "causal_block and dilation must be at least 1"),
        ({"cu_seqlens": bounds, "cu_seqlens_k": torch.tensor([0, 9])}, "cu_seqlens_k must end at"),
        (
            {"cu_seqlens": bounds, "cu_seqlens_k": bounds.int()},
            "cu_seqlens_k must have dtype int64",
        ),
        ({"cu_seqlens_k": bounds}, "come together or not at all"),
    ]:
        with pytest.raises(RuntimeError, match=f"lsm::block_sparse_attn_fwd: {text}|.*{text}"):
            ops.block_sparse_attn(**({"q": q, "k": k, "v": k} | change))
    bits = torch.ones(2, 2, dtype=torch.bool)
    lists = BlockLists.from_bitmap(bits, 64, 64, 32, 32, None, None, bounds, bounds)
    with pytest.raises(RuntimeError, match="lists are of packed sequences, cu_seqlens is missing"):
        ops.block_sparse_attn(q, k, k, lists)
    with pytest.raises(RuntimeError, match="alibi_slopes get no gradient"):
        ops.block_sparse_attn(q, k, k, alibi_slopes=torch.ones(2, requires_grad=True))


# ---- The index object ----


def test_lists_keep_their_bitmap():
    bitmap = torch.rand(2, 3, 5, 4) < 0.5
    bias = torch.randn(bitmap.shape)
    for capacity in (None, 4, 6):
        lists = BlockLists.from_bitmap(bitmap, 70, 61, 16, 16, capacity, bias)
        lists.check()
        assert torch.equal(lists.to_bitmap(), bitmap)
        assert torch.equal(lists.counts(), bitmap.sum(-1))
        torch.testing.assert_close(lists.dense_bias(), bias.masked_fill(~bitmap, 0.0))
        pairs = lists.to_dense(AttnMask(causal=True))
        every = AttnMask(causal=True).to_dense(70, 61).expand(pairs.shape)
        density = lists.density(AttnMask(causal=True))
        assert density == pytest.approx((pairs.sum() / every.sum()).item())
    nothing = torch.zeros(1, 1, 5, 0, dtype=torch.bool)  # keys of an empty sequence
    assert BlockLists.from_bitmap(nothing, 70, 0, 16, 16, 3, nothing.float()).bias.shape[-1] == 3
    with pytest.raises(ValueError, match="capacity is 1"):
        BlockLists.from_bitmap(torch.ones(2, 2, dtype=torch.bool), 32, 32, 16, 16, 1)


def test_lists_of_any_order_are_sorted_and_unique():
    lists = BlockLists.from_indices(
        torch.tensor([[[[3, 1, 3, -1], [-1, 0, 2, 1]]]]), 32, 64, 16, 16
    )
    assert lists.index.tolist() == [[[[1, 3, -1, -1], [0, 1, 2, -1]]]]
    lists.check()


def test_lists_from_a_mask_and_for_many_rows():
    mask = AttnMask(causal=True, left=20).to_dense(50, 50)
    for capacity in (None, 4):
        lists = BlockLists.from_mask(mask, 16, 16, capacity)
        assert torch.equal(lists.to_dense() & mask, mask[None, None])
        many = lists.expand(3)
        many.check()
        assert torch.equal(many.to_bitmap(), lists.to_bitmap().expand(3, 1, -1, -1))


def test_lists_check_what_gpus_do_not_read():
    for name in ("out of range", "unsorted", "repeated", "after the end", "too long", "descending"):
        with pytest.raises(ValueError, match="BlockLists: "):
            BAD_LISTS[name][0].check()


def test_lists_of_packed_sequences():
    call = make(Attn(Tq=60, Tk=45, batch="int64"))
    assert call.lists is not None
    call.lists.check()
    pairs = call.lists.to_dense()
    q_of, k_of = (
        torch.bucketize(torch.arange(T), cu[1:], right=True)
        for T, cu in ((60, call.x.cu_seqlens), (45, call.cu_seqlens_k))
    )
    assert not (pairs & (q_of[:, None] != k_of)).any()
    assert 0 < call.lists.density() < 1


def test_lists_are_printed_without_their_numbers():
    bitmap = torch.eye(4, dtype=torch.bool)
    for capacity, text in ((None, "4 blocks in 1 x 1 x 4 lists"), (2, "lists of up to 2 blocks")):
        assert text in repr(BlockLists.from_bitmap(bitmap, 60, 64, 16, 16, capacity).to("meta"))


def test_lists_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    lists = BlockLists.from_bitmap(torch.eye(4, dtype=torch.bool), 64, 64, 16, 16)
    path = lists.plot(tmp_path / "lists.png", AttnMask(causal=True))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_mask_is_its_definition():
    masks = [Attn(mask=m).mask for m in (c.mask for c in CASES)]
    for given in masks:
        given = {n: torch.tensor(v) if n == "head_left" else v for n, v in given.items()}
        mask = AttnMask(**given)
        p, x = mask.positions(7, 11)
        seen = mask.to_dense(7, 11).expand(2, 7, 11)
        for h, i, j in itertools.product(range(2), range(7), range(11)):
            assert seen[h, i, j] == reference.sparse_attn.visible(mask, int(p[i]), int(x[j]), h)
