"""Checkpoints: a folder with config.json and model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .model import DecoderLM

__all__ = [
    "CheckpointError",
    "load_model",
    "model_files",
    "read_weights",
    "save_model",
    "write_together",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text names the file and what is wrong with it."""


def save_model(
    model: DecoderLM, folder: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write config and weights into ``folder``, which is created.

    Args:
        model: what to save.
        folder: where to.
        metadata: strings kept in the weights file.

    Raises:
        ImportError: the safetensors package is missing.
    """
    write_together(model_files(model, Path(folder), metadata))


Writer = Callable[[Path], object]


def model_files(
    model: DecoderLM, folder: Path, metadata: dict[str, str] | None = None
) -> dict[Path, Writer]:
    """The files of a checkpoint, and what writes each."""
    save_file = _safetensors().torch.save_file
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    return {
        folder / CONFIG: lambda path: path.write_text(config),
        folder / WEIGHTS: lambda path: save_file(weights, str(path), metadata),
    }


def write_together(files: Mapping[Path, Writer]) -> None:
    """Write all files under other names, then move them into place: no reader meets half a file,
    and being cut off while writing leaves the old ones."""
    partial = {path: path.with_name(path.name + ".partial") for path in files}
    for path, write in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial[path])
    for path, written in partial.items():
        os.replace(written, path)


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> DecoderLM:
    """The model saved in ``folder``.

    Raises:
        CheckpointError: a file that is missing, damaged, or does not fit the others.
        ImportError: the safetensors package is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    config = _read_config(folder / CONFIG)
    weights, _ = read_weights(folder)
    try:
        model = DecoderLM(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    _check_fit(folder / WEIGHTS, model.state_dict(), weights)
    model.load_state_dict(weights)
    return model.to(device)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the weights file; raises as :func:`load_model`."""
    safetensors = _safetensors()
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except Exception as error:  # safetensors has its own exception type, and more than one
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _read_config(path: Path) -> ModelConfig:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    try:
        return ModelConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_fit(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{path}: lacks {_some(missing)}, which {CONFIG} asks for")
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{path}: has {_some(extra)}, which {CONFIG} does not ask for")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(found[name].shape)}, but {CONFIG} asks for "
                f"{list(tensor.shape)}"
            )


def _some(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "checkpoints need the safetensors package: pip install 'lsm-cuda[cli]'"
        ) from error
    return safetensors
