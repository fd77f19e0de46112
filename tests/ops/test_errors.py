"""Every bad input is refused, before memory is touched, by a text that says what is right."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Case, Op
from checks import assert_refused
from impls import Impl
from inputs import Inputs, make_inputs
from torch import Tensor

Change = Callable[[Tensor], object]


def inputs(op: Op, **kwargs) -> Inputs:
    kwargs = {"T": 8, "heads": (2, 4), "dims": (16, 24), "state": "both"} | kwargs
    return make_inputs(Case(op, **kwargs))


def changed(x: Inputs, argument: str, f: Change) -> Inputs:
    if argument in x.tensors:
        return dataclasses.replace(x, tensors=x.tensors | {argument: f(x.tensors[argument])})
    return dataclasses.replace(x, **{argument: f(getattr(x, argument))})


def gate_text(op: Op, g: Tensor, one_token: bool = False) -> str:
    """What is said of a gate of the wrong shape."""
    sizes = {"B": 1, "T": 8, "HV": 4, "K": 16, "V": 24}
    dims = [d for d in op.tensors["g"].split() if not (one_token and d == "T")]
    return f"g must have shape [{', '.join(dims)}] = {[sizes[d] for d in dims]}, got {[*g.shape]}"


# argument, what is done to it, the text after the operator's name; {device} as it prints
BAD = {
    "q rank": ("q", lambda t: t[0], "q must have shape [B, T, H, K], got [8, 2, 16]"),
    "k rank": ("k", lambda t: t[None], "k must have shape [B, T, H, K], got [1, 1, 8, 2, 16]"),
    "v rank": ("v", lambda t: t[..., 0], "v must have shape [B, T, HV, V], got [1, 8, 4]"),
    "g rank": ("g", lambda t: t[..., 0], "{gate}"),
    "head mismatch": ("k", lambda t: t[:, :, :1], "k must have H = 2 heads like q, got 1"),
    "K mismatch": ("k", lambda t: t[..., :8], "k must have K = 16 like q, got K = 8"),
    "time mismatch": (
        "k",
        lambda t: t[:, :5],
        "k must have shape [B, T, H, K] = [1, 8, 2, 16] (like q), got [1, 5, 2, 16]",
    ),
    "time mismatch of v": (
        "v",
        lambda t: t[:, :5],
        "v must have shape [B, T, HV, V] with the batch and time of q = [1, 8, 2, 16], "
        "got [1, 5, 4, 24]",
    ),
    "HV no multiple": (
        "v",
        lambda t: t[:, :, :3],
        "v must have a multiple of the H = 2 heads of q and k, got HV = 3",
    ),
    "no columns": ("v", lambda t: t[..., :0], "K and V must be at least 1, got K = 16, V = 0"),
    "gate heads": ("g", lambda t: t[:, :, :2], "{gate}"),
    "mixed dtypes": ("k", Tensor.half, "k must have dtype float32 like q, got float16"),
    "mixed dtypes of v": ("v", Tensor.bfloat16, "v must have dtype float32 like q, got bfloat16"),
    "gate dtype": ("g", Tensor.half, "g must have dtype float32 like q, or float32, got float16"),
    "mixed devices": ("v", lambda t: t.to("meta"), "v must be on {device} like q, got meta"),
    "state device": (
        "initial_state",
        lambda t: t.to("meta"),
        "initial_state must be on {device} like q, got meta",
    ),
    "state shape": (
        "initial_state",
        lambda t: t[:, :2],
        "initial_state must have shape [N, HV, K, V] = [1, 4, 16, 24], got [1, 2, 16, 24]",
    ),
    "state transposed": (
        "initial_state",
        lambda t: t.transpose(-1, -2),
        "initial_state must have shape [N, HV, K, V] = [1, 4, 16, 24], got [1, 4, 24, 16]",
    ),
    "state dtype": (
        "initial_state",
        Tensor.double,
        "initial_state must have dtype float32, got float64",
    ),
}


def on_device(impl: Impl, x: Inputs) -> Inputs:
    """Like Inputs.to, but what was put on the meta device stays there."""
    if impl.device == "cpu":
        return x
    move = {n: t if t.is_meta else t.to(impl.device) for n, t in x.tensors.items()}
    rest = {}
    for name in ("initial_state", "cu_seqlens"):
        t = getattr(x, name)
        rest[name] = t if t is None or t.is_meta else t.to(impl.device)
    return dataclasses.replace(x, tensors=move, **rest)


def device_name(impl: Impl) -> str:
    return "cuda:0" if impl.device == "cuda" else "cpu"


@pytest.mark.parametrize("name", BAD)
def test_forward_refuses(impl: Impl, op: Op, name: str) -> None:
    argument, change, text = BAD[name]
    x = on_device(impl, changed(inputs(op), argument, change))
    gate = gate_text(op, x.tensors["g"]) if argument == "g" else ""
    text = f"lsm::{op}_fwd: {text}".format(device=device_name(impl), gate=gate)
    assert_refused(text, impl.forward, op, x)


# Fake kernels refuse meta tensors, and torch.ops.lsm_emu has none.
test_forward_refuses.applies = lambda impl, op, name: (
    not ("device" in name and impl.name == "emulator") and (BAD[name][0] != "g" or op.gated)
)


def test_integers_are_refused(impl: Impl, op: Op) -> None:
    x = on_device(impl, changed(inputs(op), "q", Tensor.long))
    rest = " or float32" if impl.tensor_cores else ", float32 or float64"
    supported = "bfloat16, float16" + rest
    assert_refused(f"lsm::{op}_fwd: q must be {supported}, got int64", impl.forward, op, x)


def test_half_states_are_converted(impl: Impl, op: Op) -> None:
    """What FLA's callers hand over; wider than what the kernels would silently lose."""
    x = inputs(op, dtype="bf16")
    half = changed(x, "initial_state", Tensor.bfloat16)
    wide = changed(half, "initial_state", Tensor.float)
    (a, s), (b, t) = (impl.forward(op, y.to(impl.device)) for y in (half, wide))
    assert torch.equal(a, b)
    assert torch.equal(s, t)
    assert s.dtype == torch.float32


