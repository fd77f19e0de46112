"""The build's switches: a senseless value is refused in one line, before anything is built; and
what a build does again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# An nvcc that only says its version: the switches come after it is found.
NVCC = "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n"


@pytest.mark.parametrize(
    ("switches", "text"),
    [
        ({"LSM_BUILD_CUDA": "yes"}, "LSM_BUILD_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            {"LSM_BUILD_CUDA": "1", "CUDA_HOME": "/nowhere", "PATH": "/usr/bin:/bin"},
            "LSM_BUILD_CUDA=1, but no nvcc: put it on PATH or set CUDA_HOME",
        ),
        ({"LSM_CUDA_ARCHS": "80;hopper"}, "LSM_CUDA_ARCHS must read like 80;90a, got 'hopper'"),
        (
            {"LSM_CUTLASS_DIR": "/nowhere"},
            "LSM_CUTLASS_DIR=/nowhere: expected a folder with cute/ (or include/cute/) in it",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_switch_is_one_line(tmp_path: Path, switches: dict[str, str], text: str) -> None:
    switches = {"LSM_BUILD_CUDA": "auto", **switches}  # whatever this run was told
    if "CUDA_HOME" not in switches:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").write_text(NVCC)
        (tmp_path / "bin" / "nvcc").chmod(0o755)
        switches = {"CUDA_HOME": str(tmp_path), **switches}
    build = ["build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *build],
        cwd=ROOT, env=os.environ | switches, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == text, done.stderr


def test_torch_elsewhere_compiles_nothing_again(tmp_path: Path) -> None:
    """pip's isolated environments have torch in another place each time."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    cmake = shutil.which("cmake", path=path)
    if cmake is None or shutil.which("ninja", path=path) is None:
        pytest.skip("no cmake or no ninja")
    here, build = Path(torch.__path__[0]), tmp_path / "build"
    elsewhere = tmp_path / "elsewhere" / "torch"
    shutil.copytree(here / "include", elsewhere / "include", copy_function=shutil.copy)  # new times
    (elsewhere / "lib").symlink_to(here / "lib")
    seen = []
    for folder in (here, elsewhere):
        subprocess.run(
            [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DLSM_TORCH_DIR={folder}"],
            check=True, capture_output=True, env=os.environ | {"PATH": path},
        )  # fmt: skip
        headers = sorted(build.rglob("*.h"))
        assert headers
        commands = (build / "compile_commands.json").read_text()
        seen.append((commands, {h: h.stat().st_mtime_ns for h in headers}))
    assert seen[0] == seen[1]
