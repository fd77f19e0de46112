"""One decoder for every mixer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Cache
from ..modules import GatedMLP, RMSNorm
from .config import ModelConfig
from .mixers import build_mixer
from .sampling import Sampling

__all__ = ["DecoderLM", "DecoderLayer"]


class DecoderLayer(nn.Module):
    """``x + mixer(norm x)``, then ``x + mlp(norm x)``; parameter names as in FLA's models."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = build_mixer(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.hidden_ratio, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        handed: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """``handed`` is what layers leave for later ones (RWKV-7's first values), added to here."""
        mixed, _, _, *v_first = self.attn(
            self.attn_norm(x),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            **(handed or {}),
        )
        if v_first and handed is not None:
            handed["v_first"] = v_first[0]
        x = x + mixed
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class DecoderLM(nn.Module):
    """Language model: embedding, decoder layers, norm, and the embedding again as output layer.

    Args:
        config: sizes and the mixer's name.

    Raises:
        ValueError: an unknown mixer, or options that do not fit it.

    Example:
        >>> model = DecoderLM(ModelConfig(hidden_size=32, num_layers=1, num_heads=2))
        >>> logits, _ = model(torch.randint(256, (1, 10)))
        >>> logits.shape
        torch.Size([1, 10, 256])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights; those that write into the residual stream shrink with depth.

        A module whose projections start otherwise has a method ``init_projections``, which has the
        last word.
        """
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.rsplit(".", 1)[-1]
                depth = (
                    2 * self.config.num_layers if last in ("o_proj", "out_proj", "down_proj") else 1
                )
                nn.init.normal_(module.weight, std=std / depth**0.5)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if (own := getattr(module, "init_projections", None)) is not None:
                own()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Cache | None]:
        """Logits of the next token at every position.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, S]``, 0 at padding; S covers cached tokens too.
            past_key_values: cache to continue from.
            use_cache: update the cache (a new one if none is given) and return it.
            cu_seqlens: ``[N + 1]`` boundaries of sequences packed into one row.
            last_only: logits of the last position only, ``[B, 1, vocab]``.

        Returns:
            logits ``[B, T, vocab]`` and the cache, or None.
        """
        if use_cache and past_key_values is None:
            past_key_values = Cache()
        x, handed = self.embeddings(input_ids), dict[str, Tensor]()
        for layer in self.layers:
            x = layer(x, attention_mask, past_key_values, use_cache, cu_seqlens, handed)
        x = self.norm(x[:, -1:] if last_only else x)
        return F.linear(x, self.embeddings.weight), past_key_values

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of ``targets [B, T]`` after ``input_ids [B, T]``."""
        logits, _ = self(input_ids)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Continue prompts: one pass over them, then one recurrent step per token.

        Args:
            input_ids: prompts ``[B, T]``, T ≥ 1, padded on the left if ``attention_mask`` says so.
            max_new_tokens: tokens to add.
            temperature, top_k, top_p, generator: see :class:`lsm_cuda.models.Sampling`.
            eos_token_id: a sequence that produced it is filled up with it; all done ends early.
            attention_mask: ``[B, T]``, 0 at padding.

        Returns:
            prompts and continuations ``[B, T + new]``.
        """
        sampling = Sampling(temperature, top_k, top_p, generator)
        steps = self.stream(input_ids, max_new_tokens, sampling, eos_token_id, attention_mask)
        return torch.cat([input_ids, *(token[:, None] for token in steps)], 1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        eos_token_id: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """:meth:`generate`, yielding each step's tokens ``[B]`` as they come."""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids must have shape [B, T] with T >= 1, got {list(input_ids.shape)}"
            )
        cache = Cache()
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        step_input = input_ids
        for _ in range(max_new_tokens):
            token = self._next(step_input, cache, sampling, attention_mask)
            if eos_token_id is not None:
                token = token.masked_fill(done, eos_token_id)
                done = done | (token == eos_token_id)
            yield token
            if eos_token_id is not None and bool(done.all()):
                return
            step_input = token[:, None]
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, 1), value=1)

    # Not around stream(): a decorated generator would leave its caller without autograd.
    @torch.no_grad()
    def _next(
        self, input_ids: Tensor, cache: Cache, sampling: Sampling, attention_mask: Tensor | None
    ) -> Tensor:
        logits, _ = self(input_ids, attention_mask, cache, use_cache=True, last_only=True)
        return sampling(logits[:, -1])
