"""What PyTorch's tools need: schemas, fake kernels, compile, export, autocast, meta tensors."""

from __future__ import annotations

import pytest
import torch
from cases import OPS, SCHEMAS, Case, Op
from impls import IMPLS, threads
from inputs import Inputs, make_inputs
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
each_op = pytest.mark.parametrize("op", OPS, ids=str)
each_schema = pytest.mark.parametrize("op", SCHEMAS, ids=str)

VARIANTS = {
    "plain": {},
    "states": {"state": "both", "heads": (1, 2), "dims": (8, 5)},
    "packed": {"state": "both", "batch": "int32"},
    "packed, no state": {"batch": "int64"},
    "half with fp32 gates": {"dtype": "bf16+f32", "batch": 2, "state": "final"},
    "strided": {"layout": "transposed", "heads": (2, 2)},
}


def arguments(x: Inputs) -> tuple:
    """Of the raw forward operator."""
    return (*x.tensors.values(), x.initial_state, x.cu_seqlens, 0.25, x.output_final_state)


@pytest.mark.parametrize("name", VARIANTS)
@each_schema
def test_opcheck_forward(op: Op, name: str) -> None:
    x = make_inputs(Case(op, T=9, **VARIANTS[name])).leaves()
    torch.library.opcheck(op.raw("fwd"), arguments(x))


def backward_arguments(op: Op, x: Inputs, need_dg: bool = True) -> tuple:
    """Of the raw backward operator."""
    args = (*arguments(x)[:-1], x.grad_o, x.grad_final_state)
    return (*args, need_dg) if op.gated else args


@pytest.mark.parametrize("name", VARIANTS)
@each_schema
def test_opcheck_backward(op: Op, name: str) -> None:
    """Without gradients of its own, which test_autograd shows it refuses."""
    x = make_inputs(Case(op, T=9, **VARIANTS[name]))
    torch.library.opcheck(op.raw("bwd"), backward_arguments(op, x))


@each_schema
def test_opcheck_step(op: Op) -> None:
    x = make_inputs(Case(op, T=1, heads=(1, 2), batch=2, state="both"))
    args = (*(t[:, 0] for t in x.tensors.values()), x.initial_state, 0.25)
    torch.library.opcheck(op.raw("step"), args)


@each_op
def test_step_declares_what_it_writes(op: Op) -> None:
    arguments = op.raw("step")._schema.arguments
    assert [a.name for a in arguments if a.is_write] == ["state"]
    assert not any(a.is_write for kind in ("fwd", "bwd") for a in op.raw(kind)._schema.arguments)


