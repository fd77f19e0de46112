"""Layers around decay-free, constant and scalar-decay operators, as the tests make them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsm_cuda import layers
from lsm_cuda.modules import FEATURE_MAPS

D = 32

LINEAR = layers.LinearAttention
MAP_OPTIONS = {
    "cosformer": {"max_len": 64},
    "outer_product": {"feature_dim": 5},
}

# A name, the layer, and options beside hidden_size and layer_idx.
LAYERS: dict[str, tuple[type[nn.Module], dict]] = {
    **{
        f"linear {name}": (
            LINEAR,
            {
                "num_heads": 4,
                "feature_map": name,
                "feature_map_options": MAP_OPTIONS.get(name),
            },
        )
        for name in FEATURE_MAPS
    },
    "linear normalised": (
        LINEAR,
        {"num_heads": 4, "feature_map": "elu", "do_feature_map_norm": True, "num_kv_heads": 2},
    ),
    "linear sums": (
        LINEAR,
        {
            "num_heads": 4, "feature_map": "dpfp", "norm_q": True, "norm_k": True,
            "output_norm": "identity", "expand_k": 0.5, "expand_v": 2.0,
        },
    ),
    "retention": (layers.MultiScaleRetention, {"num_heads": 4}),
    "retention shared": (
        layers.MultiScaleRetention,
        {"num_heads": 4, "num_kv_heads": 2, "use_short_conv": True, "feature_map": "relu"},
    ),
    "retention ungated": (layers.MultiScaleRetention, {"num_heads": 4, "use_output_gate": False}),
    "lightning": (layers.LightningAttention, {"num_heads": 4, "num_layers": 3}),
    "transnormer": (layers.TransNormerAttention, {"num_heads": 4, "num_layers": 3}),
    "transnormer plain": (
        layers.TransNormerAttention,
        {"num_heads": 4, "head_dim": 6, "num_layers": 3, "use_lrpe": False, "bias": True},
    ),
    "simple gla": (layers.SimpleGatedLinearAttention, {"num_heads": 4}),
    "simple gla shared": (
        layers.SimpleGatedLinearAttention,
        {
            "num_heads": 4, "num_kv_heads": 2, "use_short_conv": False, "gate_fn": "sigmoid",
            "feature_map": "elu", "gate_logit_normalizer": 2,
        },
    ),
    "based": (
        layers.BasedLinearAttention, {"num_heads": 4, "num_key_value_heads": 4, "feature_dim": 5}
    ),
    "rebased": (
        layers.ReBasedLinearAttention, {"num_heads": 4, "num_key_value_heads": 4, "feature_dim": 5}
    ),
    "mamba2": (layers.Mamba2, {"head_dim": 16, "state_size": 6}),
    "mamba2 groups": (
        layers.Mamba2,
        {
            "head_dim": 16, "state_size": 6, "n_groups": 2, "D_has_hdim": True, "use_bias": True,
            "dt_limit": (1.0, 1.6), "norm_before_gate": True,
        },
    ),
    "mamba2 without norm": (
        layers.Mamba2, {"head_dim": 16, "state_size": 6, "rmsnorm": False, "use_conv_bias": False}
    ),
    "log-linear mamba2": (
        layers.LogLinearMamba2, {"head_dim": 16, "state_size": 6, "n_groups": 2, "num_levels": 6}
    ),
    "mlstm": (layers.MLSTM, {"num_heads": 4}),
    "mlstm biased": (
        layers.MLSTM, {"num_heads": 4, "use_bias": True, "gate_soft_cap": None, "v_dim_factor": 2.0}
    ),
    "rfa": (layers.RandomFeatureAttention, {"num_heads": 4, "num_features": 32, "sigma": 0.3}),
    "rfa without gate": (
        layers.RandomFeatureAttention,
        {
            "num_heads": 4, "num_kv_heads": 2, "num_features": 32, "use_gate": False,
            "learn_sigma": True, "sigma": 0.3,
        },
    ),
}  # fmt: skip

# Where random features' denominators come near zero, fp64 loses digits too.
TOLERANCE = {"rfa": 1e-7, "rfa without gate": 1e-7, "linear rfa": 1e-7}


def make(case: str, **more) -> nn.Module:
    torch.manual_seed(0)
    layer, options = LAYERS[case]
    made = layer(hidden_size=D, **{"layer_idx": 0, **options, **more}).double()
    with torch.no_grad():  # away from the trivial values that norms, gates and biases start with
        for name, p in made.named_parameters():
            if name in ("igate_preact.bias", "fgate_preact.bias"):
                p.uniform_(-1, 2)
            elif "norm" in name or "bias" in name or name in ("D", "L"):
                p.uniform_(0.5, 1.5)
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)
