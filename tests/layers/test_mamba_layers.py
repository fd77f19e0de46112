"""Mamba's layer, its two directions, and its walks over images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recurrent_layers import D, assert_same_layer, close, make, tokens

from lsm_cuda import reference
from lsm_cuda.cache import Cache
from lsm_cuda.layers import SS2D, BiMamba, VSSBlock
from lsm_cuda.ops import scan_order


def test_mamba_is_the_mixer_of_transformers() -> None:
    module = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = module.MambaConfig(
        hidden_size=D, state_size=3, intermediate_size=10, conv_kernel=3, time_step_rank=1,
        num_hidden_layers=1,
    )  # fmt: skip
    config.intermediate_size = 10
    theirs, ours = module.MambaMixer(config, 0), make("mamba").float()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, D)
    assert_same_layer(ours, theirs, x, lambda: theirs(x))
    # and so does mamba_ssm's: taps [channels, 1, W], rates by their logarithm
    assert {n: list(p.shape) for n, p in ours.named_parameters()} == {
        "in_proj.weight": [20, D], "conv1d.weight": [10, 1, 3], "conv1d.bias": [10],
        "x_proj.weight": [7, 10], "dt_proj.weight": [10, 1], "dt_proj.bias": [10],
        "A_log": [10, 3], "D": [10], "out_proj.weight": [D, 10],
    }  # fmt: skip


def mamba(w: dict, x: torch.Tensor, z: torch.Tensor, suffix: str = "") -> torch.Tensor:
    """One direction, from the convolution to the gate."""
    name = {n: f"{n}{suffix}" for n in ("conv1d", "x_proj", "dt_proj", "D")}
    weight, bias = w[f"{name['conv1d']}.weight"], w[f"{name['conv1d']}.bias"]
    padded = F.pad(x.mT, (weight.shape[2] - 1, 0))
    x = F.silu(F.conv1d(padded, weight, bias, groups=x.shape[2])).mT
    dt, B, C = (x @ w[f"{name['x_proj']}.weight"].T).split([1, 3, 3], -1)
    dt = F.softplus(dt @ w[f"{name['dt_proj']}.weight"].T + w[f"{name['dt_proj']}.bias"])
    A = -w[f"A{suffix}_log"].exp()
    return reference.selective_scan(x, dt, A, B[:, :, None], C[:, :, None], w[name["D"]], z)[0]


def test_bimamba_is_its_definition() -> None:
    torch.manual_seed(0)
    layer, x = BiMamba(D, 3, intermediate_size=10, layer_idx=0).double(), tokens(2, 9)
    w = layer.state_dict()
    u, z = (x @ w["in_proj.weight"].T).chunk(2, -1)
    y = mamba(w, u, z) + mamba(w, u.flip(1), z.flip(1), "_b").flip(1)
    close(layer(x)[0], y @ w["out_proj.weight"].T)
    padded = torch.cat([torch.randn(2, 3, D).double(), x], 1)
    mask = torch.tensor([[0.0] * 3 + [1.0] * 9] * 2)
    close(layer(padded, attention_mask=mask)[0][:, 3:], layer(x)[0])
    layer.divide_out = True
    close(layer(x)[0], y @ w["out_proj.weight"].T / 2)
    with pytest.raises(ValueError, match="attends in both directions and cannot continue"):
        layer(x, past_key_values=Cache(), use_cache=True)


DIRECTIONS = (("row", False), ("column", True), ("zigzag", False), ("hilbert", True))


def test_ss2d_is_its_definition() -> None:
    """By copies of the image in the order of every walk."""
    torch.manual_seed(0)
    H, W = 3, 5
    layer = SS2D(D, d_state=3, ssm_ratio=1.5, directions=DIRECTIONS).double()
    x = torch.randn(2, H, W, D, dtype=torch.float64, requires_grad=True)
    w = dict(layer.named_parameters())
    u, z = (x @ w["in_proj.weight"].T).chunk(2, -1)
    u = F.silu(layer.conv2d(u.permute(0, 3, 1, 2))).flatten(2).mT
    y = torch.zeros_like(u)
    for k, (kind, backwards) in enumerate(DIRECTIONS):
        order = scan_order(H, W, kind, backwards).long()
        walk = u[:, order]
        dt, B, C = (walk @ w["x_proj_weight"][k].T).split([1, 3, 3], -1)
        dt = F.softplus(dt @ w["dt_projs_weight"][k].T + w["dt_projs_bias"][k])
        A, skip = -w["A_logs"].view(4, 12, 3)[k].exp(), w["Ds"].view(4, 12)[k]
        o, _ = reference.selective_scan(walk, dt, A, B[:, :, None], C[:, :, None], skip)
        y = y.index_add(1, order, o)
    y = layer.out_norm(y).view(2, H, W, -1) * F.silu(z)
    want = y @ w["out_proj.weight"].T
    close(layer(x), want)
    leaves = [x, *w.values()]
    weight = torch.randn_like(want)
    close(*(torch.autograd.grad((o * weight).sum(), leaves) for o in (layer(x), want)))


def test_vss_block_adds() -> None:
    torch.manual_seed(0)
    block, x = VSSBlock(D, d_state=2).double(), torch.randn(1, 2, 3, D, dtype=torch.float64)
    close(block(x), x + block.self_attention(block.ln_1(x)))
    assert {name.split(".")[0] for name in block.state_dict()} == {"ln_1", "self_attention"}
