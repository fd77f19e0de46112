"""Sequence mixers by name: what a decoder layer can be built around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import layers
from .config import ModelConfig

__all__ = ["MIXERS", "build_mixer"]

Builder = Callable[[ModelConfig, int], nn.Module]


def _mixer(
    layer: Callable[..., nn.Module], heads: bool = True, **sizes: Callable[[ModelConfig], Any]
) -> Builder:
    """``layer`` with the config's sizes, further arguments that follow from it, and its options."""

    def build(config: ModelConfig, layer_idx: int) -> nn.Module:
        arguments = {name: size(config) for name, size in sizes.items()}
        if heads:
            arguments = {"num_heads": config.num_heads, **arguments}
        return layer(
            **{
                "hidden_size": config.hidden_size,
                "layer_idx": layer_idx,
                **arguments,
                **config.mixer_options,
            }
        )

    return build


def _heads(config: ModelConfig) -> int:
    return config.num_heads


def _layers(config: ModelConfig) -> int:
    return config.num_layers


def _head_dim(config: ModelConfig) -> int:
    return config.hidden_size // config.num_heads


def _positions(_: ModelConfig) -> int:
    """Of sequences, where a layer has weights for each."""
    return 1024


def _none(_: ModelConfig) -> None:
    """Where the layer's default would decide the number of heads."""


def _inner_head_dim(config: ModelConfig) -> int:
    """Channels per head where heads share ``expand · hidden_size``."""
    return int(config.mixer_options.get("expand", 2) * config.hidden_size) // config.num_heads


MIXERS: dict[str, Builder] = {
    "attention": _mixer(layers.Attention),
    "gla": _mixer(layers.GatedLinearAttention),
    "based": _mixer(layers.BasedLinearAttention, num_key_value_heads=_heads),
    "lightning": _mixer(layers.LightningAttention, num_layers=_layers),
    "linear_attn": _mixer(layers.LinearAttention),
    "log_linear_mamba2": _mixer(layers.LogLinearMamba2, head_dim=_inner_head_dim),
    "mamba2": _mixer(layers.Mamba2, head_dim=_inner_head_dim),
    "mlstm": _mixer(layers.MLSTM),
    "rebased": _mixer(layers.ReBasedLinearAttention, num_key_value_heads=_heads),
    "retention": _mixer(layers.MultiScaleRetention),
    "rfa": _mixer(layers.RandomFeatureAttention),
    "simple_gla": _mixer(layers.SimpleGatedLinearAttention),
    "transnormer": _mixer(layers.TransNormerAttention, num_layers=_layers),
    "abc": _mixer(layers.ABCAttention),
    "gsa": _mixer(layers.GatedSlotAttention),
    "hgrn2": _mixer(layers.HGRN2Attention, expand_ratio=_none),
    "lightnet": _mixer(layers.LightNetAttention, expand_ratio=_none),
    "metala": _mixer(layers.MetaLA),
    "mom": _mixer(layers.MomAttention, head_dim=_head_dim),
    "regla": _mixer(layers.ReGLA),
    "rwkv5": _mixer(layers.RWKV5Attention),
    "rwkv6": _mixer(layers.RWKV6Attention),
    "rwkv7": _mixer(layers.RWKV7Attention, head_dim=_head_dim, num_hidden_layers=_layers),
    "comba": _mixer(layers.Comba, head_dim=_head_dim),
    "delta_net": _mixer(layers.DeltaNet),
    "gated_deltanet": _mixer(layers.GatedDeltaNet, head_dim=_head_dim),
    "gated_deltaproduct": _mixer(layers.GatedDeltaProduct, head_dim=_head_dim),
    "kda": _mixer(layers.KimiDeltaAttention, head_dim=_head_dim),
    "longhorn": _mixer(layers.Longhorn, num_heads=_none),
    "mesa_net": _mixer(layers.MesaNet, head_dim=_head_dim),
    "moba": _mixer(layers.MoBA),
    "nsa": _mixer(layers.NativeSparseAttention, num_kv_heads=_none, head_dim=_head_dim),
    "aft_full": _mixer(layers.AFT, heads=False, max_seqlen=_positions),
    "aft_simple": _mixer(layers.AFT, heads=False),
    "gateloop": _mixer(layers.GateLoop, heads=False),
    "h3": _mixer(layers.H3, heads=False),
    "hgrn": _mixer(layers.HGRNAttention, heads=False),
    "liquid_s4": _mixer(layers.LiquidS4, heads=False),
    "lmu": _mixer(layers.LMU, heads=False),
    "lru": _mixer(layers.LRU, heads=False),
    "mamba": _mixer(layers.Mamba, heads=False),
    "rg_lru": _mixer(layers.RGLRUBlock),
    "rwkv4": _mixer(layers.RWKV4Attention, heads=False),
    "s4": _mixer(layers.S4, heads=False),
    "s4d": _mixer(layers.S4D, heads=False),
    "s5": _mixer(layers.S5, heads=False),
    "slstm": _mixer(layers.SLSTM),
}


def build_mixer(config: ModelConfig, layer_idx: int) -> nn.Module:
    """The mixer that ``config.mixer`` names.

    Raises:
        ValueError: an unknown name, or options the mixer does not take.
    """
    if config.mixer not in MIXERS:
        raise ValueError(f"unknown mixer {config.mixer!r}, expected one of {', '.join(MIXERS)}")
    try:
        return MIXERS[config.mixer](config, layer_idx)
    except TypeError as error:
        raise ValueError(f"mixer {config.mixer!r}: {error}") from error
