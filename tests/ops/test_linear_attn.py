"""Linear attention, normalised, gated and in both directions: what is its own beyond
test_families.py."""

from __future__ import annotations

import inspect
from functools import partial
from itertools import pairwise

import pytest
import torch
from families import (
    FAMILIES,
    POSITIVE,
    QKV,
    assert_rule,
    definition,
    draw,
    gradients,
    operator,
    row,
    stateless,
)
from peers import fla_module
from torch import Tensor

from lsm_cuda import ops, reference

STATE = "initial_state output_final_state"
SIGNATURES = {
    "chunk_linear_attn": f"q k v scale {STATE} normalize cu_seqlens",
    "fused_chunk_linear_attn": f"q k v scale {STATE} normalize cu_seqlens",
    "fused_recurrent_linear_attn": f"q k v scale {STATE} reverse normalize cu_seqlens",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flas(name: str) -> None:
    parameters = inspect.signature(getattr(ops, name)).parameters
    assert [n for n, p in parameters.items() if p.kind != p.KEYWORD_ONLY] == SIGNATURES[
        name
    ].split()
    assert parameters["normalize"].default is (name != "fused_recurrent_linear_attn")


(FAMILY,) = (f for f in FAMILIES if f.name == "linear_attn")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return normal(*shape).exp()


@pytest.mark.parametrize("normalize", [True, False])
def test_is_what_fla_computes(normalize: bool) -> None:
    """FLA's loop in fp32, from a state and to a state, with all gradients."""
    naive = fla_module("ops/linear_attn/naive.py").naive_recurrent_linear_attn
    x = draw(FAMILY, HV=2)

    def one(function, q, k, v, initial_state=None, cu_seqlens=None):  # type: ignore[no-untyped-def]
        state = initial_state if normalize else initial_state[0]
        return function(q, k, v, initial_state=state, output_final_state=True, normalize=normalize)

    def plain(q, k, v, initial_state, **rest):  # type: ignore[no-untyped-def]
        return reference.linear_attention(q, k, v, initial_state=initial_state[0])

    truth = FAMILY.definition if normalize else plain
    expected = tuple(gradients(truth, FAMILY, x, d) for d in (torch.float64, torch.float32))
    for function in (naive, ops.chunk_linear_attn):
        assert_rule(gradients(partial(one, function), FAMILY, x), expected, x)


def test_state_without_normaliser_starts_z_at_zero() -> None:
    q, k, v = positive(1, 9, 2, 12), positive(1, 9, 2, 12), normal(1, 9, 2, 10)
    S = normal(1, 2, 12, 10)
    o, _ = ops.chunk_linear_attn(q, k, v, initial_state=S)
    p, _ = ops.chunk_linear_attn(q, k, v, initial_state=(S, normal(1, 1, 2, 12) * 0))
    assert torch.equal(o, p)


def test_denominator_near_zero() -> None:
    """Replaced by eps with its sign; it passes no gradient then."""
    k = torch.tensor([0.0, 1e-4, -2e-4, 5.0]).view(1, 4, 1, 1).requires_grad_()
    v = torch.ones(1, 4, 1, 1)
    o, _ = ops.chunk_linear_attn(torch.ones(1, 4, 1, 1), k, v, eps=1e-2)
    sums = torch.tensor([0.0, 1e-4, -1e-4, 4.9999])
    torch.testing.assert_close(o.flatten(), sums / torch.tensor([1e-2, 1e-2, -1e-2, 4.9999]))
    o.sum().backward()
    # each clamped output is a sum over ±eps: +100, +100, -100 for keys it has seen
    torch.testing.assert_close(k.grad.flatten(), torch.tensor([100.0, 0.0, -100.0, 0.0]))


def test_features_that_vanish() -> None:
    """relu features may be zero for a whole prefix: outputs and gradients are zero there."""
    q, k = torch.zeros(1, 5, 1, 3, requires_grad=True), torch.zeros(1, 5, 1, 3, requires_grad=True)
    v = torch.randn(1, 5, 1, 3, requires_grad=True)
    o, _ = ops.chunk_linear_attn(q, k, v)
    assert not o.any()
    o.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [0.0, 1e-12, -1e-12])
