"""Every operator around the chunk engine: its definition, its gradients, and the laws."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from families import (
    FAMILIES,
    Call_,
    Family,
    assert_rule,
    definition,
    draw,
    flat,
    gradients,
    operator,
    packed,
    upstream,
)

pytestmark = pytest.mark.parametrize("family", FAMILIES, ids=str)

BOUNDARIES = [0, 0, 9, 9, 27, 40]  # the first and one in between are empty
SMALL = {"K": 5, "V": 6, "M": 7, "B": 1}

CASES = {
    "states": {},
    "no state": {"states": False},
    "one token": {"T": 1},
    "long": {"T": 100, **SMALL},
    "fp64": {"dtype": torch.float64},
    "bf16": {"dtype": torch.bfloat16, "T": 70},
    "fp16": {"dtype": torch.float16},
    "packed": {"T": 40, "cu_seqlens": BOUNDARIES},
    "packed, no state": {"T": 40, "cu_seqlens": BOUNDARIES, "states": False},
    "strong gates": {"gate": "-8"},
    "extreme gates": {"gate": "-80"},
    "gates of -inf": {"gate": "-inf"},
    "no gate": {"gate": "0"},
}


@pytest.mark.parametrize("case", CASES)
def test_definition(family: Family, case: str) -> None:
    """Outputs, final states and all gradients."""
    x = draw(family, **CASES[case])
    assert_rule(gradients(operator(family), family, x), definition(family, x), x)


test_definition.applies = lambda family, case: (
    "gate" not in case or any("gate" in dims for dims in family.tensors.values())
)


@pytest.mark.parametrize("at", [1, 16, 36])
def test_split_is_whole(family: Family, at: int) -> None:
    """The state hands on what the second part needs, and its gradient what the first part does."""
    x = draw(family, states=False)
    constant = {n for n, dims in family.tensors.items() if " T " not in dims}

    def halves(initial_state, cu_seqlens, **tensors):  # type: ignore[no-untyped-def]
        first, second = (
            {n: t if n in constant else t[:, part] for n, t in tensors.items()}
            for part in (slice(at), slice(at, None))
        )
        o, state = family.chunk(**first, output_final_state=True)
        p, state = family.chunk(**second, initial_state=state, output_final_state=True)
        return torch.cat([o, p], 1), state if family.state else None

    assert_rule(gradients(halves, family, x), definition(family, x), x)


def steps(family: Family, x: Call_) -> tuple[torch.Tensor, ...]:
    constant = {n for n, dims in family.tensors.items() if " T " not in dims}
    _, state = family.chunk(**empty(family, x), output_final_state=True)
    states = flat(state) if x.states is None else tuple(s.clone() for s in x.states)
    T = next(iter(x.tensors.values())).shape[1]
    tokens = []
    for t in range(T):
        token = {n: y if n in constant else y[:, t] for n, y in x.tensors.items()}
        tokens.append(family.step(**token, state=states if len(states) > 1 else states[0]))
    return torch.stack(tokens, 1), *states


def empty(family: Family, x: Call_) -> dict[str, torch.Tensor]:
    """No token at all."""
    constant = {n for n, dims in family.tensors.items() if " T " not in dims}
    return {n: t if n in constant else t[:, :0] for n, t in x.tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("states", [True, False], ids=["states", "no state"])
def test_steps_are_chunk(family: Family, states: bool, dtype: torch.dtype) -> None:
    x = draw(family, states=states, dtype=dtype)
    o, *finals = steps(family, x)
    results = {"o": o}
    if family.state:
        results |= {f"final_state {i}": s for i, s in enumerate(finals)}
    assert_rule(results, definition(family, x), x)


def test_no_token(family: Family) -> None:
    """States pass through unchanged."""
    x = draw(family)
    o, state = family.chunk(
        **empty(family, x), initial_state=packed(family, x.states), output_final_state=True
    )
    assert o.shape[1] == 0
    for got, want in zip(flat(state), x.states or (), strict=False):
        torch.testing.assert_close(got, want)


NOTHING = {
    "empty batch": {"B": 0},
    "no token": {"T": 0},
    "empty sequences": {"T": 0, "cu_seqlens": [0, 0, 0]},
    "no sequence": {"T": 0, "cu_seqlens": [0]},
}


@pytest.mark.parametrize("states", [True, False], ids=["states", "no state"])
@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_do(family: Family, case: str, states: bool) -> None:
    """Empty results of the right shapes, and gradients of zero but for the states'."""
    x = draw(family, states=states, **NOTHING[case])
    results = gradients(operator(family), family, x)
    assert not results["o"].numel()
    for name, t in x.tensors.items():
        assert results[f"d{name}"].shape == t.shape
        assert not results[f"d{name}"].any()
    for i, s in enumerate(x.states or ()):
        assert results[f"final_state {i}"].shape == s.shape
        assert results[f"dinitial_state {i}"].isfinite().all()


def test_strides_make_no_difference(family: Family) -> None:
    x = draw(family)
    strided = {n: torch.stack([t, t], -1)[..., 0] for n, t in x.tensors.items()}
    y = dataclasses.replace(x, tensors=strided)
    a, b = (gradients(operator(family), family, z) for z in (x, y))
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}")


