"""Builds the two libraries with CMake and packs them; metadata is in pyproject.toml.

Switches (environment): LSM_BUILD_CUDA=auto|0|1, LSM_CUDA_ARCHS="80;90a" (default: the GPUs
    present, else 80;90a),
LSM_CUTLASS_DIR=<folder with cute/>, LSM_LINEINFO=1 (source lines for profilers), MAX_JOBS=<n>.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "third_party"))
# cmake and ninja installed beside this Python count even if its environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def find_nvcc() -> str | None:
    """nvcc to build with, or None for a CPU-only build."""
    wish = os.environ.get("LSM_BUILD_CUDA", "auto").lower()
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"LSM_BUILD_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    from torch.utils.cpp_extension import _find_cuda_home  # finds it for a CPU-only torch too

    home = _find_cuda_home()
    in_home = Path(home or "/nonexistent") / "bin" / "nvcc"
    nvcc = str(in_home) if in_home.is_file() else shutil.which("nvcc")
    if nvcc is None and wish == "1":
        raise SystemExit("LSM_BUILD_CUDA=1, but no nvcc: put it on PATH or set CUDA_HOME")
    return nvcc


def cuda_archs() -> list[str]:
    """As asked for, else of the GPUs present, else one build for Ampere and later plus Hopper."""
    if wish := os.environ.get("LSM_CUDA_ARCHS"):
        archs = wish.replace(",", ";").replace(" ", ";").replace(".", "").split(";")
        archs = [a for a in archs if a]
        if bad := [a for a in archs if not re.fullmatch(r"\d{2,3}a?", a)]:
            raise SystemExit(f"LSM_CUDA_ARCHS must read like 80;90a, got {bad[0]!r}")
        return archs
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    present = sorted({c.replace(".", "") for c in found if re.fullmatch(r"\d+\.\d", c)})
    return [a + "a" if int(a) >= 90 else a for a in present if int(a) >= 80] or ["80", "90a"]


class CMakeBuild(build_ext):
    """One CMake run for all extensions; each library is copied to where setuptools wants it."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        from torch.utils.cpp_extension import TORCH_LIB_PATH

        build = ROOT / "build" / "cmake"
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        options = {"LSM_TORCH_DIR": Path(TORCH_LIB_PATH).parent, "LSM_BUILD_CUDA": "OFF"}
        info = {"version": self.distribution.get_version(), "abi_target": "2.11", "cuda": None}
        info |= {"archs": [], "cutlass": None}
        if nvcc := find_nvcc():
            from headers import find_cutlass

            archs, (cutlass, cutlass_version) = cuda_archs(), find_cutlass(ROOT / "build")
            options |= {
                "LSM_BUILD_CUDA": "ON",
                "LSM_CUDA_ARCHS": ";".join(archs),
                "LSM_CUTLASS_DIR": cutlass,
                "CMAKE_CUDA_COMPILER": nvcc,
                "LSM_LINEINFO": os.environ.get("LSM_LINEINFO", "0"),
                "LSM_PYTHON": sys.executable,
            }
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
            release = re.search(r"release ([\d.]+)", text.stdout)
            info |= {"archs": archs, "cutlass": cutlass_version}
            info["cuda"] = release.group(1) if release else "unknown"
        import torch

        info["torch_built_with"] = torch.__version__
        # An isolated build's ninja goes away with it, and the build folder would remember it.
        if ninja := shutil.which("ninja"):
            options["CMAKE_MAKE_PROGRAM"] = ninja
        define = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *define], check=True)
        subprocess.run(["cmake", "--build", build, "-j", jobs], check=True)
        self.not_built = []
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            library = build / target.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if library.is_file() and (nvcc or target.name != "_C_cuda.so"):
                shutil.copy2(library, target)
            else:
                target.unlink(missing_ok=True)
                self.not_built.append(target.name)
        self.info_path = target.parent / "build_info.json"
        self.info_path.write_text(json.dumps(info, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """In-place builds: the note on the build goes along, and a library that was not built goes
        away."""
        super().copy_extensions_to_source()
        package = ROOT / "lsm_cuda"
        shutil.copy2(self.info_path, package)
        for name in self.not_built:
            (package / name).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class Wheel(bdist_wheel):
    """The libraries hold no Python symbol: one wheel for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension("lsm_cuda._C", sources=[]),
        Extension("lsm_cuda._C_cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
