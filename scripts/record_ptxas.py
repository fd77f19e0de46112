"""Compiler launcher for device files: runs nvcc and keeps what ptxas says of each kernel beside
the object."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    command = sys.argv[1:]
    start = time.monotonic()
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    seconds = time.monotonic() - start
    if "-o" in command and done.returncode == 0:
        target = Path(command[command.index("-o") + 1])
        target.with_name(target.name + ".ptxas").write_text(f"seconds {seconds:.1f}\n{done.stderr}")
    noise = ("ptxas info", "    0 bytes stack frame")
    for line in done.stderr.splitlines():
        if line.strip() and not line.startswith(noise):
            print(line, file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
