"""Gradients as PyTorch checks and uses them; second derivatives and jvp, which are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import OPS, SCHEMAS, Case, Op
from checks import assert_accepted, definition
from impls import Impl
from inputs import Inputs, make_inputs
from torch import Tensor

each_op = pytest.mark.parametrize("op", OPS, ids=str)
each_schema = pytest.mark.parametrize("op", SCHEMAS, ids=str)


def each_argument(ops: list[Op]) -> pytest.MarkDecorator:
    """Every differentiable argument of every operator."""
    rows = [(op, name) for op in ops for name in (*op.tensors, "initial_state")]
    return pytest.mark.parametrize("op, argument", rows, ids=lambda x: str(x))


GRADCHECK = {
    "plain": {},
    "odd sizes": {"T": 7, "dims": (3, 2), "batch": 2},
    "shared heads": {"heads": (2, 4), "state": "both"},
    "initial state": {"state": "initial"},
    "final state": {"state": "final"},
    "packed": {"batch": "int64", "state": "both", "T": 9},
    "strong gates": {"gate": "-8", "state": "both"},
    "resets": {"gate": "-inf", "state": "both"},
    "positive gates": {"gate": "positive", "state": "both"},
    "strided": {"layout": "sliced", "scale": 0.3},
    "expanded": {"layout": "expanded"},
}


@pytest.mark.parametrize(
    "op, name",
    [(op, name) for op in OPS for name in GRADCHECK if op.gated or "gate" not in GRADCHECK[name]],
    ids=str,
)
def test_gradcheck(op: Op, name: str) -> None:
    """Against finite differences, in fp64, for every argument at once."""
    kwargs = {"T": 5, "dims": (2, 3), "dtype": "f64"} | GRADCHECK[name]
    x = make_inputs(Case(op, **kwargs)).leaves()
    differentiable = dict(x.tensors)
    if x.initial_state is not None:
        differentiable["initial_state"] = x.initial_state
    if kwargs.get("gate") == "-inf":  # no finite difference around infinity; the others have one
        differentiable["g"].requires_grad_(False)

    def call(*args: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(differentiable, args, strict=True))
        o, state = op.chunk(
            **named,
            scale=x.scale,
            cu_seqlens=x.cu_seqlens,
            output_final_state=x.output_final_state,
        )
        return (o,) if state is None else (o, state)

    # gradcheck perturbs storage in place, so stride-0 and sliced inputs go in as views of leaves
    leaves = tuple(differentiable.values())
    if kwargs.get("layout") == "expanded":
        leaves = tuple(t.detach().clone().requires_grad_() for t in leaves)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=False)


@each_argument(OPS)
def test_one_gradient_alone(op: Op, argument: str) -> None:
    """Kernels skip the gate's gradient where nobody asks for it."""
    x = make_inputs(Case(op, state="both"))
    args = x.tensors | {"initial_state": x.initial_state}
    args[argument] = args[argument].clone().requires_grad_()
    o, state = op.chunk(**args, output_final_state=True)
    (grad,) = torch.autograd.grad([o, state], [args[argument]], [x.grad_o, x.grad_final_state])
    name = f"d{argument}"
    truth, same = definition(op, x)
    assert_accepted({name: grad}, {name: truth[name]}, {name: same[name]}, x)


@pytest.mark.parametrize("used", ["o", "final_state"])
@each_op
def test_gradient_through_one_result(op: Op, cpu: Impl, used: str) -> None:
    """The other result's gradient is zero, not garbage."""
    x = make_inputs(Case(op, state="both"))
    zero = "grad_final_state" if used == "o" else "grad_o"
    x = dataclasses.replace(x, **{zero: torch.zeros_like(getattr(x, zero))})
    y = x.leaves()
    results = dict(zip(("o", "final_state"), cpu.forward(op, y), strict=True))
    leaves = [*y.tensors.values(), y.initial_state]
    grads = torch.autograd.grad(
        results[used], leaves, x.grad_o if used == "o" else x.grad_final_state
    )
    names = [f"d{n}" for n in (*x.tensors, "initial_state")]
    truth, same = ({n: t[n] for n in names} for t in definition(op, x))
    assert_accepted(dict(zip(names, grads, strict=True)), truth, same, x)


@each_schema
def test_gradient_of_a_sum(op: Op) -> None:
    """``o.sum().backward()`` hands over a gradient of stride 0."""
    x = make_inputs(Case(op, heads=(1, 2))).leaves()
    o, _ = op.chunk(**x.tensors)
    o.sum().backward()
    ones = dataclasses.replace(x, grad_o=torch.ones_like(x.grad_o))
    truth, same = definition(op, ones)
    actual = {"o": o.detach()} | {f"d{n}": t.grad for n, t in x.tensors.items()}
    assert_accepted(actual, truth, same, x)


