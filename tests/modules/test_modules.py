"""Norms, activations, rotary embedding and feed-forward block against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsm_cuda.modules import (
    ACT2FN,
    FusedRMSNormGated,
    GatedMLP,
    RMSNorm,
    SimpleRMSNorm,
    activation,
)


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def test_rms_norm_is_its_formula():
    norm = RMSNorm(8, eps=1e-3).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x), rms(x, 1e-3) * norm.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_round_once(dtype):
    """The inside is fp32, so the result is the rounded exact one, up to the last digit."""
    x, g = (torch.randn(64, 256) * 30).to(dtype), torch.randn(64, 256).to(dtype)
    wide, gate = x.double(), g.double()
    for got, exact in (
        (RMSNorm(256)(x), rms(wide, 1e-5)),
        (FusedRMSNormGated(256)(x, g), rms(wide, 1e-5) * gate * gate.sigmoid()),
    ):
        assert got.dtype == dtype
        error = (got.double() - exact).abs()
        assert (error <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all()


@pytest.mark.parametrize("name", ["swish", "silu", "sigmoid"])
def test_gated_norm_is_norm_times_gate(name):
    norm = FusedRMSNormGated(8, activation=name).double()
    x, g = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x, g), rms(x, 1e-5) * ACT2FN[name](g))


def test_norm_parameters():
    assert list(RMSNorm(4).state_dict()) == ["weight"]
    assert list(FusedRMSNormGated(4).state_dict()) == ["weight"]
    assert not RMSNorm(4, elementwise_affine=False).state_dict()
    assert not FusedRMSNormGated(4, elementwise_affine=False).state_dict()


def test_simple_rms_norm_has_no_weight():
    norm, x = SimpleRMSNorm(8), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x), rms(x, 1e-6))
    assert not norm.state_dict() and norm.eps == 1e-6


def test_unknown_activations_are_named():
    with pytest.raises(ValueError, match=r"unknown activation 'tanhh'.*gelu.*relu.*swish"):
        activation("tanhh")
    with pytest.raises(ValueError, match="swish, silu or sigmoid, got 'relu'"):
        FusedRMSNormGated(4, activation="relu")


def test_activation_meanings():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    torch.testing.assert_close(ACT2FN["swish"](x), x * x.sigmoid())
    torch.testing.assert_close(ACT2FN["sqrelu"](x), x.clamp_min(0) ** 2)
    torch.testing.assert_close(ACT2FN["gelu"](x), F.gelu(x, approximate="tanh"))
    assert (ACT2FN["elu"](x) > 0).all()
    assert ACT2FN["identity"](x) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_elu_plus_one_keeps_its_digits(dtype):
    """elu(x) + 1 is 0 below some x, where e^x is far from the smallest number of the type."""
    x = torch.linspace(-9, 3, 100).to(dtype)
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    error = (ACT2FN["elu"](x).double() - exact).abs()
    assert (error <= exact * torch.finfo(dtype).eps).all()


def test_mlp_formula_and_default_width():
    mlp = GatedMLP(48).double()
    assert sorted(mlp.state_dict()) == ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
    assert mlp.up_proj.out_features == 256
    x = torch.randn(2, 48, dtype=torch.float64)
    inner = F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    torch.testing.assert_close(mlp(x), inner @ mlp.down_proj.weight.T)
