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
    """Why a flavour cannot be used, or None if it is built.

    Where the whole suite is asked for (make test), a flavour that should be there and is not is an
    error: skipping would leave every kernel untested, and say so in one letter.
    """
    if (BUILD / f"{name}.so").is_file():
        return None
    why = f"the emulator is not built (no {name}.so in {BUILD})"
    wanted = name != "_emu_asan" or os.environ.get("LSM_EMULATOR_ASAN") == "1"
    if wanted and os.environ.get("LSM_REQUIRE_EMULATOR") == "1":
        raise FileNotFoundError(why)
    return why


def emulator(name: str) -> ModuleType:
    """Imports a flavour, which also registers its operators; skips where it is not built."""
    if why := missing(name):
        pytest.skip(why)
    if str(BUILD) not in sys.path:
        sys.path.append(str(BUILD))
    return importlib.import_module(name)
