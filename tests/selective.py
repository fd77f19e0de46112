"""Inputs of the selective scan for the tests."""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from checks import differentiate
from inputs import Inputs, boundaries
from scans import wide

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "c64": torch.float32,
    "c128": torch.float64,
}


def draw(T: int, D: int, S: int, groups: int | str, extras: str, batch: int | str, dtype: str):
    seed = zlib.crc32(f"{T} {D} {S} {groups} {extras} {batch}".encode())
    rng = torch.Generator().manual_seed(seed)
    is_complex = dtype.startswith("c")
    plain, full = DTYPES[dtype], torch.float64 if dtype in ("f64", "c128") else torch.float32

    def normal(*shape: int, number: bool = False) -> torch.Tensor:
        kind = torch.complex128 if number and is_complex else torch.float64
        return torch.randn(shape, generator=rng, dtype=kind)

    def to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (
            wide(x, torch.float64 if dtype == torch.float64 else torch.float32)
            if (x.is_complex())
            else x.to(dtype)
        )

    packed = isinstance(batch, str)
    cu = boundaries(T, getattr(torch, batch)) if packed else None
    rows = 1 if packed else batch
    N = rows if cu is None else len(cu) - 1
    A = normal(D, S, number=True)
    A = torch.complex(-A.real.exp(), A.imag) if is_complex else -A.exp()
    G = groups if isinstance(groups, int) else 1
    by_channel = groups if isinstance(groups, str) else ""
    tensors = {"u": to(normal(rows, T, D), plain), "dt": to(normal(rows, T, D).sigmoid(), plain)}
    tensors["A"] = to(A, full)
    for name in "BC":
        one = name in by_channel
        x = normal(D, S, number=True) if one else normal(rows, T, G, S, number=True)
        tensors[name] = to(x, full if one else plain)
    if "d" in extras:
        tensors["D"] = to(normal(D), full)
    if "z" in extras:
        tensors["z"] = to(normal(rows, T, D), plain)
    if "b" in extras:
        tensors["dt_bias"] = to(normal(D), full)
    return Inputs(
        tensors,
        grad_o=to(normal(rows, T, D), plain),
        initial_state=to(normal(N, D, S, number=True), full),
        cu_seqlens=cu,
        grad_final_state=to(normal(N, D, S, number=True), full),
    ), "s" in extras


def channels_first(x: Inputs, names: str = "u dt z B C grad_o") -> Inputs:
    """The same tensors, tokens contiguous in those named."""

    def turn(name: str, t: torch.Tensor) -> torch.Tensor:
        of_tokens = name in names.split() and t.dim() > 2
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if of_tokens else t

    tensors = {name: turn(name, t) for name, t in x.tensors.items()}
    return replace(x, tensors=tensors, grad_o=turn("grad_o", x.grad_o))


def walk(T: int) -> torch.Tensor:
    """An order of T tokens."""
    return torch.randperm(T, generator=torch.Generator().manual_seed(T))


def results(call, x: Inputs, order: torch.Tensor | None = None):  # type: ignore[no-untyped-def]
    def forward(y: Inputs):  # type: ignore[no-untyped-def]
        o, state = call(
            **y.tensors, initial_state=y.initial_state, cu_seqlens=y.cu_seqlens, order=order
        )
        nothing = 0 if o.numel() else sum(0 * t.sum() for t in y.tensors.values())
        return o + (nothing.real if torch.is_tensor(nothing) else 0), state + nothing

    return differentiate(forward, x)
