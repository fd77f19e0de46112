"""Loads the compiled libraries and reports what was loaded, and why not what was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
_status: dict[str, str] = {}


def _load(library: str, needed_op: str, dispatch_key: str) -> None:
    """Load one library unless its operators are registered already: a second copy of a library
    that defines operators, reached by another path, would end the process."""
    path = _HERE / f"{library}.so"
    if torch._C._dispatch_has_kernel_for_dispatch_key(needed_op, dispatch_key):
        _status[library] = "loaded"
    elif not path.is_file():
        _status[library] = "not built"
    else:
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
            _status[library] = "loaded"
        except OSError as error:
            _status[library] = f"not loaded: {error.__cause__ or error}"


def _has_schema(op: str) -> bool:
    return any(schema.name == op for schema in torch._C._jit_get_schemas_for_operator(op))


def load() -> None:
    if _has_schema("lsm::gla_fwd"):
        _status["_C"] = "loaded"
    else:
        path = _HERE / "_C.so"
        if not path.is_file():
            raise ImportError(
                f"lsm_cuda: {path.name} is missing from {_HERE}: the package is not built. "
                "Run `pip install .` (or `pip install -e .`) in the source tree."
            )
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        _status["_C"] = "loaded"
    if torch.version.cuda:
        _load("_C_cuda", "lsm::gla_fwd", "CUDA")
    else:
        built = (_HERE / "_C_cuda.so").is_file()
        _status["_C_cuda"] = (
            "not loaded: this torch is built without CUDA" if built else "not built"
        )


def build_info() -> dict[str, Any]:
    """What was built and what is loaded.

    Returns:
        dict with ``version``, ``cuda`` (toolkit that built ``_C_cuda``, or None), ``archs``,
        ``cutlass``, ``torch_built_with``, ``abi_target`` (oldest torch the libraries run with),
        ``torch``, ``libraries`` (name -> ``"loaded"``, ``"not built"`` or ``"not loaded:
        reason"``) and ``cpu_capability``.

    Example:
        >>> build_info()["libraries"]["_C"]
        'loaded'
    """
    built_path = _HERE / "build_info.json"
    built = json.loads(built_path.read_text()) if built_path.is_file() else {}
    return {
        **built,
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "libraries": dict(_status),
    }
