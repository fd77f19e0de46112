"""Time and memory of one decode step against the length of the context before it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cache import Cache, KVBuffer
from ..models import DecoderLM, ModelConfig

__all__ = ["DecodeCost", "measure_attention", "measure_gla"]

PIECE = 4096  # bytes per prefill call: bounds activations, and shows that prefill continues
WARMUP = 4


@dataclass(frozen=True)
class DecodeCost:
    """Median seconds of a step and bytes of the cache, for each context length."""

    contexts: tuple[int, ...]
    seconds: tuple[float, ...]
    nbytes: tuple[int, ...]


def measure_gla(model: DecoderLM, text: Tensor, contexts: Sequence[int], tokens: int) -> DecodeCost:
    """Prefill ``text`` (uint8, repeated if short) with the chunk operator, then time steps."""
    device = model.embeddings.weight.device
    longest = max(contexts)
    text = text.repeat(-(-longest // text.numel()))[:longest].long().to(device)
    caches = []
    running = Cache()
    done = 0
    with torch.no_grad():
        for context in sorted(contexts):
            while done < context:
                end = min(done + PIECE, context)
                model(text[None, done:end], past_key_values=running, use_cache=True, last_only=True)
                done = end
            caches.append(running.clone())
    return _time_steps(model, sorted(contexts), caches, tokens)


def measure_attention(
    config: ModelConfig, device: torch.device, contexts: Sequence[int], tokens: int
) -> DecodeCost:
    """Softmax attention in an untrained model of the same sizes.

    The key/value cache is filled with noise: what it holds does not change what a step costs, and
    prefilling long contexts through attention on a CPU would take longer than all the rest.
    """
    model = DecoderLM(replace(config, mixer="attention", mixer_options={})).to(device)
    heads, dim = config.num_heads, config.hidden_size // config.num_heads
    caches = []
    for context in sorted(contexts):
        cache = Cache()
        for layer in range(config.num_layers):
            kv = KVBuffer.start(*torch.randn(2, 1, context, heads, dim, device=device).unbind())
            kv.reserve(context + WARMUP + tokens)
            cache.update(layer, attn_state=kv, offset=context)
        caches.append(cache)
    return _time_steps(model, sorted(contexts), caches, tokens)


@torch.no_grad()
def _time_steps(
    model: DecoderLM, contexts: list[int], caches: list[Cache], tokens: int
) -> DecodeCost:
    """Takes turns between the contexts, so that a machine that slows down slows all of them."""
    device = model.embeddings.weight.device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    nbytes = tuple(cache.nbytes for cache in caches)
    times: list[list[float]] = [[] for _ in caches]
    model.eval()
    for turn in range(WARMUP + tokens):
        for cache, into in zip(caches, times, strict=True):
            start = time.perf_counter()
            logits, _ = model(token, past_key_values=cache, use_cache=True)
            logits.argmax(-1).item()  # what a sampler waits for; also synchronises a GPU
            if turn >= WARMUP:
                into.append(time.perf_counter() - start)
    return DecodeCost(tuple(contexts), tuple(map(statistics.median, times)), nbytes)
