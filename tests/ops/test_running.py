"""Softmax over time (LightNet, ABC): logits of any size, none at all, and states that carry on."""

from __future__ import annotations

import re

import pytest
import torch
from families import FAMILIES, Call_, Family, assert_rule, definition, draw, gradients, operator
from torch import Tensor

from lsm_cuda import ops

BY_NAME = {str(family): family for family in FAMILIES}
RUNNING = [BY_NAME["lightnet"], BY_NAME["abc"]]
LOGITS = {"lightnet": "k", "abc": "s"}


def with_logits(family: Family, x: Call_, f) -> Call_:  # type: ignore[no-untyped-def]
    name = LOGITS[family.name]
    return Call_(x.tensors | {name: f(x.tensors[name])}, x.states, x.cu_seqlens)


def ramp(x: Tensor) -> Tensor:
    return torch.linspace(0, 1, x.shape[1]).view(-1, 1, 1)


SHAPES = {
    "rising": lambda x: x + 3000 * ramp(x),
    "falling": lambda x: x - 3000 * ramp(x),
    "one spike": lambda x: x + 500 * (ramp(x) == ramp(x).flatten()[x.shape[1] // 2]),
    "saturated": lambda x: 1e4 * (x.abs() > 3) * x.sign(),
    "equal": torch.zeros_like,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", RUNNING, ids=str)
def test_logits_of_any_size(family: Family, shape: str) -> None:
    x = with_logits(family, draw(family), SHAPES[shape])
    results = gradients(operator(family), family, x)
    assert all(t.isfinite().all() for t in results.values())
    assert_rule(results, definition(family, x), x)


@pytest.mark.parametrize("family", RUNNING, ids=str)
def test_size_of_logits_costs_no_precision(family: Family) -> None:
    """Logits on a grid that fp32 has at 8192 too: a common offset changes no bit of the result."""
    x = draw(family, states=False)
    x = with_logits(family, x, lambda k: (64 * k).round() / 64)
    moved = with_logits(family, x, lambda k: k + 8192)
    here, there = (gradients(operator(family), family, y) for y in (x, moved))
    log = f"final_state {len(family.state) - 1}"
    torch.testing.assert_close(here.pop(log) + 8192, there.pop(log))
    for name, t in here.items():
        assert torch.equal(t, there[name]), name


@pytest.mark.parametrize("family", RUNNING, ids=str)
def test_minus_infinity_writes_nothing(family: Family) -> None:
    """Outputs and gradients are those of a sequence without the token; before the first: zero."""
    x = draw(family, states=False)
    silent = torch.zeros(37, dtype=torch.bool)
    silent[[0, 1, 5, 36]] = True
    masked = with_logits(family, x, lambda k: torch.where(silent.view(-1, 1, 1), -torch.inf, k))
    heard = Call_({n: t[:, ~silent] for n, t in x.tensors.items()})
    o, *state = (t for n, t in gradients(operator(family), family, masked).items() if n[0] != "d")
    p, *expected = (t for n, t in gradients(operator(family), family, heard).items() if n[0] != "d")
    torch.testing.assert_close(o[:, ~silent], p)
    assert not o[:, :2].any()
    for got, want in zip(state, expected, strict=True):
        torch.testing.assert_close(got, want)
    grads = gradients(lambda **y: (operator(family)(**y)[0], None), family, masked)
    assert all(t.isfinite().all() for t in grads.values())
    assert not grads[f"d{LOGITS[family.name]}"][:, silent].any()


@pytest.mark.parametrize("family", RUNNING, ids=str)
def test_nothing_written_at_all(family: Family) -> None:
    x = with_logits(family, draw(family, states=False), lambda k: torch.full_like(k, -torch.inf))
    o, state = family.chunk(**x.tensors, output_final_state=True)
    *sums, z = state
    assert not o.any() and not any(s.any() for s in sums)
    assert z.isneginf().all()
    states = (*(torch.zeros_like(s) for s in sums), z)
    token = {n: t[:, 0] for n, t in x.tensors.items()}
    assert not family.step(**token, state=states).any()
    assert z.isneginf().all()


def test_lightnet_state_may_be_value_first() -> None:
    x = draw(BY_NAME["lightnet"])
    S, z = x.states
    o, (final, _) = ops.chunk_lightnet(**x.tensors, initial_state=x.states, output_final_state=True)
    p, (turned, _) = ops.chunk_lightnet(
        **x.tensors, initial_state=(S.mT, z), output_final_state=True, state_v_first=True
    )
    assert torch.equal(o, p)
    assert torch.equal(final, turned.mT)


def refused(op: str, text: str):  # type: ignore[no-untyped-def]
    return pytest.raises(RuntimeError, match=re.escape(f"lsm::{op}: {text}"))


def test_errors() -> None:
    x = draw(BY_NAME["lightnet"])
    q, k, v = x.tensors.values()
    S, z = x.states
    with refused("chunk_lightnet", "initial_state must come with its z, got S alone"):
        ops.chunk_lightnet(q, k, v, initial_state=(S, None))
    with refused("chunk_lightnet", "initial_state must be the 2 tensors (S, z), got one tensor"):
        ops.chunk_lightnet(q, k, v, initial_state=S)
    with refused(
        "chunk_lightnet", "z must have shape [N, 1, H, K] = [2, 1, 2, 12], got [2, 2, 12]"
    ):
        ops.chunk_lightnet(q, k, v, initial_state=(S, z[:, 0]))
    with refused(
        "chunk_lightnet", "q must have shape [B, T, H, K] = [2, 37, 2, 12], got [2, 36, 2, 12]"
    ):
        ops.chunk_lightnet(q[:, 1:], k, v)
    with refused("lightnet_step", "z must have shape [B, 1, H, K] = [2, 1, 2, 12], got [2, 2, 12]"):
        ops.lightnet_step(q[:, 0], k[:, 0], v[:, 0], (S, z[:, 0]))
    x = draw(BY_NAME["abc"])
    with refused("chunk_abc", "initial_state must be the 3 tensors (hk, hv, z), got 2 tensors"):
        ops.chunk_abc(**x.tensors, initial_state=x.states[:2])
    with refused("chunk_gsa", "initial_state must be the 3 tensors (hk, hv, z), got 2 tensors"):
        ops.chunk_gsa(**x.tensors, initial_state=x.states[:2])


BOUNDARIES = {"must end at T = 8, got 9": [0, 9], "must not decrease": [0, 5, 3, 8]}


@pytest.mark.parametrize("text", BOUNDARIES)
def test_wrong_boundaries(text: str) -> None:
    """The engine says so, and nothing before it reads out of range."""
    x = torch.randn(1, 8, 2, 4)
    for call in (ops.chunk_lightnet, lambda *x, **k: ops.chunk_abc(*x, x[0], **k)):
        with pytest.raises(RuntimeError, match=text):
            call(x, x, x, cu_seqlens=torch.tensor(BOUNDARIES[text]))
