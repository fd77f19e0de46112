"""Bytes to train on: any file or folder, or the standard library that every Python ships."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Corpus", "DataError", "load_corpus", "sample_batch"]

DEFAULT_BYTES = 12_000_000
HELD_OUT = 0.05  # share of the bytes, roughly
_MANY_FILES = 20
# What lies in the standard library's folder, but is not part of it or not shipped everywhere.
_NOT_STDLIB = frozenset({"test", "tests", "site-packages", "dist-packages"})


class DataError(ValueError):
    """Data that cannot be trained on; the text names the path and what is wrong with it."""


@dataclass(frozen=True)
class Corpus:
    """Byte sequences, each a uint8 tensor, and where they came from."""

    train: Tensor
    held_out: Tensor
    source: str


def load_corpus(path: str | Path | None = None, max_bytes: int | None = None) -> Corpus:
    """Read bytes and set some aside.

    Twenty files or more are split as whole files, by a hash of their content; fewer give up their
    last twentieth each. Order and split depend on the content alone.

    Args:
        path: a file, a folder (all its text files, hidden ones excepted), or None for the sources
            and documentation texts of Python's standard library.
        max_bytes: stop after this many; by default 12 MB of the standard library, all of a path.

    Raises:
        DataError: nothing there, nothing in it, or something that cannot be read.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in _walk(root, _NOT_STDLIB) if f.suffix == ".py"]
        source, max_bytes = "Python's standard library", max_bytes or DEFAULT_BYTES
    else:
        root = Path(path)
        if not root.exists():
            raise DataError(f"{root}: no such file or folder")
        files = [root] if root.is_file() else list(_walk(root))
        source = str(root)
    texts = _read(files, keep_binary=path is not None and root.is_file())
    if not texts:
        raise DataError(f"{root}: no text in it to train on")
    train, held_out = _split(texts, max_bytes)
    return Corpus(_tensor(train), _tensor(held_out), source)


def sample_batch(
    data: Tensor, batch: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random windows of ``data``: inputs and next-byte targets, each int64 ``[batch, context]``."""
    starts = torch.randint(data.numel() - context, (batch,), generator=generator)
    windows = data[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _walk(root: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(d for d in subfolders if d not in skipped and d[0] != ".")
        yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def _read(files: list[Path], keep_binary: bool) -> list[bytes]:
    """Contents in the order of their hashes, so that a cut takes a sample of everything."""
    texts = {}
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from error
        if content and (keep_binary or b"\0" not in content[:4096]):
            texts[hashlib.sha256(content).digest()] = content
    return [texts[key] for key in sorted(texts)]


def _split(texts: list[bytes], max_bytes: int | None) -> tuple[list[bytes], list[bytes]]:
    train: list[bytes] = []
    held_out: list[bytes] = []
    left = sum(map(len, texts)) if max_bytes is None else max_bytes
    whole_files = len(texts) >= _MANY_FILES
    for text in texts:
        text = text[:left]
        left -= len(text)
        if whole_files:
            # A second hash: the first one decides the order, and with it what a cut drops.
            share = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") / 2**32
            (held_out if share < HELD_OUT else train).append(text)
        else:
            cut = len(text) - int(len(text) * HELD_OUT)
            train.append(text[:cut])
            held_out.append(text[cut:])
    if whole_files and not any(held_out):
        held_out.append(train.pop())
    return train, held_out


def _tensor(texts: list[bytes]) -> Tensor:
    joined = bytearray(b"\n".join(text for text in texts if text))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte()
