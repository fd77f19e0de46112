"""Reads a gated linear attention model that flash-linear-attention saved (GLAForCausalLM).

python examples/load_fla_checkpoint.py FOLDER    # with its config.json and model.safetensors

Layers and parameters have FLA's names here, so loading is a matter of prefixes.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lsm_cuda.models import DecoderLM, ModelConfig

MIXER_OPTIONS = (
    "expand_k", "expand_v", "num_kv_heads", "feature_map", "use_short_conv", "conv_size",
    "use_output_gate", "elementwise_affine", "norm_eps", "clamp_min", "fuse_norm",
)  # fmt: skip


def load(folder: Path) -> tuple[DecoderLM, Tensor]:
    """The model, and the weights of its output layer ``[vocab, hidden]``."""
    theirs = json.loads((folder / "config.json").read_text())
    if theirs.get("model_type") != "gla":
        raise SystemExit(f"{folder}: expected model_type gla, got {theirs.get('model_type')!r}")
    config = ModelConfig(
        vocab_size=theirs["vocab_size"],
        hidden_size=theirs["hidden_size"],
        num_layers=theirs["num_hidden_layers"],
        num_heads=theirs["num_heads"],
        hidden_ratio=theirs["hidden_ratio"],
        intermediate_size=theirs["intermediate_size"],
        norm_eps=theirs["norm_eps"],
        mixer="gla",
        mixer_options={name: theirs[name] for name in MIXER_OPTIONS if name in theirs},
    )
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight", weights["model.embeddings.weight"])  # absent if tied
    model = DecoderLM(config)
    model.load_state_dict({name.removeprefix("model."): t for name, t in weights.items()})
    return model.eval(), head


@torch.no_grad()
def logits(model: DecoderLM, head: Tensor, input_ids: Tensor) -> Tensor:
    """``[B, T]`` to ``[B, T, vocab]``; DecoderLM's own forward ties its output layer."""
    x = model.embeddings(input_ids)
    for layer in model.layers:
        x = layer(x)
    return F.linear(model.norm(x), head)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    model, head = load(parser.parse_args(arguments).folder)
    ids = torch.arange(min(8, head.shape[0]))[None]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    best = logits(model, head, ids)[0, -1].argmax()
    print(f"most likely after tokens 0 to {ids.shape[1] - 1}: {best}")


if __name__ == "__main__":
    main()
