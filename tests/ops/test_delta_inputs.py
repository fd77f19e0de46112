"""What comes before the delta rules, in one pass: rows of unit length, decays, strengths."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import DTYPES
from checks import assert_accepted, assert_same_bits
from emulators import emulator
from impls import Emulator, Impl, threads
from inputs import Inputs, Tensors
from torch import Tensor
from torch.nn.functional import softplus

from lsm_cuda.ops.gates import L2_EPS, delta_inputs

NAMES = ("q", "k", "g", "beta", "A_log", "dt_bias")
# Results in the dtype of q, and those that are always wide, as checks.py tells them apart.
RESULTS = {"q": "unit q", "k": "unit k", "g": "final_state g", "beta": "final_state beta"}


@dataclass(frozen=True)
class Case:
    """Shapes by name, and the options of the operator."""

    name: str
    shapes: dict[str, tuple[int, ...]] = field(hash=False)
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: str) -> Inputs:
        """``dtype``: of q, k and the logits; with "+f32" the logits are fp32."""
        wide, narrow = (DTYPES[d] for d in (dtype.split("+")[-1], dtype.split("+")[0]))
        rng = torch.Generator().manual_seed(0)
        tensors: Tensors = {}
        for name, shape in self.shapes.items():
            x = torch.randn(shape, generator=rng, dtype=torch.float64)
            if name in ("A_log", "dt_bias"):
                tensors[name] = x.to(torch.promote_types(wide, torch.float32))
            else:
                x = x if name in "qk" else 4 * x
                tensors[name] = x.to(narrow if name in "qk" else wide)
        return Inputs(tensors, grad_o=next(iter(tensors.values())))


def rows(T: int, n: int = 1, K: int = 12) -> dict[str, tuple[int, ...]]:
    return {"q": (2, T, 2, K), "k": (2, T * n, 2, K)}


SCALAR = {"g": (2, 37, 5), "A_log": (5,), "dt_bias": (5,)}
CHANNELS = {"g": (2, 37, 3, 40), "A_log": (3,), "dt_bias": (120,)}
BY_CHANNEL = {"by_channel": True}
CASES = [
    Case("gated delta rule", rows(37) | SCALAR | {"beta": (2, 37, 5)}, {"strength": 2.0}),
    Case("kda", rows(37, K=40) | CHANNELS | {"beta": (2, 37, 3)}, BY_CHANNEL),
    Case("bounded", CHANNELS, BY_CHANNEL | {"lower_bound": -5.0}),
    Case("bounded, no parameters", {"g": (1, 7, 3, 9)}, BY_CHANNEL | {"lower_bound": -5.0}),
    Case("no bias", {"g": (70, 3), "A_log": (3,)}),
    Case("micro-steps", rows(5, n=3) | {"beta": (2, 15, 4, 33)}),
    Case(
        "one token", {"q": (3, 6, 64), "k": (3, 6, 64), "g": (3, 6, 64), "A_log": (6,)}, BY_CHANNEL
    ),
    Case("wide", {"q": (1, 5, 3, 300), "k": (1, 5, 3, 513), "g": (5, 300), "A_log": (300,)}),
    Case("keys alone", {"k": (2, 9, 3, 128)}),
    Case("no token", rows(0) | {"g": (2, 0, 5), "A_log": (5,), "dt_bias": (5,), "beta": (2, 0, 5)}),
]


def formulas(
    q=None, k=None, g=None, beta=None, A_log=None, dt_bias=None, by_channel=False,
    lower_bound=None, strength=1.0,
):  # type: ignore[no-untyped-def]  # fmt: skip
    made = {}
    for name, x in {"q": q, "k": k}.items():
        if x is not None:
            made[name] = x / (x.square().sum(-1, keepdim=True) + L2_EPS).sqrt()
    if g is not None:
        z = g if dt_bias is None else g + dt_bias.view(g.shape[-2:] if by_channel else (-1,))
        rate = None if A_log is None else A_log.exp()
        rate = rate.unsqueeze(-1) if by_channel and rate is not None else rate
        if lower_bound is None:
            made["g"] = -rate * softplus(z, threshold=50)
        else:
            made["g"] = lower_bound * (z if rate is None else rate * z).sigmoid()
    if beta is not None:
        made["beta"] = strength * beta.sigmoid()
    return made


def upstream(made: Tensors) -> Tensors:
    rng = torch.Generator().manual_seed(1)
    return {
        n: torch.randn(y.shape, generator=rng).bfloat16().to(y.dtype).to(y.device)
        for n, y in made.items()
    }


def by_autograd(call, x: Inputs, dtype: torch.dtype | None = None) -> Tensors:  # type: ignore[no-untyped-def]
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in x.tensors.items()}
    made = call(**leaves)
    up = upstream({n: y.detach() for n, y in made.items()})
    grads = torch.autograd.grad(
        list(made.values()), list(leaves.values()), [up[n] for n in made], allow_unused=True
    )
    results = {RESULTS[n]: y.detach() for n, y in made.items()}
    return results | {f"d{n}": d for n, d in zip(leaves, grads, strict=True)}


def operator(case: Case):  # type: ignore[no-untyped-def]
    def call(**tensors: Tensor) -> Tensors:
        made = delta_inputs(**tensors, **case.options)
        return {n: y for n, y in zip(RESULTS, made, strict=True) if y is not None}

    return call


def raw(impl: Emulator, case: Case, x: Inputs) -> Tensors:
    """Both kernels without autograd, under every seed."""
    library = getattr(torch.ops, f"lsm{impl.flavour}")
    tensors = [x.tensors.get(n) for n in NAMES]
    options = {"by_channel": False, "lower_bound": None, "strength": 1.0} | case.options

    def call() -> Tensors:
        given = (*tensors, *options.values(), L2_EPS)
        made = dict(zip(RESULTS, library.delta_inputs_fwd(*given), strict=True))
        made = {n: y for n, y in made.items() if n in x.tensors}
        up = upstream(made)
        grads = library.delta_inputs_bwd(*given, *(up.get(n) for n in RESULTS))
        results = {RESULTS[n]: y for n, y in made.items()}
        return results | {f"d{n}": d for n, d in zip(NAMES, grads, strict=True) if n in x.tensors}

    emulator(impl.flavour)
    return impl.under_every_seed(call)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "bf16+f32", "f16", "f64"])
@pytest.mark.parametrize("of", CASES, ids=str)
def test_formulas(impl: Impl, of: Case, dtype: str) -> None:
    """Results and the gradients of everything, A_log and dt_bias among them."""
    x = of.make(dtype)
    expected = [by_autograd(lambda **t: formulas(**t, **of.options), x, d) for d in
                (torch.float64, torch.float32)]  # fmt: skip
    if isinstance(impl, Emulator):
        got = raw(impl, of, x)
    else:
        with threads(2):
            got = by_autograd(operator(of), x.to(impl.device))
    assert_accepted({n: t.cpu() for n, t in got.items()}, *expected, x)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_race_build_is_silent(case: Case, dtype: str) -> None:
    x = case.make(dtype)
    race, plain = (
        Emulator(flavour, flavour, seeds)
        for flavour, seeds in (("_emu_race", (1, 2, 3, 4)), ("_emu", (0,)))
    )
    assert_same_bits(raw(race, case, x), raw(plain, case, x))


def test_one_pass_over_memory() -> None:
    """One launch forward and two backward; every number is read and written once."""
    B, T, H, K = 1, 64, 4, 64
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "g": (B, T, H, K), "beta": (B, T, H)}
    case = Case("kda", shapes | {"A_log": (H,), "dt_bias": (H * K,)}, BY_CHANNEL)
    x = case.make("bf16")
    emu = emulator("_emu")
    emu.reset_counters()
    raw(Emulator("_emu", "_emu", (0,)), case, x)
    forward, backward, sums = emu.counters()["launches"]
    given = sum(t.nbytes for t in x.tensors.values())
    qk, logits = B * T * H * K * 2, B * T * H * K + B * T * H
    wide = 2 * qk + 4 * logits  # what is made, and its gradients
    assert forward["global_write_bytes"] == wide
    assert given <= forward["global_read_bytes"] <= 1.06 * given  # rates, once per chunk and lane
    partial = 4 * (H * K + H) * T // 32
    assert backward["global_write_bytes"] == 2 * qk + 2 * logits + partial
    assert given + wide <= backward["global_read_bytes"] <= given + wide + 0.06 * given
    assert sums["global_read_bytes"] == partial and sums["global_write_bytes"] == 4 * (H * K + H)


def test_rows_of_other_strides(cpu: Impl) -> None:
    """As a layer's projection hands them over: parts of one tensor."""
    case = CASES[0]
    x = case.make("f32")
    wide = torch.cat([x.tensors["q"], x.tensors["k"]], -1)
    parts = {"q": wide[..., :12], "k": wide[..., 12:], "g": x.tensors["g"].mT.contiguous().mT}
    y = dataclasses.replace(x, tensors=x.tensors | parts)
    assert_same_bits(by_autograd(operator(case), x), by_autograd(operator(case), y))
    impl = Emulator("_emu", "_emu", (0,))
    assert_same_bits(raw(impl, case, x), raw(impl, case, y))


