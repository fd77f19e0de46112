"""The public functions: names, defaults, and the examples in their docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
from cases import GLA, Case
from inputs import make_inputs

import lsm_cuda
from lsm_cuda import ops


def modules() -> list[str]:
    """Every module of the package that imports without optional dependencies."""
    found = ["lsm_cuda"]
    for info in pkgutil.walk_packages(lsm_cuda.__path__, "lsm_cuda."):
        if not info.name.startswith("lsm_cuda.cli") and not info.name.endswith("__main__"):
            found.append(info.name)
    return [name for name in found if not name.endswith(("._C", "._C_cuda"))]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = {"torch": torch, "lsm_cuda": lsm_cuda, "F": torch.nn.functional}
    return [t for t in finder.find(module, extraglobs=names) if t.examples]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output: list[str] = []
    for test in examples(importlib.import_module(name)):
        torch.manual_seed(0)
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)


@pytest.mark.parametrize("name", ["chunk_gla", "gla_step"])
def test_operators_have_an_example(name: str) -> None:
    function = getattr(ops, name)
    assert ">>>" in inspect.getdoc(function)
    documented = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter} (" in documented or f"{parameter}, " in documented, parameter


def test_signature_is_flas() -> None:
    """Calls written for FLA, positional ones too, mean the same here."""
    names = ["scale", "initial_state", "output_final_state"]
    for function, gate in ((ops.chunk_gla, "g"), (ops.fused_recurrent_gla, "gk")):
        parameters = list(inspect.signature(function).parameters)
        assert parameters[:7] == ["q", "k", "v", gate, *names]
        assert "cu_seqlens" in parameters
    parameters = list(inspect.signature(ops.fused_chunk_gla).parameters)
    assert parameters[:7] == ["q", "k", "v", "g", *names]


def test_three_names_one_result() -> None:
    x = make_inputs(Case(GLA, T=33, state="both", heads=(1, 2)))
    args = (*x.tensors.values(), 0.3, x.initial_state, True)
    results = [f(*args) for f in (ops.chunk_gla, ops.fused_chunk_gla, ops.fused_recurrent_gla)]
    for o, state in results[1:]:
        assert torch.equal(o, results[0][0])
        assert torch.equal(state, results[0][1])


def test_default_scale() -> None:
    x = make_inputs(Case(GLA, dims=(9, 4)))
    default, explicit = (ops.chunk_gla(**x.tensors, scale=s)[0] for s in (None, 9**-0.5))
    assert torch.equal(default, explicit)
    assert ops.chunk_gla(**x.tensors)[1] is None


def test_reverse_runs_time_backwards() -> None:
    x = make_inputs(Case(GLA, T=20, state="both"))
    q, k, v, g = x.tensors.values()
    o, state = ops.fused_recurrent_gla(
        q, k, v, g, initial_state=x.initial_state, output_final_state=True, reverse=True
    )
    flipped, expected = ops.chunk_gla(
        *(t.flip(1) for t in (q, k, v, g)), initial_state=x.initial_state, output_final_state=True
    )
    assert torch.equal(o, flipped.flip(1))
    assert torch.equal(state, expected)


def test_states_may_be_value_first() -> None:
    x = make_inputs(Case(GLA, T=20, dims=(8, 5), state="both"))
    kwargs = {"output_final_state": True}
    o, state = ops.chunk_gla(**x.tensors, initial_state=x.initial_state, **kwargs)
    turned = x.initial_state.transpose(-1, -2).contiguous()
    p, other = ops.chunk_gla(**x.tensors, initial_state=turned, state_v_first=True, **kwargs)
    assert torch.equal(o, p)
    assert torch.equal(state, other.transpose(-1, -2))


def test_step_allocates_only_its_output() -> None:
    """Nothing but the output appears while a decode step runs."""
    x = make_inputs(Case(GLA, T=1, dims=(64, 64), heads=(2, 4), batch=4, state="both"))
    token = {n: t[:, 0].contiguous() for n, t in x.tensors.items()}
    state = x.initial_state.clone()
    ops.gla_step(**token, state=state)
    with torch.profiler.profile(profile_memory=True) as profile:
        o = ops.gla_step(**token, state=state)
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    allocated = sum(size for size in sizes if size > 0)
    assert o.nbytes <= allocated < o.nbytes + 64
