"""Block selection: pooled keys, scores and choices on every implementation, against definitions.

Chosen blocks are compared where scores are exact (small multiples of a power of two), or where both
sides choose from the same scores; else by what they lose: a choice may differ in near-ties.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import pytest
import torch
from cases import DTYPES
from checks import assert_accepted, assert_same_bits
from impls import Emulator, Impl, threads
from inputs import Inputs, Tensors, boundaries
from torch import Tensor

from lsm_cuda import ops, reference
from lsm_cuda.ops import BlockChoice, ScoreRule, pooling
from lsm_cuda.ops import _stretches as stretches_
from lsm_cuda.ops import selection as module


class Library:
    @staticmethod
    def raw(kind: str, namespace: str = "lsm"):
        return getattr(torch.ops, namespace)


def run(impl: Impl, call) -> Tensors:
    """``call(operators, move)``, under every schedule of an emulator."""

    def move(t):
        return t.to(impl.device) if isinstance(t, Tensor) else t

    if isinstance(impl, Emulator):
        lib = impl.raw(Library, "")
        return impl.under_every_seed(lambda: call(lib, move))
    with threads(2):
        return {n: t.cpu() for n, t in call(torch.ops.lsm, move).items()}


# ---- Pooling ----


@dataclass(frozen=True)
class Windows:
    T: int = 50
    K: int = 20
    length: int = 16
    stride: int = 16
    pool: str = "mean"
    partial: bool = True
    dtype: str = "f32"
    batch: str = "dense"  # "lengths", or the dtype of cu_seqlens

    def __str__(self) -> str:
        return "-".join(str(getattr(self, f.name)) for f in fields(self))


WINDOWS = [
    Windows(),
    Windows(pool="bounds", dtype="bf16", K=64),
    Windows(length=32, partial=False, pool="max", dtype="f16"),
    Windows(length=8, stride=3, pool="min", batch="lengths"),
    Windows(length=8, batch="lengths", partial=False),
    Windows(length=32, partial=False, batch="int32", T=90),
    Windows(length=5, stride=7, batch="int64", pool="bounds", T=90),
    Windows(T=3, length=32, partial=False),
    Windows(T=0),
    Windows(dtype="f64", length=7, stride=4, pool="bounds"),
]


def make_windows(case: Windows) -> tuple[Inputs, dict]:
    rng = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    rest: dict = {"lengths": None, "cu_seqlens": None}
    B = 2
    if case.batch == "lengths":
        rest["lengths"] = torch.tensor([case.T, 17], dtype=torch.int32)
    elif case.batch != "dense":
        B, rest["cu_seqlens"] = 1, boundaries(case.T, getattr(torch, case.batch))
    x = torch.randn(B, case.T, 3, case.K, generator=rng, dtype=torch.float64)
    x = (4 * x).round() / 4  # with ties
    x = x.to(DTYPES[case.dtype])
    y = reference.block_pool(x, case.length, case.stride, case.pool, case.partial, **rest)
    return Inputs({"x": x}, torch.randn(y.shape, generator=rng).to(x)), rest


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_pool(impl, windows):
    x, rest = make_windows(windows)
    rule = (windows.length, windows.stride, windows.pool, windows.partial)
    cu = rest["cu_seqlens"]
    starts = None if cu is None else ops.row_boundaries(cu, *rule[:2], rule[3])

    def call(lib, move) -> Tensors:
        given = [move(t) for t in (x.tensors["x"], cu, starts, rest["lengths"])]
        given += [*rule[:2], pooling._POOLS.index(windows.pool), rule[3]]
        y = lib.block_pool(*given)
        return {"o": y, "dx": lib.block_pool_bwd(*given, y, move(x.grad_o))}

    def definition(dtype) -> Tensors:
        leaf = x.tensors["x"].to(dtype).requires_grad_()
        y = reference.block_pool(leaf, *rule, **rest)
        if not y.requires_grad:  # no window
            y = y + 0 * leaf.sum()
        (dx,) = torch.autograd.grad(y, leaf, x.grad_o.to(dtype))
        return {"o": y.detach(), "dx": dx}

    truth, same = (definition(d) for d in (torch.float64, torch.float32))
    assert_accepted(run(impl, call), truth, same, x)


def test_pool_has_a_gradient():
    """Ties share it, as in torch.amax; and none of its own."""
    x = torch.tensor([3.0, 1.0, 3.0, 2.0]).view(1, 4, 1, 1).requires_grad_()
    (dx,) = torch.autograd.grad(ops.block_pool(x, 4, pool="max").sum(), x, create_graph=True)
    assert dx.flatten().tolist() == [0.5, 0.0, 0.5, 0.0]
    with pytest.raises(RuntimeError, match="block_pool_bwd: the backward pass is itself not"):
        dx.sum().backward()


# ---- Scores ----

MOBA = ScoreRule.pooled(16)
QUEST = ScoreRule.pooled(16, group=True, causal=False)
SEER = ScoreRule.pooled(16, block_q=1, group=True, causal=False)
NSA = ScoreRule.compressed(8, 4, 16)
INFLLM = ScoreRule.compressed(8, 4, 16, block_q=4, tap_max=True)
XATTN = ScoreRule.antidiagonal(4, 16, 16)


@dataclass(frozen=True)
class Scored:
    """``tokens``: of keys; ``Tq`` queries, and both may be those of pooled ones."""

    name: str
    rule: ScoreRule
    Tq: int
    Tk: int
    tokens: int
    heads: tuple[int, int] = (4, 2)
    K: int = 24
    dtype: str = "f32"
    lse: bool = False
    lengths: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}-{self.Tq}-{self.Tk}-{self.K}-{self.dtype}-lse_{self.lse}"


SCORED = [
    Scored("moba", MOBA, 70, 5, 70, K=64, dtype="bf16"),
    Scored("moba", replace(MOBA, offset=30), 40, 5, 70),
    Scored("quest", QUEST, 1, 5, 80, heads=(8, 2), K=128, dtype="bf16", lengths=(80, 33)),
    Scored("seer", SEER, 5, 5, 80, heads=(6, 2), dtype="f16"),
    Scored("nsa", NSA, 60, 14, 60, heads=(16, 1), K=32, dtype="bf16", lse=True),
    Scored("nsa", NSA, 37, 8, 37, heads=(6, 2)),
    Scored("nsa decode", NSA, 2, 40, 163, heads=(4, 2), lengths=(160, 21)),
    Scored("infllm", INFLLM, 62, 14, 62, heads=(8, 1), dtype="bf16", lse=True),
    Scored("xattention", XATTN, 25, 25, 100, heads=(2, 2), K=300, dtype="bf16"),
    Scored("columns", ScoreRule.columns(90), 90, 90, 90, heads=(4, 1)),
    Scored("columns", ScoreRule.columns(8, 16, True, offset=72), 8, 80, 80, dtype="bf16"),
    Scored("nothing", NSA, 3, 0, 3),
    Scored("empty", MOBA, 0, 2, 32),
    Scored("fp64", NSA, 40, 9, 40, dtype="f64"),
]


def make_scored(case: Scored) -> tuple[Inputs, Tensor | None, Tensor | None]:
    """Queries and keys, their log-sum-exp if it is given, and lengths."""
    rng = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    (Hq, Hk), dtype = case.heads, DTYPES[case.dtype]
    B = len(case.lengths) or 2
    q = torch.randn(B, case.Tq, Hq, case.K, generator=rng, dtype=torch.float64).to(dtype)
    k = torch.randn(B, case.Tk, Hk, case.K, generator=rng, dtype=torch.float64).to(dtype)
    lengths = torch.tensor(case.lengths, dtype=torch.int32) if case.lengths else None
    lse = torch.randn(B, Hq, case.Tq, generator=rng) + 2 if case.lse else None
    if lse is not None:
        lse[:, :, 0] = -torch.inf
    return Inputs({"q": q, "k": k}, q), lse, lengths


def blocks_of(case: Scored) -> int:
    return -(-case.tokens // case.rule.block_k)


def score_arguments(x: Inputs, case: Scored, lse: Tensor | None, lengths: Tensor | None, move):
    q, k = (move(t) for t in x.tensors.values())
    lse, lengths = move(lse), move(lengths)
    return module._arguments(q, k, case.rule, None, lse, lengths, None, None, blocks_of(case))


@pytest.mark.parametrize("scored", SCORED, ids=str)
def test_scores(impl, scored):
    x, lse, lengths = make_scored(scored)

    def call(lib, move) -> Tensors:
        return {"final_state": lib.block_scores(*score_arguments(x, scored, lse, lengths, move))}

    def definition(dtype: torch.dtype) -> Tensors:
        q, k = (t.to(dtype) for t in x.tensors.values())
        given = None if lse is None else lse.to(dtype)
        blocks = blocks_of(scored)
        return {
            "final_state": reference.block_scores(
                q, k, scored.rule, lse=given, lengths=lengths, blocks=blocks
            )
        }

    truth, same = definition(torch.float64), definition(torch.float32)
    assert_accepted(run(impl, call), truth, same, x)


CHOICES = [
    BlockChoice(top_k=3),
    BlockChoice(top_k=3, first=1, local=1),
    BlockChoice(top_p=0.75),
    BlockChoice(top_k=2, top_p=0.5, first=1),
    BlockChoice(threshold=0.25, local=2),
]


@pytest.mark.parametrize("scored", [s for s in SCORED if s.tokens > 3 and s.Tq], ids=str)
def test_selection_is_the_choice_among_the_scores(impl, scored):
    """Fused or through memory: the same blocks; and what they lose against the best ones. Of each
    score all choices on the CPU, one elsewhere."""
    one = CHOICES[zlib.crc32(str(scored).encode()) % len(CHOICES)]
    for choice in [one] if impl.tensor_cores else CHOICES:
        check_selection(impl, scored, choice)


def check_selection(impl, scored, choice):
    if choice.top_p and not scored.rule.softmax:
        choice = replace(choice, top_p=0.0)
    x, lse, lengths = make_scored(scored)
    chosen = choice._arguments(scored.rule, blocks_of(scored))

    def call(lib, move) -> Tensors:
        given = score_arguments(x, scored, lse, lengths, move)
        scores = lib.block_scores(*given)
        return {
            "scores": scores,
            "fused": lib.block_select(*given, *chosen),
            "apart": lib.block_topk(
                scores, None, None, move(lengths), scored.Tq, given[-1], *chosen
            ),
        }

    got = run(impl, call)
    assert torch.equal(got["fused"], got["apart"])
    want = reference.block_choice(got["scores"].double(), scored.rule, choice, scored.Tq, lengths)
    index, scores = got["fused"], got["scores"].double()
    for b, heads in enumerate(want):
        for h, rows in enumerate(heads):
            for r, best in enumerate(rows):
                mine = [j for j in index[b, h, r].tolist() if j >= 0]
                assert mine == sorted(set(mine))
                assert index[b, h, r, len(mine) :].eq(-1).all()
                if choice.top_p:  # sums differ in their last bits
                    assert abs(len(mine) - len(best)) <= 1
                    best, mine = best[: len(mine)], mine[: len(best)]
                    continue
                lost = scores[b, h, r][best].sum() - scores[b, h, r][mine].sum()
                assert len(mine) == len(best) and not lost > 1e-6


STRETCHED = ("moba", "nsa", "nsa decode", "infllm", "quest")


@pytest.mark.parametrize("scored", [s for s in SCORED if s.name in STRETCHED], ids=str)
def test_a_stretch_of_rows_at_a_time(impl, scored, monkeypatch):
    """As on a GPU where a row's scores do not fit on the chip: the same blocks."""
    x, lse, lengths = make_scored(scored)
    chosen = BlockChoice(top_k=3, first=1, local=1)._arguments(scored.rule, blocks_of(scored))
    heads = scored.heads[1] if scored.rule.group else scored.heads[0]
    monkeypatch.setattr(stretches_, "_SCORES", 2 * 3 * heads * blocks_of(scored))  # 3 rows

    def call(lib, move) -> Tensors:
        given = score_arguments(x, scored, lse, lengths, move)
        apart = module._select_in_two(lib, given, chosen)
        return {"whole": lib.block_select(*given, *chosen), "apart": apart}

    got = run(impl, call)
    assert torch.equal(got["whole"], got["apart"])


