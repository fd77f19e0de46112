"""The kernels on a CPU: the emulator's module, and its operators in the place of the real ones."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lsm_cuda.ops import _operator

BUILD = Path(__file__).resolve().parent.parent / "build" / "emulator"


def emulator() -> Any:
    """Its Python module; importing it registers torch.ops.lsm_emu.

    Raises:
        ModuleNotFoundError: it is not built.
    """
    folder = os.environ.get("LSM_EMU_DIR", str(BUILD))
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("_emu")


def stand_in() -> torch.library.Library:
    """From now on, and while the result lives, torch.ops.lsm on CPU tensors is the emulator."""
    emulator()
    library = torch.library.Library("lsm", "IMPL")
    warnings.filterwarnings("ignore", "Warning only once for all operators")  # it is meant
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("lsm_emu::") and torch._C._dispatch_has_kernel_for_dispatch_key(
            name, "CPU"
        ):
            op = name.removeprefix("lsm_emu::")
            emulated = getattr(torch.ops.lsm_emu, op).default
            library.impl(op, emulated, "CPU", allow_override=True)
    _operator.FUSED.clear()  # what CUDA composes is composed
    _operator.FINISHED.add("cpu")
    return library
