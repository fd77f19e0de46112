"""Based and ReBased: features that nobody writes, whatever kernels make them, and what is kept for
backward."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import assert_refused
from emulators import emulator
from families import (
    FAMILIES,
    Call_,
    Family,
    assert_rule,
    definition,
    draw,
    gradients,
    operator,
    upstream,
)
from impls import Emulator, Impl, threads
from inputs import Tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lsm_cuda import ops

BY_NAME = {str(family): family for family in FAMILIES}
POLYNOMIAL = [BY_NAME["based"], BY_NAME["rebased"]]


@pytest.mark.parametrize("dims", [(1, 1), (16, 64), (30, 5), (5, 256), (3, 300)])
@pytest.mark.parametrize("family", POLYNOMIAL, ids=str)
def test_sizes(family: Family, dims: tuple[int, int]) -> None:
    """More than 256 features or value columns take more than one call of the engine."""
    K, V = dims
    x = draw(family, T=12, K=K, V=V, B=1, H=1, HV=2)
    assert_rule(gradients(operator(family), family, x), definition(family, x), x)
    o, state = family.chunk(**x.tensors, output_final_state=True)
    *tokens, last = ({n: t[:, i] for n, t in x.tensors.items()} for i in range(12))
    states = tuple(torch.zeros_like(s) for s in state)
    for token in tokens:
        family.step(**token, state=states)
    torch.testing.assert_close(family.step(**last, state=states), o[:, -1], rtol=1e-4, atol=1e-4)
    for got, want in zip(states, state, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", POLYNOMIAL, ids=str)
def test_state_has_one_row_per_pair(family: Family) -> None:
    x = draw(family, K=16)
    _, (S, z) = family.chunk(**x.tensors, output_final_state=True)
    rows = {"based": 17 * 18 // 2 + 7, "rebased": 16 * 17 // 2}[family.name]  # + 7: a multiple of 8
    assert S.shape[2] == z.shape[2] == rows


def test_features_are_not_kept() -> None:
    """Backward has q, k, v and the normaliser's operands, no features of q or k."""
    x = {n: torch.randn(1, 256, 2, 16, requires_grad=True) for n in "qkv"}
    sizes: list[int] = []

    def save(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        ops.chunk_based(**x)
    assert max(sizes) <= 256 * 2 * 17
    assert sum(sizes) <= 6 * 256 * 2 * 17


@pytest.mark.parametrize("family", POLYNOMIAL, ids=str)
def test_undivided(family: Family) -> None:
    option = {"based": "use_norm", "rebased": "use_normalize"}[family.name]
    x = draw(family)
    o, _ = family.chunk(**x.tensors, **{option: False})
    p, _ = family.definition(**x.tensors, **{option: False})
    torch.testing.assert_close(o, p)
    token = {n: t[:, 0] for n, t in x.tensors.items()}
    _, state = family.chunk(**x.tensors, output_final_state=True)
    states = tuple(torch.zeros_like(s) for s in state)
    torch.testing.assert_close(family.step(**token, state=states, **{option: False}), p[:, 0])


def test_names_of_fla() -> None:
    x = draw(POLYNOMIAL[0]).tensors
    o, _ = ops.chunk_based(**x)
    assert torch.equal(ops.parallel_based(**x), o)
    assert torch.equal(ops.fused_chunk_based(**x), o)
    p, _ = ops.chunk_rebased(**x, eps=1e-3, use_scale=False)
    assert torch.equal(ops.parallel_rebased(**x, eps=1e-3, use_scale=False), p)
    above, below = ops.parallel_rebased(**x, use_scale=False, return_both=True)
    torch.testing.assert_close((above / (below.unsqueeze(-1) + 1e-3)).transpose(1, 2), p)


def test_bf16_gradients_where_weights_vanish() -> None:
    """A first query orthogonal to its key: nothing but eps divides."""
    q, k = torch.zeros(2, 1, 4, 1, 4, dtype=torch.bfloat16)
    q[..., 0], k[..., 1] = 1, 1
    x = {"q": q, "k": k, "v": torch.randn(1, 4, 1, 3).bfloat16()}
    o, _ = ops.chunk_rebased(**x)
    assert not o.any()
    o, _ = ops.chunk_rebased(**(x | {"k": k + 1e-3}))
    assert o.isfinite().all()


def test_errors() -> None:
    x = draw(POLYNOMIAL[0], HV=2).tensors
    bad = [
        (
            {"k": x["k"][..., 1:]},
            "k must have shape [B, T, H, K] = [2, 37, 2, 12], got [2, 37, 2, 11]",
        ),
        ({"q": x["q"][0]}, "q must have shape [B, T, H, K], got [37, 2, 12]"),
        (
            {"initial_state": torch.zeros(2, 2, 96, 10)},
            "initial_state must be the 2 tensors (S, z), got one tensor",
        ),
        (
            {"initial_state": (torch.zeros(2, 2, 96, 10), torch.zeros(2, 2, 91))},
            "z must have shape [N, HV, F] = [2, 2, 96], got [2, 2, 91]",
        ),
    ]
    for change, text in bad:
        with pytest.raises(RuntimeError, match=re.escape(f"lsm::chunk_based: {text}")):
            ops.chunk_based(**(x | change))
    token = {n: t[:, 0] for n, t in x.items()}
    text = "lsm::based_step: S must have shape [B, HV, F, V] = [2, 2, 96, 10], got [2, 2, 91, 10]"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        ops.based_step(**token, state=(torch.zeros(2, 2, 91, 10), torch.zeros(2, 2, 91)))


SIZES_ON_CUDA: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16, "T": 21, "K": 16, "V": 64},
    "fp16": {"dtype": torch.float16, "T": 21, "K": 16, "V": 64},
    "packed": {"cu_seqlens": [0, 0, 9, 9, 27, 37]},
    "packed and cut": {"cu_seqlens": [0, 3, 140], "T": 140, "K": 5, "H": 1, "HV": 1},
    "more than one part": {"T": 12, "K": 30, "V": 5, "B": 1, "H": 1, "HV": 2},
    "parts and columns": {"T": 9, "K": 24, "V": 70, "B": 1, "H": 1, "HV": 1},
    "more than one block of columns": {"T": 12, "K": 3, "V": 300, "B": 1, "H": 1, "HV": 1},
    "no tokens": {"T": 0},
    # On tensor cores, as "bf16":
    "bf16, packed and cut": {
        "dtype": torch.bfloat16, "cu_seqlens": [0, 3, 3, 300], "T": 300, "K": 16, "V": 64, "H": 1,
        "HV": 1,
    },
    "bf16, more than one block of columns": {
        "dtype": torch.bfloat16, "T": 37, "K": 8, "V": 72, "B": 1, "H": 1,
    },
}  # fmt: skip