test_half_states_are_converted.only_impls = ("cpu", "cuda")  # of the public function


BAD_CU_SEQLENS = {
    "dtype": (torch.tensor([0.0, 8.0]), "cu_seqlens must have dtype int32 or int64, got float32"),
    "int16": (
        torch.tensor([0, 8], dtype=torch.int16),
        "cu_seqlens must have dtype int32 or int64, got int16",
    ),
    "rank": (torch.tensor([[0, 8]]), "cu_seqlens must have shape [N + 1], got [1, 2]"),
    "no entry": (
        torch.tensor([], dtype=torch.int64),
        "cu_seqlens must have shape [N + 1], got [0]",
    ),
    "device": (
        torch.tensor([0, 8], device="meta"),
        "cu_seqlens must be on {device} like q, got meta",
    ),
}
BAD_VALUES = {
    "start": ([1, 8], "cu_seqlens must start at 0, got 1"),
    "decreasing": ([0, 5, 3, 8], "cu_seqlens must not decrease, got 5 before 3 at position 2"),
    "end": ([0, 5, 7], "cu_seqlens must end at T = 8, got 7"),
    "past the end": ([0, 5, 9], "cu_seqlens must end at T = 8, got 9"),
    "negative": ([0, -4, 8], "cu_seqlens must not decrease, got 0 before -4 at position 1"),
    "only one": ([0], "cu_seqlens must end at T = 8, got 0"),
}


@pytest.mark.parametrize("name", BAD_CU_SEQLENS)
def test_boundaries_refused(impl: Impl, op: Op, name: str) -> None:
    cu, text = BAD_CU_SEQLENS[name]
    x = on_device(impl, dataclasses.replace(inputs(op, state="none"), cu_seqlens=cu))
    assert_refused(f"lsm::{op}_fwd: {text}".format(device=device_name(impl)), impl.forward, op, x)


