"""The delta rule and its relatives: how they follow from each other, inputs that other
implementations break on, and draft tokens."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from families import FAMILIES, Family, assert_rule, definition, draw, gradients, operator
from torch import Tensor

from lsm_cuda import ops

BY_NAME = {str(family): family for family in FAMILIES}
KDA, GATED, PLAIN = (BY_NAME[name] for name in ("kda", "gated_delta_rule", "delta_rule"))
COMBA, RWKV7, PRODUCT = (BY_NAME[name] for name in ("comba", "rwkv7", "gated_delta_product"))
close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)


def double(family: Family, **options) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments and an initial state in fp64."""
    x = draw(family, dtype=torch.float64, **options)
    return x.tensors, x.states[0]


def agree(a: tuple[Tensor, ...], b: tuple[Tensor, ...], *leaves: Tensor) -> None:
    """Two pairs of an output and a final state, and what they hand back to the leaves."""
    up = [torch.randn_like(t) for t in a]
    for s, t in zip(
        (*a, *torch.autograd.grad(a, leaves, up, retain_graph=True)),
        (*b, *torch.autograd.grad(b, leaves, up, retain_graph=True)),
        strict=True,
    ):
        close(s, t)


def leaves_of(x: dict[str, Tensor], h0: Tensor) -> list[Tensor]:
    return [t.requires_grad_() for t in (*x.values(), h0)]


def test_one_step_per_token_is_the_delta_rule():
    x, h0 = double(GATED)
    leaves, ends = leaves_of(x, h0), {"initial_state": h0, "output_final_state": True}
    a = ops.chunk_gated_delta_rule(**x, **ends)
    agree(a, ops.chunk_gated_delta_product(**x, num_householder=1, **ends), *leaves)
    leaves = [t for t in leaves if t is not x["g"]]
    x.pop("g")
    a = ops.chunk_delta_rule(**x, **ends)
    agree(a, ops.chunk_gated_delta_product(**x, g=None, num_householder=1, **ends), *leaves)


def test_steps_of_a_token_are_tokens_without_decay():
    """As a sequence of T n tokens, of which every n-th decays before it and is read after it."""
    x, h0 = double(PRODUCT)
    o, state = PRODUCT.chunk(**x, initial_state=h0, output_final_state=True)
    g = torch.stack([x["g"], torch.zeros_like(x["g"])], 2).flatten(1, 2)
    q = torch.stack([torch.zeros_like(x["q"]), x["q"]], 2).flatten(1, 2)
    k, v, beta = (x[n].flatten(1, 2) for n in ("k", "v", "beta"))
    p, last = ops.chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=h0, output_final_state=True
    )
    close(o, p[:, 1::2])
    close(state, last)


@pytest.mark.parametrize("family", [PLAIN, GATED, KDA, COMBA], ids=str)
def test_without_strength_there_is_only_decay(family):
    x, h0 = double(family)
    x["beta"] = torch.zeros_like(x["beta"])
    leaves_of(x, h0)
    a = family.chunk(**x, initial_state=h0, output_final_state=True)
    g = x.get("g", torch.zeros(1, dtype=torch.float64))
    g = (g if g.dim() == 4 else g[..., None]).expand(*x["v"].shape[:3], x["q"].shape[-1])
    k, v = torch.zeros_like(x["k"]), x["v"]
    b = ops.chunk_gla(x["q"], k, v, g, initial_state=h0, output_final_state=True)
    agree(a, b, x["q"], h0, *(x[n] for n in ("g",) if n in x))


def test_equal_channels_are_a_scalar_gate():
    """And the gradient of the scalar is the sum of the channels'."""
    x, h0 = double(GATED)
    leaves = leaves_of(x, h0)
    wide = x["g"][..., None].expand(-1, -1, -1, 12)
    a = GATED.chunk(**x, initial_state=h0, output_final_state=True)
    b = ops.chunk_kda(**x | {"g": wide}, initial_state=h0, output_final_state=True)
    agree(a, b, *leaves)


def test_no_gate_is_a_gate_of_one():
    x, h0 = double(PLAIN)
    o = ops.chunk_delta_rule(**x, initial_state=h0)[0]
    close(ops.chunk_gated_delta_rule(**x, g=torch.zeros_like(x["beta"]), initial_state=h0)[0], o)
    close(ops.fused_recurrent_gated_delta_rule(**x, initial_state=h0)[0], o)