def started(x: Call_, taylor: bool) -> Call_:
    """With states to start from: of other tokens, since sums of squares are not negative."""
    B, _, H, K = x.tensors["q"].shape
    HV, V = x.tensors["v"].shape[2:]
    N = B if x.cu_seqlens is None else len(x.cu_seqlens) - 1
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(N, 20, H, K, generator=rng) for _ in range(2))
    v = torch.randn(N, 20, HV, V, generator=rng)
    options = None, None, None, 0.3, 0.0, taylor, False, True
    _, *states, _ = torch.ops.lsm.polynomial_attn_fwd(q, k, v, *options)
    return replace(x, states=tuple(states))


def whole(lsm: Any, x: Call_, taylor: bool, normalize: bool, scale: float = 0.3) -> Tensors:
    """Forward and backward of one call, by hand: the emulator has no autograd."""
    states = (None, None) if x.states is None else x.states
    inputs = (*x.tensors.values(), *states, x.cu_seqlens, scale, 1e-2, taylor, normalize)
    o, S, z, tokens = lsm.polynomial_attn_fwd(*inputs, True)
    results = {"o": o, "final_state 0": S, "final_state 1": z}
    up = [upstream(name, t) for name, t in results.items()]
    gradients = lsm.polynomial_attn_bwd(*inputs, o, tokens, *up)
    names = ("dq", "dk", "dv", "dinitial_state 0", "dinitial_state 1")
    found = dict(zip(names, gradients, strict=True))
    return results | {n: t for n, t in found.items() if x.states is not None or "state" not in n}


def typed(x: Call_, dtype: torch.dtype) -> Call_:
    states = None if x.states is None else tuple(s.to(dtype) for s in x.states)
    return replace(x, tensors={n: t.to(dtype) for n, t in x.tensors.items()}, states=states)


def moved(x: Call_, device: str) -> Call_:
    given = {n: t.to(device) for n, t in x.tensors.items()}
    states = None if x.states is None else tuple(s.to(device) for s in x.states)
    cuts = None if x.cu_seqlens is None else x.cu_seqlens.to(device)
    return Call_(given, states, cuts)


