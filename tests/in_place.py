"""Operators of whole sequences that are kernels on CUDA alone: the emulator's in the place of the
CPU's, so that results and all gradients come by autograd."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from emulators import emulator
from families import Call_, Family, gradients, operator
from impls import Emulator, Impl
from inputs import Tensors


@contextlib.contextmanager
def in_place_of_cuda(flavour: str, module: ModuleType, operators: tuple[str, ...]) -> Iterator[Any]:
    """``operators`` of lsm on CPU tensors are this flavour's, and ``module`` asks for them."""
    emu = emulator(flavour)
    with torch.library._scoped_library("lsm", "IMPL") as library, pytest.MonkeyPatch.context() as m:
        m.setattr(module, "FINISHED", {"cpu"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some have a kernel for the CPU
            for name in operators:
                own = getattr(getattr(torch.ops, f"lsm{flavour}"), name).default
                library.impl(name, own, "CPU", allow_override=True)
        yield emu


def on(
    impl: Impl,
    module: ModuleType,
    operators: tuple[str, ...],
    family: Family,
    x: Call_,
    multiprocessors: int,
) -> Tensors:
    """Results and gradients; those of the emulator under every schedule."""
    if isinstance(impl, Emulator):
        emulated = Emulator("emulator", seeds=(1, 2), multiprocessors=multiprocessors)
        with in_place_of_cuda("_emu", module, operators):
            return emulated.under_every_seed(lambda: gradients(operator(family), family, x))
    tensors = {n: t.to(impl.device) for n, t in x.tensors.items()}
    states = None if x.states is None else tuple(s.to(impl.device) for s in x.states)
    cu_seqlens = None if x.cu_seqlens is None else x.cu_seqlens.to(impl.device)
    results = gradients(operator(family), family, Call_(tensors, states, cu_seqlens))
    return {n: t.cpu() for n, t in results.items()}


def of_cuda(test: Any) -> Any:
    test.only_impls = ("emulator", "cuda")
    return test