def exact_scores(*shape: int) -> Tensor:
    """Multiples of 1/8 with many ties, some −inf."""
    scores = torch.randint(0, 9, shape).float() / 8
    return scores.masked_fill(torch.rand(shape) < 0.1, -torch.inf)


def as_lists(index: Tensor) -> list:
    if index.dim() == 1:
        return [j for j in index.tolist() if j >= 0]
    return [as_lists(t) for t in index]


TOPK = {
    "top-k": (ScoreRule(causal=False, block_q=16, block_k=16), BlockChoice(top_k=4)),
    "causal": (ScoreRule(block_q=16, block_k=16), BlockChoice(top_k=4, first=1, local=2)),
    "k above blocks": (ScoreRule(block_q=16, block_k=16), BlockChoice(top_k=100)),
    "forced above k": (ScoreRule(block_q=64, block_k=16), BlockChoice(top_k=2, first=2, local=3)),
    "mass": (ScoreRule(causal=False, block_q=16), BlockChoice(top_p=0.5)),
    "whole mass": (ScoreRule(block_q=16, block_k=16), BlockChoice(top_p=1.0, first=2)),
    "mass and k": (ScoreRule(block_q=16, block_k=16), BlockChoice(top_k=3, top_p=0.9, local=1)),
    "threshold": (ScoreRule(block_q=16, block_k=16), BlockChoice(threshold=0.5, first=1)),
    "nothing": (ScoreRule(causal=False, block_q=16), BlockChoice(threshold=2.0)),
    "future": (ScoreRule(block_q=16, block_k=16, offset=-40), BlockChoice(top_k=2, local=1)),
}


