"""Sequence-mixing layers, under FLA's names where FLA has them."""

from .abc import ABCAttention
from .attention import Attention
from .based import BasedLinearAttention, ReBasedLinearAttention
from .delta_net import DeltaNet
from .diag_attention import DiagAttention
from .focused import FocusedLinearAttention
from .gated_deltanet import Comba, GatedDeltaNet, GatedDeltaProduct, KimiDeltaAttention
from .gateloop import GateLoop
from .gla import GatedLinearAttention
from .griffin import RGLRUBlock
from .gsa import GatedSlotAttention
from .hgrn import HGRNAttention
from .hgrn2 import HGRN2Attention
from .lightnet import LightNetAttention
from .linear_attn import LinearAttention
from .linformer import LinformerAttention
from .longformer import (
    BigBirdSelfAttention,
    LongformerSelfAttention,
    LongT5LocalAttention,
    LongT5TransientGlobalAttention,
)
from .longhorn import Longhorn
from .lru import LRU, S5
from .luna import LunaAttention
from .mamba import SS2D, BiMamba, Mamba, VSSBlock
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
from .rwkv4 import AFT, RWKV4Attention
from .rwkv7 import RWKV7Attention
from .simple_gla import SimpleGatedLinearAttention
from .skyformer import SkyformerAttention
from .slstm import SLSTM
from .sparse_attention import MoBA, NativeSparseAttention
from .ssm import DSS, H3, LMU, S4, S4D, LiquidS4

__all__ = [
    "AFT",
    "DSS",
    "H3",
    "LMU",
    "LRU",
    "MLSTM",
    "S4",
    "S4D",
    "S5",
    "SLSTM",
    "SS2D",
    "ABCAttention",
    "Attention",
    "BasedLinearAttention",
    "BiMamba",
    "BigBirdSelfAttention",
    "Comba",
    "DeltaNet",
    "DiagAttention",
    "FocusedLinearAttention",
    "GateLoop",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "GatedSlotAttention",
    "HGRN2Attention",
    "HGRNAttention",
    "KimiDeltaAttention",
    "LightNetAttention",
    "LightningAttention",
    "LinearAttention",
    "LinformerAttention",
    "LiquidS4",
    "LogLinearMamba2",
    "LongT5LocalAttention",
    "LongT5TransientGlobalAttention",
    "LongformerSelfAttention",
    "Longhorn",
    "LunaAttention",
    "Mamba",
    "Mamba2",
    "MesaNet",
    "MetaLA",
    "MoBA",
    "MomAttention",
    "MultiScaleRetention",
    "NativeSparseAttention",
    "NystromformerAttention",
    "RGLRUBlock",
    "RWKV4Attention",
    "RWKV5Attention",
    "RWKV6Attention",
    "RWKV7Attention",
    "RandomFeatureAttention",
    "ReBasedLinearAttention",
    "ReGLA",
    "SimpleGatedLinearAttention",
    "SkyformerAttention",
    "TransNormerAttention",
    "VSSBlock",
]
