"""Builds the SIMT emulator with all kernels on it, for the tests (docs/emulator.md). Needs g++, no
GPU, no nvcc."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "third_party"))
# cmake and ninja installed beside this Python count even if its environment is not activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def main() -> None:
    from headers import find_cuda_headers, find_cutlass
    from torch.utils.cpp_extension import TORCH_LIB_PATH

    argparse.ArgumentParser(description=__doc__).parse_args()
    build = ROOT / "build" / "emulator"
    options = {
        "LSM_TORCH_DIR": Path(TORCH_LIB_PATH).parent,
        "LSM_BUILD_EMULATOR": "ON",
        "LSM_CUDA_INCLUDE_DIR": find_cuda_headers(ROOT / "build"),
        "LSM_CUTLASS_DIR": find_cutlass(ROOT / "build")[0],
        "Python_EXECUTABLE": sys.executable,
    }
    define = [f"-D{key}={value}" for key, value in options.items()]
    run = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "--log-level=WARNING", *define]
    subprocess.run(run, check=True, stdout=sys.stderr)
    targets = ["_emu", "_emu_race", "kernel_tests_plain", "kernel_tests_race"]
    targets += ["_C_example", "_emu_example"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    run = ["cmake", "--build", build, "-j", jobs, "--target", *targets]
    subprocess.run(run, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
