"""Where an operator runs: CPU kernels, CUDA kernels, and CUDA kernels on the host's emulator."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from cases import Op
from checks import differentiate
from inputs import Inputs, Tensors
from torch import Tensor

import lsm_cuda


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Impl:
    """An implementation behind one interface: forward, forward with gradients, and one token."""

    device = "cpu"
    tensor_cores = False  # K, V <= 256, no fp64

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    def absent(self) -> str | None:
        """Why this implementation cannot run here, or None if it can."""
        return None

    def forward(self, op: Op, x: Inputs) -> tuple[Tensor, Tensor | None]:
        return op.chunk(
            **x.tensors,
            scale=x.scale,
            initial_state=x.initial_state,
            output_final_state=x.output_final_state,
            cu_seqlens=x.cu_seqlens,
        )

    def run(self, op: Op, x: Inputs) -> Tensors:
        """Results and gradients, on the CPU."""
        with threads(2):
            results = differentiate(functools.partial(self.forward, op), x.to(self.device))
        return {name: t.cpu() for name, t in results.items()}

    def step(self, op: Op, tensors: Tensors, state: Tensor, scale: float | None = None) -> Tensor:
        """One token; ``state``, on this implementation's device, is updated in place."""
        tensors = {name: t.to(self.device) for name, t in tensors.items()}
        return op.step(**tensors, state=state, scale=scale).cpu()

    def raw(self, op: Op, kind: str):
        return op.raw(kind)


class Cuda(Impl):
    device = "cuda"
    tensor_cores = True

    def absent(self) -> str | None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        why = lsm_cuda.build_info()["libraries"]["_C_cuda"]
        return None if why == "loaded" else f"CUDA kernels: {why}"


class Emulator(Impl):
    """torch.ops.lsm_emu on CPU tensors; without autograd, so backward is called by hand."""

    tensor_cores = True
    broken: ImportError | None = None

    @functools.cache  # noqa: B019  (one object per process)
    def absent(self) -> str | None:
        root = Path(__file__).resolve().parent.parent
        sys.path.insert(0, os.environ.get("LSM_EMU_DIR", str(root / "build" / "emulator")))
        try:
            importlib.import_module("_emu")
        except ModuleNotFoundError:
            return "the emulator is not built (module _emu not found)"
        except (
            ImportError
        ) as error:  # built, but not loadable: that fails every test, it skips none
            self.broken = error
        finally:
            del sys.path[0]
        return None

    def raw(self, op: Op, kind: str):
        if self.broken:
            raise self.broken
        return op.raw(kind, "lsm_emu")

    def forward(self, op: Op, x: Inputs) -> tuple[Tensor, Tensor | None]:
        scale = x.tensors["q"].shape[-1] ** -0.5 if x.scale is None else x.scale
        o, state = self.raw(op, "fwd")(
            *x.tensors.values(), x.initial_state, x.cu_seqlens, scale, x.output_final_state
        )
        return o, state if x.output_final_state else None

    def run(self, op: Op, x: Inputs) -> Tensors:
        o, state = self.forward(op, x)
        scale = x.tensors["q"].shape[-1] ** -0.5 if x.scale is None else x.scale
        *grads, dh0 = self.raw(op, "bwd")(
            *x.tensors.values(),
            x.initial_state, x.cu_seqlens, scale, x.grad_o, x.grad_final_state,
        )  # fmt: skip
        results = {"o": o} if state is None else {"o": o, "final_state": state}
        results |= {f"d{name}": d for name, d in zip(x.tensors, grads, strict=True)}
        return results if x.initial_state is None else results | {"dinitial_state": dh0}

    def step(self, op: Op, tensors: Tensors, state: Tensor, scale: float | None = None) -> Tensor:
        scale = tensors["q"].shape[-1] ** -0.5 if scale is None else scale
        return self.raw(op, "step")(*tensors.values(), state, scale)


IMPLS = {"cpu": Impl("cpu"), "emulator": Emulator("emulator"), "cuda": Cuda("cuda")}
