"""What the operator tests leave out of the delta engine's CUDA kernels: several micro-steps per
token, and a strength per value channel."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cases import OPS, Case, Op
from checks import assert_accepted, assert_same_bits, definition
from impls import Emulator, scale_of
from inputs import Inputs, Tensors, boundaries, make_inputs
from torch import Tensor

from lsm_cuda.ops._delta import IN_STEPS


@dataclass(frozen=True)
class Call:
    """T tokens of n micro-steps."""

    op: str
    n: int
    T: int
    case: dict
    per_channel: bool = False

    def __str__(self) -> str:
        kind = "-per_channel" if self.per_channel else ""
        return f"{self.op}-n{self.n}-T{self.T}-{self.case['dtype']}{kind}"

    def make(self) -> tuple[Op, Inputs]:
        """The operator with the definition of its micro-steps, and its arguments."""
        (op,) = (op for op in OPS if op.name == self.op)
        x = make_inputs(Case(op, T=self.T * self.n, state="both", **self.case))
        per_token = {
            name: x.tensors[name][:, :: self.n] for name in ("q", "g") if name in x.tensors
        }
        tensors = x.tensors | per_token
        if self.per_channel:
            noise = torch.randn(tensors["v"].shape, generator=torch.Generator().manual_seed(1))
            tensors["beta"] = noise.sigmoid().to(tensors["beta"].dtype)
        cu = None if x.cu_seqlens is None else boundaries(self.T, x.cu_seqlens.dtype)
        x = dataclasses.replace(x, tensors=tensors, grad_o=x.grad_o[:, :: self.n], cu_seqlens=cu)
        return dataclasses.replace(op, reference=partial(op.reference, num_householder=self.n)), x


class InSteps(Emulator):
    """Calls with a number of micro-steps."""

    def __init__(self, n: int, flavour: str = "_emu", seeds: tuple[int, ...] = (1, 2, 3, 4)):
        super().__init__(flavour, flavour, seeds)
        self.n = n

    def fwd(self, op: Op, x: Inputs) -> Tensors:
        o, state = self.raw(op, "fwd")(
            *x.tensors.values(), x.initial_state, x.cu_seqlens, scale_of(x.tensors, x.scale), True,
            self.n,
        )  # fmt: skip
        return {"o": o, "final_state": state}

    def bwd(self, op: Op, x: Inputs) -> Tensors:
        need_dg = (True,) if op.gated else ()
        *grads, dh0 = self.raw(op, "bwd")(
            *x.tensors.values(), x.initial_state, x.cu_seqlens, scale_of(x.tensors, x.scale),
            x.grad_o, x.grad_final_state, *need_dg, self.n,
        )  # fmt: skip
        return {f"d{n}": d for n, d in zip(x.tensors, grads, strict=True)} | {"dinitial_state": dh0}

    def steps(self, op: Op, x: Inputs) -> Tensors:
        """Token by token."""
        step, state, tokens = self.raw(op, "step"), x.initial_state.clone(), []
        for t in range(x.grad_o.shape[1]):
            token: list[Tensor] = []
            for name, y in x.tensors.items():
                rows = y[:, t] if name in "qg" else y[:, t * self.n : (t + 1) * self.n]
                token.append(rows[:, 0] if self.n == 1 and name not in "qg" else rows)
            tokens.append(step(*token, state, scale_of(x.tensors, x.scale), self.n))
        return {"o": torch.stack(tokens, 1), "final_state": state}


BF16 = {"dtype": "bf16+f32", "dims": (64, 64)}
CALLS = [
    Call("delta_rule", 2, 45, {"dtype": "bf16", "dims": (64, 72)}),
    Call("gated_delta_rule", 3, 30, BF16 | {"heads": (1, 2), "gate": "-8"}),
    Call("gated_delta_rule", 2, 60, BF16 | {"batch": "int64"}),
    Call("delta_rule", 3, 30, {"dtype": "bf16", "dims": (200, 72), "batch": "int32"}),
    Call("gated_delta_rule", 2, 40, {"dtype": "bf16+f32", "dims": (256, 40), "gate": "resets"}),
    Call("kda", 2, 45, BF16 | {"gate": "resets"}),
    Call("kda", 3, 20, {"dtype": "f32", "dims": (24, 16), "batch": "int32"}),
    Call("gated_delta_rule", 4, 12, {"dtype": "f16", "dims": (16, 24), "gate": "-80"}),
    Call("delta_rule", 1, 30, {"dtype": "bf16", "dims": (32, 24)}, per_channel=True),
    Call("gated_delta_rule", 2, 20, {"dtype": "f32", "dims": (16, 33)}, per_channel=True),
    Call("kda", 1, 30, {"dtype": "f16+f32", "dims": (16, 24), "batch": "int64"}, per_channel=True),
]


def test_every_operator_with_micro_steps_is_there() -> None:
    assert {call.op for call in CALLS} == set(IN_STEPS)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_definition(call: Call) -> None:
    """Outputs, the final state and every gradient, and the same bits under every schedule."""
    op, x = call.make()
    truth, same = definition(op, x)
    assert_accepted(InSteps(call.n).run(op, x), truth, same, x)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_race_build_is_silent(call: Call) -> None:
    op, x = call.make()
    race = InSteps(call.n, "_emu_race")
    assert_same_bits(race.run(op, x), InSteps(call.n, seeds=(0,)).run(op, x))


@pytest.mark.parametrize("call", [c for c in CALLS if "batch" not in c.case], ids=str)
def test_steps(call: Call) -> None:
    op, x = call.make()
    impl = InSteps(call.n)
    results = impl.under_every_seed(lambda: impl.steps(op, x))
    truth, same = ({name: t[name] for name in results} for t in definition(op, x))
    assert_accepted(results, truth, same, x)
