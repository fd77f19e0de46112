"""Other people's implementations, where they are installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

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
