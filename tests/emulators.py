"""The emulator's Python modules by flavour: _emu (plain), _emu_race."""

from __future__ import annotations

import importlib
import os
import subprocess
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
    if os.environ.get("LSM_REQUIRE_EMULATOR") == "1":
        raise FileNotFoundError(why)
    return why


def emulator(name: str) -> ModuleType:
    """Imports a flavour, which also registers its operators; skips where it is not built."""
    if why := missing(name):
        pytest.skip(why)
    if str(BUILD) not in sys.path:
        sys.path.append(str(BUILD))
    return importlib.import_module(name)


def checking_bounds() -> dict[str, str]:
    """The environment of a process whose race build checks the bounds of global memory: under
    AddressSanitizer's library, which has to come before the allocator of torch.

    Faults and stacks stay the emulator's.
    """
    find = [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"]
    libasan = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    options = "detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_sigill=0:use_sigaltstack=0"
    return os.environ | {"LD_PRELOAD": libasan, "ASAN_OPTIONS": options}
