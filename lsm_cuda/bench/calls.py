"""Functions to time, ours and other people's, and the packages that they come from."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from .operators import first
from .registry import Inputs, Op, Shape

__all__ = ["Arguments", "Call", "Peer", "absent", "fla_file", "heads_second", "ours", "version"]

Arguments = Callable[[Op, Inputs, Shape], dict[str, Any]]


def as_they_are(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    return dict(x)


def heads_second(result: Any) -> Tensor:
    """[B, H, T, V] to [B, T, H, V]."""
    return first(result).transpose(1, 2)


@dataclass(frozen=True)
class Call:
    """One function of a peer.

    ``function``: ``"module:name"``, or ``"ops/…/naive.py:name"`` for a file of FLA's, whose package
    cannot be imported without triton. ``arguments`` makes its keyword arguments, ``result`` turns
    what it returns into our output. Tensors named in ``constants`` get no gradient. ``needs``: a
    module that the function imports when it is called.
    """

    function: str
    arguments: Arguments = as_they_are
    result: Callable[[Any], Tensor] = first
    constants: tuple[str, ...] = ("cu_seqlens",)
    needs: str | None = None

    def load(self) -> Callable[..., Any]:
        """Raises ImportError with the reason where the function cannot be had."""
        if self.needs is not None:
            importlib.import_module(self.needs)
        where, name = self.function.split(":")
        module = fla_file(where) if where.endswith(".py") else importlib.import_module(where)
        try:
            found: Callable[..., Any] = operator.attrgetter(name)(module)
        except AttributeError as error:
            raise ImportError(f"{where} has no {name}") from error
        return found


@dataclass(frozen=True)
class Peer:
    """Somebody else's package and the operators it serves.

    ``calls``: by operator and kind ("sequence" or "step"). ``same``: it computes our function and
    must agree in value; else it is what people use instead. ``longest``: T beyond which it is not
    tried, or not trained by who has not a minute's patience. ``fits``: shapes it takes.
    """

    name: str
    package: str  # the distribution whose version is recorded
    devices: tuple[str, ...]
    calls: dict[tuple[str, str], Call]
    same: bool = True
    backward: bool = True
    longest: int = 2**40
    longest_training: int = 2**40
    fits: Callable[[Shape], bool] = field(default=lambda shape: not shape.packed)

    def call(self, op: Op, shape: Shape, mode: str, patience: float = 0.0) -> Call | None:
        """What to time in a mode, or None if the row has nothing there; ``patience`` in seconds."""
        if (mode == "training" and not self.backward) or not self.fits(shape):
            return None
        if mode != "step" and shape["T"] > self.longest:
            return None
        if mode == "training" and shape["T"] > self.longest_training and patience < 60:
            return None
        return self.calls.get((op.name, "step" if mode == "step" else "sequence"))


def absent(peer: Peer) -> str | None:
    """Why a peer cannot be used here, or None."""
    try:
        next(iter(peer.calls.values())).load()
    except Exception as error:  # whatever a broken install raises is the reason it is skipped
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def ours(op: Op, mode: str) -> Call:
    """Our own function, called like a peer's."""
    if mode == "step":
        return Call(f"lsm_cuda.ops:{op.step}", lambda op, x, shape: op.token(x, shape))
    return Call(f"lsm_cuda.ops:{op.chunk}", lambda op, x, shape: op.sequence(x, shape), op.result)


@functools.cache
def fla_file(path: str) -> ModuleType:
    """A file under FLA's package folder, by path; LSM_FLA_DIR names the folder, or ``fla`` is
    installed."""
    root = os.environ.get("LSM_FLA_DIR")
    if root is None:
        spec = importlib.util.find_spec("fla")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("no module named 'fla', and LSM_FLA_DIR is not set")
        root = spec.submodule_search_locations[0]
    file = Path(root) / path
    if not file.is_file():
        raise ImportError(f"{path} is not in {root}")
    spec = importlib.util.spec_from_file_location("fla_" + path[:-3].replace("/", "_"), file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
