"""Keys and gates on which chunked forms of the delta rule break, on the tensor-core kernels: what
docs/numerics.md says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import OPS, Case, Op
from checks import assert_accepted, definition, relative_rms
from impls import Emulator
from inputs import Inputs, make_inputs
from torch import Tensor

DELTA = {op.name: op for op in OPS if "beta" in op.tensors}
DPLR = next(op for op in OPS if op.name == "dplr")
T = 90  # two chunks and most of a third
Changes = dict[str, Callable[[Tensor], Tensor]]


def constant(x: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, x)


def one_key(k: Tensor) -> Tensor:
    return k[:, :1].expand_as(k).contiguous()


def resets(g: Tensor) -> Tensor:
    g = g.clone()
    g[:, 4::9] = -80
    return g


EXTREMES: dict[str, Changes] = {
    "one key": {"k": one_key},
    "one key, beta 1, no decay": {"k": one_key, "beta": constant(1), "g": constant(0)},
    "beta 0": {"beta": constant(0)},
    "beta 1": {"beta": constant(1)},
    "beta 2": {"beta": constant(2)},
    "keys of norm 10": {"k": lambda k: 10 * k, "beta": lambda b: b / 100},
    "zero keys": {"k": constant(0)},
    "g -80": {"g": constant(-80)},
    "g -80 at times": {"g": resets},
}


def changed(op: Op, changes: Changes, T: int = T, K: int = 64) -> Inputs:
    x = make_inputs(Case(op, T=T, dims=(K, 64), dtype="bf16+f32", state="both"))
    tensors = {name: changes.get(name, lambda t: t)(t) for name, t in x.tensors.items()}
    if "p" in tensors:  # else Comba's transitions need not contract
        tensors["p"] = tensors["k"]
    return replace(x, tensors=tensors)


@pytest.mark.parametrize(
    ("name", "extreme"),
    [
        (n, e)
        for n, op in DELTA.items()
        for e, c in EXTREMES.items()
        if c.keys() <= op.tensors.keys()
    ],
)
def test_no_blow_up(name: str, extreme: str, K: int = 64) -> None:
    op = DELTA[name]
    x = changed(op, EXTREMES[extreme], K=K)
    results = Emulator("emulator", seeds=(0,)).run(op, x)
    assert all(t.isfinite().all() for t in results.values())
    assert_accepted(results, *definition(op, x), x)


@pytest.mark.parametrize("extreme", ["one key, beta 1, no decay", "beta 2", "g -80 at times"])
@pytest.mark.parametrize("name", ["gated_delta_rule", "comba"])
def test_no_blow_up_of_wide_keys(name: str, extreme: str) -> None:
    """Of which two warps have a half of the state each."""
    test_no_blow_up(name, extreme, K=192)


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("form", ["delta rule", "rwkv7"])
def test_no_blow_up_of_low_rank(form: str, extreme: str) -> None:
    """The delta rule written as a = -e^g k, b = beta k; RWKV-7 reads before the decay, with rates
    up to 1."""
    x = changed(DELTA["kda"], EXTREMES[extreme])
    q, k, v, g, beta = (x.tensors[name] for name in ("q", "k", "v", "g", "beta"))
    erased, rate = (g.exp() * k, beta) if form == "delta rule" else (k, beta.clamp(max=1))
    a, b = -erased.to(k.dtype), (rate[..., None] * k).to(k.dtype)
    x = replace(x, tensors={"q": q, "k": k, "v": v, "a": a, "b": b, "g": g})
    results = Emulator("emulator", seeds=(0,)).run(DPLR, x)
    assert all(t.isfinite().all() for t in results.values())
    assert_accepted(results, *definition(DPLR, x), x)


@pytest.mark.parametrize("beta", [1, 2])
@pytest.mark.parametrize("name", DELTA)
def test_long_keys_at_full_strength(name: str, beta: float) -> None:
    """Up to 199 times too far at every token: finite over a few."""
    op = DELTA[name]
    x = changed(op, {"k": lambda k: 10 * k, "beta": constant(beta)}, T=3)
    results = Emulator("emulator", seeds=(0,)).run(op, x)
    assert all(t.isfinite().all() for t in results.values())
    assert_accepted(results, *definition(op, x), x)


def test_one_key_at_strength_two() -> None:
    """The state turns over along the key at every token, and nothing damps what rounds off."""
    op = DELTA["delta_rule"]
    x = changed(op, {"k": one_key, "beta": constant(2)})
    o, state = Emulator("emulator", seeds=(0,)).forward(op, x)
    truth, _ = definition(op, x)
    assert relative_rms(o, truth["o"]) < 2e-2
    assert relative_rms(state, truth["final_state"]) < 2e-3
