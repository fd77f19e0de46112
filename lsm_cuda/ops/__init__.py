"""Public operators, under the names people already use."""

from .chunk import chunk_gla, fused_chunk_gla, fused_recurrent_gla, gla_step

__all__ = ["chunk_gla", "fused_chunk_gla", "fused_recurrent_gla", "gla_step"]
