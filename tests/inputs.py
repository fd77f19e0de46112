"""Seeded inputs of a case, in the layouts users produce."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import Case
from torch import Tensor
from torch.nn.functional import logsigmoid

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call and what flows back into its results."""

    tensors: Tensors
    grad_o: Tensor
    scale: float | None = None
    initial_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    grad_final_state: Tensor | None = None  # None: the final state is not asked for

    @property
    def output_final_state(self) -> bool:
        return self.grad_final_state is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, which come first under any name."""
        return next(iter(self.tensors.values())).dtype

    @property
    def state_dtype(self) -> torch.dtype:
        return state_dtype(self.dtype)

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """Every floating tensor through f; boundaries stay."""

        def maybe(x: Tensor | None) -> Tensor | None:
            return None if x is None else f(x)

        return replace(
            self,
            tensors={name: f(x) for name, x in self.tensors.items()},
            grad_o=f(self.grad_o),
            initial_state=maybe(self.initial_state),
            grad_final_state=maybe(self.grad_final_state),
        )

    def to(self, device: str) -> Inputs:
        cu = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return replace(self.map(lambda x: move(x, device)), cu_seqlens=cu)

    def leaves(self) -> Inputs:
        """A copy that shares storage and strides, whose differentiable arguments require grad."""
        h0 = self.initial_state
        return replace(
            self,
            tensors={name: x.detach().requires_grad_() for name, x in self.tensors.items()},
            initial_state=None if h0 is None else h0.detach().requires_grad_(),
        )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def move(x: Tensor, device: str) -> Tensor:
    """``x`` on another device with the strides it has here."""
    if x.device.type == device:
        return x
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size = last + 1 if x.numel() else 0
    flat = x.as_strided((size,), (1,), x.storage_offset()).to(device)
    return flat.as_strided(x.shape, x.stride())


def gates(pattern: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Log decays: a constant, or one of the mixtures that models meet."""
    noise = torch.randn(shape, generator=rng, dtype=torch.float64)
    if pattern == "mixed":  # what a trained gate looks like
        return logsigmoid(noise) / 16
    if pattern == "resets":  # one token in a hundred forgets nearly everything
        at = torch.rand(shape[:-1], generator=rng)[..., None] < 0.01
        return torch.where(at, -80.0, logsigmoid(noise) / 16)
    if pattern == "positive":  # a gate that slipped over zero: up to 1 % growth per token
        return 0.01 * torch.rand(shape, generator=rng, dtype=torch.float64)
    return torch.full(shape, float(pattern), dtype=torch.float64)


def drawn(kind: str, noise: Tensor, before: Tensors) -> Tensor:
    """A tensor made of normal ``noise``, maybe of the tensors drawn before it."""
    if kind == "unit":  # vectors of length 1
        return torch.nn.functional.normalize(noise, dim=-1)
    if kind == "strength":  # in (0, 1)
        return noise.sigmoid()
    share = noise[..., :1].sigmoid()
    if kind == "shrunk k":
        return share * before["k"]
    if kind == "against a":
        return -share * before["a"]
    return noise


def boundaries(T: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Six sequences in T tokens: the first, the last and one in between are empty."""
    a, b = T // 3, T // 2 + T // 5
    return torch.tensor([0, 0, a, a, max(a, b), T, T], dtype=dtype)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` at other strides; only "expanded" changes them (to the first token's)."""
    if layout == "transposed" and x.dim() == 4:  # heads first in memory
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # every second column of a wider tensor
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
    if layout == "expanded" and x.dim() == 4 and x.shape[1]:
        return x[:, :1].expand(x.shape)
    if layout == "offset":  # rows that start off any alignment
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    return x


def make_inputs(case: Case) -> Inputs:
    rng = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    cu = boundaries(case.T, getattr(torch, case.batch)) if case.varlen else None
    B = 1 if case.varlen else case.batch
    sizes = {"B": B, "T": case.T, "H": case.heads[0], "HV": case.heads[1]}
    sizes |= {"K": case.dims[0], "V": case.dims[1], "N": B if cu is None else len(cu) - 1}

    def shape(dims: str) -> tuple[int, ...]:
        return tuple(sizes[d] for d in dims.split())

    def normal(dims: str, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape(dims), generator=rng, dtype=torch.float64).to(dtype)

    tensors: Tensors = {}
    for name, dims in case.op.tensors.items():
        is_gate = name in (*case.op.gates, "beta")
        if name in case.op.gates:
            x = gates(case.gate, shape(dims), rng)
        else:
            x = drawn(case.op.draw.get(name, "normal"), normal(dims, torch.float64), tensors)
        x = x.to(case.gate_dtype if is_gate else case.torch_dtype)
        # Keys and values repeat a row. A gate that did would turn "mixed" and "resets" into a
        # constant; queries that did would all read the same sum, whose cancellation no average
        # over tokens hides.
        layout = (
            "contiguous" if case.layout == "expanded" and (is_gate or name == "q") else case.layout
        )
        tensors[name] = lay_out(x, layout)
    state = state_dtype(case.torch_dtype)
    return Inputs(
        tensors,
        grad_o=lay_out(
            normal(case.op.tensors["v"], case.torch_dtype),
            "contiguous" if case.layout == "expanded" else case.layout,
        ),
        scale=case.scale,
        initial_state=normal(case.op.state, state) if case.state in ("initial", "both") else None,
        cu_seqlens=cu,
        grad_final_state=normal(case.op.state, state) if case.state in ("final", "both") else None,
    )
