"""What is particular to RWKV, HGRN2, MetaLA, ReGLA and gates on both sides."""

from __future__ import annotations

import re

import pytest
import torch
from cases import OPS
from families import (
    FAMILIES,
    assert_rule,
    definition,
    draw,
    gradients,
    operator,
    row,
)
from impls import Impl
from torch import Tensor

from lsm_cuda import ops, reference

BY_NAME = {str(family): family for family in FAMILIES}
(RWKV6,) = (op for op in OPS if op.name == "rwkv6")


def test_rwkv5_is_rwkv6_with_one_decay() -> None:
    x = draw(BY_NAME["rwkv5"]).tensors
    same = x | {"w": x["w"].repeat(2, 37, 1, 1)}
    assert torch.equal(ops.chunk_rwkv5(**x)[0], ops.chunk_rwkv6(**same)[0])
    assert torch.equal(ops.fused_recurrent_rwkv5(**x)[0], ops.chunk_rwkv5(**x)[0])


def test_no_bonus_reads_before_it_writes() -> None:
    x = draw(BY_NAME["rwkv6"], states=False).tensors
    o, _ = ops.chunk_rwkv6(**(x | {"u": torch.zeros_like(x["u"])}))
    assert not o[:, 0].any()
    assert o[:, 1].any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rwkv6", "rwkv5"])
def test_bonus_of_a_step(impl: Impl, name: str, dtype: torch.dtype, transposed: bool) -> None:
    """With u for all sequences or one for each, on a state in either layout."""
    family = BY_NAME[name]
    x = draw(family, T=1, dtype=dtype)
    r, k, v, w, u = (t.to(impl.device) for t in x.tensors.values())
    w = w[:, 0] if name == "rwkv6" else w.expand(2, -1, -1)
    state = x.states[0].to(impl.device, copy=True)
    if transposed:
        state = state.mT.contiguous().mT
    step, scale, before = impl.raw(RWKV6, "step"), r.shape[-1] ** -0.5, state.clone()

    def call() -> dict[str, Tensor]:
        state.copy_(before)
        o = step(r[:, 0], k[:, 0], v[:, 0], w, state, scale, u)
        return {"o": o[:, None].cpu(), "final_state 0": state.cpu().clone()}

    results = impl.under_every_seed(call) if impl.name == "emulator" else call()
    assert_rule(results, definition(family, x), x)


def test_gates_on_either_side() -> None:
    """None, keys', values': one call of the engine each; the other side's gate at 0 changes
    nothing."""
    q, k, v, g, gv = draw(BY_NAME["two_sided"], states=False).tensors.values()
    for keys, values in ((g, None), (None, gv), (None, None)):
        o, state = ops.chunk_gla(q, k, v, keys, output_final_state=True, gv=values)
        p, expected = ops.chunk_gla(
            q, k, v, torch.zeros_like(g) if keys is None else g, output_final_state=True,
            gv=torch.zeros_like(gv) if values is None else gv,
        )  # fmt: skip
        torch.testing.assert_close(o, p)
        torch.testing.assert_close(state, expected)


def test_both_gates_with_value_first_states() -> None:
    x = draw(BY_NAME["two_sided"])
    (S,) = x.states
    o, state = ops.chunk_gla(**x.tensors, initial_state=S, output_final_state=True)
    p, turned = ops.chunk_gla(
        **x.tensors, initial_state=S.mT, output_final_state=True, state_v_first=True
    )
    assert torch.equal(o, p)
    assert torch.equal(state, turned.mT)


@pytest.mark.parametrize("gate", ["-80", "-inf", "resets"])
def test_both_gates_at_extremes(gate: str) -> None:
    family = BY_NAME["two_sided"]
    x = draw(family, gate=gate, T=70, K=3, V=4, B=1)
    assert_rule(gradients(operator(family), family, x), definition(family, x), x)


def test_metala_without_weight_adds_one_half() -> None:
    """The sigmoid's place: it takes the weighted value."""
    x = draw(BY_NAME["metala"]).tensors
    o, _ = ops.chunk_metala(**(x | {"w_aug": torch.zeros_like(x["w_aug"])}))
    del x["w_aug"]
    torch.testing.assert_close(o, ops.chunk_hgrn2(**x)[0] + 0.5)


def test_hgrn2_input_gate_is_exact_near_one() -> None:
    """A decay within rounding of 1 still lets something in."""
    q, v = torch.ones(2, 1, 3, 1, 2)
    g = torch.full((1, 3, 1, 2), -1e-9)
    o, _ = ops.chunk_hgrn2(q, v, g, scale=1.0)
    torch.testing.assert_close(o[0, :, 0, 0], 2e-9 * torch.arange(1.0, 4), rtol=1e-5, atol=0)


LOGITS = torch.tensor([-100.0, -60, -30, -20, -8, -3, -1, -1e-3, 0, 1e-3, 1, 3, 8, 20, 30, 60, 100])