@pytest.mark.parametrize("name", TOPK)
def test_choice(impl, name):
    """The definition's blocks exactly: ties, forced ones, empty rows."""
    rule, choice = TOPK[name]
    Tq, blocks = 150, 70 if not rule.causal else 10
    scores = exact_scores(2, 3, -(-Tq // rule.block_q), blocks)
    scores[0, 0] = 0.5  # all the same
    chosen = choice._arguments(rule, blocks)
    got = run(impl, lambda lib, move: {"index": lib.block_topk(
        move(scores), None, None, None, Tq, rule._numbers(blocks), *chosen)})  # fmt: skip
    assert as_lists(got["index"]) == reference.block_choice(scores, rule, choice, Tq)


@pytest.mark.parametrize("kind", ["int32", "int64"])
@pytest.mark.parametrize("rule", [MOBA, replace(INFLLM, tap_max=False)], ids=["moba", "nsa"])
def test_packed_sequences_are_separate_ones(impl, rule, kind):
    cu = boundaries(120, getattr(torch, kind))
    choice = BlockChoice(top_k=3, first=1, local=1)
    q, k = torch.randn(1, 120, 4, 16), torch.randn(1, 120, 2, 16)
    blocks = -(-int(cu.diff().max()) // 16)
    pools = (rule.key_length, rule.key_stride)
    partial = rule.key_length <= rule.key_stride

    def call(lib, move, q=q, k=k, cu=cu) -> Tensors:
        q, k, cu = move(q), move(k), move(cu)
        starts = None if cu is None else ops.row_boundaries(cu, *pools, partial)
        pooled = lib.block_pool(k, cu, starts, None, *pools, 0, partial)
        given = module._arguments(q, pooled, rule, None, None, None, cu, None, blocks)
        chosen = choice._arguments(rule, blocks)
        scores = lib.block_scores(*given)
        index = lib.block_select(*given, *chosen)
        again = lib.block_topk(scores, cu, given[6], None, q.shape[1], given[-1], *chosen)
        return {"scores": scores, "index": index, "again": again}

    got = run(impl, call)
    assert torch.equal(got["again"], got["index"])
    rows = ops.row_boundaries(cu, rule.block_q).tolist()
    for (a, b), (first, end) in zip(pairwise(cu.tolist()), pairwise(rows), strict=True):
        own = run(impl, lambda lib, move, a=a, b=b: call(lib, move, q[:, a:b], k[:, a:b], None))
        assert_same_bits(own, {n: t[:, :, first:end] for n, t in got.items()})
    assert (got["index"][:, :, rows[-1] :] == -1).all()


def test_lists_are_attended_to():
    """MoBA: selection and attention agree on what a block is."""
    q, k, v = torch.randn(3, 1, 200, 2, 32)
    lists = ops.block_select(
        q, ops.block_pool(k, 16), MOBA, BlockChoice(top_k=4, local=1), tokens=200
    )
    lists.check()
    dense = lists.to_dense(ops.AttnMask(causal=True))
    assert dense.any(-1).all()
    for t in (0, 37, 199):
        scores = q[0, t, 1] @ k[0, :, 1].view(-1, 200, 32)[0].T
        means = torch.stack([c.mean() for c in scores.split(16)])
        means[t // 16 :] = -torch.inf
        best = {*means.topk(min(3, t // 16)).indices.tolist(), t // 16}
        assert {*(dense[0, 1, t].nonzero().flatten() // 16).tolist()} == best


def test_antidiagonals():
    q, k = torch.randn(1, 32, 2, 8), torch.randn(1, 32, 1, 8)
    a, b = ops.antidiagonals(q, k, 4)
    got = torch.einsum("brhc,bihc->bhri", a, b.expand(-1, -1, 2, -1))
    tiles = torch.einsum("bthc,bjhc->bhtj", q, k.expand(-1, -1, 2, -1))
    tiles = tiles.unflatten(3, (8, 4)).unflatten(2, (8, 4))
    want = sum(tiles[:, :, :, 3 - s, :, s] for s in range(4))
    torch.testing.assert_close(got, want)


def test_bounds_are_bounds():
    """Quest's score is the largest product that a key within the bounds could have."""
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 64, 2, 16)
    bounds = ops.block_pool(k, 16, pool="bounds")
    split = torch.cat([q.relu(), -(-q).relu()], -1)
    rule = ScoreRule.pooled(16, causal=False)
    scores = ops.block_scores(split, bounds, rule, scale=1.0)
    high, low = bounds.chunk(2, -1)
    want = torch.maximum(q * high, q * low).sum(-1).transpose(1, 2)[:, :, None]
    torch.testing.assert_close(scores, want)
    products = torch.einsum("bthc,bjhc->bhtj", q, k).unflatten(-1, (4, 16)).amax(-1)
    assert (scores >= products - 1e-5).all()


def test_compressed_taps_count_overlaps():
    """As often as a window and a block have ``stride`` tokens in common."""
    for length, stride, block in ((32, 16, 64), (16, 16, 64), (64, 16, 32)):
        rule = ScoreRule.compressed(length, stride, block)
        for n, tap in enumerate(rule.taps):
            start = (10 * rule.tap_step + rule.tap_first + n) * stride
            common = min(start + length, 11 * block) - max(start, 10 * block)
            assert tap == common / stride
        before = (10 * rule.tap_step + rule.tap_first - 1) * stride + length
        assert before <= 10 * block


def test_opcheck():
    x = torch.randn(1, 30, 2, 8, requires_grad=True)
    cu = torch.tensor([0, 13, 30], dtype=torch.int32)
    starts = ops.row_boundaries(cu, 8)
    pool = (x, cu, starts, None, 8, 8, 1, True)
    torch.library.opcheck(torch.ops.lsm.block_pool.default, pool)
    y = ops.block_pool(x.detach(), 8, pool="max", cu_seqlens=cu)
    torch.library.opcheck(torch.ops.lsm.block_pool_bwd.default, (x.detach(), *pool[1:], y, y))
    given = module._arguments(
        torch.randn(1, 30, 2, 8), torch.randn(1, 4, 2, 8), MOBA, None, None, None, None, None, 2
    )
    chosen = BlockChoice(top_k=2)._arguments(MOBA, 2)
    torch.library.opcheck(torch.ops.lsm.block_scores.default, given)
    torch.library.opcheck(torch.ops.lsm.block_select.default, (*given, *chosen))
    topk = (torch.rand(1, 2, 30, 2), None, None, None, 30, given[-1], *chosen)
    torch.library.opcheck(torch.ops.lsm.block_topk.default, topk)


Q, KEYS = torch.randn(1, 20, 4, 16), torch.randn(1, 2, 2, 16)
TOP = BlockChoice(top_k=1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.block_pool(KEYS, 0), "length and stride must be at least 1, got 0 and 0"),
        (lambda: ops.block_pool(KEYS[0], 2), "x must have shape [B, T, H, K], got [2, 2, 16]"),
        (lambda: ops.block_pool(KEYS, 2, lengths=torch.tensor([3], dtype=torch.int32)),
         "lengths must be in [0, 2], got 3 for sequence 0"),
        (lambda: ops.block_scores(Q, KEYS[..., :8], MOBA), "k must have shape [B, Tk, Hk, K] with "
         "B = 1 and K = 16 like q, got [1, 2, 2, 8]"),
        (lambda: ops.block_scores(Q[:, :, :3], KEYS, MOBA), "q must have a multiple of the Hk = 2 "
         "heads of k, got Hq = 3"),
        (lambda: ops.block_scores(Q, KEYS.half(), MOBA), "k must have dtype float32 like q, got "
         "float16"),
        (lambda: ops.block_scores(Q, KEYS, MOBA, lse=torch.zeros(1, 4, 3)), "lse must have shape "
         "[B, Hq, Tq] = [1, 4, 20], got [1, 4, 3]"),
        (lambda: ops.block_scores(Q, KEYS, MOBA, lengths=torch.empty(1, device="meta").int()),
         "lengths must be on cpu like q, got meta"),
        (lambda: ops.block_select(Q, KEYS, MOBA, TOP, cu_seqlens=torch.empty(2, device="meta")),
         "cu_seqlens_q must be on cpu like q, got meta"),
        (lambda: ops.block_select(Q, KEYS, replace(MOBA, block_k=0), TOP), "block_q and block_k "
         "must be at least 1, got 1 and 0"),
        (lambda: ops.block_scores(Q, KEYS, replace(MOBA, tap_step=2**40)), "must be below 2^31, "
         "got 1099511627776"),
        (lambda: ops.block_select(Q, KEYS, MOBA, BlockChoice(top_p=1.5)), "top_p must be in "
         "[0, 1], got 1.5"),
        (lambda: ops.block_topk(torch.rand(1, 2, 3, 4), MOBA, TOP, Tq=5), "scores must have 5 rows "
         "for Tq = 5 queries, got 3"),
        (lambda: ops.block_topk(torch.ones(1, 2, 3, 4).int(), MOBA, TOP), "scores must have dtype "
         "float32 or float64, got int32"),
    ],
)  # fmt: skip
def test_errors(call, text):
    with pytest.raises(RuntimeError) as error:
        call()
    assert text in str(error.value)


def test_too_many_scores_in_a_row(impl):
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 9000, 1, 8)
    rule = ScoreRule.pooled(16, causal=False)
    given = module._arguments(q, k, rule, None, None, None, None, None, 9000)
    chosen = TOP._arguments(rule, 9000)
    with pytest.raises(RuntimeError, match="use block_scores and block_topk"):
        run(impl, lambda lib, move: {"index": lib.block_select(
            *(move(t) for t in given), *chosen)})  # fmt: skip


test_too_many_scores_in_a_row.only_impls = ("emulator", "cuda")  # any number on the CPU


@pytest.mark.slow
def test_compile():
    def select(q, k):
        pooled = ops.block_pool(k, 16)
        return ops.block_select(q, pooled, MOBA, TOP, tokens=64).index, pooled

    q, k = torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 8, requires_grad=True)
    index, pooled = torch.compile(select, fullgraph=True)(q, k)
    want, _ = select(q, k)
    assert torch.equal(index, want)
    pooled.sum().backward()
    torch.testing.assert_close(k.grad, torch.full_like(k, 1 / 16))
