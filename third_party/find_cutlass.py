"""Finds CUTLASS's headers (cute/ and cutlass/) for the build; see README.md beside this file."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PINNED = "4.2.0.0"


def find_cutlass(cache: Path) -> tuple[Path, str]:
    """The include folder and the version: what LSM_CUTLASS_DIR names, an installed nvidia-cutlass, or the headers of
    the pinned wheel, fetched once into ``cache`` without the wheel's dependencies."""
    if wish := os.environ.get("LSM_CUTLASS_DIR"):
        for include in (Path(wish), Path(wish) / "include"):
            if (include / "cute").is_dir():
                return include, _version(include)
        raise SystemExit(f"LSM_CUTLASS_DIR={wish}: expected a folder with cute/ (or include/cute/) in it")
    if (spec := importlib.util.find_spec("cutlass_library")) and spec.submodule_search_locations:
        include = Path(next(iter(spec.submodule_search_locations))) / "source" / "include"
        if (include / "cute").is_dir():
            return include, _version(include)
    include = cache / f"cutlass-{PINNED}"
    if not (include / "cute").is_dir():
        _fetch(include)
    return include, _version(include)


def _fetch(include: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        name = f"nvidia-cutlass=={PINNED}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
        try:
            subprocess.run([*command, "-d", folder, name], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"could not fetch {name} for its headers; set LSM_CUTLASS_DIR to a CUTLASS checkout, "
                "or LSM_BUILD_CUDA=0 for a build without CUDA"
            ) from error
        prefix = "cutlass_library/source/include/"
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for member in wheel.namelist():
                if member.startswith(prefix) and not member.endswith("/"):
                    target = include / member.removeprefix(prefix)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(wheel.read(member))


def _version(include: Path) -> str:
    numbers = {}
    for line in (include / "cutlass" / "version.h").read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "#define":
            numbers[words[1]] = words[2]
    return ".".join(numbers.get(f"CUTLASS_{part}", "?") for part in ("MAJOR", "MINOR", "PATCH"))


if __name__ == "__main__":
    print(find_cutlass(Path(sys.argv[1] if len(sys.argv) > 1 else "build"))[0])
