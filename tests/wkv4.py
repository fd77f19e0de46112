"""Inputs of RWKV-4's running average for the tests."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from cases import DTYPES
from checks import differentiate
from inputs import Inputs, Tensors, boundaries, state_dtype
from torch import Tensor

from lsm_cuda import reference

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


# ---- Both directions ----


def both_directions(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Vision-RWKV's attention by its definition."""
    T = k.shape[1]
    distance = (torch.arange(T)[:, None] - torch.arange(T)).abs().to(w.dtype)
    logits = k[:, None] - ((distance - 1) / T)[..., None] * w
    logits = torch.where(torch.eye(T).bool()[..., None], (u + k)[:, None], logits)
    return torch.einsum("btsd,bsd->btd", logits.softmax(2), v)


def draw_both(T: int, D: int, name: str) -> Inputs:
    """Keys up to ±80; rates from none to what leaves nothing of the token before."""
    rng = torch.Generator().manual_seed(T + D)
    dtype = DTYPES[name]
    wide = state_dtype(dtype)
    w = torch.rand(D, generator=rng) * 3 * T
    w[::3], w[1::7] = 0, 100.0 * T
    k, v, grad_o = torch.randn(3, 2, T, D, generator=rng)
    tensors = {"k": (30 * k).clamp(-80, 80).to(dtype), "v": v.to(dtype)}
    tensors |= {"w": w.to(wide), "u": torch.randn(D, generator=rng).to(wide)}
    return Inputs(tensors, grad_o=grad_o.to(dtype))


def both_results(call: Callable, x: Inputs) -> Tensors:
    """Of ``call(w, u, k, v)``, and the gradients."""

    def forward(y: Inputs) -> tuple[Tensor, None]:
        o = call(*(y.tensors[n] for n in "wukv"))
        return o if o.numel() else o + sum(0 * t.sum() for t in y.tensors.values()), None

    return differentiate(forward, x)


def both_expected(x: Inputs) -> tuple[Tensors, Tensors]:
    """In fp64 by the definition, and in fp32 by the recurrence."""
    truth = both_results(both_directions, x.map(lambda t: t.double()))
    return truth, both_results(reference.bi_wkv, x.map(lambda t: t.float()))