def second_order(op: Op) -> tuple[Inputs, Tensor]:
    x = make_inputs(Case(op, T=8)).leaves()
    o, _ = op.chunk(**x.tensors)
    (dq,) = torch.autograd.grad(o.sum(), x.tensors["q"], create_graph=True)
    return x, dq


@each_schema
def test_double_backward_is_refused(op: Op) -> None:
    text = rf"lsm::{op}_bwd: the backward pass is itself not differentiable"
    for name in op.tensors:
        x, dq = second_order(op)
        with pytest.raises(RuntimeError, match=text):
            torch.autograd.grad(dq.square().sum(), x.tensors[name])
    x = make_inputs(Case(op, T=4))
    with pytest.raises(RuntimeError, match=text):
        torch.autograd.functional.hessian(
            lambda q: op.chunk(**(x.tensors | {"q": q}))[0].sum(), x.tensors["q"]
        )


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@each_argument(SCHEMAS)
def test_forward_mode_is_refused(op: Op, argument: str) -> None:
    """An error instead of a tangent of zeros, with or without grad."""
    x = make_inputs(Case(op, T=8, state="initial"))
    args = x.tensors | {"initial_state": x.initial_state}
    primal = args[argument]
    got = f"got a dual tensor for {argument}"
    text = rf"lsm::{op}_fwd: forward-mode AD \(jvp\) is not supported, {got}"
    for t in (primal, primal.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match=text), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))
            op.chunk(**(args | {argument: dual}))
    with pytest.raises(RuntimeError, match=text):
        torch.func.jvp(
            lambda t: op.chunk(**(args | {argument: t}))[0], (primal,), (torch.ones_like(primal),)
        )


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@each_schema
def test_vmap_loops_over_calls(op: Op) -> None:
    x = make_inputs(Case(op, T=8))
    stacked = torch.stack([x.tensors["q"], 2 * x.tensors["q"]])
    o = torch.vmap(lambda q: op.chunk(**(x.tensors | {"q": q}))[0])(stacked)
    assert torch.equal(o[0], op.chunk(**x.tensors)[0])


@each_argument(SCHEMAS)
def test_functional_gradients_are_refused(op: Op, argument: str) -> None:
    """torch.func cannot use registered formulas. Tensors it does not differentiate may pass."""
    x = make_inputs(Case(op, T=8, state="initial"))
    args = x.tensors | {"initial_state": x.initial_state}
    primal = args[argument]

    def call(t: Tensor) -> Tensor:
        return op.chunk(**(args | {argument: t}))[0].sum()

    text = rf"lsm::{op}_fwd: torch.func's grad, vjp and jacrev are .* for {argument}; use torch.a"
    both = torch.stack([primal, primal])
    for run, t in (
        (torch.func.grad(call), primal),
        (lambda t: torch.func.vjp(call, t), primal),
        (torch.func.jacrev(call), primal),
        (torch.vmap(torch.func.grad(call)), both),
        (torch.func.grad(lambda t: torch.vmap(call)(t).sum()), both),
    ):
        with pytest.raises(RuntimeError, match=text):
            run(t)
    grad = torch.func.grad(lambda t: (t * call(t.detach())).sum())(primal)
    assert torch.equal(grad, call(primal).expand_as(primal))


@each_schema
def test_activation_checkpointing(op: Op, cpu: Impl) -> None:
    x = make_inputs(Case(op)).leaves()
    plain = cpu.run(op, x)
    o, _ = torch.utils.checkpoint.checkpoint(
        lambda *args: op.chunk(*args), *x.tensors.values(), use_reentrant=False
    )
    grads = torch.autograd.grad(o, list(x.tensors.values()), x.grad_o)
    for name, grad in zip(x.tensors, grads, strict=True):
        assert torch.equal(grad, plain[f"d{name}"])


@each_schema
def test_no_graph_where_none_is_needed(op: Op) -> None:
    x = make_inputs(Case(op, state="both"))
    for t in op.chunk(**x.tensors, initial_state=x.initial_state, output_final_state=True):
        assert t.grad_fn is None
    y = x.leaves()
    with torch.inference_mode():
        o, state = op.chunk(**y.tensors, initial_state=y.initial_state, output_final_state=True)
    assert o.is_inference() and state.is_inference()
    with torch.no_grad():
        assert op.chunk(**y.tensors)[0].grad_fn is None


@each_schema
def test_saved_arguments_must_not_change(op: Op) -> None:
    """Writing over an argument between forward and backward is noticed."""
    x = make_inputs(Case(op)).leaves()
    o, _ = op.chunk(**x.tensors)
    with torch.no_grad():
        x.tensors["k"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
