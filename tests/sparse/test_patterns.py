"""Static patterns: each is the set of its paper, and attends as dense attention under it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from dense import assert_same_attention, dense_attention, qkv

from lsm_cuda import sparse
from lsm_cuda.sparse import Pattern

T, H = 70, 4
Count = Callable[[int, int, int], int]  # of head, query and key

BLOCK_BERT = [[1, 0, 3, 4, 6, 5, 2], [2, 1, 0, 6, 5, 4, 3], [*range(7)], [6, 5, 4, 3, 2, 1, 0]]


def longnet(h: int, t: int, j: int) -> int:
    def kept(n, w, r):
        return n % w % r == h % r

    return sum(
        kept(t, w, r) and kept(j, w, r) and t // w == j // w and j <= t
        for w, r in ((8, 1), (16, 2), (48, 4))
    )


def block_diffusion(h: int, t: int, j: int) -> int:
    n, b = T // 2, 6
    if t < n:
        return t // b == j // b if j < n else (j - n) // b < t // b
    return j >= n and (j - n) // b <= (t - n) // b


def s2(h: int, t: int, j: int) -> int:
    shift = 4 if h >= H // 2 else 0
    return (t + shift) // 8 == (j + shift) // 8 and j <= t


def with_globals(count: int, rest: Count) -> Count:
    return lambda h, t, j: t < count or j < count or rest(h, t - count, j - count)


# A pattern of T tokens and H heads, and how often query t of head h reads key j.
PATTERNS: dict[str, tuple[Pattern, Count]] = {
    "sliding_window": (sparse.sliding_window(5), lambda h, t, j: t - 5 < j <= t),
    "sliding_window-both": (sparse.sliding_window(5, False), lambda h, t, j: abs(t - j) <= 5),
    "sink_window": (sparse.sink_window(5, 3), lambda h, t, j: j <= t and (j < 3 or j > t - 5)),
    "block_streaming": (
        sparse.block_streaming(T, 16, 1, 2),
        lambda h, t, j: j <= t and (j < 16 or t // 16 - j // 16 < 2),
    ),
    "strided": (
        sparse.sparse_transformer_strided(9),
        lambda h, t, j: j <= t and (j > t - 9 if h < H // 2 else (t - j) % 9 == 0),
    ),
    "fixed": (
        sparse.sparse_transformer_fixed(12, 3),
        lambda h, t, j: j <= t and (j // 12 == t // 12 if h < H // 2 else j % 12 >= 9),
    ),
    "log_sparse": (
        sparse.log_sparse(),
        lambda h, t, j: j == t or (t > j and (t - j) & (t - j - 1) == 0),
    ),
    "log_sparse-window": (
        sparse.log_sparse(6),
        lambda h, t, j: t - 6 < j <= t or (t > j and (t - j) & (t - j - 1) == 0),
    ),
    "longnet": (sparse.longnet([8, 16, 48], [1, 2, 4]), longnet),
    "big_bird": (sparse.big_bird(T, H, 16, 1, 0, 0), lambda h, t, j: t // 16 == j // 16),
    "longformer": (
        sparse.longformer(4, 3),
        with_globals(3, lambda h, t, j: abs(t - j) <= 4),
    ),
    "longformer-dilated": (
        sparse.longformer(4, 0, [1, 2]),
        lambda h, t, j: abs(t - j) <= 4 if h < H // 2 else abs(t - j) <= 8 and (t - j) % 2 == 0,
    ),
    "longformer-causal": (
        sparse.longformer(4, 3, causal=True),
        lambda h, t, j: j <= t and (t - j <= 4 or j < 3),
    ),
    "etc": (sparse.etc(2, 4), with_globals(2, lambda h, t, j: abs(t - j) <= 4)),
    "gmat": (
        sparse.gmat(2, sparse.chunked_local(7, causal=False)),
        with_globals(2, lambda h, t, j: t // 7 == j // 7),
    ),
    "star": (sparse.star(), with_globals(1, lambda h, t, j: abs(t - j) <= 1)),
    "block_bert": (
        sparse.block_bert(T, BLOCK_BERT),
        lambda h, t, j: j // 10 == BLOCK_BERT[h][t // 10],
    ),
    "axial-0": (sparse.axial((7, 10), 0), lambda h, t, j: t % 10 == j % 10),
    "axial-1": (sparse.axial((7, 10), 1), lambda h, t, j: t // 10 == j // 10),
    "spatial": (sparse.spatio_temporal(7, 2, 5)[0], lambda h, t, j: t // 10 == j // 10),
    "spatial-windows": (
        sparse.spatio_temporal(1, 7, 10, 1)[0],
        lambda h, t, j: t == j,
    ),
    "temporal": (sparse.spatio_temporal(7, 2, 5)[1], lambda h, t, j: t % 10 == j % 10),
    "s2_attn": (sparse.s2_attn(8), s2),
    "block_diffusion": (sparse.block_diffusion(6), block_diffusion),
    "prefix_lm": (sparse.prefix_lm(9), lambda h, t, j: j <= t or j < 9),
    "chunked_local": (sparse.chunked_local(9), lambda h, t, j: j <= t and t // 9 == j // 9),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_is_the_set_of_its_paper(name):
    pattern, count = PATTERNS[name]
    want = torch.tensor(
        [[[int(count(h, t, j)) for j in range(T)] for t in range(T)] for h in range(H)]
    )
    assert torch.equal(pattern.to_dense(T, H), want)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_attends_as_dense(name, heads):
    pattern, _ = PATTERNS[name]
    leaves = qkv(T, *heads)
    want = dense_attention(*leaves, pattern.to_dense(T, H))
    assert_same_attention(pattern.attend(*leaves), want, *leaves)


def assert_as_exact_as_torch(pattern: Pattern, leaves: list[torch.Tensor]):
    """No further from the truth than torch's attention under the dense mask, twice over."""
    (B, T, H, _), V = leaves[0].shape, leaves[2].shape[-1]
    dtype, dense = leaves[0].dtype, pattern.to_dense(T, H)
    mask, weight = dense.double().log(), torch.randn(B, T, H, V)

    def sdpa(*x):
        o = torch.nn.functional.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in x), attn_mask=mask.to(x[0].dtype), enable_gqa=True
        )
        return o.transpose(1, 2)

    def results(f, dtype):
        x = [y.detach().to(dtype).requires_grad_() for y in leaves]
        o = f(*x)
        return [o, *torch.autograd.grad((o * weight.to(dtype)).sum(), x)]

    truth = results(sdpa, torch.float64)
    ours = results(lambda *x: pattern.attend(*x)[0], dtype)
    theirs = results(sdpa, dtype)
    for want, got, plain in zip(truth, ours, theirs, strict=True):
        # of one key a softmax has no gradient: dO V minus itself, sums of V numbers
        size = want.norm() or (want.numel() * V) ** 0.5
        error, baseline = ((y.double() - want).norm() / size for y in (got, plain))
        ulps = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
        assert got.dtype == dtype and error <= 2 * baseline + ulps
    with torch.no_grad():
        lse = pattern.attend(*leaves)[1]
        want = dense_attention(*(x.double() for x in leaves), dense)[1]
    torch.testing.assert_close(lse.double(), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_in_low_precision(name, dtype):
    assert_as_exact_as_torch(PATTERNS[name][0], qkv(T, dtype=dtype))


MADE_FOR_T = ("block_streaming", "big_bird", "block_bert", "axial", "spatial", "temporal")
MADE_FOR_H = {
    "big_bird": lambda heads: sparse.big_bird(T, heads, 16, 1, 0, 0),
    "block_bert": lambda heads: sparse.block_bert(T, BLOCK_BERT * (heads // H)),
}
GROUPS, WIDTHS = (1, 4, 16), (64, 96, 128, 256)


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_at_real_heads(name, D):
    """Every pattern at each width; groups, dtypes and lengths take turns, so that it meets each."""
    turn = [*PATTERNS].index(name) + WIDTHS.index(D)
    group, dtype = GROUPS[turn % 3], (torch.float32, torch.bfloat16)[turn // 2 % 2]
    heads, kv_heads = max(group, H), max(group, H) // group
    pattern = MADE_FOR_H[name](heads) if name in MADE_FOR_H else PATTERNS[name][0]
    generator = torch.Generator().manual_seed(turn)
    n = int(torch.randint(65, 140, (), generator=generator)) // 2 * 2
    if name.startswith(MADE_FOR_T):
        n = T
    leaves = qkv(n, heads, kv_heads, D, D, 1, dtype)
    assert_as_exact_as_torch(pattern, leaves)
    if name.startswith((*MADE_FOR_T, "block_diffusion")):
        return
    q, k, v = (x.detach() for x in leaves)
    cut = n // 3
    packed = pattern.packed(q, k, v, torch.tensor([0, cut, cut, n]))
    apart = [pattern.attend(q[:, p], k[:, p], v[:, p]) for p in (slice(cut), slice(cut, None))]
    for got, want, dim in zip(packed, zip(*apart, strict=True), (1, 2), strict=True):
        torch.testing.assert_close(got, torch.cat(want, dim))


@pytest.mark.parametrize(("G", "radius", "clip"), [(3, 7, 4), (2, 2, 4), (0, 30, 1), (1, 0, 2)])
def test_etc_has_labels(G, radius, clip):
    n = 24
    leaves = qkv(n, 2, 2)
    labels, across = (
        torch.randn(m, 2, 8, dtype=torch.float64, requires_grad=True) for m in (2 * clip + 1, 2)
    )
    belongs = torch.rand(G, n - G) < 0.3
    q, k, v = leaves
    kinds = torch.cat([labels, across])
    score = torch.full((2, 2, n, n), -torch.inf, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if (i < G) == (j < G):
                kind = min(max(j - i, -clip), clip) + clip
                if i >= G and abs(i - j) > radius:
                    continue
            else:
                kind = 2 * clip + 1 + int(belongs[min(i, j), max(i, j) - G])
            score[:, :, i, j] = (q[:, i] * (k[:, j] + kinds[kind])).sum(-1) * 8**-0.5
    want = torch.einsum("bhts,bshd->bthd", score.softmax(-1), v)
    got = sparse.etc_attn(q, k, v, radius, labels, across, belongs)
    torch.testing.assert_close(got, want)
    weight, every = torch.randn_like(want), [*leaves, labels, across]
    ours, theirs = (
        torch.autograd.grad((x * weight).sum(), every, allow_unused=True, materialize_grads=True)
        for x in (got, want)
    )
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="odd number of labels from 3 on"):
        sparse.etc_attn(q, k, v, radius, labels[1:], across, belongs)


@pytest.mark.parametrize("name", [n for n in PATTERNS if not n.startswith(MADE_FOR_T)])
def test_packed_sequences_are_separate(name):
    pattern, _ = PATTERNS[name]
    q, k, v = (x[:1].detach() for x in qkv(T))
    cuts = [0, 6, 6, 40, T]
    o, lse = pattern.packed(q, k, v, torch.tensor(cuts))
    for a, b in pairwise(cuts):
        alone = pattern.attend(q[:, a:b], k[:, a:b], v[:, a:b])
        torch.testing.assert_close((o[:, a:b], lse[..., a:b]), alone)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize(
    "name", ["strided", "fixed", "log_sparse", "longnet", "longformer", "s2_attn"]
)
def test_few_tokens(name, tokens):
    pattern, count = PATTERNS[name]
    o, lse = pattern.attend(*(x.detach() for x in qkv(tokens)))
    assert o.shape == (2, tokens, 4, 6) and lse.shape == (2, 4, tokens)
    if tokens:
        want = [
            [[int(count(h, t, j)) for j in range(tokens)] for t in range(tokens)] for h in range(H)
        ]
        assert pattern.to_dense(tokens, H).tolist() == want


def test_big_bird_has_window_ends_and_random_blocks():
    generator = torch.Generator().manual_seed(1)
    dense = sparse.big_bird(16 * 12 + 3, 2, 16, 3, 1, 2, generator).to_dense(16 * 12 + 3, 2)
    blocks = dense[:, ::16, ::16]
    row = torch.arange(13)
    fixed = ((row[:, None] - row).abs() <= 1) | (row == 0) | (row == 12)
    fixed |= ((row == 0) | (row == 12))[:, None]
    assert bool((blocks[:, fixed] == 1).all())
    assert ((blocks.sum(-1) - fixed.sum(-1))[:, 1:-1] == 2).all()  # random ones
    assert not torch.equal(blocks[0], blocks[1])
    pattern, leaves = sparse.big_bird(100, 4, 16, 3, 1, 2, generator), qkv(100)
    want = dense_attention(*leaves, pattern.to_dense(100, 4))
    assert_same_attention(pattern.attend(*leaves), want, *leaves)
    assert torch.equal(dense, blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[
        :, : 16 * 12 + 3, : 16 * 12 + 3
    ])  # fmt: skip


def test_density_and_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    pattern = sparse.sliding_window(2)
    assert pattern.density(4) == 7 / 16
    assert pattern.plot(tmp_path / "window.png", 16, 2).stat().st_size > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparse.sliding_window(0), "window_size must be positive, got 0"),
        (lambda: sparse.sparse_transformer_fixed(8, 3), "width must divide stride, got 3 and 8"),
        (lambda: sparse.longnet([4], [1, 2]), r"as many segments as rates, got \[4\] and \[1, 2\]"),
        (lambda: sparse.block_bert(5, [[0, 1]]), "multiple of the blocks, got 5 and 2"),
        (lambda: sparse.block_bert(4, [[0, 0]]), r"permutations of 0 to 1, got \[\[0, 0\]\]"),
        (lambda: sparse.block_bert(4, [[0, 1]]).to_dense(4, 2), "2 heads and 1 permutations"),
        (lambda: sparse.spatio_temporal(1, 4, 4, 3), "window must divide height and width, got 3"),
        (lambda: sparse.block_diffusion(2).to_dense(5), "T must be even"),
        (
            lambda: sparse.block_streaming(32, 16).packed(*qkv(32, B=1), torch.tensor([0, 32])),
            "made for a number of tokens cannot read packed",
        ),
        (lambda: sparse.sink_window(4, -1), "sinks must not be negative, got -1"),
        (lambda: sparse.block_streaming(9, local_blocks=0), "local_blocks must be positive, got 0"),
        (lambda: sparse.prefix_lm(-1), "prefix must not be negative, got -1"),
        (lambda: sparse.longnet([0], [1]), "segments must be positive, got 0"),
        (lambda: sparse.longformer(-1), "window must not be negative, got -1"),
        (lambda: sparse.longformer(4, -1), "global_tokens must not be negative, got -1"),
        (lambda: sparse.longformer(4, 0, []), "dilation must be positive, got 0"),
        (lambda: sparse.etc(1, -1), "radius must not be negative, got -1"),
        (lambda: sparse.big_bird(99, 1, 16, 2), "window_blocks must be odd, got 2"),
        (
            lambda: sparse.big_bird(32, 1, 16, random_blocks=torch.tensor([[[2], [0]]])),
            r"must be \[heads, rows, n\] = \[1, 2, n\] and below 2",
        ),
        (lambda: sparse.axial((2, 3), 2), r"axis must be in \[-2, 2\), each once, got \[2\]"),
        (lambda: sparse.axial((2, 3), 1).to_dense(7), r"a grid of \[2, 3\] has 6 tokens, got 7"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
