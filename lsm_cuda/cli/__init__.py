"""The command line ``lsm``. This file imports nothing that an extra brings."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Entry point; says which extra to install where the command line's packages are missing."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("typer", "rich"):
            raise
        print(
            f"lsm: the command line needs the {error.name} package: pip install 'lsm-cuda[cli]'",
            file=sys.stderr,
        )
        return 1
    app(prog_name="lsm")
    return 0
