"""mLSTM's whole sequences on CUDA kernels: gates, weights and sums inside the sweeps, on the
emulator, with all gradients by autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from checks import assert_refused
from emulators import emulator
from families import (
    FAMILIES,
    KINK,
    Call_,
    Family,
    assert_rule,
    definition,
    draw,
    from_bound,
    gradients,
    operator,
)
from impls import Impl
from in_place import in_place_of_cuda, of_cuda, on
from torch import Tensor

from lsm_cuda import ops
from lsm_cuda.ops import mlstm

EXP, SIGMOID = (f for f in FAMILIES if f.name.startswith("mlstm"))
BOTH = pytest.mark.parametrize("family", [EXP, SIGMOID], ids=["exp", "sigmoid"])
BF16 = torch.bfloat16
OPERATORS = ("mlstm_fwd", "mlstm_bwd")
GATE = {EXP: "exp", SIGMOID: "sigmoid"}


@pytest.fixture
def _kernels() -> Iterator[None]:
    with in_place_of_cuda("_emu", mlstm, OPERATORS) as emu:
        emu.set_seed(1)
        emu.set_multiprocessors(8)
        yield


@pytest.fixture
def _racing_kernels() -> Iterator[None]:
    with in_place_of_cuda("_emu_race", mlstm, OPERATORS):
        yield


CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "one token": {"T": 1},
    "no tokens": {"T": 0},
    "tiles of 64 rows": {"T": 70, "K": 128, "V": 64, "B": 1, "wide": True},
    "tiles of 128 rows": {"T": 45, "K": 64, "V": 128, "B": 1, "H": 1, "HV": 2},
    "two tiles": {"T": 33, "K": 72, "V": 136, "B": 1, "H": 1, "HV": 1},
    "widest": {"T": 19, "K": 256, "V": 200, "B": 1, "H": 1, "HV": 1},
    "packed": {"T": 40, "cu_seqlens": [0, 0, 9, 9, 27, 40]},
    "cut": {"T": 530, "K": 16, "V": 16, "B": 1, "H": 1, "HV": 1, "multiprocessors": 64},
    "packed and cut": {
        **{"T": 300, "K": 16, "V": 16, "H": 1, "HV": 1},
        **{"cu_seqlens": [0, 280, 280, 300], "multiprocessors": 64},
    },
    "no state": {"states": False},
    "sums of either sign": {"T": 21, "signed": True},
    "long": {"T": 600, "K": 16, "V": 16, "B": 1, "H": 1, "HV": 1, "multiprocessors": 1},
}


def signed(family: Family, x: Call_) -> Call_:
    """With queries of either sign, and so sums; no nearer to a kink than the family draws."""
    rng = torch.Generator().manual_seed(0)
    q = x.tensors["q"]
    while True:
        sign = torch.randint(0, 2, q.shape[:-1], generator=rng)[..., None] * 2 - 1
        turned = dataclasses.replace(x, tensors=x.tensors | {"q": q * sign.to(q.dtype)})
        if distance(family, turned) > KINK:
            return turned


def distance(family: Family, x: Call_) -> float:
    return from_bound(GATE[family], x)


def call_of(family: Family, case: dict[str, Any]) -> tuple[Call_, int]:
    options = dict(case)
    wide, either = options.pop("wide", False), options.pop("signed", False)
    multiprocessors = options.pop("multiprocessors", 8)
    x = draw(family, dtype=BF16, **options)
    for gate in "if" if wide else "":
        x.tensors[gate] = x.tensors[gate].float()
    return signed(family, x) if either else x, multiprocessors


@of_cuda
@BOTH
@pytest.mark.parametrize("name", CASES)
def test_is_its_definition(impl: Impl, family: Family, name: str) -> None:
    x, multiprocessors = call_of(family, CASES[name])
    results = on(impl, mlstm, OPERATORS, family, x, multiprocessors)
    assert_rule(results, definition(family, x), x)


def unnormalised(family: Family) -> Family:
    return dataclasses.replace(
        family,
        chunk=partial(family.chunk, normalize=False),
        definition=partial(family.definition, normalize=False),
    )


@of_cuda
def test_without_a_division(impl: Impl) -> None:
    family = unnormalised(SIGMOID)
    x = draw(SIGMOID, dtype=BF16)
    results = on(impl, mlstm, OPERATORS, family, x, 8)
    assert_rule(results, definition(family, x), x)


def runs(level: float, T: int, HV: int) -> list[Tensor]:
    """Logits of i and f of -level, 0 and level, for five tokens each."""
    rng = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 3, (2, 1, T // 5 + 1, HV), generator=rng) - 1
    return list(level * levels.repeat_interleave(5, 2)[:, :, :T].to(BF16))


@pytest.mark.usefixtures("_kernels")
@BOTH
@pytest.mark.parametrize("level", [80.0, 100.0])
def test_extreme_gates(family: Family, level: float) -> None:
    """Runs of them; then each of the pairs throughout, where q and k may have no gradient."""
    x = draw(family, T=150, B=1, HV=2, K=8, V=8, dtype=BF16, states=False)
    x.tensors["i"], x.tensors["f"] = runs(level, 150, 2)
    assert_rule(gradients(operator(family), family, x), definition(family, x), x)
    for i, f in ((level, level), (level, -level), (-level, level), (-level, -level)):
        x.tensors["i"].fill_(i), x.tensors["f"].fill_(f)
        results = gradients(operator(family), family, x)
        assert all(t.isfinite().all() for t in results.values())
        kept = {n: t for n, t in results.items() if n == "dv" or not n.startswith("d")}
        if level == 80:  # e^-100 is less than fp32 holds in full
            assert_rule(kept, definition(family, x), x)


@pytest.mark.usefixtures("_kernels")
def test_infinite_logits() -> None:
    """-inf in i writes nothing; -inf in f forgets everything."""
    x = draw(EXP, T=40, B=1, dtype=BF16, states=False).tensors
    x["i"][:, 4] = -torch.inf
    h, _ = ops.chunk_mlstm(**x)
    loud = x["v"].clone()
    loud[:, 4] = 1e3
    assert torch.equal(h, ops.chunk_mlstm(**x | {"v": loud})[0])
    x["f"][:, 16] = -torch.inf
    h, last = ops.chunk_mlstm(**x, output_final_state=True)
    tail, own = ops.chunk_mlstm(**{n: t[:, 16:] for n, t in x.items()}, output_final_state=True)
    torch.testing.assert_close((h[:, 16:], *last), (tail, *own))
    leaves = [t.requires_grad_() for t in x.values()]
    grads = torch.autograd.grad(ops.chunk_mlstm(*leaves)[0].float().sum(), leaves)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("gate", ["i", "f"])
def test_nan_spoils_what_follows_in_its_sequence(gate: str) -> None:
    x = draw(EXP, dtype=BF16, cu_seqlens=[0, 20, 37], states=False)
    clean = ops.chunk_mlstm(**x.tensors, cu_seqlens=x.cu_seqlens)[0]
    x.tensors[gate][:, 5] = torch.nan
    h = ops.chunk_mlstm(**x.tensors, cu_seqlens=x.cu_seqlens)[0]
    assert torch.equal(h[:, :5], clean[:, :5]) and torch.equal(h[:, 20:], clean[:, 20:])
    assert h[:, 5:20].isnan().all()


@pytest.mark.usefixtures("_kernels")
def test_no_division_by_what_is_behind_the_last_token() -> None:
    """eps of 0, and tokens that end within a block."""
    x = draw(EXP, T=19, B=1, dtype=BF16, states=False).tensors
    leaves = [t.requires_grad_() for t in x.values()]
    h, _ = ops.chunk_mlstm(*leaves, eps=0.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(h.float().sum(), leaves))


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2]])
def test_gradients_of_each_result(normalize: bool, wanted: list[int]) -> None:
    """Of h, C and n, alone too, with states to start from and without n's."""
    family = SIGMOID if normalize else unnormalised(SIGMOID)
    x = draw(SIGMOID, T=35, K=16, B=1, dtype=BF16)

    def some(call):  # type: ignore[no-untyped-def]
        def run(**rest):  # type: ignore[no-untyped-def]
            h, last = call(**rest)
            all_ = [h, *last]
            kept = [t if j in wanted else t.detach() for j, t in enumerate(all_)]
            return kept[0], tuple(kept[1:])

        return run

    family = dataclasses.replace(
        family, chunk=some(family.chunk), definition=some(family.definition)
    )
    results = gradients(operator(family), family, x)
    assert_rule(results, definition(family, x), x)


