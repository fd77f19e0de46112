"""``lsm generate``: text from a checkpoint, printed as it is drawn."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..models import CheckpointError, DecoderLM, Sampling, load_model
from ..train import pick_device

__all__ = ["print_stream", "stream_text"]


def print_stream(
    checkpoint: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str,
) -> None:
    """Raises ValueError for values out of range, an empty prompt, or an unusable checkpoint."""
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    place = pick_device(device)
    generator = torch.Generator(place).manual_seed(seed)
    sampling = Sampling(temperature, top_k, top_p, generator)
    model = load_model(checkpoint, place).eval()
    if model.config.vocab_size != 256:
        raise CheckpointError(
            f"{checkpoint}: a model of bytes has vocab_size 256, got {model.config.vocab_size}"
        )
    sys.stdout.write(prompt)
    for text in stream_text(model, prompt, tokens, sampling):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def stream_text(model: DecoderLM, prompt: str, tokens: int, sampling: Sampling) -> Iterator[str]:
    """The continuation of ``prompt`` by ``tokens`` bytes, in pieces that are whole characters."""
    device = model.embeddings.weight.device
    ids = torch.tensor([list(prompt.encode())], device=device)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in model.stream(ids, tokens, sampling):
        yield decoder.decode(bytes([int(token)]))
    yield decoder.decode(b"", True)
