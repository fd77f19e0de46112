"""Encoders of long documents: transformers' layers from their parameters, and padding."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from lsm_cuda.layers import (
    BigBirdSelfAttention,
    LongformerSelfAttention,
    LongT5LocalAttention,
    LongT5TransientGlobalAttention,
)
from lsm_cuda.sparse import star_attn

D, H, B = 32, 4, 2
F64 = torch.float64


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=F64)


def same(ours, theirs, a, b, tolerance=1e-8):
    """Outputs, and gradients of the parameters."""
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    weight = torch.randn_like(b)
    for o in (a, b):
        (o * weight).sum().backward()
    for name, p in ours.named_parameters():
        want = theirs.get_parameter(name).grad
        torch.testing.assert_close(
            p.grad, want, atol=10 * tolerance, rtol=10 * tolerance, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("globals_", [(), (0, 3, 40)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model", ["longformer", "led"])
def test_longformer_is_that_of_transformers(globals_, padded, model):
    pytest.importorskip("transformers")
    from transformers.models.led.modeling_led import LEDEncoderSelfAttention
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention as Theirs

    config = SimpleNamespace(
        hidden_size=D, num_attention_heads=H, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    kind = Theirs if model == "longformer" else LEDEncoderSelfAttention
    theirs, ours = kind(config, 0).double(), LongformerSelfAttention(D, H, 8).double()
    ours.load_state_dict(theirs.state_dict())
    x, mask = tokens(B, 48), torch.ones(B, 48)
    mask[0, list(globals_)] = 2
    mask[1, [g + 1 for g in globals_[:2]] + [30] * bool(globals_)] = 2
    if padded:
        mask[1, 41:] = 0
    want = theirs(
        x, (mask - 1) * 10000.0, mask == 0, mask == 2, bool(globals_), output_attentions=False
    )[0]
    got = ours(x, mask)[0]
    if not globals_:  # theirs gives unused projections no gradient
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        return
    same(ours, theirs, got, want, 1e-6)  # their softmax is in fp32


def test_big_bird_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.big_bird import modeling_big_bird as bird

    config = transformers.BigBirdConfig(
        hidden_size=D, num_attention_heads=H, block_size=16, num_random_blocks=2,
        attention_probs_dropout_prob=0.0, use_bias=True,
    )  # fmt: skip
    theirs = bird.BigBirdBlockSparseAttention(config, seed=1).double().train()
    ours = BigBirdSelfAttention(D, H, 16, 2).double()
    ours.load_state_dict(theirs.state_dict())
    T = 16 * 11
    x, mask = tokens(B, T), torch.ones(B, T, dtype=F64)
    drawn, draw = [], theirs._bigbird_block_rand_mask_with_head

    def record(**options):
        drawn.append(draw(**options))
        return drawn[-1]

    theirs._bigbird_block_rand_mask_with_head = record
    blocked, band, rows, columns = bird.BigBirdModel.create_masks_for_block_sparse_attn(mask, 16)
    want, _ = theirs(x, band, rows, columns, blocked, blocked)
    middle = torch.stack([torch.as_tensor(h) for h in drawn[0]])  # rows but the first and last
    blocks = torch.full((H, 11, 2), -1)
    blocks[:, 1:-1] = middle
    got = ours(x, random_blocks=blocks)[0]
    same(ours, theirs, got, want)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("T", [45, 6])
@pytest.mark.parametrize("kind", [LongT5LocalAttention, LongT5TransientGlobalAttention])
def test_longt5_is_that_of_transformers(padded, T, kind):
    transformers = pytest.importorskip("transformers")
    from transformers.models.longt5 import modeling_longt5 as longt5

    config = transformers.LongT5Config(
        d_model=D, d_kv=6, num_heads=H, local_radius=5, global_block_size=4, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
    )  # fmt: skip
    side = (4,) if kind is LongT5TransientGlobalAttention else ()
    theirs = getattr(longt5, kind.__name__)(config, True).double()
    ours = kind(D, H, 6, 5, *side, True, 8, 12).double()
    ours.load_state_dict(theirs.state_dict())
    x, mask = tokens(B, T), torch.ones(B, T)
    if padded:
        mask[1, T - 2 :] = 0
    seen = mask if side else longt5._get_local_attention_mask(mask, 6, mask.device)
    want = theirs(x, seen)[0] * mask[..., None]
    got = ours(x, mask if padded else None)[0]
    same(ours, theirs, got, want, 1e-5)  # their norm is in fp32


LAYERS = {
    "longt5 local": lambda: LongT5LocalAttention(D, H, 6, 5),
    "longt5": lambda: LongT5TransientGlobalAttention(D, H, 6, 5, 4),
    "bigbird": lambda: BigBirdSelfAttention(D, H, 16, 2),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_packed_and_padded_are_separate_sequences(name):
    layer, x, cuts = LAYERS[name]().double(), tokens(1, 150), [0, 3, 3, 60, 150]
    o, _, _ = layer(x, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    rows, mask = torch.zeros(2, 95, D, dtype=F64), torch.zeros(2, 95)
    rows[0, 38:], mask[0, 38:] = x[0, 3:60], 1
    rows[1, :90], mask[1, :90] = x[0, 60:], 1
    padded, _, _ = layer(rows, mask)
    for a, b in pairwise(cuts):
        if b > a:
            torch.testing.assert_close(o[:, a:b], layer(x[:, a:b])[0])
    torch.testing.assert_close(padded[0, 38:], o[0, 3:60])
    torch.testing.assert_close(padded[1, :90], o[0, 60:])


@torch.no_grad()
def test_longformer_rows_may_have_any_number_of_global_tokens():
    layer, x, mask = LongformerSelfAttention(D, H, 6).double(), tokens(3, 40), torch.ones(3, 40)
    mask[0, [9, 30, 31]] = mask[1, 0] = 2
    both = layer(x, mask)[0]
    for n in range(3):
        torch.testing.assert_close(both[n : n + 1], layer(x[n : n + 1], mask[n : n + 1])[0])
    assert layer(x[:0], mask[:0])[0].shape == layer(x[:0])[0].shape == (0, 40, D)


@torch.no_grad()
def test_longformer_padding_is_as_if_not_there():
    layer, x, mask = LongformerSelfAttention(D, H, 6, dilation=2).double(), tokens(1, 40), None
    mask = torch.ones(1, 40)
    mask[0, [9, 30]], mask[0, :7] = 2, 0
    o = layer(x, mask)[0]
    torch.testing.assert_close(o[:, 7:], layer(x[:, 7:], mask[:, 7:])[0])
    assert not o[:, :7].any()


def test_star_is_its_graph():
    T = 7
    q, k, v, ek, ev = (torch.randn(B, T, H, 8, dtype=F64, requires_grad=True) for _ in range(5))
    sk, sv = (torch.randn(B, 1, H, 8, dtype=F64, requires_grad=True) for _ in range(2))
    outputs = []
    for t in range(T):
        keys, values = (
            torch.stack([x[:, t - 1], x[:, t], x[:, (t + 1) % T], e[:, t], s[:, 0]], 1)
            for x, e, s in ((k, ek, sk), (v, ev, sv))
        )
        p = (torch.einsum("bhd,bshd->bhs", q[:, t], keys) / 8**0.5).softmax(-1)
        outputs.append(torch.einsum("bhs,bshd->bhd", p, values))
    want, leaves = torch.stack(outputs, 1), (q, k, v, ek, ev, sk, sv)
    got, weight = star_attn(q, k, v, (ek, ev), (sk, sv)), torch.randn_like(want)
    for a, b in zip(
        [got, *torch.autograd.grad((got * weight).sum(), leaves)],
        [want, *torch.autograd.grad((want * weight).sum(), leaves)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    with pytest.raises(ValueError, match="a ring needs 3 tokens, got T = 2"):
        star_attn(q[:, :2], k[:, :2], v[:, :2], (ek, ev), (sk, sv))


def test_errors():
    with pytest.raises(ValueError, match="attention_window must be even and positive, got 3"):
        LongformerSelfAttention(D, H, 3)
    with pytest.raises(ValueError, match="BigBirdSelfAttention: hidden_size must be a multiple"):
        BigBirdSelfAttention(D, 5)
