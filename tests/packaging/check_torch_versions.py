#!/usr/bin/env python3
"""Runs the operator tests against one wheel in fresh environments with other versions of torch.

    python tests/packaging/check_torch_versions.py dist/*.whl                 # 2.11.0 and newest
    python tests/packaging/check_torch_versions.py dist/*.whl 2.12.1 newest

One wheel serves every torch >= 2.11. Per version: a virtual environment, torch from the index that
pip is set up with, the wheel without building anything, then: both libraries load as far as this
torch has their device, kernels are registered, and tests/ops passes on the CPU. A CUDA build of
torch takes several GB, which are removed afterwards unless --keep is given.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["numpy", "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6", "matplotlib", "setuptools>=77"]

# What loading must have achieved; runs in the fresh environment, away from the source tree.
PROBE = """
import sys, zipfile
import torch, lsm_cuda

source, wheel = sys.argv[1:]
assert not lsm_cuda.__file__.startswith(source), f"imported the source tree: {lsm_cuda.__file__}"
info = lsm_cuda.build_info()
has_cuda_library = any(n.endswith("/_C_cuda.so") for n in zipfile.ZipFile(wheel).namelist())
expected = {"_C": "loaded", "_C_cuda": "not built"}
if has_cuda_library:
    expected["_C_cuda"] = (
        "loaded" if torch.version.cuda else "not loaded: this torch is built without CUDA"
    )
assert info["libraries"] == expected, info["libraries"]
keys = ["CPU", *(["CUDA"] if expected["_C_cuda"] == "loaded" else [])]
for op in ("gla_fwd", "gla_bwd", "gla_step"):
    for key in keys:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lsm::{op}", key), (op, key)
print(f"torch {torch.__version__}, built with {info['torch_built_with']}, kernels for", *keys)
"""


def run(command: list[str | Path], **kwargs) -> subprocess.CompletedProcess:
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=False, **kwargs)


def check(wheel: Path, version: str, folder: Path, jobs: int, pytest_args: list[str]) -> str:
    """What happened with one version: "ok ..." or "FAILED ..."."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    torch = "torch" if version == "newest" else f"torch=={version}"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    if run([*pip, torch, *TOOLS]).returncode:
        return f"FAILED: {torch} cannot be installed here"
    if run([*pip, "--force-reinstall", "--no-deps", wheel]).returncode:
        return "FAILED: the wheel cannot be installed"
    with tempfile.TemporaryDirectory() as elsewhere:
        # away from the source tree and from an emulator built for another torch
        environment = os.environ | {"LSM_EMU_DIR": elsewhere, "PYTHONPATH": ""}
        settings = {"cwd": elsewhere, "env": environment}
        probe = run([python, "-c", PROBE, ROOT, wheel], capture_output=True, text=True, **settings)
        if probe.returncode:
            return "FAILED to load: " + probe.stderr.strip().splitlines()[-1]
        tests = [ROOT / "tests" / "ops", ROOT / "tests" / "packaging"]
        command = [python, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider"]
        result = run([*command, "-n", str(jobs), "-ra", *pytest_args, *tests], **settings)
    if result.returncode:
        return f"FAILED: pytest exit status {result.returncode}; {probe.stdout.strip()}"
    return f"ok: {probe.stdout.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("versions", nargs="*", default=["2.11.0", "newest"])
    parser.add_argument("--work", type=Path, help="folder of the environments")
    parser.add_argument("--keep", action="store_true", help="keep them; a second run is quick")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--pytest", default="", help="more options for pytest, in one string")
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    if not wheel.is_file():
        parser.error(f"{wheel} does not exist")
    work = options.work or Path(tempfile.mkdtemp(prefix="torch-versions-"))
    outcome = {}
    try:
        for version in options.versions:
            folder = work / f"torch-{version}"
            arguments = shlex.split(options.pytest)
            outcome[version] = check(wheel, version, folder, options.jobs, arguments)
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        if not options.keep and options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print()
    for version, text in outcome.items():
        print(f"{version:10} {text}")
    return int(any(not text.startswith("ok") for text in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