test_boundaries_refused.applies = lambda impl, name: (impl.name, name) != ("emulator", "device")


def test_boundaries_need_one_row(impl: Impl, op: Op) -> None:
    x = dataclasses.replace(
        inputs(op, batch=2, state="none"), cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)
    )
    text = "cu_seqlens needs the sequences packed into one batch row, B = 1, got B = 2"
    assert_refused(f"lsm::{op}_fwd: {text}", impl.forward, op, on_device(impl, x))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", BAD_VALUES)
def test_wrong_boundaries(impl: Impl, op: Op, name: str, dtype: torch.dtype) -> None:
    """The CPU says which value is wrong; CUDA kernels, which cannot without waiting, return NaN."""
    values, text = BAD_VALUES[name]
    cu = torch.tensor(values, dtype=dtype)
    x = dataclasses.replace(inputs(op, state="none"), cu_seqlens=cu)
    states = torch.randn(len(values) - 1, 4, 16, 24)
    if not impl.tensor_cores:
        assert_refused(f"lsm::{op}_fwd: {text}", impl.forward, op, x)
        return
    x = dataclasses.replace(x, initial_state=states, grad_final_state=states)
    for name, t in impl.run(op, x).items():
        assert t.isnan().all(), name


@pytest.mark.parametrize("argument, dim, columns", [("q", "K", 264), ("v", "V", 300)])
def test_too_wide_for_tensor_cores(
    impl: Impl, op: Op, argument: str, dim: str, columns: int
) -> None:
    dims = (columns, 24) if dim == "K" else (16, columns)
    x = inputs(op, dims=dims, state="none").to(impl.device)
    sliced = dim == "V" and impl.name == "cuda"  # by what stands before the operator
    if not impl.tensor_cores or sliced:
        assert impl.forward(op, x)[0].isfinite().all()
        return
    text = (
        f"{dim} = {columns} is beyond the CUDA kernels (supported: {dim} <= 256); "
        "it runs on CPU tensors, or split the heads"
    )
    assert_refused(f"lsm::{op}_fwd: {text}", impl.forward, op, x)


def test_fp64_is_for_the_cpu(impl: Impl, op: Op) -> None:
    x = inputs(op, dtype="f64").to(impl.device)
    if not impl.tensor_cores:
        assert impl.forward(op, x)[0].dtype == torch.float64
        return
    text = (
        "q is float64, which the CUDA kernels do not take (supported: bfloat16, float16, "
        "float32); it runs on CPU tensors"
    )
    assert_refused(f"lsm::{op}_fwd: {text}", impl.forward, op, x)


BAD_BACKWARD = {
    "shape": (
        "grad_o",
        lambda t: t[..., :5],
        "grad_o must have shape [B, T, HV, V] = [1, 8, 4, 24], got [1, 8, 4, 5]",
    ),
    "dtype": ("grad_o", Tensor.half, "grad_o must have dtype float32 like q, got float16"),
    "state": (
        "grad_final_state",
        lambda t: t[..., :5],
        "grad_final_state must have shape [N, HV, K, V] = [1, 4, 16, 24], got [1, 4, 16, 5]",
    ),
    "k": ("k", lambda t: t[..., :8], "k must have K = 16 like q, got K = 8"),
}


@pytest.mark.parametrize("name", BAD_BACKWARD)
def test_backward_refuses(impl: Impl, op: Op, name: str) -> None:
    argument, change, text = BAD_BACKWARD[name]
    x = changed(inputs(op), argument, change).to(impl.device)
    bwd = impl.raw(op, "bwd")
    args = (*x.tensors.values(), x.initial_state, None, 1.0, x.grad_o, x.grad_final_state)
    assert_refused(f"lsm::{op}_bwd: {text}", bwd, *args)


