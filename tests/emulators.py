"""The emulator's Python modules by flavour: _emu (plain), _emu_race, _emu_asan."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

BUILD = Path(
    os.environ.get("LSM_EMU_DIR", Path(__file__).resolve().parents[1] / "build" / "emulator")
)


def missing(name: str) -> str | None:
    """Why a flavour cannot be used, or None if it is built."""
    built = (BUILD / f"{name}.so").is_file()
    return None if built else f"the emulator is not built (no {name}.so in {BUILD})"


def emulator(name: str) -> ModuleType:
    """Imports a flavour, which also registers its operators; skips where it is not built."""
    if why := missing(name):
        pytest.skip(why)
    if str(BUILD) not in sys.path:
        sys.path.append(str(BUILD))
    return importlib.import_module(name)
