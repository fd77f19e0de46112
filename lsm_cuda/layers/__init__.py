"""Sequence-mixing layers, under FLA's names where FLA has them."""

from .abc import ABCAttention
from .attention import Attention
from .based import BasedLinearAttention, ReBasedLinearAttention
from .diag_attention import DiagAttention
from .focused import FocusedLinearAttention
from .gla import GatedLinearAttention
from .gsa import GatedSlotAttention
from .hgrn2 import HGRN2Attention
from .lightnet import LightNetAttention
from .linear_attn import LinearAttention
from .linformer import LinformerAttention
from .luna import LunaAttention
from .mamba2 import LogLinearMamba2, Mamba2
from .metala import MetaLA
from .mlstm import MLSTM
from .mom import MomAttention
from .nystromformer import NystromformerAttention
from .regla import ReGLA
from .retention import LightningAttention, MultiScaleRetention, TransNormerAttention
from .rfa import RandomFeatureAttention
from .rwkv import RWKV5Attention, RWKV6Attention
from .simple_gla import SimpleGatedLinearAttention
from .skyformer import SkyformerAttention

__all__ = [
    "MLSTM",
    "ABCAttention",
    "Attention",
    "BasedLinearAttention",
    "DiagAttention",
    "FocusedLinearAttention",
    "GatedLinearAttention",
    "GatedSlotAttention",
    "HGRN2Attention",
    "LightNetAttention",
    "LightningAttention",
    "LinearAttention",
    "LinformerAttention",
    "LogLinearMamba2",
    "LunaAttention",
    "Mamba2",
    "MetaLA",
    "MomAttention",
    "MultiScaleRetention",
    "NystromformerAttention",
    "RWKV5Attention",
    "RWKV6Attention",
    "RandomFeatureAttention",
    "ReBasedLinearAttention",
    "ReGLA",
    "SimpleGatedLinearAttention",
    "SkyformerAttention",
    "TransNormerAttention",
]