def test_low_rank_form_of_the_delta_rule():
    """It reads before the decay what the delta rule reads after it."""
    x, h0 = double(KDA, HV=2)
    leaves, ends = leaves_of(x, h0), {"initial_state": h0, "output_final_state": True}
    q, k, v, beta, g = (x[n] for n in ("q", "k", "v", "beta", "g"))
    strength = beta[..., None]
    rows = (q, strength * k, v)
    a = KDA.chunk(**x, **ends)
    agree(a, ops.chunk_dplr_delta_rule(*rows, -g.exp() * k, strength * k, g, **ends), *leaves)
    a = ops.chunk_delta_rule(q, k, v, beta, **ends)
    leaves = [t for t in leaves if t is not g]
    agree(a, ops.chunk_iplr_delta_rule(*rows, -k, strength * k, **ends), *leaves)
    zero = torch.zeros_like(g)
    agree(a, ops.chunk_dplr_delta_rule(*rows, -k, strength * k, zero, **ends), *leaves)


def test_comba_with_a_decayed_key_is_the_gated_delta_rule():
    x, h0 = double(GATED, HV=2)
    o = GATED.chunk(**x, initial_state=h0)[0]
    close(COMBA.chunk(**x, p=x["g"].exp()[..., None] * x["k"], initial_state=h0)[0], o)


def test_a_strength_per_channel():
    x, h0 = double(PLAIN)
    beta = torch.rand_like(x["v"]).requires_grad_()
    o = ops.chunk_delta_rule(**x | {"beta": beta}, initial_state=h0)[0]
    each = [
        ops.chunk_delta_rule(
            x["q"], x["k"], x["v"][..., i, None], beta[..., i], initial_state=h0[..., i, None]
        )[0]
        for i in range(beta.shape[-1])
    ]
    close(o, torch.cat(each, -1))
    up = torch.randn_like(o)
    (a,), (b,) = (torch.autograd.grad(y, beta, up) for y in (o, torch.cat(each, -1)))
    close(a, b)


def test_strength_two_reflects():
    """``I − 2 k kᵀ`` twice is the identity."""
    x, h0 = double(PLAIN, T=2)
    k = x["k"][:, :1].expand(-1, 2, -1, -1)
    nothing, two = torch.zeros_like(x["v"]), torch.full_like(x["beta"], 2)
    state = ops.chunk_delta_rule(
        x["q"], k, nothing, two, initial_state=h0, output_final_state=True
    )[1]
    close(state, h0)


@pytest.mark.parametrize("gates", [("gv",), ("g", "gv"), ("gk", "gv"), ("g", "gk")])
def test_gates_of_the_recurrent_name(gates):
    x, h0 = double(KDA)
    q, k, v, beta = (x[n] for n in ("q", "k", "v", "beta"))
    log = {"g": x["g"][..., 0], "gk": x["g"], "gv": -torch.rand_like(v)}
    log = {name: log[name] for name in gates}
    o, state = ops.fused_recurrent_gated_delta_rule(
        q, k, v, **log, beta=beta, initial_state=h0, output_final_state=True
    )
    S = h0
    q, k = (y.repeat_interleave(2, 2) for y in (q, k))
    for t in range(q.shape[1]):
        S = S * log["g"][:, t].exp()[..., None, None] if "g" in log else S
        S = S * log["gk"][:, t].exp()[..., None] if "gk" in log else S
        S = S * log["gv"][:, t].exp()[..., None, :] if "gv" in log else S
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        close(o[:, t], torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / 12**0.5)
    close(state, S)
    _, turned = ops.fused_recurrent_gated_delta_rule(
        q, k, v, **log, beta=beta, initial_state=h0.mT, output_final_state=True,
        state_v_first=True,
    )  # fmt: skip
    close(turned.mT, state)


