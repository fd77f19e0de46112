"""Mamba-1's selective scan: its definition, laws, other implementations, errors."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from checks import assert_accepted
from impls import Impl, threads
from scans import real, real_inputs, wide
from selective import DTYPES, channels_first, draw, results, walk

from lsm_cuda import ops, reference

# T, channels, states, groups of B and C ("B", "C": constant), with skip z bias softplus, or in an
# order of their own ("o"), channels first ("c"); batch
SHAPES = [
    (1, 8, 4, 1, "", 2),
    (37, 20, 16, 1, "dzbs", 2),
    (33, 24, 3, 2, "dzbs", 1),
    (50, 7, 17, 1, "zs", "int32"),
    (37, 12, 16, "B", "dz", 2),
    (20, 12, 8, "C", "bs", 1),
    (16, 10, 5, "BC", "d", "int64"),
    (45, 37, 16, 1, "dzbsc", 2),
    (37, 20, 3, 1, "dzbsoc", "int32"),
    (0, 8, 4, 1, "dzbs", 2),
]


def public(softplus: bool):
    """selective_scan_fn, channels last."""

    def call(u, dt, A, B, C, D=None, z=None, dt_bias=None, **rest):  # type: ignore[no-untyped-def]
        B, C = (t if t.dim() == 2 else t.permute(0, 2, 3, 1) for t in (B, C))
        y, state = ops.selective_scan_fn(
            u.mT, dt.mT, A, B, C, D, None if z is None else z.mT, dt_bias, softplus, True, **rest
        )
        return y.mT, state

    return call


@pytest.mark.parametrize(("shape", "dtype"), [*itertools.product(SHAPES, DTYPES)], ids=str)
def test_definition(impl: Impl, shape: tuple, dtype: str) -> None:
    x, softplus = draw(*shape, dtype)
    order = walk(shape[0]) if "o" in shape[4] else None

    def definition(**rest):  # type: ignore[no-untyped-def]
        return reference.selective_scan(dt_softplus=softplus, **rest)

    truth, same = (
        results(definition, x.map(lambda t, d=d: wide(t, d)), order)
        for d in (torch.float64, torch.float32)
    )
    if "c" in shape[4]:
        x = channels_first(x)
    with threads(2):
        there = None if order is None else order.to(impl.device)
        actual = results(public(softplus), x.to(impl.device), there)
    actual = {n: t.cpu() for n, t in actual.items()}
    if not dtype.startswith("c"):
        return assert_accepted(actual, truth, same, x)
    actual, truth, same = ({n: real(t) for n, t in r.items()} for r in (actual, truth, same))
    return assert_accepted(actual, truth, same, real_inputs(x))


test_definition.only_impls = ("cpu", "cuda")


def arguments(dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    x, _ = draw(37, 12, 5, 1, "dzbs", 2, "f64")
    t = {n: v.to(dtype) for n, v in x.tensors.items()}
    channels_first = {n: t[n].mT for n in ("u", "dt", "z")}
    B, C = (t[n].squeeze(2).mT for n in "BC")
    return (channels_first["u"], channels_first["dt"], t["A"], B, C, t["D"], channels_first["z"],
            t["dt_bias"], True)  # fmt: skip


def pieces(a: tuple, *bounds: slice) -> list[tuple]:
    return [tuple(t[..., s] if torch.is_tensor(t) and t.dim() == 3 else t for t in a)
            for s in bounds]  # fmt: skip


def test_split_is_whole_and_step_is_prefill() -> None:
    a = arguments()
    y, state = ops.selective_scan_fn(*a, True)
    one, two = pieces(a, slice(0, 20), slice(20, None))
    first, middle = ops.selective_scan_fn(*one, True)
    second, last = ops.selective_scan_fn(*two, True, middle)
    torch.testing.assert_close((torch.cat([first, second], 2), last), (y, state))
    state_of_steps = torch.zeros_like(state)
    u, dt, A, B, C, D, z, bias, softplus = a
    steps = [
        ops.selective_state_update(
            state_of_steps, u[..., t], dt[..., t], A, B[..., t], C[..., t], D, z[..., t], bias,
            softplus,
        )
        for t in range(37)
    ]  # fmt: skip
    torch.testing.assert_close((torch.stack(steps, 2), state_of_steps), (y, state))


@pytest.mark.parametrize("S", [5, 16, 40])  # less than a vector of any kind, one, and a rest
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_steps_are_the_definition(S: int, dtype: str) -> None:
    x, softplus = draw(1, 37, S, 1, "dzbs", 2, dtype)
    t, first = x.tensors, {n: v[:, 0] for n, v in x.tensors.items() if n in ("u", "dt", "z")}
    state = x.initial_state.clone()
    y = ops.selective_state_update(
        state, first["u"], first["dt"], t["A"], t["B"][:, 0], t["C"][:, 0], t["D"], first["z"],
        t["dt_bias"], softplus,
    )  # fmt: skip
    wide = {n: v.double() for n, v in t.items()}
    want, last = reference.selective_scan(
        **wide, dt_softplus=softplus, initial_state=x.initial_state.double()
    )
    torch.testing.assert_close(y.unsqueeze(1), want.to(y.dtype), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(state, last.float(), rtol=1e-5, atol=1e-6)


def test_a_step_does_not_depend_on_threads_nor_on_how_its_group_is_given() -> None:
    x, softplus = draw(1, 1000, 17, 1, "dzb", 2, "f32")  # states enough for two threads
    t, first = x.tensors, {n: v[:, 0] for n, v in x.tensors.items() if n in ("u", "dt", "z")}
    results = []
    for n, grouped in ((1, True), (2, True), (2, False)):
        state = torch.ones(2, 1000, 17)
        B, C = (t[name][:, 0] if grouped else t[name][:, 0, 0] for name in "BC")
        with threads(n):
            y = ops.selective_state_update(
                state, first["u"], first["dt"], t["A"], B, C, t["D"], first["z"], t["dt_bias"],
                softplus,
            )  # fmt: skip
        results.append((y, state))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_same_bits_twice_and_close_on_any_number_of_threads() -> None:
    a = [t.requires_grad_() if torch.is_tensor(t) else t for t in arguments(torch.float32)]
    tensors = [t for t in a if torch.is_tensor(t)]

    def run(n: int):  # type: ignore[no-untyped-def]
        with threads(n):
            y, state = ops.selective_scan_fn(*a, True)
            return (y, state, *torch.autograd.grad(y.sum() + state.sum(), tensors))

    first, second, single = run(2), run(2), run(1)
    assert all(torch.equal(s, t) for s, t in zip(first, second, strict=True))
    torch.testing.assert_close(first, single, rtol=1e-4, atol=1e-5)


def test_constant_step_is_a_convolution() -> None:
    """Time-invariant B, C and dt: y is u convolved with C e^{dt A l} dt B."""
    u, _, A, *_ = arguments()
    B, C = torch.randn(2, 12, 5, dtype=torch.float64)
    y = ops.selective_scan_fn(u, torch.full_like(u, 0.3), A, B, C)
    powers = torch.exp(0.3 * A[..., None] * torch.arange(37))
    kernel = torch.einsum("dn,dnl,dn->dl", C, powers, 0.3 * B)
    padded = torch.nn.functional.pad(u, (36, 0))
    want = torch.nn.functional.conv1d(padded, kernel.flip(1)[:, None], groups=12)
    torch.testing.assert_close(y, want)


def test_complex_without_phase_is_real() -> None:
    """Twice: y has both of a conjugate pair."""
    u, dt, A, B, C, D, *rest = arguments()
    y, state = ops.selective_scan_fn(u, dt, A, B, 2 * C, D, *rest, True)
    pairs = [t.to(torch.complex128) for t in (A, B, C)]
    got, final = ops.selective_scan_fn(u, dt, *pairs, D, *rest, True)
    torch.testing.assert_close((got, final.real), (y, state))
    assert not final.imag.any()


def test_backwards_is_a_flip() -> None:
    a = arguments()
    turned = tuple(t.flip(2) if torch.is_tensor(t) and t.dim() == 3 else t for t in a)
    y, state = ops.selective_scan_fn(*turned, True)
    back = ops.selective_scan_fn(*a, True, order=torch.arange(36, -1, -1))
    torch.testing.assert_close(back, (y.flip(2), state))


def test_is_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    peer = getattr(modeling.mamba_selective_scan, "__wrapped__", modeling.mamba_selective_scan)
    a = [t.requires_grad_() if torch.is_tensor(t) else t for t in arguments(torch.float32)]
    tensors = [t for t in a if torch.is_tensor(t)]
    results = []
    for call in (ops.selective_scan_fn, peer):
        y, state = call(*a, True)
        results.append((y, state, *torch.autograd.grad(y.square().sum(), tensors)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rate", [0.0, -1.0, -100.0])
def test_extreme_decays(rate: float) -> None:
    """Values and every gradient against fp64; steps have size one, so a token decays by e^rate."""
    results = []
    for kind in (torch.float32, torch.float64):
        u, dt, A, *rest = (t.to(kind) if torch.is_tensor(t) else t for t in arguments())
        A, rest[-2:] = torch.full_like(A, rate), [torch.zeros_like(rest[-2]), False]
        leaves = [t.requires_grad_() for t in (u, torch.ones_like(dt), A, *rest[:-1])]
        y, state = ops.selective_scan_fn(*leaves, False, True)
        grads = torch.autograd.grad(y.square().sum() + state.sum(), leaves)
        results.append([t.float() for t in (y, state, *grads)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_operator_is_well_formed() -> None:
    u, dt, A, B, C, D, z, bias, _ = arguments(torch.float32)
    tokens = [t.mT.contiguous().requires_grad_() for t in (u, dt, z)]
    B, C = (t.mT.unsqueeze(2).contiguous().requires_grad_() for t in (B, C))
    A = A.requires_grad_()
    h0 = torch.zeros(2, *A.shape)
    arguments_ = (*tokens[:2], A, B, C, D, tokens[2], bias, h0, None, None, True, False, True)
    torch.library.opcheck(torch.ops.lsm.selective_scan_fwd, arguments_)
    channels_first = [t.detach().mT.contiguous().mT.requires_grad_() for t in tokens]
    arguments_ = (*channels_first[:2], *arguments_[2:6], channels_first[2], *arguments_[7:])
    torch.library.opcheck(torch.ops.lsm.selective_scan_fwd, arguments_)
    with torch.no_grad():
        one = [t[:, 0] for t in (*tokens[:2], B, C, tokens[2])]
        step = (one[0], one[1], A, one[2], one[3], D, one[4], bias, h0, True)
        torch.library.opcheck(torch.ops.lsm.selective_scan_step, step)


def test_compiles_as_one_graph() -> None:
    *tensors, softplus = arguments(torch.float32)
    leaves = [t.requires_grad_() for t in tensors]

    def loss(*tensors):  # type: ignore[no-untyped-def]
        y, state = ops.selective_scan_fn(*tensors, softplus, True)
        return y.square().sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)]
    torch.testing.assert_close(*grads)


ERRORS = {
    "delta must have shape [B, D, T] = [2, 12, 37], got [2, 12, 36]": {1: lambda t: t[..., 1:]},
    "z must have shape [B, D, T] = [2, 12, 37], got [2, 11, 37]": {6: lambda t: t[:, 1:]},
    "A must have shape [D, S] with D = 12, got [11, 5]": {2: lambda t: t[1:]},
    "dt_bias must have shape [D] = [12], got [3]": {7: lambda t: t[:3]},
    "A must be on cpu like u, got meta": {2: lambda t: t.to("meta")},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_is_wrong(message: str) -> None:
    a = list(arguments())
    for i, change in ERRORS[message].items():
        a[i] = change(a[i])
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.selective_scan_fn(*a)


def test_no_second_derivative() -> None:
    a = [t.requires_grad_() if torch.is_tensor(t) else t for t in arguments()]
    (grad,) = torch.autograd.grad(ops.selective_scan_fn(*a).sum(), a[0], create_graph=True)
    with pytest.raises(RuntimeError, match="lsm::selective_scan_bwd: the backward pass is itself"):
        torch.autograd.grad(grad.sum(), a[1])