@pytest.mark.parametrize("flavour", ["cpu", "_emu"])
def test_extremes(flavour: str) -> None:
    """Zero rows, and logits where exponentials end."""
    case = Case("", {"q": (1, 4, 1, 3), "g": (8, 1), "A_log": (1,), "beta": (8, 1)})
    x = case.make("f32")
    x.tensors["q"][:, 1] = 0
    x.tensors["q"][:, 2] *= 1e-18
    logits = torch.tensor([-torch.inf, -1e4, -100, -20, 20, 100, 1e4, torch.inf]).unsqueeze(-1)
    x.tensors["g"], x.tensors["beta"], x.tensors["A_log"] = logits, logits, torch.zeros(1)
    if flavour == "cpu":
        made = operator(case)(**x.tensors)
    else:
        results = raw(Emulator(flavour, flavour, (0,)), case, x)
        made = {n: results[name] for n, name in RESULTS.items() if name in results}
    assert made["q"].isfinite().all() and not made["q"][:, 1].any()
    torch.testing.assert_close(made["g"], -softplus(logits, threshold=50))
    torch.testing.assert_close(made["beta"], logits.sigmoid())


def test_absent_gradients() -> None:
    """Only what asks for one gets one."""
    case = CASES[1]
    x = {n: t.clone() for n, t in case.make("f32").tensors.items()}
    x["dt_bias"].requires_grad_()
    x["k"].requires_grad_()
    made = operator(case)(**x)
    (only,) = torch.autograd.grad(made["k"].sum(), [x["k"]], retain_graph=True)
    d_bias, d_k = torch.autograd.grad(made["g"].sum() + made["q"].sum(), [x["dt_bias"], x["k"]],
                                      allow_unused=True)  # fmt: skip
    assert only.shape == x["k"].shape and d_bias.any() and d_k is None


