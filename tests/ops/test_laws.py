"""Laws: chunk = steps, split = whole, packed = separate, twice = same bits, and NaN stays put."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import OPS, SCHEMAS, Case, Op
from checks import assert_accepted, assert_same_bits, definition, differentiate, expected
from impls import Impl, threads
from inputs import Inputs, Tensors, make_inputs

GATES = ["mixed", "0", "-1", "-8", "resets", "-inf", "positive"]
LENGTH = 130  # two tiles of 64 and a bit


def case(op: Op, impl: Impl, **kwargs) -> Case:
    T = 70 if impl.name == "emulator" else LENGTH
    return Case(op, **({"T": T, "dims": (16, 24), "heads": (1, 2), "state": "both"} | kwargs))


def assert_rule(results: Tensors, x: Inputs, truth: Tensors, same: Tensors) -> None:
    """The rule for the results that are there."""
    assert_accepted(results, *({name: t[name] for name in results} for t in (truth, same)), x)


def part(x: Inputs, start: int, end: int, **kwargs) -> Inputs:
    tensors = {name: t[:, start:end] for name, t in x.tensors.items()}
    return dataclasses.replace(x, tensors=tensors, grad_o=x.grad_o[:, start:end], **kwargs)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("gate", GATES)
def test_chunk_is_step_by_step(impl: Impl, op: Op, gate: str, dtype: str) -> None:
    x, *known = expected(case(op, impl, gate=gate, dtype=dtype, batch=2))
    state = x.initial_state.clone().to(impl.device)
    tokens = []
    for t in range(x.grad_o.shape[1]):
        token = {name: tensor[:, t] for name, tensor in x.tensors.items()}
        tokens.append(impl.step(op, token, state))
    assert_rule({"o": torch.stack(tokens, 1), "final_state": state}, x, *known)
    o, final_state = impl.forward(op, x.to(impl.device))
    assert_rule({"o": o.cpu(), "final_state": final_state.cpu()}, x, *known)


@pytest.mark.parametrize("at", [1, 16, 64, 65])  # on top: one after another, of one case
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("gate", GATES)
def test_split_with_carried_state_is_whole(
    impl: Impl, op: Op, at: int, gate: str, dtype: str
) -> None:
    """Forward hands the state on, backward hands its gradient back."""
    x, *known = expected(case(op, impl, gate=gate, dtype=dtype))
    T = x.grad_o.shape[1]
    head = part(x, 0, at)
    _, carried = impl.forward(op, head.to(impl.device))
    second = impl.run(op, part(x, at, T, initial_state=carried.cpu()))
    first = impl.run(op, dataclasses.replace(head, grad_final_state=second["dinitial_state"]))
    joined = {
        name: torch.cat([first[name], second[name]], 1) for name in first if "state" not in name
    }
    joined |= {n: r[n] for n, r in (("final_state", second), ("dinitial_state", first))}
    assert_rule(joined, x, *known)


@pytest.mark.parametrize("op", SCHEMAS, ids=str)
def test_a_million_tokens(cpu: Impl, op: Op) -> None:
    """The end of 2^20 tokens, forwards and backwards, is that of a short call which starts from the
    state before it."""
    T, n = 2**20, 1000
    x = make_inputs(Case(op, T=T, dims=(4, 3), gate="-1", dtype="f64", state="both"))
    whole = cpu.run(op, x)
    _, carried = cpu.forward(op, part(x, 0, T - n))
    end = cpu.run(op, part(x, T - n, T, initial_state=carried))
    for name, t in end.items():
        if name != "dinitial_state":
            same = whole[name] if name == "final_state" else whole[name][:, T - n :]
            torch.testing.assert_close(same, t, rtol=1e-9, atol=1e-9)
    assert all(t.isfinite().all() for t in whole.values())


@pytest.mark.parametrize("dtype", ["f32", "bf16+f32"])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_packed_is_separate(impl: Impl, op: Op, index: str, dtype: str) -> None:
    """Sequences in one row give what each gives alone, empty ones their state untouched."""
    x, *known = expected(case(op, impl, batch=index, dtype=dtype))
    packed = impl.run(op, x)
    assert_rule(packed, x, *known)
    for n, (start, end) in enumerate(x.cu_seqlens.unfold(0, 2, 1).tolist()):
        alone = part(
            x, start, end, cu_seqlens=None,
            initial_state=x.initial_state[n, None], grad_final_state=x.grad_final_state[n, None],
        )  # fmt: skip
        assert_rule(impl.run(op, alone), alone, *definition(op, alone))
        if start == end:
            assert torch.equal(packed["final_state"][n], x.initial_state[n])
            assert torch.equal(packed["dinitial_state"][n], x.grad_final_state[n])


def test_sequences_of_one_token(impl: Impl, op: Op) -> None:
    """A packed row may be a batch of decode steps."""
    T = 33
    x = make_inputs(case(op, impl, T=T))
    states = torch.randn(T, *x.initial_state.shape[1:])
    x = dataclasses.replace(
        x, cu_seqlens=torch.arange(T + 1), initial_state=states, grad_final_state=states.flip(0)
    )
    assert_rule(impl.run(op, x), x, *definition(op, x))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("batch", [1, 3, "int64"])
def test_run_twice_gives_the_same_bits(impl: Impl, op: Op, batch: int | str, dtype: str) -> None:
    x = make_inputs(case(op, impl, batch=batch, dtype=dtype, dims=(33, 65)))
    first = impl.run(op, x)
    for _ in range(1 if impl.name == "emulator" else 3):  # there a run is of four schedules
        assert_same_bits(first, impl.run(op, x))


def test_arguments_are_left_alone(impl: Impl, op: Op) -> None:
    x = make_inputs(case(op, impl, layout="sliced"))
    before = x.map(torch.Tensor.clone)
    impl.run(op, x)
    for name, t in before.tensors.items():
        assert torch.equal(t, x.tensors[name]), name
    assert torch.equal(before.initial_state, x.initial_state)
    assert torch.equal(before.grad_o, x.grad_o)


@pytest.mark.parametrize("argument", ["q", "k", "v", "g", "initial_state", "grad_o"])
@pytest.mark.parametrize("where", ["sequence", "head", "packed"])
def test_nan_does_not_leak(impl: Impl, op: Op, where: str, argument: str) -> None:
    """NaN in one sequence or head: the others keep their bits, forward and backward."""
    batch = "int64" if where == "packed" else 3
    x = make_inputs(case(op, impl, batch=batch, heads=(2, 2)))
    bounds = None if x.cu_seqlens is None else x.cu_seqlens.unfold(0, 2, 1).tolist()
    clean = impl.run(op, x)
    row = 3 if where == "packed" else 1  # the poisoned sequence: not the first, not the last

    poisoned = x.map(torch.Tensor.clone)
    tensors = poisoned.tensors | {
        "initial_state": poisoned.initial_state,
        "grad_o": poisoned.grad_o,
    }
    target = tensors[argument]
    if argument == "initial_state":
        spot = target[:, 1] if where == "head" else target[row]
    elif where == "packed":
        start, end = bounds[row]
        spot = target[0, start:end]
    else:
        spot = target[:, :, 1] if where == "head" else target[row]
    spot.fill_(torch.nan)
    results = impl.run(op, poisoned)

    touched = 0
    for name, t in results.items():
        other = clean[name]
        is_state = "state" in name
        keep = torch.ones(t.shape, dtype=torch.bool)
        if where == "head":
            keep.select(1 if is_state else 2, 1).fill_(False)
        elif is_state or where == "sequence":
            keep[row] = False
        else:
            keep[0, slice(*bounds[row])] = False
        assert torch.equal(t[keep], other[keep]), (
            f"{name}: NaN of {argument} leaks out of its {where}"
        )
        touched += int(t[~keep].isnan().any())
    assert touched, "the NaN vanished"


test_nan_does_not_leak.applies = lambda op, argument: argument != "g" or op.gated


def test_future_does_not_reach_the_past(impl: Impl, op: Op) -> None:
    """NaN in the last token leaves every earlier output alone."""
    x = make_inputs(case(op, impl))
    poisoned = x.map(torch.Tensor.clone)
    for t in poisoned.tensors.values():
        t[:, -1] = torch.nan
    (clean, _), (o, _) = (impl.forward(op, y.to(impl.device)) for y in (x, poisoned))
    assert torch.equal(clean[:, :-1], o[:, :-1])
    assert o[:, -1].isnan().all()


@pytest.mark.parametrize("gate", ["mixed", "resets", "-inf"])
@pytest.mark.parametrize("batch", [1, "int64"])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_division_over_time_is_exact(cpu: Impl, op: Op, batch: int | str, gate: str) -> None:
    """Few heads over a long sequence are divided among threads along time, and along V."""
    # work for four threads, two tiles of V: the forward has 2 segments, the backward 4
    x = make_inputs(Case(op, T=1100, dims=(24, 40), state="both", batch=batch, gate=gate))
    truth, same = definition(op, x)
    for n in (1, 2, 4):
        with threads(n):
            results = differentiate(lambda y: cpu.forward(op, y), x)
        assert_accepted(results, truth, same, x)


test_division_over_time_is_exact.applies = lambda op, gate: gate == "mixed" or op.gated
