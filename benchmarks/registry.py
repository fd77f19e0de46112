"""What is measured: operators, shapes, the bytes and FLOPs no implementation can avoid, and peers.

A peer is found as an installed package, or skipped by name. Shapes are (B, T, H, K, V).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from lsm_cuda.ops import chunk_gla, gla_step

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} H{self.H} K{self.K} V{self.V}"

    @property
    def tokens(self) -> int:
        return self.B * self.T * self.H


@dataclass(frozen=True)
class Peer:
    """Another way to do the same, or what people use instead. ``same`` peers must agree in
    value."""

    name: str
    find: Callable[[], Callable[[Inputs], Tensor] | None]
    same: bool = True
    longest: dict[str, int] = field(default_factory=dict)  # mode -> T beyond which it is hopeless


@dataclass(frozen=True)
class Op:
    name: str
    make: Callable[[Shape, torch.dtype, str], Inputs]
    forward: Callable[[Inputs], Tensor]
    step: Callable[[Inputs], Tensor]
    peers: tuple[Peer, ...]

    def minimal_bytes(self, s: Shape, item: int, gate_item: int, mode: str) -> int:
        """Every input read once, every output written once (docs/math.md, section 2)."""
        qk, v, g = 2 * s.tokens * s.K * item, s.tokens * s.V * item, s.tokens * s.K * gate_item
        if mode == "forward":
            return qk + 2 * v + g
        if mode == "backward":  # reads q k v g dO, writes dq dk dv dg
            return 2 * qk + 3 * v + 2 * g
        state = s.B * s.H * s.K * s.V * 4
        return 2 * state + (qk + 2 * v + g) // max(s.T, 1)

    def recurrence_flops(self, s: Shape, mode: str) -> int:
        """Decay, write and read of the state, token by token; the backward walks two states."""
        once = s.tokens * s.K * s.V * 5
        return {"forward": once, "backward": 3 * once, "step": once // max(s.T, 1)}[mode]


def gla_inputs(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    tensors = {
        "q": normal(s.B, s.T, s.H, s.K),
        "k": normal(s.B, s.T, s.H, s.K),
        "v": normal(s.B, s.T, s.H, s.V),
        "g": F.logsigmoid(normal(s.B, s.T, s.H, s.K)) / 16,
    }
    return {
        name: t.to(device, torch.float32 if name == "g" else dtype) for name, t in tensors.items()
    }


def fla_naive() -> ModuleType | None:
    """fla/ops/gla/naive.py by path: importing fla itself needs triton."""
    root = os.environ.get("LSM_FLA_DIR")
    if root is None:
        spec = importlib.util.find_spec("fla")
        root = (
            spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
        )
    path = Path(root or "") / "ops" / "gla" / "naive.py"
    if root is None or not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("fla_naive_gla", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def naive_recurrent() -> Callable[[Inputs], Tensor] | None:
    if (module := fla_naive()) is None:
        return None
    return lambda x: module.naive_recurrent_gla(x["q"], x["k"], x["v"], x["g"])[0]


def fla_chunk() -> Callable[[Inputs], Tensor] | None:
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    try:
        from fla.ops.gla import chunk_gla as fla_chunk_gla
    except ImportError:
        return None
    return lambda x: fla_chunk_gla(x["q"], x["k"], x["v"], x["g"])[0]


def sdpa(x: Inputs) -> Tensor:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


OPS = {
    "gla": Op(
        name="gla",
        make=gla_inputs,
        forward=lambda x: chunk_gla(x["q"], x["k"], x["v"], x["g"])[0],
        step=lambda x: gla_step(x["q"][:, 0], x["k"][:, 0], x["v"][:, 0], x["g"][:, 0], x["state"]),
        peers=(
            Peer("FLA chunk_gla (Triton)", fla_chunk),
            Peer(
                "FLA naive_recurrent_gla",
                naive_recurrent,
                longest={"forward": 2048, "backward": 2048},
            ),
            Peer("torch SDPA, causal", lambda: sdpa, same=False),
        ),
    )
}

SHAPES = {
    "cpu": [Shape(1, T, 8, 64, 64) for T in (512, 2048, 8192)] + [Shape(1, 2048, 8, 128, 128)],
    "cuda": [
        Shape(1, 32768, 32, 128, 128),
        Shape(8, 4096, 16, 128, 128),
        Shape(1, 2048, 32, 128, 128),
        Shape(1, 256, 32, 128, 128),
        Shape(1, 65536, 4, 128, 128),
    ],
}