@pytest.mark.usefixtures("_kernels")
def test_a_state_may_be_absent_alone() -> None:
    """C, n or m of zeros, of the operator."""
    x = draw(EXP, T=21, B=1, K=16, V=16, dtype=BF16)
    tokens, states = list(x.tensors.values()), list(x.states or ())
    rest = None, 0.25, 1e-6, True, True, True
    h, C, n, m, kept = torch.ops.lsm.mlstm_fwd(*tokens, None, states[1], None, *rest)
    zeros = torch.zeros_like(states[0]), states[1], torch.zeros_like(states[2])
    results = torch.ops.lsm.mlstm_fwd(*tokens, *zeros, *rest)
    torch.testing.assert_close((h, C, n, m, kept), results, rtol=0, atol=0)
    back = partial(torch.ops.lsm.mlstm_bwd, *tokens[:3])
    shared = None, 0.25, 1e-6, True, h, kept, h, None, n
    some, all_ = back(None, states[1], *shared), back(zeros[0], states[1], *shared)
    for j, (a, b) in enumerate(zip(some, all_, strict=True)):
        assert a.numel() == 0 if j == 5 else torch.equal(a, b), j


@pytest.mark.usefixtures("_kernels")
def test_continues_and_is_continued_by_steps() -> None:
    """States are the steps': tokens one by one between two calls."""
    x = draw(EXP, T=40, B=1, K=16, V=16, dtype=BF16)
    call = partial(ops.chunk_mlstm, output_final_state=True)
    h, last = call(**x.tensors, initial_state=x.states)
    first, state = call(**{n: t[:, :17] for n, t in x.tensors.items()}, initial_state=x.states)
    state = tuple(s.contiguous() for s in state)
    steps = [
        ops.mlstm_step(*(t[:, j].contiguous() for t in x.tensors.values()), state)
        for j in range(17, 24)
    ]
    rest, end = call(**{n: t[:, 24:] for n, t in x.tensors.items()}, initial_state=state)
    pieces = torch.cat([first, torch.stack(steps, 1), rest], 1)
    torch.testing.assert_close(pieces, h, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(end, last, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(end[2], last[2])


@pytest.mark.usefixtures("_kernels")
def test_stabiliser_is_exact_over_long_sequences() -> None:
    """m against its recursion in Python's floats, over many rounds of a block of threads."""
    rng = torch.Generator().manual_seed(0)
    i, f = (s * torch.randn(1, 5_000, 1, generator=rng) for s in (100, 30))
    one = torch.ones(1, 5_000, 1, 8, dtype=BF16)
    _, (_, _, m) = ops.chunk_mlstm(one, one, one, i, f, output_final_state=True)
    running = 0.0
    for a, b in zip(torch.nn.functional.logsigmoid(f).flatten(), i.flatten(), strict=True):
        running = max(a.item() + running, b.item())
    assert abs(m.item() - running) <= 2**-22 * abs(running)


@pytest.mark.usefixtures("_racing_kernels")
@BOTH
@pytest.mark.parametrize("name", ["padded", "packed and cut", "two tiles"])
def test_no_races(family: Family, name: str) -> None:
    x, multiprocessors = call_of(family, CASES[name] | {"B": 1})
    emu = emulator("_emu_race")
    emu.set_multiprocessors(multiprocessors)
    for seed in (1, 2):
        emu.set_seed(seed)
        gradients(operator(family), family, x)


def raw_arguments(**replaced: Any) -> list[Any]:
    torch.manual_seed(0)
    tokens = {"q": (1, 19, 1, 8), "k": (1, 19, 1, 8), "v": (1, 19, 2, 16)}
    named: dict[str, Any] = {n: torch.randn(shape).to(BF16) for n, shape in tokens.items()}
    named |= {"i": torch.randn(1, 19, 2), "f": torch.randn(1, 19, 2)}
    named |= {"C": torch.randn(1, 2, 8, 16), "n": torch.rand(1, 2, 8), "m": torch.randn(1, 2)}
    named["cu_seqlens"] = None
    return [*(named | replaced).values(), 0.3, 1e-6, True, True, True]


@pytest.mark.usefixtures("_kernels")
def test_is_a_sound_operator() -> None:
    op, back = torch.ops.lsm.mlstm_fwd.default, torch.ops.lsm.mlstm_bwd.default
    leaves = [
        t.requires_grad_() if isinstance(t, Tensor) and j < 7 else t
        for j, t in enumerate(raw_arguments())
    ]
    torch.library.opcheck(op, leaves)
    torch.library.opcheck(op, raw_arguments(C=None, n=None, m=None))
    q, k, v, _, _, C, n, _, cu_seqlens, *_ = raw_arguments()
    h, *_, tokens = op(*raw_arguments())
    given = [q, k, v, C, n, cu_seqlens, 0.3, 1e-6, True, h, tokens, h, C, n]
    torch.library.opcheck(back, given)
    given[0].requires_grad_()
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(back(*given)[0].sum(), given[0])


BAD: dict[str, tuple[Tensor, str]] = {
    "q": (torch.zeros(1, 19, 1, 8), "k must have dtype float32 like q, got bfloat16"),
    "i": (torch.zeros(1, 19, 1), "i must have shape [B, T, HV] = [1, 19, 2], got [1, 19, 1]"),
    "f": (torch.zeros(1, 19, 2).to(BF16), "f must have dtype float32 like i, got bfloat16"),
    "n": (torch.zeros(1, 2, 9), "n must have shape [N, HV, K] = [1, 2, 8], got [1, 2, 9]"),
    "m": (torch.zeros(1, 2).to(BF16), "m must have dtype float32, got bfloat16"),
}


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str) -> None:
    bad, text = BAD[name]
    given = raw_arguments(**{name: bad})
    assert_refused(f"lsm::mlstm_fwd: {text}", torch.ops.lsm.mlstm_fwd, *given)


@pytest.mark.usefixtures("_kernels")
def test_goes_to_tensor_cores_alone() -> None:
    given = [t.float() if isinstance(t, Tensor) else t for t in raw_arguments()]
    with pytest.raises(RuntimeError, match=r"mlstm_fwd: q must be bfloat16, .*, got float32"):
        torch.ops.lsm.mlstm_fwd(*given)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("cuts", [[0, 5, 3, 37], [1, 37], [0, 36]])
def test_bad_boundaries_give_nan_everywhere(cuts: list[int]) -> None:
    x = draw(EXP, dtype=BF16, B=1, states=False)
    call = Call_(x.tensors, None, torch.tensor(cuts))
    results = gradients(operator(EXP), EXP, call)
    for name, t in results.items():
        assert t.isnan().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_composed_as_on_cuda(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """What is not in bf16, or is wider than kernels go, is composed of simple_gla."""
    monkeypatch.setattr(mlstm, "FUSED", set())
    monkeypatch.setattr(mlstm, "FINISHED", {"cpu"})
    x = draw(EXP, T=5, K=8, V=264 if dtype == BF16 else 16, B=1, H=1, HV=1, dtype=dtype)
    calls: list[str] = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(func.name())
            return func(*args, **kwargs or {})

    with Names():
        ops.chunk_mlstm(**x.tensors)
    assert "lsm::mlstm_fwd" not in calls and "lsm::simple_gla_fwd" in calls
