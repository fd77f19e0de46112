"""Inputs of RWKV-4's running average for the tests."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

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


# ---- Both directions ----


def both_directions(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Vision-RWKV's attention by its definition, in fp64."""
    w, u, k, v = (t.double() for t in (w, u, k, v))
    T = k.shape[1]
    distance = (torch.arange(T)[:, None] - torch.arange(T)).abs().double()
    logits = k[:, None] - ((distance - 1) / T)[..., None] * w
    logits = torch.where(torch.eye(T).bool()[..., None], (u + k)[:, None], logits)
    return torch.einsum("btsd,bsd->btd", logits.softmax(2), v)


def recurrent_both(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same token after token in fp32, from either end, over the largest weight so far."""
    w, u, k, v = (t.float() for t in (w, u, k, v))
    B, T, D = k.shape

    def merge(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
        top = torch.maximum(a[2], b[2])
        x, y = (torch.exp(s[2] - top) for s in (a, b))
        return [x * a[0] + y * b[0], x * a[1] + y * b[1], top]

    def sums(order: range) -> list[list[Tensor]]:
        state = [k.new_zeros(B, D), k.new_zeros(B, D), k.new_full((B, D), -torch.inf)]
        found: list[list[Tensor]] = [[]] * T
        for t in order:
            found[t] = state
            token = [v[:, t], torch.ones_like(v[:, t]), k[:, t]]
            state = merge([state[0], state[1], state[2] - w / T], token)
        return found

    own = [v, torch.ones_like(v), k + u]
    past, future = sums(range(T)), sums(range(T - 1, -1, -1))
    rows = [merge(merge(past[t], [x[:, t] for x in own]), future[t]) for t in range(T)]
    return torch.stack([row[0] / row[1] for row in rows], 1)


def draw_both(T: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys up to ±80; rates from none to what leaves nothing of the token before."""
    generator = torch.Generator().manual_seed(T + D)
    w = torch.rand(D, generator=generator) * 3 * T
    w[::3], w[1::7] = 0, 100.0 * T
    u = torch.randn(D, generator=generator)
    k, v = torch.randn(2, 2, T, D, generator=generator)
    return w, u, (30 * k).clamp(-80, 80).to(dtype), v.to(dtype)


def assert_both(got: Tensor, x: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """As near as a recurrence in fp32, and the rounding of the result."""
    want = both_directions(*x)
    off = 2 * (recurrent_both(*x) - want).abs().max().item() + 1e-6
    torch.testing.assert_close(got.double(), want, atol=off, rtol=off + torch.finfo(x[2].dtype).eps)