def of_cuda(test: Any) -> Any:
    test.only_impls = ("emulator", "cuda")
    return test


def on(impl: Impl, call: Callable[[Any], Tensors]) -> Tensors:
    """What CUDA's kernels make of it, here or on the emulator under every schedule."""
    if isinstance(impl, Emulator):
        emulator(impl.flavour)
        return impl.under_every_seed(lambda: call(torch.ops.lsm_emu))
    return {name: t.cpu() for name, t in call(torch.ops.lsm).items()}


@of_cuda
@pytest.mark.parametrize("kind", SIZES_ON_CUDA)
@pytest.mark.parametrize("taylor", [True, False], ids=["taylor", "squares"])
def test_cuda_kernels_are_the_cpus(impl: Impl, taylor: bool, kind: str) -> None:
    """Against the same operator in fp64, which test_families.py holds to the definition and
    differences to its gradients."""
    given = dict(SIZES_ON_CUDA[kind])
    if not taylor and given.get("dtype") == torch.float16:
        given["dtype"] = torch.float32  # as they come
    normalize = kind != "packed"
    x = draw(POLYNOMIAL[0], **({"HV": 2} | given))
    if kind not in ("bf16", "parts and columns"):  # first tokens alone, and after others
        x = started(x, taylor)
    there = moved(x, impl.device)
    results = on(impl, lambda lsm: whole(lsm, there, taylor, normalize))
    truth, same = (
        whole(torch.ops.lsm, typed(x, t), taylor, normalize) for t in (torch.float64, torch.float32)
    )
    assert_rule(results, (truth, same), x)


@of_cuda
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-15, 1e3])
def test_cuda_kernels_take_any_scale(impl: Impl, scale: float) -> None:
    """Tensor cores have it as a factor of their states, which divide by it."""
    x = started(draw(POLYNOMIAL[0], dtype=torch.bfloat16, T=21, K=16, V=16, B=1, H=1, HV=1), True)
    there = moved(x, impl.device)
    results = on(impl, lambda lsm: whole(lsm, there, True, True, scale))
    truth, same = (
        whole(torch.ops.lsm, typed(x, t), True, True, scale) for t in (torch.float64, torch.float32)
    )
    assert_rule(results, (truth, same), x)


@of_cuda
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [(16, 64), (30, 5), (5, 12)])
@pytest.mark.parametrize("taylor", [True, False], ids=["taylor", "squares"])
def test_cuda_step_is_the_cpus(
    impl: Impl, taylor: bool, dims: tuple[int, int], transposed: bool
) -> None:
    K, V = dims
    x = started(draw(POLYNOMIAL[0], T=1, K=K, V=V), taylor)

    def step(lsm: Any, x: Call_) -> Tensors:
        S, z = (s.clone() for s in x.states or ())
        S = S.mT.contiguous().mT if transposed else S
        token = (t[:, 0] for t in x.tensors.values())
        o = lsm.polynomial_attn_step(*token, S, z, 0.3, 1e-2, taylor, True)
        return {"o": o, "S": S, "z": z}

    there = moved(x, impl.device)
    results = on(impl, lambda lsm: step(lsm, there))
    truth, same = (step(torch.ops.lsm, typed(x, t)) for t in (torch.float64, torch.float32))
    assert_rule(results, (truth, same), x)


@pytest.mark.parametrize("family", POLYNOMIAL, ids=str)
def test_work_that_is_cut_for_threads(family: Family) -> None:
    """Into segments of time, whose sums are joined too."""
    x = draw(family, T=600, B=1, H=1, HV=1, K=20, V=32)
    with threads(2):
        results = gradients(operator(family), family, x)
    assert_rule(results, definition(family, x), x)


def test_features_are_written_nowhere() -> None:
    """One operator, nothing before or after it, and no tensor as large as features would be."""
    names: list[str] = []
    sizes: list[int] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            results = func(*args, **(kwargs or {}))
            names.append(func.name())
            for t in results if isinstance(results, tuple) else (results,):
                sizes.append(t.numel() if isinstance(t, Tensor) else 0)
            return results

    x = {n: torch.randn(1, 256, 2, 16) for n in "qkv"}
    with Look(), torch.no_grad():
        ops.chunk_based(**x)
    assert names == ["lsm::polynomial_attn_fwd"]
    assert max(sizes) <= 256 * 2 * 16


