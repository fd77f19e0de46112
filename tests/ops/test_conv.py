"""The short convolution: on every implementation against its definition, and its laws."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, fields
from itertools import pairwise as neighbours

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, pairwise
from checks import assert_accepted, assert_same_bits
from impls import IMPLS, Emulator, Impl, threads
from inputs import Inputs, Tensors, boundaries
from torch import Tensor

from lsm_cuda import ops, reference
from lsm_cuda.modules import ShortConvolution


@dataclass(frozen=True)
class Conv:
    """One call. ``batch`` as in cases.py; ``extra``: columns of a state beyond W − 1."""

    T: int = 70
    D: int = 40
    W: int = 4
    dtype: str = "f32"  # "bf16+f32": weights in float32
    layout: str = "last"
    act: str | None = "silu"
    batch: int | str = 2
    state: str = "none"
    extra: int = 1
    bias: bool = True
    scale: float = 1.0
    norm: int = 0  # channels of a head
    normed: int | None = None  # of all heads that have a norm, the first ones

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype.split("+")[0]]

    def __str__(self) -> str:
        return "-".join(f"{f.name}_{getattr(self, f.name)}" for f in fields(self))


AXES = {
    "T": [1, 2, 3, 31, 33, 70, 300],
    "D": [1, 7, 32, 40, 132],
    "W": [1, 2, 3, 4, 5, 8],
    "dtype": ["f32", "bf16", "f16", "f64", "bf16+f32"],
    "layout": ["last", "first", "sliced", "offset"],
    "act": ["silu", None],
    "batch": [1, 2, "int32", "int64"],
    "state": ["none", "initial", "final", "both"],
    "extra": [0, 1, 5],
    "bias": [True, False],
    "scale": [1.0, 60.0],
}
PAIRS = [
    ("T", "W"), ("T", "batch"), ("T", "layout"), ("D", "layout"), ("W", "state"), ("W", "layout"),
    ("dtype", "layout"), ("dtype", "act"), ("batch", "state"), ("state", "extra"),
    ("act", "scale"), ("bias", "dtype"), ("batch", "layout"),
]  # fmt: skip
EDGES = [
    Conv(T=0),
    Conv(T=0, state="both"),
    Conv(T=0, state="both", batch="int32", layout="first"),
    Conv(batch=0, state="both"),
    # Segments of a block, cut where rows are aligned: the last has fewer tokens than a cut moves.
    Conv(T=1026, D=5, dtype="bf16", layout="first", state="both"),
    Conv(T=2053, D=3, W=8, dtype="f16", layout="first", batch="int32", state="both"),
]
NORMED = [
    Conv(T=33, D=32, norm=8),
    Conv(T=37, D=128, norm=128, dtype="bf16", state="both"),
    Conv(T=70, D=96, norm=32, dtype="bf16+f32", batch="int32", state="both", layout="first"),
    Conv(T=19, D=24, norm=4, W=3, dtype="f16", act=None, layout="offset"),
    Conv(T=40, D=36, norm=2, W=6, bias=False, state="initial"),
    Conv(T=0, D=32, norm=8, state="both"),
    Conv(T=37, D=200, norm=64, normed=128, dtype="bf16", state="both"),
    Conv(T=33, D=45, norm=8, normed=24, batch="int64", layout="offset"),
    Conv(T=20, D=36, norm=4, normed=0, W=6),
]
LONG = [  # tiles of channels and segments of tokens, several of each
    Conv(T=20, D=2100, dtype="bf16"),
    Conv(T=600, D=70, dtype="bf16", batch="int32", state="both"),
    Conv(T=2100, D=3, layout="first", state="both"),
    Conv(T=2150, D=3, dtype="bf16", layout="first", batch=1, state="both"),
    Conv(T=2100, D=2, W=40, layout="first", state="both"),
]
ODD_HEADS = [
    Conv(T=33, D=40, norm=10, state="both"),
    Conv(T=21, D=21, norm=7, dtype="f64"),
    Conv(T=70, D=1200, norm=300, dtype="bf16", batch="int64"),
    Conv(T=20, D=2100, norm=2100, W=5),
    Conv(T=30, D=1501, norm=300, normed=1200, state="final"),
]


def cases(impl: str) -> list[Conv]:
    axes = dict(AXES)
    if impl == "emulator":
        axes |= {"dtype": ["f32", "bf16", "f16", "bf16+f32"], "D": [1, 7, 32, 40]}
    elif impl == "cpu":
        axes["W"] = [*axes["W"], 40]
    rows = [Conv(**row) for row in pairwise(axes, PAIRS, lambda row: True)]
    return EDGES + rows + NORMED + (ODD_HEADS + LONG if impl == "cpu" else [])


def make(case: Conv) -> tuple[Inputs, Tensor | None]:
    """Arguments by name, a state as one of them; and the gradient of the final state."""
    rng = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    cu = boundaries(case.T, getattr(torch, case.batch)) if isinstance(case.batch, str) else None
    B = 1 if cu is not None else case.batch
    N, S = B if cu is None else len(cu) - 1, case.W - 1 + case.extra
    weight_dtype = DTYPES[case.dtype.split("+")[-1]]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    def lay_out(x: Tensor) -> Tensor:
        if case.layout == "first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if case.layout == "sliced":
            return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
        if case.layout == "offset":
            return F.pad(x, (1, 2), value=torch.nan)[..., 1:-2]
        return x

    tensors = {
        "x": lay_out((case.scale * normal(B, case.T, case.D)).to(case.torch_dtype)),
        "weight": normal(case.D, case.W).to(weight_dtype),
    }
    if case.bias:
        tensors["bias"] = normal(case.D).to(weight_dtype)
    if case.state in ("initial", "both"):
        tensors["initial"] = normal(N, case.D, S).to(case.torch_dtype)
    grad_y = lay_out(normal(B, case.T, case.D).to(case.torch_dtype))
    final = normal(N, case.D, S).to(case.torch_dtype) if case.state in ("final", "both") else None
    if final is not None and not S:
        final = None
    return Inputs(tensors, grad_y, cu_seqlens=cu), final


def differentiate(forward, x: Inputs, grad_state: Tensor | None) -> Tensors:
    leaves = {name: t.detach().requires_grad_() for name, t in x.tensors.items()}
    y, state = forward(leaves)
    results, upstream = {"o": y}, [x.grad_o]
    if grad_state is not None:
        results["state"] = state
        upstream.append(grad_state)
    if not any(t.requires_grad for t in results.values()):
        results = {n: t + sum(v.sum() for v in leaves.values()) * 0 for n, t in results.items()}
    grads = torch.autograd.grad(
        list(results.values()), list(leaves.values()), upstream,
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    gradients = {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {n: t.detach() for n, t in results.items()} | gradients


def definition(case: Conv, x: Inputs, grad_state: Tensor | None, dtype: torch.dtype) -> Tensors:
    size = case.W - 1 + case.extra

    def forward(t: Tensors):
        y, state = reference.causal_conv1d(
            t["x"], t["weight"], t.get("bias"), t.get("initial"), x.cu_seqlens, case.act, size
        )
        if case.norm:
            first = case.D if case.normed is None else case.normed
            heads, rest = y.split([first, case.D - first], -1)
            heads = heads.unflatten(-1, (-1, case.norm))
            heads = heads * (heads.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
            y = torch.cat([heads.flatten(-2), rest], -1)
        if not y.numel():
            y = y + sum(v.sum() for v in t.values()) * 0
        return y, state

    upstream = None if grad_state is None else grad_state.to(dtype)
    return differentiate(forward, x.map(lambda t: t.to(dtype)), upstream)


def raw(impl: Impl, kind: str):
    if isinstance(impl, Emulator):
        impl.raw(FakeOp, kind)
    namespace = f"lsm{impl.flavour}" if isinstance(impl, Emulator) else "lsm"
    return getattr(getattr(torch.ops, namespace), f"causal_conv1d_{kind}").default


class FakeOp:
    """What Impl.raw wants in order to load a library."""

    @staticmethod
    def raw(kind: str, namespace: str = "lsm"):
        return None


def run(impl: Impl, case: Conv, x: Inputs, grad_state: Tensor | None) -> Tensors:
    t, silu = x.tensors, case.act is not None
    size = 0 if grad_state is None else grad_state.shape[2]
    norm = case.norm, 1e-6, case.normed
    arguments = [t["x"], t["weight"], t.get("bias"), t.get("initial"), x.cu_seqlens, None, silu]
    if not isinstance(impl, Emulator):

        def forward(t: Tensors):
            initial = t.get("initial")
            cu = None if x.cu_seqlens is None else x.cu_seqlens.to(impl.device)
            return raw(impl, "fwd")(
                t["x"], t["weight"], t.get("bias"), initial, cu, None, silu, size, *norm
            )

        moved = x.to(impl.device)
        upstream = None if grad_state is None else grad_state.to(impl.device)
        with threads(2):
            results = differentiate(forward, moved, upstream)
        return {n: v.cpu() for n, v in results.items()}

    def call() -> Tensors:
        y, state = raw(impl, "fwd")(*arguments, size, *norm)
        grads = raw(impl, "bwd")(*arguments, x.grad_o, grad_state, True, *norm)
        dx, dweight, dbias, dstate = grads
        results = {"o": y, "dx": dx, "dweight": dweight}
        if grad_state is not None:
            results["state"] = state
        if "bias" in t:
            results["dbias"] = dbias
        return results | ({"dinitial": dstate} if "initial" in t else {})

    return impl.under_every_seed(call)


def all_cases() -> list:
    rows = []
    for impl in IMPLS.values():
        absent = impl.absent()
        marks = [pytest.mark.gpu] if impl.name == "cuda" else []
        marks += [pytest.mark.skip(reason=absent)] if absent else []
        own = cases(impl.name)
        rows += [
            pytest.param(impl.name, c, marks=marks, id=f"{impl}-{c}")
            for c in (own[:1] if absent else own)
        ]
    return rows


@pytest.mark.parametrize(("where", "case"), all_cases())
def test_results_and_gradients(where, case):
    x, grad_state = make(case)
    truth, same = (definition(case, x, grad_state, d) for d in (torch.float64, torch.float32))
    assert_accepted(run(IMPLS[where], case, x, grad_state), truth, same, x)


@pytest.mark.parametrize(
    "case",
    [
        Conv(T=300, D=132, dtype="bf16", batch="int32", state="both"),
        Conv(T=300, D=40, dtype="f16", layout="first", state="both"),
        Conv(T=70, D=10, W=8, layout="first", batch="int64"),
        Conv(T=300, D=128, norm=64, dtype="bf16", state="both"),
    ],
    ids=str,
)
def test_race_build_is_silent(case):
    """Under schedules of its own, to the same bits."""
    x, grad_state = make(case)
    emulators = [Emulator(f, f, seeds) for f, seeds in (("_emu", (0, 5)), ("_emu_race", (1, 2, 6)))]
    plain, race = (run(emu, case, x, grad_state) for emu in emulators)
    assert_same_bits(race, plain)


def test_convolution_is_torch_s(cpu):
    """An independent definition: zero-padded F.conv1d, as transformers and mamba_ssm call it."""
    x, weight, bias = torch.randn(2, 24, 50), torch.randn(24, 4), torch.randn(24)
    expected = F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=24)[..., :50])
    torch.testing.assert_close(ops.causal_conv1d_fn(x, weight, bias, activation="silu"), expected)


def test_split_is_whole(impl):
    x, grad_state = make(Conv(T=90, state="both", layout="first"))
    size = grad_state.shape[2]
    fwd = raw(impl, "fwd")
    t = {n: v.to(impl.device) for n, v in x.tensors.items()}
    rest = (t["weight"], t["bias"])
    y, final = fwd(t["x"], *rest, t["initial"], None, None, True, size)
    for cut in (1, 2, 33, 89):
        a, state = fwd(t["x"][:, :cut], *rest, t["initial"], None, None, True, size)
        b, last = fwd(t["x"][:, cut:], *rest, state, None, None, True, size)
        assert torch.equal(torch.cat([a, b], 1), y)
        assert torch.equal(last, final)


def test_seq_idx_is_packed_sequences(impl):
    """A change of index begins a sequence, an index that comes back too; gradients as well."""
    index = torch.tensor([[5] * 3 + [1] + [5] + [2] * 30 + [0] * 2 + [2] * 34], dtype=torch.int32)
    x, weight, bias = torch.randn(1, 71, 12), torch.randn(12, 4), torch.randn(12)
    grad = torch.randn(1, 71, 12)
    cu = torch.tensor([0, 3, 4, 5, 35, 37, 71])
    index, x, weight, bias, grad, cu = (
        t.to(impl.device) for t in (index, x, weight, bias, grad, cu)
    )
    fwd, bwd = raw(impl, "fwd"), raw(impl, "bwd")
    for order in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
        rows = (order(x), weight, bias, None)
        y, _ = fwd(*rows, None, index, True, 0)
        expected, _ = fwd(*rows, cu, None, True, 0)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        got = bwd(*rows, None, index, True, order(grad), None)
        wanted = bwd(*rows, cu, None, True, order(grad), None)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def update(impl: Impl, x, state, weight, bias=None, seen=None, rows=None, silu=True):
    step = raw(impl, "step")
    tensors = [
        None if t is None else t.to(impl.device) for t in (x, state, weight, bias, seen, rows)
    ]
    x, device_state, weight, bias, seen, rows = tensors
    if isinstance(impl, Emulator):
        before = state.clone()

        def call() -> Tensors:
            state.copy_(before)
            y = step(x, state, weight, bias, seen, rows, silu)
            return {"y": y, "state": state.clone()}

        return impl.under_every_seed(call)["y"]
    y = step(x, device_state, weight, bias, seen, rows, silu).cpu()
    state.copy_(device_state.cpu())
    return y


@pytest.mark.parametrize(
    ("dtype", "W", "S"), [("f32", 4, 3), ("bf16", 4, 4), ("f16", 8, 9), ("f32", 1, 0)]
)
def test_steps_are_the_whole(impl, dtype, W, S):
    dtype = DTYPES[dtype]
    x = torch.randn(3, 20, 37).to(dtype)
    weight, bias = torch.randn(37, W).to(dtype), torch.randn(37).to(dtype)
    whole, _ = raw(IMPLS["cpu"], "fwd")(x, weight, bias, None, None, None, True, 0)
    state = torch.zeros(3, 37, S).to(dtype)
    parts, t = [], 0
    for tokens in (1, 1, 5, 1, 12):
        parts.append(update(impl, x[:, t : t + tokens], state, weight, bias))
        t += tokens
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    if S:
        assert torch.equal(state, x[:, 20 - S :].transpose(1, 2))


def test_ring_and_indices(impl):
    """A ring needs no shift; rows are found by index, and a negative one is left out."""
    x, weight = torch.randn(3, 12, 10), torch.randn(10, 4)
    whole, _ = raw(IMPLS["cpu"], "fwd")(x, weight, None, None, None, None, False, 0)
    pool = torch.zeros(5, 10, 6)
    rows = torch.tensor([4, -1, 0], dtype=torch.int32)
    seen, parts, t = torch.zeros(3, dtype=torch.int32), [], 0
    for tokens in (1, 2, 1, 3, 1, 4):
        parts.append(update(impl, x[:, t : t + tokens], pool, weight, None, seen, rows, silu=False))
        seen, t = seen + tokens, t + tokens
    y = torch.cat(parts, 1)
    torch.testing.assert_close(y[[0, 2]], whole[[0, 2]])
    assert not y[1].any() and not pool[1:4].any()
    columns = torch.arange(6, 12) % 6
    assert torch.equal(pool[4][:, columns], x[0, 6:].T)


def test_states_of_any_strides(impl):
    x, weight = torch.randn(2, 9, 10), torch.randn(10, 4)
    plain, strided = torch.zeros(2, 10, 3), torch.zeros(2, 3, 10).transpose(1, 2)
    for t in range(9):
        token = x[:, t : t + 1]
        assert torch.equal(update(impl, token, plain, weight), update(impl, token, strided, weight))
    assert torch.equal(plain, strided)


def test_public_functions_agree():
    x, weight, bias = torch.randn(2, 30, 8), torch.randn(8, 4), torch.randn(8)
    y, state = ops.causal_conv1d(x, weight, bias, activation="silu", output_final_state=True)
    for channel_last in (True, False):
        z = x.transpose(1, 2) if channel_last else x.transpose(1, 2).contiguous()
        out, states = ops.causal_conv1d_fn(
            z, weight, bias, activation="swish", return_final_states=True
        )
        assert out.stride() == z.stride()
        torch.testing.assert_close(out, y.transpose(1, 2))
        assert torch.equal(states, state[..., 1:])
    ours = states.clone()
    token = torch.randn(2, 8)
    stepped = ops.causal_conv1d_update(token, ours, weight, bias, "silu")
    long, _ = ops.causal_conv1d(torch.cat([x, token[:, None]], 1), weight, bias, activation="silu")
    torch.testing.assert_close(stepped, long[:, -1])
    torch.testing.assert_close(
        ops.causal_conv1d_step(token, state.clone(), weight, bias, "silu"), long[:, -1]
    )


def test_merged_queries_keys_and_values(cpu):
    """One call over the channels of all three is a call for each; and so are its steps."""
    widths, K = (32, 32, 21), 16
    x, weight, bias = torch.randn(2, 9, sum(widths)), torch.randn(85, 4), torch.randn(85)
    y, _ = ops.causal_conv1d(x, weight, bias, activation="silu", l2norm_dim=K, l2norm_channels=64)
    for i, part in enumerate(y.split(widths, -1)):
        channels = slice(sum(widths[:i]), sum(widths[: i + 1]))
        rows = x[..., channels], weight[channels], bias[channels]
        norm = K if i < 2 else None
        own, _ = ops.causal_conv1d(*rows, activation="silu", l2norm_dim=norm)
        torch.testing.assert_close(part, own)
    conv, state = ShortConvolution(85, 4), torch.zeros(2, 85, 4)
    norm = {"l2norm_dim": K, "l2norm_channels": 64}
    with torch.no_grad():
        steps = [conv(x[:, t : t + 1], cache=state, **norm)[0] for t in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), conv(x, **norm)[0])
    with pytest.raises(ValueError, match="a divisor of l2norm_channels = 63, got 16"):
        ops.causal_conv1d(x, weight, l2norm_dim=16, l2norm_channels=63)
    with pytest.raises(ValueError, match="l2norm_channels must be 0 to D = 85, got 86"):
        ops.causal_conv1d_step(x[:, 0], state, weight, l2norm_dim=1, l2norm_channels=86)


def test_token_shift():
    x, cache = torch.randn(1, 12, 5), torch.randn(3, 5)
    cu = torch.tensor([0, 4, 4, 12])
    delta, last = ops.token_shift(x, cu, cache, output_cache=True)
    for n, (start, end) in enumerate(neighbours(cu.tolist())):
        rows = torch.cat([cache[n : n + 1], x[0, start:end]])
        torch.testing.assert_close(delta[0, start:end], rows[:-1] - rows[1:])
        assert torch.equal(last[n], rows[-1])
    shifted = ops.token_shift(x, taps=(1.0, 0.0))
    assert torch.equal(shifted, F.pad(x, (0, 0, 1, 0))[:, :-1])


def test_same_bits_twice(impl):
    case = Conv(T=300, D=132, state="both", batch="int32")
    x, grad_state = make(case)
    assert_same_bits(run(impl, case, x, grad_state), run(impl, case, x, grad_state))


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("act", ["silu", None])
def test_nan_stays_nan(cpu, layout, act):
    """Of any bits: rounding to bf16 must not carry a mantissa of ones into the sign."""
    case = Conv(T=70, D=70, dtype="bf16+f32", layout=layout, act=act)
    x, _ = make(case)
    x.tensors["weight"][1::2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    x.tensors["x"][0, 5, 0] = torch.tensor(0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    y = run(cpu, case, x, None)["o"]
    assert y[:, 3:, 1::2].isnan().all() and y[0, 5:9, 0].isnan().all()
    assert y[1, :, ::2].isfinite().all() and y[0, 9:, ::2].isfinite().all()


def test_wrong_boundaries_give_nan_on_the_device(impl):
    case = Conv(T=40, batch="int32", state="both")
    x, grad_state = make(case)
    x = Inputs(x.tensors, x.grad_o, cu_seqlens=x.cu_seqlens.flip(0).contiguous())
    for name, t in run(impl, case, x, grad_state).items():
        assert t.isnan().all(), name


test_wrong_boundaries_give_nan_on_the_device.only_impls = ("emulator", "cuda")


@pytest.mark.parametrize("state", [False, True])
def test_gradcheck(state):
    x = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) if state else None
    cu = torch.tensor([0, 2, 9]) if state else None

    def call(x, weight, bias, h):
        y, last = ops.causal_conv1d(x, weight, bias, None, h, True, "silu", cu)
        return y, last

    assert torch.autograd.gradcheck(call, (x, weight, bias, h))


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("batch", [2, "int32"])
def test_opcheck(layout, batch):
    x, grad_state = make(Conv(T=9, D=6, layout=layout, batch=batch, state="both"))
    leaves = {n: t.detach().requires_grad_() for n, t in x.tensors.items()}
    args = (*leaves.values(), x.cu_seqlens, None, True)
    torch.library.opcheck(torch.ops.lsm.causal_conv1d_fwd.default, (*args, grad_state.shape[2]))
    args = (*x.tensors.values(), x.cu_seqlens, None, True, x.grad_o, grad_state)
    torch.library.opcheck(torch.ops.lsm.causal_conv1d_bwd.default, args)
    state = x.tensors["initial"][: x.tensors["x"].shape[0]].clone()
    args = (x.tensors["x"], state, x.tensors["weight"], x.tensors["bias"], None, None, True)
    torch.library.opcheck(torch.ops.lsm.causal_conv1d_step.default, args)


@pytest.mark.slow
def test_compile():
    weight, bias = torch.randn(6, 4, requires_grad=True), torch.randn(6, requires_grad=True)

    def call(x):
        return ops.causal_conv1d(x, weight, bias, activation="silu", output_final_state=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for T in (5, 11):
        x = torch.randn(2, T, 6, requires_grad=True)
        for mine, eager in zip(compiled(x), call(x), strict=True):
            torch.testing.assert_close(mine, eager)
        compiled(x)[0].sum().backward()


def test_double_backward_says_so():
    x = torch.randn(1, 5, 2, requires_grad=True)
    y, _ = ops.causal_conv1d(x, torch.randn(2, 3))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


X, WEIGHT = torch.randn(2, 9, 6), torch.randn(6, 4)
ERRORS = {
    "x must have shape [B, T, D], got [9, 6]": lambda f: f(x=X[0]),
    "x must be bfloat16, float16": lambda f: f(x=X.long()),
    "weight must have shape [D, W], got [6]": lambda f: f(weight=WEIGHT[:, 0]),
    "weight must have D = 6 rows like x, got [5, 4]": lambda f: f(weight=WEIGHT[:5]),
    "weight must have 1 to ": lambda f: f(weight=torch.randn(6, 129)),
    "weight must have dtype float32 like x, or float32, got float64": lambda f: f(
        weight=WEIGHT.double()
    ),
    "bias must have shape [D] = [6], got [5]": lambda f: f(bias=torch.randn(5)),
    "bias must have dtype float32 like weight, got float16": lambda f: f(
        bias=torch.randn(6).half()
    ),
    "initial_state must hold the last W - 1 = 3 inputs or more, got [2, 6, 2]": lambda f: f(
        state=torch.randn(2, 6, 2)
    ),
    "initial_state must have shape [N, D, S] = [2, 6, 3], got [1, 6, 3]": lambda f: f(
        state=torch.randn(1, 6, 3)
    ),
    "the final state must be of the initial state's size S = 3, got 4": lambda f: f(
        state=torch.randn(2, 6, 3), size=4
    ),
    "seq_idx must have shape [B, T] = [2, 9], got [2, 8]": lambda f: f(
        index=torch.zeros(2, 8, dtype=torch.int32)
    ),
    "seq_idx comes without states": lambda f: f(
        index=torch.zeros(2, 9, dtype=torch.int32), size=4
    ),
    "cu_seqlens needs the sequences packed into one batch row, B = 1, got B = 2": lambda f: f(
        cu=torch.tensor([0, 9])
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", ERRORS)
def test_errors(impl, text):
    def call(x=X, weight=WEIGHT, bias=None, state=None, cu=None, index=None, size=0):
        tensors = (x, weight, bias, state, cu, index)
        moved = (None if t is None else t.to(impl.device) for t in tensors)
        raw(impl, "fwd")(*moved, True, size)

    with pytest.raises(RuntimeError) as error:
        ERRORS[text](call)
    assert str(error.value).startswith(f"lsm::causal_conv1d_fwd: {text}")


def test_errors_of_steps_and_names():
    x, state = torch.randn(2, 6), torch.zeros(2, 6, 3)
    for text, call in {
        r"must hold the last W - 1 = 3 inputs or more, got \[2, 6, 2\]": lambda: (
            ops.causal_conv1d_update(x, state[..., :2], WEIGHT)
        ),
        r"with cache_seqlens W, got \[2, 6, 3\]": lambda: ops.causal_conv1d_update(
            x, state, WEIGHT, cache_seqlens=torch.zeros(2)
        ),
        r"conv_state must have shape \[N, D, S\] = \[2, 6, 3\], got \[1, 6, 3\]": lambda: (
            ops.causal_conv1d_update(x, state[:1], WEIGHT)
        ),
        "conv_state_indices must be below N = 2, got 2": lambda: ops.causal_conv1d_update(
            x, state, WEIGHT, conv_state_indices=torch.tensor([0, 2])
        ),
        "cache_seqlens must be on cpu like x, got meta": lambda: ops.causal_conv1d_update(
            x, torch.zeros(2, 6, 4), WEIGHT, cache_seqlens=torch.zeros(2, device="meta")
        ),
        "conv_state_indices must be on cpu like x, got meta": lambda: ops.causal_conv1d_update(
            x, state, WEIGHT, conv_state_indices=torch.zeros(2, device="meta")
        ),
        "requires grad": lambda: ops.causal_conv1d_update(
            x.clone().requires_grad_(), state, WEIGHT
        ),
    }.items():
        with pytest.raises(RuntimeError, match=text):
            call()
    with pytest.raises(ValueError, match="silu, swish or None, got 'relu'"):
        ops.causal_conv1d(X, WEIGHT, activation="relu")
