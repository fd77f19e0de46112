"""The sLSTM cell: on every implementation against its definition, and its laws."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields

import pytest
import torch
from cases import DTYPES
from checks import assert_accepted, assert_same_bits
from impls import Emulator, Impl, threads
from inputs import Inputs, Tensors, boundaries, state_dtype
from torch import Tensor

from lsm_cuda import ops, reference


@dataclass(frozen=True)
class Cell:
    """One call. ``gate``: size of the input and forget gates' pre-activations."""

    T: int = 9
    H: int = 2
    D: int = 16
    dtype: str = "f32"
    batch: int | str = 2
    state: str = "none"
    gate: float = 1.0

    def __str__(self) -> str:
        return "-".join(f"{f.name}_{getattr(self, f.name)}" for f in fields(self))


CASES = [
    Cell(),
    Cell(T=0, state="both"),
    Cell(T=1, D=5, state="both"),
    Cell(T=33, D=64, H=1, dtype="bf16", state="final"),
    Cell(T=20, D=7, dtype="f16", batch="int32"),
    Cell(T=20, D=16, batch="int64", state="both"),
    Cell(T=20, D=33, batch=1, gate=30.0, state="both"),
    Cell(T=40, D=17, gate=300.0, dtype="bf16"),
    Cell(T=7, D=16, gate=1e4, state="initial"),
    Cell(T=5, D=100, H=1, state="both"),
    Cell(T=3, D=300, H=1, batch=1),
    Cell(T=12, D=20, dtype="f64", state="both", batch="int32"),
    Cell(batch=0, state="both"),
]


