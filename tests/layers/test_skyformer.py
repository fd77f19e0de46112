"""Skyformer: definition, the kernel it approximates, and how landmarks are drawn."""

from __future__ import annotations

import pytest
import torch

from lsm_cuda.layers import SkyformerAttention

D = 4


def make(**options) -> SkyformerAttention:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_heads": 3, "num_landmarks": 6, "sampling": "even"}
    return SkyformerAttention(**{**sizes, **options}).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 12, dtype=torch.float64)


def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (-(x[:, None] - y).square().sum(-1) / (2 * D**0.5)).exp()


def definition(layer: SkyformerAttention, x: torch.Tensor, marks: list[int] | None) -> torch.Tensor:
    """Landmarks at the given positions; None for the kernel itself."""
    rows = []
    for row in x:
        heads = []
        for h in range(layer.num_heads):
            cut = slice(h * D, h * D + D)
            q, k, v = (p(row)[:, cut] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
            if marks is None:
                heads.append(kernel(q, k) @ v)
                continue
            w = torch.cat([q[marks], k[marks]])
            inner = kernel(w, w) + layer.gamma * torch.eye(len(w), dtype=w.dtype)
            heads.append(kernel(q, w) @ torch.linalg.inv(inner) @ kernel(w, k) @ v)
        rows.append(torch.cat(heads, -1))
    return torch.stack(rows) @ layer.o_proj.weight.T


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("T", "marks"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 2, 3]), (9, [1, 4, 7]), (13, [2, 6, 10])],
)
def test_layer_is_its_definition(T, marks):
    """With enough iterations for the exact inverse."""
    layer, x = make(pinv_iterations=12), tokens(2, T)
    close(layer(x)[0], definition(layer, x, marks))


def test_few_iterations_are_close_to_the_inverse():
    layer, x = make(), tokens(2, 13)
    expected = definition(layer, x, [2, 6, 10])
    assert (layer(x)[0] - expected).norm() <= 0.1 * expected.norm()


def test_all_rows_as_landmarks_give_the_kernel():
    layer, x = make(num_landmarks=14, gamma=1e-9, pinv_iterations=30), tokens(2, 7) * 3
    close(layer(x)[0], definition(layer, x, None), 1e-5)


def test_more_landmarks_approximate_better():
    x = tokens(2, 64) * 2
    errors = []
    for m in (4, 16, 64, 128):
        layer = make(num_landmarks=m, gamma=1e-6, pinv_iterations=24)
        exact = definition(layer, x, None)
        errors.append(((layer(x)[0] - exact).norm() / exact.norm()).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < errors[0]


def test_random_landmarks_are_tokens_of_their_sequence():
    layer = make(sampling="random", num_landmarks=8)
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, 6:], valid[2, 2:] = False, False
    place = torch.arange(9).double().view(1, 1, 9, 1).expand(3, 3, 9, D)
    seen = set()
    for _ in range(20):
        w, real = layer._landmarks(place, valid)
        assert real.sum(1).tolist() == [4, 4, 2]
        for n, length in enumerate((9, 6, 2)):
            drawn = w[n, 0, real[n], 0].tolist()
            assert len(set(drawn)) == len(drawn) and max(drawn) < length
            assert torch.equal(w[n, 0], w[n, 2])  # the same for all heads
        seen.add(tuple(w[0, 0, :, 0].tolist()))
    assert len(seen) > 10


def test_training_draws_and_evaluation_does_not():
    layer, x = make(sampling="random"), tokens(2, 13)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    torch.manual_seed(3)
    first = layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(layer(x)[0], first)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    close(layer(x)[0], make()(x)[0])


def test_errors():
    with pytest.raises(ValueError, match="num_landmarks must be positive and even, got 5"):
        make(num_landmarks=5)
    with pytest.raises(ValueError, match="gamma must be positive, got 0"):
        make(gamma=0)
    with pytest.raises(ValueError, match="sampling must be random or even, got 'odd'"):
        make(sampling="odd")
