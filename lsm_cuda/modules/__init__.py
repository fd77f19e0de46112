"""Building blocks of the layers, under FLA's names.

``modules.feature_map`` also has the function of its name; ``modules.features`` has maps as
functions.
"""

from .activations import ACT2FN, activation
from .conv import ShortConvolution
from .feature_map import (
    FEATURE_MAPS,
    ActivationFeatureMap,
    CosFormerFeatureMap,
    DPFPFeatureMap,
    ExpFeatureMap,
    FeatureMap,
    FocusedFeatureMap,
    GELUFeatureMap,
    HadamardFeatureMap,
    HedgehogFeatureMap,
    LearnableOuterProductFeatureMap,
    LearnablePolySketchNonNegativeFeatureMap,
    RebasedFeatureMap,
    ReGLAFeatureMap,
    ReLUFeatureMap,
    SigmoidFeatureMap,
    SoftmaxFeatureMap,
    SquaredReLUFeatureMap,
    SwishFeatureMap,
    T2RFeatureMap,
    TaylorFeatureMap,
    feature_dim,
)
from .mlp import GatedMLP
from .norm import FusedRMSNormGated, RMSNorm, SimpleRMSNorm
from .random_features import PerformerFeatureMap, RandomFeatureMap, RFAFeatureMap
from .rotary import LRPE, RotaryEmbedding, XPos, packed_positions

__all__ = [
    "ACT2FN",
    "FEATURE_MAPS",
    "LRPE",
    "ActivationFeatureMap",
    "CosFormerFeatureMap",
    "DPFPFeatureMap",
    "ExpFeatureMap",
    "FeatureMap",
    "FocusedFeatureMap",
    "FusedRMSNormGated",
    "GELUFeatureMap",
    "GatedMLP",
    "HadamardFeatureMap",
    "HedgehogFeatureMap",
    "LearnableOuterProductFeatureMap",
    "LearnablePolySketchNonNegativeFeatureMap",
    "PerformerFeatureMap",
    "RFAFeatureMap",
    "RMSNorm",
    "RandomFeatureMap",
    "ReGLAFeatureMap",
    "ReLUFeatureMap",
    "RebasedFeatureMap",
    "RotaryEmbedding",
    "ShortConvolution",
    "SigmoidFeatureMap",
    "SimpleRMSNorm",
    "SoftmaxFeatureMap",
    "SquaredReLUFeatureMap",
    "SwishFeatureMap",
    "T2RFeatureMap",
    "TaylorFeatureMap",
    "XPos",
    "activation",
    "feature_dim",
    "packed_positions",
]