def test_inference_mode(family: Family) -> None:
    x = draw(family)
    with torch.inference_mode():
        o, _ = family.chunk(**x.tensors, initial_state=packed(family, x.states))
    assert o.is_inference()


def test_sequences_do_not_touch(family: Family) -> None:
    """NaN in one packed sequence leaves the others' bits alone, forward and backward."""
    x = draw(family, T=40, cu_seqlens=BOUNDARIES)
    inside = slice(9, 27)
    poisoned = dataclasses.replace(x, tensors={n: t.clone() for n, t in x.tensors.items()})
    touched = [n for n, dims in family.tensors.items() if " T " in dims]
    for name in touched:
        poisoned.tensors[name][:, inside] = torch.nan
    clean, dirty = (gradients(operator(family), family, y) for y in (x, poisoned))
    for name in ["o", *(f"d{n}" for n in touched)]:
        keep = torch.ones(40, dtype=torch.bool)
        keep[inside] = False
        assert torch.equal(clean[name][:, keep], dirty[name][:, keep]), name
    assert dirty["o"][:, inside].isnan().all()
    for name in (n for n in clean if "state" in n):
        keep = torch.arange(len(BOUNDARIES) - 1) != 3
        assert torch.equal(clean[name][keep], dirty[name][keep]), name


def test_future_does_not_reach_the_past(family: Family) -> None:
    """Causal to the last bit."""
    x = draw(family)
    later = dataclasses.replace(x, tensors={n: t.clone() for n, t in x.tensors.items()})
    for name, dims in family.tensors.items():
        if " T " in dims:
            later.tensors[name][:, 20:] = torch.nan
    o, p = (
        family.chunk(**y.tensors, initial_state=packed(family, y.states))[0] for y in (x, later)
    )
    assert torch.equal(o[:, :20], p[:, :20])
    assert p[:, 20:].isnan().all()


def test_compiles_to_one_graph(family: Family) -> None:
    torch._dynamo.reset()
    x = draw(family, T=9, cu_seqlens=[0, 4, 9])
    call = partial(gradients, operator(family), family, x)
    compiled = torch.compile(operator(family), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, family, x), call())


test_compiles_to_one_graph.applies = lambda family: "-" not in str(family)  # another row's option


def test_step_has_no_gradient(family: Family) -> None:
    x = draw(family, T=1)
    first, *_ = family.tensors
    x.tensors[first].requires_grad_()
    with pytest.raises(RuntimeError, match="updates the state in place and has no backward"):
        steps(family, x)
    with torch.no_grad():
        assert steps(family, x)[0].isfinite().all()


def test_refused_step_changes_nothing(family: Family) -> None:
    """Every state or none."""
    x = draw(family, T=1)
    constant = {n for n, dims in family.tensors.items() if " T " not in dims}
    token = {n: t if n in constant else t[:, 0] for n, t in x.tensors.items()}
    _, state = family.chunk(**x.tensors, output_final_state=True)
    for i, s in enumerate(flat(state)):
        for bad in (s[:1], s.to(torch.bfloat16)):
            states = [t.clone() for t in flat(state)]
            states[i] = bad
            before = [t.clone() for t in states]
            with pytest.raises(RuntimeError, match="must have"):
                family.step(**token, state=tuple(states) if len(states) > 1 else states[0])
            assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_autocast(family: Family, dtype: torch.dtype, allowed: float) -> None:
    """Same as casting by hand what autocast casts, but for what is rounded on the way."""
    x = draw(family)
    with torch.autocast("cpu", dtype):
        o, _ = family.chunk(**x.tensors, initial_state=packed(family, x.states))
    assert o.dtype == dtype
    truth = family.definition(**x.tensors, initial_state=packed(family, x.states), cu_seqlens=None)[
        0
    ]
    assert ((o - truth).square().mean() / truth.square().mean()).sqrt() < allowed


def test_upstream_is_seeded(family: Family) -> None:
    """What the comparisons rest on."""
    like = torch.zeros(3, 4)
    assert torch.equal(upstream("o", like), upstream("o", like.double()).float())
    assert not torch.equal(upstream("o", like), upstream("final_state 0", like))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_functional_transforms(family: Family) -> None:
    """vmap loops over calls. Gradients are right, or refused in words about operators."""
    x = draw(family, T=3, states=False)

    def call(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return operator(family)(**(x.tensors | tensors))[0].square().sum()

    twice = {name: torch.stack([t, t / 2]) for name, t in x.tensors.items()}
    singly = [call({name: t[i] for name, t in twice.items()}) for i in range(2)]
    torch.testing.assert_close(torch.vmap(call)(twice), torch.stack(singly))
    for name, t in x.tensors.items():

        def alone(t: torch.Tensor, name: str = name) -> torch.Tensor:
            return call({name: t})

        leaf = t.detach().requires_grad_()
        (grad,) = torch.autograd.grad(alone(leaf), leaf)
        modes = {
            partial(torch.func.grad(alone), t): grad,
            partial(torch.func.jvp, alone, (t,), (torch.ones_like(t),)): (alone(t), grad.sum()),
        }
        for mode, expected in modes.items():
            try:
                actual = mode()
            except RuntimeError as error:
                assert str(error).startswith("lsm::"), name
            else:
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
