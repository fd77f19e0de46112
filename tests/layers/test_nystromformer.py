"""Nyströmformer: definition, exact limits, and transformers' layer as an oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lsm_cuda.layers import NystromformerAttention

D = 4


def make(**options) -> NystromformerAttention:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_heads": 3, "num_landmarks": 5, "conv_kernel_size": 3}
    return NystromformerAttention(**{**sizes, **options}).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 12, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def iteration(a: torch.Tensor, n: int) -> torch.Tensor:
    z = a.T / (a.sum(0).max() * a.sum(1).max())
    eye = torch.eye(len(a), dtype=a.dtype)
    for _ in range(n):
        y = a @ z
        z = 0.25 * z @ (13 * eye - y @ (15 * eye - y @ (7 * eye - y)))
    return z


def definition(layer: NystromformerAttention, x: torch.Tensor, pinv=iteration) -> torch.Tensor:
    """One sequence and head at a time; segments written out."""
    T, m = x.shape[1], layer.num_landmarks
    starts = [next(t for t in range(T) if t * m // T == i) for i in range(m)] if m < T else []
    rows = []
    for row in x:
        heads = []
        for h in range(layer.num_heads):
            cut = slice(h * D, h * D + D)
            q, k, v = (p(row)[:, cut] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
            if m >= T:
                o = (q @ k.T / D**0.5).softmax(-1) @ v
            else:
                ends = [*starts[1:], T]
                l_q, l_k = (
                    torch.stack([y[a:b].mean(0) for a, b in zip(starts, ends, strict=True)])
                    for y in (q, k)
                )
                one = (q @ l_k.T / D**0.5).softmax(-1)
                two = (l_q @ l_k.T / D**0.5).softmax(-1)
                three = (l_q @ k.T / D**0.5).softmax(-1)
                o = one @ pinv(two, layer.pinv_iterations) @ three @ v
            if layer.conv is not None:
                taps = layer.conv.weight[h, 0, :, 0]
                W = len(taps) // 2
                for t in range(T):
                    for i, tap in enumerate(taps):
                        if 0 <= t + i - W < T:
                            o = o.index_add(0, torch.tensor([t]), tap * v[t + i - W][None])
            heads.append(o)
        rows.append(torch.cat(heads, -1))
    return torch.stack(rows) @ layer.o_proj.weight.T


@pytest.mark.parametrize("T", [1, 5, 6, 10, 13])
@pytest.mark.parametrize("options", [{}, {"conv_kernel_size": None, "qkv_bias": True}])
def test_layer_is_its_definition(T, options):
    layer, x = make(**options), tokens(2, T)
    close(layer(x)[0], definition(layer, x))


@pytest.mark.parametrize("T", [10, 13])
def test_many_iterations_reach_the_pseudo_inverse(T):
    layer, x = make(pinv_iterations=60), tokens(2, T) * 3
    expected = definition(layer, x, pinv=lambda a, _: torch.linalg.pinv(a))
    close(layer(x)[0], expected, 1e-6)


def test_equal_tokens_of_a_segment_are_attended_exactly():
    """Landmarks are then the tokens themselves, each counted as often as it occurs."""
    layer = make(conv_kernel_size=None, pinv_iterations=60)
    x = (tokens(1, 5) * 3).repeat_interleave(4, 1)
    q, k, v = (p(x).view(20, 3, D) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = (torch.einsum("ihd,jhd->hij", q, k) / D**0.5).softmax(-1)
    expected = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
    close(layer(x)[0][0], layer.o_proj(expected), 1e-6)


def test_a_shared_start_couples_the_batch():
    x = tokens(2, 10) * torch.tensor([[[1.0]], [[5.0]]])
    for shared, same in ((False, True), (True, False)):
        layer = make(shared_init=shared)
        together, alone = layer(x)[0], torch.cat([layer(x[:1])[0], layer(x[1:])[0]])
        assert torch.allclose(together, alone, atol=1e-10, rtol=1e-10) is same


def test_errors():
    with pytest.raises(ValueError, match="num_landmarks must be positive, got 0"):
        make(num_landmarks=0)
    with pytest.raises(ValueError, match="conv_kernel_size must be odd, got 4"):
        make(conv_kernel_size=4)


@pytest.mark.parametrize("landmarks", [5, 20])
@pytest.mark.parametrize("kernel", [3, 7])
def test_transformers_agrees(landmarks, kernel):
    """Same weights, outputs and gradients as NystromformerSelfAttention, for 20 tokens."""
    package = pytest.importorskip("transformers.models.nystromformer")
    config = package.NystromformerConfig(
        hidden_size=12,
        num_attention_heads=3,
        segment_means_seq_len=20,
        num_landmarks=landmarks,
        conv_kernel_size=kernel,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = package.modeling_nystromformer.NystromformerSelfAttention(config).double()
    ours = make(num_landmarks=landmarks, conv_kernel_size=kernel, shared_init=True, qkv_bias=True)
    ours.o_proj = nn.Identity()
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "conv": "conv"}

    def renamed(parameters) -> dict[str, torch.Tensor]:
        return {names[(key := n.partition("."))[0]] + "." + key[2]: p for n, p in parameters}

    ours.load_state_dict(renamed(theirs.state_dict().items()))
    x = tokens(2, 20).requires_grad_()
    torch.set_default_dtype(torch.float64)  # of the identity matrix in its iteration
    try:
        expected = theirs(x)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    got = ours(x)[0]
    close(got, expected)
    upstream = torch.randn_like(got)
    own, wanted = dict(ours.named_parameters()), renamed(theirs.named_parameters())
    assert own.keys() == wanted.keys()
    for a, b in zip(
        torch.autograd.grad(got, [x, *own.values()], upstream),
        torch.autograd.grad(expected, [x, *(wanted[n] for n in own)], upstream),
        strict=True,
    ):
        close(a, b)
