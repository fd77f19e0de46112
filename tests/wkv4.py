"""Inputs of RWKV-4's running average for the tests."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from cases import DTYPES
from checks import differentiate
from inputs import Inputs, Tensors, boundaries, state_dtype
from torch import Tensor

# T, D, rows or the dtype of cu_seqlens, of keys, carried states
Shape = tuple[int, int, int | str, float, bool]
SHAPES: list[Shape] = [
    (1, 8, 2, 1.0, False),
    (37, 20, 2, 1.0, True),
    (70, 33, "int32", 8.0, True),
    (64, 6, "int64", 1.0, False),
    (100, 16, 1, 27.0, False),
    (0, 8, 2, 1.0, True),
]


def draw(T: int, D: int, batch: int | str, scale: float, carried: bool, dtype: str):
    """Inputs, and the scale of the states that they begin with, or None."""
    rng = torch.Generator().manual_seed(zlib.crc32(f"{T} {D} {batch} {scale}".encode()))
    plain = DTYPES[dtype]
    full = state_dtype(plain)
    packed = isinstance(batch, str)
    cu = boundaries(T, getattr(torch, batch)) if packed else None
    rows = 1 if packed else batch
    N = rows if cu is None else len(cu) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    k = (scale * normal(rows, T, D)).clamp(-80, 80)
    tensors = {"k": k.to(plain), "v": normal(rows, T, D).to(plain)}
    tensors |= {"w": (normal(D) - 1).to(full), "u": normal(D).to(full)}
    if carried:
        tensors["numerator"] = normal(N, D).to(full)
        tensors["denominator"] = (normal(N, D).abs() + 0.5).to(full)
    inputs = Inputs(
        tensors,
        grad_o=normal(rows, T, D).to(plain),
        cu_seqlens=cu,
        grad_final_state=normal(2, N, D).to(full) if carried else None,
    )
    return inputs, normal(N, D).to(full) if carried else None


def state_of(tensors: Tensors, scale: Tensor | None):
    if scale is None:
        return None
    return tensors["numerator"], tensors["denominator"], scale


def sums(state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What a state means, whatever its scale."""
    return torch.stack(state[:2]) * state[2].exp()


def results(call: Callable, x: Inputs, scale: Tensor | None) -> Tensors:
    """Of ``call(w, u, k, v, state, cu_seqlens)``."""

    def forward(y: Inputs) -> tuple[Tensor, Tensor | None]:
        t = y.tensors
        h0 = None if scale is None else state_of(t, scale.to(t["w"].dtype))
        o, state = call(*(t[n] for n in "wukv"), h0, y.cu_seqlens)
        nothing = 0 if o.numel() else sum(0 * t.sum() for t in t.values())
        return o + nothing, sums(state) + nothing if y.output_final_state else None

    return differentiate(forward, x)
