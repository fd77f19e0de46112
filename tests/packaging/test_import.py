"""Importing: twice, next to a copy, without the library; and what build_info says."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lsm_cuda

PACKAGE = Path(lsm_cuda.__file__).parent


def python(code: str, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run code in a fresh process; ``folder`` holds the lsm_cuda that it finds."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a second copy of the package."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "lsm_cuda", ignore=ignore)
    return tmp_path


def test_reload(copy: Path) -> None:
    """Importing again, after Python forgot the first time, registers nothing twice."""
    code = """
import importlib, sys, torch
import lsm_cuda
first = torch.ops.lsm.gla_fwd.default
lsm_cuda._library.load()
importlib.reload(lsm_cuda)
assert lsm_cuda.build_info()["libraries"]["_C"] == "loaded"
assert torch.ops.lsm.gla_fwd.default is first
print("fine")
"""
    done = python(code, copy)
    assert done.stdout == "fine\n", done.stderr


def test_two_copies_in_one_process(copy: Path) -> None:
    """The operators are there already when a second copy loads: it uses them, nothing ends."""
    code = """
import sys, torch
from pathlib import Path
torch.ops.load_library(sys.argv[1])
import lsm_cuda
assert Path(lsm_cuda.__file__).parent == Path.cwd() / "lsm_cuda"
x = torch.ones(1, 3, 1, 2)
assert lsm_cuda.build_info()["libraries"]["_C"] == "loaded"
print(lsm_cuda.ops.chunk_gla(x, x, x, x * 0, scale=0.5)[0][0, :, 0, 0].tolist())
"""
    done = python(code, copy, PACKAGE / "_C.so")
    assert done.stdout == "[1.0, 2.0, 3.0]\n", done.stderr


def test_missing_library(copy: Path) -> None:
    (copy / "lsm_cuda" / "_C.so").unlink()
    done = python("import lsm_cuda", copy)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: lsm_cuda: _C.so is missing from ")
    assert "pip install" in last


def test_import_is_light(copy: Path) -> None:
    """No compiler, no GPU runtime and none of the optional dependencies is touched by an import."""
    heavy = ["triton", "matplotlib", "typer", "rich", "safetensors", "transformers", "hypothesis"]
    code = f"""
import sys, torch
before = set(sys.modules)
import lsm_cuda
print([m for m in {heavy} if m in set(sys.modules) - before], torch.cuda.is_initialized())
"""
    done = python(code, copy)
    assert done.stdout == "[] False\n", done.stderr


def test_cuda_library_reports_why_it_is_not_loaded(copy: Path) -> None:
    """A file that cannot be loaded is a line in build_info, not an import that fails."""
    if torch.version.cuda and torch.cuda.is_available():
        pytest.skip("kernels are loaded from elsewhere on this machine")
    (copy / "lsm_cuda" / "_C_cuda.so").write_bytes(b"not a library" * 1000)
    code = "import lsm_cuda; print(lsm_cuda.build_info()['libraries']['_C_cuda'])"
    done = python(code, copy)
    expected = "invalid ELF header" if torch.version.cuda else "this torch is built without CUDA"
    assert done.stdout.startswith("not loaded: ") and expected in done.stdout, done.stderr


def test_build_info() -> None:
    info = lsm_cuda.build_info()
    assert info.keys() >= {
        *("version", "cuda", "archs", "cutlass", "abi_target", "torch_built_with"),
        *("torch", "cpu_capability", "libraries"),
    }
    assert info["version"] == lsm_cuda.__version__
    assert info["torch"] == torch.__version__
    assert info["abi_target"] == "2.11"
    assert info["libraries"].keys() == {"_C", "_C_cuda"}
    assert info["libraries"]["_C"] == "loaded"
    assert json.loads(json.dumps(info)) == info
    if (PACKAGE / "_C_cuda.so").is_file():
        assert info["cuda"] and info["archs"]
    else:
        assert info["libraries"]["_C_cuda"] == "not built"


def test_build_info_is_a_copy() -> None:
    lsm_cuda.build_info()["libraries"].clear()
    assert lsm_cuda.build_info()["libraries"]


def test_version_is_one() -> None:
    try:
        assert importlib.metadata.version("lsm-cuda") == lsm_cuda.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lsm_cuda is on the path without being installed")


def test_kernels_are_registered() -> None:
    keys = ["CPU", "Meta"]
    if lsm_cuda.build_info()["libraries"]["_C_cuda"] == "loaded":
        keys.append("CUDA")
    for name in ("gla_fwd", "gla_bwd", "gla_step"):
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lsm::{name}", key), (name, key)
