"""A small decoder around any mixer, its checkpoints, and sampling from it."""

from .checkpoint import CheckpointError, load_model, save_model
from .config import ModelConfig
from .mixers import MIXERS
from .model import DecoderLayer, DecoderLM
from .sampling import Sampling

__all__ = [
    "MIXERS",
    "CheckpointError",
    "DecoderLM",
    "DecoderLayer",
    "ModelConfig",
    "Sampling",
    "load_model",
    "save_model",
]