def test_names_of_one_function():
    x = draw(GATED).tensors
    q, k, v, g, beta = (x[n] for n in ("q", "k", "v", "g", "beta"))
    kk, w = k, draw(KDA, HV=2).tensors["g"]
    v2, g2, beta2 = v[:, :, :2], g[:, :, :2], beta[:, :, :2]
    scale = 12**-0.5
    pairs = [
        (ops.chunk_delta_rule(q, k, v, beta), ops.fused_chunk_delta_rule(q, k, v, beta)),
        (ops.chunk_delta_rule(q, k, v, beta), ops.fused_recurrent_delta_rule(q, k, v, beta)),
        (
            ops.chunk_delta_rule(q, k, v, torch.ones_like(beta)),
            ops.fused_recurrent_delta_rule(q, k, v),
        ),
        (
            ops.chunk_gated_delta_rule(q, k, v, g, beta),
            ops.fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta),
        ),
        (
            ops.chunk_kda(q, k, v2, w, beta2, lower_bound=-5.0, use_gate_in_kernel=True),
            ops.fused_recurrent_kda(q, k, v2, w, beta2, lower_bound=-5.0, use_gate_in_kernel=True),
        ),
        (
            ops.chunk_comba(q, k, v2, k / 2, g2),
            ops.fused_recurrent_comba(q, k, k / 2, v2, g2, torch.ones_like(g2)),
        ),
        (
            ops.chunk_rwkv7(q, w, k, v2, -kk, kk / 2, scale=None),
            ops.fused_recurrent_rwkv7(q, w, k, v2, -kk, kk / 2, output_final_state=False),
        ),
        (
            ops.chunk_iplr_delta_rule(q, k, v2, -kk, kk / 2),
            ops.fused_recurrent_iplr_delta_rule(q, k, v2, -kk, kk / 2),
        ),
    ]
    for (a, none), (b, _) in pairs:
        assert torch.equal(a, b) and none is None
    turned = (x.flip(1) for x in (q, w, k, v2, kk, torch.full_like(kk, 0.5)))
    backwards = ops.fused_mul_recurrent_rwkv7(*turned, scale=scale, reverse=True)[0]
    assert torch.equal(backwards.flip(1), pairs[-2][0][0])


