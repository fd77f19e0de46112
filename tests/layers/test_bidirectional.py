"""What the approximations of softmax attention have in common, and the pseudo-inverse of two."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from lsm_cuda.cache import Cache
from lsm_cuda.layers import (
    DiagAttention,
    FocusedLinearAttention,
    LinformerAttention,
    LunaAttention,
    NystromformerAttention,
    SkyformerAttention,
)
from lsm_cuda.layers.bidirectional import newton_pinv

LAYERS = {
    "linformer": (LinformerAttention, {"max_len": 20, "proj_dim": 5}),
    "linformer shared": (LinformerAttention, {"max_len": 20, "proj_dim": 5, "share": "kv"}),
    "luna": (LunaAttention, {"pool_size": 3, "num_pool_heads": 2}),
    "luna tied": (LunaAttention, {"pool_size": 3, "tie_kv": True}),
    "nystromformer": (NystromformerAttention, {"num_landmarks": 4, "conv_kernel_size": 3}),
    "nystromformer plain": (NystromformerAttention, {"num_landmarks": 4, "conv_kernel_size": None}),
    "focused": (FocusedLinearAttention, {"conv_kernel_size": 3}),
    "skyformer": (SkyformerAttention, {"num_landmarks": 6, "sampling": "even"}),
    "diag": (DiagAttention, {"block_size": 4, "causal": False}),
    "diag causal": (DiagAttention, {"block_size": 4}),
}
every = pytest.mark.parametrize("name", LAYERS)
NAMES = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
BIASES = ["q_proj.bias", "k_proj.bias", "v_proj.bias"]


def make(name: str, **options) -> nn.Module:
    """With biases, so that keys and values of padding would not be zero."""
    torch.manual_seed(0)
    layer, own = LAYERS[name]
    return layer(hidden_size=16, num_heads=4, **{"qkv_bias": True, **own, **options}).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 16, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@every
@torch.no_grad()
def test_padding_is_as_if_not_there(name):
    layer, x = make(name), tokens(6, 15)
    spans = [(3, 15), (0, 11), (0, 15), (5, 5), (4, 7), (2, 3)]  # left, right, none, nothing, short
    mask = torch.zeros(6, 15, dtype=torch.long)
    for row, (start, end) in zip(mask, spans, strict=True):
        row[start:end] = 1
    o, _, cache = layer(x, attention_mask=mask)
    assert cache is None
    for b, (start, end) in enumerate(spans):
        close(o[b, start:end], layer(x[b : b + 1, start:end])[0][0])
        assert not o[b][mask[b] == 0].any()
    close(layer(x, attention_mask=torch.ones(6, 15))[0], layer(x)[0])


@every
@torch.no_grad()
def test_cu_seqlens_are_separate_sequences(name):
    layer, x = make(name), tokens(1, 20)
    bounds = [0, 3, 3, 4, 9, 20]
    o = layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))[0]
    for start, end in pairwise(bounds):
        close(o[:, start:end], layer(x[:, start:end])[0])


@every
def test_gradients(name):
    layer = make(name)
    x = tokens(2, 6).requires_grad_()
    parameters = dict(layer.named_parameters())
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])

    def f(x, *values):
        values = dict(zip(parameters, values, strict=True))
        plain = torch.func.functional_call(layer, values, (x,))[0]
        return plain, torch.func.functional_call(layer, values, (x, mask))[0]

    assert torch.autograd.gradcheck(f, (x, *parameters.values()), fast_mode=True)


@every
def test_empty_inputs(name):
    layer = make(name)
    assert layer(tokens(2, 0))[0].shape == (2, 0, 16)
    assert layer(tokens(0, 3))[0].shape == (0, 3, 16)
    assert layer(tokens(1, 0), cu_seqlens=torch.tensor([0, 0, 0]))[0].shape == (1, 0, 16)
    assert not layer(tokens(2, 3), attention_mask=torch.zeros(2, 3))[0].any()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_near_the_exact_layer(name, dtype):
    layer, x = make(name).to(dtype), tokens(2, 15).to(dtype)
    o, *_ = layer(x)
    assert o.dtype == dtype
    exact = layer.double()(x.double())[0]
    # q, k, v, attention and output are each rounded once or twice.
    assert (o.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


@every
def test_autocast(name):
    layer, x = make(name).float(), tokens(2, 15).float()
    if name == "focused":  # jumps where rounding takes a query's last positive channel
        torch.nn.init.ones_(layer.q_proj.bias)
    exact = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        o = layer(x)[0]
        o.float().sum().backward()
    assert (o - exact).norm() <= 0.03 * exact.norm()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@every
@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_extreme_inputs_stay_finite(name, scale):
    """Equal tokens make singular matrices; far ones make one-hot weights and empty kernels."""
    layer = make(name).float()
    x = (scale * tokens(2, 15)).float().requires_grad_()
    o = layer(x)[0]
    grads = torch.autograd.grad(o.sum(), [x, *layer.parameters()], allow_unused=True)
    assert o.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linformer", "luna", "nystromformer", "skyformer", "diag"])
def test_compiles_as_one_graph(name):
    layer, x = make(name).float(), tokens(2, 15).float()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(x1)[0].square().sum().backward()
    compiled(x2)[0].square().sum().backward()
    torch.testing.assert_close(x2.grad, x1.grad)


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("linformer", {"qkv_bias": False}, [*NAMES, "E", "F"]),
        ("linformer shared", {}, [*NAMES, *BIASES, "E"]),
        (
            "luna",
            {"qkv_bias": False},
            [*NAMES, "pq_proj.weight", "pk_proj.weight", "pv_proj.weight", "pool"],
        ),
        (
            "luna tied",
            {"qkv_bias": False, "pool_size": None},
            ["q_proj.weight", "c_proj.weight", "pq_proj.weight", "pc_proj.weight", "o_proj.weight"],
        ),
        ("nystromformer", {}, [*NAMES, *BIASES, "conv.weight"]),
        ("nystromformer plain", {"qkv_bias": False}, NAMES),
        ("focused", {}, [*NAMES, *BIASES, "conv.weight", "conv.bias"]),
        ("skyformer", {"qkv_bias": False}, NAMES),
        ("diag", {}, [*NAMES, *BIASES]),
    ],
)
def test_state_dict(name, options, names):
    layer = make(name, **options)
    assert sorted(layer.state_dict()) == sorted(names)
    copy = make(name, **options)
    with torch.no_grad():
        for p in copy.parameters():
            p.normal_()
    copy.load_state_dict(layer.state_dict())
    x = tokens(1, 9)
    pool = {"pool": tokens(1, 2)} if options.get("pool_size", 0) is None else {}
    assert torch.equal(copy(x, **pool)[0], layer(x, **pool)[0])


@every
def test_errors(name):
    layer, x = make(name), tokens(2, 5)
    kind = type(layer).__name__
    with pytest.raises(ValueError, match=r"\[B, S\] = \[2, 5 or more\].*got \[2, 4\]"):
        layer(x, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask or cu_seqlens, not both"):
        layer(x[:1], attention_mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="B = 1 with cu_seqlens"):
        layer(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=f"{kind}: hidden_size must be a multiple of num_heads"):
        type(layer)(hidden_size=16, num_heads=3)
    if not isinstance(layer, DiagAttention):
        with pytest.raises(ValueError, match=f"{kind}: .*past_key_values must be None"):
            layer(x, past_key_values=Cache())


@pytest.mark.parametrize(("rank", "iterations"), [(6, 18), (3, 10)])
def test_newton_pinv_is_the_pseudo_inverse(rank, iterations):
    torch.manual_seed(0)
    a = torch.randn(2, 3, 6, rank, dtype=torch.float64) @ torch.randn(rank, 6, dtype=torch.float64)
    close(newton_pinv(a, iterations), torch.linalg.pinv(a, rtol=1e-10))


def test_newton_pinv_multiplies_small_singular_values_by_13_4():
    """Where the iteration has not converged: the factor its documentation promises."""
    a = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    shares = [(a @ newton_pinv(a, n))[1, 1].item() for n in (3, 4)]
    assert shares[1] / shares[0] == pytest.approx(13 / 4, rel=1e-6)


def test_newton_pinv_shared_start_and_precision():
    a = torch.rand(3, 5, 5, dtype=torch.float64) + torch.eye(5)
    a[0] *= 10
    alone = torch.stack([newton_pinv(m, 3) for m in a])
    close(newton_pinv(a, 3), alone)
    shared = newton_pinv(a, 3, shared=True)
    close(shared[0], alone[0])  # of the largest norm
    assert not torch.allclose(shared[1:], alone[1:])
    assert newton_pinv(a.bfloat16(), 3).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = newton_pinv(a.float(), 6)
    assert torch.equal(inside, newton_pinv(a.float(), 6))
