"""Efficient sequence mixing: linear attention, gated scans, delta rules and sparse attention, on
CPU and GPU."""

from __future__ import annotations

from . import _library

_library.load()

from . import ops  # noqa: E402
from ._library import build_info  # noqa: E402
from ._version import __version__  # noqa: E402

__all__ = ["__version__", "build_info", "ops"]