def refined(g: Tensor, r: Tensor) -> Tensor:
    """``log F`` from ``1 - F = (1 - g)(1 + g - 2 r g)`` or F, whichever is small, in fp64."""
    a, b = g.double().clamp(-60, 60), r.double().clamp(-60, 60)
    g, r, off, keep = a.sigmoid(), b.sigmoid(), (-a).sigmoid(), (-b).sigmoid()
    lost = off * (off + 2 * g * keep)
    return torch.where(lost < 0.5, torch.log1p(-lost.clamp(max=0.9)), (g * (g + 2 * r * off)).log())


def test_refined_gate() -> None:
    g, r = (x.clone().requires_grad_() for x in torch.meshgrid(LOGITS, LOGITS, indexing="ij"))
    got = ops.log_refined_gate(g, r)
    want = refined(g, r)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-37)
    ours = torch.autograd.grad(got.sum(), (g, r))
    theirs = torch.autograd.grad(want.sum(), (g, r))
    inside = (g.abs() < 60) & (r.abs() < 60)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[inside], b[inside], rtol=1e-5, atol=1e-12)
    F = (1 - r.sigmoid()) * g.sigmoid() ** 2 + r.sigmoid() * (1 - (1 - g.sigmoid()) ** 2)
    torch.testing.assert_close(got.exp(), F)


def test_refined_gate_gradcheck() -> None:
    x = torch.randn(2, 20, dtype=torch.float64).mul(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.log_refined_gate(*x), (x,))


@pytest.mark.parametrize("shift", [0.0, 3.5])
def test_regla_with_a_fixed_shift(shift: float) -> None:
    tensors = BY_NAME["regla"].tensors
    fixed = row("regla", tensors, options={"shift": shift}, state=("N H K V", "N H"))
    x = draw(fixed, cu_seqlens=[0, 5, 5, 37])
    x.states[1].fill_(shift)
    assert_rule(gradients(operator(fixed), fixed, x), definition(fixed, x), x)


def test_regla_is_the_papers_behind_its_norm() -> None:
    """One maximum for the whole sequence, later keys too: a positive factor per token and head."""
    x = {n: t.double() for n, t in draw(BY_NAME["regla"], states=False).tensors.items()}
    maximum = x["k"].amax((1, 3), keepdim=True)
    paper, _ = reference.regla(**(x | {"k": x["k"] - maximum}), shift=0.0)
    o, _ = ops.chunk_regla(**x)
    torch.testing.assert_close(*(y / y.square().mean(-1, keepdim=True).sqrt() for y in (o, paper)))


def test_regla_step_with_a_fixed_shift_leaves_c_alone() -> None:
    x = draw(BY_NAME["regla"], T=1)
    S, c = (s.clone() for s in x.states)
    ops.regla_step(**{n: t[:, 0] for n, t in x.tensors.items()}, state=(S, c), shift=1.0)
    assert torch.equal(c, x.states[1])
    assert not torch.equal(S, x.states[0])


def test_errors() -> None:
    rwkv = draw(BY_NAME["rwkv6"]).tensors
    five = draw(BY_NAME["rwkv5"]).tensors
    hgrn, regla = draw(BY_NAME["hgrn2"]).tensors, draw(BY_NAME["regla"]).tensors
    bad = [
        (
            ops.chunk_rwkv6,
            rwkv,
            {"u": rwkv["u"][:2]},
            "u must have shape [HV, K] = [4, 12], got [2, 12]",
        ),
        (
            ops.chunk_rwkv6,
            rwkv,
            {"u": rwkv["u"].expand(3, 4, 12)},
            "u must have shape [B, HV, K] = [2, 4, 12], got [3, 4, 12]",
        ),
        (ops.chunk_rwkv5, five, {"w": rwkv["w"]}, "w must have shape [HV, K], got [2, 37, 4, 12]"),
        (
            ops.chunk_hgrn2,
            hgrn,
            {"g": hgrn["g"][..., 1:]},
            "g must have shape [B, T, H, K] = [2, 37, 2, 12], got [2, 37, 2, 11]",
        ),
        (
            ops.chunk_hgrn2,
            hgrn,
            {"v": hgrn["v"][:, :, :1]},
            "v must have shape [B, T, H, V] = [2, 37, 2, 10], got [2, 37, 1, 10]",
        ),
        (
            ops.chunk_metala,
            hgrn,
            {"w_aug": torch.zeros(2, 3)},
            "w_aug must have shape [H, K] = [2, 12], got [2, 3]",
        ),
        (
            ops.chunk_regla,
            regla,
            {"r": regla["r"][:1]},
            "r must have shape [B, T, H, K] = [2, 37, 2, 12], got [1, 37, 2, 12]",
        ),
        (
            ops.chunk_regla,
            regla,
            {"initial_state": (torch.zeros(2, 2, 12, 10), torch.zeros(2))},
            "c must have shape [N, H] = [2, 2], got [2]",
        ),
    ]
    for op, arguments, change, text in bad:
        with pytest.raises(RuntimeError, match=re.escape(f"lsm::{op.__name__}: {text}")):
            op(**(arguments | change))
