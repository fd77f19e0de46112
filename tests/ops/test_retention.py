"""Constant decays: which ones, and whose."""

from __future__ import annotations

import math

import pytest
import torch
from peers import fla_module

from lsm_cuda import ops


def test_decays() -> None:
    gamma = ops.retention_log_decay(40).exp()
    torch.testing.assert_close(
        gamma[:3], torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]).double()
    )
    assert (ops.retention_log_decay(40) < 0).all()  # 1 - 2^-44 is not 1
    slopes = ops.lightning_slopes(4, 3, 12)
    torch.testing.assert_close(slopes, 8 / 4 * (1 - 3 / 12) * torch.arange(4).double())
    minimax = ops.minimax_slopes(8, 0, 10)
    torch.testing.assert_close(minimax, 0.5 ** torch.arange(1, 9).double() * (1 + 1e-5))
    assert ops.minimax_slopes(8, 9, 10).max() < 1e-4


def test_is_what_fla_computes() -> None:
    naive = fla_module("ops/retention/naive.py").naive_retention
    q, k, v = torch.randn(2, 50, 4, 12), torch.randn(2, 50, 4, 12), torch.randn(2, 50, 4, 10)
    expected = naive(*(x.transpose(1, 2) for x in (q, k, v)))
    for retention in (
        ops.chunk_retention,
        ops.fused_chunk_retention,
        ops.fused_recurrent_retention,
    ):
        torch.testing.assert_close(retention(q, k, v)[0], expected.transpose(1, 2))


def test_names_are_one_function() -> None:
    q, k, v = torch.randn(2, 50, 4, 12), torch.randn(2, 50, 4, 12), torch.randn(2, 50, 4, 10)
    S = torch.randn(2, 4, 12, 10)
    want = ops.chunk_lightning_attn(q, k, v, 1, 4, 0.3, S, True)
    got = ops.fused_recurrent_lightning_attn(q, k, v, 1, 4, 0.3, S, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    flipped = (x.flip(1) for x in (q, k, v))
    o, _ = ops.fused_recurrent_lightning_attn(q, k, v, 1, 4, reverse=True)
    assert torch.equal(o.flip(1), ops.chunk_lightning_attn(*flipped, 1, 4)[0])
    o, _ = ops.fused_recurrent_retention(q, k, v, reverse=True)
    assert torch.equal(o.flip(1), ops.chunk_retention(*(x.flip(1) for x in (q, k, v)))[0])


@pytest.mark.parametrize("layer_idx", [0, 3])
def test_is_the_attention_of_minimax(layer_idx: int) -> None:
    """transformers' layer, whole: its projections and norm around our operator; then one token."""
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = modeling.MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=6, head_dim=8, block_size=16
    )
    layer = modeling.MiniMaxLightningAttention(config, layer_idx)
    x = torch.randn(2, 45, 32)
    theirs, *_ = layer(x, (None, None), None)
    qkv = layer.act_fn(layer.qkv_proj(x)).view(2, 45, 4, 24)
    q, k, v = qkv.split(8, -1)
    slopes = ops.minimax_slopes(4, layer_idx, 6)

    def rest(o, x):  # type: ignore[no-untyped-def]
        o = layer.norm(o.flatten(-2))
        return layer.out_proj(torch.sigmoid(layer.output_gate(x)) * o)

    o, state = ops.chunk_lightning_attn(q, k, v, scale=1.0, slopes=slopes, output_final_state=True)
    torch.testing.assert_close(rest(o, x), theirs)
    with torch.no_grad():
        o, state = ops.chunk_lightning_attn(
            q[:, :-1], k[:, :-1], v[:, :-1], scale=1.0, slopes=slopes, output_final_state=True
        )
        last = ops.lightning_attn_step(
            *(t[:, -1] for t in (q, k, v)), state, scale=1.0, slopes=slopes
        )
    torch.testing.assert_close(rest(last, x[:, -1]), theirs[:, -1])


def test_errors() -> None:
    x = torch.zeros(1, 3, 2, 4)
    for kwargs in (
        {},
        {"layer_idx": 1},
        {"layer_idx": 1, "num_layers": 2, "slopes": torch.ones(2)},
    ):
        with pytest.raises(ValueError, match="pass layer_idx and num_layers, or slopes, got"):
            ops.chunk_lightning_attn(x, x, x, **kwargs)
    with pytest.raises(RuntimeError, match=r"g_gamma must have shape \[HV\] = \[2\], got \[5\]"):
        ops.chunk_lightning_attn(x, x, x, slopes=torch.ones(5))


def test_longer_memory_in_later_heads() -> None:
    """A key seen 1000 tokens ago weighs γ^1000 in every head."""
    q = torch.ones(1, 1001, 3, 1)
    k = torch.zeros(1, 1001, 3, 1)
    k[:, 0] = 1
    o, _ = ops.chunk_retention(q, k, torch.ones(1, 1001, 3, 1))
    expected = [math.exp(1000 * math.log1p(-(2.0 ** (-5 - h)))) for h in range(3)]
    torch.testing.assert_close(o[0, -1, :, 0], torch.tensor(expected))