def make(case: Cell) -> tuple[Inputs, Tensor | None]:
    rng = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    cu = boundaries(case.T, getattr(torch, case.batch)) if isinstance(case.batch, str) else None
    B = 1 if cu is not None else case.batch
    N, dtype = B if cu is None else len(cu) - 1, DTYPES[case.dtype]
    wide = state_dtype(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    x = normal(B, case.T, 4, case.H, case.D)
    x[:, :, :2] *= case.gate
    tensors = {
        "x": x.to(dtype),
        "R": (normal(case.H, case.D, 4, case.D) / case.D**0.5).to(wide),
    }
    if case.state in ("initial", "both"):
        state = normal(N, 4, case.H, case.D)
        state[:, 2] = state[:, 2].abs() + 1  # n
        state[:, 2:, :, ::3] = 0  # channels without a past
        state[:, 1, :, ::3] = 0
        tensors["initial_state"] = state.to(wide)
    grad = normal(B, case.T, case.H, case.D).to(dtype)
    final = normal(N, 4, case.H, case.D).to(wide) if case.state in ("final", "both") else None
    return Inputs(tensors, grad, cu_seqlens=cu), final


def differentiate(forward, x: Inputs, grad_state: Tensor | None) -> Tensors:
    leaves = {name: t.detach().requires_grad_() for name, t in x.tensors.items()}
    y, state = forward(leaves)
    results, upstream = {"o": y}, [x.grad_o]
    if grad_state is not None:
        results["final_state"] = state
        upstream.append(grad_state)
    nothing = sum(v.sum() for v in leaves.values()) * 0
    results = {n: t if t.requires_grad else t + nothing for n, t in results.items()}
    grads = torch.autograd.grad(
        list(results.values()), list(leaves.values()), upstream,
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    gradients = {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {n: t.detach() for n, t in results.items()} | gradients


def definition(x: Inputs, grad_state: Tensor | None, dtype: torch.dtype) -> Tensors:
    def forward(t: Tensors):
        return reference.slstm(**t, cu_seqlens=x.cu_seqlens)

    upstream = None if grad_state is None else grad_state.to(dtype)
    return differentiate(forward, x.map(lambda t: t.to(dtype)), upstream)


def run(impl: Impl, x: Inputs, grad_state: Tensor | None) -> Tensors:
    if not isinstance(impl, Emulator):
        cu = None if x.cu_seqlens is None else x.cu_seqlens.to(impl.device)

        def forward(t: Tensors):
            return ops.slstm(**t, output_final_state=grad_state is not None, cu_seqlens=cu)

        with threads(2):
            upstream = None if grad_state is None else grad_state.to(impl.device)
            results = differentiate(forward, x.to(impl.device), upstream)
        return {n: v.cpu() for n, v in results.items()}

    # By hand what autograd does, with the emulator's operators.
    lib = emulated(impl)
    t = x.tensors
    initial, R = t.get("initial_state"), t["R"]

    def call() -> Tensors:
        y, cells, final = lib.slstm_fwd(
            t["x"], R, initial, x.cu_seqlens, True, grad_state is not None
        )
        h0 = None if initial is None else initial[:, 0].flatten(1)
        before = ops.token_shift(cells[:, :, 0].flatten(2), x.cu_seqlens, h0, taps=(1.0, 0.0))
        before = before.view(cells[:, :, 0].shape)
        raw = t["x"].to(R.dtype) + torch.einsum("bthd,hdge->btghe", before, R)
        draw, dstate = lib.slstm_bwd(
            raw, R.permute(0, 2, 3, 1).contiguous(), cells, initial, x.cu_seqlens,
            x.grad_o.to(R.dtype), grad_state,
        )  # fmt: skip
        results = {
            "o": y,
            "dx": draw.to(t["x"].dtype),
            "dR": torch.einsum("bthd,btghe->hdge", before, draw),
        }
        if grad_state is not None:
            results["final_state"] = final
        return results | ({"dinitial_state": dstate} if initial is not None else {})

    return impl.under_every_seed(call)


def emulated(impl: Emulator):
    class Library:
        @staticmethod
        def raw(kind: str, namespace: str = "lsm"):
            return getattr(torch.ops, namespace)

    return impl.raw(Library, "")


@pytest.mark.parametrize("cell", CASES, ids=str)
def test_results_and_gradients(impl, cell):
    x, grad_state = make(cell)
    truth, same = (definition(x, grad_state, d) for d in (torch.float64, torch.float32))
    assert_accepted(run(impl, x, grad_state), truth, same, x)


@pytest.mark.parametrize("cell", [CASES[3], CASES[5], CASES[9]], ids=str)
def test_race_build_is_silent(cell):
    """Under schedules of its own, to the same bits."""
    x, grad_state = make(cell)
    emulators = [Emulator(f, f, seeds) for f, seeds in (("_emu", (0, 5)), ("_emu_race", (1, 2, 6)))]
    plain, race = (run(emu, x, grad_state) for emu in emulators)
    assert_same_bits(race, plain)


def test_steps_and_splits_are_the_whole(impl):
    x, _ = make(Cell(T=12, D=24))
    fwd = (emulated(impl) if isinstance(impl, Emulator) else torch.ops.lsm).slstm_fwd
    step = (emulated(impl) if isinstance(impl, Emulator) else torch.ops.lsm).slstm_step
    tokens, R = (t.to(impl.device) for t in x.tensors.values())
    whole, _, final = fwd(tokens, R, None, None, False, True)
    a, _, state = fwd(tokens[:, :7], R, None, None, False, True)
    parts = [a]
    for t in range(7, 12):
        parts.append(step(tokens[:, t], R, state)[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state, final, rtol=1e-6, atol=1e-6)


def test_without_recurrent_weights_it_is_a_running_softmax():
    """R = 0 and open forget gates: c/n is an average of tanh z with weights e^i, a closed form."""
    x = torch.randn(1, 30, 4, 1, 8, dtype=torch.float64)
    x[:, :, 0] *= 20
    x[:, :, 1] = 1e3  # log σ = 0
    y, _ = ops.slstm(x, torch.zeros(1, 8, 4, 8))
    i, _, z, o = x.unbind(2)
    for t in (0, 7, 29):
        weights = i[:, : t + 1].softmax(1)
        expected = o[:, t].sigmoid() * (weights * z[:, : t + 1].tanh()).sum(1)
        torch.testing.assert_close(y[:, t], expected)


def test_against_xlstm():
    """NX-AI's cell, one step at a time: their pre-activations come in the same order."""
    module = pytest.importorskip("xlstm.blocks.slstm.src.vanilla.slstm")
    H, D = 2, 8
    x, R = torch.randn(1, 11, 4, H, D), torch.randn(H, D, 4, D) / D
    y, final = ops.slstm(x, R, output_final_state=True)
    state = torch.zeros(4, 1, H * D)  # y, c, n, m
    constants = {"num_heads": H, "head_dim": D, "num_gates": 4}
    for t in range(11):
        h = state[0].view(1, H, D)
        recurrent = torch.einsum("bhd,hdge->bghe", h, R).reshape(1, -1)
        state, _ = module.slstm_forward_pointwise(
            x[:, t].reshape(1, -1), recurrent, torch.zeros(4 * H * D), state, constants
        )
        torch.testing.assert_close(y[:, t].flatten(1), state[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(final.unbind(1), state, strict=True):
        torch.testing.assert_close(ours.flatten(1), theirs, rtol=1e-5, atol=1e-5)


def test_same_bits_twice(impl):
    x, grad_state = make(Cell(T=20, D=40, state="both", batch="int32"))
    assert_same_bits(run(impl, x, grad_state), run(impl, x, grad_state))


def test_wrong_boundaries_give_nan_on_the_device(impl):
    x, _ = make(Cell(T=12, batch="int32"))
    fwd = (emulated(impl) if isinstance(impl, Emulator) else torch.ops.lsm).slstm_fwd
    tokens, R = (t.to(impl.device) for t in x.tensors.values())
    cu = x.cu_seqlens.flip(0).contiguous().to(impl.device)
    y, cells, final = fwd(tokens, R, None, cu, True, True)
    assert y.isnan().all() and final.isnan().all()


test_wrong_boundaries_give_nan_on_the_device.only_impls = ("emulator", "cuda")


def test_opcheck():
    x, grad_state = make(Cell(T=5, D=6, state="both", batch="int32"))
    t = {n: v.requires_grad_() for n, v in x.tensors.items()}
    args = (t["x"], t["R"], t["initial_state"], x.cu_seqlens, True, True)
    torch.library.opcheck(torch.ops.lsm.slstm_fwd.default, args)
    state = torch.zeros(1, 4, 2, 6)
    step = (t["x"][:, 0].detach(), t["R"].detach(), state)
    torch.library.opcheck(torch.ops.lsm.slstm_step.default, step)


def test_gradcheck():
    x, _ = make(Cell(T=5, H=1, D=3, dtype="f64", state="both", batch=1))
    leaves = [t.requires_grad_() for t in x.tensors.values()]

    def call(x, R, state):
        return ops.slstm(x, R, state, True)

    # Where n = 0 the definition ignores m and has a jump in n.
    leaves[2] = torch.rand(1, 4, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.slow
def test_compile():
    R = torch.randn(1, 6, 4, 6, requires_grad=True)
    compiled = torch.compile(ops.slstm, fullgraph=True, dynamic=True)
    for T in (4, 7):
        x = torch.randn(2, T, 4, 1, 6, requires_grad=True)
        y, state = compiled(x, R, None, True)
        torch.testing.assert_close(y, ops.slstm(x, R)[0])
        (y.sum() + state.sum()).backward()


X, R = torch.randn(2, 5, 4, 3, 8), torch.randn(3, 8, 4, 8)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ops.slstm(X[0], R), "x must have shape [B, T, 4, H, D], got [5, 4, 3, 8]"),
        (lambda: ops.slstm(X[:, :, :3], R), "x must have four gates, [B, T, 4, H, D], got "
         "[2, 5, 3, 3, 8]"),
        (lambda: ops.slstm(X, R[:2]), "R must have shape [H, D, 4, D] = [3, 8, 4, 8], got "
         "[2, 8, 4, 8]"),
        (lambda: ops.slstm(X, R, torch.zeros(1, 4, 3, 8)), "initial_state must have shape "
         "[N, 4, H, D] = [2, 4, 3, 8], got [1, 4, 3, 8]"),
        (lambda: ops.slstm_step(X[:, 0], R, torch.zeros(2, 4, 3, 8).double()), "state must have "
         "dtype float32, got float64"),
    ],
)  # fmt: skip
def test_errors(call, text):
    with pytest.raises(RuntimeError) as error:
        call()
    assert text in str(error.value)
