"""Other people's implementations, where they are installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast
from unittest import mock

import pytest


def fla_folder() -> Path | None:
    """The package ``fla``: an installed one, or that which LSM_FLA_DIR is or holds."""
    unpacked = os.environ.get("LSM_FLA_DIR")
    if unpacked is not None:
        inside = Path(unpacked) / "fla"
        return inside if inside.is_dir() else Path(unpacked)
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def fla_module(path: str) -> ModuleType:
    """A file of FLA that needs nothing but PyTorch.

    Loaded by path: importing the package needs triton, its plain definitions do not.
    """
    root = fla_folder()
    if root is None:
        pytest.skip("flash-linear-attention not found: install it or set LSM_FLA_DIR")
    file = root / path
    assert file.is_file(), f"{root} holds no {path}"
    spec = importlib.util.spec_from_file_location("fla_naive", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{path} needs {error.name}")
    return module


class Nothing:
    """A module, a decorator, a class or a kernel of triton: any name in it and any call gives one
    more of it, and no device is found."""

    __name__, __version__, __path__ = "nothing", "9.0.0", ()

    def __init__(self, *args: object) -> None:
        pass

    def __call__(self, *args: object, **rest: object) -> Nothing:
        return Nothing()

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__") or name == "get_current_target":
            raise AttributeError(name)
        return Nothing()


class NoTriton(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds triton, and everything below it, to be nothing."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        mine = name.partition(".")[0] == "triton"
        return ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return cast(ModuleType, Nothing())

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def fla_layers() -> Iterator[ModuleType]:
    """``fla.layers`` of an installed FLA, to be made and looked at: its kernels, which need triton,
    are nothing at all. Nothing stays imported."""
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention not found: install it")
    # which ask for triton themselves
    for name in ("torch._inductor.compile_fx", "torch.utils.flop_counter"):
        importlib.import_module(name)

    def taken_out() -> dict[str, ModuleType]:
        names = [n for n in sys.modules if n.partition(".")[0] in ("fla", "triton")]
        return {n: sys.modules.pop(n) for n in names}

    before = taken_out()
    with mock.patch.object(sys, "meta_path", [NoTriton(), *sys.meta_path]):
        try:
            yield importlib.import_module("fla.layers")
        except ModuleNotFoundError as error:
            pytest.skip(f"fla.layers needs {error.name}")
        finally:
            taken_out()
            sys.modules.update(before)


@contextlib.contextmanager
def mamba_ssm_module(name: str) -> Iterator[ModuleType]:
    """A module of an installed (or, with LSM_MAMBA_DIR, unpacked) mamba_ssm, for what is plain
    PyTorch in it: without triton, whose kernels are then nothing at all.

    The package's own ``__init__`` is not run, and nothing stays imported.
    """
    root = os.environ.get("LSM_MAMBA_DIR")
    if root is None:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("mamba_ssm not found: install it or set LSM_MAMBA_DIR")
        root = spec.submodule_search_locations[0]
    packages = {}
    for package in (
        "mamba_ssm",
        *(f"mamba_ssm.{n}" for n in ("modules", "ops", "ops.triton", "utils")),
    ):
        packages[package] = ModuleType(package)
        packages[package].__path__ = [str(Path(root).joinpath(*package.split(".")[1:]))]
    triton = mock.MagicMock(__version__="3.0.0", __spec__=None)
    triton.Config = lambda kwargs, **rest: SimpleNamespace(kwargs=kwargs)  # some count these
    triton.autotune = lambda configs, **rest: lambda kernel: SimpleNamespace(configs=configs)
    absent = {"triton": triton, "triton.language": triton.language}
    with mock.patch.dict(sys.modules, packages | absent):
        try:
            yield importlib.import_module(f"mamba_ssm.{name}")
        except ModuleNotFoundError as error:
            pytest.skip(f"mamba_ssm.{name} needs {error.name}")