BAD_STEP = {
    "rank": ("q", lambda t: t[None], "q must have shape [B, H, K], got [1, 1, 2, 16]"),
    "heads": ("k", lambda t: t[:, :1], "k must have H = 2 heads like q, got 1"),
    "HV": (
        "v",
        lambda t: t[:, :3],
        "v must have a multiple of the H = 2 heads of q and k, got HV = 3",
    ),
    "batch": (
        "v",
        lambda t: t.expand(2, -1, -1),
        "v must have shape [B, HV, V] with the batch and time of q = [1, 2, 16], got [2, 4, 24]",
    ),
    "gate": ("g", lambda t: t[..., :3], "{gate}"),
    "dtype": ("v", Tensor.half, "v must have dtype float32 like q, got float16"),
    "state shape": (
        "state",
        lambda t: t[:, :2],
        "state must have shape [B, HV, K, V] = [1, 4, 16, 24], got [1, 2, 16, 24]",
    ),
    "state dtype": ("state", Tensor.bfloat16, "state must have dtype float32, got bfloat16"),
    "state strides": (
        "state",
        lambda t: torch.cat([t, t], -1)[..., ::2],
        "state is updated in place and must be contiguous, got strides [3072, 768, 48, 2]",
    ),
}


@pytest.mark.parametrize("name", BAD_STEP)
def test_step_refuses(impl: Impl, op: Op, name: str) -> None:
    argument, change, text = BAD_STEP[name]
    x = inputs(op)
    args = {n: t[:, 0].to(impl.device) for n, t in x.tensors.items()}
    args["state"] = x.initial_state.to(impl.device)
    args[argument] = change(args[argument])
    before = args["state"].clone()
    state = args.pop("state")
    gate = gate_text(op, args["g"], one_token=True) if argument == "g" else ""
    assert_refused(f"lsm::{op}_step: {text}".format(gate=gate), impl.step, op, args, state)
    assert torch.equal(state, before)


test_step_refuses.applies = lambda op, name: BAD_STEP[name][0] != "g" or op.gated


@pytest.mark.parametrize("argument", ["q", "v", "g", "state"])
def test_step_has_no_gradient(cpu: Impl, op_gla: Op, argument: str) -> None:
    x = inputs(op_gla)
    args = {n: t[:, 0] for n, t in x.tensors.items()} | {"state": x.initial_state}
    args[argument] = args[argument].clone().requires_grad_()
    text = (
        "lsm::gla_step: updates the state in place and has no backward, got an argument that "
        "requires grad; use chunk_gla, or torch.no_grad()"
    )
    assert_refused(text, op_gla.step, **args)
    with torch.no_grad():
        assert op_gla.step(**args).isfinite().all()


@pytest.mark.parametrize("kind", ["output", "copy", "states"])
def test_out_of_memory_says_what_did_not_fit(op_gla: Op, kind: str) -> None:
    """Tensors that take no memory themselves (stride 0) ask for results that no machine holds."""
    T = 2**50
    columns = 8 if kind == "copy" else 1  # stride 0 in the last dimension needs a copy of the input
    x = {n: torch.zeros(1, 1, 1, 1).expand(1, T, 1, columns) for n in op_gla.tensors}
    shape = [1, T, 1, columns]
    kwargs = {}
    if kind == "states":
        x = {n: torch.zeros(1, 1, 1, 1).expand(T, 0, 1, 1) for n in op_gla.tensors}
        kwargs["output_final_state"] = True
        shape = [T, 1, 1, 1]
    with pytest.raises(RuntimeError) as error:
        op_gla.chunk(**x, **kwargs)
    text = str(error.value)
    assert text.startswith(f"out of memory: lsm could not allocate {shape} of float32 on cpu")
    if torch.__version__ >= "2.13":  # older runtimes keep the allocator's words to themselves
        assert f"you tried to allocate {T * columns * 4} bytes" in text


def test_no_backtrace_or_build_path_in_texts(tmp_path: Path) -> None:
    """The last line a user sees in a fresh process is the error, without C++ noise."""
    code = (
        "import torch, lsm_cuda; x = torch.zeros(1, 4, 1, 8);"
        "lsm_cuda.ops.chunk_gla(x, x[..., :4], x, x)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "RuntimeError: lsm::gla_fwd: k must have K = 8 like q, got K = 4"
    assert "csrc/" not in done.stderr
