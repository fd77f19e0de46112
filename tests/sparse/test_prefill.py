"""Lists for prefill: each against its definition on the whole map of attention."""

from __future__ import annotations

import pytest
import torch
from dense import dense_attention, qkv

from lsm_cuda import sparse
from lsm_cuda.ops import AttnMask

T, HQ, HKV, K, BLOCK = 116, 4, 2, 8, 16
ROWS = -(-T // BLOCK)
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
BLOCKS = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
ALWAYS = torch.eye(ROWS, dtype=torch.bool) | (torch.arange(ROWS) == 0)


@pytest.fixture
def tokens() -> list[torch.Tensor]:
    q, k, v = (x.detach() for x in qkv(T, HQ, HKV, K))
    # smooth enough that blocks are alike, with a few keys that all look at
    q, k = (x.cumsum(1) / torch.arange(1, T + 1)[:, None, None].sqrt() for x in (q, k))
    k[:, [3, 50]] += q.mean(1, keepdim=True).unflatten(2, (HKV, -1)).mean(3)
    return [2 * q, 2 * k, v]


def attention(q, k) -> torch.Tensor:
    score = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(HQ // HKV, 2)) / K**0.5
    return score.masked_fill(~CAUSAL, -torch.inf).softmax(-1)


def means(x) -> torch.Tensor:
    return torch.stack([b.mean(1) for b in x.split(BLOCK, 1)], 1)


def pooled_map(q, k) -> torch.Tensor:
    k = means(k).repeat_interleave(HQ // HKV, 2)
    score = torch.einsum("bthd,bshd->bhts", means(q), k) / K**0.5
    return score.masked_fill(~BLOCKS, -torch.inf).softmax(-1)


def smallest(score, mass, first=()) -> torch.Tensor:
    """One row's smallest set of at least that share, the obvious way; ``first`` come first."""
    order = sorted(range(len(score)), key=lambda j: -score[j])
    chosen, total = torch.zeros(len(score), dtype=torch.bool), 0.0
    for j in first:
        chosen[j] = True
    total = score[chosen].sum()
    for j in (j for j in order if not chosen[j]):
        if total >= mass * score.sum() or score[j] == 0:
            break
        chosen[j], total = True, total + score[j]
    return chosen


def rows_of(score, mass) -> torch.Tensor:
    flat = score.flatten(0, -2)
    return torch.stack([smallest(r, mass) for r in flat]).view(score.shape)


def top(score, count) -> torch.Tensor:
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter_(-1, score.topk(min(count, score.shape[-1])).indices, True)


def expect(lists, bitmap):
    want = (bitmap.expand(2, HQ, -1, -1) | ALWAYS) & BLOCKS
    assert torch.equal(lists.to_bitmap(), want)


def vertical_slash(p, columns, distances) -> torch.Tensor:
    """Blocks with a chosen column or a pair at a chosen distance; the last row counts as full."""
    n = ROWS * BLOCK
    apart = torch.arange(n)[:, None] - torch.arange(n)
    columns, distances = (torch.nn.functional.pad(x, (0, n - T)) for x in (columns, distances))
    pairs = columns[:, :, None].expand(-1, -1, n, -1) | distances[:, :, apart.clamp(min=0)]
    pairs = (pairs & (apart >= 0)).unflatten(-1, (ROWS, BLOCK)).unflatten(-3, (ROWS, BLOCK))
    return pairs.any(-1).any(-2)


def last_rows(p, last) -> tuple[torch.Tensor, torch.Tensor]:
    rows = p[:, :, -last:]
    slash = torch.zeros(*p.shape[:2], T, dtype=p.dtype)
    for i in range(last):
        t = T - last + i
        slash[..., : t + 1] += rows[:, :, i, : t + 1].flip(-1)
    return rows.sum(2), slash


def test_a_shape(tokens):
    row, column = torch.arange(ROWS)[:, None], torch.arange(ROWS)
    lists = sparse.a_shape_lists(*tokens[:2], 20, 30, BLOCK)
    expect(lists, (column < 2) | (row - column <= 2))


def test_vertical_slash(tokens):
    p = attention(*tokens[:2])
    vertical, slash = last_rows(p, 10)
    lists = sparse.vertical_slash_lists(*tokens[:2], 3, 2, 10, BLOCK)
    expect(lists, vertical_slash(p, top(vertical, 3), top(slash, 2)))


def test_pooled(tokens):
    expect(sparse.pooled_lists(*tokens[:2], 3, BLOCK), top(pooled_map(*tokens[:2]), 3))


def test_minference(tokens):
    q, k, _ = tokens
    patterns = [("a_shape", 16, 16), ("vertical_slash", 3, 2), ("block_sparse", 2, 0)]
    patterns.append(patterns[0])
    got = sparse.minference_lists(q, k, patterns, 10, BLOCK).to_bitmap()
    parts = [
        sparse.a_shape_lists(q, k, 16, 16, BLOCK),
        sparse.vertical_slash_lists(q, k, 3, 2, 10, BLOCK),
        sparse.pooled_lists(q, k, 2, BLOCK),
    ]
    for h, i in enumerate((0, 1, 2, 0)):
        assert torch.equal(got[:, h], parts[i].to_bitmap()[:, h])
    chosen = sparse.minference_lists(q, k, None, 10, BLOCK)
    assert (sparse.recall(q, k, chosen) > 0.5).all()
    with pytest.raises(ValueError, match="for each of the 4 heads"):
        sparse.minference_lists(q, k, patterns[:3])


@pytest.mark.parametrize("tau", [0.0, 0.25, 2.0])
def test_flex_prefill(tau, tokens):
    q, k, _ = tokens
    p, last = attention(q, k), BLOCK
    true = torch.stack([b.sum(-1) for b in p[:, :, -last:].mean(2).split(BLOCK, -1)], -1)
    guess = torch.einsum(
        "bhd,bshd->bhs", q[:, -last:].mean(1), means(k).repeat_interleave(HQ // HKV, 2)
    ).div(K**0.5).softmax(-1)  # fmt: skip
    m = (true + guess) / 2
    divergence = ((true * (true / m).log()).sum(-1) + (guess * (guess / m).log()).sum(-1)) / 2
    every = pooled_map(q, k)
    by_block = rows_of(every.flatten(-2), 0.8).view(every.shape)
    columns, slash = (rows_of(x, 0.8) for x in last_rows(p, last))
    by_column = vertical_slash(p, columns, slash)
    near = divergence.sqrt() < tau
    assert tau == 0.25 or near.all() == (tau > 1)
    local = torch.arange(ROWS)[:, None] - torch.arange(ROWS) <= 1
    want = torch.where(near[..., None, None], by_block, by_column) | local
    expect(sparse.flex_prefill_lists(q, k, 0.8, tau, 2 * BLOCK, BLOCK), want)


@pytest.mark.parametrize("stride", [1, 4])
def test_xattention(stride, tokens):
    q, k, _ = tokens
    n = ROWS * BLOCK
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, n - T)) for x in (q, k)]
    score = torch.einsum(
        "bthd,bshd->bhts", padded[0], padded[1].repeat_interleave(HQ // HKV, 2)
    )  # fmt: skip
    squares = score.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))  # [.., a, i, b, j]
    anti = sum(squares[:, :, :, stride - 1 - i, :, i] for i in range(stride)) / K**0.5 / stride
    a = torch.arange(n // stride)
    anti = anti.masked_fill((a > a[:, None]) | (a * stride >= T), -torch.inf).softmax(-1)
    anti = anti.masked_fill((a * stride >= T)[:, None], 0)
    per = BLOCK // stride
    share = anti.unflatten(3, (ROWS, per)).sum(-1).unflatten(2, (ROWS, per)).sum(3)
    lists = sparse.xattention_lists(q, k, stride, 0.7, BLOCK)
    chosen = [smallest(s, 0.7, {0, i % ROWS}) for i, s in enumerate(share.flatten(0, -2))]
    expect(lists, torch.stack(chosen).view(share.shape))
    if stride == 1:  # the map itself, so that every row of blocks keeps its share
        inside = lists.to_dense(AttnMask(causal=True))
        kept = (attention(q, k) * inside).sum(-1)
        assert all((b.mean(-1) >= 0.7 - 1e-9).all() for b in kept.split(BLOCK, -1))


@pytest.mark.parametrize("theta", [-1.0, 0.6, 1.1])
def test_sparge(theta, tokens):
    q, k, _ = tokens

    def alike(x):
        x = torch.nn.functional.normalize(x, dim=-1)
        return torch.stack(
            [torch.einsum("bthd,bshd->bh", b, b) / b.shape[1] ** 2 for b in x.split(BLOCK, 1)], -1
        ) >= theta  # fmt: skip

    like_q, like_k = alike(q), alike(k).repeat_interleave(HQ // HKV, 1)[:, :, None]
    score = torch.einsum(
        "bthd,bshd->bhts", means(q), means(k).repeat_interleave(HQ // HKV, 2)
    ) / K**0.5  # fmt: skip
    p = score.masked_fill(~BLOCKS | ~like_k, -torch.inf).softmax(-1).nan_to_num(0)
    want = rows_of(p, 0.8) | ~like_k | ~like_q[..., None]
    expect(sparse.sparge_lists(q, k, 0.8, theta, BLOCK), want)


def test_prefill_and_recall(tokens):
    q, k, v = tokens
    lists = sparse.xattention_lists(q, k, 4, 0.6, BLOCK)
    inside = lists.to_dense(AttnMask(causal=True))
    want, _ = dense_attention(q, k, v, inside.int())
    torch.testing.assert_close(sparse.sparse_prefill(q, k, v, lists), want, atol=1e-10, rtol=1e-8)
    share = (attention(q, k) * inside).sum(-1).mean(-1)
    torch.testing.assert_close(sparse.recall(q, k, lists), share, atol=1e-10, rtol=1e-8)


def test_errors(tokens):
    with pytest.raises(ValueError, match="stride must divide block, got 5 and 16"):
        sparse.xattention_lists(*tokens[:2], stride=5, block=16)


METHODS = [
    sparse.a_shape_lists, sparse.vertical_slash_lists, sparse.pooled_lists, sparse.minference_lists,
    sparse.flex_prefill_lists, sparse.xattention_lists, sparse.sparge_lists,
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda f: f.__name__)
def test_prompts_come_in_one_piece(method, tokens):
    q, k, v = tokens
    with pytest.raises(ValueError, match="a prompt comes in one piece, got 9 tokens of q and"):
        method(q[:, :9], k, block=16)
    none = (q[:, :0], k[:, :0])
    assert sparse.sparse_prefill(*none, v[:, :0], method(*none, block=16)).shape[1] == 0
