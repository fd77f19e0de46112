"""Building blocks of the layers, under FLA's names."""

from .activations import ACT2FN, activation
from .conv import ShortConvolution
from .mlp import GatedMLP
from .norm import FusedRMSNormGated, RMSNorm
from .rotary import RotaryEmbedding

__all__ = [
    "ACT2FN",
    "FusedRMSNormGated",
    "GatedMLP",
    "RMSNorm",
    "RotaryEmbedding",
    "ShortConvolution",
    "activation",
]
