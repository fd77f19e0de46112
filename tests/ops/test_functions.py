"""The public functions: names, defaults, and the examples in their docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
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


DOCUMENTED = [
    *("chunk_gla", "gla_step", "chunk_rwkv6", "rwkv6_step", "chunk_lightnet", "lightnet_step"),
    *("chunk_hgrn2", "hgrn2_step", "chunk_regla", "regla_step", "chunk_gsa", "gsa_step"),
    *("chunk_abc", "abc_step", "chunk_based", "based_step", "chunk_delta_rule", "chunk_kda"),
    *("chunk_gated_delta_rule", "chunk_comba", "chunk_longhorn", "chunk_dplr_delta_rule"),
    "chunk_mesa_net",
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_operators_have_an_example(name: str) -> None:
    function = getattr(ops, name)
    assert ">>>" in inspect.getdoc(function)
    documented = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}( \(|, )", documented), parameter


# Arguments of FLA's functions in order, up to those that only its kernels have.
QKV = "q k v"
STATE = "initial_state output_final_state"
FLA = {
    "chunk_gla": f"{QKV} g scale {STATE} state_v_first cu_seqlens",
    "fused_chunk_gla": f"{QKV} g scale {STATE}",
    "fused_recurrent_gla": f"{QKV} gk gv scale {STATE} reverse state_v_first cu_seqlens",
    "chunk_rwkv6": f"r k v w u scale {STATE} cu_seqlens",
    "fused_recurrent_rwkv6": f"r k v w u scale {STATE} reverse cu_seqlens",
    "chunk_lightnet": f"{QKV} scale {STATE} state_v_first cu_seqlens",
    "fused_recurrent_lightnet": f"{QKV} scale {STATE} state_v_first cu_seqlens",
    "chunk_gsa": f"{QKV} s g scale {STATE} checkpoint_level cu_seqlens",
    "fused_recurrent_gsa": f"{QKV} s g scale {STATE} reverse cu_seqlens",
    "chunk_abc": f"{QKV} s {STATE}",
    "parallel_based": f"{QKV} scale use_norm",
    "fused_chunk_based": f"{QKV} scale use_norm",
    "parallel_rebased": f"{QKV} eps use_scale use_normalize return_both",
}


@pytest.mark.parametrize("name", FLA)
def test_signature_is_flas(name: str) -> None:
    """Calls written for FLA, positional ones too, mean the same here."""
    expected = FLA[name].split()
    assert list(inspect.signature(getattr(ops, name)).parameters)[: len(expected)] == expected


def test_three_names_one_result() -> None:
    x = make_inputs(Case(GLA, T=33, state="both", heads=(1, 2)))
    args = tuple(x.tensors.values())
    rest = {"scale": 0.3, "initial_state": x.initial_state, "output_final_state": True}
    functions = (ops.chunk_gla, ops.fused_chunk_gla, ops.fused_recurrent_gla)
    results = [f(*args, **rest) for f in functions]
    for o, state in results[1:]:
        assert torch.equal(o, results[0][0])
        assert torch.equal(state, results[0][1])


def test_default_scale() -> None:
    x = make_inputs(Case(GLA, dims=(9, 4)))
    default, explicit = (ops.chunk_gla(**x.tensors, scale=s)[0] for s in (None, 9**-0.5))
    assert torch.equal(default, explicit)
    assert ops.chunk_gla(**x.tensors)[1] is None


REVERSIBLE = {
    "fused_recurrent_gla": (ops.chunk_gla, "q k v g", 1),
    "fused_recurrent_rwkv6": (ops.chunk_rwkv6, "q k v g u", 1),
    "fused_recurrent_gsa": (ops.chunk_gsa, "q k v s g", 2),
}


@pytest.mark.parametrize("cu_seqlens", [None, [0, 7, 7, 20]])
@pytest.mark.parametrize("name", REVERSIBLE)
def test_reverse_runs_time_backwards(name: str, cu_seqlens: list[int] | None) -> None:
    """In each sequence by itself."""
    chunk, arguments, states = REVERSIBLE[name]
    N, T, H, D = 1 if cu_seqlens is None else 3, 20, 2, 8
    rng = torch.Generator().manual_seed(0)
    x = {n: torch.randn(1, T, H, D, generator=rng) for n in arguments.split()}
    x |= {"g": -x["g"].abs()} | ({"u": x["u"][0, 0]} if "u" in x else {})
    initial = tuple(torch.randn(N, H, D, D, generator=rng) for _ in range(states))
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens)

    def call(f, initial, cu, *args, **rest):  # type: ignore[no-untyped-def]
        initial = initial if states > 1 else initial[0]
        o, final = f(*args, initial_state=initial, output_final_state=True, cu_seqlens=cu, **rest)
        return o, final if states > 1 else (final,)

    o, final = call(getattr(ops, name), initial, cu, *x.values(), reverse=True)
    for n, (start, end) in enumerate(itertools.pairwise(cu_seqlens or [0, T])):
        own = (t if t.dim() == 2 else t[:, start:end].flip(1) for t in x.values())
        p, ends = call(chunk, tuple(s[n, None] for s in initial), None, *own)
        torch.testing.assert_close(o[:, start:end], p.flip(1))
        for got, want in zip(final, ends, strict=True):
            torch.testing.assert_close(got[n, None], want)


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
