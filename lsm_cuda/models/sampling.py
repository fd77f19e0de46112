"""Choosing the next token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Sampling"]


class Sampling:
    """Temperature, top-k and top-p (nucleus) sampling.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens that together reach this probability.
        generator: source of randomness, on the device of the logits.

    Raises:
        ValueError: a value out of range.

    Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751 (top-p).
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.generator = generator

    def __call__(self, logits: Tensor) -> Tensor:
        """``[B, vocab]`` to token ids ``[B]``."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = logits.softmax(-1).sort(-1, descending=True)
            # A token stays while what precedes it is short of top_p, so the first always stays.
            drop = ranked.cumsum(-1) - ranked >= self.top_p
            logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]
