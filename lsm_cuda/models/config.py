"""Sizes of a decoder, as they stand in a checkpoint's config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["ModelConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a decoder's parameters.

    Attributes:
        vocab_size: tokens; 256 makes a model of bytes.
        hidden_size: width.
        num_layers: decoder layers.
        num_heads: heads of every mixer.
        mixer: name of the sequence mixer, see :data:`lsm_cuda.models.MIXERS`.
        mixer_options: further constructor arguments of the mixer.
        hidden_ratio, intermediate_size: of the feed-forward block, see ``modules.GatedMLP``.
        norm_eps: of all norms outside the mixers.
        initializer_range: standard deviation of initial weights.
    """

    vocab_size: int = 256
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    mixer: str = "gla"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    hidden_ratio: int = 4
    intermediate_size: int | None = None
    norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Raises ValueError on names that are no field."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown config entries: {', '.join(unknown)}")
        return cls(**values)
