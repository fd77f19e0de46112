"""Sequence-mixing layers, under FLA's names where FLA has them."""

from .abc import ABCAttention
from .attention import Attention
from .based import BasedLinearAttention, ReBasedLinearAttention
from .delta_net import DeltaNet
from .diag_attention import DiagAttention
from .focused import FocusedLinearAttention
from .gated_deltanet import Comba, GatedDeltaNet, GatedDeltaProduct, KimiDeltaAttention
from .gla import GatedLinearAttention
from .gsa import GatedSlotAttention
from .hgrn2 import HGRN2Attention
from .lightnet import LightNetAttention
from .linear_attn import LinearAttention
from .linformer import LinformerAttention
from .longhorn import Longhorn
from .luna import LunaAttention
from .mamba2 import LogLinearMamba2, Mamba2
from .mesa_net import MesaNet
from .metala import MetaLA
from .mlstm import MLSTM
from .mom import MomAttention
from .nystromformer import NystromformerAttention
from .regla import ReGLA
from .retention import LightningAttention, MultiScaleRetention, TransNormerAttention
from .rfa import RandomFeatureAttention
from .rwkv import RWKV5Attention, RWKV6Attention
from .rwkv7 import RWKV7Attention
from .simple_gla import SimpleGatedLinearAttention
from .skyformer import SkyformerAttention

__all__ = [
    "MLSTM",
    "ABCAttention",
    "Attention",
    "BasedLinearAttention",
    "Comba",
    "DeltaNet",
    "DiagAttention",
    "FocusedLinearAttention",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "GatedSlotAttention",
    "HGRN2Attention",
    "KimiDeltaAttention",
    "LightNetAttention",
    "LightningAttention",
    "LinearAttention",
    "LinformerAttention",
    "LogLinearMamba2",
    "Longhorn",
    "LunaAttention",
    "Mamba2",
    "MesaNet",
    "MetaLA",
    "MomAttention",
    "MultiScaleRetention",
    "NystromformerAttention",
    "RWKV5Attention",
    "RWKV6Attention",
    "RWKV7Attention",
    "RandomFeatureAttention",
    "ReBasedLinearAttention",
    "ReGLA",
    "SimpleGatedLinearAttention",
    "SkyformerAttention",
    "TransNormerAttention",
]
