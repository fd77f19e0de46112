"""Sequence-mixing layers, under FLA's names where FLA has them."""

from .attention import Attention
from .gla import GatedLinearAttention

__all__ = ["Attention", "GatedLinearAttention"]
