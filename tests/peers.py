"""Other people's implementations, where they are installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest


def fla_module(path: str) -> ModuleType:
    """A file of an installed (or, with LSM_FLA_DIR, unpacked) FLA that needs nothing but PyTorch.

    Loaded by path: importing the package needs triton, its plain definitions do not.
    """
    root = os.environ.get("LSM_FLA_DIR")
    if root is None:
        spec = importlib.util.find_spec("fla")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("flash-linear-attention not found: install it or set LSM_FLA_DIR")
        root = spec.submodule_search_locations[0]
    file = Path(root) / path
    file = file if file.is_file() else Path(root) / "fla" / path
    assert file.is_file(), f"LSM_FLA_DIR={root} holds no {path}"
    spec = importlib.util.spec_from_file_location("fla_naive", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{path} needs {error.name}")
    return module


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
