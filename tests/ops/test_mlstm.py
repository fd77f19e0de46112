"""mLSTM: what is its own beyond test_families.py."""

from __future__ import annotations

import inspect
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import GLA
from checks import assert_refused
from families import FAMILIES, Family, assert_rule, definition, draw, gradients, operator
from impls import Impl, threads
from inputs import Tensors
from torch import Tensor

from lsm_cuda import ops, reference
from lsm_cuda.ops import mlstm

STATES = "c_initial n_initial m_initial return_last_states eps"
SIGNATURES = {
    "mlstm_chunkwise": f"q k v i f {STATES} chunk_size",
    "mlstm_siging_chunkwise": f"q k v i f {STATES} normalize chunk_size",
    "mlstm_recurrent_step": "q k v i f c n m eps",
    "chunk_mlstm": "q k v i f scale initial_state output_final_state cu_seqlens",
}
EXP, SIGMOID = (f for f in FAMILIES if f.name.startswith("mlstm"))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """mlstm_kernels' argument order, and FLA's style of it."""
    parameters = inspect.signature(getattr(ops, name)).parameters
    assert [n for n, p in parameters.items() if p.kind != p.KEYWORD_ONLY] == SIGNATURES[
        name
    ].split()


def arguments(*, T: int = 64, signed: bool = True, gates: float = 3.0) -> list[Tensor]:
    q, k, v = (torch.randn(2, 3, T, n, dtype=torch.float64) for n in (8, 8, 6))
    i, f = (gates * torch.randn(2, 3, T, dtype=torch.float64) for _ in range(2))
    return [*((q, k) if signed else (q.exp(), k.exp())), v, i, f]


def states() -> list[Tensor]:
    return [torch.randn(2, 3, *s, dtype=torch.float64) for s in ((8, 6), (8,), (1,))]


def kernels(path: str) -> ModuleType:
    return pytest.importorskip(f"mlstm_kernels.torch.{path}")


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_is_what_mlstm_kernels_computes(form: str, carried: bool) -> None:
    """Outputs, states and gradients of its plain PyTorch forms, in fp64."""
    if form == "recurrent":
        function = kernels("recurrent.native_sequence").mlstm_recurrent_sequence__native_fw
        function = partial(function, dtype_state=torch.float64)
    else:
        function = kernels("chunkwise.native.fwbw").mlstm_chunkwise__native_autograd
    x = [t.requires_grad_() for t in arguments(signed=False)]
    initial = states() if carried else [None] * 3
    if carried:
        initial[1] = initial[1].exp()
    results = []
    for run in (function, ops.mlstm_chunkwise):
        h, last = run(*x, *initial, return_last_states=True, eps=0.0)
        grads = torch.autograd.grad(h, x, torch.ones_like(h).cumsum(-1))
        results.append((h, *last, *grads))
    # theirs passes through the stabiliser too, where contributions cancel
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


def test_states_are_those_of_mlstm_kernels() -> None:
    """Half of a sequence there, the other half here."""
    there = kernels("chunkwise.native.fwbw").mlstm_chunkwise__native_autograd
    x = arguments(T=128)
    whole = ops.mlstm_chunkwise(*x)
    h, last = there(*(t[:, :, :64] for t in x), return_last_states=True)
    rest = ops.mlstm_chunkwise(*(t[:, :, 64:] for t in x), *last)
    torch.testing.assert_close(torch.cat([h, rest], 2), whole)


def test_step_is_the_step_of_mlstm_kernels() -> None:
    there = kernels("recurrent.native_step").mlstm_recurrent_step__native
    q, k, v, i, f = (t[:, :, 0] for t in arguments())
    token = q, k, v, i[..., None], f[..., None]
    C, n, m = states()
    h, last = there(*token, C, n, m, dtype_state=torch.float64)
    g, mine = ops.mlstm_recurrent_step(*token, C, n, m)
    torch.testing.assert_close(g, h)
    torch.testing.assert_close(mine, last)
    assert mine[0] is C and mine[2] is m


def raw_step(impl: Impl) -> Any:
    if impl.name != "emulator":
        return torch.ops.lsm.mlstm_step.default
    impl.raw(GLA, "step")  # loads it
    return torch.ops.lsm_emu.mlstm_step.default


