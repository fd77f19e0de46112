"""Registers, shared memory and spills of every kernel of the last CUDA build; fails if one spills.

python scripts/kernel_resources.py [build/cmake] [--markdown]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


@dataclass
class Kernel:
    file: str
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0


def read(log: Path) -> tuple[float, list[Kernel]]:
    seconds, kernels = 0.0, []
    file = log.name.removesuffix(".ptxas").removesuffix(".o")
    for line in log.read_text().splitlines():
        if line.startswith("seconds "):
            seconds = float(line.split()[1])
        elif match := ENTRY.search(line):
            kernels.append(Kernel(file, match[1], match[2]))
        elif kernels and (match := SPILL.search(line)):
            kernels[-1].stack = int(match[1])
            kernels[-1].spills = int(match[2]) + int(match[3])
        elif kernels and (match := USED.search(line)):
            kernels[-1].registers = int(match[1])
    return seconds, kernels


def demangle(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = (
        re.sub(r"\(lsm::(\w+)\)", r"\1 ", n.split("(lsm::")[0]) for n in done.stdout.splitlines()
    )
    return [re.sub(r"^void |lsm::|\(.*?\)", "", name).strip() for name in short]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("build", nargs="?", default="build/cmake", type=Path)
    arguments = parser.parse_args()
    logs = sorted(arguments.build.rglob("*.ptxas"))
    if not logs:
        print(f"no *.ptxas under {arguments.build}: build with CUDA first", file=sys.stderr)
        return 1
    kernels: list[Kernel] = []
    for log in logs:
        seconds, found = read(log)
        print(f"{log.name.removesuffix('.o.ptxas'):32} {seconds:6.1f} s {len(found):4} kernels")
        kernels += found
    for kernel, name in zip(kernels, demangle([k.name for k in kernels]), strict=True):
        print(
            f"{kernel.arch:7} {kernel.registers:4} registers {kernel.spills:5} B spilled  "
            f"{kernel.file}  {name}"
        )
    spilling = sum(k.spills > 0 for k in kernels)
    print(f"{len(kernels)} kernels, {spilling} spilling")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