def test_rfa_denominator_near_zero(sign: float, dtype: torch.dtype) -> None:
    """Queries all but orthogonal to every key, then one that is not: finite, and no gradient by
    way of the denominators that eps replaces."""
    q = torch.tensor([sign, 1.0]).expand(1, 6, 1, 2).to(dtype).clone()
    q[0, 5, 0, 0] = 1
    k = torch.tensor([1.0, 0.0]).expand(1, 6, 1, 2).to(dtype).clone()
    v, g = torch.randn(1, 6, 1, 3).to(dtype), -torch.rand(1, 6, 1)
    leaves = [t.requires_grad_() for t in (q, k, v, g)]
    o, _ = ops.chunk_rfa(*leaves, scale=1.0)
    assert o.isfinite().all()
    last = ops.chunk_rfa(k, k, v, g, scale=1.0)[0][:, 5]
    torch.testing.assert_close(o[:, 5], last)
    assert all(t.isfinite().all() for t in torch.autograd.grad(o.float().sum(), leaves))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("two_directions", [False, True])
def test_fp16_sums_do_not_overflow(two_directions: bool, autocast: bool) -> None:
    """2000 scores of 100 are beyond fp16, their mean is not."""
    dtype = torch.float32 if autocast else torch.float16
    q = k = torch.full((1, 2000, 1, 4), 5.0, dtype=dtype)
    v = torch.full((1, 2000, 1, 4), 3.0, dtype=dtype)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        if two_directions:
            o = ops.bidirectional_linear_attn(q, k, v, scale=1.0, normalize=True)
        else:
            o, _ = ops.chunk_linear_attn(q, k, v, scale=1.0)
    assert o.dtype == torch.float16
    torch.testing.assert_close(o, v.half())


@pytest.mark.parametrize("normalize", [False, True])
def test_reverse(normalize: bool) -> None:
    """Time backwards in every packed sequence, each from its own end."""
    bounds = [0, 0, 4, 15, 20]
    q, k, v = positive(1, 20, 2, 6), positive(1, 20, 2, 6), normal(1, 20, 2, 5)
    S, z = normal(4, 2, 6, 5), positive(4, 1, 2, 6)
    run = partial(
        ops.fused_recurrent_linear_attn, reverse=True, normalize=normalize, output_final_state=True
    )
    o, last = run(
        q, k, v, initial_state=(S, z) if normalize else S, cu_seqlens=torch.tensor(bounds)
    )
    for n, (a, b) in enumerate(pairwise(bounds)):
        h0 = (S[n : n + 1], z[n : n + 1]) if normalize else S[n : n + 1]
        flipped = (x[:, a:b].flip(1) for x in (q, k, v))
        p, state = ops.fused_recurrent_linear_attn(
            *flipped, initial_state=h0, normalize=normalize, output_final_state=True
        )
        torch.testing.assert_close(o[:, a:b].flip(1), p)
        got = tuple(x[n : n + 1] for x in last) if normalize else last[n : n + 1]
        torch.testing.assert_close(got, state)


@pytest.mark.parametrize("V", [7, 8, 255, 256])
def test_any_width_of_values(V: int) -> None:
    """The denominator is one more column, or, past what kernels take, a call of its own."""
    x = draw(FAMILY, V=V, K=3, T=9)
    assert_rule(gradients(operator(FAMILY), FAMILY, x), definition(FAMILY, x), x)


def test_rfa_denominator_is_rfa_of_ones() -> None:
    q, k, g = positive(1, 30, 2, 6), positive(1, 30, 2, 6), -positive(1, 30, 2)
    above, _ = ops.chunk_simple_gla(
        q, (1 - g.exp())[..., None] * k, torch.ones(1, 30, 2, 1).double(), g
    )
    v = normal(1, 30, 2, 5)
    weighted, _ = ops.chunk_simple_gla(q, (1 - g.exp())[..., None] * k, v, g)
    torch.testing.assert_close(ops.chunk_rfa(q, k, v, g)[0], weighted / above)


