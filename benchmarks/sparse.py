"""Sparse attention beside dense attention, in one run: what a pattern's share of pairs brings.

    python benchmarks/sparse.py --shape "B1 T8192 H4 K64" --dtype float32 --out sparse.json

Results are held to dense attention under the pattern's mask before anything is timed. A row has the
time, the FLOPs of the pairs attended to (4 K each; in a backward 10 K more), the bytes of every
argument and result once, and how many times longer dense attention takes. Patterns of a cache are
timed for one new token: their bytes are those of the keys and values that it attends to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lsm_cuda.bench.measure import CudaClock, HostClock, environment, race, summary
from lsm_cuda.bench.registry import Shape
from lsm_cuda.ops import AttnMask, BlockLists, block_sparse_attn, sparse_attn_decode

Pattern = tuple[BlockLists | None, AttnMask]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CAUSAL = AttnMask(causal=True)


def random_blocks(T: int, density: float) -> BlockLists:
    """A list per row of 64 queries, drawn without regard to position."""
    n = -(-T // 64)
    rng = torch.Generator().manual_seed(0)
    return BlockLists.from_bitmap(torch.rand(1, 1, n, n, generator=rng) < density, T, T)


def token_lists(T: int, share: int) -> BlockLists:
    """16 blocks of 64 keys per token, causal: the first, two local ones and drawn ones, which
    ``share`` neighbouring tokens have in common."""
    rng = torch.Generator().manual_seed(0)
    own = torch.arange(T) // 64
    drawn = torch.rand(-(-T // share), 13, generator=rng).repeat_interleave(share, 0)[:T]
    drawn = (drawn * (own + 1)[:, None]).long().clamp(max=own[:, None])
    blocks = torch.cat([torch.zeros(T, 1).long(), (own - 1)[:, None], own[:, None], drawn], 1)
    return BlockLists.from_indices(blocks[None, None], T, T, 1, 64)


PATTERNS: dict[str, Callable[[int], Pattern]] = {
    "dense": lambda T: (None, AttnMask()),
    "dense, by lists": lambda T: (random_blocks(T, 2.0), AttnMask()),
    "causal": lambda T: (None, CAUSAL),
    "10 % of blocks": lambda T: (random_blocks(T, 0.1), AttnMask()),
    "window 1024": lambda T: (None, AttnMask(causal=True, left=1023)),
    "16 blocks per token, shared by 4": lambda T: (token_lists(T, 4), CAUSAL),
    "16 blocks per token, independent": lambda T: (token_lists(T, 1), CAUSAL),
}
# Which keys one new token attends to.
CACHED: dict[str, Callable[[int], Pattern]] = {
    "cache": lambda T: (None, CAUSAL),
    "cache, window 1024": lambda T: (None, AttnMask(causal=True, left=1023)),
    "cache, 10 % of blocks": lambda T: (one_list(T, 10), CAUSAL),
}


def one_list(T: int, every: int) -> BlockLists:
    """Every so many-th block of 64 keys."""
    blocks = torch.arange(0, -(-T // 64), every)
    return BlockLists.from_indices(blocks[None, None, None], 1, T, 1, 64)


def make(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator(device).manual_seed(0)
    sizes = shape.sizes | {"HKV": shape.sizes.get("HKV", shape["H"]), "V": shape["K"]}
    dims = ("B T H K", "B T HKV K", "B T HKV V")
    q, k, v = (
        torch.randn([sizes[n] for n in d.split()], generator=rng, device=device).to(dtype)
        for d in dims
    )
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    gqa = {} if q.shape[2] == k.shape[2] else {"enable_gqa": True}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v, **gqa, **options).transpose(1, 2)


def check(name: str, shape: Shape, dtype: torch.dtype, device: str) -> None:
    """On a stretch, against dense attention in fp64 under the mask."""
    short = shape.at(min(shape["T"], 600))
    q, k, v = make(short, dtype, device)
    lists, mask = PATTERNS[name](short["T"])
    T = short["T"]
    lists = None if lists is None else lists.to(device)
    pairs = mask.to_dense(T, T, device) if lists is None else lists.to_dense(mask)
    some = pairs.any(-1, keepdim=True)
    exact = dense(q.double(), k.double(), v.double(), attn_mask=pairs | ~some)
    exact = torch.where(some.expand(q.shape[0], q.shape[2], T, 1).transpose(1, 2), exact, 0.0)
    error = (block_sparse_attn(q, k, v, lists, mask) - exact).norm() / exact.norm()
    if not error < TOLERANCE[dtype]:
        raise RuntimeError(f"{name}: relative error {error:.1e}; nothing is timed")


def pairs_of(name: str, T: int) -> float:
    lists, mask = PATTERNS[name](T)
    lists = random_blocks(T, 2.0) if lists is None else lists
    every = T * (T + 1) / 2 if mask.causal and mask.left < 0 else None
    if mask.left >= 0:  # a window
        n = mask.left + 1
        return sum(min(t + 1, n) for t in range(T))
    return lists.density(mask) * (every or T * T)


def training(run: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run(), leaves, grad)


def rows(
    name: str, shape: Shape, dtype: torch.dtype, device: str, seconds: float
) -> list[dict[str, Any]]:
    check(name, shape, dtype, device)
    T, K = shape["T"], shape["K"]
    q, k, v = (x.requires_grad_() for x in make(shape, dtype, device))
    lists, mask = PATTERNS[name](T)
    lists = None if lists is None else lists.expand(shape["B"]).to(device)
    grad = torch.randn_like(q)
    clock = CudaClock() if device == "cuda" else HostClock()

    def ours() -> Tensor:
        return block_sparse_attn(q, k, v, lists, mask)  # type: ignore[return-value]

    def theirs() -> Tensor:
        return dense(q, k, v, is_causal=mask.causal)

    found = []
    pairs = pairs_of(name, T) * shape["B"] * shape["H"]
    once = sum(x.numel() for x in (q, k, v, q)) * dtype.itemsize
    for mode in ("forward", "training"):
        runs = {"lsm_cuda": ours, "torch SDPA, dense": theirs}
        if mode == "training":
            runs = {n: training(f, [q, k, v], grad) for n, f in runs.items()}
        else:
            runs = {n: torch.no_grad()(f) for n, f in runs.items()}
        samplers = {n: clock.sampler(clock.kinds[-1], [f]) for n, f in runs.items()}
        times = {n: summary(t) for n, t in race(samplers, seconds).items()}
        ms = times["lsm_cuda"]["ms"]
        flops = pairs * (4 * K + (10 * K if mode == "training" else 0))
        found.append({
            "pattern": name, "shape": str(shape), "dtype": str(dtype)[6:], "mode": mode,
            "minimal_flops": flops, "minimal_bytes": once * (3 if mode == "training" else 1),
            "GFLOP/s": flops / ms / 1e6, "times": times,
            "dense / ours": times["torch SDPA, dense"]["ms"] / ms,
        })  # fmt: skip
    return found


def decode_row(
    name: str, shape: Shape, dtype: torch.dtype, device: str, seconds: float
) -> dict[str, Any]:
    T, K = shape["T"], shape["K"]
    q, k, v = make(shape, dtype, device)
    q, (lists, mask) = q[:, -1:], CACHED[name](T)
    lists = None if lists is None else lists.expand(shape["B"]).to(device)
    pairs = mask.to_dense(1, T, device) if lists is None else lists.to_dense(mask)
    exact = dense(q.double(), k.double(), v.double(), attn_mask=pairs.expand(1, 1, 1, T))
    error = (sparse_attn_decode(q, k, v, lists=lists, mask=mask) - exact).norm() / exact.norm()
    if not error < TOLERANCE[dtype]:
        raise RuntimeError(f"{name}: relative error {error:.1e}; nothing is timed")
    runs = {
        "lsm_cuda": lambda: sparse_attn_decode(q, k, v, lists=lists, mask=mask),
        "torch SDPA, dense": lambda: dense(q, k, v),
    }
    clock = CudaClock() if device == "cuda" else HostClock()
    samplers = {n: clock.sampler(clock.kinds[-1], [f]) for n, f in runs.items()}
    times = {n: summary(t) for n, t in race(samplers, seconds).items()}
    keys, ms = int(pairs.sum()) * shape["B"], times["lsm_cuda"]["ms"]
    flops = 4 * K * keys * shape["H"]
    return {
        "pattern": name, "shape": str(shape), "dtype": str(dtype)[6:], "mode": "decode",
        "minimal_flops": flops, "minimal_bytes": 2 * K * keys * k.shape[2] * dtype.itemsize,
        "GFLOP/s": flops / ms / 1e6, "times": times,
        "dense / ours": times["torch SDPA, dense"]["ms"] / ms,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="B1 T8192 H4 K64", help="sizes; HKV for fewer kv heads")
    parser.add_argument("--dtype", default="float32", choices=[str(d)[6:] for d in TOLERANCE])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--patterns", nargs="*", default=[*PATTERNS, *CACHED])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each implementation")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.patterns) - set(PATTERNS) - set(CACHED):
        known = ", ".join([*PATTERNS, *CACHED])
        parser.error(f"no pattern {', '.join(unknown)}; there are {known}")
    shape, dtype = Shape(options.shape), getattr(torch, options.dtype)
    result: dict[str, Any] = {"environment": environment(options.device), "rows": []}
    for name in options.patterns:
        given = (name, shape, dtype, options.device, options.seconds)
        for row in [decode_row(*given)] if name in CACHED else rows(*given):
            result["rows"].append(row)
            print(
                f"{row['mode']:9}{name:34}{row['times']['lsm_cuda']['ms']:10.2f} ms"
                f"{row['GFLOP/s']:9.0f} GFLOP/s   dense SDPA {row['dense / ours']:.2f} x",
                flush=True,
            )
            if options.out:
                options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
