"""Position embeddings: what scores become, positions per token, and continuing at an offset."""

from __future__ import annotations

import pytest
import torch

from lsm_cuda.modules import LRPE, RotaryEmbedding, XPos, packed_positions


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bihd,bjhd->bhij", q, k)


def test_rotary_scores_depend_on_distance_alone():
    rotary = RotaryEmbedding(16)
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16)
    near = (rotary(q, 5) * rotary(k, 2)).sum(-1)
    far = (rotary(q, 105) * rotary(k, 102)).sum(-1)
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert not rotary.state_dict()


def test_rotary_continues_at_an_offset():
    x = torch.randn(2, 9, 3, 8)
    whole = RotaryEmbedding(8)(x)
    rotary = RotaryEmbedding(8)
    split = torch.cat([rotary(x[:, :4]), rotary(x[:, 4:], 4)], 1)
    torch.testing.assert_close(split, whole)
    with pytest.raises(ValueError, match="dim must be even, got 7"):
        RotaryEmbedding(7)


def test_rotary_takes_a_position_per_token():
    rotary, x = RotaryEmbedding(8), torch.randn(2, 9, 3, 8)
    torch.testing.assert_close(rotary(x, torch.arange(4, 13)), rotary(x, 4))
    each = torch.stack([torch.arange(9), torch.arange(100, 109)])
    expected = torch.cat([rotary(x[:1]), rotary(x[1:], 100)])
    torch.testing.assert_close(rotary(x, each), expected)
    with pytest.raises(
        ValueError, match=r"positions \[T\] or \[B, T\] of x \[2, 9, 3, 8\], got \[2\]"
    ):
        rotary(x, torch.tensor([4, 5]))


def test_packed_positions():
    bounds = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)
    assert packed_positions(bounds, 9).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


def xpos_scores(q: torch.Tensor, k: torch.Tensor, base: float, scale_base: float) -> torch.Tensor:
    """The paper's definition, one complex number per channel pair."""
    D = q.shape[-1]
    q, k = (torch.complex(*x.chunk(2, -1)) for x in (q, k))
    i = torch.arange(D // 2).double()
    log_zeta = ((2 * i / D + 0.4) / 1.4).log()
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    exponent = torch.complex(log_zeta / scale_base, base ** (-2 * i / D))
    factor = (distance[..., None] * exponent).exp()  # [T, T, D/2]
    return torch.einsum("bihd,bjhd,ijd->bhij", q, k.conj(), factor).real


def test_xpos_is_its_definition():
    q, k = randn(2, 40, 3, 8), randn(2, 40, 3, 8)
    got = scores(*XPos(8, base=100.0, scale_base=16.0)(q, k))
    torch.testing.assert_close(got, xpos_scores(q, k, 100.0, 16.0), atol=1e-4, rtol=1e-4)


def test_xpos_scores_do_not_depend_on_where():
    xpos, q, k = XPos(8), randn(1, 12, 2, 8), randn(1, 12, 2, 8)
    expected = scores(*xpos(q, k))
    for offset, center in ((50, 0), (0, 6), (100_000, 100_000)):
        # Angles are fp32: off by up to offset * 2^-23 radians, times |q_i k_i| for each of 8 pairs.
        atol = 1e-5 + offset * 2**-23 * 8
        for where in (offset, torch.arange(offset, offset + 12)):
            got = scores(*xpos(q, k, where, center))
            torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def test_xpos_is_rotation_with_a_decay_per_channel():
    """What a recurrence should use: key m has lost exp((n - m) log_decay) when query n reads it."""
    xpos, q, k = XPos(8, scale_base=16.0), randn(1, 12, 2, 8), randn(1, 12, 2, 8)
    rotary = RotaryEmbedding(8)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    decay = (distance[..., None] * xpos.log_decay).double().exp()
    expected = torch.einsum("bihd,bjhd,ijd->bhij", rotary(q), rotary(k), decay)
    torch.testing.assert_close(scores(*xpos(q, k)), expected, atol=1e-5, rtol=1e-5)
    assert (xpos.log_decay < 0).all() and not xpos.state_dict()


def test_xpos_continues_at_an_offset():
    xpos, q, k = XPos(8), torch.randn(2, 9, 3, 8), torch.randn(2, 9, 1, 8)
    whole = xpos(q, k)
    for got, expected in zip(xpos(q[:, 4:], k[:, 4:], 4), whole, strict=True):
        torch.testing.assert_close(got, expected[:, 4:])
    for got, expected in zip(xpos(q.bfloat16(), k.bfloat16()), whole, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match="scale_base must be positive, got 0"):
        XPos(8, scale_base=0)


def test_lrpe_scores_are_cosines_of_the_distance():
    lrpe = LRPE(num_heads=3, head_dim=4).double()
    q, k = randn(2, 9, 3, 4), randn(2, 9, 3, 4)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    theta = 10000.0 ** (-2 / 12 * torch.arange(12).double()).view(3, 4)
    torch.testing.assert_close(lrpe.theta.squeeze(1), theta, atol=1e-6, rtol=1e-6)
    cosine = (distance[..., None, None] * lrpe.theta.squeeze(1)).cos()
    expected = torch.einsum("bihd,bjhd,ijhd->bhij", q, k, cosine)
    assert lrpe(q).shape == (2, 9, 3, 8)
    for offset in (0, 7, torch.arange(20, 29)):
        torch.testing.assert_close(scores(lrpe(q, offset), lrpe(k, offset)), expected)
    assert {name: list(p.shape) for name, p in lrpe.named_parameters()} == {"theta": [3, 1, 4]}


def test_lrpe_learns_its_angles():
    lrpe = LRPE(2, 3).double()
    x = randn(1, 4, 2, 3).requires_grad_()

    def f(x, theta):
        return torch.func.functional_call(lrpe, {"theta": theta}, (x, 2))

    assert torch.autograd.gradcheck(f, (x, lrpe.theta))
    assert lrpe.to(torch.bfloat16)(x.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: RotaryEmbedding(6), lambda: LRPE(2, 6)])
def test_compiles_as_one_graph(make):
    module, x = make(), torch.randn(1, 5, 2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, torch.arange(3, 8)), module(x, 3))
