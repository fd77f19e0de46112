"""``lsm demo``: train, sample, and show that decoding does not slow down with context."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..data import load_corpus
from ..models import DecoderLM, ModelConfig, Sampling
from ..train import TrainConfig, Trainer, bits_per_byte, pick_device
from .decode_cost import DecodeCost, measure_attention, measure_gla
from .generation import stream_text
from .training import run_watched

__all__ = ["DemoConfig", "run_demo"]

TARGET_BITS = 3.0  # held-out bits per byte to get below on the default corpus
TARGET_RATIO = 1.15  # time per token, longest context over shortest
PROMPT = "def "


def _demo_model() -> ModelConfig:
    return ModelConfig(
        hidden_size=256, num_layers=3, num_heads=4, mixer_options={"use_short_conv": True}
    )


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does; the defaults suit two CPU cores and a few minutes."""

    out: Path = Path("demo")
    data: Path | None = None
    seconds: float = 130.0
    seed: int = 0
    device: str = "auto"
    steps: int = 20_000
    batch_size: int = 8
    context: int = 256
    model: ModelConfig = field(default_factory=_demo_model)
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    timed_tokens: tuple[int, int] = (256, 32)  # GLA, attention; at every context
    sample_length: int = 300


def run_demo(config: DemoConfig, console: Console) -> bool:
    """Run it and print; True if every number it promises was reached.

    Raises:
        ImportError: matplotlib or safetensors is missing.
        ValueError: unusable data, device or sizes.
    """
    from .plots import plot_demo  # before training: a missing package should show now

    begin = time.perf_counter()
    device = pick_device(config.device)
    corpus = load_corpus(config.data)
    torch.manual_seed(config.seed)
    model = DecoderLM(config.model).to(device)
    trainer = Trainer(model, corpus, _train_config(config))
    size = sum(p.numel() for p in model.parameters())
    console.print(
        f"{size / 1e6:.1f}M parameters, mixer {config.model.mixer}, on {device}; "
        f"{corpus.train.numel() / 1e6:.1f} MB of {escape(corpus.source)}, "
        f"at most {config.seconds:.0f} s of training"
    )
    before = bits_per_byte(model, corpus.held_out, config.context)
    run_watched(trainer, console)
    after = bits_per_byte(model, corpus.held_out, config.context)
    trainer.save(config.out / "checkpoint")

    sample = _sample(model, config)
    console.print("measuring decode steps …")
    gla = measure_gla(model, corpus.held_out, config.contexts, config.timed_tokens[0])
    attention = measure_attention(model.config, device, config.contexts, config.timed_tokens[1])
    plot = plot_demo(config.out / "demo.png", trainer.losses, (before, after), gla, attention)

    ratio = gla.seconds[-1] / gla.seconds[0]
    console.print(_table(gla, attention))
    console.print(Panel(escape(sample), title="sample, one recurrent step per byte"))
    console.print(f"held-out bits per byte: {before:.3f} before, [bold]{after:.3f}[/] after")
    console.print(
        f"GLA time per token, {_k(config.contexts[-1])} over {_k(config.contexts[0])} of context: "
        f"[bold]{ratio:.2f}x[/] (at most {TARGET_RATIO}x expected)"
    )
    _write_numbers(config.out / "demo.json", trainer, (before, after), gla, attention)
    console.print(f"total time: {time.perf_counter() - begin:.0f} s")
    console.print(f"plot: {escape(str(plot.resolve()))}", soft_wrap=True)
    return _verdict(config, after, ratio, console)


def _train_config(config: DemoConfig) -> TrainConfig:
    return TrainConfig(
        steps=config.steps,
        max_seconds=config.seconds,
        batch_size=config.batch_size,
        context=config.context,
        seed=config.seed,
        data=None if config.data is None else str(config.data.resolve()),
    )


def _sample(model: DecoderLM, config: DemoConfig) -> str:
    """``sample_length`` characters; those that would move a terminal's cursor are replaced."""
    device = model.embeddings.weight.device
    sampling = Sampling(0.7, generator=torch.Generator(device).manual_seed(config.seed))
    text = PROMPT
    for piece in stream_text(model, PROMPT, 4 * config.sample_length, sampling):
        text += "".join(c if c.isprintable() or c == "\n" else "�" for c in piece)
        if len(text) >= config.sample_length:
            break
    return text


def _table(gla: DecodeCost, attention: DecodeCost) -> Table:
    table = Table(title="one decode step", title_justify="left")
    for heading in ("context", "GLA ms", "GLA state", "attention ms", "attention cache"):
        table.add_column(heading, justify="right")
    for i, context in enumerate(gla.contexts):
        cells = [_k(context)]
        for cost in (gla, attention):
            cells += [f"{cost.seconds[i] * 1e3:.2f}", f"{cost.nbytes[i] / 2**20:.2f} MiB"]
        table.add_row(*cells)
    return table


def _verdict(config: DemoConfig, bits: float, ratio: float, console: Console) -> bool:
    missed = []
    if ratio > TARGET_RATIO:
        missed.append(f"time per token grew {ratio:.2f}x with context")
    if config.data is None and bits >= TARGET_BITS:
        missed.append(f"{bits:.2f} bits per byte is not below {TARGET_BITS}")
    for problem in missed:
        console.print(f"[bold red]missed:[/] {problem}")
    return not missed


def _write_numbers(
    path: Path,
    trainer: Trainer,
    bits: tuple[float, float],
    gla: DecodeCost,
    attention: DecodeCost,
) -> None:
    numbers = {
        "torch": torch.__version__,
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "steps": len(trainer.losses),
        "train_seconds": trainer.seconds,
        "bits_per_byte": {"before": bits[0], "after": bits[1]},
        "contexts": gla.contexts,
        "gla": {"seconds": gla.seconds, "bytes": gla.nbytes},
        "attention": {"seconds": attention.seconds, "bytes": attention.nbytes},
    }
    path.write_text(json.dumps(numbers, indent=1) + "\n")


def _k(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)