@pytest.mark.parametrize("name", VARIANTS)
@each_op
def test_meta_tensors_have_the_shapes_of_real_ones(op: Op, name: str) -> None:
    x = make_inputs(Case(op, T=9, **VARIANTS[name]))

    def meta(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to("meta")

    def describe(results) -> list:
        return [None if t is None else (t.shape, t.dtype, t.stride()) for t in results]

    def public(convert) -> list:
        return describe(op.chunk(
            **{n: convert(t) for n, t in x.tensors.items()},
            initial_state=convert(x.initial_state), cu_seqlens=convert(x.cu_seqlens),
            output_final_state=x.output_final_state,
        ))  # fmt: skip

    assert public(meta) == public(lambda t: t)
    for need_dg in (True, False) if op.gated else (True,):
        backward = backward_arguments(op, x, need_dg)
        moved = [meta(a) if isinstance(a, Tensor) else a for a in backward]
        real = op.raw("bwd")(*backward)
        assert describe(op.raw("bwd")(*moved)) == describe(real)
        assert not op.gated or (real[[*op.tensors].index("g")].numel() > 0) == need_dg


class Layer(torch.nn.Module):
    """Projections around the operator, as a model has them."""

    def __init__(self, op: Op, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op = op
        self.names = list(op.tensors)
        self.projections = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in op.tensors)
        self.out = torch.nn.Linear(width, width)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        args = {
            n: p(x).unflatten(-1, (2, -1))
            for n, p in zip(self.names, self.projections, strict=True)
        }
        if self.op.gated:
            args["g"] = torch.nn.functional.logsigmoid(args["g"])
        o, state = self.op.chunk(**args, initial_state=state, output_final_state=True)
        return self.out(o.flatten(-2)), state


@pytest.mark.slow
@each_schema
def test_compile_with_any_length(op: Op) -> None:
    """One graph without breaks serves every shape, forward and backward, as eager does."""
    eager = Layer(op)
    compiled = torch.compile(eager, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    with threads(2):
        for i, (B, T) in enumerate([(3, 20), (4, 33), (5, 64), (6, 129)]):
            x = torch.randn(B, T, 16)
            state = torch.randn(B, 2, 8, 8)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                results = []
                for module in (eager, compiled):
                    y, s = (t.clone().requires_grad_() for t in (x, state))
                    o, final = module(y, s)
                    leaves = [y, s, *eager.parameters()]
                    grads = torch.autograd.grad(o.square().sum() + final.sum(), leaves)
                    results.append([o, final, *grads])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@each_schema
def test_compile_packed_and_decode(op: Op) -> None:
    """Boundaries as a tensor, and a step that updates its state inside the graph."""
    torch._dynamo.reset()
    x = make_inputs(Case(op, T=33, heads=(1, 2), batch="int32", state="both"))

    def packed(tensors, state, cu):
        return op.chunk(**tensors, initial_state=state, output_final_state=True, cu_seqlens=cu)

    def decode(tensors, state):
        o = op.step(**tensors, state=state)
        return o + op.step(**tensors, state=state), state * 2

    compiled = torch.compile(packed, fullgraph=True, dynamic=True)
    for a, b in zip(
        packed(x.tensors, x.initial_state, x.cu_seqlens),
        compiled(x.tensors, x.initial_state, x.cu_seqlens),
        strict=True,
    ):
        assert torch.equal(a, b)
    token = {n: t[:, 0] for n, t in x.tensors.items()}
    states = [x.initial_state[:1].clone() for _ in range(2)]
    with torch.no_grad():
        plain = decode(token, states[0])
        traced = torch.compile(decode, fullgraph=True)(token, states[1])
    assert torch.equal(states[0], states[1])
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
@each_schema
def test_export(op: Op, dynamic: bool) -> None:
    layer, x = Layer(op).eval(), torch.randn(2, 20, 16)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")} if dynamic else {}
    shapes = {"x": dims} if dynamic else None
    program = torch.export.export(layer, (x,), dynamic_shapes=shapes)
    assert any(f"lsm.{op}_fwd" in str(node.target) for node in program.graph.nodes)
    for shape in [(2, 20, 16), *([(3, 65, 16), (5, 7, 16)] if dynamic else [])]:
        y = torch.randn(shape)
        for a, b in zip(program.module()(y), layer(y), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_schema
def test_autocast(op: Op, dtype: torch.dtype) -> None:
    """q, k, v and o in autocast's dtype; gates and states, and every gradient, in their own."""
    x = make_inputs(Case(op, state="both", heads=(1, 2))).leaves()
    cpu = IMPLS["cpu"]
    with torch.autocast("cpu", dtype):
        o, state = cpu.forward(op, x)
    assert (o.dtype, state.dtype) == (dtype, torch.float32)
    leaves = [*x.tensors.values(), x.initial_state]
    grads = torch.autograd.grad([o, state], leaves, [x.grad_o.to(dtype), x.grad_final_state])
    assert all(grad.dtype == torch.float32 for grad in grads)

    def rounded(t: Tensor) -> Tensor:
        return t.detach().to(dtype)

    halves = {n: t.detach() if n == "g" else rounded(t) for n, t in x.tensors.items()}
    by_hand, by_hand_state = op.chunk(
        **halves, initial_state=x.initial_state.detach(), output_final_state=True
    )
    assert torch.equal(o, by_hand)
    assert torch.equal(state, by_hand_state)


@each_schema
def test_autocast_leaves_fp64_and_disabled_regions_alone(op: Op) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert op.chunk(**make_inputs(Case(op, dtype="f64")).tensors)[0].dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert op.chunk(**make_inputs(Case(op)).tensors)[0].dtype == torch.float32
