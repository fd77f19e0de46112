"""What PyTorch scores in passes: a stretch of queries at a time, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator

_SCORES = 1 << 24  # numbers held at a time


def stretches(queries: int, numbers: int) -> Iterator[slice]:
    """Runs of queries that need ``numbers`` scores each; one, empty, of none."""
    step = max(1, min(queries, _SCORES // max(numbers, 1)))
    return (slice(t, min(t + step, queries)) for t in range(0, max(queries, 1), step))
