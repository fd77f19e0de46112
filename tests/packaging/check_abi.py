#!/usr/bin/env python3
"""Checks that the built libraries depend on libtorch's stable C interface and nothing else of it.

    python tests/packaging/check_abi.py [LIBRARY ...]        # default: those of the lsm_cuda folder

That is what lets one wheel serve every Python >= 3.10 and every torch >= 2.11:
- undefined symbols come from the C and C++ runtimes (they carry a version) or are on the list of
  what torch 2.11 exports (allowed_symbols.txt): none of Python's, none of c10::, at:: or torch::;
- libtorch.so is NEEDED, because Python loads it where others do not see it; libcudart is not,
  since a torch may ship another one; no path of the build machine is left in;
- nothing newer than the glibc and libstdc++ of the wheel's platform.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALLOWED_SYMBOLS = Path(__file__).with_name("allowed_symbols.txt")
ALLOWED_LIBRARIES = {
    "libtorch.so",
    *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"),
    *("libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12,)}
ALWAYS_WEAK = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def output(*command: str | Path) -> list[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def allowed_symbols() -> dict[str, bool]:
    """Name -> may be absent (then the library must refer to it weakly)."""
    lines = ALLOWED_SYMBOLS.read_text().splitlines()
    entries = [line.split() for line in lines if line and not line.startswith("#")]
    return {name: kind == ["weak"] for name, *kind in entries}


def undefined_symbols(library: Path) -> list[tuple[str, str, str]]:
    """(name, version or "", nm's letter) of what the library wants from others."""
    found = []
    for line in output("nm", "-D", "--undefined-only", library):
        letter, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        found.append((name, version.lstrip("@"), letter))
    return found


def check_symbols(library: Path) -> list[str]:
    allowed = allowed_symbols()
    problems = []
    for name, version, letter in undefined_symbols(library):
        if version:
            family, _, number = version.partition("_")
            parts = tuple(int(n) for n in re.findall(r"\d+", number))
            if family not in NEWEST:
                problems.append(f"{name} comes from an unexpected library ({version})")
            elif parts > NEWEST[family]:
                problems.append(f"{name} needs {version}, newer than the wheel's platform")
        elif name in allowed:
            if allowed[name] and letter not in "wv":
                problems.append(f"{name} is missing from torch 2.11: it must be a weak reference")
        elif name not in ALWAYS_WEAK:
            problems.append(f"{name} is not on the list of symbols that torch 2.11 exports")
    return problems


def check_exports(library: Path) -> list[str]:
    names = [line.split()[-1] for line in output("nm", "-D", "--defined-only", library)]
    return [f"{name} is exported" for name in names if name.startswith(("Py", "_Py"))]


def check_needed(library: Path) -> list[str]:
    lines = output("readelf", "-d", "-W", library)
    tags = re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", "\n".join(lines))
    needed = {name for tag, name in tags if tag == "NEEDED"}
    problems = [f"{tag} {path} is left in" for tag, path in tags if tag != "NEEDED"]
    if "libtorch.so" not in needed:
        problems.append("libtorch.so is not NEEDED: its symbols are not found after import torch")
    return problems + [f"{name} must not be NEEDED" for name in sorted(needed - ALLOWED_LIBRARIES)]


def check(library: Path) -> list[str]:
    return [*check_symbols(library), *check_exports(library), *check_needed(library)]


def main(paths: list[str]) -> int:
    libraries = [Path(p) for p in paths] or sorted((ROOT / "lsm_cuda").glob("*.so"))
    if not libraries:
        print(
            "no library in lsm_cuda/: build the package first, or name the files", file=sys.stderr
        )
        return 2
    failed = False
    for library in libraries:
        problems = check(library)
        print(f"{library.name}: {'ok' if not problems else f'{len(problems)} problems'}")
        for problem in problems:
            print(f"  {problem}")
        failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