STEPS = {
    "f32": {},
    "bf16": {"dtype": torch.bfloat16},
    "f16": {"dtype": torch.float16},
    "f64": {"dtype": torch.float64},
    "bf16 with fp32 gates": {"dtype": torch.bfloat16, "gates": torch.float32},
    "wide": {"K": 160, "V": 70, "B": 1, "HV": 2},
    "wider than the stack": {"K": 300, "V": 260, "B": 1, "H": 1, "HV": 1},
    "transposed": {"transposed": True},
    "extreme": {"extreme": True},
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("family", [EXP, SIGMOID], ids=["exp", "sigmoid"])
def test_steps_of_the_operator(impl: Impl, family: Family, name: str) -> None:
    """Tokens one by one, in each layout of C, obey the rule; on CUDA's kernels too. C and n are
    sums over e^m for the m that is stored, which of 100 may be off by 4e-6."""
    options = dict(STEPS[name])
    transposed, runs = options.pop("transposed", False), options.pop("extreme", False)
    gate_dtype = options.pop("gates", None)
    x = draw(family, T=6, **options)
    if runs:
        x.tensors["i"], x.tensors["f"] = (t.roll(1, 1) for t in extreme(6, B=2, HV=4)[3:])
    if gate_dtype is not None:
        for gate in "if":
            x.tensors[gate] = x.tensors[gate].to(gate_dtype)
    _, T, _, K = x.tensors["q"].shape
    C, n, m = (s.to(impl.device, copy=True) for s in x.states)
    if transposed:
        C = C.mT.contiguous().mT
    step, exponential, tokens = raw_step(impl), family is EXP, []
    for t in range(T):
        token = [y[:, t].to(impl.device) for y in x.tensors.values()]
        before = [s.clone() for s in (C, n, m)]

        def call(token=token, before=before) -> Tensors:
            for s, old in zip((C, n, m), before, strict=True):
                s.copy_(old)
            h = step(*token, C, n, m, K**-0.5, 1e-6, exponential, True)
            return {"h": h, "C": C.clone(), "n": n.clone(), "m": m.clone()}

        run = impl.under_every_seed if impl.name == "emulator" else lambda call: call()
        tokens.append(run(call)["h"].cpu())
    expected = definition(family, x)
    C, n, m = (s.cpu() for s in (C, n, m))
    size = (m.double() - expected[0]["final_state 2"]).exp()
    C, n = (C * size[..., None, None]).to(C.dtype), (n * size[..., None]).to(n.dtype)
    results = {"o": torch.stack(tokens, 1)}
    results |= {f"final_state {i}": s for i, s in enumerate((C, n, m))}
    assert_rule(results, expected, x)


test_steps_of_the_operator.applies = lambda impl, name: not impl.tensor_cores or (
    name != "f64" and STEPS[name].get("K", 0) <= 256
)


WHOLE = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16, "T": 70},
    "fp16": {"dtype": torch.float16},
    "packed": {"T": 40, "cu_seqlens": [0, 0, 9, 9, 27, 40]},
    "no state": {"states": False},
    "as wide as kernels go": {"T": 5, "K": 8, "V": 256, "B": 1, "H": 1, "HV": 1},
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("family", [EXP, SIGMOID], ids=["exp", "sigmoid"])
def test_composed_as_on_cuda(monkeypatch: pytest.MonkeyPatch, family: Family, case: str) -> None:
    """What takes the place of one pass where kernels do not know mLSTM's gates."""
    monkeypatch.setattr(mlstm, "FUSED", set())
    x = draw(family, **WHOLE[case])
    assert_rule(gradients(operator(family), family, x), definition(family, x), x)


@pytest.mark.parametrize("V", [16, 64])
@pytest.mark.parametrize("family", [EXP, SIGMOID], ids=["exp", "sigmoid"])
def test_work_that_is_cut_for_threads(family: Family, V: int) -> None:
    """Into segments of time, whose sums are joined too, or columns, which all need the sums."""
    x = draw(family, T=600, B=1, H=1, HV=1, K=256, V=V)
    with threads(2):
        results = gradients(operator(family), family, x)
    assert_rule(results, definition(family, x), x)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_of_each_result(normalize: bool) -> None:
    """Gradients of final states alone, of h alone, and of everything, against PyTorch's own."""
    x = [t.transpose(1, 2).clone().requires_grad_() for t in arguments(T=9)]
    C, n, m = states()
    initial = C.requires_grad_(), n.requires_grad_(), m.squeeze(-1)
    options = {"input_gate": "sigmoid", "normalize": normalize}
    for wanted in ([0], [1], [2], [0, 1, 2]):
        grads = []
        for run in (partial(ops.chunk_mlstm, output_final_state=True), reference.mlstm):
            h, last = run(*x, initial_state=initial, **options)
            results = [(h, *last)[j] for j in wanted]
            upstream = [torch.ones_like(r).cumsum(-1) for r in results]
            grads.append(
                torch.autograd.grad(
                    results, [*x, C, n], upstream, allow_unused=True, materialize_grads=True
                )
            )
        torch.testing.assert_close(*grads)


