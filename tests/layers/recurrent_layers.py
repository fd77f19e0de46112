"""Layers around element-wise recurrences, state space models and the sLSTM cell, as the tests make
them."""

from __future__ import annotations

import torch

from lsm_cuda.layers import (
    AFT,
    DSS,
    H3,
    LMU,
    LRU,
    S4,
    S4D,
    S5,
    SLSTM,
    GateLoop,
    HGRNAttention,
    LiquidS4,
    Mamba,
    RGLRUBlock,
    RWKV4Attention,
)

D = 8
LAYERS = {
    "lru": (LRU, {"state_size": 5}),
    "s5": (S5, {"state_size": 4}),
    "s5 bilinear": (S5, {"state_size": 4, "init": "lin", "discretization": "bilinear"}),
    "hgrn": (HGRNAttention, {"expand_ratio": 2}),
    "hgrn conv": (HGRNAttention, {"use_short_conv": True, "conv_size": 3}),
    "rg-lru": (RGLRUBlock, {"lru_width": 12, "num_heads": 3}),
    "gateloop": (GateLoop, {}),
    "rwkv4": (RWKV4Attention, {"attention_hidden_size": 12}),
    "aft": (AFT, {}),
    "aft full": (AFT, {"max_seqlen": 40}),
    "aft full rank": (AFT, {"max_seqlen": 40, "rank": 3}),
    "mamba": (Mamba, {"state_size": 3, "intermediate_size": 10, "conv_kernel": 3}),
    "s4d": (S4D, {"d_state": 6}),
    "s4d bilinear": (S4D, {"d_state": 6, "init": "legs", "disc": "bilinear"}),
    "dss": (DSS, {"d_state": 5}),
    "dss softmax": (DSS, {"d_state": 5, "variant": "softmax", "max_length": 20}),
    "h3": (H3, {"d_state": 6, "d_shift": 3}),
    "s4": (S4, {"d_state": 6}),
    "liquid-s4": (LiquidS4, {"d_state": 6}),
    "lmu": (LMU, {"d_state": 5, "theta": 7.0}),
    "s4 fout": (S4, {"d_state": 6, "basis": "fout"}),
    "slstm": (SLSTM, {"num_heads": 2}),
    "slstm bare": (SLSTM, {"num_heads": 1, "conv1d_kernel_size": 0}),
}


def make(name: str, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    cls, options = LAYERS[name]
    layer = cls(hidden_size=D, **{"layer_idx": 0, **options, **more}).double()
    with torch.no_grad():  # away from the trivial values that parameters start with
        for key, p in layer.named_parameters():
            if "norm" in key or "gate_bias" in key:
                p.add_(torch.rand_like(p) - 0.3)
            elif key.endswith("_recurrent_kernel_"):
                p.normal_(std=0.3)
    return layer


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


def assert_same_layer(ours, theirs, x: torch.Tensor, call) -> None:
    """Outputs, and gradients of the input and of every parameter, by name; ``call``: theirs."""
    x.requires_grad_()
    own, others = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert own.keys() == others.keys()
    weight, results = torch.randn_like(x), []
    for o, named in ((ours(x)[0], own), (call(), others)):
        grads = torch.autograd.grad((o * weight).sum(), [x, *(named[n] for n in own)])
        results.append({"o": o} | dict(zip(["x", *own], grads, strict=True)))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