def test_operator_is_what_pytorch_expects() -> None:
    for case in (CASES[0], CASES[2], CASES[8]):
        tensors = case.make("f64").tensors
        given = [tensors[n].requires_grad_() if n in tensors else None for n in NAMES]
        options = {"by_channel": False, "lower_bound": None, "strength": 1.0} | case.options
        torch.library.opcheck(
            torch.ops.lsm.delta_inputs_fwd.default, (*given, *options.values(), L2_EPS)
        )


def test_double_backward_is_refused() -> None:
    q = torch.randn(1, 3, 2, 5, requires_grad=True)
    (dq,) = torch.autograd.grad(delta_inputs(q)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dq.sum().backward()


def test_errors() -> None:
    g, one = torch.randn(2, 3, 4), torch.ones(4)
    with pytest.raises(RuntimeError, match="needs one of q, k, g and beta"):
        torch.ops.lsm.delta_inputs_fwd(*[None] * 4, one, None, False, None, 1.0, 1e-6)
    with pytest.raises(RuntimeError, match=r"q must have shape \[B, H, K\] or"):
        delta_inputs(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"A_log must have shape \[HV\] = \[4\], got \[3\]"):
        delta_inputs(g=g, A_log=torch.ones(3))
    with pytest.raises(RuntimeError, match="A_log must have dtype float32, got float64"):
        delta_inputs(g=g, A_log=one.double())
    with pytest.raises(RuntimeError, match=r"dt_bias must have shape \[HV \* K\] = \[12\]"):
        delta_inputs(g=g, A_log=torch.ones(3), dt_bias=one, by_channel=True)
    with pytest.raises(RuntimeError, match="A_log and dt_bias need g"):
        delta_inputs(beta=g, A_log=one)
    with pytest.raises(RuntimeError, match="q must be bfloat16, float16, float32 or float64"):
        delta_inputs(torch.ones(1, 2, 3, dtype=torch.int32))
