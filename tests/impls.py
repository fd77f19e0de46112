"""Where an operator runs: CPU kernels, CUDA kernels, and CUDA kernels on the host's emulator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from cases import Op
from checks import assert_same_bits, differentiate
from emulators import emulator, missing
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
    """A flavour of the emulator on CPU tensors; without autograd, so backward is called by hand.

    Every call runs under several schedules, which must agree to the last bit. Odd seeds interleave
    threads uniformly, even ones let one warp run ahead, 0 goes in order.
    """

    tensor_cores = True

    def __init__(
        self,
        name: str,
        flavour: str = "_emu",
        seeds: tuple[int, ...] = (1, 2, 3, 4),
        multiprocessors: int = 8,  # what launchers cut their work for
        architecture: int = 80,  # whose kernels they choose
    ) -> None:
        super().__init__(name)
        self.flavour = flavour
        self.seeds = seeds
        self.multiprocessors = multiprocessors
        self.architecture = architecture

    def absent(self) -> str | None:
        return missing(self.flavour)

    def raw(self, op: Op, kind: str):
        emulator(self.flavour)
        return op.raw(kind, f"lsm{self.flavour}")

    def under_every_seed(self, call: Callable[[], Tensors]) -> Tensors:
        """The results of ``call``, which must not depend on the schedule."""
        emu = emulator(self.flavour)
        emu.set_multiprocessors(self.multiprocessors)
        results: list[Tensors] = []
        for seed in self.seeds:
            emu.set_seed(seed)
            emu.set_residents(1 + seed % 4)
            emu.set_architecture(self.architecture)
            try:
                results.append(call())
            finally:
                emu.set_architecture(80)
                emu.set_residents(1)
            try:
                assert_same_bits(results[-1], results[0])
            except AssertionError as error:
                raise AssertionError(f"seeds {self.seeds[0]} and {seed}: {error}") from None
        return results[0]

    def forward(self, op: Op, x: Inputs) -> tuple[Tensor, Tensor | None]:
        results = self.under_every_seed(lambda: self.fwd(op, x))
        return results["o"], results.get("final_state")

    def run(self, op: Op, x: Inputs) -> Tensors:
        return self.under_every_seed(lambda: self.fwd(op, x) | self.bwd(op, x))

    def fwd(self, op: Op, x: Inputs) -> Tensors:
        o, state = self.raw(op, "fwd")(
            *x.tensors.values(), x.initial_state, x.cu_seqlens, scale_of(x.tensors, x.scale),
            x.output_final_state,
        )  # fmt: skip
        return {"o": o, "final_state": state} if x.output_final_state else {"o": o}

    def bwd(self, op: Op, x: Inputs) -> Tensors:
        *grads, dh0 = self.raw(op, "bwd")(
            *x.tensors.values(), x.initial_state, x.cu_seqlens, scale_of(x.tensors, x.scale),
            x.grad_o, x.grad_final_state,
        )  # fmt: skip
        results = {f"d{name}": d for name, d in zip(x.tensors, grads, strict=True)}
        return results if x.initial_state is None else results | {"dinitial_state": dh0}

    def step(self, op: Op, tensors: Tensors, state: Tensor, scale: float | None = None) -> Tensor:
        step, before = self.raw(op, "step"), state.clone()

        def call() -> Tensors:
            state.copy_(before)
            o = step(*tensors.values(), state, scale_of(tensors, scale))
            return {"o": o, "state": state.clone()}

        return self.under_every_seed(call)["o"]


def scale_of(tensors: Tensors, scale: float | None) -> float:
    return tensors["q"].shape[-1] ** -0.5 if scale is None else scale


IMPLS = {"cpu": Impl("cpu"), "emulator": Emulator("emulator"), "cuda": Cuda("cuda")}
