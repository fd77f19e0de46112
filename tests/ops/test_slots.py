"""Gated slot attention: sizes, groups, saturated slots, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from families import FAMILIES, assert_rule, definition, draw, gradients, operator

from lsm_cuda import ops

GSA, ABC = (next(f for f in FAMILIES if str(f) == name) for name in ("gsa", "abc"))


@pytest.mark.parametrize("slots", [16, 100, 256])
def test_slots(slots: int) -> None:
    x = draw(GSA, T=20, M=slots, K=6, V=5, B=1)
    assert_rule(gradients(operator(GSA), GSA, x), definition(GSA, x), x)


@pytest.mark.parametrize("gate", ["0", "-80", "-inf"])
@pytest.mark.parametrize("s", [0.0, 1.0])
def test_saturated_slots(gate: str, s: float) -> None:
    """Slots that never take in or never let go."""
    x = draw(GSA, gate=gate)
    x.tensors["s"].fill_(s)
    results = gradients(operator(GSA), GSA, x)
    assert all(t.isfinite().all() for t in results.values())
    assert_rule(results, definition(GSA, x), x)


@pytest.mark.parametrize("size", [0.0, 40.0])
def test_saturated_slots_of_abc(size: float) -> None:
    """Slots that all tokens fill alike, or one alone."""
    x = draw(ABC)
    x.tensors["s"].mul_(size)
    results = gradients(operator(ABC), ABC, x)
    assert all(t.isfinite().all() for t in results.values())
    assert_rule(results, definition(ABC, x), x)


def test_large_scores() -> None:
    """Softmax over scores far apart picks a slot, without overflow."""
    x = draw(GSA)
    x.tensors["q"].mul_(300)
    assert_rule(gradients(operator(GSA), GSA, x), definition(GSA, x), x)


def test_groups_share_slots() -> None:
    """Query heads of a group read one state, which a step writes once."""
    x = draw(GSA, T=1)
    q, k, v, s, g = (t[:, 0] for t in x.tensors.values())
    state = tuple(t.clone() for t in x.states)
    o = ops.gsa_step(q, k, v, s, g, state)
    for head in range(2):  # of each group
        alone = tuple(t.clone() for t in x.states)
        torch.testing.assert_close(ops.gsa_step(q[:, head::2], k, v, s, g, alone), o[:, head::2])
        for one, other in zip(state, alone, strict=True):
            assert torch.equal(one, other)


def test_checkpoint_level_changes_nothing() -> None:
    x = draw(GSA)
    a, b, c = (ops.chunk_gsa(**x.tensors, checkpoint_level=level)[0] for level in (0, 1, 2))
    assert torch.equal(a, b) and torch.equal(b, c)


def test_errors() -> None:
    x = draw(GSA).tensors
    options = "softmax, swish, relu, relu2, none"
    bad = [
        (ValueError, {"activation": "gelu"}, f"activation must be one of {options}, got 'gelu'"),
        (ValueError, {"checkpoint_level": 3}, "checkpoint_level must be 0, 1 or 2, got 3"),
        (
            RuntimeError,
            {"q": x["q"][:, :, :3]},
            "q must have shape [B, T, HQ, K] with HQ a multiple of the heads of k = "
            "[2, 37, 2, 12], got [2, 37, 3, 12]",
        ),
        (
            RuntimeError,
            {"s": x["s"][:, 1:]},
            "s must have shape [B, T, H, M] = [2, 37, 2, 9], got [2, 36, 2, 9]",
        ),
        (
            RuntimeError,
            {"g": x["g"][..., 1:]},
            "g must have shape [B, T, H, M] = [2, 37, 2, 9], got [2, 37, 2, 8]",
        ),
        (
            RuntimeError,
            {"initial_state": torch.zeros(2, 2, 12, 9)},
            "initial_state must be the 2 tensors (hk, hv), got one tensor",
        ),
    ]
    for error, change, text in bad:
        with pytest.raises(error, match=re.escape(f"lsm::chunk_gsa: {text}")):
            ops.chunk_gsa(**(x | change))
