"""Sequence mixers by name: what a decoder layer can be built around."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..layers import Attention, GatedLinearAttention
from .config import ModelConfig

__all__ = ["MIXERS", "build_mixer"]


def _gla(config: ModelConfig, layer_idx: int) -> nn.Module:
    return GatedLinearAttention(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        layer_idx=layer_idx,
        **config.mixer_options,
    )


def _attention(config: ModelConfig, layer_idx: int) -> nn.Module:
    return Attention(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        layer_idx=layer_idx,
        **config.mixer_options,
    )


MIXERS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    "attention": _attention,
    "gla": _gla,
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
