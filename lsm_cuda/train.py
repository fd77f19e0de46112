"""Training a decoder on bytes, with checkpoints that continue exactly where they stopped."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Corpus, DataError, sample_batch
from .models.checkpoint import (
    CheckpointError,
    load_model,
    model_files,
    read_weights,
    write_together,
)
from .models.model import DecoderLM

__all__ = ["Progress", "TrainConfig", "Trainer", "bits_per_byte", "pick_device"]

STATE = "training.pt"


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimizer steps.
        max_seconds: end the schedule after this much training time if the steps are not done.
        batch_size, context: windows per step, and bytes per window.
        lr, warmup: peak learning rate, and steps to reach it; then a cosine falls to a tenth.
        weight_decay, beta1, beta2, clip: AdamW and the gradient-norm bound.
        seed: of the batches.
        data: where the bytes come from; None is the standard library.
    """

    steps: int = 2000
    max_seconds: float | None = None
    batch_size: int = 8
    context: int = 256
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    data: str | None = None


@dataclass(frozen=True)
class Progress:
    """What a step reports: its number (from 1), the loss in nats, and the training time so far."""

    step: int
    loss: float
    seconds: float
    tokens_per_second: float


class Trainer:
    """A model in training: step it, save it, continue it.

    Args:
        model: what to train, on its device.
        corpus: bytes.
        config: how.

    Raises:
        DataError: too few bytes for one window.

    Attributes:
        losses: loss in nats of every step so far.
        seconds: training time so far, over all runs.
    """

    def __init__(self, model: DecoderLM, corpus: Corpus, config: TrainConfig) -> None:
        for part, data in (("training", corpus.train), ("held-out", corpus.held_out)):
            if data.numel() <= config.context:
                raise DataError(
                    f"{corpus.source}: {data.numel()} bytes of {part} text, "
                    f"but one window takes {config.context + 1}; give more text or less context"
                )
        self.model = model
        self.corpus = corpus
        self.config = config
        self.device = model.embeddings.weight.device
        self.optimizer = _optimizer(model, config)
        self.batches = torch.Generator().manual_seed(config.seed)
        self.losses: list[float] = []
        self.seconds = 0.0

    @property
    def share_done(self) -> float:
        """How much of the schedule is behind, by steps or by time; 1 is the end."""
        share = len(self.losses) / self.config.steps
        if self.config.max_seconds is not None:
            share = max(share, self.seconds / self.config.max_seconds)
        return share

    @property
    def finished(self) -> bool:
        return self.share_done >= 1.0

    def step(self) -> Progress:
        """One batch forward, backward, update."""
        start = time.perf_counter()
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * self._lr_factor()
        inputs, targets = sample_batch(
            self.corpus.train, config.batch_size, config.context, self.batches
        )
        with _mixed_precision(self.device):
            loss = self.model.loss(inputs.to(self.device), targets.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.losses.append(loss.item())
        took = time.perf_counter() - start
        self.seconds += took
        tokens = config.batch_size * config.context
        return Progress(len(self.losses), self.losses[-1], self.seconds, tokens / took)

    def run(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Step until the schedule ends, or until ``stop()`` is true after a step."""
        self.model.train()
        while not self.finished:
            report(self.step())
            if stop is not None and stop():
                return

    def save(self, folder: str | Path) -> None:
        """Write model and training state; a save that is cut off leaves the old checkpoint."""
        folder = Path(folder)
        state = {
            "config": asdict(self.config),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.get_state(),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        files = model_files(self.model, folder, {"step": str(len(self.losses))})
        write_together({**files, folder / STATE: lambda path: torch.save(state, path)})

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        load: Callable[[str | None], Corpus],
        device: torch.device | str = "cpu",
        steps: int | None = None,
    ) -> Trainer:
        """Continue from :meth:`save`.

        Args:
            folder: the checkpoint.
            load: gives the corpus for the stored ``config.data``.
            device: where to train on.
            steps: a new total; default the stored one.

        Raises:
            CheckpointError: a file that is missing, damaged, or from another step than the others.
        """
        path = Path(folder) / STATE
        model = load_model(folder, device)
        state = _read_state(path)
        try:
            values = state["config"]
            config = TrainConfig(**{**values, "steps": steps or values["steps"]})
            trainer = cls(model, load(config.data), config)
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.batches.set_state(state["batches"])
            trainer.losses = list(state["losses"])
            trainer.seconds = float(state["seconds"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: not a training state of this model ({error})"
            ) from error
        weights_step = read_weights(Path(folder))[1].get("step")
        if weights_step != str(len(trainer.losses)):
            raise CheckpointError(
                f"{path}: is of step {len(trainer.losses)}, but model.safetensors of step "
                f"{weights_step}: saving was cut off"
            )
        return trainer

    def _lr_factor(self) -> float:
        warm = min(1.0, (len(self.losses) + 1) / self.config.warmup)
        return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, self.share_done))))


def bits_per_byte(model: DecoderLM, data: Tensor, context: int, windows: int = 64) -> float:
    """Mean cost of a byte, in bits, over evenly spaced windows of ``data``.

    Args:
        model: a byte model; its device is used.
        data: uint8 ``[n]``, n > context.
        context: bytes per window; each byte is predicted from the bytes before it in the window.
        windows: how many, at most what fits without overlap.
    """
    device = model.embeddings.weight.device
    windows = max(1, min(windows, (data.numel() - 1) // context))
    starts = torch.linspace(0, data.numel() - context - 1, windows).long()
    total = 0.0
    model.eval()
    with torch.no_grad():
        for group in torch.chunk(starts, -(-windows // 8)):
            x = data[group[:, None] + torch.arange(context + 1)].long().to(device)
            with _mixed_precision(device):
                logits, _ = model(x[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
            total += loss.item() * group.numel()
    return total / windows / math.log(2)


def pick_device(wish: str = "auto") -> torch.device:
    """``auto`` is the GPU if there is one whose kernels are loaded, else the CPU.

    Raises:
        ValueError: a name torch does not know, or a GPU that is not there.
    """
    gpu = torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
        "lsm::gla_fwd", "CUDA"
    )
    if wish == "auto":
        return torch.device("cuda" if gpu else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, got {wish!r}") from error
    if device.type == "cuda" and not gpu:
        raise ValueError(f"device {wish}: no GPU, or the CUDA kernels are not built; see lsm info")
    return device


def _mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 where tensor cores make it pay."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def _optimizer(model: DecoderLM, config: TrainConfig) -> torch.optim.AdamW:
    """Decay for matrices; none for norms, biases and embeddings."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, p in model.named_parameters():
        (decayed if p.dim() == 2 and not name.startswith("embeddings") else plain).append(p)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; this checkpoint holds a model, but no training")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parts raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable training state ({reason})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a training state, got {type(state).__name__}")
    return state
