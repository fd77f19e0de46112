"""Commands of ``lsm``: arguments and help; the work is done in the modules they call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["app"]

app = typer.Typer(
    help="Train, sample and inspect linear-attention models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
problems = Console(stderr=True)

Data = Annotated[
    Path | None,
    typer.Option(help="File or folder of text. Default: the sources of Python's standard library."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of all randomness.")]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can put right is said in one line; everything else keeps its traceback."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        problems.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


@app.command(epilog="Example: [cyan]lsm info[/]")
def info() -> None:
    """Show what was built and what is loaded."""
    from .info import info_table

    console.print(info_table())


@app.command(
    epilog="Examples: [cyan]lsm train --out run[/] · "
    "[cyan]lsm train --data ~/notes --steps 5000 --out notes[/] · "
    "[cyan]lsm train --resume --out run[/] · "
    "[cyan]lsm train --mixer attention --out baseline[/]"
)
def train(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("run"),
    data: Data = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the checkpoint in OUT.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps in total. Default: 2000.")
    ] = None,
    mixer: Annotated[str, typer.Option(help="Sequence mixer of every layer.")] = "gla",
    hidden_size: Annotated[int, typer.Option(min=1, help="Width.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Heads of the mixer.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Bytes per window.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 3e-3,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train a byte-level language model; Ctrl-C leaves a checkpoint to continue from.

    With --resume, sizes and rates come from the checkpoint; only --steps and --data may change.
    """
    from . import training

    with one_line_errors():
        if resume:
            trainer = training.resume(out, data, steps, device)
        else:
            from ..models import ModelConfig
            from ..train import TrainConfig

            model = ModelConfig(
                hidden_size=hidden_size, num_layers=layers, num_heads=heads, mixer=mixer
            )
            config = TrainConfig(
                steps=steps or TrainConfig.steps,
                batch_size=batch_size,
                context=context,
                lr=lr,
                seed=seed,
                data=None if data is None else str(data.resolve()),
            )
            trainer = training.start(out, model, config, device)
        interrupted = training.run_saving(trainer, out, save_every, console)
    if interrupted:
        console.print(f"stopped; continue with: lsm train --resume --out {escape(str(out))}")
        raise typer.Exit(130)
    training.summarise(trainer, out, console)


@app.command(
    epilog="Examples: [cyan]lsm generate run[/] · "
    "[cyan]lsm generate run --prompt 'class Tree' --tokens 500 --temperature 0.7 --top-p 0.9[/]"
)
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that lsm train wrote.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="Bytes to add.")] = 300,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest bytes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep bytes up to this probability.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Continue a prompt, printing the text as it comes."""
    from .generation import print_stream

    with one_line_errors():
        print_stream(checkpoint, prompt, tokens, temperature, top_k, top_p, seed, device)


@app.command(epilog="Examples: [cyan]lsm demo[/] · [cyan]lsm demo --data ~/notes --seconds 60[/]")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint and plot.")] = Path("demo"),
    data: Data = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time to train.")] = 130.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train on real text, sample, and measure decoding from 1k to 32k bytes of context."""
    from .demo import DemoConfig, run_demo

    with one_line_errors():
        passed = run_demo(
            DemoConfig(out=out, data=data, seconds=seconds, seed=seed, device=device), console
        )
    if not passed:
        raise typer.Exit(1)


@app.command(
    epilog="Examples: [cyan]lsm bench[/] · [cyan]lsm bench --op gla --seconds 20[/] · "
    "[cyan]lsm bench --roofline[/]"
)
def bench(
    op: Annotated[
        list[str] | None, typer.Option(help="Operator to time; repeat for more. Default: all.")
    ] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Compare with this machine's limits, not with peers.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("bench.png"),
    seconds: Annotated[float, typer.Option(min=1, help="About how long it may take.")] = 45.0,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest sequence.")] = 1024,
    device: Device = "auto",
) -> None:
    """Time every operator here, beside softmax attention and the other libraries installed."""
    from .bench import BenchConfig, run_bench

    with one_line_errors():
        run_bench(BenchConfig(tuple(op or ()), out, seconds, device, roofline, longest), console)
