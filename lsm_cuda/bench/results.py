"""Results on disk: one json per device, and one of its default allocator."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["Record", "save"]

# {"environment": …, "rows": …}, and "items" where gpu_suite.py made it
Record = dict[str, Any]


def save(record: Record, out: Path, title: str = "ops") -> Path:
    """Writes ``OUT/<device>/<title>.json``, whole or not at all."""
    where = record["environment"]
    name = "emulator" if where.get("emulated") else where.get("gpu", "cpu" if where else "unknown")
    folder = out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{title}.json", folder / f"{title}.json.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    return path
