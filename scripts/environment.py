"""Prepares a Python environment with this package built in it, and prints the path of its Python.

The active environment is used if its torch is new enough; else one is made in .venv. Runs with any
Python >= 3.10 and nothing installed; called by the Makefile.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST_TORCH = (2, 11)
BUILD_TOOLS = ["setuptools>=77", "cmake>=3.25,<5", "ninja", "numpy"]
# What a rebuild depends on; Python files are used in place.
SOURCES = ["csrc", "third_party", "CMakeLists.txt", "setup.py", "pyproject.toml"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", default="", help="comma-separated extras to install")
    parser.add_argument("--torch", default="2.13.0", help="version to install into .venv")
    options = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs this may have an older one
        version = sys.version.split()[0]
        return fail(f"Python >= 3.10 is needed, {sys.executable} is {version}; set PYTHON=/a/newer")
    try:
        python = choose_python(options.torch)
        install(python, set(filter(None, options.extras.split(","))))
    except subprocess.CalledProcessError as error:
        return fail(f"failed: {' '.join(map(str, error.cmd))}")
    print(python)
    return 0


def choose_python(torch_version: str) -> Path:
    """The active Python if torch in it is new enough and pip may install there, else .venv's."""
    found = installed("torch")
    usable = installed("pip") is not None and not externally_managed()
    if found is not None and release(found) >= OLDEST_TORCH and usable:
        say(f"using the active environment {sys.prefix} (torch {found})")
        return Path(sys.executable)
    python = VENV / "bin" / "python"
    if not python.is_file():
        say(f"the active environment {sys.prefix} {reason(found)}; making {VENV}")
        run([sys.executable, "-m", "venv", VENV])
    wanted = f"torch=={torch_version}"
    if read_stamp(python, "torch") != wanted:
        say(f"installing {wanted} into {VENV}")
        run([python, "-m", "pip", "install", "-q", "--upgrade", "pip"])
        run([python, "-m", "pip", "install", "-q", wanted])
        write_stamp(python, "torch", wanted)
    say(f"using {VENV} ({wanted})")
    return python


def reason(found: str | None) -> str:
    if found is None:
        return "has no torch"
    if release(found) < OLDEST_TORCH:
        return f"has torch {found}, older than {'.'.join(map(str, OLDEST_TORCH))}"
    return "has no pip, or is managed by the system"


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def externally_managed() -> bool:
    in_venv = sys.prefix != sys.base_prefix
    return not in_venv and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()


def install(python: Path, extras: set[str]) -> None:
    """Build the package in place and install it with its extras, unless nothing changed."""
    state, *present = read_stamp(python, "package").split()
    if built() and state == fingerprint(python) and extras <= set(present):
        return
    say("building and installing the package (minutes with nvcc, else seconds)")
    run([python, "-m", "pip", "install", "-q", *BUILD_TOOLS])
    extras = extras | set(present)
    target = f"{ROOT}[{','.join(sorted(extras))}]" if extras else ROOT
    run([python, "-m", "pip", "install", "-q", "--no-build-isolation", "-e", target])
    write_stamp(python, "package", " ".join([fingerprint(python), *sorted(extras)]))


def built() -> bool:
    return (ROOT / "lsm_cuda" / "_C.so").is_file()


def fingerprint(python: Path) -> str:
    """Changes when the build would: sources, switches, Python."""
    digest = hashlib.sha256(str(python).encode())
    for name in ("LSM_BUILD_CUDA", "LSM_CUDA_ARCHS", "LSM_CUTLASS_DIR"):
        digest.update(f"{name}={os.environ.get(name)};".encode())
    for source in SOURCES:
        path = ROOT / source
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def stamp_path(python: Path, name: str) -> Path:
    where = hashlib.sha256(str(python).encode()).hexdigest()[:12]
    return ROOT / "build" / "stamps" / f"{name}-{where}"


def read_stamp(python: Path, name: str) -> str:
    path = stamp_path(python, name)
    return path.read_text() if path.is_file() else "nothing"


def write_stamp(python: Path, name: str, value: str) -> None:
    path = stamp_path(python, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value)


def run(command: list[object]) -> None:
    """Output goes to stderr: stdout carries the answer."""
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)


def say(text: str) -> None:
    print(f"[environment] {text}", file=sys.stderr, flush=True)


def fail(text: str) -> int:
    say(text)
    return 1


if __name__ == "__main__":
    sys.exit(main())
