"""The definitions around the chunk engine against FLA's plain ones, and against formulas that share
no line with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, Call, assert_rule, definition, draw, gradients
from peers import fla_module
from torch import Tensor

from lsm_cuda import modules, ops

BY_NAME = {str(family): family for family in FAMILIES}


def head_first(naive: Callable[..., Any], *names: str) -> Call:
    """A function over ``[B, H, T, ·]`` as one over ``[B, T, H, ·]``."""

    def call(**x):  # type: ignore[no-untyped-def]
        x |= {n: x[n].transpose(1, 2) for n in names}
        result = naive(**x)
        o, state = result if isinstance(result, tuple) else (result, None)
        return o.transpose(1, 2), state

    return call


def over_gla(prologue: Callable[..., tuple[Tensor, ...]]) -> Call:
    """FLA's loop of gated linear attention on what ``prologue`` makes of the arguments."""

    def call(cu_seqlens=None, initial_state=None, **x):  # type: ignore[no-untyped-def]
        naive = fla_module("ops/gla/naive.py").naive_recurrent_gla
        q, k, v, g, *own = prologue(**x)
        o, state = naive(q, k, v, g, initial_state, output_final_state=True)
        return (o + own[0] if own else o), state

    return call


def rwkv(k: Tensor, v: Tensor, r: Tensor, w: Tensor, u: Tensor, **rest: Any) -> Any:
    naive = fla_module("ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6
    w = (w if w.dim() == 4 else w.expand(*r.shape[:2], -1, -1)).transpose(1, 2)
    r, k, v = (x.transpose(1, 2) for x in (r, k, v))
    rest.pop("cu_seqlens", None)
    o, state = naive(r, k, v, w, u.reshape(u.shape[-2:]), output_final_state=True, **rest)
    return o.transpose(1, 2), state


def gsa(cu_seqlens: None = None, **x: Any) -> Any:
    return fla_module("ops/gsa/naive.py").naive_recurrent_gsa(**x, output_final_state=True)


def additive(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    z = k.logcumsumexp(1)
    return q, (k - z).exp(), v, torch.cat([z[:, :1], z[:, :-1]], 1) - z


def input_gate(q: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return q, 1 - g.exp(), v, g


def augmented(q: Tensor, v: Tensor, g: Tensor, w_aug: Tensor) -> tuple[Tensor, ...]:
    """As the authors write it: the sigmoid takes the weighted value."""
    own = torch.einsum("bthd,bthd->bth", q, torch.einsum("bthd,hd->bthd", 1 - g.exp(), w_aug))
    return q, 1 - g.exp(), v, g, torch.sigmoid(own.unsqueeze(-1) * v)


def naive(path: str, name: str) -> Callable[..., Any]:
    """Loaded when called, so that what is missing skips one test."""
    return lambda *args, **kwargs: getattr(fla_module(path), name)(*args, **kwargs)


def pairs(weight: Callable[[Tensor], Tensor]) -> Call:
    """Attention with a polynomial of the scores as its weights: all pairs of tokens at once."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, q = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (k, q))
        a = weight(torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5).tril()
        o = torch.einsum("bhts,bshv->bthv", a, v)
        return o / (a.sum(-1).transpose(1, 2).unsqueeze(-1) + 1e-6)

    return call


def both_gates(q: Tensor, k: Tensor, v: Tensor, g: Tensor, gv: Tensor) -> Tensor:
    """Each pair of tokens with the decay between them, a sum of gates over a window."""
    k, q = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (k, q))
    T = q.shape[1]
    t = torch.arange(T)
    inside = (t[None, :, None] < t) & (t <= t[:, None, None])  # [t, s, u]: s < u ≤ t
    key, value = (torch.einsum("tsu,buhc->bhtsc", inside.to(x.dtype), x).exp() for x in (g, gv))
    seen = torch.ones(T, T, dtype=q.dtype).tril()
    scores = torch.einsum("bthk,bshk,bhtsk,ts->bhts", q, k, key, seen) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshv,bhtsv->bthv", scores, v, value)


def softmax_over_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LightNet as its name for the keys says: a softmax of each channel over the tokens so far."""
    T = q.shape[1]
    seen = torch.ones(T, T, dtype=torch.bool).tril().view(1, T, T, 1, 1)
    p = torch.where(seen, k.unsqueeze(1), -torch.inf).softmax(2)  # [B, t, s, H, K]
    return q.shape[-1] ** -0.5 * torch.einsum("bthk,btshk,bshv->bthv", q, p, v)


def seq_first(naive: Callable[..., Any], **options: Any) -> Call:
    """FLA's plain delta rules, which do not take packed sequences."""

    def call(cu_seqlens: None = None, **x: Any) -> Any:
        return naive(**x, output_final_state=True, **options)

    return call


def fast_weights(q, k, v, beta, initial_state, cu_seqlens=None):  # type: ignore[no-untyped-def]
    """FLA's map (tests/modules/test_feature_map.py) and its recurrence, which scales by K^-1/2."""
    features = modules.DPFPFeatureMap(q.shape[-1], nu=2)
    q, k = (y / y.sum(-1, keepdim=True).clamp(min=1e-6) for y in (features(q), features(k)))
    recurrence = head_first(naive(DELTA, "delta_rule_recurrence"), "q", "k", "v", "beta")
    return recurrence(q=q * q.shape[-1] ** 0.5, k=k, v=v, beta=beta, initial_state=initial_state)


def kda_peer(cu_seqlens: None = None, **x: Any) -> Any:
    return fla_module("ops/kda/naive.py").naive_recurrent_kda(**x, output_final_state=True)


def householder(cu_seqlens: None = None, **x: Any) -> Any:
    """Micro-steps flat."""
    naive = fla_module("ops/gated_delta_product/naive.py").naive_recurrent_gated_delta_product
    x |= {n: x[n].flatten(1, 2) for n in ("k", "v", "beta")}
    return naive(**x, scale=12**-0.5, output_final_state=True, num_householder=2)


def low_rank(name: str, **options: int) -> Call:
    def call(r, w, k, v, kk, a, initial_state, cu_seqlens=None):  # type: ignore[no-untyped-def]
        function = getattr(fla_module("ops/generalized_delta_rule/dplr/naive.py"), name)
        tokens = (r * r.shape[-1] ** 0.5, k, v, -kk, kk * a, w)  # which it scales by K^-1/2
        o, state = function(*(x.transpose(1, 2) for x in tokens), initial_state, **options)
        return o.transpose(1, 2), state

    return call


def least_squares(q, k, v, g, beta, lamb):  # type: ignore[no-untyped-def]
    return fla_module("ops/mesa_net/naive.py").naive_mesa_net_exact(q, k, v, g, lamb, beta)[0]


def transformers(model: str, name: str) -> Call:
    """A function of a model in transformers, over ``[B, T, H, ·]``."""

    def call(q, k, v, g, beta, initial_state=None, cu_seqlens=None, **logits):  # type: ignore[no-untyped-def]
        modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
        if logits:
            g = ops.fused_gdn_gate(g, **logits)
            beta = 2 * beta.sigmoid()
        return getattr(modeling, name)(
            q, k, v, g=g, beta=beta, initial_state=initial_state, output_final_state=True,
            use_qk_l2norm_in_kernel=bool(logits),
        )  # fmt: skip

    return call


DELTA = "ops/delta_rule/naive.py"
GDN = "ops/gated_delta_rule/naive.py"
BASED, REBASED = "ops/based/naive.py", "ops/rebased/naive.py"
ABC = "ops/abc/naive.py"
# name: family, what it is compared with, sizes; "states": False compares outputs alone
PEERS: dict[str, tuple[str, Call, dict[str, Any]]] = {
    "rwkv6": ("rwkv6", rwkv, {"HV": 2}),
    "rwkv5": ("rwkv5", rwkv, {"B": 1}),
    "hgrn2": ("hgrn2", over_gla(input_gate), {}),
    "metala": ("metala", over_gla(augmented), {}),
    "lightnet": ("lightnet", over_gla(additive), {"states": False}),
    "lightnet as a softmax": ("lightnet", softmax_over_time, {"states": False}),
    "both gates": ("two_sided", both_gates, {"states": False, "T": 12}),
    "gsa": ("gsa", gsa, {}),
    "abc": ("abc", head_first(naive(ABC, "naive_recurrent_abc"), *"qkvs"), {"states": False}),
    "abc as gsa without a gate": ("abc", gsa, {"states": False}),
    "abc by cumulative sums": (
        "abc",
        head_first(naive(ABC, "naive_cumsum_abc"), *"qkvs"),
        {"states": False, "HQ": 2},
    ),
    "based": (
        "based",
        head_first(naive(BASED, "naive_parallel_based"), *"qkv"),
        {"HV": 2, "states": False},
    ),
    "based in chunks": (
        "based",
        head_first(partial(naive(BASED, "naive_chunk_based"), chunk_size=16), *"qkv"),
        {"HV": 2, "T": 48, "states": False},
    ),
    "based as pairs": ("based", pairs(lambda x: 1 + x + x * x / 2), {"states": False}),
    "rebased": (
        "rebased",
        head_first(naive(REBASED, "naive_parallel_rebased"), *"qkv"),
        {"states": False},
    ),
    "delta_rule": (
        "delta_rule",
        head_first(
            seq_first(naive(DELTA, "delta_rule_recurrence")),
            *("q", "k", "v", "beta"),
        ),
        {"HV": 2},
    ),
    "delta_rule in chunks": (
        "delta_rule",
        head_first(
            partial(naive(DELTA, "delta_rule_chunkwise"), chunk_size=16), "q", "k", "v", "beta"
        ),
        {"HV": 2, "T": 48, "states": False},
    ),
    "fwp": ("fwp", fast_weights, {"HV": 2}),
    "gated_delta_rule": (
        "gated_delta_rule",
        seq_first(naive(GDN, "naive_recurrent_gated_delta_rule")),
        {"HV": 2},
    ),
    "gated_delta_rule in chunks": (
        "gated_delta_rule",
        seq_first(naive(GDN, "naive_chunk_gated_delta_rule"), chunk_size=16),
        {"HV": 2},
    ),
    "gated_delta_rule of Qwen3-Next": (
        "gated_delta_rule",
        transformers("qwen3_next", "torch_recurrent_gated_delta_rule"),
        {},
    ),
    "gated_delta_rule of Qwen3-Next in chunks": (
        "gated_delta_rule",
        transformers("qwen3_next", "torch_chunk_gated_delta_rule"),
        {},
    ),
    "gated_delta_rule of OLMo hybrid from logits": (
        "gated_delta_rule from logits",
        transformers("olmo_hybrid", "torch_recurrent_gated_delta_rule"),
        {},
    ),
    # gates drawn mildly: sums of strong ones lose digits
    "gated_delta_rule of OLMo hybrid in chunks": (
        "gated_delta_rule",
        transformers("olmo_hybrid", "torch_chunk_gated_delta_rule"),
        {},
    ),
    "kda": ("kda", kda_peer, {}),
    "kda in chunks": (
        "kda",
        seq_first(naive("ops/kda/naive.py", "naive_chunk_kda"), chunk_size=16),
        {"T": 48},
    ),
    "kda of Kimi Linear in chunks": (
        "kda",
        transformers("kimi_linear", "chunk_kimi_delta_attention"),
        {"HV": 2},
    ),
    "kda of Kimi Linear": (
        "kda",
        transformers("kimi_linear", "recurrent_kimi_delta_attention"),
        {"HV": 2},
    ),
    "gated_delta_product": ("gated_delta_product", householder, {"HV": 2}),
    # its recurrence decays before it erases, which its kernels and this do not
    "comba": ("comba", seq_first(naive("ops/comba/naive.py", "naive_chunk_comba")), {"HV": 2}),
    "rwkv7": ("rwkv7", low_rank("dplr_recurrence"), {}),
    "rwkv7 in chunks": ("rwkv7", low_rank("dplr_chunkwise", chunk_size=16), {"T": 48}),
    "mesa_net": ("mesa_net", least_squares, {"states": False, "V": 12}),
    "rebased as pairs": ("rebased", pairs(torch.square), {"states": False}),
}


def outputs(call: Call) -> Call:
    """Without states."""

    def only(initial_state=None, cu_seqlens=None, **x):  # type: ignore[no-untyped-def]
        assert initial_state is None
        result = call(**x)
        return (result[0] if isinstance(result, tuple) else result), None

    return only


@pytest.mark.parametrize("name", PEERS)
def test_definition_is_theirs(name: str) -> None:
    """Outputs, final states and gradients; both in fp32 against the definition in fp64."""
    of, call, sizes = PEERS[name]
    family = BY_NAME[of]
    if of == "rebased":  # FLA's loop has an eps of its own
        family = dataclasses.replace(family, definition=partial(family.definition, eps=1e-6))
    x = draw(family, **sizes)
    if x.states is None:
        family = dataclasses.replace(family, definition=outputs(family.definition))
        call = outputs(call)
    assert_rule(gradients(call, family, x), definition(family, x), x)


def test_iplr_is_theirs() -> None:
    """Which has no decay."""
    theirs = fla_module("ops/generalized_delta_rule/iplr/naive.py").iplr_recurrence
    x = draw(BY_NAME["rwkv7"])
    q, k, v, kk, a = (x.tensors[n] for n in ("r", "k", "v", "kk", "a"))
    (h0,) = x.states
    tokens = (q, k, v, -kk, kk * a)
    o, state = ops.chunk_iplr_delta_rule(*tokens, initial_state=h0, output_final_state=True)
    p, last = theirs(*(y.transpose(1, 2) for y in tokens), h0)
    torch.testing.assert_close(o, p.transpose(1, 2))
    torch.testing.assert_close(state, last)


def test_mesa_net_solves_as_theirs() -> None:
    """In chunks and in a decode step; their divisions by ``· + 1e-5`` are near, not the same."""
    theirs = fla_module("ops/mesa_net/naive.py")
    x = draw(BY_NAME["mesa_net"], T=48, V=12)
    q, k, v, g, beta, lamb = (x.tensors[n] for n in ("q", "k", "v", "g", "beta", "lamb"))
    kk, kv = x.states
    near = partial(torch.testing.assert_close, atol=1e-3, rtol=1e-3)
    o, *last = ops.chunk_mesa_net(q, k, v, g, beta, lamb, kk, kv, True)
    p, *states = theirs.naive_mesa_net_CG(q, k, v, g, lamb, beta, 16, 30, kk, kv)
    near(o, p)
    for a, b in zip(last, states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    token = [y[:, 0] for y in (q, k, v, g)]
    o, *last = ops.mesa_net_decoding_one_step(*token, lamb, beta[:, 0], kk, kv, 30)
    p, *states = theirs.naive_mesa_net_decoding_one_step(*token, lamb, beta[:, 0], kk, kv, 30)
    near(o, p)
    for a, b in zip(last, states, strict=True):
        torch.testing.assert_close(a, b)
