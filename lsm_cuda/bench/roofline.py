"""What the machine could do at best: bandwidth of a copy, rate of a matrix product, measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .measure import Row

__all__ = ["ceilings", "floor_ms", "fraction"]


def ceilings(device: str, dtypes: tuple[torch.dtype, ...], seconds: float = 0.5) -> dict[str, Any]:
    """The machine's limits, by the best of several tries.

    ``bytes_per_second`` of a copy, read and write counted, and ``flops_per_second`` by dtype of a
    matrix product. On a CPU a convolution is tried too: torch takes the two from different
    libraries, and on some processors only one of them is fast.
    """
    large = device == "cuda"
    source = torch.randn((512 if large else 64) * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    copy = best(lambda: target.copy_(source), device, seconds)
    rates = {}
    n = 8192 if large else 1024
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rate = 2 * n**3 / best(functools.partial(torch.mm, a, b), device, seconds)
        if not large:
            x, kernel = (
                torch.randn(size).to(dtype) for size in ((1, 256, 32, 32), (256, 256, 3, 3))
            )
            flops = 2 * kernel.numel() * 30 * 30
            rate = max(rate, flops / best(functools.partial(F.conv2d, x, kernel), device, seconds))
        rates[str(dtype)[6:]] = rate
    return {"bytes_per_second": 2 * source.nbytes / copy, "flops_per_second": rates}


def best(run: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the fastest call."""
    times: list[float] = []
    run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def floor_ms(row: Row, environment: dict[str, Any]) -> tuple[float, str]:
    """Milliseconds below which no implementation can be, and which limit that is.

    Data that stay in a CPU's cache from call to call are not bound by memory.
    """
    limits = environment["ceilings"]
    compute = row["minimal_flops"] / limits["flops_per_second"][row["dtype"]]
    memory = row["minimal_bytes"] / limits["bytes_per_second"]
    if compute >= memory or row["minimal_bytes"] < environment["cache_bytes"]:
        return 1e3 * compute, "compute"
    return 1e3 * memory, "memory"


def fraction(row: Row, environment: dict[str, Any]) -> float:
    """The share of the floor in the time."""
    return floor_ms(row, environment)[0] / float(row["ms"])
