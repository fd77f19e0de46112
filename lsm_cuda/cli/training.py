"""``lsm train``: the loop around a trainer that a person watches and may interrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..data import load_corpus
from ..models import DecoderLM, ModelConfig
from ..models.checkpoint import WEIGHTS
from ..train import Progress, TrainConfig, Trainer, bits_per_byte, pick_device

__all__ = ["interruptible", "resume", "run_saving", "run_watched", "start", "summarise"]


def start(out: Path, model: ModelConfig, config: TrainConfig, device: str) -> Trainer:
    """A new trainer.

    Raises:
        ValueError: ``out`` holds a checkpoint already, or what the parts raise.
    """
    if (out / WEIGHTS).exists():
        raise ValueError(f"{out} holds a checkpoint; continue it with --resume, or name another")
    corpus = load_corpus(config.data)
    torch.manual_seed(config.seed)
    return Trainer(DecoderLM(model).to(pick_device(device)), corpus, config)


def resume(out: Path, data: Path | None, steps: int | None, device: str) -> Trainer:
    """The trainer saved in ``out``; ``data`` and ``steps`` replace the stored ones."""
    return Trainer.resume(
        out, lambda stored: load_corpus(data or stored), pick_device(device), steps
    )


def run_saving(trainer: Trainer, out: Path, save_every: int, console: Console) -> bool:
    """Train to the end, saving now and then; True if a signal ended it early."""

    def save_now_and_then(progress: Progress) -> None:
        if progress.step % save_every == 0:
            trainer.save(out)

    with interruptible() as stop:
        trainer.save(out)  # before the first step: an unwritable folder shows now, not in an hour
        run_watched(trainer, console, save_now_and_then, stop)
        trainer.save(out)
    return not trainer.finished


def summarise(trainer: Trainer, out: Path, console: Console) -> None:
    bits = bits_per_byte(trainer.model, trainer.corpus.held_out, trainer.config.context)
    console.print(
        f"held-out bits per byte: [bold]{bits:.3f}[/]\n"
        f"checkpoint: {escape(str(out))}  (try: lsm generate {escape(str(out))})"
    )


def run_watched(
    trainer: Trainer,
    console: Console,
    also: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Train with a progress bar; without a terminal, with a line every tenth of the way."""
    columns = (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, step=len(trainer.losses), loss=float("nan"), speed=0.0)
        loss = speed = None
        tenths = int(trainer.share_done * 10)

        def report(progress: Progress) -> None:
            nonlocal loss, speed, tenths
            loss = progress.loss if loss is None else 0.95 * loss + 0.05 * progress.loss
            now = progress.tokens_per_second
            speed = now if speed is None else 0.9 * speed + 0.1 * now
            share = trainer.share_done
            bar.update(task, completed=share, step=progress.step, loss=loss, speed=speed)
            if not console.is_terminal and int(share * 10) > tenths:
                tenths = int(share * 10)
                console.print(f"step {progress.step} · loss {loss:.3f} · {speed:,.0f} tokens/s")
            also(progress)

        trainer.run(report, stop)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C (or SIGTERM) into a wish to stop; a second one stops at once."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, previous[number])

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    previous = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