def whole_arguments(**replaced: Any) -> list[Any]:
    """Of torch.ops.lsm.mlstm_fwd."""
    named = dict(zip("qkvif", (t.transpose(1, 2) for t in arguments(T=5)), strict=True))
    C, n, m = states()
    named |= {"C": C, "n": n, "m": m.squeeze(-1), "cu_seqlens": None}
    return [*(named | replaced).values(), 0.3, 1e-6, True, True, True]


def test_whole_sequences_are_a_sound_operator() -> None:
    op = torch.ops.lsm.mlstm_fwd.default
    leaves = [
        t.requires_grad_() if isinstance(t, Tensor) and j < 7 else t
        for j, t in enumerate(whole_arguments())
    ]
    torch.library.opcheck(op, leaves)
    torch.library.opcheck(op, whole_arguments(C=None, n=None, m=None))


def backward_arguments(**replaced: Any) -> list[Any]:
    """Of torch.ops.lsm.mlstm_bwd."""
    q, k, v, i, f, C, n, m, cu_seqlens, *options = whole_arguments()
    h, *_, tokens = torch.ops.lsm.mlstm_fwd(q, k, v, i, f, C, n, m, cu_seqlens, *options)
    named = {"q": q, "k": k, "v": v, "C": C, "n": n, "cu_seqlens": cu_seqlens, "scale": 0.3}
    named |= {"eps": 1e-6, "normalize": True, "h": h, "tokens": tokens}
    named |= {"grad_h": torch.randn_like(h), "grad_C": None, "grad_n": torch.randn_like(n)}
    return [*(named | replaced).values()]