EXTREMES = {
    "one key": {"k": lambda k: k[:, :1].expand_as(k)},
    "one key, beta 1": {"k": lambda k: k[:, :1].expand_as(k), "beta": torch.ones_like},
    "beta 0": {"beta": torch.zeros_like},
    "beta 1": {"beta": torch.ones_like},
    "beta 2": {"beta": lambda b: torch.full_like(b, 2)},
    "keys of norm 10": {"k": lambda k: 10 * k, "beta": lambda b: b / 100},
    "zero keys": {"k": torch.zeros_like},
    "g 0": {"g": torch.zeros_like},
    "g -80": {"g": lambda g: torch.full_like(g, -80)},
    "g -80 at times": {"g": lambda g: torch.where(torch.rand_like(g) < 0.1, -80, g)},
}
SHAPES = {
    "long": {"T": 130, "B": 1},
    "one token": {"T": 1},
    "short sequences": {"T": 6, "cu_seqlens": [0, 1, 1, 2, 5, 6, 6]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("family", [PLAIN, GATED, KDA, COMBA], ids=str)
def test_extremes(family, extreme, dtype):
    """No blow-up, and as right as the recurrence itself, forward and backward."""
    changes = EXTREMES[extreme]
    for shape in SHAPES.values():
        x = draw(family, dtype=dtype, **shape)
        tensors = x.tensors | {name: f(x.tensors[name]) for name, f in changes.items()}
        if family is COMBA:  # else its transitions need not contract
            tensors["p"] = tensors["k"]
        x = dataclasses.replace(x, tensors=tensors)
        results = gradients(operator(family), family, x)
        assert all(t.isfinite().all() for t in results.values())
        assert_rule(results, definition(family, x), x)


test_extremes.applies = lambda family, extreme: EXTREMES[extreme].keys() <= family.tensors.keys()


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("family", [PLAIN, GATED, KDA], ids=str)
def test_long_keys_at_full_strength(family, beta):
    """A token's correction overshoots up to 199 times, which is what the rule says: over a few
    tokens it is finite, and as right as the recurrence."""
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(family, dtype=dtype, **SHAPES["short sequences"])
        changes = {"k": 10 * x.tensors["k"], "beta": torch.full_like(x.tensors["beta"], beta)}
        x = dataclasses.replace(x, tensors=x.tensors | changes)
        results = gradients(operator(family), family, x)
        assert all(t.isfinite().all() for t in results.values())
        assert_rule(results, definition(family, x), x)


def test_longhorn_minimises():
    """``|S − S_{t-1}|² + Σ_d β_d (Sᵀ k − v)_d²``: no step from the new state does better."""
    rng = torch.Generator().manual_seed(0)
    k, v, beta, before = (
        torch.randn(*shape, generator=rng, dtype=torch.float64)
        for shape in ((1, 1, 5), (1, 1, 4), (1, 1, 4), (1, 1, 5, 4))
    )
    beta, state = beta.exp(), before.clone()
    ops.longhorn_step(k, k, v, beta, state)
    S = state.requires_grad_()
    error = torch.einsum("bhkv,bhk->bhv", S, k) - v
    loss = (S - before).square().sum() + (beta * error.square()).sum()
    close(torch.autograd.grad(loss, S)[0], torch.zeros_like(S))


def test_longhorn_takes_a_strength_per_head():
    x, h0 = double(BY_NAME["longhorn"])
    beta = x["beta"][..., 0]
    for diagonal in (False, True):
        run = partial(ops.chunk_longhorn, diagonal=diagonal, initial_state=h0)
        a = run(**x | {"beta": beta})[0]
        close(a, run(**x | {"beta": beta[..., None].expand_as(x["v"])})[0])


def test_mesa_net_of_few_iterations_in_chunks_and_steps():
    """One and the same approximation."""
    family = BY_NAME["mesa_net"]
    x = draw(family, T=7)
    q, k, v, g, beta, lamb = (x.tensors[n] for n in ("q", "k", "v", "g", "beta", "lamb"))
    H, G = (s.clone() for s in x.states)
    o, *last = ops.chunk_mesa_net(q, k, v, g, beta, lamb, H, G, True, max_CG_iteration=3)
    exact = ops.chunk_mesa_net(q, k, v, g, beta, lamb, H, G)[0]
    assert not torch.allclose(o, exact, rtol=1e-3)
    for t in range(7):
        token = (y[:, t] for y in (q, k, v, g))
        p, *state = ops.mesa_net_decoding_one_step(*token, lamb, beta[:, t], H, G, 3)
        assert state[0] is not H
        H, G = state
        torch.testing.assert_close(o[:, t], p, atol=2e-5, rtol=1e-4)
    for a, b in zip(last, (H, G), strict=True):
        torch.testing.assert_close(a, b)


def test_mesa_net_errors():
    x = draw(BY_NAME["mesa_net"]).tensors
    with pytest.raises(RuntimeError, match=r"chunk_mesa_net: h_kk_init must have shape \[N, H, K"):
        ops.chunk_mesa_net(**x, h_kk_init=torch.zeros(2, 2, 12, 10))
    x["q"].requires_grad_()
    (dq,) = torch.autograd.grad(ops.chunk_mesa_net(**x)[0].sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|double backward"):
        dq.sum().backward()


def test_gates_are_their_formulas():
    g, rate, bias = torch.randn(2, 3, 4, 5), torch.randn(4), torch.randn(20)
    x = g + bias.view(4, 5)
    kimi = -rate.exp()[:, None] * torch.nn.functional.softplus(x)
    torch.testing.assert_close(ops.fused_kda_gate(g, rate, bias), kimi)
    torch.testing.assert_close(ops.fused_kda_gate(g, None, bias, -5.0), -5 * x.sigmoid())
    x = g[..., 0] + bias[:4]
    scalar = -rate.exp() * torch.nn.functional.softplus(x)
    torch.testing.assert_close(ops.fused_gdn_gate(g[..., 0], rate, bias[:4]), scalar)
    assert ops.fused_gdn_gate(g[..., 0].bfloat16(), rate.bfloat16()).dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"dt_bias must have shape \[HV \* K\] = \[20\]"):
        ops.fused_kda_gate(g, rate, bias[:4])
    with pytest.raises(ValueError, match="A_log must be given"):
        ops.fused_kda_gate(g, None)
    with pytest.raises(ValueError, match="lower_bound must be below 0, got 1"):
        ops.fused_kda_gate(g, None, lower_bound=1.0)


def test_options_without_what_they_need():
    x = draw(GATED).tensors
    with pytest.raises(ValueError, match="use_gate_in_kernel=True needs A_log"):
        ops.chunk_gated_delta_rule(**x, use_gate_in_kernel=True)
    with pytest.raises(ValueError, match="allow_neg_eigval=True needs use_beta_sigmoid"):
        ops.chunk_gated_delta_rule(**x, allow_neg_eigval=True)


# Draft tokens. Micro-steps: rows of k, v and beta per token.

DRAFTS = {
    "delta_rule": (PLAIN, 1),
    "gated_delta_rule": (GATED, 1),
    "kda": (KDA, 1),
    "comba": (COMBA, 1),
    "dplr": (RWKV7, 1),
    "two steps": (PRODUCT, 2),
}


def draft(name: str) -> tuple[str, dict[str, Tensor], Tensor, int]:
    """An operator, five tokens for each of three sequences, and a state."""
    family, n = DRAFTS[name]
    x = draw(family, T=5, B=3)
    tensors = dict(x.tensors)
    if name == "dplr":
        kk, a = tensors.pop("kk"), tensors.pop("a")
        tensors |= {"q": tensors.pop("r"), "g": tensors.pop("w"), "a": -kk, "b": kk * a}
    if n > 1:
        tensors |= {key: tensors[key].flatten(1, 2) for key in ("k", "v", "beta")}
    operator_name = "gated_delta_rule" if n > 1 else name
    return operator_name, tensors, x.states[0], n


def whole(name: str, x: dict[str, Tensor], state: Tensor, n: int) -> tuple[Tensor, Tensor]:
    run = {
        "delta_rule": ops.chunk_delta_rule,
        "gated_delta_rule": partial(ops.chunk_gated_delta_product, num_householder=n),
        "kda": ops.chunk_kda,
        "comba": ops.chunk_comba,
        "dplr": lambda g, **rest: ops.chunk_dplr_delta_rule(gk=g, **rest),
    }[name]
    return run(**x, initial_state=state, output_final_state=True)


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("m", [0, 3, 5])
def test_commit_is_a_run_over_the_accepted_tokens(name, m):
    op, x, state, n = draft(name)
    before = state.clone()
    o, tokens = ops.delta_verify(op, **x, state=state, num_householder=n)
    assert torch.equal(state, before)
    assert torch.equal(o, whole(op, x, before, n)[0])
    tokens.commit(m)
    part = {
        name: t[:, : m * (1 if name in "qg" or t.shape[1] == 5 else n)] for name, t in x.items()
    }
    assert torch.equal(state, whole(op, part, before, n)[1])
    with pytest.raises(RuntimeError, match="have been committed"):
        tokens.commit(m)


@pytest.mark.parametrize("name", DRAFTS)
def test_sequences_accept_different_numbers(name):
    op, x, state, n = draft(name)
    before = state.clone()
    ops.delta_verify(op, **x, state=state, num_householder=n)[1].commit(torch.tensor([2, 0, 5]))
    for b, m in enumerate([2, 0, 5]):
        part = {
            name: t[b : b + 1, : m * (1 if name in "qg" or t.shape[1] == 5 else n)]
            for name, t in x.items()
        }
        expected = whole(op, part, before[b : b + 1], n)[1]
        torch.testing.assert_close(state[b : b + 1], expected)


def test_draft_errors():
    op, x, state, _ = draft("delta_rule")
    with pytest.raises(ValueError, match=r"operator must be one of delta_rule.*got 'gla'"):
        ops.delta_verify("gla", **x, state=state)
    with pytest.raises(ValueError, match="kda needs g"):
        ops.delta_verify("kda", **x, state=state)
    with pytest.raises(ValueError, match="delta_rule does not take p"):
        ops.delta_verify(op, **x, p=x["k"], state=state)
    with pytest.raises(RuntimeError, match="state is updated in place and must be contiguous"):
        ops.delta_verify(op, **x, state=state.mT.contiguous().mT)
    with pytest.raises(RuntimeError, match="has no backward"):
        ops.delta_verify(op, **x | {"k": x["k"].requires_grad_()}, state=state)
    x["k"].requires_grad_(False)
    with pytest.raises(ValueError, match="m must be in 0 to 5, got 6"):
        ops.delta_verify(op, **x, state=state)[1].commit(6)
    with pytest.raises(ValueError, match=r"m must have shape \[B\] = \[3\], got \[2\]"):
        ops.delta_verify(op, **x, state=state)[1].commit(torch.tensor([1, 2]))
