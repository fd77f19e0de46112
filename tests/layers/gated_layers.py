"""Layers with gates, slots and token shifts, as the tests make them."""

from __future__ import annotations

import torch
from gated_definitions import D, H

from lsm_cuda import layers
from lsm_cuda.layers import (
    ABCAttention,
    Comba,
    DeltaNet,
    GatedDeltaNet,
    GatedDeltaProduct,
    GatedSlotAttention,
    HGRN2Attention,
    KimiDeltaAttention,
    LightNetAttention,
    Longhorn,
    MesaNet,
    MetaLA,
    MomAttention,
    ReGLA,
    RWKV5Attention,
    RWKV6Attention,
)

CONV = {"use_short_conv": True, "conv_bias": True, "conv_size": 3}
HEADS = {"num_heads": H}
MOM = {**HEADS, "head_dim": 4, "num_memories": 3, "conv_size": 3}
DELTA = {**HEADS, "head_dim": 4, "conv_size": 3}
RANKS = {f"{name}_low_rank_dim": 3 for name in ("decay", "gate", "a", "v")}
RWKV6 = {**HEADS, "proj_low_rank_dim": 3, "gate_low_rank_dim": 5}


class RWKV7Attention(layers.RWKV7Attention):
    """Without what it hands to later layers."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[:3]


LAYERS = {
    "hgrn2": (HGRN2Attention, {"expand_ratio": 8}),
    "hgrn2 conv": (HGRN2Attention, {"expand_ratio": None, **HEADS, **CONV}),
    "rwkv6": (RWKV6Attention, RWKV6),
    "rwkv6 wide": (RWKV6Attention, {**RWKV6, "expand_k": 1.0, "gate_fn": "sigmoid"}),
    "rwkv5": (RWKV5Attention, {**HEADS, "expand_k": 0.5}),
    "gsa": (GatedSlotAttention, {**HEADS, "num_slots": 5}),
    "gsa conv": (GatedSlotAttention, {**HEADS, "num_kv_heads": 1, "feature_map": "t2r", **CONV}),
    "abc": (ABCAttention, {**HEADS, "num_slots": 5}),
    "abc conv": (
        ABCAttention,
        {**HEADS, **CONV, "use_input_gate": True, "use_norm": False, "expand_v": 2.0},
    ),
    "abc bare": (ABCAttention, {**HEADS, "use_rope": False, "use_output_gate": False}),
    "lightnet": (LightNetAttention, {"expand_ratio": 8, "gate_low_rank_dim": 3}),
    "lightnet conv": (
        LightNetAttention,
        {"expand_ratio": 4, **HEADS, "gate_low_rank_dim": 3, **CONV},
    ),
    "metala": (MetaLA, {**HEADS, "gate_low_rank_dim": 3}),
    "metala bare": (MetaLA, {**HEADS, "gate_low_rank_dim": 3, "use_short_conv": False}),
    # so that the norm cancels the shift of keys entirely
    "regla": (ReGLA, {**HEADS, "norm_eps": 1e-30}),
    "regla conv": (ReGLA, {**HEADS, "norm_eps": 1e-30, "expand_v": 2.0, **CONV}),
    "mom": (MomAttention, {**MOM, "topk": 2}),
    "mom shared": (MomAttention, {**MOM, "topk": 1, "shared_mem": True, "use_output_gate": False}),
    "mom single": (
        MomAttention,
        {**MOM, "topk": 2, "single_kv_proj": True, "shared_mem": True, "use_short_conv": False},
    ),
    "delta_net": (DeltaNet, {**HEADS, "conv_size": 3}),
    "delta_net elu": (
        DeltaNet,
        {**HEADS, **CONV, "qk_activation": "elu", "qk_norm": "sum", "use_gate": True},
    ),
    "delta_net bare": (
        DeltaNet,
        {**HEADS, "use_short_conv": False, "use_beta": False, "expand_k": 0.5},
    ),
    "delta_net dpfp": (
        DeltaNet,
        {**HEADS, **CONV, "qk_activation": "dpfp", "dpfp_nu": 2, "allow_neg_eigval": True}
        | {"qk_norm": "sum"},
    ),
    "gated_deltanet": (GatedDeltaNet, {**DELTA, "num_v_heads": 4}),
    "gated_deltanet bare": (
        GatedDeltaNet,
        {**DELTA, "use_short_conv": False, "use_gate": False, "allow_neg_eigval": True},
    ),
    "gated_deltaproduct": (GatedDeltaProduct, {**DELTA, "num_v_heads": 4}),
    "gated_deltaproduct bare": (
        GatedDeltaProduct,
        {**DELTA, "num_householder": 3, "use_forget_gate": False, "use_output_gate": False},
    ),
    "comba": (Comba, {**DELTA, "num_v_heads": 4}),
    "comba bare": (
        Comba,
        {**DELTA, "use_output_correction": False, "use_inner_decay": False, "conv_bias": True},
    ),
    "kda": (KimiDeltaAttention, {**DELTA, "num_v_heads": 4, "expand_v": 2}),
    "kda bounded": (
        KimiDeltaAttention,
        {**DELTA, "lower_bound": -5.0, "safe_gate": True, "use_short_conv": False},
    ),
    "rwkv7": (RWKV7Attention, {"head_dim": 8, **RANKS}),
    "rwkv7 fused": (
        RWKV7Attention,
        {"head_dim": None, **HEADS, **RANKS, "fuse_norm": True, "value_dim": 12},
    ),
    "longhorn": (Longhorn, {"state_size": 3, "num_heads": 4}),
    "longhorn exact": (Longhorn, {"state_size": 3, "num_heads": 4, "diagonal": False}),
    "mesa_net": (MesaNet, {**DELTA, "use_output_gate": True}),
}


def make(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    cls, given = LAYERS[name]
    layer = cls(**{"hidden_size": D, "layer_idx": 0, **given, **options}).double()
    with torch.no_grad():  # away from the trivial values that many parameters start with
        for key, p in layer.named_parameters():
            if "norm" in key or "bias" in key or p.dim() == 1:
                p.add_(torch.rand_like(p) - 0.3)
            elif not p.any():
                p.normal_()
    return layer


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)