def test_backward_is_a_sound_operator() -> None:
    op = torch.ops.lsm.mlstm_bwd.default
    torch.library.opcheck(op, backward_arguments())
    torch.library.opcheck(op, backward_arguments(C=None, n=None, normalize=False))
    given = backward_arguments()
    given[0].requires_grad_()
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(op(*given)[0].sum(), given[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_division_by_what_is_behind_the_last_token(dtype: torch.dtype) -> None:
    """eps of 0, and tokens that end within a block."""
    x = [t.transpose(1, 2).to(dtype).requires_grad_() for t in arguments(T=19, signed=False)]
    h, _ = ops.chunk_mlstm(*x, eps=0.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(h.sum(), x))


BAD_GRADIENTS = {
    "h": (
        torch.zeros(2, 5, 3, 5).double(),
        "h must have shape [B, T, HV, V] = [2, 5, 3, 6], got [2, 5, 3, 5]",
    ),
    "tokens": (
        torch.zeros(3, 2, 3, 5).double(),
        "tokens must have shape [4, B, HV, T] = [4, 2, 3, 5], got [3, 2, 3, 5]",
    ),
    "grad_n": (torch.zeros(2, 3, 8), "grad_n must have dtype float64, got float32"),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_backward_refuses(name: str) -> None:
    bad, text = BAD_GRADIENTS[name]
    assert_refused(
        f"lsm::mlstm_bwd: {text}", torch.ops.lsm.mlstm_bwd, *backward_arguments(**{name: bad})
    )


BAD_SEQUENCES = {
    "f": (
        torch.zeros(2, 5, 2),
        "f must have shape [B, T, HV] = [2, 5, 3], got [2, 5, 2]",
    ),
    "n": (torch.zeros(2, 3, 6), "n must have shape [N, HV, K] = [2, 3, 8], got [2, 3, 6]"),
    "m": (torch.zeros(2, 3).bfloat16(), "m must have dtype float64, got bfloat16"),
}


@pytest.mark.parametrize("name", BAD_SEQUENCES)
def test_whole_sequences_refuse(name: str) -> None:
    bad, text = BAD_SEQUENCES[name]
    assert_refused(
        f"lsm::mlstm_fwd: {text}", torch.ops.lsm.mlstm_fwd, *whole_arguments(**{name: bad})
    )


def step_arguments(**replaced: Tensor) -> list[Any]:
    """Of torch.ops.lsm.mlstm_step."""
    q, k, v, i, f = (t[:, :, 0].float() for t in arguments())
    C, n, m = (s.float() for s in states())
    named = {"q": q, "k": k, "v": v, "i": i, "f": f, "C": C, "n": n, "m": m.squeeze(-1)}
    return [*(named | replaced).values(), 0.3, 1e-6, True, True]


def test_step_is_a_sound_operator() -> None:
    op = torch.ops.lsm.mlstm_step.default
    torch.library.opcheck(op, step_arguments())
    assert [a.name for a in op._schema.arguments if a.is_write] == ["C", "n", "m"]


BAD_STEPS = {
    "i": (torch.zeros(2, 2), "i must have shape [B, HV] = [2, 3], got [2, 2]"),
    "f": (torch.zeros(2, 3).double(), "f must have dtype float32 like q, or float32, got float64"),
    "C": (
        torch.zeros(2, 3, 16, 6)[:, :, ::2],
        "C is updated in place and must be contiguous, got strides [288, 96, 12, 1]",
    ),
    "n": (torch.zeros(2, 3, 6), "n must have shape [B, HV, K] = [2, 3, 8], got [2, 3, 6]"),
    "m": (torch.zeros(2, 3).bfloat16(), "m must have dtype float32, got bfloat16"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_step_refuses(impl: Impl, name: str) -> None:
    bad, text = BAD_STEPS[name]
    given = [
        t.to(impl.device) if isinstance(t, Tensor) else t for t in step_arguments(**{name: bad})
    ]
    assert_refused(f"lsm::mlstm_step: {text}", raw_step(impl), *given)


@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_gate_is_what_mlstm_kernels_computes(normalize: bool) -> None:
    there = kernels("parallel.native_siging.fw").mlstm_siging_parallel_fw
    x = arguments()
    h, _ = there(*x, normalize=normalize)
    torch.testing.assert_close(ops.mlstm_siging_chunkwise(*x, normalize=normalize), h)
    _, last = ops.mlstm_siging_chunkwise(*x, return_last_states=True, normalize=normalize)
    assert [t.shape for t in last] == [(2, 3, 8, 6), (2, 3, 8)]
    halves = [t[:, :, :20] for t in x], [t[:, :, 20:] for t in x]
    first, (C, n) = ops.mlstm_siging_chunkwise(*halves[0], return_last_states=True)
    second = ops.mlstm_siging_chunkwise(*halves[1], C, n)
    torch.testing.assert_close(torch.cat([first, second], 2), ops.mlstm_siging_chunkwise(*x))


def extreme(T: int, dtype: torch.dtype = torch.float32, B: int = 1, HV: int = 2) -> list[Tensor]:
    """Logits of -100, 0 and 100, in runs."""
    q, k, v = (torch.randn(B, T, HV, 8).to(dtype) for _ in range(3))
    runs = torch.randint(0, 3, (2, B, T // 5 + 1, HV)).repeat_interleave(5, 2)[:, :, :T]
    i, f = 100.0 * (runs - 1)
    return [q.abs(), k.abs(), v, i, f]


@pytest.mark.parametrize("family", [EXP, SIGMOID], ids=["exp", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_hundred(dtype: torch.dtype, family: Family) -> None:
    """The acceptance rule holds, gradients included."""
    q, k, v, i, f = extreme(200, dtype)
    x = draw(family, T=200, HV=2, K=8, V=8, B=1, dtype=dtype, states=False)
    for name, t in zip("qkvif", (q, k, v, i, f), strict=True):
        x.tensors[name] = t
    assert_rule(gradients(operator(family), family, x), definition(family, x), x)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_long_sequences_of_extreme_gates_are_finite(input_gate: str) -> None:
    """1e5 tokens, as one sequence and as three; each of the three as alone."""
    x = [t.requires_grad_() for t in extreme(100_000)]
    run = partial(ops.chunk_mlstm, input_gate=input_gate, output_final_state=True)
    h, last = run(*x)
    results = [h, *last, *torch.autograd.grad(h.sum(), x)]
    assert all(t.isfinite().all() for t in results)
    bounds = [0, 40_000, 40_003, 100_000]
    packed, lasts = run(*x, cu_seqlens=torch.tensor(bounds))
    for n in (1, 2):
        part = slice(bounds[n], bounds[n + 1])
        alone, own = run(*(t[:, part] for t in x))
        torch.testing.assert_close(packed[:, part], alone)
        torch.testing.assert_close(tuple(t[n : n + 1] for t in lasts), own)


def test_stabiliser_is_exact_over_long_sequences() -> None:
    """m against its recursion in Python's floats, after 1e4 tokens and many resets."""
    i = 100 * torch.randn(1, 10_000, 1, dtype=torch.float64)
    f = 30 * torch.randn(1, 10_000, 1, dtype=torch.float64)
    one = torch.ones(1, 10_000, 1, 1, dtype=torch.float64)
    _, (_, _, m) = ops.chunk_mlstm(one, one, one, i, f, output_final_state=True)
    running = 0.0
    for a, b in zip(torch.nn.functional.logsigmoid(f).flatten(), i.flatten(), strict=True):
        running = max(a.item() + running, b.item())
    assert abs(m.item() - running) <= 1e-12 * abs(running)


def test_infinite_logits() -> None:
    """-inf in i writes nothing; -inf in f forgets everything."""
    q, k, v, i, f = (t.transpose(1, 2) for t in arguments(T=12, signed=False))
    i[:, 4] = -torch.inf
    h, _ = ops.chunk_mlstm(q, k, v, i, f)
    silent = v.clone()
    silent[:, 4] = 1e3
    assert torch.equal(h, ops.chunk_mlstm(q, k, silent, i, f)[0])
    f[:, 7] = -torch.inf
    h, last = ops.chunk_mlstm(q, k, v, i, f, output_final_state=True)
    tail = [t[:, 7:] for t in (q, k, v, i, f)]
    alone, own = ops.chunk_mlstm(*tail, output_final_state=True)
    torch.testing.assert_close((h[:, 7:], *last), (alone, *own))
    x = [t.requires_grad_() for t in (q, k, v, i, f)]
    grads = torch.autograd.grad(ops.chunk_mlstm(*x)[0].sum(), x)
    assert all(g.isfinite().all() for g in grads)


def test_stabiliser_moves_size_between_states() -> None:
    """(C, n, m) and (C e^s, n e^s, m - s) are the same memory, eps apart."""
    q, k, v, i, f = (t.transpose(1, 2) for t in arguments())
    C, n, m = states()
    m = m.squeeze(-1)
    run = partial(ops.chunk_mlstm, q, k, v, i, f, eps=0.0)
    shifted = C * torch.e**2, n * torch.e**2, m - 2
    torch.testing.assert_close(run(initial_state=(C, n, m))[0], run(initial_state=shifted)[0])


def test_groups_and_scale() -> None:
    q, k, v, i, f = (t.transpose(1, 2) for t in arguments())
    one = q[:, :, :1], k[:, :, :1]
    shared = ops.chunk_mlstm(*one, v, i, f, 0.3)[0]
    expected, _ = reference.mlstm(*(t.expand(-1, -1, 3, -1) for t in one), v, i, f, 0.3)
    torch.testing.assert_close(shared, expected)


def test_errors() -> None:
    x = [t.transpose(1, 2) for t in arguments(T=5)]
    with pytest.raises(RuntimeError) as error:
        ops.chunk_mlstm(*x[:4], x[4][..., :2])
    assert str(error.value) == (
        "lsm::chunk_mlstm: f must have shape [B, T, HV] = [2, 5, 3], got [2, 5, 2]"
    )
    with pytest.raises(ValueError) as error:
        ops.chunk_mlstm(*x, input_gate="tanh")
    assert str(error.value) == "lsm::chunk_mlstm: input_gate must be exp or sigmoid, got 'tanh'"
    with pytest.raises(ValueError) as error:
        ops.chunk_mlstm(*x, normalize=False)
    assert str(error.value) == (
        "lsm::chunk_mlstm: normalize=False needs input_gate='sigmoid', got 'exp'"
    )
