"""Finds the headers this project compiles against but does not carry; see README.md beside this
file."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CUTLASS = {"nvidia-cutlass==4.2.0.0": "cutlass_library/source/include/"}
# Enough of CUDA to compile kernels as C++ for the emulator, without a toolkit.
CUDA = {
    "nvidia-cuda-runtime==13.0.96": "nvidia/cu13/include/",
    "nvidia-cuda-crt==13.0.88": "nvidia/cu13/include/",
    "nvidia-cuda-cccl==13.0.85": "nvidia/cu13/include/",
}


def find_cutlass(cache: Path) -> tuple[Path, str]:
    """Include folder and version of CUTLASS: what LSM_CUTLASS_DIR names, an installed
    nvidia-cutlass, or the headers of the pinned wheel, fetched once into ``cache`` without the
    wheel's dependencies."""
    if wish := os.environ.get("LSM_CUTLASS_DIR"):
        for include in (Path(wish), Path(wish) / "include"):
            if (include / "cute").is_dir():
                return include, _cutlass_version(include)
        raise SystemExit(
            f"LSM_CUTLASS_DIR={wish}: expected a folder with cute/ (or include/cute/) in it"
        )
    if (spec := importlib.util.find_spec("cutlass_library")) and spec.submodule_search_locations:
        include = Path(next(iter(spec.submodule_search_locations))) / "source" / "include"
        if (include / "cute").is_dir():
            return include, _cutlass_version(include)
    include = _fetch(CUTLASS, cache / "cutlass-4.2.0.0", "LSM_CUTLASS_DIR to a CUTLASS checkout")
    return include, _cutlass_version(include)


def find_cuda_headers(cache: Path) -> Path:
    """Include folder of CUDA: of the toolkit if there is one, else from wheels of a few MB,
    fetched once."""
    for home in (
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        _toolkit(),
        "/usr/local/cuda",
    ):
        if home and (Path(home) / "include" / "cuda_bf16.h").is_file():
            return Path(home) / "include"
    return _fetch(CUDA, cache / "cuda-headers-13.0", "CUDA_HOME to a CUDA 13 toolkit")


def _toolkit() -> str | None:
    """The toolkit's folder as nvcc reports it; nvcc on PATH may be a wrapper from elsewhere."""
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-"], capture_output=True, text=True)
    match = re.search(r"^#\$ _HERE_=(.*)$|^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)
    return str(Path(match[1]).parent) if match and match[1] else match[2] if match else None


def _fetch(wheels: dict[str, str], include: Path, way_out: str) -> Path:
    """Unpacks one folder of each wheel into ``include``, complete or not at all."""
    if include.is_dir():
        return include
    include.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=include.parent) as folder:
        unpacked = Path(folder) / "include"
        for wheel, prefix in wheels.items():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            command += ["--only-binary=:all:", "-d", f"{folder}/{wheel}", wheel]
            try:
                subprocess.run(command, check=True, stdout=sys.stderr)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"could not fetch {wheel} for its headers; set {way_out}"
                ) from error
            with zipfile.ZipFile(next(Path(folder, wheel).glob("*.whl"))) as archive:
                for member in archive.namelist():
                    if member.startswith(prefix) and not member.endswith("/"):
                        target = unpacked / member.removeprefix(prefix)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(archive.read(member))
        unpacked.rename(include)
    return include


def _cutlass_version(include: Path) -> str:
    text = (include / "cutlass" / "version.h").read_text()
    parts = (
        re.search(rf"#define CUTLASS_{name} (\d+)", text) for name in ("MAJOR", "MINOR", "PATCH")
    )
    return ".".join(part[1] if part else "?" for part in parts)