def whole_arguments(**replaced: Any) -> list[Any]:
    """Of torch.ops.lsm.polynomial_attn_fwd."""
    torch.manual_seed(0)
    named: dict[str, Any] = {n: torch.randn(2, 19, 2, 5).double() for n in "qk"}
    named |= {"v": torch.randn(2, 19, 4, 6).double(), "S": torch.randn(2, 4, 24, 6).double()}
    named |= {"z": torch.randn(2, 4, 24).double().square(), "cu_seqlens": None}
    return [*(named | replaced).values(), 0.3, 1e-6, True, True, True]


def backward_arguments(**replaced: Any) -> list[Any]:
    """Of torch.ops.lsm.polynomial_attn_bwd."""
    q, k, v, S, z, cu_seqlens, *options = whole_arguments()
    o, *_, tokens = torch.ops.lsm.polynomial_attn_fwd(q, k, v, S, z, cu_seqlens, *options)
    named = {"q": q, "k": k, "v": v, "S": S, "z": z, "cu_seqlens": cu_seqlens, "scale": 0.3}
    named |= {"eps": 1e-6, "taylor": True, "normalize": True, "o": o, "tokens": tokens}
    named |= {"grad_o": torch.randn_like(o), "grad_S": None, "grad_z": torch.randn_like(z)}
    return [*(named | replaced).values()]


def step_arguments(**replaced: Tensor) -> list[Any]:
    """Of torch.ops.lsm.polynomial_attn_step."""
    q, k, v, S, z, *_ = whole_arguments()
    named = {"q": q[:, 0], "k": k[:, 0], "v": v[:, 0], "S": S, "z": z}
    return [*(named | replaced).values(), 0.3, 1e-6, True, True]


def test_operators_are_sound() -> None:
    op = torch.ops.lsm.polynomial_attn_fwd.default
    leaves = [
        t.requires_grad_() if isinstance(t, Tensor) and j < 5 else t
        for j, t in enumerate(whole_arguments())
    ]
    torch.library.opcheck(op, leaves)
    torch.library.opcheck(op, whole_arguments(S=None, z=None))
    back = torch.ops.lsm.polynomial_attn_bwd.default
    torch.library.opcheck(back, backward_arguments())
    torch.library.opcheck(back, backward_arguments(S=None, z=None, normalize=False))
    given = backward_arguments()
    given[0].requires_grad_()
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(back(*given)[0].sum(), given[0])
    step = torch.ops.lsm.polynomial_attn_step.default
    torch.library.opcheck(step, step_arguments())
    assert [a.name for a in step._schema.arguments if a.is_write] == ["S", "z"]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("taylor", [True, False])
def test_gradients_from_and_of_states(taylor: bool, normalize: bool) -> None:
    """Against differences, in fp64, with states to start from: of each result, and of all."""
    q, k, v, S, z, cu_seqlens, *_ = whole_arguments()
    if not taylor:
        S, z = S[:, :, :16], z[:, :, :16]
    leaves = [t[:, :9].clone() if t.dim() == 4 and t.shape[1] == 19 else t for t in (q, k, v, S, z)]
    for t in leaves:
        t.requires_grad_()

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        options = 0.3, 0.1, taylor, normalize, True
        return torch.ops.lsm.polynomial_attn_fwd(*x, cu_seqlens, *options)[:3]

    torch.autograd.gradcheck(run, leaves, fast_mode=True)


BAD = {
    "S": (
        torch.zeros(2, 4, 21, 6).double(),
        "initial_state must have shape [N, HV, K, V] = [2, 4, 24, 6], got [2, 4, 21, 6]",
    ),
    "z": (torch.zeros(2, 4, 24), "z must have dtype float64, got float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_operator_refuses(name: str) -> None:
    bad, text = BAD[name]
    assert_refused(
        f"lsm::polynomial_attn_fwd: {text}",
        torch.ops.lsm.polynomial_attn_fwd,
        *whole_arguments(**{name: bad}),
    )


def test_extreme_rows_stay_in_their_sequence() -> None:
    """NaN in one packed sequence, inf in one head."""
    x = {n: torch.randn(1, 40, 2, 6) for n in "qkv"}
    cu_seqlens = torch.tensor([0, 19, 40])
    want, _ = ops.chunk_based(**x, cu_seqlens=cu_seqlens)
    x["k"][0, 3, 0] = float("nan")
    o, _ = ops.chunk_based(**x, cu_seqlens=cu_seqlens)
    assert torch.equal(o[:, :, 1], want[:, :, 1])
    assert torch.equal(o[:, 19:], want[:, 19:])
    assert torch.equal(o[:, :3], want[:, :3])
    assert o[0, 3:19, 0].isnan().all()