def two_directions(v: Tensor, g: Tensor | None = None, normalize: bool = False, **rest) -> Tensor:  # type: ignore[no-untyped-def]
    run = partial(
        reference.bidirectional_linear_attention,
        g=None if g is None else g.expand(v.shape[:3]),
        **rest,
    )
    return run(v=v) / run(v=torch.ones_like(v)) if normalize else run(v=v)


def bidirectional(tensors: dict[str, str], **options: bool):  # type: ignore[no-untyped-def]
    def chunk(initial_state=None, output_final_state=False, **arguments):  # type: ignore[no-untyped-def]
        return ops.bidirectional_linear_attn(**arguments, **options), None

    return row(
        "bidirectional", tensors, chunk=chunk, step=lambda: None, state=(), sizes={"HV": 4},
        definition=stateless(partial(two_directions, **options)),
    )  # fmt: skip


CASES = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp64": {"dtype": torch.float64},
    "packed": {"cu_seqlens": [0, 0, 9, 9, 27, 37]},
    "one token": {"T": 1},
    "hard gates": {"gate": "-80"},
    "resets": {"gate": "-inf"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gate", [None, "B T HV gate", "HV gate"])
def test_both_directions(gate: str | None, normalize: bool, case: str) -> None:
    """Against a recurrence from each end; all gradients."""
    tensors = (POSITIVE if normalize else QKV) | ({"g": gate} if gate else {})
    family = bidirectional(tensors, normalize=normalize)
    x = draw(family, states=False, **CASES[case])
    assert_rule(gradients(family.chunk, family, x), definition(family, x), x)


def test_both_directions_is_two_causal_minus_the_diagonal() -> None:
    q, k, v = normal(1, 33, 2, 6), normal(1, 33, 2, 6), normal(1, 33, 2, 5)
    causal = partial(ops.chunk_linear_attn, normalize=False, scale=1.0)
    own = (q * k).sum(-1, keepdim=True) * v
    expected = causal(q, k, v)[0] + causal(*(x.flip(1) for x in (q, k, v)))[0].flip(1) - own
    torch.testing.assert_close(ops.bidirectional_linear_attn(q, k, v, scale=1.0), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_padding_is_not_there(gated: bool) -> None:
    """Rows padded on either side give what they give without padding."""
    q, k, v = positive(2, 12, 2, 6), positive(2, 12, 2, 6), normal(2, 12, 2, 5)
    g = -positive(2, 12, 2) if gated else None
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, 9:] = 0
    o = ops.bidirectional_linear_attn(q, k, v, g, normalize=True, mask=mask)
    for b, kept in ((0, slice(5, 12)), (1, slice(0, 9))):
        alone = (None if x is None else x[b : b + 1, kept] for x in (q, k, v, g))
        expected = ops.bidirectional_linear_attn(*alone, normalize=True)
        torch.testing.assert_close(o[b : b + 1, kept], expected)


def test_errors() -> None:
    q, v = normal(1, 5, 2, 4), normal(1, 5, 2, 3)
    pair = torch.zeros(1, 2, 4, 3).double(), torch.zeros(1, 1, 2, 4).double()
    with pytest.raises(ValueError) as error:
        ops.chunk_linear_attn(q, q, v, initial_state=pair, normalize=False)
    assert str(error.value) == (
        "lsm::chunk_linear_attn: initial_state must be the tensor S without normalize, got a tuple"
    )
    with pytest.raises(RuntimeError) as error:
        ops.bidirectional_linear_attn(q, q, v, normal(3))
    assert str(error.value) == (
        "lsm::bidirectional_linear_attn: g must have shape [HV] = [2], got [3]"
    )
    with pytest.raises(RuntimeError, match=r"use chunk_linear_attn, or torch\.no_grad"):
        token = q[:, 0].clone().requires_grad_()
        ops.linear_attn_step(token, token, v[:, 0], pair)
